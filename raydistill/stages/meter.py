"""What a training measures between two points of its curves."""

from __future__ import annotations

import torch


class Meter:
    """Sums of the last steps (loss, its parts, rows), kept on the device so that no step waits for them."""

    ROWS = -1

    def __init__(self, parts: tuple[str, ...], device: torch.device) -> None:
        self._names = ("loss", *parts)
        self._device = device
        self._rows: list[torch.Tensor] = []
        self._step = torch.zeros(len(self._names) + 1, dtype=torch.float64, device=device)
        self._seconds = 0.0

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

    def means(self, sums: torch.Tensor) -> dict[str, float]:
        """Means per row over the steps: the loss and its parts."""
        totals = (sums.sum(dim=0) / sums[:, self.ROWS].sum()).tolist()
        return dict(zip(self._names, totals[: self.ROWS], strict=True))
