"""Interpreters of models that AllenNLP archived. AllenNLP is imported when an archive is loaded, and only then.

Knows what an archive holds; knows nothing of influence.
"""

from pathlib import Path
from typing import Any

from bridge.data import Lazy, LazyLoader, SimpleDataLoader
from bridge.registry import Registrable


class FromArchive(Registrable):
    """A registry of interpreters that can be made from an archive: its model, its readers, its training data."""

    @classmethod
    def from_path(
        cls,
        archive_path: str | Path,
        *,
        interpreter_name: str | None = None,
        train_data_path: Any = None,
        train_data_loader: LazyLoader = Lazy(SimpleDataLoader.from_dataset_reader),  # noqa: B008
        test_data_loader: LazyLoader = Lazy(SimpleDataLoader.from_dataset_reader),  # noqa: B008
        params_to_freeze: list[str] | None = None,
        cuda_device: int = -1,
        import_plugins: bool = True,
        overrides: str | dict[str, Any] = "",
        **extras: Any,
    ) -> Any:
        """The interpreter of a model archived by AllenNLP, which must be installed.

        Args:
            archive_path: The archive.
            interpreter_name: A registered name; the default is `default_implementation`.
            train_data_path: The default is the archive's own.
            train_data_loader: See the class.
            test_data_loader: See the class.
            params_to_freeze: See the class.
            cuda_device: See the class.
            import_plugins: Whether to import AllenNLP's plugins first.
            overrides: For the archive's configuration.
            **extras: More arguments of the interpreter.

        Returns:
            The interpreter.
        """
        from allennlp.common import plugins  # pyright: ignore[reportMissingImports]
        from allennlp.models import load_archive  # pyright: ignore[reportMissingImports]

        if import_plugins:
            plugins.import_plugins()
        return cls.from_archive(
            load_archive(archive_path, cuda_device=cuda_device, overrides=overrides),
            interpreter_name=interpreter_name,
            train_data_path=train_data_path,
            train_data_loader=train_data_loader,
            test_data_loader=test_data_loader,
            params_to_freeze=params_to_freeze,
            cuda_device=cuda_device,
            **extras,
        )

    @classmethod
    def from_archive(
        cls,
        archive: Any,
        *,
        interpreter_name: str | None = None,
        train_data_path: Any = None,
        train_data_loader: LazyLoader = Lazy(SimpleDataLoader.from_dataset_reader),  # noqa: B008
        test_data_loader: LazyLoader = Lazy(SimpleDataLoader.from_dataset_reader),  # noqa: B008
        params_to_freeze: list[str] | None = None,
        cuda_device: int = -1,
        **extras: Any,
    ) -> Any:
        """The interpreter of an AllenNLP `Archive` that is already loaded; see `from_path`."""
        interpreter = cls.by_name(interpreter_name or cls.default_implementation)
        return interpreter(
            model=archive.model,
            train_data_path=train_data_path or archive.config["train_data_path"],
            train_dataset_reader=archive.dataset_reader,
            test_dataset_reader=archive.validation_dataset_reader,
            train_data_loader=train_data_loader,
            test_data_loader=test_data_loader,
            params_to_freeze=params_to_freeze,
            cuda_device=cuda_device,
            **extras,
        )
