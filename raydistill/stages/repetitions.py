"""The trainings of further seeds (`train.seeds`): what a report says of a student's chance is the mean over them.

Each stands in `seeds/<seed>/` as the first one in the run: a student and a control with checkpoints of their own, so
that a run that was stopped goes on within any of them. What is kept, exported and timed is the first seed's student.
"""

from __future__ import annotations

from dataclasses import dataclass

from raydistill.config.run import Config
from raydistill.record.commit import Manifest
from raydistill.record.run import Run
from raydistill.stages.cluster import Resources
from raydistill.stages.progress import Progress
from raydistill.stages.student import train_student
from raydistill.stages.teachers import teacher_source
from raydistill.stages.training_job import TrainingRequest


@dataclass(frozen=True)
class Repetition:
    """The run's training once more with another seed."""

    seed: int
    config: Config  # the run's, with that seed

    def part(self, role: str) -> str:
        """What it makes of the run, as the student or its control."""
        return f"seeds/{self.seed}/{role}"

    def request(self, role: str, run: Run, resources: Resources) -> TrainingRequest:
        """The training that makes it."""
        source = teacher_source(self.config, run)
        return TrainingRequest(role, self.config, run, resources, source, self.part(role))


def repetitions(config: Config) -> list[Repetition]:
    """Those that the config asks for beside its first training."""
    trains = [config.train.repeated(number) for number in range(1, config.train.seeds)]
    return [Repetition(train.seed, config.model_copy(update={"train": train})) for train in trains]


def repeat(role: str, config: Config, run: Run, resources: Resources, progress: Progress) -> None:
    """Trains the student, or its control, with every further seed, those that stand complete left as they are."""
    for one in repetitions(config):
        train_student(one.request(role, run, resources), progress)


def repeated_parts(config: Config) -> list[str]:
    """What the repetitions make of the run: each one's student and, where the config asks for it, its control."""
    made = ("student", "control") if config.evaluate.control else ("student",)
    return [one.part(role) for one in repetitions(config) for role in made]


def repeated(config: Config, run: Run) -> dict[str, Manifest]:
    """Those parts once they are complete. Raises UserError that names the stage to run first."""
    return {part: run.require(part) for part in repeated_parts(config)}
