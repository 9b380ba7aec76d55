"""The commands that use a finished model: their options, as `cli.py` registers them."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer
from rich.table import Table

from raydistill.config.section import MAX_SEED
from raydistill.errors import UserError
from raydistill.stages.progress import Progress
from raydistill.terminal import err, out

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="a run's folder (its student), a student's folder, a folder of a run's export/, a URL of one, or a hub id",
    ),
]


def predict(
    model: Model,
    file: Annotated[
        str, typer.Argument(metavar="[FILE]", help=".csv .tsv .jsonl .parquet, .txt of lines, or - for standard input")
    ] = "-",
    text: Annotated[str, typer.Option(help="the column with the texts")] = "text",
    delimiter: Annotated[str, typer.Option(help="of a .csv file")] = ",",
    out: Annotated[str | None, typer.Option(help="a .csv or .jsonl file; absent: standard output")] = None,
    format: Annotated[str | None, typer.Option(help="csv or jsonl; absent: by --out, else csv")] = None,
    with_text: Annotated[bool, typer.Option("--with-text", help="write the texts beside their answers")] = False,
    top: Annotated[int, typer.Option(min=0, max=10_000, help="list so many classes, the likeliest first")] = 0,
    all_classes: Annotated[bool, typer.Option("--all", help="write the probability of every class")] = False,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="multi_label: a label from here on; absent: above one half")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="causal_lm: tokens to write; absent: 128")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="causal_lm: a text is a user's message of a chat")] = False,
    chunk_rows: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="rows that are read before their answers are written")
    ] = 1024,
) -> None:
    """Answer every row of a file with a finished student, or with an exported file."""
    from raydistill.serving.answers import Asked
    from raydistill.serving.predict import Request
    from raydistill.serving.predict import predict as answer

    if len(delimiter) != 1:
        raise UserError(f"--delimiter: found {delimiter!r}; it is one character")
    asked = Asked(top=top, all_classes=all_classes, threshold=threshold, max_tokens=max_tokens, chat=chat)
    request = Request(
        model, file, text=text, delimiter=delimiter, out=out, format=format, with_text=with_text, chunk_rows=chunk_rows,
        asked=asked,
    )  # fmt: skip
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="")
    answer(request, Progress(err.print), sys.stdin.buffer, sys.stdout)


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="to listen on; 0.0.0.0 for all of this machine's addresses")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    address: Annotated[
        str | None, typer.Option(help="a running Ray cluster; absent: a new local one, which ends with the command")
    ] = None,
    name: Annotated[str, typer.Option(help="of the application on the cluster")] = "raydistill",
    route: Annotated[str, typer.Option(help="what paths begin with")] = "/",
    replicas: Annotated[int, typer.Option(min=1, max=4096, help="copies of the model")] = 1,
    threads: Annotated[int, typer.Option(min=1, max=4096, help="CPUs of each")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, max=4096, help="texts computed together, and of one request")] = 64,
    batch_wait_ms: Annotated[float, typer.Option(min=0, max=10_000, help="a batch waits so long for more texts")] = 2,
    max_characters: Annotated[
        int, typer.Option(min=1, max=10_000_000, help="of a text; longer ones get a 422")
    ] = 20_000,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="multi_label: a label from here on; absent: above one half")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="causal_lm: tokens to write; absent: 128")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="causal_lm: a text is a user's message of a chat")] = False,
) -> None:
    """Answer requests over HTTP with a finished student, or with an exported file, by Ray Serve."""
    from raydistill.serving.answers import Asked
    from raydistill.serving.serve import Service, serve_model

    if not route.startswith("/"):
        raise UserError(f"--route: found {route!r}; it begins with /")
    service = Service(
        model, host=host, port=port, address=address, name=name, route=route, replicas=replicas, threads=threads,
        max_batch=max_batch, batch_wait_ms=batch_wait_ms, max_characters=max_characters,
        asked=Asked(threshold=threshold, max_tokens=max_tokens, chat=chat),
    )  # fmt: skip
    serve_model(service, Progress(out.print))


def review(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, <storage>/<name>")],
    rows: Annotated[int, typer.Option(min=20, max=10_000, help="of the sample, of four kinds as many each")] = 160,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="of what is drawn")] = 0,
    again: Annotated[bool, typer.Option("--again", help="draw anew; what stands there is kept aside")] = False,
) -> None:
    """Draw a sample of the teacher's answers for a person to mark; or read the marks, and say what they tell."""
    from raydistill.config.file import load_config
    from raydistill.record.lock import run_lock
    from raydistill.record.run import find_run
    from raydistill.report.review import review_lines, review_table
    from raydistill.stages.review import review as read_or_draw

    found = find_run(run_folder)
    config = load_config(found.store.local("config.yaml"))
    run = found.lent(config.teacher.cache_from)
    with run_lock(run.store):
        summary = read_or_draw(config, run, rows=rows, seed=seed, again=again, progress=Progress(err.print))
    header, lines = review_table(summary)
    table = Table(*header, box=None)
    for line in lines:
        table.add_row(*line)
    out.print(table)
    for line in review_lines(summary):
        out.print(line)
    out.print(f"mark rows in {run.store.where('review/review.html')} or review.csv beside it, then run this again")
