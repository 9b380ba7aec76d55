"""Stage export: the student as files to deploy, each kept only when it answers as the student does.

A file is written to a temporary folder, loaded again as it will be deployed, and compared with the student row by row.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from raydistill.config.export import Export
from raydistill.config.run import Config
from raydistill.config.section import identity
from raydistill.data.shards import read_split
from raydistill.data.tokens import load_tokenizer, tokenise
from raydistill.errors import UserError
from raydistill.exports.folder import ExportSource, check_packages, write_export
from raydistill.exports.language_folder import LanguageExport
from raydistill.models.source import ModelSource
from raydistill.record.commit import Manifest, commit_folder
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.record.store import naming
from raydistill.report.measures import measures_of
from raydistill.stages.forward import Forward
from raydistill.stages.progress import Progress, size
from raydistill.stages.teachers import made_here

EXACT = ("onnx",)  # formats that compute what the student does, to rounding in float32
MAX_DIFFERENCE = 1e-4  # of their logits
COMPARED = ("test", "validation", "train")  # rows come from the first that has any left


def export_part(format_name: str) -> str:
    """The name of a format as a part of a run."""
    return f"export/{format_name}"


def check_export(config: Config) -> None:
    """Raises UserError for a format of classifiers whose package is not installed."""
    for format_name in config.export.formats if config.export and config.task != "causal_lm" else ():
        check_packages(format_name)


def check_exports_stand(config: Config, run: Run, student: Manifest) -> None:
    """Raises UserError for a file that stands there for another student or other settings."""
    for format_name in config.export.formats if config.export else ():
        run.check(export_part(format_name), export_plan(config, format_name, student))


def export_plan(config: Config, format_name: str, student: Manifest) -> Plan:
    """Everything that determines an exported file and whether it is kept."""
    assert config.export is not None
    inputs = {"student": student.fingerprint, "data.max_length": config.data.max_length}
    skip = ("formats",) if format_name == "onnx-int8-static" else ("formats", "calibration_rows")
    if format_name in EXACT:
        skip = (*skip, "min_agreement", "max_accuracy_loss", "max_perplexity_rise")
    return Plan(
        export_part(format_name),
        {**inputs, **{f"export.{name}": value for name, value in identity(config.export, skip=skip).items()}},
    )


class Exam(Protocol):
    """A task's student, and the rows that every file of it is compared on."""

    splits: tuple[str, ...]  # that the rows are of

    def write(self, format_name: str, folder: Path) -> None:
        """Writes the student into a new folder. Raises UserError for what the format cannot hold."""
        ...

    def source(self, format_name: str, folder: Path) -> ExportSource:
        """What was written, as it will be loaded."""
        ...

    def compare(self, written: ExportSource) -> dict[str, Any]:
        """How far it is from the student, loaded again as it will be deployed."""
        ...

    def problem(self, format_name: str, facts: dict[str, Any]) -> str | None:
        """Why a file is not kept, None for one that is."""
        ...

    def commands(self, format_name: str, folder: str) -> list[str]:
        """What is typed to serve it."""
        ...


def export(
    config: Config, run: Run, progress: Progress, exam: Callable[[Config, Run, Path], Exam] | None = None
) -> list[Manifest]:
    """Writes every format that the config asks for and that is not there; their manifests. `exam` is a classifier's.

    Raises UserError, after all were tried, for the first that does not answer as the student does.
    """
    assert config.export is not None
    student, problems, found = run.require("student"), [], []
    with tempfile.TemporaryDirectory() as scratch:
        made = functools.cache(lambda: (exam or ClassExam)(config, run, Path(scratch)))
        for format_name in config.export.formats:
            plan = export_plan(config, format_name, student)
            manifest = run.standing(export_part(format_name), plan)
            if manifest is not None:
                progress.say(f"export: {format_name} is complete")
                found.append(manifest)
                continue
            progress.check()
            try:
                manifest = _export(run, format_name, plan, made())
            except NotAsTheStudent as problem:
                progress.say(f"export: {format_name} was not kept: {problem}")
                problems.append(problem)
                continue
            progress.say(f"export: {format_name}, {size(manifest.facts['size_bytes'])}, {in_words(manifest.facts)}")
            for line in made().commands(format_name, run.store.where(export_part(format_name))):
                progress.say(f"export: to serve it: {line}")
            found.append(manifest)
    if problems:
        raise problems[0]
    return found


class NotAsTheStudent(UserError):
    """An exported file answers otherwise than the student, by more than is allowed."""


def _export(run: Run, format_name: str, plan: Plan, exam: Exam) -> Manifest:
    """Writes, loads again, compares and commits one file; nothing stays of one that is not kept."""
    part = export_part(format_name)
    staged = run.store.staging(part)
    try:
        with naming(staged):
            exam.write(format_name, staged)
            (staged / "plan.json").write_bytes(plan.sealed())
        written = exam.source(format_name, staged)
        facts = exam.compare(written)
        if problem := exam.problem(format_name, facts):
            raise NotAsTheStudent(f"export.formats: {format_name}: {problem}")
        facts |= {"format": format_name, "splits": list(exam.splits)}
        facts["size_bytes"] = sum(path.stat().st_size for path in written.weights())
        return commit_folder(run.store, staged, part, plan.fingerprint, facts)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


class ClassExam:
    """A classifier as its files are written and compared: rows of test, N of them, and what the student says of them.

    Where test has too few rows, validation's and train's come after them. `scratch` is a folder that keeps what several
    formats are made from.
    """

    def __init__(self, config: Config, run: Run, scratch: Path) -> None:
        assert config.export is not None
        self._config, self._run, self._scratch = config, run, scratch
        data, self._source = run.require("data"), made_here("student", run)
        self._names = data.facts["labels"]
        self._texts, labels, splits = [], [], []
        for split in COMPARED:
            for shard in read_split(run.home("data"), data.shards(split)):
                taken = config.export.rows - len(self._texts)
                if taken > 0:
                    self._texts += shard.texts[:taken]
                    labels.append(shard.labels_N[:taken])
                    splits.append(split)
        self._labels_N, self.splits = np.concatenate(labels), tuple(dict.fromkeys(splits))
        self._logits_NK = self._logits_of(self._source)

    def write(self, format_name: str, folder: Path) -> None:
        config, source = self._config, self._source
        tokenizer = load_tokenizer(source.folder(), source.setting)
        calibration = _calibration(config, self._run, tokenizer) if format_name == "onnx-int8-static" else None
        write_export(
            source.load(), tokenizer, folder, format_name, max_length=config.data.max_length,
            multi_label=config.task == "multi_label", calibration=calibration, scratch=self._scratch,
        )  # fmt: skip

    def source(self, format_name: str, folder: Path) -> ExportSource:
        return ExportSource(f"export.formats: {format_name}", str(folder))

    def compare(self, written: ExportSource) -> dict[str, Any]:
        """The largest difference of a logit, agreement, both accuracies."""
        logits_NK, measures = self._logits_of(written), measures_of(self._labels_N)
        accuracy = {
            name: measures.metrics(values, self._labels_N, 1.0)["accuracy"]
            for name, values in (("accuracy", logits_NK), ("student_accuracy", self._logits_NK))
        }
        return {
            "rows": len(self._labels_N),
            "difference": float(np.abs(logits_NK - self._logits_NK).max()),
            "agreement": float(measures.same(logits_NK, self._logits_NK).mean()),
            **accuracy,
        }

    def _logits_of(self, source: ModelSource) -> npt.NDArray[np.float32]:
        """float32 (N, K) that a model gives the rows, on the CPU."""
        forward = Forward(source, self._names, max_length=self._config.data.max_length, device="cpu")
        return forward.logits(forward.tokens(self._texts))

    def problem(self, format_name: str, facts: dict[str, Any]) -> str | None:
        assert self._config.export is not None
        return _problem(self._config.export, format_name, facts)

    def commands(self, format_name: str, folder: str) -> list[str]:
        return []


def _calibration(config: Config, run: Run, tokenizer: Any) -> list[dict[str, npt.NDArray[np.int64]]]:
    """Rows evenly spread over train, as the inputs of single requests."""
    assert config.export is not None
    data = run.require("data")
    entries = data.shards("train")
    total = sum(entry.rows for entry in entries)
    places = set(np.linspace(0, total - 1, min(total, config.export.calibration_rows)).astype(int).tolist())
    texts = (text for shard in read_split(run.home("data"), entries) for text in shard.texts)
    chosen = [text for number, text in enumerate(texts) if number in places]
    tokens = tokenise(tokenizer, chosen, config.data.max_length)
    found = []
    for number in range(len(tokens)):
        ids = tokens.row(number).astype(np.int64)[None]
        found.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    return found


def _problem(asked: Export, format_name: str, facts: dict[str, Any]) -> str | None:
    """Why a file is not kept, None for one that is."""
    if format_name in EXACT:
        if facts["difference"] <= MAX_DIFFERENCE and facts["agreement"] == 1:
            return None
        return (
            f"{in_words(facts)}; allowed is {MAX_DIFFERENCE:g} and the student's answer in all rows. Leave the format"
            " out, and report the model that it happens with"
        )
    lost = facts["student_accuracy"] - facts["accuracy"]
    if facts["agreement"] >= asked.min_agreement and lost <= asked.max_accuracy_loss:
        return None
    return (
        f"{in_words(facts)}; asked are an agreement of {asked.min_agreement:.2%} and at most"
        f" {asked.max_accuracy_loss * 100:g} points less accuracy. Set export.min_agreement or"
        " export.max_accuracy_loss, or leave the format out"
    )


def in_words(facts: dict[str, Any]) -> str:
    """What the comparison found."""
    if "perplexity" in facts:
        return (
            f"perplexity {facts['perplexity']:.5g} (student {facts['student_perplexity']:.5g}), KL to the student"
            f" {facts['kl']:.2g}, {facts['agreement']:.2%} of {facts['positions']:,} next tokens as by the student"
        )
    return (
        f"largest difference of a logit {facts['difference']:.2g}, {facts['agreement']:.2%} of {facts['rows']:,} rows"
        f" answered as by the student, accuracy {facts['accuracy']:.2%} (student {facts['student_accuracy']:.2%})"
    )


def exported(config: Config, run: Run) -> dict[str, ExportSource]:
    """The finished files of a run by format, as models that can be compared."""
    kind = LanguageExport if config.task == "causal_lm" else ExportSource
    formats = config.export.formats if config.export else ()
    return {
        name: kind(f"export/{name}", export_part(name), store_url=run.store.root)
        for name in formats
        if run.complete(export_part(name)) is not None
    }
