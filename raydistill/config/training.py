"""What every training has: the student's, its control's, a stage's, a teacher's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raydistill.config.section import MAX_SEED, Added, Section, Speed

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Metric = Literal["accuracy", "macro_f1", "micro_f1", "nll", "kl", "agreement"]
TeacherMetrics = ("kl", "agreement")


class DeepSpeed(Section):
    """What is handed to DeepSpeed; none of it changes what is computed, only where it is kept."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: bool = Field(default=False, description="keep optimiser state in host memory (zero_stage >= 1)")

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> DeepSpeed:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        return self


class Training(Section):
    """Settings of one training: of the student, of its control, or of a teacher that is fine-tuned here."""

    epochs: int = Field(default=10, ge=1, le=100_000)
    batch_size: int = Field(
        default=32,
        ge=1,
        le=1 << 24,
        description="global: rows per optimiser step over all workers and micro-batches; causal_lm: so many times"
        " data.max_length tokens",
    )
    learning_rate: float = Field(default=5e-4, gt=0, le=10)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps with a rising learning rate")
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="of matrices; biases and norms have none")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    precision: Precision = Field(default="auto", description="auto: bf16 where the device gains from it, else fp32")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="of initial weights, dropout and the order of rows")
    metric: Metric = Field(default="accuracy", description="of validation; decides which checkpoint is the best")
    choose: Literal["best", "last"] = Field(
        default="best",
        description="which checkpoint becomes the model; last where validation has too few rows to tell epochs apart",
    )
    validate_every: int | None = Field(
        default=None, ge=1, description="steps between validations; absent: once an epoch"
    )
    patience: int | None = Field(default=None, ge=1, description="validations without improvement before stopping")
    group_by_length: bool = Added(False, description="batches of rows that are about as long: fewer tokens are padding")
    accumulation: int = Speed(1, ge=1, description="micro-batches per optimiser step and worker")
    gradient_checkpointing: bool = Speed(False)
    checkpoint_every: int | None = Speed(None, ge=1, description="steps between checkpoints; absent: at validations")
    log_every: int = Speed(10, ge=1, description="steps between points of the training curves")
    workers: int = Speed(1, ge=1, le=4096)
    cpus_per_worker: int | None = Speed(None, ge=1, description="absent: what the cluster has, shared evenly")
    max_failures: int = Speed(2, ge=0, description="times a lost worker is replaced before the run stops")
    deepspeed: DeepSpeed = Speed(DeepSpeed())

    @model_validator(mode="after")
    def _batch_divides(self) -> Training:
        if self.batch_size < self.workers * self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is global and must be at least workers x accumulation"
                f" = {self.workers * self.accumulation}"
            )
        return self
