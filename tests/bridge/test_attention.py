import sys

import pytest
import torch

from bridge.attention import masks_always_made
from lissa.kernels import twice_differentiable


def test_without_transformers_nothing_happens(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers.masking_utils", raising=False)
    with masks_always_made():
        assert "transformers.masking_utils" not in sys.modules


class TestWithTransformers:
    @pytest.fixture
    def masks(self):
        pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")
        from transformers import masking_utils

        return masking_utils.ALL_MASK_ATTENTION_FUNCTIONS

    def test_the_registry_is_as_before_on_exit_also_after_an_error(self, masks):
        before = {name: masks[name] for name in masks}

        def fail():
            with masks_always_made(), masks_always_made():
                assert masks["sdpa"] is not before["sdpa"]
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert {name: masks[name] for name in masks} == before

    @pytest.mark.parametrize("kind", ["BERT", "DistilBERT", "GPT-2"])
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("padding", [0, 3])
    def test_outputs_are_the_same_and_vmap_takes_the_model(self, masks, kind, attention, padding):
        from tests.bridge import transformers_models

        model = transformers_models.classifier(kind, attention)
        ids = torch.randint(4, 18, (3, 7), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1, 7 - padding :] = 0
        ids = ids * mask

        def logits(ids, mask):
            return model(input_ids=ids, attention_mask=mask).logits

        expected = logits(ids, mask)
        with twice_differentiable(), masks_always_made():
            together = logits(ids, mask)
            one_by_one = torch.vmap(logits)(ids[:, None], mask[:, None])[:, 0]
        # Some hundred roundings of float64, of numbers of about 1.
        torch.testing.assert_close(together, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(one_by_one, expected, rtol=0, atol=1e-13)
