"""The optimiser step of a training in one process: the engine's interface and its numbers, without DeepSpeed.

DeepSpeed spreads a training over processes; where there is one, its start costs more than a small student's epoch.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from raydistill.adapters import belongs_to
from raydistill.engine_base import AUTOCAST, EngineBase


class PlainEngine(EngineBase):
    """A model in one process. fp16, whose gradients must be scaled, is DeepSpeed's alone."""

    def _take_over(self, optimizer: torch.optim.Optimizer, precision: str) -> Any:
        assert precision != "fp16", "the search refuses fp16 before any trial"
        self._optimizer = optimizer
        self._dtype = getattr(torch, AUTOCAST[precision]) if precision in AUTOCAST else None
        self._grad_norm: torch.Tensor | float = 0.0
        return self.module

    def _casting(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None)

    def backward(self, loss_sum: torch.Tensor, global_rows: int) -> None:
        (loss_sum * (1 / global_rows)).backward()

    def step(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._grad_norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def grad_norm(self) -> float:
        return float(self._grad_norm)

    def weights(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            if name in self.names or not belongs_to(name, self._frozen):
                found[name] = value.detach().to("cpu", torch.float32 if name in self.names else value.dtype).clone()
        return found

    def _adam(self) -> torch.optim.Optimizer:
        return self._optimizer

    def close(self) -> None:
        """Nothing is held beside the model."""
