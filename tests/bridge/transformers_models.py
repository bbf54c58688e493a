"""Tiny transformers of random weights, with a tokenizer of their own: nothing is downloaded."""

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers: pip install '.[hf]'")

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["a", "the", "film", "plot", "is", "was", "not", "good", "bad", "dull", "bright", "very", "long", "short"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIZES = {"vocab_size": len(WORDS) + len(SPECIAL), "num_labels": 2, "pad_token_id": 0}
KINDS = {
    "BERT": lambda attention: transformers.BertForSequenceClassification(
        transformers.BertConfig(
            **SIZES, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12,
            max_position_embeddings=16, attn_implementation=attention,
        )
    ),
    "DistilBERT": lambda attention: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            **SIZES, dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=16,
            attn_implementation=attention,
        )
    ),
    "GPT-2": lambda attention: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(
            **SIZES, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=2, eos_token_id=3,
            attn_implementation=attention,
        )
    ),
}  # fmt: skip


def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=16, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def classifier(kind="BERT", attention="sdpa", dtype=torch.float64):
    """In eval mode, with weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = KINDS[kind](attention).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def sentences(n, seed=0):
    """`n` texts of 2 to 9 words, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (n,), generator=generator).tolist()
    texts = [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)) for length in lengths
    ]
    return texts, [int("good" in text or "bright" in text) for text in texts]
