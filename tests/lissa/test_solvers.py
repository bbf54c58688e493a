"""CG, MINRES and the dense solve against `torch.linalg.solve`, on random matrices and on curvature of models."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lissa import (
    SolverError,
    Status,
    dense_matrix,
    diagonal_preconditioner,
    hvp,
    nystroem_preconditioner,
    solve_cg,
    solve_dense,
    solve_minres,
    tree,
)
from tests.oracles import dense_hessian, flatten, relative_error
from tests.problems import mlp, random_vector, softmax_regression

SOLVERS = {"cg": solve_cg, "minres": solve_minres, "dense": solve_dense}


def random_matrix(eigenvalues: torch.Tensor, seed: int) -> torch.Tensor:
    """A symmetric float64 matrix with these eigenvalues and random eigenvectors."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=torch.float64, generator=g))[0]
    return Q @ torch.diag(eigenvalues) @ Q.T


def product(matrix: torch.Tensor):
    """`v -> matrix v` for parameter dicts of two tensors."""

    def matvec(v):
        return tree.unflatten(matrix @ tree.flatten(v), v)

    return matvec


def vector(P: int, seed: int, dtype=torch.float64, *leading: int):
    g = torch.Generator().manual_seed(seed)
    a, b = (
        torch.randn(*leading, P - 1, 1, dtype=torch.float64, generator=g),
        torch.randn(*leading, 1, dtype=torch.float64, generator=g),
    )
    return {"a": a.to(dtype), "b": b.to(dtype)}


@settings(max_examples=50)
@given(
    P=st.integers(2, 30),
    seed=st.integers(0, 2**20),
    log_condition=st.floats(0, 2),
    negative=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    K=st.integers(1, 4),
)
def test_all_solvers_agree_with_a_dense_solve(P, seed, log_condition, negative, dtype, K):
    g = torch.Generator().manual_seed(seed)
    eigenvalues = 10 ** (-log_condition * torch.rand(P, dtype=torch.float64, generator=g))
    if negative:
        eigenvalues[::2] *= -1
    damping = 0.0 if negative else 0.01
    matrix = random_matrix(eigenvalues, seed)
    vs = vector(P, seed, dtype, K)
    expected = torch.linalg.solve(
        matrix + damping * torch.eye(P, dtype=torch.float64),
        torch.cat([vs["a"].double().reshape(K, -1), vs["b"].double()], 1).mT,
    ).mT
    matvec = product(matrix.to(dtype))
    kappa = 10**log_condition
    for name, solve in SOLVERS.items():
        if name == "cg" and negative:
            continue
        rtol = 1e-4 if dtype == torch.float32 else 1e-9
        together = torch.vmap(lambda v, solve=solve, rtol=rtol: solve(matvec, v, damping=damping, rtol=rtol))(vs)
        assert [Status(s) for s in together.status.tolist()] == [Status.CONVERGED] * K, name
        assert (together.relative_residual <= rtol).all()
        got = torch.cat([together.value["a"].reshape(K, -1), together.value["b"]], 1).double()
        for i in range(K):
            # |x - x*| <= |A^-1| |r| <= kappa rtol |x*|, and the matrix itself was rounded to the dtype.
            assert relative_error(got[i], expected[i]) <= kappa * (rtol + 10 * P * torch.finfo(dtype).eps), name


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("build", [softmax_regression, mlp])
def test_solves_with_the_hessian_of_a_model(name, build):
    problem = build(batch_size=10)
    H = dense_hessian(problem.loss_fn, problem.params, problem.batch)
    damping = 0.05 + max(0.0, -torch.linalg.eigvalsh(H)[0].item())
    matvec = partial(hvp, problem.loss_fn, problem.params, problem.batch)
    v = random_vector(problem)
    solution = SOLVERS[name](matvec, v, damping=damping, rtol=1e-12)
    expected = torch.linalg.solve(H + damping * torch.eye(len(H), dtype=H.dtype), flatten(v))
    # The condition number is below 1000.
    assert relative_error(flatten(solution.value), expected) <= 1e-9
    true = flatten(v) - (H @ flatten(solution.value) + damping * flatten(solution.value))
    assert abs(solution.residual_norm - true.norm()) <= 1e-12


@pytest.mark.parametrize("solve", [solve_cg, solve_minres])
def test_columns_stop_on_their_own(solve):
    eigenvalues = torch.logspace(-2, 0, 20, dtype=torch.float64)
    matrix = random_matrix(eigenvalues, seed=3)
    eigenvector = torch.linalg.eigh(matrix)[1][:, 4]
    one_step = tree.unflatten(eigenvector.clone(), vector(20, 0))
    vs = tree.map(lambda *t: torch.stack(t), one_step, vector(20, 5), tree.zeros_like(one_step))
    together = torch.vmap(lambda v: solve(product(matrix), v, rtol=1e-8))(vs)
    assert together.steps.tolist()[0] == 1
    assert together.steps.tolist()[1] > 10
    assert together.steps.tolist()[2] == 0
    assert not flatten(tree.map(lambda t: t[2], together.value)).any()
    for i in range(2):
        alone = solve(product(matrix), tree.map(lambda t, i=i: t[i], vs), rtol=1e-8)
        assert alone.steps == together.steps[i]
        # Both residuals are at most 1e-8 |v|, and the condition number is 100.
        assert relative_error(flatten(tree.map(lambda t, i=i: t[i], together.value)), flatten(alone.value)) <= 2e-6
        trace = together.residual_trace[i]
        assert trace.isfinite().sum() == together.steps[i]


def test_cg_takes_one_step_for_each_distinct_eigenvalue():
    eigenvalues = torch.tensor([1.0, 1.0, 2.0, 2.0, 2.0, 5.0], dtype=torch.float64)
    solution = solve_cg(product(random_matrix(eigenvalues, 1)), vector(6, 1), rtol=1e-9)
    assert solution.steps == 3


def test_cg_meets_negative_curvature_and_says_what_to_do():
    matvec = product(random_matrix(torch.tensor([-1.0, 1.0, 2.0], dtype=torch.float64), 1))
    solution = solve_cg(matvec, vector(3, 1), damping=0.5, throw=False)
    assert Status(int(solution.status)) is Status.INDEFINITE
    assert all(t.isnan().all() for t in solution.value.values())
    with pytest.raises(SolverError, match=r"solve_cg\(damping=0.5\).*INDEFINITE.*Raise `damping`.*ggnvp.*solve_minres"):
        solve_cg(matvec, vector(3, 1), damping=0.5)


def test_minres_never_raises_its_residual():
    eigenvalues = torch.cat([-torch.logspace(-1, 0, 10), torch.logspace(-2, 1, 30)]).double()
    solution = solve_minres(product(random_matrix(eigenvalues, 2)), vector(40, 2), rtol=1e-10)
    trace = solution.residual_trace
    assert Status(int(solution.status)) is Status.CONVERGED
    assert (trace[1:] <= trace[:-1] * (1 + 1e-12)).all()


def test_minres_on_a_singular_system_ends_finite_and_says_it_is_not_solved():
    matrix = torch.diag(torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64))
    v = {"a": torch.tensor([[1.0], [1.0]], dtype=torch.float64), "b": torch.tensor([1.0], dtype=torch.float64)}
    solution = solve_minres(product(matrix), v, steps=50)
    assert Status(int(solution.status)) is Status.FINISHED
    # The part of v in the null space, of length 1, is all that is left.
    torch.testing.assert_close(solution.residual_norm, torch.tensor(1.0, dtype=torch.float64))


def test_dense_solve_of_a_singular_matrix_is_no_number():
    solution = solve_dense(product(torch.zeros(3, 3, dtype=torch.float64)), vector(3, 1), throw=False)
    assert Status(int(solution.status)) is Status.INDEFINITE
    assert all(t.isnan().all() for t in solution.value.values())


@pytest.mark.parametrize("name", SOLVERS)
def test_not_a_number_ends_in_not_finite(name):
    matrix = torch.eye(3, dtype=torch.float64)
    matrix[1, 1] = torch.nan
    solution = SOLVERS[name](product(matrix), vector(3, 1), throw=False)
    assert Status(int(solution.status)) is Status.NOT_FINITE
    with pytest.raises(SolverError, match="NaN in the data"):
        SOLVERS[name](product(matrix), vector(3, 1))


def test_too_few_steps_end_in_finished_with_the_true_residual():
    matrix = random_matrix(torch.logspace(-3, 0, 30, dtype=torch.float64), 1)
    v = vector(30, 1)
    solution = solve_cg(product(matrix), v, steps=3, rtol=1e-8)
    assert Status(int(solution.status)) is Status.FINISHED
    true = flatten(v) - matrix @ flatten(solution.value)
    assert relative_error(solution.residual_norm, true.norm()) <= 1e-12
    assert solution.relative_residual > 1e-8


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 64])
def test_dense_matrix_from_products(chunk_size):
    matrix = random_matrix(torch.linspace(-1, 1, 5, dtype=torch.float64), 1)
    torch.testing.assert_close(dense_matrix(product(matrix), vector(5, 0), chunk_size=chunk_size), matrix)


def test_nystroem_makes_the_steps_independent_of_the_large_eigenvalues():
    eigenvalues = torch.cat([torch.logspace(0, 4, 20), torch.full((80,), 1e-3)]).double()
    matrix, v = random_matrix(eigenvalues, 1), vector(100, 1)
    M = nystroem_preconditioner(product(matrix), v, damping=0.01, rank=24, generator=torch.Generator().manual_seed(0))
    plain = solve_cg(product(matrix), v, damping=0.01, rtol=1e-8)
    preconditioned = solve_cg(product(matrix), v, damping=0.01, rtol=1e-8, preconditioner=M)
    assert preconditioned.steps <= 6
    assert preconditioned.steps < plain.steps / 3
    assert preconditioned.status == Status.CONVERGED


def test_diagonal_preconditioner_is_exact_on_diagonal_matrices():
    matrix = torch.diag(torch.logspace(-2, 3, 40, dtype=torch.float64))
    v = vector(40, 1)
    M = diagonal_preconditioner(product(matrix), v, damping=0.1, probes=1, generator=torch.Generator().manual_seed(0))
    solution = solve_cg(product(matrix), v, damping=0.1, rtol=1e-12, preconditioner=M)
    assert solution.steps == 1
    assert solve_minres(product(matrix), v, damping=0.1, rtol=1e-10, preconditioner=M).status == Status.CONVERGED


def test_diagonal_estimate_lies_within_its_standard_error():
    matrix = random_matrix(torch.linspace(0.1, 1, 30, dtype=torch.float64), 1)
    probes = 400
    M = diagonal_preconditioner(
        product(matrix), vector(30, 1), damping=1.0, probes=probes, generator=torch.Generator().manual_seed(0)
    )
    estimate = 1 / flatten(M(tree.map(torch.ones_like, vector(30, 1)))) - 1
    rest = (matrix - torch.diag(matrix.diagonal())).norm(dim=1) / probes**0.5
    # 30 entries: five standard errors hold for all with probability > 1 - 2e-5.
    assert ((estimate - matrix.diagonal()).abs() <= 5 * rest).all()


@pytest.mark.parametrize("solve", [solve_cg, solve_minres])
def test_a_preconditioner_changes_no_answer(solve):
    matrix, v = random_matrix(torch.logspace(-2, 1, 30, dtype=torch.float64), 1), vector(30, 1)
    M = nystroem_preconditioner(product(matrix), v, damping=0.1, rank=5, generator=torch.Generator().manual_seed(0))
    expected = solve_dense(product(matrix), v, damping=0.1).value
    got = solve(product(matrix), v, damping=0.1, rtol=1e-11, preconditioner=M).value
    assert relative_error(flatten(got), flatten(expected)) <= 1e-8


def test_nystroem_refuses_an_indefinite_matrix():
    matrix = random_matrix(torch.linspace(-1, 0.5, 10, dtype=torch.float64), 1)
    with pytest.raises(ValueError, match="must be positive semidefinite"):
        nystroem_preconditioner(product(matrix), vector(10, 1), damping=0.1, generator=torch.Generator())


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"damping": float("nan")}, ValueError, r"damping=...\)` must be finite"),
        ({"rtol": -1.0}, ValueError, r"rtol=...\)` must be > 0"),
        ({"v": {}}, ValueError, "at least one tensor"),
    ],
)
def test_bad_arguments_are_named(name, change, error, words):
    arguments = {"matvec": product(torch.eye(3).double()), "v": vector(3, 1)} | change
    with pytest.raises(error, match=f"solve_{name}.*{words}"):
        SOLVERS[name](**arguments)


@pytest.mark.parametrize("solve", [solve_cg, solve_minres, solve_dense])
def test_the_key_order_of_the_product_does_not_matter(solve):
    """Products of losses come in the order of the parameters, right-hand sides in that of their caller."""
    A = torch.tensor([[3.0, 1.0, 0.5], [1.0, 2.0, 0.25], [0.5, 0.25, 4.0]], dtype=torch.float64)

    def matvec(v):
        flat = A @ torch.cat([v["w"], v["b"]])
        return {"w": flat[:2], "b": flat[2:]}

    v = {"b": torch.tensor([1.0], dtype=torch.float64), "w": torch.tensor([2.0, 3.0], dtype=torch.float64)}
    x = solve(matvec, v, rtol=1e-12).value
    expected = torch.linalg.solve(A, torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(torch.cat([x["w"], x["b"]]), expected, rtol=1e-10, atol=0)
