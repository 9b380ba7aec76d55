"""What a search will cost, as far as that can be known before its points are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config.cross_tokenizer import student_length
from raydistill.config.points import corners, with_point
from raydistill.config.run import Config
from raydistill.config.train import Train
from raydistill.data.order import steps_per_epoch
from raydistill.data.shards import STUDENT_SPLITS
from raydistill.data.token_order import token_steps
from raydistill.search.space import grid
from raydistill.stages.fusable import why_not_together, why_separate
from raydistill.stages.search_groups import grouped
from raydistill.stages.trial import trial_config
from raydistill.students.build import student_shape


@dataclass(frozen=True)
class SearchCost:
    """Trials, the optimiser steps that they take if none is stopped, and in how many fused groups they are trained."""

    trials: int
    steps: int
    groups: int | None  # None where that depends on points that are not drawn yet
    members: int  # of a group, at most
    why_alone: str = ""  # where there are no groups
    may_share: bool = False  # whether a group may be cut up for processes that are not known yet
    warning: str = ""
    workers: int = 1  # of each trial

    def lines(self) -> list[str]:
        together = f"fused in groups of up to {self.members} that differ in nothing else, as their points are drawn"
        if self.groups is not None:
            fused = f"{self.groups:,} fused group{'s' if self.groups > 1 else ''} of up to {self.members}"
            fused += ", or smaller ones where processes would wait" if self.may_share else ""
            together = fused if self.groups else f"each alone: {self.why_alone}"
        if self.workers > 1:
            together = f"each by {self.workers} workers"
        line = f"search: {self.trials:,} trials ({together}), {self.steps:,} steps at most; no teacher forward"
        return [line, *([f"search: {self.warning}"] if self.warning else [])]


def search_cost(config: Config, amount: int, teacher_folder: Path) -> SearchCost:
    """The cost of the search over so many rows of train; of a language model's over so many tokens."""
    tune = config.tune
    assert tune is not None
    trials = [with_point(config, point).train for point in corners(tune.space)]
    most = max(sum(one.epochs * _epoch_steps(config, one, amount) for one in train.trainings) for train in trials)
    groups = count_groups(config, teacher_folder)
    why = "" if groups != 0 else _why_alone(config, teacher_folder)
    members = min(tune.fused_members, tune.generation)
    may_share = tune.max_concurrent is None and (tune.search == "tpe" or tune.num_trials <= tune.generation)
    return SearchCost(
        tune.num_trials, tune.num_trials * most, groups, members, why, may_share, early_rung(config, amount),
        config.trial_workers,
    )  # fmt: skip


def _epoch_steps(config: Config, train: Train, amount: int) -> int:
    """Optimiser steps of an epoch of a trial, over its share of so many rows or tokens."""
    assert config.tune is not None
    share = math.ceil(amount * config.tune.data_fraction)
    if config.task == "causal_lm":
        return token_steps(share, train.batch_size * student_length(config))
    return steps_per_epoch(share, train.batch_size)


def learnt_amount(config: Config, facts: Mapping[str, Any]) -> int:
    """The rows that students learn from, by the data's facts; of language models the tokens."""
    if config.task == "causal_lm":
        return sum(facts["counts"][split]["tokens"] for split in STUDENT_SPLITS if split in facts["counts"])
    return sum(facts["rows"].get(split, 0) for split in STUDENT_SPLITS)


def early_rung(config: Config, amount: int) -> str:
    """A line that warns of decisions at which trials hardly differ yet; empty where most of their steps are no warm-up.

    Of 64 points whose first rung came after 17 steps, 13 of them warm-up, halving found the best in two of five seeds
    (docs/log.md).
    """
    tune = config.tune
    assert tune is not None
    if tune.scheduler == "none":
        return ""
    for train in (with_point(config, point).train for point in corners(tune.space)):
        taken, warm, left = 0, 0, tune.first_rung
        for one in train.trainings:
            each, epochs = _epoch_steps(config, one, amount), min(left, one.epochs)
            taken, left = taken + epochs * each, left - epochs
            warm += min(epochs * each, int(one.epochs * each * one.warmup))
        if taken < 2 * warm:
            return (
                f"{tune.scheduler} first decides after {taken:,} steps of a trial, {warm:,} of them warm-up, when"
                " trials hardly differ. Raise tune.grace_epochs or lower train.warmup"
            )
    return ""


def count_groups(config: Config, teacher_folder: Path) -> int | None:
    """The fused groups of a search; None where that depends on points that are not drawn yet."""
    tune = config.tune
    assert tune is not None
    configs = [trial_config(config, point, fused=True) for point in corners(tune.space)]
    whole = tune.model_copy(update={"fused_members": max(2, len(configs))})
    kinds = grouped(dict(enumerate(configs)), teacher_folder, whole)  # in one process
    if not kinds:
        return 0
    if tune.search == "grid":
        configs = [trial_config(config, point, fused=True) for point in grid(tune.space)]
    elif len(kinds[0]) == len(configs):  # whatever is drawn can be together
        configs = configs[:1] * tune.num_trials
    else:
        return None
    starts = range(0, tune.num_trials, tune.generation)
    generations = [dict(enumerate(configs[start : min(start + tune.generation, tune.num_trials)])) for start in starts]
    processes = tune.max_concurrent or 1
    return sum(len(grouped(generation, teacher_folder, tune, processes)) for generation in generations)


def _why_alone(config: Config, teacher_folder: Path) -> str:
    """Why the trials of a search form no group, by the first of its points."""
    assert config.tune is not None
    asked = config.tune.fused
    if asked is False:
        return "tune.fused: false"
    several = [trial_config(config, point, fused=True) for point in itertools.islice(corners(config.tune.space), 2)]
    shape = student_shape(several[0].student, teacher_folder)
    why = why_separate(several[0], shape, asked) or why_not_together(several)
    if why is None and config.tune.num_trials > 1:
        why = f"tune.max_concurrent: {config.tune.max_concurrent} of them run at once"
    return why or "there is one"
