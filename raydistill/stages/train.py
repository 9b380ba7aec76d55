"""Stage train: the student learns from the teacher's cached outputs and the labels."""

from __future__ import annotations

from raydistill.config.run import Config
from raydistill.record.commit import Manifest
from raydistill.record.run import Run
from raydistill.stages.cluster import Resources
from raydistill.stages.excluding import excluded_rows, exclusion_line
from raydistill.stages.progress import Progress
from raydistill.stages.repetitions import repeat
from raydistill.stages.student import train_student
from raydistill.stages.teachers import teacher_source
from raydistill.stages.training_job import TrainingRequest


def train(config: Config, run: Run, resources: Resources, progress: Progress) -> Manifest:
    """Trains the student from the cache and writes `student/`, then with further seeds; the manifest of `student/`."""
    run.require("data")
    run.require("cache")
    if config.train.caches_features:
        run.require("features")
    excluded = excluded_rows(config, run)
    if excluded is not None:
        progress.say(f"train: {exclusion_line(excluded)}")
    source = teacher_source(config, run)
    manifest = train_student(TrainingRequest("student", config, run, resources, source, excluded=excluded), progress)
    repeat("student", config, run, resources, progress)
    return manifest
