"""The optimiser step of a training in one process: the engine's interface and its numbers, without DeepSpeed.

DeepSpeed spreads a training over processes; where there is one, its start costs more than a small student's epoch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

import torch

from raydistill.adapters import belongs_to
from raydistill.config.training import Training
from raydistill.engine import AUTOCAST, MOMENTS, parameter_groups


class PlainEngine:
    """A model, its AdamW and its gradient; `frozen` and `thaws` as in Engine.

    fp16, whose gradients must be scaled, is DeepSpeed's alone.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: Training,
        *,
        precision: str,
        device: torch.device,
        frozen: Collection[str] = (),
        thaws: Mapping[str, int] | None = None,
    ) -> None:
        assert precision != "fp16", "the search refuses fp16 before any trial"
        self._settings = settings
        self.module = model.to(device)
        self.device = device
        self.names = {name: p for name, p in model.named_parameters() if name not in frozen}
        self._frozen = frozenset(frozen)
        groups = parameter_groups(model, settings.weight_decay, thaws)
        self._thawing = {name: s for name, s in (thaws or {}).items() if s > 0 and self.names[name].requires_grad}
        self._group_thaws = [group.pop("thaw") for group in groups]
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        self._dtype = getattr(torch, AUTOCAST[precision]) if precision in AUTOCAST else None
        self._grad_norm: torch.Tensor | float = 0.0
        self._start_optimizer(0)
        self._train_what_is_due(0)

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 logits of a batch, with gradient."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """float32 logits of a batch, and what else a model that answers with a tuple has to say, with gradient."""
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None):
            output = self.module(**{name: value.to(self.device) for name, value in inputs.items()})
        if isinstance(output, tuple):
            return output[0].float(), output[1:]
        return output.logits.float(), ()

    def backward(self, loss_sum: torch.Tensor, global_rows: int) -> None:
        """Adds the gradient of loss_sum / global_rows, the mean over the global batch."""
        (loss_sum * (1 / global_rows)).backward()

    def begin_step(self, step: int) -> None:
        """To be called before the first forward of every step, counted from 0: thaws what trains from this one on.

        What had no gradient took part in no step, so that its Adam state begins there by itself.
        """
        if step in self._thawing.values():
            self._train_what_is_due(step)

    def _train_what_is_due(self, step: int) -> None:
        for name, thaw in self._thawing.items():
            self.names[name].requires_grad_(thaw <= step)

    def step(self, learning_rate: float) -> None:
        """Clips and takes the optimiser step at this learning rate, after the last micro-batch."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._grad_norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def grad_norm(self) -> float:
        """The gradient norm of the last step, before clipping."""
        return float(self._grad_norm)

    @property
    def trained_parameters(self) -> int:
        """How many numbers train in this step."""
        return sum(p.numel() for p in self.names.values() if p.requires_grad)

    @contextlib.contextmanager
    def evaluation(self) -> Any:
        self.module.eval()
        with torch.no_grad():
            yield
        self.module.train()

    def weights(self) -> dict[str, torch.Tensor]:
        """float32 weights by name, without the frozen ones, on the CPU."""
        found: dict[str, torch.Tensor] = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            if name in self.names or not belongs_to(name, self._frozen):
                found[name] = value.detach().to("cpu", torch.float32 if name in self.names else value.dtype).clone()
        return found

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Adam moments as "exp_avg.<parameter>" and so on, on the CPU."""
        return {
            f"{moment}.{name}": self._optimizer.state[parameter][moment].detach().to("cpu", torch.float32).clone()
            for name, parameter in self.names.items()
            for moment in MOMENTS
        }

    def restore_optimizer(self, state: dict[str, torch.Tensor], steps: int) -> None:
        """Puts back the Adam moments after `steps` optimiser steps; the weights come with the model."""
        self._start_optimizer(steps)
        self._train_what_is_due(steps)
        for name, parameter in self.names.items():
            for moment in MOMENTS:
                self._optimizer.state[parameter][moment].copy_(state[f"{moment}.{name}"].to(self.device))

    def _start_optimizer(self, steps: int) -> None:
        """Gives every parameter, used or not, Adam moments of zero after the steps since it thawed."""
        for group, thaw in zip(self._optimizer.param_groups, self._group_thaws, strict=True):
            taken = float(max(0, steps - thaw))
            for parameter in group["params"]:
                moments = {moment: torch.zeros_like(parameter, dtype=torch.float32) for moment in MOMENTS}
                self._optimizer.state[parameter] = {"step": torch.tensor(taken, device=parameter.device), **moments}

    def close(self) -> None:
        """Nothing is held beside the model."""
