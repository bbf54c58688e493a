import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lissa import tree
from tests.oracles import flatten

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=3), st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=1, max_size=4
)


def random_pair(shapes: dict, seed: int):
    generator = torch.Generator().manual_seed(seed)
    like = {k: torch.empty(shape, dtype=torch.float64) for k, shape in shapes.items()}
    return tree.normal_like(like, generator=generator), tree.normal_like(like, generator=generator)


@given(SHAPES, st.integers(0, 10**6))
def test_arithmetic_is_that_of_the_flat_vectors(shapes, seed):
    x, y = random_pair(shapes, seed)
    a, b = flatten(x), flatten(y)

    assert torch.equal(flatten(tree.add(x, y)), a + b)
    assert torch.equal(flatten(tree.sub(x, y)), a - b)
    assert torch.equal(flatten(tree.scale(-2.5, x)), -2.5 * a)
    assert torch.equal(flatten(tree.add_scaled(x, 3.0, y)), a + 3.0 * b)
    assert torch.equal(flatten(tree.zeros_like(x)), torch.zeros_like(a))
    assert torch.equal(flatten(tree.where(torch.tensor(True), x, y)), a)
    assert torch.equal(flatten(tree.where(torch.tensor(False), x, y)), b)
    assert tree.numel(x) == len(a)
    # Both sum P products in some order: they differ by at most P roundings of the sum of sizes.
    bound = (len(a) + 1) * 2.3e-16
    assert abs(tree.vdot(x, y) - a @ b) <= bound * (a.abs() @ b.abs())
    assert abs(tree.norm(x) - a.norm()) <= bound * a.norm()


@given(SHAPES, st.integers(0, 10**6))
def test_unflatten_undoes_flatten(shapes, seed):
    x, _ = random_pair(shapes, seed)
    flat = tree.flatten(x)
    back = tree.unflatten(flat, x)

    assert torch.equal(flat, flatten(x))
    assert list(back) == list(x)
    assert all(torch.equal(back[k], x[k]) for k in x)


def test_flatten_follows_the_key_order_of_another_dict():
    x = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    assert tree.flatten(x, {"b": x["b"], "w": x["w"]}).tolist() == [3.0, 1.0, 2.0]


def test_unflatten_refuses_another_length():
    with pytest.raises(ValueError, match=r"flat must have shape \(2,\), got \(3,\)"):
        tree.unflatten(torch.zeros(3), {"w": torch.zeros(2)})


def test_normal_like_comes_from_the_generator_alone():
    like = {"w": torch.zeros(1000), "b": torch.zeros((), dtype=torch.float64)}
    before = torch.get_rng_state()
    x = tree.normal_like(like, generator=torch.Generator().manual_seed(3))
    y = tree.normal_like(like, generator=torch.Generator().manual_seed(3))

    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x[k], y[k]) and x[k].dtype == like[k].dtype for k in like)
    # The mean of 1000 standard normals has standard deviation 0.032; six of them are 0.19.
    assert abs(x["w"].mean()) < 0.19
    assert abs(x["w"].std() - 1) < 0.19


def test_arithmetic_composes_with_vmap():
    x = {"w": torch.randn(5, 3, generator=torch.Generator().manual_seed(0))}
    assert torch.vmap(tree.norm)(x).shape == (5,)
    assert torch.allclose(torch.vmap(tree.vdot)(x, x), x["w"].square().sum(1))
