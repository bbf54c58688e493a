import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bridge import get_hvp, get_inverse_hvp_lissa
from bridge.data import collate
from tests.bridge.fakes import BagOfWords, Watch, linear, pairs, sentences, text_instance
from tests.oracles import dense_hessian

# Sums of at most a few hundred products in float64: rounding stays far below this.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def stacked(data):
    x, y = zip(*data, strict=True)
    return torch.stack(x), torch.stack(y)


def linear_mean_loss(params, batch):
    x, y = batch
    return F.cross_entropy(x @ params["weight"].T + params["bias"], y)


A = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)


def test_get_hvp_of_a_quadratic_form():
    # The Hessian of x A x / 2 is (A + A^T) / 2 = [[1, 2.5], [2.5, 4]]; times (10, 20) it is (60, 105).
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (product,) = get_hvp(x @ A @ x / 2, [x], [torch.tensor([10.0, 20.0], dtype=torch.float64)])
    assert product.tolist() == [60.0, 105.0]


class Quadratic(nn.Module):
    """`loss = weight x A x / 2 + linear`, as AllenNLP's tests write it: of shape (1,)."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))

    def forward(self, weight):
        return {"loss": (weight * (self.x @ A @ self.x) / 2).reshape(1)}


def test_one_lissa_step_of_a_quadratic_form():
    # v + v - H v with v = (1, 1): (2, 2) - (3.5, 6.5) = (-1.5, -4.5).
    model = Quadratic()
    batches = [{"weight": torch.ones(1, dtype=torch.float64)}]
    v = [torch.ones(2, dtype=torch.float64)]
    assert get_inverse_hvp_lissa(v, model, [model.x], batches, 0.0, 1, 1.0).tolist() == [-1.5, -4.5]


def test_get_hvp_gives_zero_where_the_loss_is_linear_or_does_not_look():
    curved, straight, unused = (torch.ones(2, requires_grad=True) for _ in range(3))
    products = get_hvp((curved**2).sum() + straight.sum(), [curved, straight, unused], [torch.ones(2)] * 3)
    assert [p.tolist() for p in products] == [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]


def test_get_hvp_takes_vectors_that_are_not_contiguous():
    w = torch.ones(2, 3, requires_grad=True)
    v = torch.arange(6.0).reshape(3, 2).T
    torch.testing.assert_close(get_hvp((w**3).sum(), [w], [v])[0], 6 * v)


@pytest.mark.parametrize(
    ("damping", "scale", "num_samples"), [(0.0, 10.0, 1), (0.003, 25.0, 1), (0.05, 8.0, 3), (0.2, 40.0, 2)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 3e-5)])
def test_inverse_hvp_is_allennlps_recursion(damping, scale, num_samples, dtype, tolerance):
    model = LossModel(linear(dtype=dtype))
    data = pairs(23, dtype=dtype)  # 6 batches, the last of 3
    batches = [stacked(data[i : i + 4]) for i in range(0, 23, 4)]
    params = {name: p.detach() for name, p in model.net.named_parameters()}
    vs = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3), dtype=dtype) for p in params.values()]

    hessians = [dense_hessian(linear_mean_loss, params, batch) for batch in batches]
    v = torch.cat([t.reshape(-1) for t in vs])
    total = torch.zeros_like(v)
    for _ in range(num_samples):
        c = v
        for H in hessians:
            c = v + (1 - damping) * c - H @ c / scale
        total += c / scale

    loader = [{"x": x, "y": y} for x, y in batches]
    got = get_inverse_hvp_lissa(vs, model, list(model.net.parameters()), loader, damping, num_samples, scale)
    assert (got - total / num_samples).norm() <= tolerance * total.norm() / num_samples


class LossModel(nn.Module):
    """`net` with AllenNLP's calling convention."""

    def __init__(self, net, **more):
        super().__init__()
        self.net = net
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x, y=None):
        logits = self.net(x)
        return {"logits": logits} | ({} if y is None else {"loss": F.cross_entropy(logits, y)})


def test_inverse_hvp_of_sparse_embeddings():
    dense, sparse = (BagOfWords(sparse=sparse) for sparse in (False, True))
    rows = [text_instance(*row) for row in sentences(6)]
    batches = [collate(rows[:3], vocab=dense.vocab), collate(rows[3:], vocab=dense.vocab)]
    vs = [torch.ones_like(p) for p in dense.parameters()]
    expected, got = (
        get_inverse_hvp_lissa(vs, model, list(model.parameters()), batches, 0.01, 1, 10.0) for model in (dense, sparse)
    )
    torch.testing.assert_close(got, expected, **EXACT)
    assert sparse.embed.sparse


@pytest.mark.parametrize("training", [True, False])
def test_inverse_hvp_leaves_the_model_as_it_is(training):
    model = LossModel(linear()).train(training)
    batches = [dict(zip("xy", stacked(pairs(8)), strict=True))]
    watch = Watch(model)
    vs = [torch.ones_like(p) for p in model.parameters()]
    get_inverse_hvp_lissa(vs, model, list(model.parameters()), batches, 0.0, 1, 10.0)
    assert watch.changes() == []
