"""Seconds until a trial's first step, on Ray: python benchmarks/trial_start.py --base RUN --out DIR [--trials 12]

A search of trials that are trained alone, an epoch each, over the data and the cache of a finished run. A trial's time
runs from when Tune asks for its work to its first optimiser step: placing it, making or resetting its process, building
the student, reading and tokenising rows. The first trials of the processes pay for their start and the imports; what
counts for a search is the median of the others, which has to stay below --limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from raydistill.config.file import load_config
from raydistill.record.commit import read_manifest
from raydistill.record.run import open_run
from raydistill.stages.pipeline import run_stages
from raydistill.stages.progress import Progress

SPACE = {"train.loss.temperature": {"uniform": [1.0, 8.0]}}


def starts(base: Path, out: Path, trials: int, processes: int) -> list[float]:
    """start_seconds of every trial of a new search, by number."""
    asked: dict[str, Any] = {
        "space": SPACE, "search": "random", "scheduler": "none", "trials": trials, "fused": False,
        "max_concurrent": processes,
    }  # fmt: skip
    changes = [f"name={out.name}", f"storage={out.parent}", f"teacher.cache_from={base}", "train.epochs=1"]
    config = load_config(base / "config.yaml", [*changes, f"cluster.cpus={processes}", f"tune={asked}"])
    run_stages(config, ("tune",), Progress(print))
    store = open_run(config.storage, config.name).store
    found: dict[int, float] = {}
    for folder in store.folders("tune/trials"):
        manifest = read_manifest(store, folder)
        assert manifest is not None
        record = manifest.facts["trial"]
        found[record["number"]] = record["facts"]["start_seconds"]
    return [found[number] for number in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the folder of a run with a finished cache")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the run that is made")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=5.0, help="seconds that the median of later trials may take")
    options = parser.parse_args()
    found = starts(options.base.resolve(), options.out.resolve(), options.trials, options.processes)
    first, later = found[: options.processes], found[options.processes :]
    print("first trials of their processes:", ", ".join(f"{seconds:.2f} s" for seconds in first))
    print("later ones:", ", ".join(f"{seconds:.2f} s" for seconds in later))
    middle = statistics.median(later)
    print(f"median of later ones {middle:.2f} s, most {max(later):.2f} s, goal {options.limit:g} s")
    if middle > options.limit:
        sys.exit("the goal is missed")


if __name__ == "__main__":
    main()
