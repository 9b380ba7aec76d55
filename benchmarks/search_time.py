"""The wall time of whole searches, start-up included, each as a command of its own.

    python benchmarks/search_time.py search --base RUN --out DIR [--trials 64]
    python benchmarks/search_time.py fused --base RUN --out DIR [--trials 16]

`search` is one search of temperature, alpha and learning rate by the defaults over a finished run's data and cache
(`raydistill demo` makes one): `raydistill tune`, from its start to its end, which has to take --limit seconds at most.
Its phases say where the time goes: until the cluster is there, until the first epoch of a trial, the trials, tables and
page, and how long processes of trials did nothing meanwhile.

`fused` makes the same trials twice, trained together and each alone, of a student of 2 layers of 128, and compares the
trials in an hour of both, which have to be --factor times as many. Their numbers are compared too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq

from raydistill.record.commit import read_manifest
from raydistill.record.run import open_run

SPACE = (
    "{train.loss.temperature: {uniform: [1.0, 8.0]}, train.loss.alpha: {uniform: [0.2, 1.0]},"
    " train.learning_rate: {loguniform: [5.0e-4, 4.0e-3]}}"
)
STUDENT = ["student={init: config, model_type: bert, hidden_size: 128, num_layers: 2, num_heads: 2}"]
# What ends a phase of a search, as the beginning of a line of it.
PHASES = {"cluster": "tune: starting up to", "first epoch": "trial ", "trials": "tune: "}


def searched(base: Path, out: Path, tune: str, changes: list[str]) -> tuple[float, dict[str, float]]:
    """Seconds of `raydistill tune` into a new run, and those of its phases."""
    command = [sys.executable, "-u", "-m", "raydistill", "tune", str(base / "config.yaml"), f"name={out.name}"]
    command += [f"storage={out.parent}", f"teacher.cache_from={base}", f"tune={tune}", *changes]
    started = time.monotonic()
    ends: dict[str, float] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{time.monotonic() - started:7.1f} s  {line}", end="", flush=True)
            waited = next((name for name in PHASES if name not in ends), None)
            if waited is not None and line.startswith(PHASES[waited]):
                ends[waited] = time.monotonic() - started
    if process.returncode:
        sys.exit(f"the search ended with {process.returncode}")
    seconds, phases, before = time.monotonic() - started, {}, 0.0
    for name, end in [*ends.items(), ("tables, page and end", seconds)]:
        phases[name], before = end - before, end
    return seconds, phases


def training_seconds(out: Path) -> float:
    """What all trials' steps took, added up."""
    manifest = read_manifest(open_run(str(out.parent), out.name).store, "tune")
    assert manifest is not None
    return manifest.facts["seconds"]


def time_search(options: argparse.Namespace) -> None:
    seconds, phases = searched(
        options.base, options.out, f"{{space: {SPACE}, trials: {options.trials}}}", options.set
    )  # fmt: skip
    for name, taken in phases.items():
        print(f"{taken:7.1f} s  {name}")
    print(f"{training_seconds(options.out):7.1f} s  of all processes are optimiser steps")
    print(f"{options.trials} trials in {seconds:.0f} s, goal {options.limit:.0f} s")
    if seconds > options.limit:
        sys.exit("the goal is missed")


def time_fused(options: argparse.Namespace) -> None:
    hourly: dict[str, float] = {}
    for name, fused in (("fused", "true"), ("separate", "false")):
        tune = f"{{space: {SPACE}, search: random, scheduler: none, trials: {options.trials}, fused: {fused}}}"
        seconds, _ = searched(options.base, options.out / name, tune, [*STUDENT, *options.set])
        hourly[name] = options.trials / seconds * 3600
    tables = [pq.read_table(options.out / name / "tune/trials.parquet").to_pylist() for name in hourly]
    assert [row["trial"] for row in tables[0]] == [row["trial"] for row in tables[1]]
    metric = next(name for name in tables[0][0] if name in ("accuracy", "nll", "macro_f1", "micro_f1", "agreement"))
    apart = max(abs(one[metric] - other[metric]) for one, other in zip(*tables, strict=True))
    factor = hourly["fused"] / hourly["separate"]
    print(f"largest difference of a trial's validation {metric}: {apart:.4g}")
    print(", ".join(f"{name} {count:.0f} trials an hour" for name, count in hourly.items()))
    print(f"{factor:.2f} times as many fused, goal {options.factor:g}")
    if factor < options.factor:
        sys.exit("the goal is missed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["search", "fused"])
    parser.add_argument("--base", type=Path, required=True, help="the folder of a run with a finished cache")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the run, or of the two, that is made")
    parser.add_argument("--trials", type=int, help="absent: 64 of a search, 16 of each kind")
    parser.add_argument("--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="changes to the settings")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that the search may take")
    parser.add_argument("--factor", type=float, default=1.5, help="trials an hour of fused ones to those of separate")
    options = parser.parse_args()
    options.base, options.out = options.base.resolve(), options.out.resolve()
    options.trials = options.trials or (64 if options.what == "search" else 16)
    (time_search if options.what == "search" else time_fused)(options)


if __name__ == "__main__":
    main()
