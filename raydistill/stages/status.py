"""Where a run stands: what is complete, what is under way, what comes next."""

from __future__ import annotations

import re
from dataclasses import dataclass

from raydistill.cache.text_logprobs import text_shard
from raydistill.config.cross_tokenizer import crosses_tokenizers
from raydistill.config.export import FORMATS
from raydistill.config.run import Config
from raydistill.record.commit import MANIFEST
from raydistill.record.run import PARTS, Run, part_of
from raydistill.stages.checkpoints import Checkpoints
from raydistill.stages.compared import QUANTISED_TEACHER
from raydistill.stages.export import export_part, in_words
from raydistill.stages.progress import size
from raydistill.stages.repetitions import repeated_parts
from raydistill.stages.teachers import trainings

SHARD = re.compile(r"-\d{5}\.parquet$")  # what stands beside shards, such as an output head, has no rows of data

BESIDE = text_shard("")  # shards that stand by others, of the same rows


@dataclass(frozen=True)
class Standing:
    """One part of a run."""

    part: str
    stage: str
    state: str  # complete, under way, not begun
    detail: str


def standings(run: Run, config: Config) -> list[Standing]:
    """Every part that the config asks for, in order."""
    return [_standing(run, part) for part in expected_parts(config)]


def expected_parts(config: Config) -> list[str]:
    """The parts of a run that its config asks for, in order."""
    wanted = {
        "answers": config.data.synthesis is not None,
        "folds": config.teacher.cross_fit is not None,
        "teacher": config.teacher.fine_tune is not None,
        "features": config.train.caches_features,
        "tune": config.tune is not None,
        "student_rows": crosses_tokenizers(config),
        "calibration": config.teacher.calibrate,
        QUANTISED_TEACHER: config.evaluate.quantise_teacher,
        "control": config.evaluate.control,
        **{export_part(name): config.export is not None and name in config.export.formats for name in FORMATS},
    }
    teachers = [one.part for one in trainings(config)]
    found = [part for part in PARTS if wanted.get(part, True)]
    again = {role: [part for part in repeated_parts(config) if part.endswith(role)] for role in ("student", "control")}
    return [name for part in found for name in (teachers if part == "teacher" else [part, *again.get(part, [])])]


def _standing(run: Run, part: str) -> Standing:
    facts, manifest, plan = part_of(part), run.complete(part), run.plan(part)
    if manifest is not None:
        if "temperature" in manifest.facts:
            return Standing(part, facts.stage, "complete", f"temperature {manifest.facts['temperature']:g}")
        shards = [one for one in manifest.files if SHARD.search(one.file) and not one.file.startswith(BESIDE)]
        rows = sum(entry.rows for entry in shards)
        detail = f"{rows:,} rows in {len(shards)} shards" if rows else f"{len(manifest.files)} files"
        if part == "tune":
            won, metric = manifest.facts["winner"], manifest.facts["metric"]
            detail = f"{manifest.facts['trials']} trials, validation {metric} {won['value']:.4f}"
        if facts.stage == "export":
            detail = f"{size(manifest.facts['size_bytes'])}, {in_words(manifest.facts)}"
        if "value" in manifest.facts:
            detail = f"validation {manifest.facts['metric']} {manifest.facts['value']:.4f}"
        return Standing(part, facts.stage, "complete", detail)
    if plan is None:
        return Standing(part, facts.stage, "not begun", "")
    if part == "tune":
        trials = run.store.folders("tune/trials")
        ended = sum(run.store.exists(f"{folder}/{MANIFEST}") for folder in trials)
        return Standing(part, facts.stage, "under way", f"{len(trials)} trials begun, {ended} ended")
    names = (folder.rpartition("/")[2] for folder in run.store.folders(f"{facts.folder}/stages"))
    for name in sorted(names, key=lambda name: int(name.partition("-")[0]), reverse=True):
        if steps := Checkpoints(run.store, f"{facts.folder}/stages/{name}", plan.fingerprint).steps():
            detail = f"newest checkpoint of stage {name} at step {steps[-1]:,}"
            return Standing(part, facts.stage, "under way", detail)
    steps = Checkpoints(run.store, facts.folder, plan.fingerprint).steps()
    shards = [name for name in run.store.list(facts.folder) if name.endswith(".parquet")]
    detail = f"newest checkpoint at step {steps[-1]:,}" if steps else f"{len(shards)} shards written"
    return Standing(part, facts.stage, "under way", detail)


def next_stage(found: list[Standing]) -> str | None:
    """The first stage that has something left to do, or None."""
    return next((standing.stage for standing in found if standing.state != "complete"), None)
