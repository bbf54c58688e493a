"""AllenNLP's shapes in a few lines: fields, instances, readers, and models that take their batches."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.oracles import dense_gradients, dense_hessian


class Vocabulary:
    def __init__(self, words):
        self.index = {word: i + 1 for i, word in enumerate(words)}


class TextField:
    def __init__(self, text):
        self.words, self.ids = text.split(), None

    def index_with(self, vocab):
        self.ids = [vocab.index[word] for word in self.words]

    def get_padding_lengths(self):
        return {"num_tokens": len(self.ids)}

    def as_tensor(self, lengths):
        padding = lengths["num_tokens"] - len(self.ids)
        return {"tokens": {"tokens": torch.tensor(self.ids + [0] * padding)}}

    def batch_tensors(self, rows):
        return {"tokens": {"tokens": torch.stack([row["tokens"]["tokens"] for row in rows])}}


class LabelField:
    def __init__(self, label):
        self.label = label

    def index_with(self, vocab):
        pass

    def get_padding_lengths(self):
        return {}

    def as_tensor(self, lengths):
        return torch.tensor(self.label)

    def batch_tensors(self, rows):
        return torch.stack(rows)


class MetadataField(LabelField):
    def as_tensor(self, lengths):
        return self.label

    def batch_tensors(self, rows):
        return list(rows)


class Instance:
    def __init__(self, fields):
        self.fields, self.indexed = fields, False

    def index_fields(self, vocab):
        if not self.indexed:
            for field in self.fields.values():
                field.index_with(vocab)
            self.indexed = True

    def get_padding_lengths(self):
        return {name: field.get_padding_lengths() for name, field in self.fields.items()}

    def as_tensor_dict(self, lengths):
        return {name: field.as_tensor(lengths[name]) for name, field in self.fields.items()}


class Reader:
    """The "file" is a list of (text, label); a label of None is left out."""

    def read(self, file_path):
        for text, label in file_path:
            yield text_instance(text, label)


def text_instance(text, label=None, **metadata):
    fields = {"text": TextField(text)}
    if label is not None:
        fields["label"] = LabelField(label)
    return Instance(fields | {name: MetadataField(value) for name, value in metadata.items()})


WORDS = ["good", "bad", "fine", "poor", "film", "plot", "very", "not"]


class BagOfWords(nn.Module):
    """Mean embedding of the words, padding left out, and a linear layer: `model(text, label)["loss"]`."""

    def __init__(self, *, sparse=False, seed=0, dtype=torch.float64):
        super().__init__()
        self.vocab = Vocabulary(WORDS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(len(WORDS) + 1, 3, sparse=sparse, dtype=dtype)
            self.out = nn.Linear(3, 2, dtype=dtype)

    def forward(self, text, label=None, **metadata):
        ids = text["tokens"]["tokens"]
        mask = (ids > 0).unsqueeze(-1)
        logits = self.out((self.embed(ids) * mask).sum(1) / mask.sum(1))
        return {"logits": logits} | ({} if label is None else {"loss": F.cross_entropy(logits, label)})


def sentences(n=30, seed=0):
    """(text, label) rows of one to six words; words that come first in WORDS are positive more often."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        length = int(torch.randint(1, 7, (), generator=generator))
        words = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        rows.append((" ".join(WORDS[w] for w in words), int(sum(words) / length > 3.5)))
    return rows


def pairs(n=30, features=4, classes=3, seed=0, dtype=torch.float64):
    """(x, y) rows of a noisy linear rule."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator, dtype=dtype)
    rule = torch.randn(features, classes, generator=generator, dtype=dtype)
    y = (x @ rule + torch.randn(n, classes, generator=generator, dtype=dtype)).argmax(1)
    return list(zip(x, y, strict=True))


def linear(features=4, classes=3, seed=0, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(features, classes, dtype=dtype)


def two_layers(seed=0):
    """Not one linear layer, so that instances go through the model each time; twice differentiable."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def classifier(n):
    """A softmax regression in float64 that is not at its optimum, and n examples."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return model, x, torch.randint(3, (n,), generator=generator)


def dense_problem(n=40):
    """A linear classifier, fewer instances than a sample has, the dense Hessian and all gradients."""
    model, x, y = classifier(n)
    params = {k: p.detach() for k, p in model.named_parameters()}

    def losses(params, batch):
        return F.cross_entropy(torch.func.functional_call(model, params, (batch[0],)), batch[1], reduction="none")

    H = dense_hessian(lambda p, b: losses(p, b).mean(), params, (x, y))
    G = dense_gradients(losses, params, (x, y))
    return model, list(zip(x, y, strict=True)), H, G


class Watch:
    """What of the caller's must not change: a copy of it, and the comparison, bit for bit."""

    def __init__(self, model):
        self.model = model
        self.before = self._state()

    def _state(self):
        import random

        import numpy as np

        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {
            "values": {name: t.detach().clone() for name, t in tensors},
            "versions": {name: t._version for name, t in tensors},
            "identity": {name: id(t) for name, t in tensors},
            "grad": {name: None if t.grad is None else t.grad.clone() for name, t in tensors},
            "requires_grad": {name: t.requires_grad for name, t in tensors},
            "device": {name: t.device for name, t in tensors},
            "modes": [m.training for m in self.model.modules()],
            "sparse": [getattr(m, "sparse", None) for m in self.model.modules()],
            "attributes": [sorted(vars(m)) for m in self.model.modules()],
            "python": random.getstate(),
            "numpy": [str(part) for part in np.random.get_state()],
            "torch": torch.get_rng_state(),
            "grad mode": torch.is_grad_enabled(),
            "fast path": torch.backends.mha.get_fastpath_enabled(),
        }

    def changes(self):
        """The names of what is not as it was."""
        after = self._state()
        return [name for name in self.before if not _same(self.before[name], after[name])]


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return a == b
