"""A trial: its point, what it reached epoch by epoch, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

LOWER_IS_BETTER = ("nll",)
Status = Literal["running", "finished", "stopped", "failed"]
PATIENCE = "patience"  # the reason of a trial that ended because it no longer gained


@dataclass(frozen=True)
class Trial:
    """One student of a search. `curve` holds validation's metrics after every epoch, the first at place 0."""

    number: int
    point: Mapping[str, Any]
    epochs: int  # of its whole training
    curve: tuple[Mapping[str, float], ...] = ()
    status: Status = "running"
    reason: str = ""
    steps: int = 0
    seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])  # start_seconds: until a process's first step
    epochs_before: int = 0  # of the stages before its last one, none of whose students it can stand for

    @property
    def has_ended(self) -> bool:
        return self.status != "running"

    def value(self, metric: str, epoch: int) -> float:
        """The metric after an epoch, counted from 1, so that more is better; what is not a number is worst."""
        value = self.curve[epoch - 1][metric]
        if not math.isfinite(value):
            return -math.inf
        return -value if metric in LOWER_IS_BETTER else value

    def values(self, metric: str) -> list[float]:
        """`value` after each epoch so far."""
        return [self.value(metric, epoch + 1) for epoch in range(len(self.curve))]

    def order(self, metric: str, epoch: int) -> tuple[float, float, int]:
        """What trials are compared by after an epoch: the metric, then the lower NLL, then the earlier trial.

        While students answer as chance does, their accuracies are equal and say nothing; NLL already tells them apart.
        """
        return self.value(metric, epoch), self.value("nll", epoch), -self.number

    def chosen_epoch(self, metric: str, choose: str) -> int | None:
        """The epoch whose student the trial stands for, as `train.choose` says: the first best, or the last.

        Of stages that is one of the last stage, as far as the trial came.
        """
        before = self.epochs_before if len(self.curve) > self.epochs_before else 0
        values = self.values(metric)[before:]
        if not values:
            return None
        return before + (len(values) if choose == "last" else values.index(max(values)) + 1)

    def record(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return asdict(self)


def trial_of(record: Mapping[str, Any]) -> Trial:
    """The trial of a record."""
    return Trial(**{**record, "curve": tuple(record["curve"])})


def winner(trials: Sequence[Trial], metric: str, choose: str) -> Trial | None:
    """The best trial: of those that trained to their end, or until they no longer gained; of the others without any.

    They are compared by `Trial.order` at the epoch whose student each stands for. None when no trial reached anything.
    """
    reached = [trial for trial in trials if trial.curve and trial.status != "failed"]
    ended = [trial for trial in reached if trial.status == "finished" or trial.reason == PATIENCE]

    def rank(trial: Trial) -> tuple[float, float, int]:
        epoch = trial.chosen_epoch(metric, choose)
        assert epoch is not None
        return trial.order(metric, epoch)

    return max(ended or reached, key=rank, default=None)


def commonest_reason(trials: Sequence[Trial]) -> str:
    """Why trials failed: the reason that most of them have, the earliest of equally common ones."""
    reasons = [trial.reason for trial in trials if trial.status == "failed"]
    return max(reasons, key=reasons.count)
