"""A zoo of models as plain functions of a parameter dict, for the tests and the benchmarks.

Each builder returns a `Problem`: the same loss in every form that the library takes, with parameters and a batch drawn
from `seed` alone. `ZOO` names the builders; a new model is one builder and one entry there.
"""

import functools
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

Params = dict[str, Tensor]


class Problem(NamedTuple):
    """One loss in every form: `loss_fn` is the mean of `example_loss_fn`, and is `output_loss_fn` of `output_fn`."""

    name: str
    loss_fn: Callable[[Params, Any], Tensor]
    example_loss_fn: Callable[[Params, Any], Tensor]
    output_fn: Callable[[Params, Any], Tensor]
    output_loss_fn: Callable[[Tensor, Any], Tensor]
    params: Params
    batch: Any


def classification(name: str, output_fn: Callable[[Params, Any], Tensor], params: Params, batch: Any) -> Problem:
    """The cross-entropy of `output_fn`'s logits, whose last dimension is the classes; the labels are `batch[-1]`.

    Where an example has several logits (a sequence), its loss is their mean.
    """

    def example_loss_fn(params: Params, batch: Any) -> Tensor:
        logits, labels = output_fn(params, batch), batch[-1]
        losses = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        return losses.reshape(len(labels), -1).mean(1)

    def output_loss_fn(logits: Tensor, batch: Any) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, -2), batch[-1].flatten())

    def loss_fn(params: Params, batch: Any) -> Tensor:
        return output_loss_fn(output_fn(params, batch), batch)

    return Problem(name, loss_fn, example_loss_fn, output_fn, output_loss_fn, params, batch)


def softmax_regression(
    *, seed: int = 0, dtype: torch.dtype = torch.float64, batch_size: int = 8, features: int = 5, classes: int = 3
) -> Problem:
    """Linear logits: the loss is convex, and its Hessian is `mean x x^T (diag(p) - p p^T)`."""
    g = torch.Generator().manual_seed(seed)
    params = {
        "weight": normal(g, features, classes, dtype=dtype) / features**0.5,
        "bias": normal(g, classes, dtype=dtype) / 4,
    }
    batch = (normal(g, batch_size, features, dtype=dtype), labels(g, batch_size, classes=classes))
    return classification("softmax regression", lambda p, b: b[0] @ p["weight"] + p["bias"], params, batch)


def mlp(
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 8,
    features: int = 5,
    widths: tuple[int, ...] = (6, 4),
    classes: int = 3,
    activation: Callable[[Tensor], Tensor] = torch.tanh,
) -> Problem:
    """Fully connected layers with an activation between them."""
    g = torch.Generator().manual_seed(seed)
    sizes = (features, *widths, classes)
    params = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        params[f"{i}.weight"] = normal(g, rows, columns, dtype=dtype) / rows**0.5
        params[f"{i}.bias"] = normal(g, columns, dtype=dtype) / 4
    batch = (normal(g, batch_size, features, dtype=dtype), labels(g, batch_size, classes=classes))

    def output_fn(params: Params, batch: Any) -> Tensor:
        h = batch[0]
        for i in range(len(sizes) - 1):
            h = h if i == 0 else activation(h)
            h = h @ params[f"{i}.weight"] + params[f"{i}.bias"]
        return h

    return classification("MLP", output_fn, params, batch)


def tied_weights(
    *, seed: int = 0, dtype: torch.dtype = torch.float64, batch_size: int = 8, vocabulary: int = 7, width: int = 4
) -> Problem:
    """A bigram model whose one matrix is both the embedding of the input word and the output layer."""
    g = torch.Generator().manual_seed(seed)
    params = {
        "embedding": normal(g, vocabulary, width, dtype=dtype),
        "mix": normal(g, width, width, dtype=dtype) / width**0.5,
    }
    batch = (labels(g, batch_size, classes=vocabulary), labels(g, batch_size, classes=vocabulary))

    def output_fn(params: Params, batch: Any) -> Tensor:
        hidden = torch.tanh(params["embedding"][batch[0]] @ params["mix"])
        return hidden @ params["embedding"].mT

    return classification("tied weights", output_fn, params, batch)


def from_module(name: str, module: nn.Module, inputs: tuple[Any, ...], targets: Tensor, dtype: torch.dtype) -> Problem:
    """An `nn.Module` in eval mode, whose trainable parameters are the parameters and whose rest stays inside."""
    module.to(dtype).eval()
    params = {k: p.detach().clone() for k, p in module.named_parameters() if p.requires_grad}

    def output_fn(params: Params, batch: Any) -> Tensor:
        return functional_call(module, params, batch[:-1])

    return classification(name, output_fn, params, (*inputs, targets))


def seeded(build: Callable[..., Problem]) -> Callable[..., Problem]:
    """`build` with torch's initialisers, which read the global generator, started from `seed`; it is put back after."""

    @functools.wraps(build)
    def wrapper(*, seed: int = 0, **sizes: Any) -> Problem:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(torch.Generator().manual_seed(seed), **sizes)

    return wrapper


@seeded
def cnn(
    g: torch.Generator, *, dtype: torch.dtype = torch.float64, batch_size: int = 4, size: int = 8, channels: int = 3
) -> Problem:
    """Convolutions with BatchNorm in eval mode, max and average pooling."""
    module = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 3),
    )
    for layer in module:
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2.0)
    x = normal(g, batch_size, 1, size, size, dtype=dtype)
    return from_module("CNN, BatchNorm", module, (x,), labels(g, batch_size, classes=3), dtype)


class Recurrent(nn.Module):
    """Embeds words, runs an LSTM or a GRU over them, padded or packed, and classifies the last state."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], vocabulary: int, width: int, packed: bool):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.rnn = kind(width, width, batch_first=True)
        self.out = nn.Linear(width, 3)
        self.packed = packed

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        x = self.embedding(words)
        if self.packed:
            x = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states = self.rnn(x)[1]
        return self.out((states[0] if isinstance(states, tuple) else states)[-1])


@seeded
def recurrent(
    g: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 4,
    tokens: int = 5,
    vocabulary: int = 9,
    width: int = 4,
    kind: type[nn.LSTM] | type[nn.GRU] = nn.LSTM,
    packed: bool = True,
) -> Problem:
    """A recurrent classifier on sequences of different lengths."""
    module = Recurrent(kind, vocabulary, width, packed)
    lengths = 1 + labels(g, batch_size, classes=tokens)
    words = labels(g, batch_size, tokens, classes=vocabulary)
    name = f"{kind.__name__}, {'packed' if packed else 'padded'}"
    return from_module(name, module, (words, lengths), labels(g, batch_size, classes=3), dtype)


class Encoder(nn.Module):
    """Embedded words with positions through `nn.TransformerEncoder`, padding masked, then averaged and classified."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, tokens: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(tokens, width) / 4)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, 3)

    def forward(self, words: Tensor, padding: Tensor) -> Tensor:
        h = self.encoder(self.embedding(words) + self.position, src_key_padding_mask=padding)
        kept = (~padding).to(h.dtype)[..., None]
        return self.out((h * kept).sum(1) / kept.sum(1))


@seeded
def transformer(
    g: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 4,
    tokens: int = 5,
    vocabulary: int = 9,
    width: int = 8,
    heads: int = 2,
    layers: int = 1,
) -> Problem:
    """`nn.TransformerEncoder` in eval mode, where torch would take its fast path."""
    module = Encoder(vocabulary, width, heads, layers, tokens)
    words = labels(g, batch_size, tokens, classes=vocabulary)
    lengths = 1 + labels(g, batch_size, classes=tokens)
    padding = torch.arange(tokens) >= lengths[:, None]
    return from_module("TransformerEncoder", module, (words, padding), labels(g, batch_size, classes=3), dtype)


class Decoder(nn.Module):
    """Causal attention by `scaled_dot_product_attention`; the embedding is also the output layer."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, tokens: int):
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(tokens, width) / 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "mix": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        h = self.embedding(words) + self.position
        for block in self.blocks:
            parts = block["qkv"](block["norm1"](h)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
            attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + block["mix"](attended.transpose(1, 2).flatten(2))
            h = h + block["down"](functional.gelu(block["up"](block["norm2"](h))))
        return self.head(h)


@seeded
def decoder(
    g: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 4,
    tokens: int = 5,
    vocabulary: int = 9,
    width: int = 8,
    heads: int = 2,
    layers: int = 1,
) -> Problem:
    """A language model of decoder blocks with tied embeddings, whose loss is on every token."""
    module = Decoder(vocabulary, width, heads, layers, tokens)
    words = labels(g, batch_size, tokens + 1, classes=vocabulary)
    return from_module("decoder, SDPA, tied", module, (words[:, :-1].clone(),), words[:, 1:].clone(), dtype)


class Bag(nn.Module):
    """The mean of word vectors, classified; by an Embedding with sparse gradients or by an EmbeddingBag."""

    def __init__(self, kind: type[nn.Embedding] | type[nn.EmbeddingBag], vocabulary: int, width: int):
        super().__init__()
        self.embedding = kind(vocabulary, width, sparse=True) if kind is nn.Embedding else kind(vocabulary, width)
        self.out = nn.Linear(width, 3)

    def forward(self, words: Tensor) -> Tensor:
        h = self.embedding(words)
        return self.out(torch.tanh(h.mean(1) if h.ndim == 3 else h))


@seeded
def bag_of_words(
    g: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    batch_size: int = 4,
    tokens: int = 5,
    vocabulary: int = 9,
    width: int = 4,
    kind: type[nn.Embedding] | type[nn.EmbeddingBag] = nn.Embedding,
) -> Problem:
    """A classifier of averaged word vectors."""
    module = Bag(kind, vocabulary, width)
    words = labels(g, batch_size, tokens, classes=vocabulary)
    name = "Embedding(sparse=True)" if kind is nn.Embedding else "EmbeddingBag"
    return from_module(name, module, (words,), labels(g, batch_size, classes=3), dtype)


@seeded
def normalised(
    g: torch.Generator, *, dtype: torch.dtype = torch.float64, batch_size: int = 4, width: int = 6
) -> Problem:
    """LayerNorm and GroupNorm between linear layers."""
    module = nn.Sequential(
        nn.Linear(5, width),
        nn.LayerNorm(width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GroupNorm(2, width),
        nn.Tanh(),
        nn.Linear(width, 3),
    )
    x = normal(g, batch_size, 5, dtype=dtype)
    return from_module("LayerNorm, GroupNorm", module, (x,), labels(g, batch_size, classes=3), dtype)


class Branching(nn.Module):
    """Takes one of two ways, by the data and by its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)) if x.mean() > 0 else torch.sigmoid(self.b(x))
        return self.out(h * h if h.norm() > 0.1 else h)


@seeded
def branching(g: torch.Generator, *, dtype: torch.dtype = torch.float64, batch_size: int = 4) -> Problem:
    """A model with branches that depend on the data and on the parameters."""
    x = normal(g, batch_size, 5, dtype=dtype)
    return from_module("data-dependent branch", Branching(), (x,), labels(g, batch_size, classes=3), dtype)


class InPlace(nn.Module):
    """Writes results in place: into activations, and into rows of a fresh tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) ** 2
        h += 1.0
        rows = torch.zeros_like(h)
        rows[:, 1:] = h[:, 1:] * 2.0
        rows[:, 0] = h[:, 0]
        return self.out(rows.tanh_())


@seeded
def in_place(g: torch.Generator, *, dtype: torch.dtype = torch.float64, batch_size: int = 4) -> Problem:
    """A model that overwrites its own intermediate results."""
    x = normal(g, batch_size, 5, dtype=dtype)
    return from_module("in-place operations", InPlace(), (x,), labels(g, batch_size, classes=3), dtype)


class PartlyTrained(nn.Module):
    """A frozen layer, a buffer, a layer that nothing uses, and a trained layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.unused, self.out = nn.Linear(5, 4), nn.Linear(2, 2), nn.Linear(4, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.frozen(x)) + self.shift)


@seeded
def partly_trained(g: torch.Generator, *, dtype: torch.dtype = torch.float64, batch_size: int = 4) -> Problem:
    """A model with a frozen part, a buffer and an unused parameter."""
    x = normal(g, batch_size, 5, dtype=dtype)
    return from_module("frozen, unused, buffer", PartlyTrained(), (x,), labels(g, batch_size, classes=3), dtype)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Standard normal entries, the same for every dtype up to rounding."""
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def labels(generator: torch.Generator, *shape: int, classes: int) -> Tensor:
    """Integers below `classes`."""
    return torch.randint(classes, shape, generator=generator)


def random_vector(problem: Problem, seed: int = 1) -> Params:
    """A standard normal vector, shaped like the parameters."""
    g = torch.Generator().manual_seed(seed)
    return {k: normal(g, *p.shape, dtype=p.dtype) for k, p in problem.params.items()}


def random_vectors(problem: Problem, count: int, seed: int = 1) -> Params:
    """`count` standard normal vectors, stacked along a new first dimension."""
    g = torch.Generator().manual_seed(seed)
    return {k: normal(g, count, *p.shape, dtype=p.dtype) for k, p in problem.params.items()}


ZOO: dict[str, Callable[..., Problem]] = {
    "softmax regression": softmax_regression,
    "MLP": mlp,
    "tied weights": tied_weights,
    "CNN, BatchNorm in eval mode": cnn,
    "LayerNorm, GroupNorm": normalised,
    "LSTM, padded": partial(recurrent, kind=nn.LSTM, packed=False),
    "LSTM, packed": partial(recurrent, kind=nn.LSTM, packed=True),
    "GRU, padded": partial(recurrent, kind=nn.GRU, packed=False),
    "GRU, packed": partial(recurrent, kind=nn.GRU, packed=True),
    "nn.TransformerEncoder": transformer,
    "decoder, SDPA, tied embeddings": decoder,
    "Embedding(sparse=True)": partial(bag_of_words, kind=nn.Embedding),
    "EmbeddingBag": partial(bag_of_words, kind=nn.EmbeddingBag),
    "data-dependent branch": branching,
    "in-place operations": in_place,
    "frozen part, unused parameter, buffer": partly_trained,
}
"""Builders by name; all take `seed`, `dtype` and `batch_size`."""
