"""What the command line works on: a model, its data, and how to show an example. Built from a user's own function.

Knows modules, datasets and names of parameters; knows nothing of solvers, files of text or screens.
"""

import importlib
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bridge.data import CollateFn, is_sequence
from bridge.files import InputError, listed
from bridge.functional import OutputLoss


class Example(NamedTuple):
    """An example as people see it.

    Attributes:
        place: The line of its file, or its index where there is no file.
        label: Its label.
        text: Its text; empty if it has none.
        image: Grey `(height, width)` or `(channels, height, width)` with 1 or 3 channels; numbers in [0, 1], or uint8.
    """

    place: int
    label: str
    text: str = ""
    image: Tensor | None = None


class Job(NamedTuple):
    """A model and its data.

    Attributes:
        model: In the state to be explained.
        train: Training instances.
        test: Test instances; empty if there are none.
        show: `show("train" or "test", i, instance) -> Example`.
        loss_fn: As in `SimpleInfluence.from_dataset`.
        collate_fn: As in `SimpleInfluence.from_dataset`.
        predict: `predict(instance) -> label`, if known.
        place: What `Example.place` counts: "line" or "index".
        notes: What the user should know of the data although it can be used.
        solver: Of `SimpleInfluence`, where the user asks for none.
    """

    model: nn.Module
    train: Sequence[Any]
    test: Sequence[Any]
    show: Callable[[str, int, Any], Example]
    loss_fn: OutputLoss | None = None
    collate_fn: CollateFn | None = None
    predict: Callable[[Any], str] | None = None
    place: str = "index"
    notes: tuple[str, ...] = ()
    solver: str = "auto"


class Numbered(Sequence[tuple[int, Any]]):
    """A dataset whose items are `(index, instance)`, so that a ranked instance can be found again.

    Example:
        >>> list(Numbered(["a", "b"]))
        [(0, 'a'), (1, 'b')]
    """

    def __init__(self, instances: Any):
        self._instances = instances

    def __len__(self) -> int:
        return len(self._instances)

    def __getitem__(self, i: Any) -> Any:
        """The item at `i`."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        return i, self._instances[i]


_KEYS = ("model", "train_dataset", "test_dataset", "loss_fn", "collate_fn", "show")


def from_function(name: str) -> Job:
    """The job that a user's function describes.

    Args:
        name: `MODULE:FUNCTION`; the working directory is searched too. The function takes no argument and returns a
            mapping with `model` and `train_dataset`, and if needed `test_dataset`, `loss_fn`, `collate_fn` (all as in
            `SimpleInfluence.from_dataset`) and `show`: instance -> mapping with `label`, `text` or `image`.

    Returns:
        The job.

    Raises:
        InputError: If there is no such function, or what it returns is something else.
    """
    module_name, _, function_name = name.partition(":")
    with _working_directory_on_path():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise
            raise InputError(f"--model {name}: there is no module {module_name!r} here or installed.") from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise InputError(f"--model {name}: {module_name} has no function {function_name!r}.")
        given = function()
    if not isinstance(given, Mapping):
        raise InputError(f"--model {name}: must return a mapping, got {type(given).__name__}.")
    unknown = sorted(set(given) - set(_KEYS))
    if unknown:
        raise InputError(f"--model {name}: returned unknown keys {unknown}; known are {list(_KEYS)}.")
    model, train, test = given.get("model"), given.get("train_dataset"), given.get("test_dataset", ())
    if not isinstance(model, nn.Module):
        raise InputError(f"--model {name}: 'model' must be a torch.nn.Module, got {type(model).__name__}.")
    for key, data in (("train_dataset", train), ("test_dataset", test)):
        if not is_sequence(data):
            raise InputError(f"--model {name}: {key!r} must have a length and indices, got {type(data).__name__}.")
    if not len(train):  # pyright: ignore[reportArgumentType]
        raise InputError(f"--model {name}: 'train_dataset' is empty.")
    show = given.get("show") or _as_it_looks

    def example(role: str, i: int, instance: Any) -> Example:
        shown = show(instance)
        return Example(i, str(shown.get("label", "")), str(shown.get("text", "")), shown.get("image"))

    return Job(model, train, test, example, given.get("loss_fn"), given.get("collate_fn"))  # pyright: ignore[reportArgumentType]


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    """The shell's command does not look for modules in the working directory; `python -m` does."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.remove(str(Path.cwd()))


def _as_it_looks(instance: Any) -> dict[str, Any]:
    """What can be shown of a pair or a mapping without being told."""
    if isinstance(instance, Mapping):
        label = next((instance[key] for key in ("label", "labels", "y") if key in instance), "")
        text = next((value for value in instance.values() if isinstance(value, str)), "")
        return {"label": _plain(label), "text": text}
    if isinstance(instance, (tuple, list)) and len(instance) == 2:
        x, y = instance
        if isinstance(x, Tensor) and _is_image(x):
            return {"label": _plain(y), "image": x}
        return {"label": _plain(y), "text": _plain(x) if isinstance(x, Tensor) else x if isinstance(x, str) else ""}
    return {}


def _is_image(x: Tensor) -> bool:
    """Whether a tensor has an image's shape and range; a matrix of features goes below 0 or above 1 sooner or later."""
    shaped = x.ndim == 2 or (x.ndim == 3 and x.shape[0] in (1, 3))
    if not shaped or min(x.shape[-2:]) < 4:
        return False
    return x.dtype == torch.uint8 or (x.is_floating_point() and float(x.min()) >= 0 and float(x.max()) <= 1)


def _plain(value: Any, most: int = 8) -> str:
    """A value in a few words: `3`, `1.5, 2, ...`."""
    if not isinstance(value, Tensor):
        return str(value)
    numbers = [f"{number:g}" for number in value.flatten()[:most].tolist()]
    return ", ".join(numbers + (["..."] if value.numel() > most else []))


def kept(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the parameters that require grad and begin with a match of one of the patterns (`re.match`).

    Args:
        model: The model.
        patterns: Regular expressions; none keeps all.

    Returns:
        The names, in order.

    Raises:
        InputError: If a pattern is no regular expression, or no name is left.

    Example:
        >>> kept(nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), ["2"])
        ['2.weight', '2.bias']
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    if not patterns:
        return names
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise InputError(f"--params {error.pattern!r}: not a regular expression: {error}.") from error
    found = [name for name in names if any(pattern.match(name) for pattern in compiled)]
    if not found:
        raise InputError(
            f"--params {' '.join(map(repr, patterns))}: no parameter's name begins so. Their names:\n{listed(names)}"
        )
    return found


def freezing_the_rest(model: nn.Module, names: Collection[str]) -> list[str]:
    r"""`params_to_freeze` that leaves the parameters of these names: a pattern for each other's whole name.

    Example:
        >>> freezing_the_rest(nn.Linear(1, 1), ["bias"])
        ['weight\\Z']
    """
    return [re.escape(name) + r"\Z" for name, _ in model.named_parameters() if name not in names]
