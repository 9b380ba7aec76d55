"""Watches the distillation loss while it trains, and warns of a spike or a drift once for each episode.

What it knows is a function of the points of the curves, so that a training that goes on after a stop warns as if it had
not been stopped. Medians and median absolute deviations (MAD) are used because neither follows a few odd values.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raydistill.losses.objective import Objective
from raydistill.losses.token_objective import TokenObjective

# A spike: a step whose loss is this many times the usual largest step between two points, and this many deviations of
# the logarithm off, because rows' losses scatter by factors.
SPIKE_RATIO, SPIKE_DEVIATIONS, SPIKE_WINDOW, SPIKE_FEWEST = 3.0, 8.0, 32, 12
# A drift: the median of the last points stands this far above the lowest median of as many and more points before.
DRIFT_RATIO, DRIFT_DEVIATIONS, DRIFT_WINDOW, DRIFT_RECENT = 1.5, 5.0, 16, 8
DRIFT_OVER = 1.2  # times that lowest median: the episode has ended
# Training goes its own way: it rises by this much while its ratio to validation's KL grows by that much.
APART_RISE, APART_RATIO, APART_FEWEST = 1.3, 2.0, 3
FLOOR = 0.01  # nats: a smaller loss, whatever it does, teaches next to nothing
SMALLEST = 1e-12  # rounding may leave a loss at 0 or just below it
DEVIATION = 1.4826  # a normal distribution's standard deviation over its MAD


@dataclass(frozen=True)
class Alarm:
    """What was found: which kind (spike, drift, apart), of which term, at which step, its value and the usual one."""

    kind: str
    term: str
    at: int
    value: float
    usual: float
    text: str


def watched_part(objective: Objective | TokenObjective) -> str | None:
    """The part of the loss that is watched: the response loss, or else the first of the features; None without."""
    return objective.part_names[1] if len(objective.part_names) > 1 else None


class Watch:
    """Follows one term of the loss, by its name in the curves, from point to point.

    `settings` is what an alarm says of the settings that may be the cause. Without `steady` the term's own meaning
    changes over the training (a temperature with a course), so that its rise tells nothing; a spike still does.
    """

    def __init__(self, term: str, settings: str, *, steady: bool = True) -> None:
        self._term, self._settings, self._steady = term, settings, steady
        self._peaks: deque[float] = deque(maxlen=SPIKE_WINDOW)  # logarithms
        self._recent: deque[float] = deque(maxlen=DRIFT_RECENT)
        self._before: deque[float] = deque(maxlen=DRIFT_WINDOW)  # the points before the recent ones
        self._lowest: tuple[float, float] | None = None  # the lowest median so far and its deviation
        self._since_validation: list[float] = []
        self._courses: list[tuple[float, float]] = []  # at each validation: training's median, and validation's KL
        self._active: set[str] = set()

    def add(self, point: dict[str, Any]) -> list[Alarm]:
        """Takes a point of the curves; what it gives reason to warn of now, and not before in the same episode."""
        found: list[Alarm | None] = []
        if point["group"] == "train" and self._term in point:
            self._since_validation.append(point[self._term])
            found = [self._spike(point), self._drift(point) if self._steady else None]
        elif point["group"] == "validation" and "kl" in point and self._steady:
            found = [self._apart(point)]
        return [alarm for alarm in found if alarm is not None]

    def _spike(self, point: dict[str, Any]) -> Alarm | None:
        value = point.get(f"{self._term}_max", point[self._term])
        step = point.get(f"{self._term}_max_step", point["step"])
        logarithm, deviation = _usual(self._peaks) if len(self._peaks) >= SPIKE_FEWEST else (math.inf, 0.0)
        self._peaks.append(math.log(max(value, SMALLEST)))
        usual = math.exp(logarithm)
        limit = max(usual * max(SPIKE_RATIO, math.exp(SPIKE_DEVIATIONS * deviation)), FLOOR)
        causes = "odd rows in that batch, a learning rate that is too high"
        return self._begin("spike", value > limit, step, value, usual, causes, value <= limit)

    def _drift(self, point: dict[str, Any]) -> Alarm | None:
        if len(self._recent) == DRIFT_RECENT:
            self._before.append(self._recent[0])
        self._recent.append(point[self._term])
        if len(self._before) == DRIFT_WINDOW:
            usual = _usual(self._before)
            self._lowest = usual if self._lowest is None else min(self._lowest, usual)
        if self._lowest is None:
            return None
        usual, deviation = self._lowest
        value = statistics.median(self._recent)
        limit = max(DRIFT_RATIO * usual + DRIFT_DEVIATIONS * deviation, FLOOR)
        causes = "a learning rate that is too high, a run of odd rows, a temperature that does not fit"
        return self._begin("drift", value > limit, point["step"], value, usual, causes, value <= DRIFT_OVER * usual)

    def _apart(self, point: dict[str, Any]) -> Alarm | None:
        """At a validation: whether training rose while validation did not."""
        if not self._since_validation:
            return None
        value, self._since_validation = statistics.median(self._since_validation), []
        before, kl = self._courses, max(point["kl"], 1e-9)
        self._courses = [*before, (value, kl)]
        if len(before) < APART_FEWEST:
            return None
        usual = min(median for median, _ in before)
        ratio = statistics.median(median / theirs for median, theirs in before)
        is_apart = value > max(APART_RISE * usual, FLOOR) and value / kl > APART_RATIO * ratio
        causes = "rows in train that are unlike validation's, a learning rate that is too high"
        return self._begin("apart", is_apart, point["step"], value, usual, causes, not is_apart)

    def _begin(
        self, kind: str, is_now: bool, step: int, value: float, usual: float, causes: str, is_over: bool
    ) -> Alarm | None:
        """The warning with which an episode begins; an episode that is over may begin again."""
        if kind in self._active:
            self._active -= {kind} if is_over else set()
            return None
        if not is_now:
            return None
        self._active.add(kind)
        what = {
            "spike": f"jumps to {value:.3g} at step {step:,}, where up to {usual:.3g} is usual",
            "drift": f"has risen to {value:.3g} by step {step:,}, from {usual:.3g} at its lowest",
            "apart": f"has risen to {value:.3g} by step {step:,}, from {usual:.3g}, and validation's KL has not",
        }[kind]
        text = f"{self._term} {what}. Likely causes: {causes}, too low a precision ({self._settings})"
        return Alarm(kind, self._term, step, value, usual, text)


def _usual(values: Sequence[float] | deque[float]) -> tuple[float, float]:
    """Median and deviation."""
    median = statistics.median(values)
    return median, DEVIATION * statistics.median(abs(value - median) for value in values)
