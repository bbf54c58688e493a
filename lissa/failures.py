"""Explains torch's derivative errors: the operation that fails, why, and the mode or switch that works.

Knows the words of torch's errors; knows nothing of how products are computed.
"""

import functools
import logging
import re
from typing import NamedTuple


class Cause(NamedTuple):
    """One way to fail: a pattern in torch's message, what it means, and what to do. `{op}` is the pattern's group.

    A `ValueError` is the caller's to mend: no other mode would be right.
    """

    pattern: str
    meaning: str
    remedy: str
    error: type[Exception] = NotImplementedError


_CAUSES = (
    Cause(
        r"(?P<op>[sS]parse)(CPU|CUDA|_coo_tensor| gradient| tensors)",
        "a gradient is sparse, as that of torch.gather(sparse_grad=True) is, and torch.func cannot differentiate it",
        "Use mode='double-backward' or 'auto', or sparse=False.",
    ),
    Cause(
        r"a difference of gradients with unit roundoff (?P<op>\S+)",
        "with a unit roundoff of {op} a difference of gradients is mostly rounding",
        "Use mode='auto', or float32 or float64 parameters.",
    ),
    Cause(
        r"differences of gradients disagree by (?P<op>\S+)",
        "differences of gradients over two step lengths disagree by {op}, because of a kink (ReLU, max pooling) or "
        "strong curvature within the step",
        "Use mode='auto', or float64 parameters, whose step is shorter.",
    ),
    Cause(
        r"forward AD with (?P<op>\S*mkldnn\S*)",
        "`{op}`, oneDNN's kernel, has no forward-mode derivative",
        "Use mode='reverse-over-reverse', 'double-backward' or 'auto', or switch the kernel off around the call: "
        "`with torch.backends.mkldnn.flags(enabled=False):`.",
    ),
    Cause(
        r"forward AD with (?P<op>[\w:.]+)",
        "`{op}` has no forward-mode derivative",
        "Use mode='auto', 'double-backward' or 'reverse-over-reverse'.",
    ),
    Cause(
        r"derivative for the forward-mode derivative of (?P<op>\w+)",
        "torch's forward-mode derivative of `{op}` cannot be differentiated (it gives wrong numbers)",
        "Use mode='reverse-over-reverse', 'forward-over-reverse', 'double-backward' or 'auto'.",
    ),
    Cause(
        r"derivative for '?(?P<op>[\w:.]*(attention|mha|multi_head)[\w:.]*)'? is not implemented",
        "`{op}`, a fused attention kernel, has no second derivative",
        "Use mode='auto', or switch to plain kernels around the call: `with lissa.kernels.twice_differentiable():`.",
    ),
    Cause(
        r"derivative for '?(?P<op>[\w:.]+)'? is not implemented",
        "`{op}` has no second derivative",
        "Use mode='finite-difference' or 'auto', or write the operation with ones that have it "
        "(for nn.EmbeddingBag: nn.Embedding and a sum).",
    ),
    Cause(
        r"Cannot access data pointer of Tensor|Cannot access storage|\.numpy\(\)|have a concrete value",
        "an operation reads the memory of its input, as packed sequences (`pack_padded_sequence`) do, "
        "and torch.func's tensors have none",
        "Use mode='double-backward' or 'auto', or padded sequences.",
    ),
    Cause(
        r"in-place operation .*\((?P<op>[\w:.]+)\).*mutate a captured Tensor",
        "the loss changes a tensor outside of it in place (`{op}`), as BatchNorm in train mode does with its buffers",
        "Put the model in eval mode, or pass the buffers to torch.func.functional_call as copies.",
        ValueError,
    ),
    Cause(
        r"vmap: inplace arithmetic|vmap: (?P<op>aten::\S+)\(self, \*extra_args\) is not possible",
        "the loss writes in place into a tensor that vmap does not vary",
        "Loop over the vectors, or write the operation out of place.",
    ),
    Cause(
        r"vmap: It looks like you're .*(\.item\(\)|data-dependent control flow)",
        "the loss branches on a value that differs between the vectors of vmap",
        "Use mode='reverse-over-reverse', 'double-backward' or 'auto', or loop over the vectors.",
    ),
)


def explained(call: str, error: Exception) -> Exception:
    """`error` in words that name the call, the operation and what works; `error` itself where its cause is unknown."""
    message = str(error)
    for cause in _CAUSES:
        match = re.search(cause.pattern, message, re.DOTALL)
        if match:
            op = match.groupdict().get("op") or ""
            first_line = message.strip().split("\n")[0]
            return cause.error(
                f"`{call}` failed: {cause.meaning.format(op=op.rstrip('.'))}. {cause.remedy} (torch: {first_line})"
            )
    return error


@functools.cache
def say_once(logger: logging.Logger, message: str) -> None:
    """Logs a warning the first time it is asked to, however often a loop runs into its cause."""
    logger.warning(message)
