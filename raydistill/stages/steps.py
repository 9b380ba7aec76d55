"""What a step of a training is given and judged by, whether the training is alone or one of a stack."""

from __future__ import annotations

import math

import torch

from raydistill.config.training import Training
from raydistill.stages.job import TrainingJob

# torch's fused attention is slower than the plain one in training on a CPU: by a tenth with dropout, by half without.
# It saves memory where rows are long.
EAGER_LENGTH = 512


def learning_rate(settings: Training, step: int, total: int) -> float:
    """The learning rate of a step counted from 0: linear warm-up, then the schedule down to 0 (constant stays)."""
    warm = int(total * settings.warmup)
    if step < warm:
        return settings.learning_rate * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    if settings.schedule == "cosine":
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * (1 - done if settings.schedule == "linear" else 1)


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """What torch is seeded with before a step, counted from 0, on a rank."""
    return (seed * 1_000_003 + step) * 4099 + rank


def training_device() -> torch.device:
    """Where this process trains."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def not_finite(job: TrainingJob, step: int) -> str:
    """What is said of a training whose loss at a step is not finite."""
    return (
        f"{job.title} training: the loss at step {step} is not finite. Lower {job.section}.learning_rate,"
        f" or set {job.section.partition('.stages')[0]}.precision=fp32"
    )
