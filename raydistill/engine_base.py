"""What an engine is, whether DeepSpeed takes its steps or one process does: which parameters train at a step, forward
passes, and the state that a checkpoint holds.

A checkpoint has the full float32 weights and Adam moments by parameter name, so that it does not depend on who trains.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from raydistill.config.training import Training

MOMENTS = ("exp_avg", "exp_avg_sq")
AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


class EngineBase(ABC):
    """A model, its AdamW and its gradient.

    `frozen` names parameters that never train and that no checkpoint holds, because they come with the model.
    `thaws` gives, of parameters that do not train from the start, the step, counted from 0, from which they do. Until
    then no gradient is computed for them and they keep their bytes; their Adam state begins there.
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
        self._settings = settings
        self.module = model.to(device)
        self.device = device
        self.names = {name: p for name, p in model.named_parameters() if name not in frozen}
        self._frozen = frozenset(frozen)
        groups = parameter_groups(model, settings.weight_decay, thaws)
        self._thawing = {name: s for name, s in (thaws or {}).items() if s > 0 and self.names[name].requires_grad}
        self._group_thaws = [group.pop("thaw") for group in groups]
        self._model: Any = self._take_over(torch.optim.AdamW(groups, lr=0.0, fused=True), precision)
        self._start_optimizer(0)
        self._train_what_is_due(0)

    @abstractmethod
    def _take_over(self, optimizer: torch.optim.Optimizer, precision: str) -> Any:
        """Makes everything ready for steps of this optimiser; what is called for a forward pass."""

    @abstractmethod
    def backward(self, loss_sum: torch.Tensor, global_rows: int) -> None:
        """Adds the gradient of loss_sum / global_rows, the mean over the global batch."""

    @abstractmethod
    def step(self, learning_rate: float) -> None:
        """Clips and takes the optimiser step at this learning rate, after the last micro-batch."""

    @property
    @abstractmethod
    def grad_norm(self) -> float:
        """The global gradient norm of the last step, before clipping."""

    @abstractmethod
    def weights(self) -> dict[str, torch.Tensor]:
        """Full float32 weights by name, without the frozen ones, on the CPU. Collective: every rank gets them."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of what is held beside the model."""

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 logits of a batch, with gradient."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """float32 logits of a batch, and what else a model that answers with a tuple has to say, with gradient."""
        output = self.call(**{name: value.to(self.device) for name, value in inputs.items()})
        if isinstance(output, tuple):
            return output[0].float(), output[1:]
        return output.logits.float(), ()

    def call(self, **arguments: Any) -> Any:
        """What the model answers to arguments that are on its device, with gradient."""
        with self._casting():
            return self._model(**arguments)

    def _casting(self) -> contextlib.AbstractContextManager[Any]:
        """What a forward pass stands in."""
        return contextlib.nullcontext()

    def begin_step(self, step: int) -> None:
        """To be called before the first forward of every step, counted from 0: thaws what trains from this one on."""
        if step not in self._thawing.values():
            return
        self._train_what_is_due(step)
        for part, thaw in self._optimizer_parts():
            if thaw == step:  # its moments are zero still, of no gradient
                self._adam().state[part]["step"].zero_()

    def _train_what_is_due(self, step: int) -> None:
        """Switches gradients on for what trains in this step and off for what thaws after it."""
        self._thawed_at = step
        for name, thaw in self._thawing.items():
            self.names[name].requires_grad_(thaw <= step)

    @contextlib.contextmanager
    def _all_trained(self) -> Iterator[None]:
        """With every gradient on: ZeRO-3 gives and takes no state of a parameter that it finds frozen."""
        for name in self._thawing:
            self.names[name].requires_grad_(True)
        yield
        self._train_what_is_due(self._thawed_at)

    @property
    def trained_parameters(self) -> int:
        """How many numbers train in this step."""
        return sum(shape_of(p).numel() for p in self.names.values() if p.requires_grad)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Without dropout and gradients."""
        self._model.eval()
        with torch.no_grad():
            yield
        self._model.train()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Full Adam moments as "exp_avg.<parameter>" and so on, on the CPU. Collective."""
        with self._all_trained():
            return {
                f"{moment}.{name}": self._moment(name, moment).detach().to("cpu", torch.float32).clone()
                for name in self.names
                for moment in MOMENTS
            }

    def restore_optimizer(self, state: dict[str, torch.Tensor], steps: int) -> None:
        """Puts back the Adam moments after `steps` optimiser steps. Collective; the weights come with the model."""
        self._start_optimizer(steps)
        self._thawed_at = steps
        with self._all_trained():
            for name, parameter in self.names.items():
                for moment in MOMENTS:
                    self._set_moment(parameter, moment, state[f"{moment}.{name}"].to(self.device))

    def _start_optimizer(self, steps: int) -> None:
        """Gives every parameter, used or not, Adam moments of zero after `steps` steps, of which it took part in some.

        Those are the steps since it thawed.
        """
        for part, thaw in self._optimizer_parts():
            moments = {moment: torch.zeros_like(part, dtype=torch.float32) for moment in MOMENTS}
            taken = torch.tensor(float(max(0, steps - thaw)), device=part.device)
            self._adam().state[part] = {"step": taken, **moments}

    def _optimizer_parts(self) -> list[tuple[torch.Tensor, int]]:
        """What Adam has its state of, with the step from which each trains."""
        groups = zip(self._adam().param_groups, self._group_thaws, strict=True)
        return [(parameter, thaw) for group, thaw in groups for parameter in group["params"]]

    @abstractmethod
    def _adam(self) -> torch.optim.Optimizer:
        """The optimiser that holds the moments."""

    def _moment(self, name: str, moment: str) -> torch.Tensor:
        return self._adam().state[self.names[name]][moment]

    def _set_moment(self, parameter: torch.nn.Parameter, moment: str, value: torch.Tensor) -> None:
        self._adam().state[parameter][moment].copy_(value)


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, thaws: Mapping[str, int] | None = None
) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases and norms, which have one dimension, without. What is frozen is in neither.

    What begins to train together is in groups of its own, whose "thaw" is the step of `thaws`.
    """
    trained = [(p, (thaws or {}).get(name, 0)) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for thaw in sorted({thaw for _, thaw in trained}):
        parts = [p for p, its_thaw in trained if its_thaw == thaw]
        matrices, others = [p for p in parts if p.ndim > 1], [p for p in parts if p.ndim <= 1]
        groups.append({"params": matrices, "weight_decay": weight_decay, "thaw": thaw})
        groups.append({"params": others, "weight_decay": 0.0, "thaw": thaw})
    return [group for group in groups if group["params"]]  # ZeRO cannot flatten an empty one


def shape_of(parameter: torch.nn.Parameter) -> torch.Size:
    """The whole shape of a parameter, of which ZeRO-3 may hold a part here."""
    return getattr(parameter, "ds_shape", parameter.shape)
