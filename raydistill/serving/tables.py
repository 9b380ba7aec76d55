"""Texts in, from a file or standard input, and answers out as CSV or JSON lines, a row for a row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, Protocol

from raydistill.data.readers import lines_of, open_text, telling
from raydistill.data.sources import Columns, Dropped, Row, Source, find_files, read_rows, row_of
from raydistill.errors import UserError
from raydistill.serving.served import Served

FILE = "FILE"
STDIN = "-"
FORMATS = ("csv", "jsonl")


def texts_in(location: str, columns: Columns, stdin: IO[bytes]) -> Iterator[Row | Dropped]:
    """The rows of one file, or the lines of a .txt file or of standard input (`-`).

    Raises UserError for a file that is not there or cannot be used.
    """
    if location == STDIN:
        text = io.TextIOWrapper(stdin, "utf-8-sig", newline="")
        try:
            with telling(FILE, "standard input"):
                yield from _lines(text, columns)
        finally:
            text.detach()  # it is not ours to close
    elif _is_lines(location):
        for path in find_files(FILE, location):
            with telling(FILE, path), open_text(path) as file:
                yield from _lines(file, columns)
    else:
        yield from read_rows(Source(FILE, tuple(find_files(FILE, location)), ()), columns)


def _is_lines(location: str) -> bool:
    return location.lower().removesuffix(".gz").removesuffix(".zst").endswith(".txt")


def _lines(file: io.TextIOWrapper, columns: Columns) -> Iterator[Row | Dropped]:
    for number, line in enumerate(lines_of(file), 1):
        yield row_of((line,), 0, number, columns)


class Answers(Protocol):
    """Writes a record for a row."""

    def write(self, number: int, text: str | None, record: dict[str, Any]) -> None:
        """The row's number from 1, its text where it is to stand in the output, and its answer or {"problem"}."""
        ...


class JsonLines:
    """One object a line."""

    def __init__(self, file: IO[str], *_: Any) -> None:
        self._file = file

    def write(self, number: int, text: str | None, record: dict[str, Any]) -> None:
        line = {"row": number} | ({} if text is None else {"text": text}) | record
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")


class CsvTable:
    """A table with the same columns in every row; several labels of a row are joined by `|`."""

    def __init__(self, file: IO[str], served: Served, top: int, all_classes: bool, with_text: bool) -> None:
        self._with_text, self._served, self._top, self._all = with_text, served, top, all_classes
        own = ["completion", "cut"] if served.task == "causal_lm" else ["label", "probability"]
        ranks = [f"{name}_{rank}" for rank in range(1, top + 1) for name in ("label", "probability")]
        classes = [f"p:{label}" for label in served.labels] if all_classes else []
        self._width = len(own) + len(ranks) + len(classes)
        self._writer = csv.writer(file, lineterminator="\n")
        self._writer.writerow(["row", *(["text"] if with_text else []), *own, *ranks, *classes, "problem"])

    def write(self, number: int, text: str | None, record: dict[str, Any]) -> None:
        problem = record.get("problem", "")
        cells = [""] * self._width if problem else self._cells(record)
        self._writer.writerow([number, *([text or ""] if self._with_text else []), *cells, problem])

    def _cells(self, record: dict[str, Any]) -> list[Any]:
        if self._served.task == "causal_lm":
            return [record["completion"], "true" if record.get("cut") else ""]
        chosen = record["labels"] if self._served.task == "multi_label" else [record]
        cells: list[Any] = [
            "|".join(one["label"] for one in chosen),
            "|".join(str(one["probability"]) for one in chosen),
        ]
        ranked = record.get("top", [])
        cells += [one[key] for one in ranked for key in ("label", "probability")]
        cells += [""] * (2 * (self._top - len(ranked)))  # more were asked for than there are classes
        return cells + list(record["all"].values()) if self._all else cells


def in_chunks(
    rows: Iterator[Row | Dropped], answer: Callable[[Sequence[str]], list[dict[str, Any]]], chunk_rows: int
) -> Iterator[list[tuple[Row | Dropped, dict[str, Any]]]]:
    """The rows in order, so many at a time, each with its answer, or with why it has none."""
    chunk: list[Row | Dropped] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == chunk_rows:
            yield _answered(chunk, answer)
            chunk = []
    if chunk:
        yield _answered(chunk, answer)


def _answered(
    chunk: list[Row | Dropped], answer: Callable[[Sequence[str]], list[dict[str, Any]]]
) -> list[tuple[Row | Dropped, dict[str, Any]]]:
    made = iter(answer([row.text for row in chunk if isinstance(row, Row)]))
    return [(row, {"problem": row.reason} if isinstance(row, Dropped) else next(made)) for row in chunk]


def format_of(out: str | None, asked: str | None) -> str:
    """csv or jsonl, as it is asked for or by the ending of the file. Raises UserError for any other."""
    ending = (out or "").lower().rpartition(".")[2]
    found = asked or (ending if out else "csv")
    if found not in FORMATS:
        where = "--format" if asked else f"--out: {out}"
        raise UserError(f"{where}: found {found!r}; it takes one of {', '.join(FORMATS)}")
    return found
