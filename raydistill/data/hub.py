"""Data sets of the Hugging Face hub as a stream of rows: hf://owner/name[:configuration][@split] or hf:///a/folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from raydistill.errors import UserError, first_line


def hub_rows(setting: str, location: str) -> Iterator[dict[str, Any]]:
    """The rows in order, classes by their names. Raises UserError when the data set cannot be loaded or read."""
    stream = _stream(setting, location)
    names = {column: _names(feature) for column, feature in (stream.features or {}).items()}
    for row in _streamed(setting, location, stream):
        yield {column: _named(value, names.get(column)) for column, value in row.items()}


def hub_identity(setting: str, location: str) -> str:
    """The sha256 over the rows themselves: a hub data set has no one file to hash."""
    digest = hashlib.sha256()
    for row in _streamed(setting, location, _stream(setting, location)):
        digest.update(json.dumps(row, sort_keys=True, default=_as_bytes).encode() + b"\n")
    return digest.hexdigest()


def _stream(setting: str, location: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{setting}: {location}: needs the package datasets. Run pip install 'raydistill[hf]'"
        ) from None
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises too
    name, _, split = location.removeprefix("hf://").partition("@")
    name, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(
            name, configuration or None, split=split or setting.rpartition(".")[2], streaming=True
        )
    except Exception as error:  # datasets raises many kinds, from network errors to its own
        raise UserError(f"{setting}: {location}: cannot be loaded ({first_line(error)})") from None


def _streamed(setting: str, location: str, stream: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from stream
    except Exception as error:  # as above
        raise UserError(f"{setting}: {location}: cannot be read ({first_line(error)})") from None


def _names(feature: Any) -> list[str] | None:
    """The names of a column of classes, or of lists of classes."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _named(value: Any, names: list[str] | None) -> Any:
    if isinstance(value, list):
        return [_named(item, names) for item in value]
    return names[value] if names is not None and isinstance(value, int) and 0 <= value < len(names) else value


def _as_bytes(value: Any) -> str:
    """What JSON does not have (dates, bytes, decoded pictures) by its bytes; one that has none by its text."""
    data = value if isinstance(value, bytes) else value.tobytes() if hasattr(value, "tobytes") else str(value).encode()
    return hashlib.sha256(data).hexdigest()
