"""Products, solvers and scores that are wrong in one way each, as found in published code, and the law that says so.

The laws of `lissa.testing` must find every one of them. Each is as plausible as a reader would write it.
"""

import inspect
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from lissa import ggnvp, hvp, influence_scores, tree
from lissa.testing import Law, adapters, product_laws, sampling_solver_laws, score_laws, solver_laws

Params = dict[str, torch.Tensor]


class Wrong(NamedTuple):
    """Of `laws`, the first that `make()` breaks must be `law`, with `cause` among the words of the likely cause."""

    make: Callable[[], Callable[..., Any]]
    laws: tuple[Law, ...]
    law: str
    cause: str = ""


# --- Hessian-vector products ------------------------------------------------------------------------------------------


def sum_for_mean(loss_fn, params, batch, v):
    return tree.scale(float(len(batch["y"])), hvp(loss_fn, params, batch, v))


def mean_twice(loss_fn, params, batch, v):
    return tree.scale(1 / max(len(batch["y"]), 1), hvp(loss_fn, params, batch, v))


def gauss_newton_of_gradient(loss_fn, params, batch, v):
    """The outer product of the mean gradient, a common stand-in for the Hessian."""
    gradient = torch.func.grad(loss_fn)(params, batch)
    return tree.scale(tree.vdot(gradient, v), gradient)


def one_tensor_at_a_time(loss_fn, params, batch, v):
    """Cross-block terms are dropped: each tensor's own block alone."""
    out = {}
    for key in params:
        alone = tree.zeros_like(v) | {key: v[key]}
        out[key] = hvp(loss_fn, params, batch, alone)[key]
    return out


def first_tensor_only(loss_fn, params, batch, v):
    """Only the first gradient is differentiated again: the others were detached on the way."""
    key = next(iter(params))
    return hvp(loss_fn, params, batch, tree.zeros_like(v) | {key: v[key]})


def detached_activations(loss_fn, params, batch, v):
    """The last tensor is a constant while differentiating: its path is cut."""
    last = list(params)[-1]

    def cut(params, batch):
        return loss_fn(params | {last: params[last].detach()}, batch)

    return hvp(cut, params, batch, v)


def stale_parameters():
    """The gradient's graph is kept per loss: later calls see the first parameters."""
    kept: dict[Any, Any] = weakref.WeakKeyDictionary()

    def product(loss_fn, params, batch, v):
        first = kept.setdefault(loss_fn, params)
        return hvp(loss_fn, first, batch, v)

    return product


def stale_batch():
    """The batch is kept per loss."""
    kept: dict[Any, Any] = weakref.WeakKeyDictionary()

    def product(loss_fn, params, batch, v):
        return hvp(loss_fn, params, kept.setdefault(loss_fn, batch), v)

    return product


def rows(batch, index):
    return {k: t[index] for k, t in batch.items()}


def first_example_only(loss_fn, params, batch, v):
    return hvp(loss_fn, params, rows(batch, slice(1)), v)


def last_example_left_out(loss_fn, params, batch, v):
    """`range(len(data) - 1)`."""
    return hvp(loss_fn, params, rows(batch, slice(max(len(batch["y"]) - 1, 1))), v)


def ragged_chunks_unweighted(loss_fn, params, batch, v):
    """The mean over chunks of two, the last of which may hold one: it counts double."""
    chunks = [rows(batch, slice(i, i + 2)) for i in range(0, max(len(batch["y"]), 1), 2)]
    products = [hvp(loss_fn, params, chunk, v) for chunk in chunks]
    return tree.map(lambda *ts: torch.stack(ts).mean(0), *products)


def mask_ignored(loss_fn, params, batch, v):
    if "mask" in batch:
        batch = batch | {"mask": torch.ones_like(batch["mask"])}
    return hvp(loss_fn, params, batch, v)


def float32_inside(loss_fn, params, batch, v):
    """Accumulated in float32, returned in the dtype asked for."""
    return tree.map(lambda t: t.float().to(t.dtype), hvp(loss_fn, params, batch, v))


def shortened(loss_fn, params, batch, v, *, params_too=False):
    """Inputs go through bfloat16, as between the stages of a pipeline in mixed precision."""

    def short(x):
        return tree.map(lambda t: t.bfloat16().to(t.dtype), x)

    return hvp(loss_fn, short(params) if params_too else params, batch, v if params_too else short(v))


def not_a_number(loss_fn, params, batch, v):
    """A length of 0 is divided by."""
    product = hvp(loss_fn, params, batch, v)
    length = tree.norm(product)
    return tree.map(lambda t: t / length * length, product)


def numbers_for_tensors(loss_fn, params, batch, v):
    """`.tolist()`, as if to be written to a file."""
    return tree.map(lambda t: t.tolist(), hvp(loss_fn, params, batch, v))


def sets_the_seed(loss_fn, params, batch, v):
    """`torch.manual_seed(0)` for the sake of reproducibility: the caller's own random numbers begin again."""
    torch.manual_seed(0)
    return hvp(loss_fn, params, batch, v)


def leaves_grad_mode_off(loss_fn, params, batch, v):
    """`torch.set_grad_enabled(False)` without a `with`."""
    with torch.enable_grad():
        product = hvp(loss_fn, params, batch, v)
    torch.set_grad_enabled(False)
    return product


def columns_for_rows(loss_fn, params, batch, v):
    """`v` is flattened column by column, the product restored row by row."""
    return hvp(loss_fn, params, batch, tree.map(lambda t: t.mT.reshape(t.shape) if t.ndim == 2 else t, v))


def updates_v(loss_fn, params, batch, v):
    product = hvp(loss_fn, params, batch, v)
    for t in v.values():
        t.mul_(0.5)
    return product


def leaves_grad_behind(loss_fn, params, batch, v):
    """`loss.backward()` twice on the caller's own parameters."""
    with torch.enable_grad():
        leaves = tree.map(lambda p: p if p.requires_grad else p.clone().requires_grad_(), params)
        gradient = torch.autograd.grad(
            loss_fn(leaves, batch), list(leaves.values()), create_graph=True, materialize_grads=True
        )
        inner = sum((g * t).sum() for g, t in zip(gradient, v.values(), strict=True))
        if inner.requires_grad:
            inner.backward()
    return {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in leaves.items()}


def dropout_left_on(loss_fn, params, batch, v):
    """Train mode: every product has another random mask."""
    return tree.map(torch.nn.functional.dropout, hvp(loss_fn, params, batch, v))


def hidden_noise():
    """A generator of its own that advances from call to call."""
    generator = torch.Generator().manual_seed(0)

    def product(loss_fn, params, batch, v):
        noise = tree.normal_like(params, generator=generator)
        return tree.add_scaled(hvp(loss_fn, params, batch, v), 1e-3, noise)

    return product


def swapped_arguments(loss_fn, params, batch, v):
    """The Hessian at v times the parameters."""
    return hvp(loss_fn, v, batch, params)


def normalised(loss_fn, params, batch, v):
    """Power iteration's product: v is brought to length 1, and its length forgotten."""
    length = tree.norm(v)
    return hvp(loss_fn, params, batch, tree.scale(1 / torch.where(length > 0, length, 1.0), v))


def clipped(loss_fn, params, batch, v):
    return tree.map(lambda t: t.clamp(-0.25, 0.25), hvp(loss_fn, params, batch, v))


def coarse_difference(loss_fn, params, batch, v):
    """A one-sided difference of gradients with a step of 0.1."""
    gradient = torch.func.grad(loss_fn)
    ahead, here = gradient(tree.add_scaled(params, 0.1, v), batch), gradient(params, batch)
    return tree.scale(10.0, tree.sub(ahead, here))


def gradient_added(loss_fn, params, batch, v):
    return tree.add(hvp(loss_fn, params, batch, v), torch.func.grad(loss_fn)(params, batch))


def damping_inside(loss_fn, params, batch, v):
    """Damping slipped into the product, where the solver adds it again."""
    return tree.add_scaled(hvp(loss_fn, params, batch, v), 0.01, v)


def drops_flat_parameters(loss_fn, params, batch, v):
    """Parameters without curvature are left out of the result."""
    product = hvp(loss_fn, params, batch, v)
    return {k: t for k, t in product.items() if t.any()}


def allennlp_get_hvp(loss, params, vectors):
    """As AllenNLP 2.10.1 does it: fails on a loss that is linear in a parameter, or does not use one."""
    grads = torch.autograd.grad(loss, params, create_graph=True, retain_graph=True)
    return torch.autograd.grad(grads, params, grad_outputs=vectors)


def default_dtype(loss_fn, params, batch, v):
    return tree.map(lambda t: t.to(torch.get_default_dtype()), hvp(loss_fn, params, batch, v))


def flat_result(loss_fn, params, batch, v):
    return tree.map(lambda t: t.reshape(-1), hvp(loss_fn, params, batch, v))


def matched_by_position(loss_fn, params, batch, v):
    """`v` in the order of its own keys, the parameters in theirs."""
    vectors = list(v.values())
    if [t.shape for t in vectors] != [p.shape for p in params.values()]:
        flat = torch.cat([t.reshape(-1) for t in vectors])
        return hvp(loss_fn, params, batch, tree.unflatten(flat, params))
    return hvp(loss_fn, params, batch, dict(zip(params, vectors, strict=True)))


def mixed_by_vmap(loss_fn, params, batch, v):
    """Under vmap every vector gets the product of the first."""
    if torch._C._functorch.is_batchedtensor(next(iter(v.values()))):
        v = tree.map(lambda t: t * 0 + torch._C._functorch.get_unwrapped(t)[0], v)
    return hvp(loss_fn, params, batch, {k: v[k] for k in params}, mode="reverse-over-reverse")


def gauss_newton_for_hessian(loss_fn, params, batch, v):
    """Knows the model behind the loss, as a product for one kind of network does."""
    inside = inspect.getclosurevars(loss_fn).nonlocals
    return ggnvp(inside["output_fn"], inside["output_loss_fn"], params, batch, v)


# --- Gauss-Newton and Fisher products ---------------------------------------------------------------------------------


def hessian_for_gauss_newton(output_fn, output_loss_fn, params, batch, v):
    return hvp(lambda p, b: output_loss_fn(output_fn(p, b), b), params, batch, v)


def fisher_for_gauss_newton(output_fn, output_loss_fn, params, batch, v):
    """`mean_i g_i g_i^T`, with the labels of the data: not Gauss-Newton, not even for the true Fisher's losses."""
    total = tree.zeros_like(params)
    n = len(batch["y"])
    for i in range(n):
        one = rows(batch, slice(i, i + 1))
        g = torch.func.grad(lambda p, one=one: output_loss_fn(output_fn(p, one), one))(params)
        total = tree.add_scaled(total, tree.vdot(g, v) / n, g)
    return total


def identity_for_output_hessian(output_fn, output_loss_fn, params, batch, v):
    """`J^T J v / B`, right for squared errors alone."""

    def model(p):
        return output_fn(p, batch)

    outputs, pullback = torch.func.vjp(model, params)
    tangent = torch.func.jvp(model, (params,), (v,))[1]
    return tree.scale(1 / max(len(outputs), 1), pullback(tangent)[0])


def gauss_newton_signed(output_fn, output_loss_fn, params, batch, v):
    return tree.scale(-1.0, ggnvp(output_fn, output_loss_fn, params, batch, v))


def linearised_elsewhere(output_fn, output_loss_fn, params, batch, v):
    """The output Hessian is taken at outputs of zero."""
    zero = torch.zeros_like(output_fn(params, batch))

    def shifted(outputs, b):
        return output_loss_fn(outputs - output_fn(params, batch).detach() + zero, b)

    return ggnvp(output_fn, shifted, params, batch, v)


def fisher_of_mean_gradient(example_loss_fn, params, batch, v):
    """`(mean g)(mean g)^T v` in place of `mean_i g_i g_i^T v`."""
    n = max(len(batch["y"]), 1)
    g = torch.func.grad(lambda p: example_loss_fn(p, batch).sum() / n)(params)
    return tree.scale(tree.vdot(g, v), g)


# --- solvers ----------------------------------------------------------------------------------------------------------


def dense(matvec, v):
    """The matrix of `matvec`, in the dtype of v."""
    flat = tree.flatten(v)
    eye = torch.eye(len(flat), dtype=flat.dtype)
    return torch.stack([tree.flatten(matvec(tree.unflatten(e, v))) for e in eye], 1)


def solve_with(matvec, v, shift, rhs=None):
    matrix = dense(matvec, v)
    rhs = tree.flatten(v) if rhs is None else rhs
    return tree.unflatten(torch.linalg.solve(matrix + shift * torch.eye(len(matrix), dtype=matrix.dtype), rhs), v)


def no_damping(matvec, v, *, damping):
    return solve_with(matvec, v, 0.0)


def damping_subtracted(matvec, v, *, damping):
    matrix = dense(matvec, v)
    shifted = matrix - damping * torch.eye(len(matrix), dtype=matrix.dtype)
    return tree.unflatten(torch.linalg.pinv(shifted, hermitian=True) @ tree.flatten(v), v)


def damping_times_scale(matvec, v, *, damping, scale=10.0):
    """AllenNLP's meaning: `h <- v + (1 - damping) h - H h / scale` solves `(H + damping scale I) x = v`."""
    return solve_with(matvec, v, damping * scale)


def solver_sign(matvec, v, *, damping):
    return tree.scale(-1.0, solve_with(matvec, v, damping))


def recursion(matvec, v, damping, scale, steps):
    h = v
    for _ in range(steps):
        h = tree.map(lambda v, h, A_h: v + h - (A_h + damping * h) / scale, v, h, matvec(h))
    return h


def wrong_final_scale(matvec, v, *, damping):
    """LiSSA's iterate without the division by scale."""
    return recursion(matvec, v, damping, 8.0, 300)


def too_few_steps(matvec, v, *, damping):
    return tree.scale(1 / 8.0, recursion(matvec, v, damping, 8.0, 10))


def conjugate_gradients(matvec, v, *, damping, rtol=1e-10, max_steps=200, swapped=False, guarded=True, never=False):
    x, r = tree.zeros_like(v), v
    p, rr = r, tree.vdot(r, r)
    limit = (rtol * tree.norm(v)) ** 2
    for _ in range(max_steps):
        if guarded and not never and rr <= limit:
            break
        A_p = tree.add_scaled(matvec(p), damping, p)
        curvature = tree.vdot(p, A_p)
        if guarded and curvature == 0:
            continue
        a = rr / curvature
        x, r = tree.add_scaled(x, a, p), tree.add_scaled(r, -a, A_p)
        rr_next = tree.vdot(r, r)
        ratio = rr / rr_next if swapped else rr_next / rr
        if guarded and not bool(ratio.isfinite()):
            break
        p, rr = tree.add_scaled(r, ratio, p), rr_next
        if not guarded and rr <= limit:
            break
    return x


def diagonal_inverse(matvec, v, *, damping):
    return tree.unflatten(tree.flatten(v) / (dense(matvec, v).diagonal() + damping), v)


def block_inverse(matvec, v, *, damping):
    """Each tensor by itself."""
    out = {}
    for key in v:
        block = dense(lambda x, key=key: {key: matvec(tree.zeros_like(v) | x)[key]}, {key: v[key]})
        flat = v[key].reshape(-1)
        matrix = block + damping * torch.eye(len(flat), dtype=flat.dtype)
        out[key] = torch.linalg.solve(matrix, flat).reshape(v[key].shape)
    return out


def absolute_tolerance(matvec, v, *, damping):
    """Stops at a residual of 0.01, whatever the length of v."""
    x = tree.zeros_like(v)
    for _ in range(500):
        r = tree.sub(v, tree.add_scaled(matvec(x), damping, x))
        if tree.norm(r) <= 0.01:
            break
        x = tree.add_scaled(x, 1 / 8, r)
    return x


def flat_solution(matvec, v, *, damping):
    return tree.flatten(solve_with(matvec, v, damping))


def solver_updates_v(matvec, v, *, damping):
    x = solve_with(matvec, v, damping)
    for k, t in v.items():
        t.copy_(x[k])
    return v


def random_start(matvec, v, *, damping):
    x = tree.map(torch.randn_like, v)
    r = tree.sub(v, tree.add_scaled(matvec(x), damping, x))
    return tree.add(x, solve_with(matvec, v, damping, rhs=tree.flatten(r)))


def warm_start():
    """The previous solution is the start of the next solve, which takes a fixed number of steps."""
    kept: dict[tuple, Any] = {}

    def solve(matvec, v, *, damping):
        key = tuple((k, t.shape, t.dtype) for k, t in v.items())
        x = kept.get(key, tree.zeros_like(v))
        for _ in range(40):
            r = tree.sub(v, tree.add_scaled(matvec(x), damping, x))
            x = tree.add_scaled(x, 1 / 8, r)
        kept[key] = x
        return x

    return solve


def absolute_eigenvalues(matvec, v, *, damping):
    """`|A| + damping` for an indefinite A."""
    matrix = dense(matvec, v)
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return tree.unflatten(vectors @ ((vectors.mT @ tree.flatten(v)) / (values.abs() + damping)), v)


def sorted_keys(matvec, v, *, damping):
    """Flattened in sorted order, restored in the dict's."""
    ordered = {k: v[k] for k in sorted(v)}
    x = solve_with(lambda x: {k: matvec({k: x[k] for k in v})[k] for k in sorted(v)}, ordered, damping)
    return tree.unflatten(tree.flatten(x), v)


def stops_on_step(matvec, v, *, damping, rtol=1e-8):
    """`rtol` is compared with the length of the step, an eighth of the residual or less, not with the residual."""
    x = tree.zeros_like(v)
    for _ in range(600):
        step = tree.scale(1 / 8, tree.sub(v, tree.add_scaled(matvec(x), damping, x)))
        x = tree.add(x, step)
        if tree.norm(step) <= rtol * tree.norm(v):
            break
    return x


# --- solvers that draw batches ----------------------------------------------------------------------------------------


def lissa(matvec, v, data, *, damping, batch_size, repeats, seed=0, **wrong):
    """A right one, with switches for what can go wrong."""
    scale = 32.0 * data.shape[1] / batch_size + 8
    steps = int(3.25 * scale / damping)
    generator = torch.Generator().manual_seed(seed)
    total = tree.zeros_like(v)
    for _ in range(repeats):
        h = v
        for _ in range(steps):
            if wrong.get("first_batch"):
                index = torch.arange(batch_size)
            elif wrong.get("global_rng"):
                index = torch.randint(len(data), (batch_size,))
            else:
                index = torch.randint(len(data), (batch_size,), generator=generator)
            d = damping * scale if wrong.get("damping_times_scale") else damping
            h = tree.map(lambda v, h, A_h, d=d: v + h - (A_h + d * h) / scale, v, h, matvec(data[index], h))
        total = tree.add(total, h)
    divisor = 1 if wrong.get("unscaled") else scale
    return tree.scale(1 / (divisor * (1 if wrong.get("summed_repeats") else repeats)), total)


def inverses_of_batches(matvec, v, data, *, damping, batch_size, repeats, mean=True):
    """Each batch is solved for by itself; the solutions are added up, or averaged."""
    parts = [solve_with(partial(matvec, rows), v, damping) for rows in data.split(batch_size)]
    total = tree.map(lambda *ts: torch.stack(ts).sum(0), *parts)
    return tree.scale(1 / len(parts), total) if mean else total


def flat_sampled_solution(matvec, v, data, *, damping, batch_size, repeats):
    return tree.flatten(solve_with(partial(matvec, data), v, damping))


def swapped_repeats(matvec, v, data, *, damping, batch_size, repeats):
    """`lissa(..., repeats, batch_size)` passed by position, in the order of another signature."""
    return lissa(matvec, v, data, damping=damping, batch_size=repeats, repeats=batch_size)


# --- scores -----------------------------------------------------------------------------------------------------------


def score_sign(example_loss_fn, params, ihvp, batch):
    """Koh & Liang's own sign: the influence of upweighting."""
    return -influence_scores(example_loss_fn, params, ihvp, batch)


def score_over_n(example_loss_fn, params, ihvp, batch):
    return influence_scores(example_loss_fn, params, ihvp, batch) / len(batch["y"])


def score_doubled(example_loss_fn, params, ihvp, batch):
    return 2 * influence_scores(example_loss_fn, params, ihvp, batch)


def score_sorted(example_loss_fn, params, ihvp, batch):
    return influence_scores(example_loss_fn, params, ihvp, batch).sort(descending=True).values


def score_cosine(example_loss_fn, params, ihvp, batch):
    length = tree.norm(ihvp)
    return influence_scores(example_loss_fn, params, ihvp, batch) / torch.where(length > 0, length, 1.0)


def score_centred(example_loss_fn, params, ihvp, batch):
    scores = influence_scores(example_loss_fn, params, ihvp, batch)
    return scores - scores.mean()


def score_float32(example_loss_fn, params, ihvp, batch):
    return influence_scores(example_loss_fn, params, ihvp, batch).float().to(next(iter(params.values())).dtype)


def score_column(example_loss_fn, params, ihvp, batch):
    return influence_scores(example_loss_fn, params, ihvp, batch).unsqueeze(1)


def score_updates_ihvp(example_loss_fn, params, ihvp, batch):
    scores = influence_scores(example_loss_fn, params, ihvp, batch)
    next(iter(ihvp.values())).zero_()
    return scores


def score_of_first_tensor(example_loss_fn, params, ihvp, batch):
    key = next(iter(params))
    return influence_scores(example_loss_fn, params, tree.zeros_like(ihvp) | {key: ihvp[key]}, batch)


def score_random_projection(example_loss_fn, params, ihvp, batch):
    """A random sketch of gradients and ihvp from the global generator."""
    signs = tree.map(lambda t: torch.randint(2, t.shape).to(t.dtype) * 2, ihvp)
    return influence_scores(example_loss_fn, params, tree.map(torch.mul, ihvp, signs), batch)


def score_absolute(example_loss_fn, params, ihvp, batch):
    return influence_scores(example_loss_fn, params, ihvp, batch).abs()


def made(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Callable[..., Any]]:
    """For wrong ones without state: the same function each time."""
    return lambda: partial(function, *args, **kwargs) if args or kwargs else function


hessian = product_laws()
hessian_vmapped = product_laws(vmap=True)
gauss_newton = product_laws(curvature="gauss-newton")
fisher = product_laws(curvature="fisher", min_batch_size=1)
solver = solver_laws()
stochastic = sampling_solver_laws()
scoring = score_laws()

WRONG: dict[str, Wrong] = {
    "sign": Wrong(
        lambda: lambda f, p, b, v: tree.scale(-1.0, hvp(f, p, b, v)), hessian, "difference of gradients", "sign"
    ),
    "factor 2": Wrong(
        lambda: lambda f, p, b, v: tree.scale(2.0, hvp(f, p, b, v)), hessian, "difference of gradients", "factor of 2"
    ),
    "batch sum for mean": Wrong(made(sum_for_mean), hessian, "additivity", "sum over the batch"),
    "divided by the batch size twice": Wrong(made(mean_twice), hessian, "additivity", "twice"),
    "outer product of the gradient for Hessian": Wrong(made(gauss_newton_of_gradient), hessian, "additivity"),
    "dropped cross-block terms": Wrong(
        made(one_tensor_at_a_time), hessian, "difference of gradients", "diagonal blocks"
    ),
    "only the first gradient differentiated": Wrong(made(first_tensor_only), hessian, "symmetry"),
    "detached path": Wrong(made(detached_activations), hessian, "difference of gradients"),
    "stale parameters": Wrong(stale_parameters, hessian, "statelessness", "stale params"),
    "stale batch": Wrong(stale_batch, hessian, "statelessness", "stale batch"),
    "first example only": Wrong(made(first_example_only), hessian, "additivity", "first example"),
    "last example left out": Wrong(made(last_example_left_out), hessian, "additivity", "example"),
    "unweighted ragged chunks": Wrong(made(ragged_chunks_unweighted), hessian, "additivity", ""),
    "ignored mask": Wrong(made(mask_ignored), hessian, "difference of gradients", "mask"),
    "float32 accumulation": Wrong(made(float32_inside), hessian, "linearity", "float32"),
    "v in bfloat16": Wrong(made(shortened), hessian, "dense agreement"),
    "parameters in bfloat16": Wrong(made(shortened, params_too=True), hessian, "dense agreement"),
    "NaN for a product of length 0": Wrong(made(not_a_number), hessian, "form", "finite"),
    "numbers for tensors": Wrong(made(numbers_for_tensors), hessian, "form"),
    "sets the seed": Wrong(made(sets_the_seed), hessian, "purity", "generator"),
    "leaves grad mode off": Wrong(made(leaves_grad_mode_off), hessian, "purity", "finally"),
    "transposed flattening": Wrong(made(columns_for_rows), hessian, "symmetry", "flattened"),
    "mutated v": Wrong(made(updates_v), hessian, "purity", "in place"),
    "gradients left in .grad": Wrong(made(leaves_grad_behind), hessian, "purity", ".backward()"),
    "dropout left on": Wrong(made(dropout_left_on), hessian, "purity", "generator"),
    "hidden random state": Wrong(hidden_noise, hessian, "determinism"),
    "swapped params and v": Wrong(made(swapped_arguments), hessian, "linearity"),
    "normalised v": Wrong(made(normalised), hessian, "linearity", "normalised"),
    "clipped product": Wrong(made(clipped), hessian, "linearity", "clipped"),
    "coarse difference": Wrong(made(coarse_difference), hessian, "linearity"),
    "gradient added": Wrong(made(gradient_added), hessian, "linearity"),
    "damping inside the product": Wrong(made(damping_inside), hessian, "difference of gradients"),
    "flat parameters left out": Wrong(made(drops_flat_parameters), hessian, "form", "zeros"),
    "fails where the loss is linear": Wrong(
        lambda: adapters.of_double_backward(allennlp_get_hvp), hessian, "form", "linear"
    ),
    "default dtype": Wrong(made(default_dtype), hessian, "form", "dtype"),
    "flat result": Wrong(made(flat_result), hessian, "form", "shape"),
    "matched by position": Wrong(made(matched_by_position), hessian, "key order", "position"),
    "vectors mixed under vmap": Wrong(made(mixed_by_vmap), hessian_vmapped, "vmap is loop", "mixed"),
    "Gauss-Newton for Hessian": Wrong(
        made(gauss_newton_for_hessian), hessian, "difference of gradients", "Gauss-Newton"
    ),
    "Hessian for Gauss-Newton": Wrong(made(hessian_for_gauss_newton), gauss_newton, "semidefiniteness", "Hessian"),
    "Fisher for Gauss-Newton": Wrong(made(fisher_for_gauss_newton), gauss_newton, "linear model", "Fisher"),
    "identity for output Hessian": Wrong(made(identity_for_output_hessian), gauss_newton, "linear model"),
    "Gauss-Newton sign": Wrong(made(gauss_newton_signed), gauss_newton, "linear model", "sign"),
    "output Hessian elsewhere": Wrong(made(linearised_elsewhere), gauss_newton, "linear model"),
    "Fisher of the mean gradient": Wrong(made(fisher_of_mean_gradient), fisher, "additivity"),
    "missing damping": Wrong(made(no_damping), solver, "meaning of damping", "ignored"),
    "damping times scale": Wrong(made(damping_times_scale), solver, "meaning of damping", "AllenNLP"),
    "damping subtracted": Wrong(made(damping_subtracted), solver, "meaning of damping", "subtracted"),
    "solution with the wrong sign": Wrong(made(solver_sign), solver, "residual", "sign"),
    "wrong final scale": Wrong(made(wrong_final_scale), solver, "residual", "scale"),
    "too few steps": Wrong(made(too_few_steps), solver, "residual"),
    "conjugate gradients' ratio upside down": Wrong(made(conjugate_gradients, swapped=True), solver, "residual"),
    "0/0 for v = 0": Wrong(made(conjugate_gradients, guarded=False), solver, "linearity"),
    "tolerance never met": Wrong(
        made(conjugate_gradients, never=True), solver_laws(takes_rtol=True), "early stop", "never fires"
    ),
    "tolerance on the step": Wrong(made(stops_on_step), solver_laws(takes_rtol=True, rtol=1e-4), "early stop"),
    "absolute tolerance": Wrong(made(absolute_tolerance), solver_laws(rtol=1e-2), "linearity"),
    "diagonal inverse": Wrong(made(diagonal_inverse), solver, "residual", "diagonal"),
    "block inverse": Wrong(made(block_inverse), solver, "residual"),
    "flat solution": Wrong(made(flat_solution), solver, "form", "dict"),
    "flat sampled solution": Wrong(made(flat_sampled_solution), stochastic, "form", "dict"),
    "solver updates v": Wrong(made(solver_updates_v), solver, "purity", "in place"),
    "random start": Wrong(made(random_start), solver, "purity", "generator"),
    "warm start": Wrong(warm_start, solver, "determinism"),
    "absolute eigenvalues": Wrong(made(absolute_eigenvalues), solver_laws(indefinite=True), "residual"),
    "sorted keys": Wrong(made(sorted_keys), solver, "key order", "position"),
    "sum of per-batch inverses": Wrong(
        made(inverses_of_batches, mean=False), stochastic, "exactness", "sum of the batches"
    ),
    "mean of per-batch inverses": Wrong(
        made(inverses_of_batches), stochastic, "inverse of the mean", "mean of the batches"
    ),
    "swapped repeats and batch size": Wrong(made(swapped_repeats), stochastic, "batch size", "swapped"),
    "first batch only": Wrong(made(lissa, first_batch=True), stochastic, "every example", "first batch"),
    "global random numbers": Wrong(made(lissa, global_rng=True), stochastic, "purity", "generator"),
    "repeats summed": Wrong(made(lissa, summed_repeats=True), stochastic, "exactness", "summed"),
    "sampled, damping times scale": Wrong(made(lissa, damping_times_scale=True), stochastic, "exactness"),
    "sampled, wrong final scale": Wrong(made(lissa, unscaled=True), stochastic, "exactness", "scale"),
    "score sign": Wrong(made(score_sign), scoring, "sign", "helpful"),
    "score divided by n": Wrong(made(score_over_n), scoring, "batching", "divided"),
    "score factor 2": Wrong(made(score_doubled), scoring, "dense agreement", "factor of 2"),
    "sorted scores": Wrong(made(score_sorted), scoring, "example order"),
    "cosine for score": Wrong(made(score_cosine), scoring, "linearity", "normalised"),
    "centred scores": Wrong(made(score_centred), scoring, "batching"),
    "scores in float32": Wrong(made(score_float32), scoring, "linearity"),
    "scores in a column": Wrong(made(score_column), scoring, "form"),
    "scores update ihvp": Wrong(made(score_updates_ihvp), scoring, "purity", "in place"),
    "scores of the first tensor": Wrong(made(score_of_first_tensor), scoring, "dense agreement"),
    "random projection": Wrong(made(score_random_projection), scoring, "purity", "generator"),
    "absolute scores": Wrong(made(score_absolute), scoring, "linearity"),
}
