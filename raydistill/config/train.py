"""`train`: the student's training, whole or in stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from raydistill.config.exclude import Exclude
from raydistill.config.loss import Loss
from raydistill.config.section import MAX_SEED, PLAIN_NAME, Added, Section, Speed
from raydistill.config.training import Metric, Training


def _as_in_train(name: str) -> Any:
    """A Field of a stage with the bounds that the setting has in `train`; absent, it is taken from there."""
    bounds = {
        type(b).__name__.lower(): getattr(b, type(b).__name__.lower()) for b in Training.model_fields[name].metadata
    }
    return Field(default=None, description=f"absent: train.{name}", **bounds)


def _are_shares(value: Any) -> Any:
    shares = value if isinstance(value, list | tuple) and value else [value]
    if value is not None and (
        any(isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1 for share in shares)
        or sorted(shares) != [*shares]
    ):
        raise ValueError("it should be a share of the training, from 0 to below 1, or a list of rising ones")
    return value


# Of a union pydantic would name every member.
Unfreeze = Annotated[float | tuple[float, ...] | None, BeforeValidator(_are_shares)]


class Stage(Section):
    """One stage of the student's training. What it leaves out is as in `train`; a loss that it gives stands alone."""

    name: str = Field(description="of its folder, train/stages/<number>-<name>")
    teacher: Literal["teacher", "previous"] = Field(
        default="teacher", description="previous: the student as the stage before left it"
    )
    start: Literal["previous", "fresh"] | None = Field(
        default=None, description="from the weights of the stage before (absent: so), or from new first ones"
    )
    epochs: int | None = _as_in_train("epochs")
    batch_size: int | None = _as_in_train("batch_size")
    learning_rate: float | None = _as_in_train("learning_rate")
    schedule: Literal["cosine", "linear", "constant"] | None = _as_in_train("schedule")
    warmup: float | None = _as_in_train("warmup")
    weight_decay: float | None = _as_in_train("weight_decay")
    clip: float | None = _as_in_train("clip")
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="absent: train.seed plus the number of stages before this one"
    )
    metric: Metric | None = _as_in_train("metric")
    choose: Literal["best", "last"] | None = _as_in_train("choose")
    validate_every: int | None = _as_in_train("validate_every")
    patience: int | None = _as_in_train("patience")
    group_by_length: bool | None = _as_in_train("group_by_length")
    unfreeze: Unfreeze = Field(default=None, description="absent: train.unfreeze; 0: all trains from the start")
    loss: Loss | None = Field(default=None, description="absent: train.loss")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not PLAIN_NAME.fullmatch(value):
            raise ValueError("a stage's name is a plain name of letters, digits, '.', '_' and '-', at most 64")
        return value


class Train(Training):
    """The student's training; its control takes the same settings with alpha 0."""

    loss: Loss = Loss()
    unfreeze: Unfreeze = Added(
        None,
        description="the head trains first, then layer by layer from the last one down, then the embeddings; by which"
        " share of the training all of them do, or a list of each one's share (ULMFiT, arXiv:1801.06146)",
    )
    exclude: Exclude | None = Added(
        None, description="rows of train that the student does not learn from the teacher; their labels still teach"
    )
    stages: tuple[Stage, ...] | None = Added(
        None, description="trainings one after the other; the student is what the last one makes"
    )
    seeds: int = Speed(
        1,
        ge=1,
        le=100,
        description="trainings with the seeds from `seed` on, for the report's means; the first one's student is kept",
    )

    @model_validator(mode="after")
    def _stages_follow(self) -> Train:
        if self.stages is not None and not self.stages:
            raise ValueError("stages is an empty list. Leave it out, or name a stage")
        names = [stage.name for stage in self.stages or ()]
        for number, stage in enumerate(self.stages or ()):
            try:
                if stage.name in names[:number]:
                    raise ValueError(f"stages[{names.index(stage.name)}] has that name too. Give it another")
                self._check_stage(number, stage)
            except ValueError as error:
                problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
                where = f"stages[{number}] ({stage.name})"
                raise ValueError(f"{where}: {problem.removeprefix('Value error, ')}") from None
        return self

    def _check_stage(self, number: int, stage: Stage) -> None:
        settings = self.of_stage(number)
        for setting in ("teacher", "start"):
            if number == 0 and getattr(stage, setting) == "previous":
                raise ValueError(f"{setting}: previous, and no stage comes before. Leave it out")
        if stage.teacher == "previous" and not settings.loss.has_teacher:
            raise ValueError("teacher: previous, and its loss, with alpha 0, takes nothing from a teacher. Raise alpha")
        if stage.teacher == "previous" and settings.loss.features_from == "cache":
            raise ValueError(
                "teacher: previous, and the cache holds the first teacher's features. Set loss.features_from: teacher"
            )
        if stage.teacher == "previous" and self.exclude is not None:
            raise ValueError(
                "teacher: previous, and train.exclude is about what the first teacher says. Remove the one or the other"
            )
        if number > 0 and stage.start == "fresh" and stage.teacher == "teacher":
            raise ValueError(
                "start: fresh with the teacher leaves nothing of the stages before. Remove them, or set"
                " teacher: previous, or leave start out"
            )

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The loss of every stage; of a training without stages the one that it has."""
        return (self.loss,) if self.stages is None else tuple(stage.loss or self.loss for stage in self.stages)

    @property
    def unfreezes(self) -> bool:
        """Whether any stage begins with a part of the student frozen."""
        return any(stage.unfreeze for stage in self.trainings)

    @property
    def trainings(self) -> tuple[Train, ...]:
        """The settings of the trainings that follow each other: of every stage, or these."""
        return (self,) if self.stages is None else tuple(map(self.of_stage, range(len(self.stages))))

    @property
    def all_epochs(self) -> int:
        """Of every stage together."""
        return sum(training.epochs for training in self.trainings)

    @property
    def caches_features(self) -> bool:
        """Whether any stage takes the teacher's features from the cache."""
        return any(loss.features_from == "cache" for loss in self.losses)

    def of_stage(self, number: int) -> Train:
        """The settings of a stage, counted from 0, as of a training without stages. Raises ValidationError."""
        assert self.stages is not None
        names = [name for name in type(self).model_fields if name not in ("stages", "seeds")]
        own = {name: value for name in names if (value := getattr(self.stages[number], name, None)) is not None}
        return Train.model_validate(
            {name: getattr(self, name) for name in names} | {"seed": _seed_after(self.seed, number)} | own
        )

    def repeated(self, number: int) -> Train:
        """The settings of one of the trainings that `seeds` asks for, counted from 0: its seeds are so many higher."""
        stages = self.stages and tuple(
            stage if stage.seed is None else stage.model_copy(update={"seed": _seed_after(stage.seed, number)})
            for stage in self.stages
        )
        return self.model_copy(update={"seed": _seed_after(self.seed, number), "stages": stages, "seeds": 1})


def _seed_after(seed: int, number: int) -> int:
    return (seed + number) % (MAX_SEED + 1)
