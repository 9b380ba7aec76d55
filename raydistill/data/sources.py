"""The user's files as a stream of rows, by the rules for what a row must have; `readers.py` reads each format.

A row that cannot be used is yielded as `Dropped` with the reason, so that the caller counts it; only what makes a whole
file useless (no such column, not Parquet, not UTF-8) is an error. Memory does not grow with the file.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fsspec

from raydistill.data.hub import hub_identity
from raydistill.data.labels import Label, read_label
from raydistill.data.readers import Fields, kind_of, open_file, read_file
from raydistill.errors import UserError, first_line

Reason = Literal[
    "empty text", "null text", "text is not text", "over max_row_bytes", "null label", "label is not a name",
    "malformed", "no token to learn from", "messages are malformed", "the template refuses the messages",
    "no response", "no room for a response", "an empty response", "a text that the tokenizer changes",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """A usable row, and where it stands: the file's number among the split's files, the row's number from 1.

    label is None for a row that the source may leave unlabelled.
    """

    text: str
    label: Label | None
    file: int
    number: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that is not used, and why."""

    reason: Reason
    file: int
    number: int


@dataclass(frozen=True)
class Columns:
    """Which columns to read, and the limits on what is in them.

    Without a label column no row has a label; with keep_unlabelled a row with an empty label is one without. With a
    separator a row's label is a set of names.
    """

    text: str
    label: str | None
    delimiter: str
    max_row_bytes: int
    keep_unlabelled: bool = False
    separator: str | None = None
    settings: tuple[str, str] = ("data.text", "data.label")  # which name the two columns
    delimiter_setting: str = "data.delimiter"

    @property
    def fields(self) -> Fields:
        columns = tuple(
            (s, name) for s, name in zip(self.settings, (self.text, self.label), strict=True) if name is not None
        )
        return Fields(columns, 1, self.delimiter, self.max_row_bytes, delimiter_setting=self.delimiter_setting)


@dataclass(frozen=True)
class Source:
    """The files behind one setting such as data.train, in order, with their sha256."""

    setting: str
    files: tuple[str, ...]
    sha256: tuple[str, ...]

    def identity(self) -> list[str]:
        """What of it determines the rows: contents and order, not paths."""
        return list(self.sha256)


def find_sources(setting: str, locations: tuple[str, ...]) -> Source:
    """The files at several places as one source, in the order of the places, each as `find_source` finds them."""
    found = [find_source(setting, location) for location in locations]
    return Source(setting, tuple(f for s in found for f in s.files), tuple(d for s in found for d in s.sha256))


def find_source(setting: str, location: str) -> Source:
    """The files at a path, glob, URL or hub id, hashed. Raises UserError when there are none or they cannot be read."""
    files = find_files(setting, location)
    if files == [location] and location.startswith("hf://"):
        return Source(setting, (location,), (hub_identity(setting, location),))
    return Source(setting, tuple(files), tuple(_sha256(setting, f) for f in files))


def find_files(setting: str, location: str) -> list[str]:
    """The files at a path, glob, URL or hub id. Raises UserError when there are none, or of an unknown format."""
    if location.startswith("hf://"):
        return [location]
    if "://" in location:
        try:
            files, path = fsspec.core.url_to_fs(location)
            found = sorted(files.glob(path)) if glob.has_magic(path) else [path] if files.exists(path) else []
            found = [str(files.unstrip_protocol(f)) for f in found]
        except Exception as error:  # every kind of store raises its own, for missing credentials among others
            raise UserError(f"{setting}: {location}: cannot be listed ({first_line(error)})") from None
    else:
        is_glob = glob.has_magic(location) and not os.path.exists(location)
        found = sorted(glob.glob(location, recursive=True)) if is_glob else [location]
    if not found:
        raise UserError(f"{setting}: {location}: no file matches. Check the path")
    for path in found:
        kind_of(setting, path)
        if "://" not in path and not os.path.isfile(path):
            raise UserError(f"{setting}: {path}: {_no_file(path)}. Check the path")
    return found


def _no_file(path: str) -> str:
    if os.path.isdir(path):
        return "is a folder; name its files, as in folder/*.csv"
    return "is not a plain file" if os.path.lexists(path) else "no such file"


def _sha256(setting: str, path: str) -> str:
    try:
        with open_file(path) as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            return digest.hexdigest()
    except Exception as error:  # every kind of store raises its own
        raise UserError(f"{setting}: {path}: cannot be read ({first_line(error)})") from None


def read_rows(source: Source, columns: Columns) -> Iterator[Row | Dropped]:
    """Every row of the source in order. Raises UserError for a file that cannot be used at all."""
    for file, number, values in read_values(source, columns.fields):
        yield row_of(values, file, number, columns)


def read_values(source: Source, fields: Fields) -> Iterator[tuple[int, int, tuple[Any, ...] | None]]:
    """(file, row, values of the columns) of every row in order; None for one that is malformed.

    Raises UserError for a file that cannot be used at all.
    """
    for file, path in enumerate(source.files):
        for number, values in enumerate(read_file(source.setting, path, fields), 1):
            yield file, number, values


def row_of(values: tuple[Any, ...] | None, file: int, number: int, columns: Columns) -> Row | Dropped:
    """The rules for single rows, each with its reason."""
    if values is None:
        return Dropped("malformed", file, number)
    text, value = values[0], values[-1]
    if text is None:
        return Dropped("null text", file, number)
    if not isinstance(text, str):
        return Dropped("text is not text", file, number)
    text = text.strip()
    if not text:
        return Dropped("empty text", file, number)
    try:
        if len(text.encode()) > columns.max_row_bytes:
            return Dropped("over max_row_bytes", file, number)
    except UnicodeEncodeError:
        return Dropped("text is not text", file, number)
    if columns.label is None:
        return Row(text, None, file, number)
    try:
        label = read_label(value, columns.separator)
    except ValueError:
        return Dropped("label is not a name", file, number)
    if label is None and not columns.keep_unlabelled:
        return Dropped("null label", file, number)
    return Row(text, label, file, number)
