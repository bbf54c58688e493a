import pytest
import torch

from lissa.testing import adapters, check_hvp, product_laws


def test_flat_products_keep_the_laws():
    def flat_hvp(loss, x, v):
        return torch.autograd.functional.hvp(loss, x, v)[1]

    check_hvp(adapters.of_flat(flat_hvp), max_examples=3)


def test_curvlinops_keeps_the_laws():
    pytest.importorskip("curvlinops", reason="needs curvlinops-for-pytorch")
    for law in product_laws(min_batch_size=1):
        # curvlinops 3.0.1 fails on parameters that the loss does not use: its vmap expects a batched result.
        used = law._replace(cases=law.cases.filter(lambda p: "unused" not in p.params))
        used.check(adapters.of_curvlinops(), max_examples=3)
