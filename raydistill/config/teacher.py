"""`teacher`: the model or models that are distilled, and the cache of what they say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raydistill.config.language import NextTokens
from raydistill.config.section import MAX_SEED, Added, Section, Speed
from raydistill.config.training import TeacherMetrics, Training


class FineTune(Training):
    """The teacher's own training, with labels alone."""

    epochs: int = Field(default=4, ge=1, le=100_000)
    learning_rate: float = Field(default=2e-4, gt=0, le=10)

    @model_validator(mode="after")
    def _has_no_teacher(self) -> FineTune:
        if self.metric in TeacherMetrics:
            raise ValueError(f"metric {self.metric} compares with a teacher and a teacher has none; use accuracy")
        return self


class Member(Section):
    """One more teacher of an ensemble."""

    model: str = Field(min_length=1, description="a folder or a hub id; safetensors weights")
    revision: str | None = Field(default=None, description="of a hub id")
    weight: float = Field(default=1.0, ge=0, le=1e6, description="in the mean of all; against the others' weights")


class Teacher(Section):
    """The large model and the cache of its outputs."""

    model: str = Field(min_length=1, description="a folder or a hub id; safetensors weights")
    revision: str | None = Field(default=None, description="of a hub id")
    fine_tune: FineTune | None = Field(default=None, description="absent: the teacher is used as it is")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="of the forward pass")
    codec: Literal["dense-float16", "dense-int8"] = Field(
        default="dense-float16", description="2 or 1 byte per class and row"
    )
    features_codec: Literal["float16", "bfloat16"] = Added(
        "float16", description="of cached features, 2 bytes a number; bfloat16 for a teacher beyond float16's 65504"
    )
    next_tokens: NextTokens | None = Added(None, description="causal_lm: what is kept of its distributions")
    cache_from: str | None = Field(default=None, description="another run's folder, whose data and cache are used")
    calibrate: bool = Field(
        default=False, description="divide its logits by one temperature, fitted on validation, before anyone learns"
    )
    cross_fit: int | None = Field(
        default=None, ge=2, le=100,
        description="with fine_tune: folds of train; so many more teachers are trained, each without one fold, and each"
        " scores the fold that it has not seen",
    )  # fmt: skip
    members: tuple[Member, ...] = Field(default=(), description="further teachers; the targets are the mean of all")
    weight: float = Field(default=1.0, ge=0, le=1e6, description="of model, in the mean with members")
    fine_tune_seeds: tuple[Annotated[int, Field(ge=0, le=MAX_SEED)], ...] | None = Field(
        default=None, description="with fine_tune: each teacher is trained once for each seed; the mean is of all"
    )
    combine: Literal["logits", "probabilities"] = Field(
        default="logits", description="what the mean of several teachers is taken of"
    )
    features_of: int | None = Field(
        default=None, ge=0,
        description="which of several teachers train.loss.features are learned from: 0 is model, then members in order;"
        " with fine_tune_seeds each of them counts once for each seed",
    )  # fmt: skip
    actors: int | None = Speed(None, ge=1, description="absent: as many as the cluster has room for")
    cpus_per_actor: int = Speed(1, ge=1)
    tokens_per_batch: int | None = Speed(None, ge=1, le=1 << 31, description="absent: 512 on CPU, 16384 on GPU")

    @model_validator(mode="after")
    def _teachers_fit(self) -> Teacher:
        for name in ("cross_fit", "fine_tune_seeds"):
            if getattr(self, name) is not None and self.fine_tune is None:
                raise ValueError(f"{name} needs fine_tune: it is about teachers that are trained here")
        seeds = self.fine_tune_seeds
        if seeds is not None and (len(seeds) < 2 or len(set(seeds)) < len(seeds)):
            raise ValueError(f"fine_tune_seeds must be different seeds, two at least, found {list(seeds)}")
        if (
            seeds is not None
            and self.fine_tune is not None
            and self.fine_tune.seed != FineTune.model_fields["seed"].default
        ):
            raise ValueError("fine_tune.seed means nothing with fine_tune_seeds; remove it")
        named = [(self.model, self.revision), *((member.model, member.revision) for member in self.members)]
        if twice := [model for model, revision in named if named.count((model, revision)) > 1]:
            raise ValueError(f"members: {twice[0]} stands there twice; give it a weight, or fine_tune_seeds")
        if not self.weight and not any(member.weight for member in self.members):
            raise ValueError("weight: all weights are 0, so that no teacher is left; give one of them more")
        if self.weight != type(self).model_fields["weight"].default and not self.members:
            raise ValueError("weight means nothing without members; remove it")
        if self.combine != type(self).model_fields["combine"].default and not self.members and seeds is None:
            raise ValueError("combine means nothing with one teacher; remove it, or set members or fine_tune_seeds")
        teachers = (1 + len(self.members)) * len(seeds or (0,))
        if self.features_of is not None and teachers == 1:
            raise ValueError("features_of means nothing with one teacher; remove it")
        if self.features_of is not None and self.features_of >= teachers:
            raise ValueError(f"features_of: found {self.features_of}, the {teachers} teachers are 0 to {teachers - 1}")
        return self

    @property
    def keeps_no_logits(self) -> bool:
        """causal_lm: whether the student learns from what the teacher wrote alone."""
        return self.next_tokens is not None and self.next_tokens.codec == "none"
