"""Makes AllenNLP 2.10.1 importable beside a new torch: empty stand-ins for what it imports and does not need here.

It pins a torch of 2022 and imports a dozen packages that influence functions never touch. Installed with
`pip install --no-deps allennlp==2.10.1`, it runs once these names can be imported.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import warnings

import pytest

NOT_NEEDED = (
    "torchvision", "transformers", "spacy", "fairscale", "cached_path", "lmdb", "h5py", "nltk", "sklearn", "scipy",
    "tensorboardX", "huggingface_hub", "termcolor", "base58", "dill", "more_itertools", "requests",
)  # fmt: skip

TOO_NEW = ("transformers", "huggingface_hub", "torchvision")
"""Where these are there, they lack what AllenNLP imports from them."""


class _Anything(types.ModuleType):
    """A module whose every attribute is an empty class, made when it is asked for."""

    __path__: tuple[str, ...] = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda self, *args, **kwargs: None})
        setattr(self, name, made)
        return made


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, packages):
        self.packages = packages

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Anything(spec.name)

    def exec_module(self, module):
        if module.__name__.startswith("cached_path"):  # used on local files alone
            module.cached_path = lambda path, **kwargs: path
            module.FileLock = lambda path, **kwargs: contextlib.nullcontext()


def import_allennlp():
    """The package `allennlp`, or a skipped test that says why not."""
    if "allennlp" in sys.modules:
        return sys.modules["allennlp"]
    if importlib.util.find_spec("allennlp") is None:
        pytest.skip("AllenNLP is not installed (pip install --no-deps allennlp==2.10.1)", allow_module_level=True)
    replaced = {name for name in NOT_NEEDED if name in TOO_NEW or importlib.util.find_spec(name) is None}
    real = {name: module for name, module in sys.modules.items() if name.split(".")[0] in replaced}
    for name in real:
        del sys.modules[name]
    finder = _StandIns(replaced)
    sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in ("data", "data.data_loaders", "models", "interpret.influence_interpreters", "common"):
                importlib.import_module(f"allennlp.{name}")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in replaced]:
            del sys.modules[name]
        sys.modules.update(real)
    return sys.modules["allennlp"]
