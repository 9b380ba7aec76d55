"""The stages of a student's training (`train.stages`): which there are, in which folders, and what determines them.

A training without stages is one stage, whose folder and settings are the training's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raydistill.config.run import Config
from raydistill.config.section import identity
from raydistill.config.train import Train
from raydistill.record.run import part_of


@dataclass(frozen=True)
class TrainingStage:
    """One stage of the training of a student or its control."""

    role: str
    part: str  # of the run that the training makes
    name: str  # "2-again"; empty for a training without stages
    config: Config  # the run's, with the stage's settings in `train`
    section: str  # train.stages[1], or train
    loss_section: str  # where its loss stands
    own_teacher: bool  # it learns from the student of the stage before
    goes_on: bool  # it begins with the weights of the stage before
    is_last: bool

    @property
    def settings(self) -> Train:
        return self.config.train

    @property
    def folder(self) -> str:
        """Of its checkpoints and curves."""
        folder = part_of(self.part).folder
        return f"{folder}/stages/{self.name}" if self.name else folder

    @property
    def product(self) -> str:
        """The folder of the model that it makes: the student itself, for the last."""
        return part_of(self.part).product if self.is_last else f"{self.folder}/model"

    @property
    def title(self) -> str:
        return f"{self.part}, stage {self.name}" if self.name else self.part


def training_stages(role: str, config: Config, part: str = "") -> tuple[TrainingStage, ...]:
    """The stages of the training of a student or its control, in order; `part` is what it makes, if not the role's.

    The control has no teacher of either kind, so that nothing of what stands before its last fresh start reaches it:
    it begins there.
    """
    train = config.train
    if train.stages is None:
        return (TrainingStage(role, part or role, "", config, "train", "train.loss", False, False, True),)
    first = 0
    if role == "control":
        first = max((n for n, stage in enumerate(train.stages) if stage.start == "fresh"), default=0)
    return tuple(
        TrainingStage(
            role=role,
            part=part or role,
            name=f"{number + 1}-{stage.name}",
            config=config.model_copy(update={"train": train.of_stage(number)}),
            section=f"train.stages[{number}]",
            loss_section=f"train.stages[{number}].loss" if stage.loss else "train.loss",
            own_teacher=stage.teacher == "previous" and role == "student",
            goes_on=number > first and stage.start != "fresh",
            is_last=number == len(train.stages) - 1,
        )
        for number, stage in enumerate(train.stages)
        if number >= first
    )


def stage_inputs(role: str, config: Config) -> dict[str, Any]:
    """What determines the result of a training's stages, by their names."""
    return {stage.name: _inputs(stage) for stage in training_stages(role, config)}


def _inputs(stage: TrainingStage) -> dict[str, Any]:
    start = {"start": "previous" if stage.goes_on else "fresh"}
    if stage.role == "student":
        return identity(stage.settings, skip=("precision",)) | start | {"own_teacher": stage.own_teacher}
    settings = identity(stage.settings, skip=("precision", "loss", "exclude"))
    return settings | start | {"label_smoothing": stage.settings.loss.label_smoothing}
