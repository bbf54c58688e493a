import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jvp

from lissa import ggnvp, hvp, hvp_of_graph, stacked_hvp, tree
from lissa.hvp import MODES, pulled_back
from tests import problems
from tests.oracles import dense_hessian, flatten, relative_error, unflatten
from tests.problems import random_vector, random_vectors

EXACT_MODES = [mode for mode in MODES if mode != "finite-difference"]
FUNCTIONAL_MODES = [mode for mode in EXACT_MODES if mode != "double-backward"]
FLOAT64_ROUNDOFF = torch.finfo(torch.float64).eps / 2

seeds = st.integers(0, 10**6)
softmax_regressions = st.builds(
    problems.softmax_regression,
    seed=seeds,
    batch_size=st.integers(1, 6),
    features=st.integers(1, 6),
    classes=st.integers(2, 5),
)
smooth_mlps = st.builds(
    problems.mlp,
    seed=seeds,
    batch_size=st.integers(1, 6),
    features=st.integers(1, 5),
    widths=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    classes=st.integers(2, 4),
    activation=st.sampled_from([torch.tanh, torch.nn.functional.gelu, torch.nn.functional.softplus]),
)
relu_mlps = st.builds(problems.mlp, seed=seeds, widths=st.just((6, 4)), activation=st.just(torch.relu))
tied = st.builds(problems.tied_weights, seed=seeds, batch_size=st.integers(1, 6))
any_problem = st.one_of(softmax_regressions, smooth_mlps, relu_mlps, tied)
smooth_problem = st.one_of(softmax_regressions, smooth_mlps, tied)


@pytest.mark.parametrize("mode", EXACT_MODES)
@given(problem=any_problem, seed=seeds)
def test_equals_the_dense_product(mode, problem, seed):
    v = random_vector(problem, seed)
    expected = dense_hessian(problem.loss_fn, problem.params, problem.batch) @ flatten(v)

    got = hvp(problem.loss_fn, problem.params, problem.batch, v, mode=mode)

    assert list(got) == list(problem.params)
    assert relative_error(flatten(got), expected) <= 1e-10


@given(problem=smooth_problem, seed=seeds)
def test_finite_difference_is_within_its_derived_bound(problem, seed):
    v = flatten(random_vector(problem, seed))
    theta = flatten(problem.params)

    def gradient(theta):
        return flatten(grad(problem.loss_fn)(unflatten(theta, problem.params), problem.batch))

    def along(f):
        return lambda theta: jvp(f, (theta,), (v,))[1]

    got = hvp(problem.loss_fn, problem.params, problem.batch, unflatten(v, problem.params), mode="finite-difference")

    e = FLOAT64_ROUNDOFF ** (1 / 3) * (1 + theta.norm()) / v.norm()
    # Taylor: the remainder of the central difference is e^2/6 times the third derivative of the gradient along v,
    # somewhere in between; e |v| is below 1e-4, so that twice its size at both ends and the middle covers it.
    third = max(along(along(along(gradient)))(theta + s * e * v).norm() for s in (-1, 0, 1))
    truncation = 2 * e**2 / 6 * third
    # Each entry of a gradient passes through fewer than 200 roundings here (sums over at most 7 features, 7 classes and
    # 6 examples in at most 4 layers, forward and back), each relative to numbers no larger than `size`; and rounding
    # theta +- e v moves the gradient by H times an error of u |theta|. Both are divided by 2e, twice over.
    size = gradient(theta).abs().sum() + 10 * theta.norm() + 10
    H = dense_hessian(problem.loss_fn, problem.params, problem.batch)
    rounding = FLOAT64_ROUNDOFF * (200 * size + torch.linalg.matrix_norm(H, 2) * (theta.norm() + e * v.norm())) / e
    assert (flatten(got) - H @ v).norm() <= truncation + rounding
    # The bound itself is tight enough to tell a right product from a wrong one.
    assert truncation + rounding <= 1e-5 * (1 + size) * (1 + third)


@pytest.mark.parametrize("mode", EXACT_MODES)
@given(problem=any_problem, seed=seeds, a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_is_linear(mode, problem, seed, a, b):
    x, y = random_vector(problem, seed), random_vector(problem, seed + 1)

    def product(v):
        return flatten(hvp(problem.loss_fn, problem.params, problem.batch, v, mode=mode))

    left = product(tree.add(tree.scale(a, x), tree.scale(b, y)))
    terms = (a * product(x), b * product(y))

    # Rounding is relative to the terms, which may cancel in their sum; 1e-12 is several thousand roundings.
    assert (left - sum(terms)).norm() <= 1e-12 * (sum(t.norm() for t in terms) + scale_of(problem))


@pytest.mark.parametrize("mode", EXACT_MODES)
@given(problem=any_problem, seed=seeds)
def test_is_symmetric(mode, problem, seed):
    u, v = random_vector(problem, seed), random_vector(problem, seed + 1)

    def product(v):
        return hvp(problem.loss_fn, problem.params, problem.batch, v, mode=mode)

    gap = tree.vdot(u, product(v)) - tree.vdot(v, product(u))

    assert abs(gap) <= 1e-12 * (tree.norm(u) * tree.norm(product(v)) + tree.norm(v) * tree.norm(product(u)) + 1)


@pytest.mark.parametrize("mode", EXACT_MODES)
@given(data=st.data(), seed=seeds)
def test_is_the_weighted_mean_over_a_ragged_split_of_the_batch(mode, data, seed):
    problem = data.draw(any_problem.filter(lambda p: len(p.batch[0]) >= 2))
    n = len(problem.batch[0])
    cut = data.draw(st.integers(1, n - 1))
    v = random_vector(problem, seed)

    def product(rows):
        part = tuple(t[rows] for t in problem.batch)
        return flatten(hvp(problem.loss_fn, problem.params, part, v, mode=mode))

    parts = cut / n * product(slice(None, cut)), (n - cut) / n * product(slice(cut, None))

    assert (product(slice(None)) - sum(parts)).norm() <= 1e-12 * (sum(p.norm() for p in parts) + scale_of(problem))


@pytest.mark.parametrize("mode", list(MODES))
@given(seed=seeds)
def test_a_parameter_the_loss_is_linear_in_has_a_zero_block(mode, seed):
    g = torch.Generator().manual_seed(seed)
    params = {k: problems.normal(g, 4, dtype=torch.float64) for k in ("linear", "curved", "unused")}
    v = {k: problems.normal(g, 4, dtype=torch.float64) for k in params}
    batch = problems.normal(g, 4, dtype=torch.float64)

    def loss_fn(params, x):
        return (params["linear"] * x).sum() + (params["curved"] ** 2 * x).sum() / 2

    product = hvp(loss_fn, params, batch, v, mode=mode)

    # A difference of gradients of size |x| leaves rounding of about u |x| / e, with e |v| above 1e-5.
    atol = 1e-9 if mode == "finite-difference" else 0.0
    assert torch.allclose(product["linear"], torch.zeros(4, dtype=torch.float64), rtol=0, atol=atol)
    assert torch.equal(product["unused"], torch.zeros(4, dtype=torch.float64))
    assert torch.allclose(product["curved"], batch * v["curved"], rtol=1e-14, atol=10 * atol)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_loss_linear_in_all_parameters_has_a_zero_product(mode):
    params = {"w": torch.tensor([1.0, -2.0])}

    product = hvp(lambda p, x: p["w"] @ x, params, torch.tensor([3.0, 4.0]), {"w": torch.ones(2)}, mode=mode)

    # float32: rounding of the gradient (3, 4) over a step of u^(1/3) (1 + |params|) = 1e-2; it cancels exactly here.
    assert torch.allclose(product["w"], torch.zeros(2), atol=1e-4)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_dtype_and_device(mode, dtype, device):
    if mode == "finite-difference" and dtype == torch.bfloat16:
        pytest.skip("refused in 16 bits")
    problem = on(device, problems.mlp(dtype=dtype))

    product = hvp(problem.loss_fn, problem.params, problem.batch, random_vector_on(device, problem), mode=mode)

    assert {t.dtype for t in product.values()} == {dtype}
    assert {t.device.type for t in product.values()} == {device}
    assert not any(t.requires_grad for t in product.values())


@pytest.mark.parametrize("mode", list(MODES))
def test_changes_nothing_of_the_callers(mode):
    problem = problems.mlp()
    params = {k: p.clone().requires_grad_(k.endswith("weight")) for k, p in problem.params.items()}
    before = {k: p.detach().clone() for k, p in params.items()}
    rng, grad_mode = torch.get_rng_state(), torch.is_grad_enabled()

    hvp(problem.loss_fn, params, problem.batch, random_vector(problem), mode=mode)

    assert all(torch.equal(params[k], before[k]) and params[k].grad is None for k in params)
    assert [p.requires_grad for p in params.values()] == [k.endswith("weight") for k in params]
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.is_grad_enabled() == grad_mode


@pytest.mark.parametrize("mode", list(MODES))
def test_the_order_of_the_vectors_keys_does_not_matter(mode):
    problem, v = problems.mlp(), random_vector(problems.mlp())
    turned = dict(reversed(v.items()))

    expected = hvp(problem.loss_fn, problem.params, problem.batch, v, mode=mode)
    got = hvp(problem.loss_fn, problem.params, problem.batch, turned, mode=mode)

    assert list(got) == list(problem.params)
    assert all(torch.equal(got[k], expected[k]) for k in got)


@pytest.mark.parametrize("mode", list(MODES))
def test_does_not_depend_on_grad_mode(mode):
    problem, v = problems.mlp(), random_vector(problems.mlp())
    expected = flatten(hvp(problem.loss_fn, problem.params, problem.batch, v, mode=mode))

    with torch.no_grad():
        got = flatten(hvp(problem.loss_fn, problem.params, problem.batch, v, mode=mode))

    assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", list(MODES))
@given(problem=any_problem, seed=seeds, count=st.integers(1, 4))
@settings(max_examples=20)
def test_vmap_over_vectors_gives_each_product(mode, problem, seed, count):
    vectors = random_vectors(problem, count, seed)

    def product(v):
        return hvp(problem.loss_fn, problem.params, problem.batch, v, mode=mode)

    stacked = torch.vmap(product)(vectors)

    # The same arithmetic in another order; a difference of gradients divides its rounding by e, about 1e-5.
    rtol = 1e-8 if mode == "finite-difference" else 1e-12
    for i in range(count):
        one = flatten(product({k: t[i] for k, t in vectors.items()}))
        got = flatten({k: t[i] for k, t in stacked.items()})
        assert (got - one).norm() <= rtol * (one.norm() + scale_of(problem))


@pytest.mark.parametrize("mode", EXACT_MODES)
def test_vmap_over_batches_gives_each_product(mode):
    problem = problems.mlp(batch_size=6)
    v = random_vector(problem)
    halves = tuple(t.unflatten(0, (2, 3)) for t in problem.batch)

    stacked = torch.vmap(lambda batch: hvp(problem.loss_fn, problem.params, batch, v, mode=mode))(halves)

    for i in range(2):
        one = hvp(problem.loss_fn, problem.params, tuple(t[i] for t in halves), v, mode=mode)
        assert relative_error(flatten({k: t[i] for k, t in stacked.items()}), flatten(one)) <= 1e-12


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_nests_and_takes_any_dimension(mode, in_dim):
    problem = problems.mlp()
    vectors = {k: t.unflatten(0, (2, 3)) for k, t in random_vectors(problem, 6).items()}

    def product(v):
        return hvp(problem.loss_fn, problem.params, problem.batch, v, mode=mode)

    stacked = torch.vmap(torch.vmap(product), in_dims=in_dim, out_dims=in_dim)(vectors)

    rtol = 1e-8 if mode == "finite-difference" else 1e-12
    for i in range(2):
        for j in range(3):
            one = flatten(product({k: t[i, j] for k, t in vectors.items()}))
            assert relative_error(flatten({k: t[i, j] for k, t in stacked.items()}), one) <= rtol


@pytest.mark.parametrize("mode", ["double-backward", "finite-difference"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "backward"])
def test_a_mode_that_leaves_the_graph_says_so_when_differentiated(mode, transform):
    problem, v = problems.mlp(), random_vector(problems.mlp())

    def size(v):
        return tree.norm(hvp(problem.loss_fn, problem.params, problem.batch, v, mode=mode))

    differentiate = {
        "grad": lambda: grad(size)(v),
        "jvp": lambda: jvp(size, (v,), (v,)),
        "backward": lambda: size(tree.map(lambda t: t.requires_grad_(), v)).backward(),
    }[transform]
    with pytest.raises(NotImplementedError, match=rf"`hvp\(mode='{mode}'\)` cannot itself be .* Use mode="):
        differentiate()


def test_a_loss_that_draws_random_numbers_is_refused():
    problem, v = problems.mlp(), random_vector(problems.mlp())

    def with_dropout(params, batch):
        inputs, labels = batch
        return problem.loss_fn(params, (torch.nn.functional.dropout(inputs, 0.5, training=True), labels))

    for mode in MODES:
        with pytest.raises(ValueError, match=r"`hvp\(loss_fn=...\)` must be deterministic.* eval mode"):
            hvp(with_dropout, problem.params, problem.batch, v, mode=mode)


def test_a_loss_that_changes_buffers_is_refused_before_it_does():
    module = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4)).double().train()
    params = {k: p.detach().clone() for k, p in module.named_parameters()}
    before = {k: b.clone() for k, b in module.named_buffers()}
    x = problems.normal(torch.Generator().manual_seed(0), 6, 5, dtype=torch.float64)

    def loss_fn(params, x):
        return torch.func.functional_call(module, params, x).square().mean()

    for mode in ("auto", "forward-over-reverse", "reverse-over-reverse", "reverse-over-forward"):
        with pytest.raises(ValueError, match=r"BatchNorm in train mode.* eval mode"):
            hvp(loss_fn, params, x, random_like(params), mode=mode)
        assert all(torch.equal(b, before[k]) for k, b in module.named_buffers())


def test_errors_of_the_loss_itself_are_passed_on():
    problem = problems.softmax_regression()

    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        hvp(problem.loss_fn, problem.params, (torch.ones(2, 9).double(), problem.batch[1]), random_vector(problem))


@pytest.mark.parametrize("mode", FUNCTIONAL_MODES)
@given(problem=smooth_problem, seed=seeds)
@settings(max_examples=20)
def test_jvp_along_the_vector_is_the_product_itself(mode, problem, seed):
    u, v = random_vector(problem, seed), random_vector(problem, seed + 1)

    def product(v):
        return hvp(problem.loss_fn, problem.params, problem.batch, v, mode=mode)

    _, derivative = jvp(product, (v,), (u,))

    assert (flatten(derivative) - flatten(product(u))).norm() <= 1e-12 * scale_of(problem)


@pytest.mark.parametrize("mode", FUNCTIONAL_MODES)
@given(problem=smooth_problem, seed=seeds)
@settings(max_examples=20)
def test_jvp_along_the_parameters_is_the_third_derivative(mode, problem, seed):
    u, v = random_vector(problem, seed), random_vector(problem, seed + 1)

    def product(params):
        return hvp(problem.loss_fn, params, problem.batch, v, mode=mode)

    _, derivative = jvp(product, (problem.params,), (u,))
    # d/de H(theta + e u) v from the dense Hessian, itself differentiated by torch.func.
    flat = flatten(problem.params)
    _, expected = jvp(
        lambda flat: dense_hessian(problem.loss_fn, unflatten(flat, problem.params), problem.batch) @ flatten(v),
        (flat,),
        (flatten(u),),
    )

    assert (flatten(derivative) - expected).norm() <= 1e-10 * (expected.norm() + scale_of(problem))


@pytest.mark.parametrize("mode", ["auto", "forward-over-reverse", "reverse-over-reverse", "reverse-over-forward"])
def test_torch_compile_traces_it_whole(mode):
    problem, v = problems.tied_weights(), random_vector(problems.tied_weights())
    compiled = torch.compile(
        lambda params, batch, v: hvp(problem.loss_fn, params, batch, v, mode=mode), backend="aot_eager", fullgraph=True
    )

    got = compiled(problem.params, problem.batch, v)

    expected = dense_hessian(problem.loss_fn, problem.params, problem.batch) @ flatten(v)
    assert relative_error(flatten(got), expected) <= 1e-10


@given(problem=any_problem, seed=seeds)
def test_ggnvp_is_the_dense_gauss_newton_product(problem, seed):
    v = random_vector(problem, seed)
    theta = flatten(problem.params)
    J = torch.func.jacrev(lambda t: problem.output_fn(unflatten(t, problem.params), problem.batch).flatten())(theta)
    outputs = problem.output_fn(problem.params, problem.batch)
    H_out = torch.func.hessian(lambda z: problem.output_loss_fn(z.reshape(outputs.shape), problem.batch))(
        outputs.flatten()
    )

    got = flatten(ggnvp(problem.output_fn, problem.output_loss_fn, problem.params, problem.batch, v))

    # The bound holds in the size of the factors: the product may be small through cancellation.
    size = J.norm() ** 2 * H_out.norm() * flatten(v).norm()
    assert (got - J.mT @ (H_out @ (J @ flatten(v)))).norm() <= 1e-12 * (size + 1)
    # Cross-entropy is convex in its logits.
    assert got @ flatten(v) >= -1e-12 * size


@given(problem=softmax_regressions, seed=seeds)
def test_ggnvp_is_the_hessian_where_outputs_are_linear_in_the_parameters(problem, seed):
    v = random_vector(problem, seed)

    got = ggnvp(problem.output_fn, problem.output_loss_fn, problem.params, problem.batch, v)

    expected = dense_hessian(problem.loss_fn, problem.params, problem.batch) @ flatten(v)
    assert (flatten(got) - expected).norm() <= 1e-12 * (expected.norm() + scale_of(problem))


def test_hvp_of_graph_is_the_dense_product():
    problem = problems.mlp()
    params = {k: p.requires_grad_() for k, p in problem.params.items()}
    v = random_vector(problem)
    expected = dense_hessian(problem.loss_fn, problem.params, problem.batch) @ flatten(v)

    product = hvp_of_graph(problem.loss_fn(params, problem.batch), list(params.values()), list(v.values()))

    assert relative_error(flatten_parts(product), expected) <= 1e-10


def test_hvp_of_graph_of_a_constant_is_zero():
    w = torch.ones(2, requires_grad=True)

    assert torch.equal(hvp_of_graph(torch.tensor(1.0), [w], [torch.ones(2)])[0], torch.zeros(2))


def good_arguments():
    problem = problems.softmax_regression()
    return {
        "loss_fn": problem.loss_fn,
        "params": problem.params,
        "batch": problem.batch,
        "v": random_vector(problem),
    }


BAD = {
    "unknown mode": ({"mode": "fast"}, ValueError, r"`hvp\(mode=...\)` must be one of 'auto', .*got 'fast'"),
    "params not a dict": ({"params": torch.ones(2)}, TypeError, r"`hvp\(params=...\)` must be a dict .*got Tensor"),
    "no params": ({"params": {}}, ValueError, r"`hvp\(params=...\)` must hold at least one tensor"),
    "integer params": ({"params": {"weight": torch.ones(2, dtype=torch.int64)}}, TypeError, "'weight'"),
    "missing key": ({"v": {"weight": torch.ones(5, 3)}}, ValueError, r"missing keys \['bias'\], extra keys \[\]"),
    "v of another shape": (
        {"v": {"weight": torch.ones(3, 5).double(), "bias": torch.ones(3).double()}},
        ValueError,
        r"`hvp\(v=...\)` must have the shape of params: 'weight' has \(5, 3\), got \(3, 5\)",
    ),
    "v of another dtype": (
        {"v": {"weight": torch.ones(5, 3), "bias": torch.ones(3)}},
        TypeError,
        r"`hvp\(v=...\)` must have the dtype of params: 'weight' has torch.float64, got torch.float32",
    ),
    "loss per example": (
        {"loss_fn": problems.softmax_regression().example_loss_fn},
        ValueError,
        r"`hvp\(loss_fn=...\)` must return a scalar, .* got shape \(8,\)",
    ),
    "loss a number": ({"loss_fn": lambda p, b: 1.0}, TypeError, "must return a tensor, got float"),
}


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case, mode):
    change, error, words = BAD[case]

    with pytest.raises(error, match=words):
        hvp(**{**good_arguments(), "mode": mode, **change})


def scale_of(problem):
    """The size that rounding is relative to where a product happens to be small: |H|, and 1 for what cancels in it."""
    return 1 + dense_hessian(problem.loss_fn, problem.params, problem.batch).norm().item()


def random_like(params):
    return {k: problems.normal(torch.Generator().manual_seed(1), *p.shape, dtype=p.dtype) for k, p in params.items()}


def flatten_parts(parts):
    return torch.cat([part.reshape(-1) for part in parts])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))])
def device(request):
    return request.param


def on(device, problem):
    return problem._replace(
        params={k: p.to(device) for k, p in problem.params.items()}, batch=tuple(t.to(device) for t in problem.batch)
    )


def random_vector_on(device, problem):
    return {k: t.to(device) for k, t in random_vector(problem).items()}


class _CubeOnce(torch.autograd.Function):
    """`x^3`, with a gradient that torch is told not to differentiate."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def test_a_function_that_is_differentiable_once_is_no_zero():
    def loss_fn(params, batch):
        return _CubeOnce.apply(params["w"]).sum()

    params = {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    v = {"w": torch.tensor([1.0, 1.0], dtype=torch.float64)}
    with pytest.raises(NotImplementedError, match="once_differentiable"):
        hvp(loss_fn, params, None, v, mode="double-backward")
    with pytest.raises(NotImplementedError, match="once_differentiable"):
        stacked_hvp(loss_fn, params, None, tree.map(lambda t: t[None], v))
    # Finite differences remain: their error is a few times the square root of the unit roundoff, or its 2/3 power.
    torch.testing.assert_close(
        hvp(loss_fn, params, None, v)["w"], torch.tensor([6.0, 12.0], dtype=torch.float64), rtol=1e-5, atol=0
    )


class Opaque(torch.autograd.Function):
    """Its backward pass looks at a number, which `vmap` refuses."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, dy):
        assert dy.sum().item() > 0
        return 2 * ctx.saved_tensors[0] * dy


@pytest.mark.parametrize("square", [torch.square, Opaque.apply])
@pytest.mark.parametrize("at_once", [None, 1, 2])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_stacked_cotangents_are_pulled_back_as_each_is(square, at_once, count):
    x, y = (torch.tensor([1.0, 2.0], requires_grad=True) for _ in range(2))
    cotangents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[:count]
    got = pulled_back((square(x),), (x, y), (cotangents,), at_once=at_once)
    assert got[0].tolist() == (2 * torch.tensor([1.0, 2.0]) * cotangents).tolist()
    assert torch.equal(got[1], torch.zeros(count, 2))
