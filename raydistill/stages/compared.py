"""Which models a report compares, and the 8-bit teacher, which is made for it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from raydistill.config.run import Config
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.exports.folder import ExportSource, check_packages, is_export, write_export
from raydistill.models.configuration import check_length, label_order
from raydistill.models.source import ModelSource
from raydistill.record.commit import commit_folder
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.record.store import naming
from raydistill.stages.export import exported
from raydistill.stages.progress import Progress
from raydistill.stages.repetitions import repeated_parts
from raydistill.stages.teachers import made_here, teacher_source, teacher_sources

QUANTISED_TEACHER = "teacher-int8"
QUANTISED_FORMAT = "onnx-int8"


@dataclass(frozen=True)
class Compared:
    """One model of a report, with the models that it is made of: several for an ensemble of teachers."""

    name: str
    kind: str  # teacher, student, control, export, model, or quantised teacher
    parts: tuple[ModelSource, ...]


def compared_models(config: Config, run: Run) -> list[Compared]:
    """Every model that the report compares, in the order of its tables."""
    found = [
        Compared("teacher", "teacher", teacher_sources(config, run)),
        Compared("student", "student", (made_here("student", run),)),
    ]
    if config.evaluate.control:
        found.append(Compared("control", "control", (made_here("control", run),)))
    found += [Compared(name, "export", (source,)) for name, source in exported(config, run).items()]
    if config.evaluate.quantise_teacher:
        source = ExportSource("evaluate.quantise_teacher", "teacher/int8", store_url=run.store.root)
        found.append(Compared(QUANTISED_TEACHER, "quantised teacher", (source,)))
    return found + [Compared(name, "model", (source,)) for name, source in further_models(config).items()]


def repeated_models(config: Config, run: Run) -> list[Compared]:
    """Student and control of every further seed, for the means of the report."""
    return [Compared(part, part.rpartition("/")[2], (made_here(part, run),)) for part in repeated_parts(config)]


def further_models(config: Config) -> dict[str, ModelSource]:
    """The models that the config names: an exported file where the folder is one, else a model's folder or hub id."""
    found: dict[str, ModelSource] = {}
    for name, model in config.evaluate.models.items():
        setting = f"evaluate.models.{name}"
        kind = ExportSource if is_export(Path(model)) else ModelSource
        found[name] = kind(setting, model)
    return found


def check_compared(config: Config, labels: list[str]) -> None:
    """Raises UserError for a further model that does not fit the data, and for a package that is not there."""
    if config.evaluate.quantise_teacher:
        try:
            check_packages(QUANTISED_FORMAT)
        except UserError as error:
            raise UserError(str(error).replace("export.formats: onnx", "evaluate.quantise_teacher", 1)) from None
    for source in further_models(config).values():
        folder = source.folder()
        label_order(source.setting, folder, labels)
        load_tokenizer(folder, source.setting)
        check_length(f"the model of {source.setting}", folder, config.data.max_length)


def quantise_teacher(config: Config, run: Run, progress: Progress) -> None:
    """Writes the teacher with 8-bit weights and activations, unless it stands: what one has who does not distil."""
    source = teacher_source(config, run)
    inputs = {"teacher": source.identity(), "data.max_length": config.data.max_length, "format": QUANTISED_FORMAT}
    plan = Plan(QUANTISED_TEACHER, inputs)
    if run.standing(QUANTISED_TEACHER, plan) is not None:
        return
    progress.say("evaluate: writing the teacher with 8-bit weights")
    staged = run.store.staging("teacher/int8")
    try:
        with naming(staged):
            write_export(
                source.load(), load_tokenizer(source.folder(), source.setting), staged, QUANTISED_FORMAT,
                max_length=config.data.max_length, multi_label=config.task == "multi_label",
            )  # fmt: skip
            (staged / "plan.json").write_bytes(plan.sealed())
        commit_folder(run.store, staged, "teacher/int8", plan.fingerprint)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
