"""What the value in a label column says: one class, or a set of classes."""

from __future__ import annotations

import re

import numpy as np

LABEL_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,256}")  # one line that can be printed
NO_LABEL = -100  # what the losses take for a row without a label
Label = str | tuple[str, ...]  # a class's name, or the sorted names of a row that may have several or none


def read_label(value: object, separator: str | None = None) -> Label | None:
    """The name of a class, or with a separator a set of names; None for a row without a label.

    One class: an empty value says nothing. A set: a text is split at the separator, a list holds names as they are, a
    name that comes twice counts once, and an empty value is a row of no class; None alone says nothing.
    Raises ValueError for what is no name.
    """
    if value is None:
        return None
    if separator is None:
        return _name(value) or None
    values = value if isinstance(value, list) else value.split(separator) if isinstance(value, str) else [value]
    return tuple(sorted({_name(item) for item in values} - {""}))


def _name(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{value!r} is not a name")
    name = str(value).strip()
    if name and not LABEL_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name")
    return name


class LabelNumbers:
    """Labels by name as what a shard holds: a class's number, or for sets a byte for each class (1, 0, or -100)."""

    def __init__(self, labels: list[str], *, sets: bool) -> None:
        self._numbers = {label: number for number, label in enumerate(labels)}
        self.classes = len(labels) if sets else None

    def of(self, label: Label | None) -> int | bytes | None:
        """The number or the bytes of a label; of None what says that there is none; None for an unknown name."""
        if self.classes is None:
            return NO_LABEL if label is None else self._numbers.get(str(label))
        if label is None:
            return np.full(self.classes, NO_LABEL, np.int8).tobytes()
        if not all(name in self._numbers for name in label):
            return None
        row_K = np.zeros(self.classes, np.int8)
        row_K[[self._numbers[name] for name in label]] = 1
        return row_K.tobytes()
