"""DeepSpeed and nothing but: its configuration, one optimiser step, and the state that a checkpoint holds.

Weights stay in float32 and the forward pass is autocast, at every ZeRO stage. A checkpoint holds the full float32
weights and Adam moments by parameter name, so that it does not depend on the number of workers or the ZeRO stage, and
is safetensors, not a pickle.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection
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
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: Training,
        *,
        precision: str,
        device: torch.device,
        frozen: Collection[str] = (),
    ) -> None:
        deepspeed = _import_deepspeed()
        self._settings, self._stage = settings, settings.deepspeed.zero_stage
        self._clips = not _deepspeed_clips(settings, precision)
        self._world = dist.get_world_size()
        self.module = model.to(device)
        self.device = device
        self.names = {name: p for name, p in model.named_parameters() if name not in frozen}
        self._frozen = frozenset(frozen)
        optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=0.0, fused=True)
        self._engine, *_ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=deepspeed_config(settings, precision)
        )
        self._grad_norm = 0.0
        self._start_optimizer(0)

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

    def step(self, learning_rate: float) -> None:
        """Clips and takes the optimiser step at this learning rate, after the last micro-batch."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._clips:
            norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._settings.clip)
            self._grad_norm = norm
        self._engine.step()

    @property
    def grad_norm(self) -> float:
        """The global gradient norm of the last step, before clipping."""
        return float(self._grad_norm if self._clips else self._engine.get_global_grad_norm() or 0.0)

    @contextlib.contextmanager
    def evaluation(self) -> Any:
        self._engine.eval()
        with torch.no_grad():
            yield
        self._engine.train()

    def weights(self) -> dict[str, torch.Tensor]:
        """Full float32 weights by name, without the frozen ones, on the CPU. Collective: every rank gets them."""
        tied = {id(p): name for name, p in self.names.items()}
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
        for name, parameter in self.names.items():
            for moment in MOMENTS:
                self._set_moment(parameter, moment, state[f"{moment}.{name}"].to(self.device))

    def _start_optimizer(self, steps: int) -> None:
        """Gives every parameter, used or not, Adam moments of zero after `steps` steps."""
        optimizer, base = self._engine.optimizer, self._base_optimizer()
        # Stage 3 takes the parameters out of the groups and puts one flat part in while it steps.
        flat = [p for group in base.param_groups for p in group["params"]]
        for parameter in optimizer.fp32_partitioned_groups_flat if self._stage == 3 else flat:
            moments = {moment: torch.zeros_like(parameter, dtype=torch.float32) for moment in MOMENTS}
            base.state[parameter] = {"step": torch.tensor(float(steps), device=parameter.device), **moments}
        if self._stage in (1, 2):
            # Links each parameter to its part of the flat state. DeepSpeed 0.19 does it after the first step of the
            # first parameter group, when the second has no state yet, so that it could not be read later.
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

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


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay; biases and norms, which have one dimension, without. What is frozen is in neither."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
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
