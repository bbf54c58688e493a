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


def test_sparse_gradients_of_other_operations_are_named_and_auto_finds_a_way():
    """An embedding is made dense; `gather(sparse_grad=True)` stays as it is. `sum_i exp(w_i)`: `H = diag(exp(w))`."""
    params = {"w": torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)}
    v = {"w": torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)}

    def loss_fn(params, index):
        return torch.gather(params["w"], 0, index, sparse_grad=True).exp().sum()

    index = torch.tensor([0, 2])
    with pytest.raises(NotImplementedError, match=r"a gradient is sparse.*sparse=False"):
        hvp(loss_fn, params, index, v, mode="reverse-over-reverse")
    expected = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64) * params["w"].exp() * v["w"]
    torch.testing.assert_close(hvp(loss_fn, params, index, v)["w"], expected, rtol=1e-14, atol=0)


def test_embeddings_become_dense_by_either_way_of_calling_them():
    """`|W[i]|^4 / 4` for each word i: a product by the same loss with `sparse=False` must not differ in a bit."""
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(4, 3, dtype=torch.float64, generator=generator)}
    v = {"w": torch.randn(4, 3, dtype=torch.float64, generator=generator)}
    words = torch.tensor([0, 2, 2])
    ways = {
        "functional": lambda p, sparse: torch.nn.functional.embedding(words, p["w"], sparse=sparse),
        "torch": lambda p, sparse: torch.embedding(p["w"], words, -1, False, sparse),
        "torch, by name": lambda p, sparse: torch.embedding(p["w"], words, sparse=sparse),
    }
    for way in ways.values():
        sparse, dense = (
            hvp(lambda p, _: way(p, s).square().sum(1).square().sum() / 4, params, None, v)["w"]  # noqa: B023
            for s in (True, False)
        )
        assert torch.equal(sparse, dense)


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
