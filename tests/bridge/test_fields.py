"""Real fields of AllenNLP 2.10.1, many at once, must become the tensors that they become one by one."""

import pytest
import torch

from bridge.data import collate
from tests.bridge.allennlp_standins import import_allennlp

import_allennlp()

from allennlp.data import Batch, Instance, Token, Vocabulary  # noqa: E402
from allennlp.data.fields import ArrayField, LabelField, ListField, MetadataField, TextField  # noqa: E402
from allennlp.data.token_indexers import SingleIdTokenIndexer, TokenCharactersIndexer  # noqa: E402


class Marks(SingleIdTokenIndexer):
    """Of each token a bool and not a number."""

    def tokens_to_indices(self, tokens, vocabulary):
        return {"marks": [len(token.text) > 4 for token in tokens]}


class Reversed(SingleIdTokenIndexer):
    """Pads in a way of its own."""

    def as_padded_tensor_dict(self, tokens, padding_lengths):
        return {key: t.flip(0) for key, t in super().as_padded_tensor_dict(tokens, padding_lengths).items()}


TEXTS = ["good film", "", "very very poor plot", "fine"]
SHARED = {
    "one": {"tokens": SingleIdTokenIndexer()},
    "two": {"tokens": SingleIdTokenIndexer(), "lower": SingleIdTokenIndexer("lower", lowercase_tokens=True)},
    "longer": {"tokens": SingleIdTokenIndexer(token_min_padding_length=6)},
    "characters": {"tokens": SingleIdTokenIndexer(), "characters": TokenCharactersIndexer(min_padding_length=2)},
    "marks": {"tokens": SingleIdTokenIndexer(), "marks": Marks()},
    "reversed": {"tokens": Reversed()},
}
FIELDS = {
    **{name: lambda i, shared=shared: words(TEXTS[i], shared) for name, shared in SHARED.items()},
    "each its own": lambda i: words(TEXTS[i], {"tokens": Reversed() if i > 1 else SingleIdTokenIndexer()}),
    "texts in a list": lambda i: ListField([words(TEXTS[i], SHARED["one"])] * (i + 1)),
    "arrays": lambda i: ArrayField(torch.full((i + 1, 2), 3.0)),
    "arrays alike": lambda i: ArrayField(torch.full((2,), float(i)), padding_value=7),
    "numbers": lambda i: ArrayField(torch.tensor(float(i))),
    "words as labels": lambda i: LabelField(TEXTS[i] or "none"),
    "labels": lambda i: LabelField(3 - i, skip_indexing=True),
    "booleans as labels": lambda i: LabelField(i > 1, skip_indexing=True),
    "anything": lambda i: MetadataField({"i": i}),
}


def words(text, indexers):
    return TextField([Token(word) for word in text.split()], indexers)


@pytest.mark.parametrize("name", FIELDS)
def test_instances_are_collated_as_by_their_batch(name):
    instances = [Instance({"field": FIELDS[name](i)}) for i in range(4)]
    vocab = Vocabulary.from_instances(instances)
    for one in instances:
        one.index_fields(vocab)
    for some in (instances, instances[1:2], [instances[2]] * 2, instances[::-1]):
        torch.testing.assert_close(collate(some), Batch(some).as_tensor_dict(), rtol=0, atol=0)
