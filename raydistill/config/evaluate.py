"""`evaluate`: the proof."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raydistill.config.export import FORMATS
from raydistill.config.section import MAX_SEED, PLAIN_NAME, Added, Section

# What a report calls the models that it has by itself.
RESERVED = ("teacher", "student", "control", "teacher-int8", *FORMATS)


class EvaluationSet(Section):
    """A further file that the models are compared on. Nothing is chosen by it, as by the test."""

    path: str = Field(min_length=1, description=".csv .jsonl .parquet, a glob, s3://…, hf://dataset")
    text: str | None = Field(default=None, min_length=1, description="its column; absent: data.text")
    label: str | None = Field(default=None, min_length=1, description="its column; absent: data.label")
    out_of_domain: bool = Field(
        default=False, description="rows of another task, without labels: can a model's certainty tell them from test?"
    )
    slice_by: str | None = Field(
        default=None, min_length=1, description="a column; the report has a line for each of its values"
    )

    @model_validator(mode="after")
    def _out_of_domain_has_no_labels(self) -> EvaluationSet:
        if self.out_of_domain and (self.label or self.slice_by):
            name = "label" if self.label else "slice_by"
            raise ValueError(f"{name} means nothing with out_of_domain: true, whose rows have no label; remove it")
        return self


class Harness(Section):
    """Tasks of lm-evaluation-harness, by the names that it has for them."""

    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = Field(min_length=1, description="such as arc_easy, gsm8k")
    tasks_from: str | None = Field(default=None, min_length=1, description="a folder with task files of your own")
    limit: int | None = Field(default=None, ge=1, description="documents of each task; absent: all")
    few_shot: int | None = Field(
        default=None, ge=0, le=1000, description="examples in a prompt; absent: the task's own"
    )
    batch_size: int = Field(default=8, ge=1, le=4096, description="requests at once; a shape may change last bits")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="of the examples in prompts")


class Card(Section):
    """What the student's model card says to the hub that no file of the run knows."""

    license: str = Field(default="unknown", min_length=1, description="the hub's name of it, such as apache-2.0")
    language: tuple[str, ...] = Field(default=(), description="codes such as en")
    datasets: tuple[str, ...] = Field(default=(), description="hub ids; absent: those of data.train")


class Evaluate(Section):
    """What is compared, on what, and how it is timed."""

    control: bool = Field(default=True, description="train and compare the same student without the teacher")
    bootstrap: int = Field(default=2000, ge=100, le=1_000_000, description="resamples behind the 95 % intervals")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="of the resamples")
    latency_requests: int = Field(
        default=256, ge=16, le=1_000_000, description="single requests of a round, for each model"
    )
    latency_rounds: int = Added(4, ge=1, le=1000, description="rounds of requests: with 256 of them 1,024 in all")
    threads: int = Field(default=1, ge=1, le=4096, description="of the timed requests")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of all models that are compared")
    devices: tuple[Literal["cpu", "cuda"], ...] | None = Added(
        None, description="where models are timed; absent: the GPU where there is one, else the CPU"
    )
    price_per_hour: float | None = Added(
        None, ge=0, description="of what the timing uses, its threads or its GPU; gives the cost of a million requests"
    )
    retention: float = Added(0.99, gt=0, le=1, description="the share of the teacher's quality that is to be shown")
    models: dict[str, str] = Added(
        {}, description="further students and exported files by a name of your choice: folders, or hub ids"
    )
    sets: dict[str, EvaluationSet] = Added({}, description="further files by a name of your choice")
    card: Card | None = Added(None, description="of the model card; absent: its license is unknown")
    quantise_teacher: bool = Added(
        False, description="compare the teacher with 8-bit weights and activations too: the way without distillation"
    )

    samples: int = Added(4, ge=0, le=1000, description="causal_lm: test prompts that every model goes on with")
    sample_tokens: int = Added(48, ge=1, le=100_000, description="causal_lm: tokens of each of those answers")

    harness: Harness | None = Added(None, description="causal_lm: tasks for all models; needs the extra lm-eval")

    @field_validator("models", "sets")
    @classmethod
    def _plain_names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not PLAIN_NAME.fullmatch(name):
                raise ValueError(f"{name!r:.80} is not a plain name of letters, digits, '.', '_' and '-', at most 64")
            if name in RESERVED:
                raise ValueError(f"{name} is the name of something else in the report; take another")
        return named
