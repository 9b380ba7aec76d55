"""The formats of the user's files, value by value: CSV, TSV, JSONL, Parquet and plain texts (as they are, .gz or .zst),
and hub data sets.

Memory does not grow with the file.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.data.hub import hub_rows
from raydistill.errors import UserError, first_line

PARQUET_BATCH_ROWS = 1024
TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view())
LINE_CHARACTERS = 1 << 24  # what is read of a longer line; the rest is skipped, so that memory stays flat


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
    delimiter_setting: str = "data.delimiter"

    @property
    def names(self) -> list[str]:
        return [name for _, name in self.columns]

    @property
    def settings(self) -> str:
        return ", ".join(setting for setting, _ in self.columns)


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


def read_file(setting: str, path: str, fields: Fields) -> Iterator[tuple[Any, ...] | None]:
    """The values of the columns in every row, in order; None for a row that is malformed.

    Raises UserError for a file that cannot be used at all.
    """
    readers: dict[str, Callable[[str, str, Fields], Iterator[tuple[Any, ...] | None]]] = {
        "csv": _read_csv, "tsv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet, "txt": _read_txt,
        "hub": _read_hub,
    }  # fmt: skip
    with telling(setting, path):
        yield from readers[kind_of(setting, path)](setting, path, fields)


@contextlib.contextmanager
def telling(setting: str, path: str) -> Iterator[None]:
    """Says of a file that cannot be read which it is, and why, as a UserError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{setting}: {path}: is not UTF-8 ({error.reason}). Save it as UTF-8") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{setting}: {path}: cannot be read ({first_line(error)}). Check the file") from None


def _read_csv(setting: str, path: str, fields: Fields) -> Iterator[tuple[Any, ...] | None]:
    delimiter = "\t" if kind_of(setting, path) == "tsv" else fields.delimiter
    csv.field_size_limit(max(fields.max_row_bytes * 4, 1 << 17))
    with open_text(path) as file:
        reader = csv.reader(lines_of(file), delimiter=delimiter, strict=True)
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
            remedy = f"Set {fields.settings} or {fields.delimiter_setting}"
            raise UserError(f"{setting}: {path}: has no column {name!r}, it has {listed}. {remedy}")


def _read_jsonl(setting: str, path: str, fields: Fields) -> Iterator[tuple[Any, ...] | None]:
    is_first = True
    with open_text(path) as file:
        for line in lines_of(file):
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
    with open_file(path) as file, pq.ParquetFile(file) as parquet:
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
    with open_text(path) as file:
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


def open_file(path: str) -> IO[bytes]:
    """A file or the object at a URL."""
    # A plain path may hold ::, which fsspec takes for a chain of stores.
    return fsspec.open(path, "rb").open() if "://" in path else open(path, "rb")  # type: ignore[return-value]


def open_text(path: str) -> io.TextIOWrapper:
    """A file as text, unpacked where its name says that it is packed."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(os.path.splitext(path.lower())[1])
    file = open_file(path)
    # Arrow's codecs: zstd comes with it, and what is wrong with a compressed file is always an OSError.
    return io.TextIOWrapper(pa.CompressedInputStream(file, codec) if codec else file, "utf-8-sig", newline="")


def lines_of(file: io.TextIOWrapper) -> Iterator[str]:
    """The lines of a file, long ones cut."""
    while line := file.readline(LINE_CHARACTERS):
        rest = line
        while rest and not rest.endswith(("\n", "\r")):
            rest = file.readline(LINE_CHARACTERS)
        yield line
