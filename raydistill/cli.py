"""The command line: parse, call a stage, print.

Exit codes: 0 done; 2 for what the user can mend, in one line; 130 and 143 after a signal, with the state saved; 1 for a
bug, with its traceback.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from raydistill import deploy_commands
from raydistill.config.file import load_config
from raydistill.config.run import Config
from raydistill.errors import Interrupted, UserError, storage_problem
from raydistill.record.run import STAGES, clear, find_run, leftovers, verify
from raydistill.stages.progress import Progress, size
from raydistill.terminal import TerminalProgress, err, out, print_report

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="a YAML config; see README")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="settings to change")]
Redo = Annotated[
    str | None, typer.Option(metavar="STAGE", help="do a stage again; what stands there is kept aside, numbered")
]
RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, <storage>/<name>")]


def _version(asked: bool) -> None:
    if asked:
        out.print(f"raydistill {version('raydistill')}")
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    """Distil a large transformer into a small one: raydistill run CONFIG.

    Begin with: raydistill demo, or raydistill plan CONFIG.

    Exit codes: 0 done; 2 for what you can mend, in one line; 130 and 143 after Ctrl-C and SIGTERM, with the state
    saved; 1 for a bug, with its traceback.
    """


@app.command()
def run(config: ConfigFile, overrides: Overrides = None, redo: Redo = None) -> None:
    """Prepare, teach, tune and export where the config asks for it, train and evaluate, skipping what is complete."""
    _stages(load_config(config, overrides), STAGES, redo)


@app.command()
def prepare(config: ConfigFile, overrides: Overrides = None, redo: Redo = None) -> None:
    """Turn your files into data shards."""
    _stages(load_config(config, overrides), ("prepare",), redo)


@app.command()
def teach(config: ConfigFile, overrides: Overrides = None, redo: Redo = None) -> None:
    """Run the teacher once over train and validation; keep its logits."""
    _stages(load_config(config, overrides), ("teach",), redo)


@app.command()
def tune(config: ConfigFile, overrides: Overrides = None, redo: Redo = None) -> None:
    """Try many students over the cache; find the settings that train then takes."""
    _stages(load_config(config, overrides), ("tune",), redo)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None, redo: Redo = None) -> None:
    """Train the student from the cache."""
    _stages(load_config(config, overrides), ("train",), redo)


@app.command()
def export(config: ConfigFile, overrides: Overrides = None, redo: Redo = None) -> None:
    """Write the student as files to deploy, each checked against it."""
    _stages(load_config(config, overrides), ("export",), redo)


@app.command()
def evaluate(config: ConfigFile, overrides: Overrides = None, redo: Redo = None) -> None:
    """Compare teacher, student and control on the test set."""
    _stages(load_config(config, overrides), ("evaluate",), redo)


app.command()(deploy_commands.predict)
app.command()(deploy_commands.serve)
app.command()(deploy_commands.review)


@app.command()
def demo(
    storage: Annotated[Path, typer.Option(help="folder for the demo's input and run")] = Path("runs"),
    task: Annotated[str, typer.Option(help="classification, or causal_lm for language models")] = "classification",
) -> None:
    """The whole way on generated support tickets, or stories: CPU only, no network, some minutes."""
    from raydistill.demo import demo_config
    from raydistill.demo_language import language_demo_config

    demos = {"classification": demo_config, "causal_lm": language_demo_config}
    if task not in demos:
        raise UserError(f"--task: found {task!r}; it takes one of {', '.join(demos)}")
    try:
        config = demos[task](storage.resolve())
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--storage: {storage}: is a file, or below one. Give a folder") from None
    _stages(config, STAGES, None)


@app.command()
def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check everything that needs no worker, and say what a run will cost. Writes nothing."""
    from raydistill.stages.pipeline import plan as make_plan

    for line in make_plan(load_config(config, overrides), Progress(out.print)).lines():
        out.print(line)


@app.command()
def status(run_folder: RunFolder) -> None:
    """Say what is complete, what is next, and the command that goes on."""
    from raydistill.stages.status import next_stage, standings

    found_run = find_run(run_folder)
    config = load_config(found_run.store.local("config.yaml"))
    found = standings(found_run.lent(config.teacher.cache_from), config)
    table = Table("part", "stage", "state", "", box=None)
    for standing in found:
        table.add_row(standing.part, standing.stage, standing.state, standing.detail)
    out.print(table)
    following = next_stage(found)
    if following is None:
        out.print(f"complete; the report is {found_run.store.where('report/report.html')}")
    else:
        out.print(f"next is {following}: raydistill run {shlex.quote(found_run.store.where('config.yaml'))}")


@app.command(name="verify")
def verify_run(
    run_folder: RunFolder,
    repair: Annotated[bool, typer.Option(help="set aside what is damaged, to be made again")] = False,
) -> None:
    """Re-read every committed file and compare it with its sha256."""
    from raydistill.record.lock import run_lock

    found = find_run(run_folder)
    with run_lock(found.store) if repair else contextlib.nullcontext():
        checked, findings = verify(found, repair=repair)
    for finding in findings:
        out.print(f"{finding.file}: {finding.problem}")
    if not findings:
        out.print(f"{checked} files are intact")
        return
    after = (
        "Set aside; run the same config again to make them anew"
        if repair
        else "Run verify with --repair, then the config again"
    )
    raise UserError(f"{run_folder}: {len(findings)} of {checked} files are damaged. {after}")


@app.command()
def gc(run_folder: RunFolder, dry_run: Annotated[bool, typer.Option(help="only list")] = False) -> None:
    """Remove temporary files and what was set aside."""
    from raydistill.record.lock import run_lock

    found = find_run(run_folder)
    with run_lock(found.store):
        names = leftovers(found)
        total = sum(found.store.size(name) for name in names)
        if dry_run:
            out.print("\n".join(names))
        else:
            clear(found, names)
    out.print(f"{'would remove' if dry_run else 'removed'} {len(names)} files, {size(total)}")


def _stages(config: Config, stages: tuple[str, ...], redo: str | None) -> None:
    """Does the stages and prints what came out of them."""
    from raydistill.stages.pipeline import run_stages

    if redo and redo not in STAGES:
        raise UserError(f"--redo: found {redo!r}; it takes one of {', '.join(STAGES)}")
    progress = TerminalProgress(out.print) if out.is_terminal else Progress(out.print)
    report = run_stages(config, stages, progress, redo=redo)
    folder = f"{config.storage.rstrip('/')}/{config.name}"
    if report is not None:
        print_report(report)
        out.print(f"report: {folder}/report/report.html\nstudent: {folder}/student")
    else:
        out.print(f"done; raydistill status {shlex.quote(folder)} says what is next")


def main(arguments: list[str] | None = None) -> None:
    """The console script and the jobs' entry: runs a command and ends the process with its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    sys.exit(_main(arguments))


def _main(arguments: list[str]) -> int:
    try:
        app(args=arguments or ["--help"], standalone_mode=False)
    except UserError as error:
        _print_error(error)
        return 2
    except typer.TyperException as error:
        _print_error(f"{error.format_message().rstrip('.')}. See raydistill --help")
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if (problem := storage_problem(error)) is None:
            raise
        _print_error(problem)
        return 2
    except Interrupted as interrupted:
        command = shlex.join(["raydistill", *arguments])
        err.print(f"stopped by {interrupted}; what is committed stays. Go on with: {command}")
        return interrupted.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return 130
    return 0


def _print_error(error: Exception | str) -> None:
    """One line, whatever a path, a label or another package's message brought into it."""
    err.print("error: " + " ".join(str(error).split("\n")))
