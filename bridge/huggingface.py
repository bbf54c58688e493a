"""Transformers' sequence classifiers from a local directory, and batches of padded texts.

Knows tokenizers and transformers' conventions; knows nothing of influence. Nothing is ever downloaded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge import files, gauss_newton
from bridge.data import CollateFn
from bridge.files import InputError, Row
from bridge.job import Example, Job

MOST_OUTPUTS = 2**13
"""Up to so many outputs of all training examples, Gauss-Newton influence is the solver that suits: it takes minutes
where the others multiply by all the data for each test example."""

PAD_TO = 8
"""Lengths are padded to multiples of this, so that examples of about one length can be computed together."""


def from_directory(
    directory: Path,
    train: Path,
    test: Path | None,
    *,
    text_column: str,
    label_column: str,
    max_length: int | None = None,
    device: torch.device | None = None,
) -> Job:
    """The job of a fine-tuned sequence classifier and two files of text. All input is checked before the model loads.

    Args:
        directory: As `save_pretrained` writes it, with the tokenizer.
        train: A file for `bridge.files.read`.
        test: Another, or None.
        text_column: See `bridge.files.read`.
        label_column: Labels are names of the model's `label2id`, or its numbers.
        max_length: Tokens a text is cut to; the default is the most that the model takes.
        device: Where to work.

    Returns:
        The job.

    Raises:
        InputError: If a file or the directory cannot be used; the message names file and line.
    """
    paths = {"train": train} if test is None else {"train": train, "test": test}
    rows, problems = {}, []
    for role, path in paths.items():
        try:
            rows[role] = files.read(path, text_column=text_column, label_column=label_column)
        except InputError as error:
            problems.append(str(error))
    if not (directory / "config.json").is_file():
        problems.insert(0, f"{directory}: no config.json, so no model as transformers' `save_pretrained` writes it.")
    if problems:
        raise InputError("\n".join(problems))

    config, tokenizer = _config_and_tokenizer(directory)
    ids = label_ids(config)
    unknown = [files.unknown_labels(paths[role], rows[role], ids) for role in rows]
    if any(unknown):
        raise InputError("\n".join(filter(None, unknown)))
    notes = _unseen(paths, rows, ids)

    model = _classifier(directory).to(device or "cpu").eval()
    most = min(max_length or tokenizer.model_max_length, getattr(config, "max_position_embeddings", 10**9))
    data, cut = {}, 0
    for role, role_rows in rows.items():
        encoded = tokenizer([row.text for row in role_rows], truncation=False, verbose=False)["input_ids"]
        cut += sum(len(tokens) > most for tokens in encoded)
        inputs = tokenizer([row.text for row in role_rows], truncation=True, max_length=most)
        data[role] = [
            {**{key: values[i] for key, values in inputs.items()}, "labels": ids[row.label]}
            for i, row in enumerate(role_rows)
        ]
    if cut:
        notes.append(f"{cut} texts are longer than {most} tokens and were cut.")

    collate_fn = padded(tokenizer)
    names = {number: name for name, number in config.label2id.items()}

    def show(role: str, i: int, instance: Any) -> Example:
        return Example(rows[role][i].line, rows[role][i].label, rows[role][i].text)

    def predict(instance: Any) -> str:
        batch = {key: value.to(model.device) for key, value in collate_fn([instance]).items()}
        with torch.no_grad():
            best = int(model(**batch).logits.argmax())
        known = {row.label for row in rows["train"]}
        name = str(names.get(best, best))
        return str(best) if str(best) in known else name

    outputs = len(data["train"]) * (config.num_labels - 1)
    return Job(
        model,
        data["train"],
        data.get("test", ()),
        show,
        None,
        collate_fn,
        predict,
        "line",
        tuple(notes),
        solver=gauss_newton.NAME if 0 < outputs <= MOST_OUTPUTS else "auto",
    )


def label_ids(config: Any) -> dict[str, int]:
    """The number of each label by its name, and by that number as it is written."""
    return {**{str(i): i for i in range(config.num_labels)}, **{str(k): v for k, v in config.label2id.items()}}


def padded(tokenizer: Any, *, multiple_of: int | None = PAD_TO) -> CollateFn:
    """A `collate_fn` for tokenised texts: mappings of lists or tensors with a `label` or `labels`, as `datasets` has.

    Args:
        tokenizer: Pads, on the side and with the token that the model was trained with.
        multiple_of: Lengths are padded to a multiple of this; None pads to the longest of the batch.

    Returns:
        `collate_fn(instances) -> batch` for `model(**batch)`. Keys that the model does not take, such as the text
        itself, are left out.
    """
    from transformers import DataCollatorWithPadding  # pyright: ignore[reportMissingImports]

    collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple_of)
    taken = {*tokenizer.model_input_names, "label", "labels"}

    def collate_fn(instances: list[Mapping[str, Any]]) -> dict[str, Tensor]:
        return dict(collator([{key: row[key] for key in row if key in taken} for row in instances]))

    return collate_fn


def _config_and_tokenizer(directory: Path) -> tuple[Any, Any]:
    import transformers  # pyright: ignore[reportMissingImports]

    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{directory}: transformers cannot load the configuration or tokenizer: {error}") from error
    if tokenizer.pad_token is None:
        raise InputError(f"{directory}: the tokenizer has no padding token, so texts cannot be batched.")
    return config, tokenizer


def _classifier(directory: Path) -> Any:
    import transformers  # pyright: ignore[reportMissingImports]

    try:
        model, loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
            directory, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{directory}: transformers cannot load a sequence classifier: {error}") from error
    absent = sorted(loaded["missing_keys"])
    if absent:
        raise InputError(
            f"{directory}: the checkpoint lacks {', '.join(absent[:6])}, which transformers has filled with random "
            "numbers. Fine-tune the model as a sequence classifier and save it; influence on random numbers means "
            "nothing."
        )
    return model


def _unseen(paths: Mapping[str, Path], rows: Mapping[str, list[Row]], ids: Mapping[str, int]) -> list[str]:
    """A note on the test rows whose label no training row has."""
    seen = {ids[row.label] for row in rows["train"]}
    unseen = [row for row in rows.get("test", []) if ids[row.label] not in seen]
    problems = [
        f"{paths['test']}, line {row.line}: the label {row.label!r} is in no row of {paths['train']}." for row in unseen
    ]
    return [files.listed(problems)] if problems else []
