"""DeepSpeed and nothing but: its configuration, one optimiser step, and the state that a checkpoint holds.

Weights stay in float32 and the forward pass is autocast, at every ZeRO stage. A checkpoint does not depend on the
number of workers or the ZeRO stage, and is safetensors, not a pickle.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

from raydistill.adapters import belongs_to
from raydistill.config.training import Training
from raydistill.engine_base import AUTOCAST, EngineBase, shape_of


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


class Engine(EngineBase):
    """A model under DeepSpeed."""

    def _take_over(self, optimizer: torch.optim.Optimizer, precision: str) -> Any:
        """Sets DeepSpeed up with every gradient on, because it looks after no parameter that it found frozen."""
        deepspeed = _import_deepspeed()
        self._stage = self._settings.deepspeed.zero_stage
        self._clips = not _deepspeed_clips(self._settings, precision)
        self._world = dist.get_world_size()
        self._engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=deepspeed_config(self._settings, precision)
        )
        self._grad_norm = 0.0
        return self._engine

    def backward(self, loss_sum: torch.Tensor, global_rows: int) -> None:
        """Adds the gradient of loss_sum / global_rows, the mean over the global batch.

        DeepSpeed averages over ranks and divides by the accumulation steps; both are undone here, so that the step's
        gradient is the sum over all micro-batches divided once by the global count.
        """
        self._engine.backward(loss_sum * (self._world * self._settings.accumulation / global_rows))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, learning_rate: float) -> None:
        # Under ZeRO what is frozen has a gradient of zeros, so that its learning rate is what keeps it as it is.
        for group, thaw in zip(self._engine.optimizer.param_groups, self._group_thaws, strict=True):
            group["lr"] = learning_rate if thaw <= self._thawed_at else 0.0
        if self._clips:
            norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._settings.clip)
            self._grad_norm = norm
        self._engine.step()

    @property
    def grad_norm(self) -> float:
        return float(self._grad_norm if self._clips else self._engine.get_global_grad_norm() or 0.0)

    def weights(self) -> dict[str, torch.Tensor]:
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
        return parameter if value is None else value.reshape(shape_of(parameter))

    def _start_optimizer(self, steps: int) -> None:
        super()._start_optimizer(steps)
        optimizer = self._engine.optimizer
        if self._stage in (1, 2):
            # Links each parameter to its part of the flat state. DeepSpeed 0.19 does it after the first step of the
            # first parameter group, when the second has no state yet, so that it could not be read later.
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

    def _optimizer_parts(self) -> list[tuple[torch.Tensor, int]]:
        """What Adam has its state of, parameters or flat parts of them, with the step from which each trains."""
        if self._stage < 3:
            return super()._optimizer_parts()
        # Stage 3 takes the parameters out of the groups and puts one flat part in while it steps.
        optimizer = self._engine.optimizer
        groups, flat = optimizer.sub_group_to_group_id, optimizer.fp32_partitioned_groups_flat
        return [(part, self._group_thaws[groups[number]]) for number, part in enumerate(flat)]

    def _moment(self, name: str, moment: str) -> torch.Tensor:
        if self._stage == 0:
            return super()._moment(name, moment)
        from deepspeed.utils import safe_get_full_optimizer_state

        part = safe_get_full_optimizer_state(self.names[name], moment)
        assert part is not None, f"DeepSpeed gives no {moment} of {name}"
        return part.reshape(shape_of(self.names[name]))

    def _set_moment(self, parameter: torch.nn.Parameter, moment: str, value: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self._stage == 0:
            super()._set_moment(parameter, moment, value)
        elif self._stage < 3:
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            # DeepSpeed 0.19's own full setter forgets the padding of sizes that the ranks do not divide.
            width = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            padded = torch.zeros(width * self._world, device=value.device)
            padded[: value.numel()] = value.flatten()
            safe_set_local_optimizer_state(parameter, padded[dist.get_rank() * width :][:width], moment)

    def _adam(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        return optimizer if self._stage == 0 else optimizer.optimizer

    def close(self) -> None:
        self._engine.destroy()


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
