"""How good searches are, and what they cost: every rule replayed over grids that were trained whole.

    python benchmarks/search.py train --out DIR [--seeds 5] [--grid loss|rate] [--base RUN]
    python benchmarks/search.py table --out DIR

`train` trains two grids of students to their end and keeps validation's and test's metrics after every epoch: `loss`
has 18 points (temperature 2, 4, 6 x alpha 0.5, 0.7, 0.9 x features off and on), `rate` 64 (four temperatures x alphas x
learning rates). Data, teacher and cache are the demo's, made below --out once, or with --base those of another run,
whose cache must hold features for `loss`. Each seed draws its share of the rows (--fraction, 0.2), its first weights
and the order in which points are tried. It may be stopped, and goes on.

What a trial reaches does not depend on the others, so that `table` can ask what each rule would have found: the rules
of raydistill/search decide over the curves as they do in a search. For each it has the student's optimiser steps as a
share of the grid's, the winner's rank in the grid by validation (1: none is better) and how many points of validation
and of test it lies below the grid's best. `tpe` sees so many points as its name says, the others all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from raydistill.config.file import load_config, validate
from raydistill.config.run import Config
from raydistill.config.tune import Tune
from raydistill.data.loader import Split
from raydistill.demo import demo_config
from raydistill.record.run import open_run
from raydistill.search.points import next_points
from raydistill.search.rungs import decide
from raydistill.search.space import grid, point_id
from raydistill.search.trials import Trial, winner
from raydistill.stages.cluster import Resources
from raydistill.stages.group_training import GroupTraining, training_of
from raydistill.stages.job import build_model, open_split
from raydistill.stages.pipeline import run_stages
from raydistill.stages.progress import Progress
from raydistill.stages.search import Search
from raydistill.stages.search_rows import draw_rows
from raydistill.stages.teachers import teacher_source
from raydistill.stages.trial import Trials, Work
from raydistill.stages.trial_training import TrialTraining
from raydistill.stages.validation import validation_metrics

ONE = Resources(cpus=1, gpus=0, node_cpus=1)
FEATURES = [{"kind": "hidden_mse"}]
GRIDS: dict[str, dict[str, Any]] = {
    "loss": {
        "train.loss.temperature": {"choice": [2.0, 4.0, 6.0]},
        "train.loss.alpha": {"choice": [0.5, 0.7, 0.9]},
        "train.loss.features": {"choice": [[], FEATURES]},
    },
    "rate": {
        "train.loss.temperature": {"choice": [1.0, 2.0, 4.0, 8.0]},
        "train.loss.alpha": {"choice": [0.25, 0.5, 0.75, 1.0]},
        "train.learning_rate": {"choice": [5.0e-4, 1.0e-3, 2.0e-3, 4.0e-3]},
    },
}
# Of the demo's small student; other runs have their own in their config.
DEMO_CHANGES = {"train": {"loss": {"features": FEATURES, "features_from": "cache"}}}
RULES: dict[str, dict[str, Any]] = {
    "none": {"scheduler": "none"},
    "asha, grace 1, factor 2": {"scheduler": "asha", "reduction_factor": 2},
    "asha, grace 1, factor 3": {"scheduler": "asha", "reduction_factor": 3},
    "asha, grace 1, factor 4": {"scheduler": "asha", "reduction_factor": 4},
    "asha, grace 1, factor 8": {"scheduler": "asha", "reduction_factor": 8},
    "asha, grace 2, factor 4": {"scheduler": "asha", "grace_epochs": 2, "reduction_factor": 4},
    "asha, grace 2, factor 8": {"scheduler": "asha", "grace_epochs": 2, "reduction_factor": 8},
    "asha, grace 1, factor 4, all at once": {"scheduler": "asha", "reduction_factor": 4, "generation": 64},
    "asha, grace 1, factor 8, all at once": {"scheduler": "asha", "reduction_factor": 8, "generation": 64},
    "median, grace 1": {"scheduler": "median"},
    "screen, grace 1, keep 1": {"scheduler": "screen", "keep": 1},
    "screen, grace 1, keep 2": {"scheduler": "screen", "keep": 2},
    "screen, grace 1, keep 3": {"scheduler": "screen", "keep": 3},
    "screen, grace 1, keep 5": {"scheduler": "screen", "keep": 5},
    "screen, grace 2, keep 3": {"scheduler": "screen", "grace_epochs": 2, "keep": 3},
    "tpe of 16, none": {"search": "tpe", "trials": 16, "scheduler": "none"},
    "tpe of 16, screen keep 3": {"search": "tpe", "trials": 16, "scheduler": "screen", "keep": 3},
    "tpe of 32, asha factor 4": {"search": "tpe", "trials": 32, "scheduler": "asha", "reduction_factor": 4},
    "tpe of 32, asha, grace 2": {"search": "tpe", "trials": 32, "scheduler": "asha", "grace_epochs": 2},
    "tpe of 24, asha, grace 2": {"search": "tpe", "trials": 24, "scheduler": "asha", "grace_epochs": 2},
    "random of 32, asha, grace 2": {"search": "random", "trials": 32, "scheduler": "asha", "grace_epochs": 2},
}  # fmt: skip


def base_run(arguments: argparse.Namespace) -> Path:
    """The folder of the run that has data and cache; the demo's is made here."""
    if arguments.base:
        return arguments.base
    made = demo_config(arguments.out).model_dump(mode="json", exclude_none=True)
    made["train"]["loss"] |= DEMO_CHANGES["train"]["loss"]
    config = validate({**made, "name": "base", "cluster": {"cpus": 1}}, {}, "benchmarks/search.py")
    if open_run(config.storage, config.name).complete("cache") is None:
        run_stages(config, ("prepare", "teach"), Progress(print))
    return arguments.out / "base"


def grid_config(base: Path, out: Path, name: str, seed: int, changes: list[str], fraction: float = 0.2) -> Config:
    """The search that tries every point of a grid to its end."""
    settings = load_config(base / "config.yaml", changes).model_dump(mode="json", exclude_none=True)
    settings["train"]["seed"] = seed
    settings["teacher"]["cache_from"] = str(base)
    tune = {"space": GRIDS[name], "search": "grid", "scheduler": "none", "seed": seed, "data_fraction": fraction}
    named = {"name": f"{name}-{seed}", "storage": str(out / "grids"), "tune": tune}
    return validate(settings | named, {}, "benchmarks/search.py")


def train_grid(config: Config) -> None:
    """Trains what is missing of a grid; test's metrics of every epoch stand in test.jsonl."""
    run = open_run(config.storage, config.name, cache_from=config.teacher.cache_from)
    trials = Trials(config, run, ONE, teacher_source(config, run), draw_rows(config, run))
    search = Search(trials)
    path = Path(run.store.where("test.jsonl"))
    known = {(line["trial"], line["epoch"]) for line in lines(path)}
    while (work := search.next()) is not None:
        search.start(work.kept)
        training, test = training_of(work), test_split(work)
        while True:
            outcomes = training.step()
            if any(outcome.problem or outcome.apart for outcome in outcomes):
                raise SystemExit(str(outcomes))
            measured = on_test(training, test)
            with open(path, "a") as file:
                for outcome in outcomes:
                    key = (outcome.number, len(outcome.curve))
                    if outcome.number in measured and key not in known:
                        known.add(key)
                        found = {"trial": key[0], "epoch": key[1], **measured[outcome.number]}
                        file.write(json.dumps(found) + "\n")
            kept = search.update(outcomes)
            print(f"{config.name}: trials {work.kept}, epoch {len(outcomes[0].curve)}", flush=True)
            if not kept:
                break
            training.keep(kept)
        training.close()
        test.close()
        search.leave(work.kept)
    if search.problem:
        raise SystemExit(search.problem)
    found = [trial.record() for trial in search.trials]
    run.store.write("curves.json", json.dumps(found).encode())


def test_split(work: Work) -> Split:
    """Test's rows, which a search never opens."""
    job = next(iter(work.jobs.values()))
    return open_split(replace(job, uses_cache=False, rows=None), ("test",), build_model(job)[1])


def on_test(training: TrialTraining | GroupTraining, test: Split) -> dict[int, dict[str, float]]:
    """What each trial reaches on test as it stands."""
    if isinstance(training, GroupTraining):
        assert training._group is not None
        found = training._group.metrics(test)
        return {number: found[name] for number, name in training._names.items() if name in found}
    assert training._rank is not None
    classes = len(training._jobs[0].labels)
    return {training._number: validation_metrics(training._rank.engine, test, classes=classes)}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@dataclass(frozen=True)
class Grid:
    """A grid that was trained whole."""

    config: Config
    curves: dict[str, tuple[dict[str, float], ...]]  # of validation, by the point
    tests: dict[str, list[float]]  # test accuracy after each epoch, by the point
    epochs: int

    @property
    def metric(self) -> str:
        assert self.config.tune is not None
        return self.config.tune.metric

    def reached(self, point: dict[str, Any]) -> tuple[float, float]:
        """Validation and test of the student that a point's whole training stands for."""
        trial = Trial(0, point, self.epochs, self.curves[point_id(point)])
        epoch = trial.chosen_epoch(self.metric, self.config.train.choose)
        assert epoch is not None
        return trial.value(self.metric, epoch), self.tests[point_id(point)][epoch - 1]


def read_grid(config: Config) -> Grid | None:
    run = open_run(config.storage, config.name, cache_from=config.teacher.cache_from)
    if not run.store.exists("curves.json"):
        return None
    found = json.loads(run.store.read("curves.json"))
    tests: dict[str, list[float]] = {}
    names = {trial["number"]: point_id(trial["point"]) for trial in found}
    for line in sorted(lines(Path(run.store.where("test.jsonl"))), key=lambda line: line["epoch"]):
        tests.setdefault(names[line["trial"]], []).append(line["accuracy"])
    curves = {point_id(trial["point"]): tuple(trial["curve"]) for trial in found}
    return Grid(config, curves, tests, found[0]["epochs"])


def replay(tune: Tune, whole: Grid) -> list[Trial]:
    """The trials of a search by these settings, each as far as the rule let it come."""
    trials: list[Trial] = []
    while True:
        points = next_points(tune, trials) or []
        trials += [Trial(number, point, whole.epochs) for number, point in enumerate(points, len(trials))]
        moved = bool(points)
        for number, trial in enumerate(trials):
            if trial.has_ended:
                continue
            decision = decide(tune, trials, number)
            if decision.what == "go":
                curve = whole.curves[point_id(trial.point)][: len(trial.curve) + 1]
                trials[number] = replace(trial, curve=curve)
            elif decision.what != "wait":
                status = "finished" if decision.what == "finished" else "stopped"
                trials[number] = replace(trial, status=status, reason=decision.reason)
            moved = moved or decision.what != "wait"
        if not moved:
            assert len(trials) == tune.num_trials, "the search stands still"
            return trials


@dataclass(frozen=True)
class Found:
    """What a rule found in one grid."""

    share: float  # of the grid's optimiser steps
    rank: int
    validation: float  # points below the grid's best by validation
    test: float


def judged(rule: dict[str, Any], whole: Grid) -> Found:
    """A rule's cost and its winner, in the order of points that the grid's seed draws."""
    tune = whole.config.tune
    assert tune is not None
    settings = {"search": "random", "trials": len(whole.curves), "seed": tune.seed, "metric": tune.metric}
    asked = Tune.model_validate({"space": tune.model_dump(exclude_none=True)["space"], **settings, **rule})
    trials = replay(asked, whole)
    won = winner(trials, whole.metric, whole.config.train.choose)
    assert won is not None
    values = {point_id(point): whole.reached(dict(point)) for point in grid(tune.space)}
    own, (best, best_test) = values[point_id(won.point)], max(values.values())
    return Found(
        share=sum(len(trial.curve) for trial in trials) / (len(whole.curves) * whole.epochs),
        rank=1 + sum(value > own[0] for value, _ in values.values()),
        validation=100 * (best - own[0]), test=100 * (best_test - own[1]),
    )  # fmt: skip


def table(grids: Sequence[Grid]) -> Iterable[str]:
    yield "| rule | steps | ranks | in the top 3 | validation, points below | test, points below | at most 0.3 below |"
    yield "|---|---|---|---|---|---|---|"
    for name, rule in RULES.items():
        if rule.get("trials", 0) > len(grids[0].curves):
            continue
        found = [judged(rule, whole) for whole in grids]
        top, near = sum(one.rank <= 3 for one in found), sum(one.validation <= 0.3 for one in found)
        yield (
            f"| {name} | {statistics.fmean(one.share for one in found):.1%}"
            f" | {' '.join(str(one.rank) for one in found)}"
            f" | {top} of {len(found)} | {' '.join(f'{one.validation:.2f}' for one in found)}"
            f" | {' '.join(f'{one.test:.2f}' for one in found)} | {near} of {len(found)} |"
        )


def foresight(grids: Sequence[Grid]) -> Iterable[str]:
    """How what the points have after an epoch agrees with what they reach, as Spearman's rank correlation."""
    for metric in ("accuracy", "nll"):
        for epoch in range(1, min(4, grids[0].epochs)):
            found = []
            for whole in grids:
                trials = [Trial(0, {}, whole.epochs, curve) for curve in whole.curves.values()]
                early = [trial.value(metric, epoch) for trial in trials]
                late = [max(trial.values(whole.metric)) for trial in trials]
                varied = len(set(early)) > 1
                found.append(f"{spearmanr(early, late)[0]:.2f}" if varied else "all equal")
            yield f"{metric} after epoch {epoch}, correlation with the best {grids[0].metric}: {', '.join(found)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="a run with data and cache, in the place of the demo's")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help="changes to the base's settings"
    )
    parser.add_argument("--grid", choices=[*GRIDS], help="absent: both")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--fraction", type=float, default=0.2, help="share of train's rows; another --out for each")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    base = base_run(arguments)
    for name in [arguments.grid] if arguments.grid else GRIDS:
        configs = [
            grid_config(base, arguments.out, name, seed, arguments.set, arguments.fraction)
            for seed in range(arguments.seeds)
        ]
        if arguments.what == "train":
            for config in configs:
                train_grid(config)
            continue
        grids = [whole for whole in map(read_grid, configs) if whole is not None]
        if grids:
            print(f"{name}: {len(grids[0].curves)} points, {grids[0].epochs} epochs, {len(grids)} seeds", flush=True)
            print("\n".join(table(grids)), flush=True)
            print("\n".join(foresight(grids)), flush=True)


if __name__ == "__main__":
    main()
