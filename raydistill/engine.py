"""DeepSpeed and nothing but: its configuration, one optimiser step, and the state that a checkpoint holds.

Weights stay in float32 and the forward pass is autocast, at every ZeRO stage. A checkpoint holds the full float32
weights and Adam moments by parameter name, so that it does not depend on the number of workers or the ZeRO stage, and
is safetensors, not a pickle.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from raydistill.adapters import belongs_to
from raydistill.config.training import Training

MOMENTS = ("exp_avg", "exp_avg_sq")
AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


def deepspeed_config(settings: Training, precision: str) -> dict[str, Any]:
    """DeepSpeed's dictionary for these settings."""
    zero: dict[str, Any] = {"stage": settings.deepspeed.zero_stage}
    if settings.deepspeed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # read for logging only: batches are made by the loader
        "gradient_accumulation_steps": settings.accumulation,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": settings.clip if _deepspeed_clips(settings, precision) else 0.0,
    }
    if precision in AUTOCAST:
        config["torch_autocast"] = {"enabled": True, "dtype": AUTOCAST[precision]}
    return config


def _deepspeed_clips(settings: Training, precision: str) -> bool:
    """At stage 0 DeepSpeed clips without telling the norm, so the engine clips, unless gradients are scaled (fp16)."""
    return settings.deepspeed.zero_stage > 0 or precision == "fp16"


class Engine:
    """A model under DeepSpeed.

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
        deepspeed = _import_deepspeed()
        self._settings, self._stage = settings, settings.deepspeed.zero_stage
        self._clips = not _deepspeed_clips(settings, precision)
        self._world = dist.get_world_size()
        self.module = model.to(device)
        self.device = device
        self.names = {name: p for name, p in model.named_parameters() if name not in frozen}
        self._frozen = frozenset(frozen)
        groups = parameter_groups(model, settings.weight_decay, thaws)
        thawing = {name: step for name, step in (thaws or {}).items() if step > 0}
        self._thawing = {name: step for name, step in thawing.items() if self.names[name].requires_grad}
        self._group_thaws = [group.pop("thaw") for group in groups]
        optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
        self._engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=deepspeed_config(settings, precision)
        )
        self._grad_norm = 0.0
        self._start_optimizer(0)
        self._train_what_is_due(0)

    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """float32 logits of a batch, with gradient."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """float32 logits of a batch, and what else a model that answers with a tuple has to say, with gradient."""
        output = self._engine(**{name: value.to(self.device) for name, value in inputs.items()})
        if isinstance(output, tuple):
            return output[0].float(), output[1:]
        return output.logits.float(), ()

    def backward(self, loss_sum: torch.Tensor, global_rows: int) -> None:
        """Adds the gradient of loss_sum / global_rows, the mean over the global batch.

        DeepSpeed averages over ranks and divides by the accumulation steps; both are undone here, so that the step's
        gradient is the sum over all micro-batches divided once by the global count.
        """
        self._engine.backward(loss_sum * (self._world * self._settings.accumulation / global_rows))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def begin_step(self, step: int) -> None:
        """To be called before the first forward of every step, counted from 0: thaws what trains from this one on."""
        if step not in self._thawing.values():
            return
        self._train_what_is_due(step)
        for part, thaw in self._optimizer_parts():
            if thaw == step:  # its moments are zero still, of no gradient
                self._base_optimizer().state[part]["step"].zero_()

    def _train_what_is_due(self, step: int) -> None:
        """Switches gradients on for what trains in this step and off for what thaws after it.

        DeepSpeed is set up with all of them on, because it looks after no parameter that it found frozen.
        """
        self._thawed_at = step
        for name, thaw in self._thawing.items():
            self.names[name].requires_grad_(thaw <= step)

    @contextlib.contextmanager
    def _all_trained(self) -> Iterator[None]:
        """With every gradient on: stage 3 gives and takes no state of a parameter that it finds frozen."""
        for name in self._thawing:
            self.names[name].requires_grad_(True)
        yield
        self._train_what_is_due(self._thawed_at)

    def step(self, learning_rate: float) -> None:
        """Clips and takes the optimiser step at this learning rate, after the last micro-batch."""
        # Under ZeRO what is frozen has a gradient of zeros, so that its learning rate is what keeps it as it is.
        for group, thaw in zip(self._engine.optimizer.param_groups, self._group_thaws, strict=True):
            group["lr"] = learning_rate if thaw <= self._thawed_at else 0.0
        if self._clips:
            norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._settings.clip)
            self._grad_norm = norm
        self._engine.step()

    @property
    def grad_norm(self) -> float:
        """The global gradient norm of the last step, before clipping."""
        return float(self._grad_norm if self._clips else self._engine.get_global_grad_norm() or 0.0)

    @property
    def trained_parameters(self) -> int:
        """How many numbers train in this step."""
        return sum(_shape(p).numel() for p in self.names.values() if p.requires_grad)

    @contextlib.contextmanager
    def evaluation(self) -> Any:
        self._engine.eval()
        with torch.no_grad():
            yield
        self._engine.train()

    def weights(self) -> dict[str, torch.Tensor]:
        """Full float32 weights by name, without the frozen ones, on the CPU. Collective: every rank gets them."""
        tied = {id(p): name for name, p in self.names.items()}
        with self._all_trained():
            full = {
                name: self._full(parameter).detach().to("cpu", torch.float32).clone()
                for name, parameter in self.names.items()
            }
        for name, value in self.module.state_dict(keep_vars=True).items():
            if name not in full and not belongs_to(name, self._frozen):
                full[name] = full[tied[id(value)]] if id(value) in tied else value.detach().cpu().clone()
        return full

    def _full(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        value = None if self._stage == 0 else safe_get_full_fp32_param(parameter)
        return parameter if value is None else value.reshape(_shape(parameter))

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Full Adam moments as "exp_avg.<parameter>" and so on, on the CPU. Collective."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[str, torch.Tensor] = {}
        with self._all_trained():
            for name, parameter in self.names.items():
                for moment in MOMENTS:
                    if self._stage == 0:
                        value = self._engine.optimizer.state[parameter][moment]
                    else:
                        part = safe_get_full_optimizer_state(parameter, moment)
                        assert part is not None, f"DeepSpeed gives no {moment} of {name}"
                        value = part.reshape(_shape(parameter))
                    state[f"{moment}.{name}"] = value.detach().to("cpu", torch.float32).clone()
        return state

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
        optimizer, base = self._engine.optimizer, self._base_optimizer()
        for part, thaw in self._optimizer_parts():
            moments = {moment: torch.zeros_like(part, dtype=torch.float32) for moment in MOMENTS}
            base.state[part] = {"step": torch.tensor(float(max(0, steps - thaw)), device=part.device), **moments}
        if self._stage in (1, 2):
            # Links each parameter to its part of the flat state. DeepSpeed 0.19 does it after the first step of the
            # first parameter group, when the second has no state yet, so that it could not be read later.
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def _optimizer_parts(self) -> list[tuple[torch.Tensor, int]]:
        """What Adam has its state of, parameters or flat parts of them, with the step from which each trains."""
        if self._stage == 3:
            # Stage 3 takes the parameters out of the groups and puts one flat part in while it steps.
            optimizer = self._engine.optimizer
            groups = optimizer.sub_group_to_group_id
            flat = optimizer.fp32_partitioned_groups_flat
            return [(part, self._group_thaws[groups[number]]) for number, part in enumerate(flat)]
        groups = zip(self._base_optimizer().param_groups, self._group_thaws, strict=True)
        return [(parameter, thaw) for group, thaw in groups for parameter in group["params"]]

    def _set_moment(self, parameter: torch.nn.Parameter, moment: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage == 0:
            self._engine.optimizer.state[parameter][moment].copy_(value)
        elif self._stage < 3:
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            # DeepSpeed 0.19's own full setter forgets the padding of sizes that the ranks do not divide.
            width = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = torch.zeros(width * self._world, device=value.device)
            padded[: value.numel()] = value.flatten()
            safe_set_local_optimizer_state(parameter, padded[dist.get_rank() * width :][:width], moment)

    def _base_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return optimizer if self._stage == 0 else optimizer.optimizer

    def close(self) -> None:
        self._engine.destroy()


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


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _import_deepspeed() -> Any:
    """DeepSpeed, quiet, and kept from compiling its CPU communication op, which takes a minute and serves inference."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
    if "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False
    return deepspeed
