"""Rewrites a recorded function into one that computes the same with fewer, larger matrix products.

Each pass is one algebraic identity, read from left to right, on a `torch.fx` graph of aten operations as `make_fx`
records it. Products of derivatives are full of small matrix products that share an operand: one large product does the
same multiplications several times faster. Knows operations and shapes; knows nothing of losses or vectors.
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

aten: Any = torch.ops.aten

Pass: TypeAlias = Callable[[GraphModule], None]
"""Rewrites a graph in place, and keeps `node.meta["val"]` true in shape and dtype."""

SMALL = 2**19
"""Multiplications of a product that is small enough to be joined to others: about 10 microseconds on one core, of
which half is not arithmetic. Larger ones run near the speed of the machine, and copying their operands would cost."""

THIN = 16
"""Columns of an operand so few that its product runs far below the speed of the machine, however long they are: of
784 x 10 at a third. Side by side they run at full speed, and putting them there copies the thin operands alone."""


def simplified(module: GraphModule) -> GraphModule:
    """The module after all passes, which computes the same up to rounding, with contiguous results as before.

    A recording that writes in place is left as it is: the identities hold for values, not for memory.
    """
    if any(_writes(node) for node in module.graph.nodes):
        return module
    outputs = _outputs(module)
    contiguous = [isinstance(out, Node) and out.meta["val"].is_contiguous() for out in outputs]
    for rewrite in PASSES:
        rewrite(module)
        _sort(module)
        module.graph.eliminate_dead_code()
    _keep_contiguous(module, contiguous)
    module.graph.lint()
    module.recompile()
    return module


def drop_views_that_change_nothing(module: GraphModule) -> None:
    """`(x^T)^T = x`, and a view of `x` with the shape of `x` is `x`. Other views may need a copy after later passes."""
    for node in _calls(module, aten.t.default, aten.transpose.int):
        inner = node.args[0]
        if inner.target == node.target and inner.args[1:] == node.args[1:]:
            _replace(node, inner.args[0])
    for node in _calls(module, aten.view.default, aten._unsafe_view.default, aten.expand.default):
        if _shape(node) == _shape(node.args[0]):
            _replace(node, node.args[0])
        elif node.target != aten.expand.default:
            node.target = aten.reshape.default


def compute_once(module: GraphModule) -> None:
    """`f(x), f(x) = y, y with y = f(x)`: equal operations on equal arguments are one."""
    seen: dict[Any, Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.is_impure() or _draws(node):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))  # nodes have unique names
        first = seen.setdefault(key, node)
        if first is not node:
            _replace(node, first)


def fold_shared_operands(module: GraphModule) -> None:
    """`A B_k, k = 1..K: A [B_1 ... B_K]` and `A_k B, k = 1..K: [A_1; ...; A_K] B`: one product for K small ones.

    A batch stride of zero says that an operand is the same for all k, as `vmap` leaves what it does not vary. Large
    products stay as they are, unless what varies is thin.
    """
    for node in _calls(module, aten.bmm.default):
        left, right = node.args
        (K, M, N), P = _shape(left), _shape(right)[2]
        own = P if _is_shared(left) else M
        if K == 1 or (M * N * P > SMALL and own > THIN):
            continue
        with module.graph.inserting_before(node):
            if _is_shared(left):
                stacked = _call(module, aten.reshape.default, _permuted(module, right), [N, K * P])
                product = _call(module, aten.mm.default, _first(module, left), stacked)
                result = _permuted(module, _call(module, aten.reshape.default, product, [M, K, P]))
            elif _is_shared(right):
                stacked = _call(module, aten.reshape.default, left, [K * M, N])
                product = _call(module, aten.mm.default, stacked, _first(module, right))
                result = _call(module, aten.reshape.default, product, [K, M, P])
            else:
                continue
        _replace(node, result)


def add_within_products(module: GraphModule) -> None:
    """`A B + C D = [A C] [B; D]`: the product rule's sums become one product."""
    for node in _calls(module, aten.add.Tensor):
        parts = node.args
        if node.kwargs or not all(_is_small_product(part) and len(part.users) == 1 for part in parts):
            continue
        if parts[0] is parts[1] or _shape(parts[0]) != _shape(parts[1]):
            continue
        with module.graph.inserting_before(node):
            left = _joined(module, [part.args[0] for part in parts], 1)
            right = _joined(module, [part.args[1] for part in parts], 0)
            result = _call(module, aten.mm.default, left, right)
        _replace(node, result)


def join_products(module: GraphModule) -> None:
    """`A B, A C = A [B C]` and `A C, B C = [A; B] C`: products with a common operand are one."""
    for shared in (0, 1):
        groups: dict[Node, list[Any]] = defaultdict(list)
        for node in _calls(module, aten.mm.default):
            if _is_small_product(node):
                groups[node.args[shared]].append(node)
        for group in groups.values():
            _join(module, group, shared)


PASSES: tuple[Pass, ...] = (
    drop_views_that_change_nothing,
    compute_once,
    fold_shared_operands,
    add_within_products,
    join_products,
    compute_once,
)
"""In this order: what is equal must be one node before operands are compared."""


def _join(module: GraphModule, group: list[Any], shared: int) -> None:
    """Computes as one the products of `group` that do not depend on each other; they share operand number `shared`."""
    own, dim = 1 - shared, 1 - shared
    independent: list[Any] = []
    for node in group:
        if not any(_depends(node, other) or _depends(other, node) for other in independent):
            independent.append(node)
    if len(independent) < 2:
        return
    with module.graph.inserting_before(independent[-1]):
        joined = _joined(module, [node.args[own] for node in independent], dim)
        operands = (independent[0].args[0], joined) if shared == 0 else (joined, independent[0].args[1])
        product = _call(module, aten.mm.default, *operands)
        start = 0
        parts = []
        for node in independent:
            size = _shape(node)[dim]
            parts.append(_call(module, aten.slice.Tensor, product, dim, start, start + size))
            start += size
    for node, part in zip(independent, parts, strict=True):
        _replace(node, part)


def _joined(module: GraphModule, parts: Sequence[Any], dim: int) -> Node:
    """`[A B]` or `[A; B]`; of transposes, as the transpose, so that rows are copied as rows."""
    if all(part.target == aten.t.default for part in parts):
        inner = _call(module, aten.cat.default, [part.args[0] for part in parts], 1 - dim)
        return _call(module, aten.t.default, inner)
    return _call(module, aten.cat.default, list(parts), dim)


def _permuted(module: GraphModule, node: Node) -> Node:
    return _call(module, aten.permute.default, node, [1, 0, 2])


def _first(module: GraphModule, node: Node) -> Node:
    return _call(module, aten.select.int, node, 0, 0)


def _is_shared(node: Node) -> bool:
    return node.meta["val"].stride(0) == 0


def _is_small_product(node: Any) -> bool:
    if not isinstance(node, Node) or node.target != aten.mm.default:
        return False
    (M, N), P = _shape(node.args[0]), _shape(node.args[1])[1]
    return M * N * P <= SMALL


def _depends(node: Node, other: Node) -> bool:
    """Whether `other` is among what `node` is computed from."""
    reached, waiting = {node}, [node]
    while waiting:
        for parent in waiting.pop().all_input_nodes:
            if parent is other:
                return True
            if parent not in reached:
                reached.add(parent)
                waiting.append(parent)
    return False


def _keep_contiguous(module: GraphModule, contiguous: Sequence[bool]) -> None:
    """Copies results that a pass has left permuted and that were not; on others this does nothing."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    results = list(_outputs(module))
    with module.graph.inserting_before(output):
        for i, was in enumerate(contiguous):
            if was:
                results[i] = _call(module, aten.contiguous.default, results[i])
    output.args = (tuple(results),)


def _sort(module: GraphModule) -> None:
    """Puts every node behind its inputs again, otherwise in the order they are in."""
    nodes = list(module.graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    missing = {node: len(node.all_input_nodes) for node in nodes}
    ready = [place[node] for node in nodes if not missing[node]]
    heapq.heapify(ready)
    last = module.graph._root
    while ready:
        node = nodes[heapq.heappop(ready)]
        last.append(node)
        last = node
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, place[user])


def _calls(module: GraphModule, *targets: Any) -> Iterator[Any]:
    yield from [node for node in module.graph.nodes if node.op == "call_function" and node.target in targets]


def _call(module: GraphModule, target: Any, *args: Any, **kwargs: Any) -> Any:
    """A new node, with its value on fake tensors."""
    node = module.graph.call_function(target, args, kwargs)
    values: Any = map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = target(*values[0], **values[1])
    return node


def _replace(node: Node, by: Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _outputs(module: GraphModule) -> Any:
    return next(node for node in module.graph.nodes if node.op == "output").args[0]


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
