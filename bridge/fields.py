"""AllenNLP's fields as tensors, those of many instances at once: one by one takes longer than a small model does.

Knows AllenNLP's own fields and indexers, by the modules that hold their ways to become tensors; they are not imported.
What has a way of its own goes that way. Knows nothing of instances.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch


def tensors(column: Sequence[Any], lengths: dict[str, int]) -> list[Any]:
    """`[field.as_tensor(lengths) for field in column]`.

    Args:
        column: Fields of one type, at least one.
        lengths: The longest of each of their padding lengths.

    Returns:
        What goes into the fields' `batch_tensors`. A tensor may be the field's own.
    """
    at_once = _AT_ONCE.get(type(column[0]).as_tensor.__module__)
    found = None if at_once is None else at_once(column, lengths)
    return [field.as_tensor(lengths) for field in column] if found is None else found


def _of_arrays(column: Sequence[Any], lengths: dict[str, int]) -> list[Any] | None:
    """None if any is padded: by nothing too, that takes long."""
    unpadded = tuple(lengths.values())
    return [field.tensor for field in column] if all(field.tensor.shape == unpadded for field in column) else None


def _of_labels(column: Sequence[Any], lengths: dict[str, int]) -> list[Any]:
    return [*torch.tensor([field._label_id for field in column], dtype=torch.long)]


def _of_texts(column: Sequence[Any], lengths: dict[str, int]) -> list[Any] | None:
    """None if the indexers differ, or are not all of those that make lists of numbers and pad them with 0."""
    indexers = column[0].token_indexers
    if any(type(each).as_padded_tensor_dict.__module__ != _PADS_WITH_0 for each in indexers.values()):
        return None
    if any(field.token_indexers is not indexers for field in column):
        return None
    found: list[dict[str, dict[str, Any]]] = [{name: {} for name in indexers} for _ in column]
    for name in indexers:
        for key in column[0]._indexed_tokens[name]:
            texts, length = [field._indexed_tokens[name][key] for field in column], lengths[f"{name}___{key}"]
            if any(isinstance(text[0], bool) for text in texts if text):
                return None
            rows = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts], dtype=torch.long)
            for of_field, row in zip(found, rows, strict=True):
                of_field[name][key] = row
    return found


_PADS_WITH_0 = "allennlp.data.token_indexers.token_indexer"

_AT_ONCE: dict[str, Callable[[Sequence[Any], dict[str, int]], list[Any] | None]] = {
    "allennlp.data.fields.tensor_field": _of_arrays,
    "allennlp.data.fields.label_field": _of_labels,
    "allennlp.data.fields.text_field": _of_texts,
}
