"""What a training measures between two points of its curves."""

from __future__ import annotations

import math

import torch


def broken_step(sums: torch.Tensor, step: int) -> int | None:
    """The first step whose sums are not finite, of those up to this one."""
    broken = (~torch.isfinite(sums).all(dim=1)).nonzero().flatten()
    return step - len(sums) + int(broken[0]) + 1 if len(broken) else None


class Meter:
    """Sums of the last steps (loss, its parts, rows), kept on the device so that no step waits for them."""

    ROWS = -1

    def __init__(self, parts: tuple[str, ...], device: torch.device) -> None:
        self._names = ("loss", *parts)
        self._device = device
        self._rows: list[torch.Tensor] = []
        self._step = torch.zeros(len(self._names) + 1, dtype=torch.float64, device=device)
        self._seconds = 0.0
        self._squares = torch.zeros(len(parts) + 1, dtype=torch.float64, device=device)

    @property
    def steps(self) -> int:
        return len(self._rows)

    def add(self, loss: torch.Tensor, parts: dict[str, torch.Tensor], rows: int) -> None:
        count = torch.tensor(float(rows), device=self._device)
        self._step += torch.stack([loss.float(), *(parts[name].float() for name in self._names[1:]), count])

    def end_step(self, seconds: float) -> None:
        self._rows.append(self._step)
        self._step = torch.zeros_like(self._step)
        self._seconds += seconds

    def take(self) -> tuple[torch.Tensor, float]:
        """The sums of each step since the last call, one row a step, and the seconds that they took."""
        sums, seconds = torch.stack(self._rows), self._seconds
        self._rows, self._seconds = [], 0.0
        return sums, seconds

    def add_gradients(self, squares_P: torch.Tensor, rows: int) -> None:
        """Adds a micro-batch's sums over rows of the parts' squared gradient norms, by `gradient_squares`."""
        count = torch.tensor([float(rows)], dtype=torch.float64, device=self._device)
        self._squares += torch.cat([squares_P.double(), count])

    def take_gradients(self) -> torch.Tensor:
        """The sums of `add_gradients` since the last call, and their rows."""
        squares, self._squares = self._squares, torch.zeros_like(self._squares)
        return squares

    def point(
        self, sums: torch.Tensor, squares: torch.Tensor, step: int, watched: str | None
    ) -> tuple[dict[str, float], dict[str, int]]:
        """A point of the curves, and what stands beside it, from what was taken up to this step."""
        values, notes = self.means(sums) | self.gradient_norms(squares), {}
        if watched:
            values[f"{watched}_max"], place = self.peak(sums, watched)
            notes[f"{watched}_max_step"] = step - len(sums) + place + 1
        return values, notes

    def speed(self, sums: torch.Tensor, seconds: float) -> float:
        """Rows per second."""
        return float(sums[:, self.ROWS].sum()) / max(seconds, 1e-9)

    def gradient_norms(self, squares: torch.Tensor) -> dict[str, float]:
        """A typical row's gradient norm (root of the mean square) by part; empty where no step was looked at."""
        *found, rows = squares.tolist()
        names = [f"grad_norm/{name}" for name in self._names[1:]]
        return {n: math.sqrt(s / rows) for n, s in zip(names, found, strict=True)} if rows else {}

    def peak(self, sums: torch.Tensor, part: str) -> tuple[float, int]:
        """The largest of the steps' means of a part, and which step it is of, counted from 0."""
        means = sums[:, self._names.index(part)] / sums[:, self.ROWS].clamp(min=1)
        return float(means.max()), int(means.argmax())

    def means(self, sums: torch.Tensor) -> dict[str, float]:
        """Means per row over the steps: the loss and its parts."""
        totals = (sums.sum(dim=0) / sums[:, self.ROWS].sum()).tolist()
        return dict(zip(self._names, totals[: self.ROWS], strict=True))
