from pathlib import Path

import pytest
import torch

from lissa import choose_mode, hvp
from lissa.hvp import MODES
from tests import support
from tests.problems import ZOO, random_vector

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ZOO)
def test_every_mode_is_right_or_names_what_works(name, dtype):
    cells = dict(zip(MODES, support.row(name, dtype), strict=True))  # raises where a number is wrong

    some_mode_works = any(cell != support.ERROR for mode, cell in cells.items() if mode != "auto")
    assert (cells["auto"] != support.ERROR) == some_mode_works
    # Only a sum over bags has no exact second derivative; in 16 bits there is then no mode at all.
    assert cells["auto"] == support.RIGHT or name == "EmbeddingBag"


def test_the_readme_shows_the_matrix_as_it_is():
    text = README.read_text()
    header = support.markdown([["model", *MODES]]).split("\n")[0]
    if header not in text:
        pytest.skip("the README shows no support matrix")
    shown = text[text.index(header) :].split("\n\n")[0].strip()

    assert shown == support.markdown(support.support_matrix())


def test_a_wrong_product_would_be_noticed():
    problem = ZOO["MLP"]()
    v = random_vector(problem)
    expected = support.difference_product(problem, v)

    with pytest.raises(support.SilentlyWrongError, match="relative error"):
        support.cell(problem, v, expected * 1.001, "reverse-over-reverse")


@pytest.mark.parametrize("name", ZOO)
def test_the_chosen_mode_is_the_one_that_auto_comes_to(name):
    problem = ZOO[name]()
    v = random_vector(problem)

    mode = choose_mode(problem.loss_fn, problem.params, problem.batch)

    assert mode != "auto"
    auto = hvp(problem.loss_fn, problem.params, problem.batch, v)
    chosen = hvp(problem.loss_fn, problem.params, problem.batch, v, mode=mode)
    assert all(torch.equal(auto[k], chosen[k]) for k in auto)


@pytest.mark.parametrize(
    ("mode", "name", "words"),
    [
        ("reverse-over-reverse", "LSTM, packed", ["pack_padded_sequence", "'double-backward'", "'auto'"]),
        ("forward-over-reverse", "LSTM, padded", ["mkldnn_rnn_layer", "torch.backends.mkldnn.flags(enabled=False)"]),
        ("forward-over-reverse", "LSTM, packed", ["_pack_padded_sequence", "'double-backward'"]),
        ("double-backward", "EmbeddingBag", ["_embedding_bag_backward", "'finite-difference'", "nn.Embedding and a"]),
        ("reverse-over-reverse", "Embedding(sparse=True)", ["sparse", "sparse=False", "'double-backward'"]),
        ("finite-difference", "CNN, BatchNorm in eval mode", ["kink", "float64", "'auto'"]),
    ],
)
def test_errors_name_the_operation_and_the_way_out(mode, name, words):
    problem = ZOO[name](dtype=torch.float32)

    with pytest.raises(NotImplementedError) as caught:
        hvp(problem.loss_fn, problem.params, problem.batch, random_vector(problem), mode=mode)

    message = str(caught.value)
    assert message.startswith(f"`hvp(mode='{mode}')` failed")
    assert all(word in message for word in words)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # of torch's own switch, without Intel GPUs
def test_the_switch_that_the_error_names_works():
    problem = ZOO["LSTM, padded"](dtype=torch.float32)
    v = random_vector(problem)
    expected = hvp(problem.loss_fn, problem.params, problem.batch, v, mode="reverse-over-reverse")

    with torch.backends.mkldnn.flags(enabled=False):
        got = hvp(problem.loss_fn, problem.params, problem.batch, v, mode="forward-over-reverse")

    # A thousand roundings of float32.
    assert all(torch.allclose(got[k], expected[k], rtol=1e-4, atol=1e-5) for k in got)


def test_auto_says_once_why_it_fell_back(caplog):
    problem = ZOO["GRU, packed"](seed=5)

    for _ in range(3):
        hvp(problem.loss_fn, problem.params, problem.batch, random_vector(problem))

    said = [r.getMessage() for r in caplog.records if r.name == "lissa.hvp"]
    assert len(said) <= 1  # another test may have heard it before


@pytest.mark.parametrize(
    "operation",
    [torch.linalg.det, torch.logdet, lambda x: torch.linalg.solve(x, x[0]), lambda x: torch.cumprod(x, 0)],
)
def test_reverse_over_forward_refuses_what_torch_would_get_wrong(operation):
    params = {"x": torch.eye(3, dtype=torch.float64) + 0.1}

    with pytest.raises(NotImplementedError, match=r"cannot be differentiated .*Use mode='reverse-over-reverse'"):
        hvp(lambda p, _: operation(p["x"]).sin().sum(), params, None, params, mode="reverse-over-forward")
