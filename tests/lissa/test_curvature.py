import pytest
import torch
from torch import nn

from benchmarks.timing import peak_bytes
from lissa import fvp, ggnvp, hvp, linearised_hvp
from tests import problems
from tests.oracles import dense_gradients, dense_hessian, flatten, relative_error
from tests.problems import ZOO, random_vector, random_vectors

SMOOTH = ["softmax regression", "MLP", "tied weights"]


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("seed", range(3))
def test_fvp_is_the_second_moment_of_the_examples_gradients(name, seed):
    problem = ZOO[name](seed=seed)
    v = random_vector(problem, seed)
    gradients = dense_gradients(problem.example_loss_fn, problem.params, problem.batch)

    got = flatten(fvp(problem.example_loss_fn, problem.params, problem.batch, v))

    assert relative_error(got, gradients.mT @ (gradients @ flatten(v)) / len(gradients)) <= 1e-12


@pytest.mark.parametrize("name", SMOOTH)
def test_the_linearised_product_is_the_dense_one_time_after_time(name):
    problem = ZOO[name]()
    H = dense_hessian(problem.loss_fn, problem.params, problem.batch)
    matvec = linearised_hvp(problem.loss_fn, problem.params, problem.batch)

    for seed in range(3):
        v = random_vector(problem, seed)
        assert relative_error(flatten(matvec(v)), H @ flatten(v)) <= 1e-12
    stacked = torch.vmap(matvec)(random_vectors(problem, 4))
    one = matvec({k: t[2] for k, t in random_vectors(problem, 4).items()})
    assert relative_error(flatten({k: t[2] for k, t in stacked.items()}), flatten(one)) <= 1e-12


@pytest.mark.parametrize("product", [ggnvp, fvp])
def test_products_run_where_forward_mode_does_not(product):
    problem = problems.recurrent(kind=nn.LSTM, packed=False, dtype=torch.float32)  # oneDNN's LSTM
    exact = problems.recurrent(kind=nn.LSTM, packed=False, dtype=torch.float64)
    v = random_vector(problem)

    def apply(problem, v):
        fns = (problem.output_fn, problem.output_loss_fn) if product is ggnvp else (problem.example_loss_fn,)
        return flatten(product(*fns, problem.params, problem.batch, v)).double()

    # About a thousand roundings of float32.
    assert relative_error(apply(problem, v), apply(exact, {k: t.double() for k, t in v.items()})) <= 1e-4


def test_losses_that_are_not_one_per_example_are_named():
    problem = problems.mlp()

    with pytest.raises(ValueError, match=r"`fvp\(example_loss_fn=...\)` must return one loss per example"):
        fvp(problem.loss_fn, problem.params, problem.batch, random_vector(problem))


@pytest.mark.parametrize("product", [ggnvp, fvp, linearised_hvp])
def test_the_order_of_the_vectors_keys_does_not_matter(product):
    problem = problems.mlp()
    v = random_vector(problem)

    def apply(v):
        if product is linearised_hvp:
            return linearised_hvp(problem.loss_fn, problem.params, problem.batch)(v)
        fns = (problem.output_fn, problem.output_loss_fn) if product is ggnvp else (problem.example_loss_fn,)
        return product(*fns, problem.params, problem.batch, v)

    assert torch.equal(flatten(apply(v)), flatten(apply(dict(reversed(v.items())))))


def test_memory_of_many_vectors_grows_only_with_the_chunk():
    problem = problems.mlp(features=4, widths=(64, 64), batch_size=512)  # activations outweigh parameters

    def workspace(count, chunk):
        vectors = random_vectors(problem, count)
        products = torch.vmap(lambda v: hvp(problem.loss_fn, problem.params, problem.batch, v), chunk_size=chunk)
        results = 2 * sum(t.nbytes for t in vectors.values())  # the chunks' products, and all of them in one tensor
        return peak_bytes(lambda: products(vectors)) - results

    chunked = workspace(32, 4)
    # The first chunk of four and the last of thirty-two need the same; one in ten is for allocation order.
    assert chunked <= 1.1 * workspace(4, 4)
    assert workspace(32, None) >= 4 * chunked
