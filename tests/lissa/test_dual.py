import pytest
import torch
import torch.nn.functional as F

from lissa import dual_influence, ggnvp, influence_scores, output_gram, solve_dense, take
from tests import problems
from tests.oracles import dense_gradients, dense_hessian, flatten, relative_error, unflatten

PROBLEMS = {
    "softmax regression": problems.softmax_regression(batch_size=9),
    "MLP": problems.mlp(batch_size=9),
    "two classes": problems.mlp(batch_size=9, classes=2),
}
DAMPING = 0.05


def dense_gauss_newton(problem, batch):
    size = sum(p.numel() for p in problem.params.values())
    return torch.stack(
        [
            flatten(
                ggnvp(problem.output_fn, problem.output_loss_fn, problem.params, batch, unflatten(e, problem.params))
            )
            for e in torch.eye(size, dtype=torch.float64)
        ]
    )


def split(batch, *sizes):
    """The batch in ragged parts."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [take(batch, slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]


def solve(problem, train, test, **more):
    more = {"damping": DAMPING, **more}
    return dual_influence(problem.output_fn, problem.output_loss_fn, problem.params, train, test, **more)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("most_rows", [1, 200, 2**20])
def test_scores_are_those_of_the_dense_matrix(name, most_rows):
    problem = PROBLEMS[name]
    train, test = take(problem.batch, slice(0, 7)), take(problem.batch, slice(7, 9))
    G = dense_gauss_newton(problem, train)
    g_train, g_test = (dense_gradients(problem.example_loss_fn, problem.params, batch) for batch in (train, test))
    x = torch.linalg.solve(G + DAMPING * torch.eye(len(G), dtype=torch.float64), g_test.mT).mT

    got = solve(problem, split(train, 3, 1, 3), split(test, 1, 1), most_rows=most_rows)

    assert relative_error(got.scores, x @ g_train.mT) <= 1e-10
    assert relative_error(got.cosine, F.cosine_similarity(x, g_test, dim=1)) <= 1e-10
    assert float(got.trace) == pytest.approx(float(G.trace()), rel=1e-12)
    assert float(got.relative_residual.max()) <= 1e-10


@pytest.mark.parametrize("name", PROBLEMS)
def test_leaving_one_out_takes_its_curvature_out_of_the_dense_matrix(name):
    problem = PROBLEMS[name]
    train, test = take(problem.batch, slice(0, 7)), take(problem.batch, slice(7, 9))
    G = dense_gauss_newton(problem, train) + DAMPING * torch.eye(len(flatten(problem.params)), dtype=torch.float64)
    g_train, g_test = (dense_gradients(problem.example_loss_fn, problem.params, batch) for batch in (train, test))
    columns = [
        g_test @ torch.linalg.solve(G - dense_gauss_newton(problem, take(train, slice(i, i + 1))) / 7, g_train[i])
        for i in range(7)
    ]

    got = solve(problem, split(train, 3, 1, 3), split(test, 1, 1))

    assert relative_error(got.leave_one_out, torch.stack(columns, 1)) <= 1e-10


@pytest.mark.parametrize("name", PROBLEMS)
def test_without_test_examples_the_diagonal_is_self_influence(name):
    problem = PROBLEMS[name]
    batches = split(problem.batch, 4, 5)
    by_itself = solve(problem, batches, None)
    for got in (by_itself, solve(problem, batches, batches), solve(problem, batches, batches[:1])):
        assert relative_error(got.self_influence, by_itself.scores.diagonal()) <= 1e-10
    assert bool((by_itself.scores.diagonal() > 0).all())
    assert relative_error(by_itself.scores, by_itself.scores.mT) <= 1e-10


def test_where_outputs_are_linear_it_is_influence_by_the_hessian():
    problem = PROBLEMS["softmax regression"]
    train, test = take(problem.batch, slice(0, 7)), take(problem.batch, slice(7, 8))
    H = dense_hessian(problem.loss_fn, problem.params, train)
    gradient = torch.func.grad(problem.loss_fn)(problem.params, test)
    ihvp = solve_dense(lambda v: unflatten(H @ flatten(v), v), gradient, damping=DAMPING).value
    expected = influence_scores(problem.example_loss_fn, problem.params, ihvp, train)
    assert relative_error(solve(problem, [train], [test]).scores[0], expected) <= 1e-10


def test_the_difference_of_two_logits_is_as_good_as_both():
    problem = PROBLEMS["two classes"]
    both = solve(problem, [problem.batch], None)

    def difference(params, batch):
        logits = problem.output_fn(params, batch)
        return logits[:, 1:] - logits[:, :1]

    def loss(d, batch):
        return F.binary_cross_entropy_with_logits(d[:, 0], batch[1].to(d.dtype))

    one = dual_influence(difference, loss, problem.params, [problem.batch], damping=DAMPING)
    assert relative_error(one.scores, both.scores) <= 1e-10
    assert relative_error(one.trace, both.trace) <= 1e-12


def test_the_gram_matrix_is_that_of_the_jacobian():
    problem = PROBLEMS["MLP"]

    def flat_outputs(flat):
        return problem.output_fn(unflatten(flat, problem.params), problem.batch).flatten()

    J = torch.autograd.functional.jacobian(flat_outputs, flatten(problem.params))
    batches = split(problem.batch, 2, 4, 3)
    assert relative_error(output_gram(problem.output_fn, problem.params, batches), J @ J.mT) <= 1e-13
    got = output_gram(problem.output_fn, problem.params, batches[1:], batches[:1], most_rows=1)
    assert relative_error(got, J[6:] @ J[:6].mT) <= 1e-13


def test_float32_parameters_lose_what_the_docstring_says():
    problem, single = PROBLEMS["MLP"], problems.mlp(batch_size=9, dtype=torch.float32)
    params = {k: p.double() for k, p in single.params.items()}
    batch = (single.batch[0].double(), single.batch[1])
    exact = dual_influence(problem.output_fn, problem.output_loss_fn, params, [batch], damping=DAMPING)
    largest = float(torch.linalg.eigvalsh(dense_gauss_newton(problem._replace(params=params), batch)).max())
    got = dual_influence(single.output_fn, single.output_loss_fn, single.params, [single.batch], damping=DAMPING)
    # The bound of the docstring, once for each of the two sides of the solution, and room for the model's roundings.
    assert relative_error(got.scores, exact.scores) <= 10 * torch.finfo(torch.float32).eps * largest / DAMPING


def test_a_gram_matrix_serves_again():
    problem = PROBLEMS["MLP"]
    batches = split(problem.batch, 4, 5)
    gram = output_gram(problem.output_fn, problem.params, batches)
    for damping in (0.01, 1.0):
        again = solve(problem, batches, batches[:1], damping=damping, gram=gram)
        assert relative_error(again.scores, solve(problem, batches, batches[:1], damping=damping).scores) <= 1e-12


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"damping": 0.0}, "`dual_influence(damping=...)` must be > 0"),
        ({"gram": torch.eye(3)}, "`dual_influence(gram=...)` must have shape (27, 27), got (3, 3)"),
        ({"train": []}, "`dual_influence(train=...)` must hold at least one batch"),
        ({"test": []}, "`dual_influence(test=...)` must hold at least one batch"),
        ({"output_fn": lambda p, b: b[0].sum(1)}, "must return one row per example, shape (B, m), got shape"),
        ({"output_loss_fn": lambda z, b: -z.square().mean()}, "must be convex in the outputs"),
        ({"output_loss_fn": lambda z, b: z.square().mean() / 0}, "is not finite"),
        ({"output_loss_fn": lambda z, b: z.square()}, "must return a scalar"),
    ],
)
def test_what_cannot_be_used_is_named(change, says):
    problem = PROBLEMS["MLP"]
    given = {
        "output_fn": problem.output_fn, "output_loss_fn": problem.output_loss_fn, "params": problem.params,
        "train": [problem.batch], "test": None, "damping": 0.1, **change,
    }  # fmt: skip
    positional = [given.pop(name) for name in ("output_fn", "output_loss_fn", "params", "train", "test")]
    with pytest.raises(ValueError, match=r"^(?s:.*)") as raised:
        dual_influence(*positional, **given)
    assert says in str(raised.value)
