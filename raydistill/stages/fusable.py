"""Which trainings can be one stacked model, and why others cannot. It knows settings alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raydistill.config.run import Config
from raydistill.config.training import DeepSpeed, Training
from raydistill.fused.architectures import ARCHITECTURES
from raydistill.models.configuration import Shape
from raydistill.stages.steps import EAGER_LENGTH

# Settings of `train` that each member may have its own of.
OWN = ("learning_rate", "schedule", "warmup", "weight_decay", "clip", "seed", "loss")
# Settings that a stack follows as the ordinary training does; any other, an older or a newer one, must be at its
# default.
FOLLOWED = (
    *OWN, "epochs", "batch_size", "precision", "metric", "choose", "patience", "checkpoint_every", "log_every",
    "cpus_per_worker", "max_failures", "group_by_length",
)  # fmt: skip

# Units of the widest student that benchmarks/fused.py measured, 1.9 times as fast in a stack of 8 (docs/log.md). A
# stack takes the memory of all its members.
WIDEST = 768


def why_not_fused(config: Config, model_type: str) -> str | None:
    """Why this training cannot be a member of a stack, naming the setting; None where it can.

    model_type is the student's, as `students.build.student_shape` has it.
    """
    train, defaults = config.train, type(config.train).model_fields
    if model_type not in ARCHITECTURES:
        return f"student: a model of the type {model_type} cannot be stacked, only {', '.join(ARCHITECTURES)}"
    if config.student.lora is not None:
        return "student.lora: adapters cannot be stacked"
    if train.loss.features:
        return "train.loss.features: losses on features cannot be stacked"
    for name, field in defaults.items():
        if name not in FOLLOWED and getattr(train, name) != field.default:
            return f"train.{name}: fused trials take it at its default ({_shown(field.default)}) alone"
    if train.precision == "fp16":
        return "train.precision: fp16 scales its loss, which stacked models do not; use bf16 or fp32"
    if config.data.max_length > EAGER_LENGTH:
        return f"data.max_length: rows of more than {EAGER_LENGTH} tokens are faster alone"
    return None


def why_separate(config: Config, shape: Shape, asked: bool | str) -> str | None:
    """Why a trial is trained alone: it cannot be fused or, where auto is asked for, is wider than is known to gain."""
    reason = why_not_fused(config, shape.model_type)
    if reason is None and asked == "auto" and shape.width > WIDEST:
        return f"student: {shape.width} units, and stacks were found faster up to {WIDEST}; tune.fused=true tries it"
    return reason


def why_not_together(configs: Sequence[Config]) -> str | None:
    """Why these trainings, each of which can be fused, cannot be one stack: the first setting that differs."""
    first = _shared(configs[0])
    for config in configs[1:]:
        for name, value in _shared(config).items():
            if value != first[name]:
                return f"{name}: {_shown(value)} differs from {_shown(first[name])}; fused trials share it"
    return None


def _shared(config: Config) -> dict[str, Any]:
    """The settings that members have in common, by their dotted names."""
    found: dict[str, Any] = {}
    for section, names in (("data", None), ("teacher", None), ("student", None), ("train", Training.model_fields)):
        part = getattr(config, section)
        for name in names or type(part).model_fields:
            if section != "train" or name not in OWN:
                found[f"{section}.{name}"] = getattr(part, name)
    return found | {"task": config.task}


def _shown(value: Any) -> str:
    if value is None:
        return "absent"
    return "its own" if isinstance(value, DeepSpeed) else str(value)
