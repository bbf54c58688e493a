"""Every solver of the interpreter gives the dense answer; what is left open is chosen, and reported."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lissa
from bridge import SimpleInfluence, solving
from bridge.diagnostics import InfluenceWarning
from tests.bridge.fakes import classifier
from tests.oracles import dense_gradients, dense_hessian, flatten, relative_error

RIDGE = 0.05


def problem(n=150):
    """Convex, so that H + ridge I is definite."""
    model, x, y = classifier(n)
    return model, list(zip(x, y, strict=True)), (x, y)


def exact_scores(model, data, tests, ridge):
    params = {k: p.detach() for k, p in model.named_parameters()}

    def losses(params, batch):
        return F.cross_entropy(torch.func.functional_call(model, params, (batch[0],)), batch[1], reduction="none")

    H = dense_hessian(lambda p, b: losses(p, b).mean(), params, data)
    H = H + ridge * torch.eye(len(H), dtype=H.dtype)
    return dense_gradients(losses, params, tests) @ torch.linalg.solve(H, dense_gradients(losses, params, data).mT)


def interpreter(model, pairs, **changes):
    arguments = {"loss_fn": F.cross_entropy, "ridge": RIDGE, "rtol": 1e-6, "progress": False, **changes}
    return SimpleInfluence.from_dataset(model, pairs, **arguments)


@pytest.mark.parametrize(
    "how",
    [
        {"solver": "cg"},
        {"solver": "minres"},
        {"solver": "dense"},
        {"solver": "auto"},
        {"scale": "auto", "recursion_depth": "auto"},
        {"scale": "auto", "recursion_depth": 1500, "lissa_batch_size": 150},
        {"scale": 3.0, "recursion_depth": 2000, "lissa_batch_size": 150},
    ],
    ids=str,
)
def test_all_solvers_give_the_dense_answer(how):
    model, pairs, data = problem()
    influence = interpreter(model, pairs, **how)
    scores = influence.scores(pairs[:3])
    found = influence.diagnostics

    # A relative residual r leaves |x - x*| <= kappa r |x*| with kappa = (lambda_max + ridge) / ridge, below 100 here.
    assert float(found.relative_residual.max()) <= 1e-6
    expected = exact_scores(model, data, tuple(t[:3] for t in data), RIDGE)
    assert relative_error(scores, expected) <= 100 * 1e-6
    assert found.damping == RIDGE
    assert found.solver.split(" ")[0] == how.get("solver", "lissa") or how["solver"] == "auto"
    assert found.solver.split(" ")[0] in found.in_words()
    assert not found.problems()


@pytest.mark.parametrize("tests", [1, 3, 20])
def test_auto_shares_products_among_right_hand_sides(tests, monkeypatch):
    """K right-hand sides in P = 15 dimensions take at most ceil(15 / K) steps, and rounding one more."""
    monkeypatch.setattr(solving, "MUCH_WORK", 150 * 15 * 20)  # the products of 20 are recorded
    model, pairs, data = problem()
    influence = interpreter(model, pairs, solver="auto")
    scores = influence.scores(pairs[:tests])
    found = influence.diagnostics
    assert found.steps <= -(-15 // tests) + 1
    assert found.solver == ("cg" if tests < solving.AT_ONCE else "block cg")
    assert float(found.relative_residual.max()) <= 1e-6
    # A relative residual r leaves |x - x*| <= kappa r |x*|, with kappa below 100 here.
    assert relative_error(scores, exact_scores(model, data, tuple(t[:tests] for t in data), RIDGE)) <= 100 * 1e-6


class Branching(nn.Linear):
    """Looks into its data, which `torch.vmap` and a recording refuse."""

    def forward(self, x):
        return super().forward(x) if x.sum().item() > -1e9 else x[:, :3]


def test_auto_shares_products_of_models_that_refuse_vmap(monkeypatch):
    monkeypatch.setattr(solving, "MUCH_WORK", 1)
    model, pairs, data = problem(40)
    branching = Branching(4, 3).double()
    branching.load_state_dict(model.state_dict())
    scores = interpreter(branching, pairs, solver="auto").scores(pairs[:20])
    assert relative_error(scores, exact_scores(model, data, tuple(t[:20] for t in data), RIDGE)) <= 100 * 1e-6


def test_a_choice_goes_through_a_record():
    plans = [lissa.Settings(m, 0.1, 1e-2, 1.0, 8, 9, 9, 1, 1, 5.0) for m in ("variance-reduced", "block-cg")]
    choice = solving.Choice("lissa (variance-reduced)", 0.1, 1.0, 9, 8, *plans)
    assert choice.of(15) == choice
    assert choice.of(16).solver == "block cg"
    assert choice.of(16).plan == plans[1]


def test_steps_are_chosen_for_a_scale_of_the_callers():
    """8 scale / damping steps leave a noise-free recursion with a residual of about e^-8, below the warning's level."""
    model, pairs, _ = problem()
    influence = interpreter(model, pairs, scale=4.0, recursion_depth="auto", lissa_batch_size=150)
    influence.scores(pairs[:1])
    assert influence.diagnostics.scale == 4.0
    assert influence.diagnostics.steps >= 8 * 4.0 / (RIDGE + 1)
    assert float(influence.diagnostics.relative_residual) < 1e-2


@pytest.mark.parametrize("how", [{"solver": "cg"}, {"scale": "auto", "recursion_depth": "auto"}], ids=str)
@pytest.mark.parametrize("ridge", ["auto", None])
def test_damping_left_open_is_a_tenth_of_the_mean_eigenvalue(how, ridge):
    model, pairs, data = problem()
    influence = interpreter(model, pairs, ridge=ridge, **how)
    influence.scores(pairs[:1])

    params = {k: p.detach() for k, p in model.named_parameters()}
    H = dense_hessian(lambda p, b: F.cross_entropy(torch.func.functional_call(model, p, (b[0],)), b[1]), params, data)
    # All 15 eigenvalues fit in the Lanczos space, so the trace is exact but for the rounding at its end.
    assert influence.diagnostics.damping == pytest.approx(0.1 * float(H.trace()) / len(H), rel=1e-2)


def test_the_same_seed_gives_the_same_bits():
    model, pairs, _ = problem()
    how = {"scale": "auto", "recursion_depth": "auto", "rtol": 1e-2}
    one, same, other = (interpreter(model, pairs, seed=seed, **how).scores(pairs[:2]) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_self_influence_uses_the_solver():
    model, pairs, data = problem(60)
    found = interpreter(model, pairs, solver="cg").self_influence()
    assert relative_error(found, exact_scores(model, data, data, RIDGE).diagonal()) <= 100 * 1e-6


class Saddle(nn.Module):
    """Loss (a^2 - b^2) / 2: one eigenvalue of each sign."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x):
        return {"loss": ((self.a**2 - self.b**2) / 2 * x).mean()}


def saddle(**changes):
    data = [{"x": torch.ones((), dtype=torch.float64)} for _ in range(8)]
    return SimpleInfluence.from_dataset(Saddle(), data, progress=False, rtol=1e-8, **changes), data


def test_a_negative_eigenvalue_is_named_with_the_damping_that_helps():
    for how in ({"solver": "auto"}, {"scale": "auto", "recursion_depth": "auto"}):
        influence, data = saddle(ridge=0.5, **how)
        with pytest.raises(ValueError, match=r"ridge.*positive definite.*Use damping > "):
            influence.scores(data[:1])
    influence, data = saddle(ridge=0.5, solver="cg")
    with pytest.raises(lissa.SolverError, match=r"INDEFINITE.*ridge.*minres"):
        influence.scores(data[:1])


@pytest.mark.parametrize("solver", ["minres", "dense"])
def test_indefinite_systems_have_solvers_too(solver):
    influence, data = saddle(ridge=0.5, solver=solver)
    ihvps = influence.inverse_hvps(data[:1])
    # grad = (a, -b) = (1, -2); H + ridge = diag(1.5, -0.5).
    assert torch.allclose(flatten(ihvps), torch.tensor([1 / 1.5, 4.0], dtype=torch.float64), rtol=1e-7)


@pytest.mark.parametrize("how", [{"solver": "cg"}, {"scale": "auto", "recursion_depth": "auto"}], ids=str)
def test_a_nan_is_traced_to_its_instance(how):
    model, pairs, _ = problem(40)
    pairs[7] = (pairs[7][0] * torch.nan, pairs[7][1])
    with pytest.raises(ValueError, match=r"Training instance 7.*not finite"):
        interpreter(model, pairs, **how).scores(pairs[:1])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"solver": "newton"}, ["solver=", "'newton'", "'cg'"]),
        ({"rtol": 0.0}, ["rtol=", "> 0"]),
        ({"scale": "big"}, ["scale="]),
        ({"recursion_depth": "deep"}, ["recursion_depth="]),
        ({"scale": "auto", "ridge": None, "damping": 0.01}, ["scale='auto'", "ridge"]),
        ({"compat": "allennlp", "solver": "cg"}, ["compat", "solver='lissa'"]),
        ({"compat": "allennlp", "scale": "auto", "ridge": 0.1}, ["compat", "numbers"]),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(how, words):
    model, pairs, _ = problem(10)
    with pytest.raises((ValueError, TypeError)) as raised:
        interpreter(model, pairs, **how)
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_the_defaults_are_still_allennlps():
    model, pairs, _ = problem(40)
    influence = SimpleInfluence.from_dataset(model, pairs, loss_fn=F.cross_entropy, progress=False)
    with pytest.warns(InfluenceWarning, match="effective damping .* = 30"):
        influence.scores(pairs[:1])
    assert influence.diagnostics.damping == pytest.approx(30)
