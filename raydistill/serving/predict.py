"""Answers of a finished model for every row of a file or of standard input."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from raydistill.config.data import Data
from raydistill.data.sources import Columns, Dropped
from raydistill.errors import Interrupted, UserError, storage_problem
from raydistill.serving.answers import AS_IT_IS, Asked, open_model
from raydistill.serving.served import Served, find_served
from raydistill.serving.tables import STDIN, Answers, CsvTable, JsonLines, format_of, in_chunks, texts_in
from raydistill.stages.progress import Progress, per_second


@dataclass(frozen=True)
class Request:
    """What `raydistill predict` was asked for."""

    model: str
    file: str = STDIN
    text: str = "text"  # the column
    delimiter: str = ","
    out: str | None = None
    format: str | None = None
    with_text: bool = False
    chunk_rows: int = 1024
    asked: Asked = AS_IT_IS


def predict(request: Request, progress: Progress, stdin: IO[bytes], stdout: IO[str]) -> None:
    """Writes an answer for every row, in order, as chunks of rows come in; says how many could not be used.

    A file is written beside its place and moved there when it is whole. Raises UserError for what the user can mend,
    Interrupted on SIGTERM.
    """
    kind = format_of(request.out, request.format)
    served = find_served(request.model)
    columns = Columns(
        request.text, None, request.delimiter, Data.model_fields["max_row_bytes"].default, settings=("--text", ""),
        delimiter_setting="--delimiter",
    )  # fmt: skip
    _check_other(request)
    rows, answer = texts_in(request.file, columns, stdin), open_model(served, request.asked)
    started, done, dropped = time.monotonic(), 0, Counter[str]()
    with _ending_on_sigterm(), _output(request.out, stdout) as file:
        table = _table(kind, file, served, request)
        for chunk in in_chunks(rows, answer, request.chunk_rows):
            for row, record in chunk:
                done += 1
                text = None if isinstance(row, Dropped) else row.text
                table.write(done, text if request.with_text else None, record)
                dropped.update([record["problem"]] if "problem" in record else [])
            file.flush()
            progress.counts("predict", done, None, "rows", started)
    progress.say(_summary(done, dropped, time.monotonic() - started))


def _check_other(request: Request) -> None:
    """Raises UserError where the output would be written over the input."""
    if request.out and os.path.realpath(request.out) == os.path.realpath(request.file):
        raise UserError(f"--out: {request.out}: is the file that is read. Give another")


def _table(kind: str, file: IO[str], served: Served, request: Request) -> Answers:
    if kind == "jsonl":
        return JsonLines(file)
    return CsvTable(file, served, request.asked.top, request.asked.all_classes, request.with_text)


@contextlib.contextmanager
def _output(out: str | None, stdout: IO[str]) -> Iterator[IO[str]]:
    """Standard output, or a file that appears when all of it is written."""
    if out is None:
        yield stdout
        return
    path = Path(out)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "w", encoding="utf-8", newline="") as file:
            yield file
        part.replace(path)
    except OSError as error:
        if not path.parent.is_dir():
            raise UserError(f"--out: {out}: its folder is not there. Make it first") from None
        raise storage_problem(error) or error from None
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the work as an exception, so that what was begun is cleared away."""

    def end(signum: int, _frame: Any) -> None:
        raise Interrupted(signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _summary(done: int, dropped: Counter[str], seconds: float) -> str:
    line = f"predict: {done:,} rows, {per_second(done / max(seconds, 1e-9))} rows/s"
    if not dropped:
        return line
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(dropped.items()))
    return f"{line}; {dropped.total():,} have no answer ({reasons})"
