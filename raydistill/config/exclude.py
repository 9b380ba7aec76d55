"""`train.exclude`: rows of train that the student does not learn from the teacher."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from raydistill.config.section import Section


class Exclude(Section):
    """A row that fits any of these learns from its label alone, as every row of the control does."""

    confidence_below: float | None = Field(
        default=None, gt=0, le=1, description="the probability that the teacher gives its own answer"
    )
    wrong: bool = Field(default=False, description="the teacher's answer is not the row's label")
    classes: tuple[str, ...] = Field(default=(), description="the row's label, or the teacher's answer, is one of them")
    marked_bad: bool = Field(default=False, description="rows that a person marked bad in review/review.csv")

    @field_validator("classes")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
            raise ValueError(f"{twice!r} stands twice. Remove one")
        return names

    @model_validator(mode="after")
    def _says_which(self) -> Exclude:
        if self.confidence_below is None and not (self.wrong or self.classes or self.marked_bad):
            raise ValueError("names no rows. Set confidence_below, wrong, classes or marked_bad, or leave exclude out")
        return self
