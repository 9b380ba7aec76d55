"""The facts of a search as its page shows them (`report/search_page.py`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from raydistill.config.points import with_point
from raydistill.config.run import Config
from raydistill.config.tune import Dimension
from raydistill.record.run import Run
from raydistill.search.importance import importance
from raydistill.search.trials import LOWER_IS_BETTER, Trial
from raydistill.stages.environment import environment
from raydistill.stages.search_rows import epoch_steps, num_rows


def search_facts(config: Config, run: Run, trials: Sequence[Trial], found: Mapping[str, Any]) -> dict[str, Any]:
    """What `render_search` takes; `found` are the facts of the search's manifest."""
    tune, data = config.tune, run.require("data")
    assert tune is not None
    rows = num_rows(config, run)
    return {
        "name": run.store.root,
        "created": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "metric": tune.metric,
        "lower_is_better": tune.metric in LOWER_IS_BETTER,
        "search": tune.search,
        "scheduler": tune.scheduler,
        "seed": tune.seed,
        "data_fraction": tune.data_fraction,
        "rows": rows,
        "validation_rows": sum(entry.rows for entry in data.shards("validation")),
        "teacher_forwards_per_row": found["teacher_forwards_per_row"],
        "steps": found["steps"],
        "full_steps": sum(_full_steps(config, run, trial) for trial in trials),
        "seconds": found["seconds"],
        "space": {name: in_words(dimension) for name, dimension in sorted(tune.space.items())},
        "importance": importance(tune, trials, config.train.choose),
        "winner": found["winner"]["number"],
        "trials": [_shown(trial, tune.metric, config.train.choose) for trial in trials],
        "config": config.model_dump(mode="json"),
        "environment": environment(),
    }


def _full_steps(config: Config, run: Run, trial: Trial) -> int:
    """The steps of a trial that is not stopped."""
    trainings = with_point(config, trial.point).train.trainings
    return sum(one.epochs * epoch_steps(config, run, one.batch_size) for one in trainings)


def _shown(trial: Trial, metric: str, choose: str) -> dict[str, Any]:
    epoch = trial.chosen_epoch(metric, choose)
    value = None if epoch is None or trial.status == "failed" else trial.curve[epoch - 1][metric]
    return trial.record() | {"chosen_epoch": epoch, "value": value}


def in_words(dimension: Dimension) -> str:
    """What a setting may be, as a person writes it."""
    if dimension.values is not None:
        return "one of " + ", ".join(map(str, dimension.values))
    low, high = dimension.ends
    kind = ", its logarithm drawn evenly" if dimension.loguniform else ", a whole number" if dimension.integer else ""
    return f"from {low:g} to {high:g}{kind}"
