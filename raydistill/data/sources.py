"""The user's files as a stream of rows: CSV, JSONL, Parquet and plain texts (as they are, .gz or .zst; one file or a
glob) and hub data sets.

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
from typing import IO, Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.data.hub import hub_identity, hub_rows
from raydistill.data.labels import Label, read_label
from raydistill.errors import UserError, first_line

Reason = Literal[
    "empty text", "null text", "text is not text", "over max_row_bytes", "null label", "label is not a name",
    "malformed", "no token to learn from", "messages are malformed", "the template refuses the messages",
    "no response", "no room for a response", "an empty response",
]  # fmt: skip
PARQUET_BATCH_ROWS = 1024
TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view())
LINE_CHARACTERS = 1 << 24  # what is read of a longer line; the rest is skipped, so that memory stays flat


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
class Fields:
    """The columns to read, each with the setting that names it; the first `texts` of them hold texts.

    txt: what a .txt file's texts are, where they are all that is read. Of an `optional` column
    that is not there all values are None.
    """

    columns: tuple[tuple[str, str], ...]
    texts: int
    delimiter: str
    max_row_bytes: int
    txt: Literal["file", "block"] | None = None
    optional: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.columns]

    @property
    def settings(self) -> str:
        return ", ".join(setting for setting, _ in self.columns)


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

    @property
    def fields(self) -> Fields:
        columns = tuple(
            (s, name) for s, name in zip(self.settings, (self.text, self.label), strict=True) if name is not None
        )
        return Fields(columns, 1, self.delimiter, self.max_row_bytes)


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
    if location.startswith("hf://"):
        return Source(setting, (location,), (hub_identity(setting, location),))
    files = _expand(setting, location)
    return Source(setting, tuple(files), tuple(_sha256(setting, f) for f in files))


def _expand(setting: str, location: str) -> list[str]:
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


def kind_of(setting: str, path: str) -> str:
    """csv, tsv, jsonl, parquet or txt, by the name's ending. Raises UserError for any other."""
    if path.startswith("hf://"):
        return "hub"
    name = path.lower().removesuffix(".gz").removesuffix(".zst")
    for ending, kind in {
        ".csv": "csv",
        ".tsv": "tsv",
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".parquet": "parquet",
        ".txt": "txt",
    }.items():
        if name.endswith(ending):
            return kind
    raise UserError(
        f"{setting}: {path}: the ending says no known format. Use .csv, .tsv, .jsonl or .parquet;"
        " .txt for texts of language models"
    )


def _sha256(setting: str, path: str) -> str:
    try:
        with _open(path) as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
            return digest.hexdigest()
    except Exception as error:  # every kind of store raises its own
        raise UserError(f"{setting}: {path}: cannot be read ({first_line(error)})") from None


def read_rows(source: Source, columns: Columns) -> Iterator[Row | Dropped]:
    """Every row of the source in order. Raises UserError for a file that cannot be used at all."""
    for file, number, values in read_values(source, columns.fields):
        yield _row(values, file, number, columns)


def read_values(source: Source, fields: Fields) -> Iterator[tuple[int, int, tuple[Any, ...] | None]]:
    """(file, row, values of the columns) of every row in order; None for one that is malformed.

    Raises UserError for a file that cannot be used at all.
    """
    readers: dict[str, Callable[[str, str, Fields], Iterator[tuple[Any, ...] | None]]] = {
        "csv": _read_csv, "tsv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet, "txt": _read_txt,
        "hub": _read_hub,
    }  # fmt: skip
    for file, path in enumerate(source.files):
        try:
            for number, values in enumerate(readers[kind_of(source.setting, path)](source.setting, path, fields), 1):
                yield file, number, values
        except UnicodeDecodeError as error:
            raise UserError(f"{source.setting}: {path}: is not UTF-8 ({error.reason}). Save it as UTF-8") from None
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{source.setting}: {path}: cannot be read ({first_line(error)}). Check the file") from None


def _row(values: tuple[Any, ...] | None, file: int, number: int, columns: Columns) -> Row | Dropped:
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


def _read_csv(setting: str, path: str, fields: Fields) -> Iterator[tuple[Any, ...] | None]:
    delimiter = "\t" if kind_of(setting, path) == "tsv" else fields.delimiter
    csv.field_size_limit(max(fields.max_row_bytes * 4, 1 << 17))
    with _open_text(path) as file:
        reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
        except csv.Error as error:
            raise UserError(f"{setting}: {path}: the header is not CSV ({error}). Check the file") from None
        if not header:
            like = ",".join(fields.names)
            raise UserError(f"{setting}: {path}: begins with no header. Its first line must be like {like}")
        _check_columns(setting, path, header, fields)
        places = [header.index(name) if name in header else None for name in fields.names]
        while True:
            line = reader.line_num
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                # A quote that is not closed swallows the lines up to the next one: every one of them is lost.
                yield from [None] * (reader.line_num - line)
                continue
            if cells:
                is_whole = len(cells) == len(header)
                yield tuple(None if place is None else cells[place] for place in places) if is_whole else None


def _check_columns(setting: str, path: str, names: list[str], fields: Fields) -> None:
    """Raises UserError when a column that is asked for is not there, or there twice."""
    for name in fields.names:
        if names.count(name) > 1:
            raise UserError(f"{setting}: {path}: has {names.count(name)} columns named {name!r}. Rename all but one")
        if name not in names and name not in fields.optional:
            listed = ", ".join(repr(n[:40]) for n in names[:12]) or "none"
            remedy = f"Set {fields.settings} or data.delimiter"
            raise UserError(f"{setting}: {path}: has no column {name!r}, it has {listed}. {remedy}")


def _read_jsonl(setting: str, path: str, fields: Fields) -> Iterator[tuple[Any, ...] | None]:
    is_first = True
    with _open_text(path) as file:
        for line in _lines(file):
            if not line.strip():
                continue
            if is_first and line.lstrip().startswith("["):
                raise UserError(f"{setting}: {path}: is a JSON array. Write one object a line (JSON lines)")
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if is_first and isinstance(value, dict):
                _check_columns(setting, path, list(value), fields)
            is_first = False
            yield tuple(value.get(name) for name in fields.names) if isinstance(value, dict) else None


def _read_parquet(setting: str, path: str, fields: Fields) -> Iterator[tuple[Any, ...] | None]:
    with _open(path) as file, pq.ParquetFile(file) as parquet:
        schema = parquet.schema_arrow
        _check_columns(setting, path, schema.names, fields)
        there = [(named_by, name) for named_by, name in fields.columns if name in schema.names]
        for named_by, name in there[: fields.texts]:
            kind = schema.field(name).type
            plain = kind.value_type if pa.types.is_dictionary(kind) else kind
            if plain not in TEXT_TYPES and not (name in fields.optional and pa.types.is_null(kind)):
                what = f"column {name!r} holds {kind}, expected text"
                raise UserError(f"{setting}: {path}: {what}. Set {named_by}")
        names = [name for _, name in there]
        for batch in parquet.iter_batches(PARQUET_BATCH_ROWS, columns=names, use_threads=False):
            held = {name: batch.column(name).to_pylist() for name in names}
            missing = [None] * len(batch)
            yield from zip(*(held.get(name, missing) for name in fields.names), strict=True)


def _read_txt(setting: str, path: str, fields: Fields) -> Iterator[tuple[Any, ...] | None]:
    """The file's one text, or one for each block of lines between blank ones; no more of it than makes it too long."""
    if fields.txt is None:
        raise UserError(
            f"{setting}: {path}: a .txt file has texts and no columns, and {fields.settings} are asked for. Use .csv,"
            " .tsv, .jsonl or .parquet"
        )
    enough = fields.max_row_bytes + 1
    with _open_text(path) as file:
        if fields.txt == "file":
            yield (file.read(enough),)
            return
        held = ""
        while line := file.readline(enough):
            if line.strip():
                held += line[: enough - len(held)]
            elif held:
                yield (held.rstrip("\r\n"),)
                held = ""
        if held:
            yield (held.rstrip("\r\n"),)


def _read_hub(setting: str, path: str, fields: Fields) -> Iterator[tuple[Any, ...] | None]:
    for index, row in enumerate(hub_rows(setting, path)):
        if index == 0:
            _check_columns(setting, path, list(row), fields)
        yield tuple(row.get(name) for name in fields.names)


def _open(path: str) -> IO[bytes]:
    # A plain path may hold ::, which fsspec takes for a chain of stores.
    return fsspec.open(path, "rb").open() if "://" in path else open(path, "rb")  # type: ignore[return-value]


def _open_text(path: str) -> io.TextIOWrapper:
    codec = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(path.lower())[1])
    file = _open(path)
    # Arrow's codecs: zstd comes with it, and what is wrong with a compressed file is always an OSError.
    return io.TextIOWrapper(pa.CompressedInputStream(file, codec) if codec else file, "utf-8-sig", newline="")


def _lines(file: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a file, long ones cut."""
    while line := file.readline(LINE_CHARACTERS):
        rest = line
        while rest and not rest.endswith(("\n", "\r")):
            rest = file.readline(LINE_CHARACTERS)
        yield line
