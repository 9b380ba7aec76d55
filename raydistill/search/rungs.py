"""Which trials go on: decisions that depend on what trials reached, and on nothing else.

Trials are numbered. A trial is compared with earlier ones and with those of its own generation (a fixed number of
trials in a row), never with later ones, and waits for what those have not reached yet. So the same trials are stopped
whatever runs at once, in whatever order results come, and after any stop.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raydistill.config.tune import Tune
from raydistill.search.trials import PATIENCE, Trial

FEWEST = 3  # curves that a median is of


@dataclass(frozen=True)
class Decision:
    """What becomes of a trial after the epochs that it has had; a reason when it is stopped."""

    what: Literal["go", "wait", "stop", "finished"]
    reason: str = ""


GO, WAIT, FINISHED = Decision("go"), Decision("wait"), Decision("finished")


def decide(tune: Tune, trials: Sequence[Trial], number: int) -> Decision:
    """What becomes of a trial. `trials` are all that are known, in order; its whole generation is among them."""
    trial = trials[number]
    epoch = len(trial.curve)
    if epoch >= trial.epochs:
        return FINISHED
    if epoch == 0:
        return GO
    if tune.patience is not None and _epochs_without_gain(trial, tune.metric) >= tune.patience:
        return Decision("stop", PATIENCE)
    if tune.scheduler == "asha" and epoch in rungs(tune, trial.epochs):
        return _halved(tune, trials, trial)
    if tune.scheduler == "median" and epoch >= tune.first_rung:
        return _above_the_median(tune, trials, trial)
    if tune.scheduler == "screen" and epoch == tune.first_rung:
        return _screened(tune, trials, trial)
    return GO


def rungs(tune: Tune, epochs: int) -> list[int]:
    """The epochs at which halving decides about a training of so many."""
    found: list[int] = []
    rung = tune.first_rung
    while rung < epochs:
        found.append(rung)
        rung *= tune.reduction_factor
    return found


def generation_end(tune: Tune, number: int) -> int:
    """The number after the last trial of a trial's generation, in a search of so many trials."""
    return min((number // tune.generation + 1) * tune.generation, tune.num_trials)


def _epochs_without_gain(trial: Trial, metric: str) -> int:
    """In its last stage: a stage begins with settings of its own, and may gain where the one before no longer did."""
    values = trial.values(metric)[trial.epochs_before :]
    return len(values) - 1 - values.index(max(values)) if values else 0


def _place(trial: Trial, others: Sequence[Trial], metric: str, epoch: int) -> int:
    """How many of the others are better at an epoch."""
    own = trial.order(metric, epoch)
    return sum(other.order(metric, epoch) > own for other in others)


def _halved(tune: Tune, trials: Sequence[Trial], trial: Trial) -> Decision:
    """Whether it is among the best at its rung, one in `reduction_factor`.

    Asynchronous successive halving, Li et al. 2020, arXiv:1810.05934, section 3, in the form that stops trials in the
    place of promoting them, over the trials up to the end of its generation.
    """
    epoch = len(trial.curve)
    rivals = trials[: generation_end(tune, trial.number)]
    if any(not rival.has_ended and len(rival.curve) < epoch for rival in rivals):
        return WAIT
    reached = [rival for rival in rivals if len(rival.curve) >= epoch]
    kept = max(1, len(reached) // tune.reduction_factor)
    place = _place(trial, reached, tune.metric, epoch)
    if place < kept:
        return GO
    return Decision("stop", f"rung of epoch {epoch}: place {place + 1} of {len(reached)}, {kept} go on")


def _above_the_median(tune: Tune, trials: Sequence[Trial], trial: Trial) -> Decision:
    """Whether its best so far reaches the median of earlier generations' running means.

    Median stopping, Golovin et al. 2017, "Google Vizier", section 3.2.2.
    """
    epoch = len(trial.curve)
    earlier = trials[: trial.number // tune.generation * tune.generation]
    if any(not other.has_ended and len(other.curve) < epoch for other in earlier):
        return WAIT
    means = [statistics.fmean(o.values(tune.metric)[:epoch]) for o in earlier if len(o.curve) >= epoch]
    if len(means) < FEWEST:
        return GO
    median, best = statistics.median(means), max(trial.values(tune.metric))
    if best >= median:
        return GO
    return Decision("stop", f"epoch {epoch}: below the median of {len(means)} trials")


def _screened(tune: Tune, trials: Sequence[Trial], trial: Trial) -> Decision:
    """Whether it is among the best few of all trials after the first epochs."""
    epoch = tune.first_rung
    if len(trials) < tune.num_trials or any(not other.has_ended and len(other.curve) < epoch for other in trials):
        return WAIT
    reached = [other for other in trials if len(other.curve) >= epoch]
    place = _place(trial, reached, tune.metric, epoch)
    if place < tune.keep:
        return GO
    return Decision("stop", f"screen of epoch {epoch}: place {place + 1} of {len(reached)}, {tune.keep} go on")
