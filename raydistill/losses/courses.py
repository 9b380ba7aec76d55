"""Weights and temperatures that change from the first step of a training to its last.

At a high temperature the student sees first which classes the teacher holds for alike; as the temperature falls, the
targets come to be the teacher's own probabilities. In Annealing KD (Jafari et al. 2021, arXiv:2104.07163, section 3)
the teacher's logits are scaled by a factor that rises to 1 while the temperature falls to 1, and matched by squares.
Here the temperature of any response loss may change, on both sides' logits, and the loss's share too.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Course:
    """A value that goes from `start`, at the first step, to `end`, at the last: in a line, or along half a cosine."""

    start: float
    end: float
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, step: int, total: int) -> float:
        """The value of a step counted from 0, of `total` steps; a training of one step has the start."""
        done = step / max(1, total - 1)
        if self.shape == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        low, high = sorted((self.start, self.end))
        return min(max((1 - done) * self.start + done * self.end, low), high)  # which rounding may leave
