"""`train.loss`: what the student learns from the teacher and from the labels."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from raydistill.config.section import Added, Section

# Which kinds of loss take a hyper-parameter; what it is when absent stands in losses/registry.py.
LOSS_PARAMETERS = {
    "beta": ("jsd",),
    "skew": ("skew_forward_kl", "skew_reverse_kl"),
    "target_weight": ("dkd",),
    "non_target_weight": ("dkd",),
    "inter_weight": ("dist",),
    "intra_weight": ("dist",),
}
WITHOUT_TEMPERATURE = ("logit_mse",)
# The kinds that know sets of labels, each class a question of its own, by their names in losses/registry.py.
KINDS_OF_SETS = {"forward_kl": "binary_kl", "reverse_kl": "binary_reverse_kl", "jsd": "binary_jsd"}


class Features(Section):
    """One loss on what the teacher computes on the way; it is added to the rest, times its weight."""

    kind: Literal[
        "hidden_mse", "hidden_cosine", "embeddings_mse", "embeddings_cosine", "attention_mse", "attention_kl",
        "query_relation", "key_relation", "value_relation", "rkd_distance", "rkd_angle",
    ]  # fmt: skip
    weight: float = Field(default=1.0, gt=0, le=1e6)
    layers: Literal["uniform", "last", "skip", "final"] | tuple[tuple[int, int], ...] | None = Field(
        default=None,
        description="pairs [student layer, teacher layer], counted from 0, or a rule; absent: uniform for hidden states"
        " and attention, final (the last layers) for relations and rkd",
    )
    relation_heads: int | None = Field(
        default=None, ge=1, le=1024, description="*_relation: absent: as many as the teacher has attention heads"
    )

    @model_validator(mode="after")
    def _settings_fit_kind(self) -> Features:
        if self.layers is not None and self.kind.startswith("embeddings"):
            raise ValueError(f"layers means nothing with kind: {self.kind}; remove it")
        if self.relation_heads is not None and not self.kind.endswith("relation"):
            raise ValueError(f"relation_heads means nothing with kind: {self.kind}; remove it")
        return self


class Loss(Section):
    """alpha times a loss against the teacher's logits, plus (1 - alpha) cross-entropy with hard targets."""

    kind: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "logit_mse", "dkd",
        "dist",
    ] = Field(default="forward_kl", description="the loss against the teacher's logits")  # fmt: skip
    temperature: float = Field(default=4.0, gt=0, le=1000, description="of both sides' logits; logit_mse takes none")
    alpha: float = Field(default=0.9, ge=0, le=1, description="share of the teacher; 0 is the control's objective")
    temperature_end: float | None = Added(
        None, gt=0, le=1000, description="of the last step, for a temperature that changes from step to step"
    )
    alpha_end: float | None = Added(None, ge=0, le=1, description="of the last step, likewise")
    course: Literal["linear", "cosine"] | None = Added(
        None, description="from the first step to temperature_end and alpha_end; absent: linear"
    )
    cross_tokenizer: Literal["spans", "uld"] | None = Added(
        None,
        description="causal_lm: the student has a tokenizer of its own, and learns the teacher's probability of spans"
        " of text that both tokenizers end at (arXiv:2503.20083), or sorted probabilities (arXiv:2402.12030)",
    )
    beta: float | None = Field(
        default=None, ge=0, le=1, description="jsd: from forward KL (0) to reverse KL (1); absent: 0.5"
    )
    skew: float | None = Field(
        default=None, ge=0, lt=1, description="skew_*_kl: share of the first side in the mixture; absent: 0.1"
    )
    target_weight: float | None = Field(
        default=None, ge=0, le=1000, description="dkd: of the label's class against the others; absent: 1"
    )
    non_target_weight: float | None = Field(
        default=None, ge=0, le=1000, description="dkd: of the other classes among themselves; absent: 8"
    )
    inter_weight: float | None = Field(
        default=None, ge=0, le=1000, description="dist: of each row's correlation over classes; absent: 2"
    )
    intra_weight: float | None = Field(
        default=None, ge=0, le=1000, description="dist: of each class's correlation over rows; absent: 2"
    )
    standardise: bool = Field(
        default=False, description="both sides' logits to mean 0 and deviation 1 a row before the loss"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="of the cross-entropy, the control's too")
    hard_targets: Literal["labels", "teacher"] = Field(
        default="labels", description="of the cross-entropy: the data's labels, or the teacher's most likely classes"
    )
    features: tuple[Features, ...] = Field(default=(), description="losses on what the teacher computes on the way")
    features_from: Literal["teacher", "cache"] = Added(
        "teacher",
        description="features: from the teacher, which runs beside the training, or from teach, which keeps them",
    )

    @model_validator(mode="after")
    def _settings_fit_kind(self) -> Loss:
        for name, kinds in LOSS_PARAMETERS.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise ValueError(f"{name} means nothing with kind: {self.kind}; remove it")
        if self.kind in WITHOUT_TEMPERATURE and self.temperature != type(self).model_fields["temperature"].default:
            raise ValueError(f"temperature means nothing with kind: {self.kind}; remove it")
        if self.kind in WITHOUT_TEMPERATURE and self.temperature_end is not None:
            raise ValueError(f"temperature_end means nothing with kind: {self.kind}; remove it")
        if self.course is not None and self.temperature_end is None and self.alpha_end is None:
            raise ValueError("course means nothing without temperature_end or alpha_end; remove it")
        if self.features_from == "cache" and not self.features:
            raise ValueError("features_from: cache means nothing without features; remove it")
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether anything is learned from a teacher."""
        return max(self.alpha, self.alpha_end or 0) > 0 or self.hard_targets == "teacher" or bool(self.features)
