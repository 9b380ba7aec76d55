"""The user's files as a stream of rows: CSV, JSONL, Parquet (plain, .gz or .zst; one file or a glob) and hub data sets.

A row that cannot be used is yielded as `Dropped` with the reason, so that the caller counts it; only what makes a whole
file useless (no such column, not Parquet, not UTF-8) is an error. Memory does not grow with the file.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.errors import UserError

Reason = Literal[
    "empty text", "null text", "text is not text", "over max_row_bytes", "null label", "label is not a name",
    "malformed",
]  # fmt: skip
PARQUET_BATCH_ROWS = 1024
TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view())


@dataclass(frozen=True, slots=True)
class Row:
    """A usable row, and where it stands: the file's number among the split's files, the row's number from 1."""

    text: str
    label: str
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
    """Which columns to read, and the limits on what is in them."""

    text: str
    label: str
    delimiter: str
    max_row_bytes: int


@dataclass(frozen=True)
class Source:
    """The files behind one setting such as data.train, in order, with their sha256."""

    setting: str
    files: tuple[str, ...]
    sha256: tuple[str, ...]

    def identity(self) -> list[str]:
        """What of it determines the rows: contents and order, not paths."""
        return list(self.sha256)


def find_source(setting: str, location: str) -> Source:
    """The files at a path, glob, URL or hub id, hashed. Raises UserError when there are none or they cannot be read."""
    if location.startswith("hf://"):
        return Source(setting, (location,), (_hub_identity(setting, location),))
    files = _expand(setting, location)
    return Source(setting, tuple(files), tuple(_sha256(setting, f) for f in files))


def _expand(setting: str, location: str) -> list[str]:
    if "://" in location:
        try:
            files, path = fsspec.core.url_to_fs(location)
            found = sorted(files.glob(path)) if glob.has_magic(path) else [path] if files.exists(path) else []
            found = [str(files.unstrip_protocol(f)) for f in found]
        except (ImportError, ValueError, OSError) as error:
            raise UserError(f"{setting}: {location}: cannot be listed ({_first_line(error)})") from None
    else:
        found = sorted(glob.glob(location, recursive=True)) if glob.has_magic(location) else [location]
    if not found:
        raise UserError(f"{setting}: {location}: no file matches. Check the path")
    for path in found:
        kind_of(setting, path)
        if "://" not in path and not os.path.isfile(path):
            what = "is a folder; name its files, as in folder/*.csv" if os.path.isdir(path) else "no such file"
            raise UserError(f"{setting}: {path}: {what}. Check the path")
    return found


def kind_of(setting: str, path: str) -> str:
    """csv, tsv, jsonl or parquet, by the name's ending. Raises UserError for any other."""
    if path.startswith("hf://"):
        return "hub"
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    for ending, kind in {
        ".csv": "csv",
        ".tsv": "tsv",
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".parquet": "parquet",
    }.items():
        if name.endswith(ending):
            return kind
    raise UserError(f"{setting}: {path}: the ending says no known format. Use .csv, .tsv, .jsonl or .parquet")


def _sha256(setting: str, path: str) -> str:
    try:
        with fsspec.open(path, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):  # type: ignore[union-attr]
                digest.update(chunk)
            return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{setting}: {path}: cannot be read ({_first_line(error)})") from None


def read_rows(source: Source, columns: Columns) -> Iterator[Row | Dropped]:
    """Every row of the source in order. Raises UserError for a file that cannot be used at all."""
    readers: dict[str, Callable[[str, str, Columns], Iterator[tuple[Any, Any] | None]]] = {
        "csv": _read_csv, "tsv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet, "hub": _read_hub,
    }  # fmt: skip
    for number, path in enumerate(source.files):
        try:
            for index, values in enumerate(readers[kind_of(source.setting, path)](source.setting, path, columns), 1):
                yield _row(values, number, index, columns.max_row_bytes)
        except UnicodeDecodeError as error:
            raise UserError(f"{source.setting}: {path}: is not UTF-8 ({error.reason}). Save it as UTF-8") from None
        except (OSError, EOFError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{source.setting}: {path}: cannot be read ({_first_line(error)}). Check the file"
            ) from None


def _row(values: tuple[Any, Any] | None, file: int, number: int, max_row_bytes: int) -> Row | Dropped:
    """The rules for single rows, each with its reason."""
    if values is None:
        return Dropped("malformed", file, number)
    text, label = values
    if text is None:
        return Dropped("null text", file, number)
    if not isinstance(text, str):
        return Dropped("text is not text", file, number)
    text = text.strip()
    if not text:
        return Dropped("empty text", file, number)
    try:
        if len(text.encode()) > max_row_bytes:
            return Dropped("over max_row_bytes", file, number)
    except UnicodeEncodeError:
        return Dropped("text is not text", file, number)
    if label is None or label == "":
        return Dropped("null label", file, number)
    if isinstance(label, bool) or not isinstance(label, str | int):
        return Dropped("label is not a name", file, number)
    label = str(label).strip()
    return Row(text, label, file, number) if label else Dropped("null label", file, number)


def _read_csv(setting: str, path: str, columns: Columns) -> Iterator[tuple[Any, Any] | None]:
    delimiter = "\t" if kind_of(setting, path) == "tsv" else columns.delimiter
    csv.field_size_limit(max(columns.max_row_bytes * 4, 1 << 17))
    with _open_text(path) as file:
        reader = csv.reader(file, delimiter=delimiter)
        header = next(reader, None)
        if header is None:
            raise UserError(
                f"{setting}: {path}: the file is empty. It needs a header with {columns.text},{columns.label}"
            )
        text, label = (_position(setting, path, header, name) for name in (columns.text, columns.label))
        rows = iter(reader)
        while True:
            try:
                fields = next(rows)
            except StopIteration:
                return
            except csv.Error:
                yield None
                continue
            if fields:
                yield (fields[text], fields[label]) if len(fields) == len(header) else None


def _position(setting: str, path: str, header: list[str], name: str) -> int:
    names = [h.strip() for h in header]
    if name in names:
        return names.index(name)
    raise _no_column(setting, path, names, name)


def _no_column(setting: str, path: str, names: list[str], name: str) -> UserError:
    listed = ", ".join(n[:40] for n in names[:12])
    return UserError(
        f"{setting}: {path}: has no column {name!r}, it has {listed}. Set data.text, data.label or data.delimiter"
    )


def _read_jsonl(setting: str, path: str, columns: Columns) -> Iterator[tuple[Any, Any] | None]:
    found_text = False
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                if number == 1 and line.lstrip().startswith("["):
                    raise UserError(
                        f"{setting}: {path}: is a JSON array. Write one object a line (JSON lines)"
                    ) from None
                yield None
                continue
            if isinstance(value, list) and number == 1:
                raise UserError(f"{setting}: {path}: is a JSON array. Write one object a line (JSON lines)")
            if not isinstance(value, dict):
                yield None
                continue
            if not found_text and (columns.text not in value or columns.label not in value):
                missing = columns.text if columns.text not in value else columns.label
                raise _no_column(setting, path, list(value), missing)
            found_text = True
            yield value.get(columns.text), value.get(columns.label)


def _read_parquet(setting: str, path: str, columns: Columns) -> Iterator[tuple[Any, Any] | None]:
    with fsspec.open(path, "rb") as file, pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        for name in (columns.text, columns.label):
            if name not in schema.names:
                raise _no_column(setting, path, schema.names, name)
        kind = schema.field(columns.text).type
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if plain not in TEXT_TYPES:
            raise UserError(f"{setting}: {path}: column {columns.text!r} holds {kind}, expected text. Set data.text")
        for batch in parquet.iter_batches(PARQUET_BATCH_ROWS, columns=[columns.text, columns.label], use_threads=False):
            yield from zip(batch.column(columns.text).to_pylist(), batch.column(columns.label).to_pylist(), strict=True)


def _hub(setting: str, location: str) -> Any:
    """A hub data set as a stream: hf://owner/name[:configuration][@split] or hf:///a/local/folder."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{setting}: {location}: needs the package datasets. Run pip install 'raydistill[hf]'"
        ) from None
    name, _, split = location.removeprefix("hf://").partition("@")
    name, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(
            name, configuration or None, split=split or _default_split(setting), streaming=True
        )
    except Exception as error:  # datasets raises many kinds, from network errors to its own
        raise UserError(f"{setting}: {location}: cannot be loaded ({_first_line(error)})") from None


def _default_split(setting: str) -> str:
    return setting.rpartition(".")[2]


def _hub_identity(setting: str, location: str) -> str:
    """The sha256 over the rows themselves: a hub data set has no one file to hash."""
    digest = hashlib.sha256()
    for row in _hub(setting, location):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _read_hub(setting: str, path: str, columns: Columns) -> Iterator[tuple[Any, Any] | None]:
    stream = _hub(setting, path)
    features = stream.features or {}
    names = getattr(features.get(columns.label), "names", None)
    for index, row in enumerate(stream):
        if index == 0:
            for name in (columns.text, columns.label):
                if name not in row:
                    raise _no_column(setting, path, list(row), name)
        label = row[columns.label]
        if names is not None and isinstance(label, int) and 0 <= label < len(names):
            label = names[label]
        yield row[columns.text], label


def _open_text(path: str) -> io.TextIOBase:
    return fsspec.open(path, "rt", encoding="utf-8-sig", newline="", compression="infer").open()  # type: ignore[return-value]


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]
