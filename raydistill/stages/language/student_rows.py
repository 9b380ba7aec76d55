"""The rows of a student with a tokenizer of its own: made once of the data, for training, control and report.

They are made after the data and need no source, so that one teacher's cache serves students of any tokenizer.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from raydistill.config.cross_tokenizer import crosses_tokenizers, student_length
from raydistill.config.run import Config
from raydistill.data.student_rows import (
    FACTS,
    FOLDER,
    StudentRows,
    check_texts,
    read_student_shard,
    teachers_rows,
    write_student_shard,
)
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models.folders import find_model, tokenizer_identity
from raydistill.record.commit import Entry, Manifest, commit_manifest, committed_shard
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.stages.language.surveyed import PLACES
from raydistill.stages.progress import Progress
from raydistill.students.language import own_tokenizer

PART = "student_rows"


def student_rows_plan(config: Config, run: Run) -> Plan:
    """Everything that determines a student's rows."""
    inputs = {
        "data": run.require("data").fingerprint,
        "tokenizer_sha256": tokenizer_identity(own_tokenizer(config.student)[1]),
        "max_length": student_length(config),
        **({"data.learnt_roles": list(config.data.learnt_roles)} if config.data.messages is not None else {}),
    }
    return Plan(PART, inputs)


def make_student_rows(config: Config, run: Run, progress: Progress) -> Manifest | None:
    """Writes the rows; their manifest, None of a student with its teacher's tokenizer. What stands is kept.

    Raises UserError for a tokenizer that changes too many texts, and where no span of text is learnt by both.
    """
    if not crosses_tokenizers(config):
        return None
    data, plan = run.require("data"), student_rows_plan(config, run)
    check_texts(data, run.home("data").where("data"))
    if (manifest := run.begin(PART, plan)) is not None:
        return manifest
    setting, folder = own_tokenizer(config.student)
    teacher = find_model("teacher.model", config.teacher.model, config.teacher.revision)
    ours = load_tokenizer(folder, setting, pads=False)
    theirs = load_tokenizer(teacher, "teacher.model", pads=False)
    rows = StudentRows(ours, setting, theirs, student_length(config), config.data.learnt_roles)
    entries, counts = _write(config, run, data, rows, plan.fingerprint, progress)
    facts = {"vocabulary": len(ours), "counts": counts, "max_length": student_length(config)}
    _check_counts(config, facts, setting, folder)
    for line in rows_report(facts):
        progress.say(f"prepare: {line}")
    return commit_manifest(run.store, FOLDER, plan.fingerprint, entries, facts)


def _write(
    config: Config, run: Run, data: Manifest, rows: StudentRows, fingerprint: str, progress: Progress
) -> tuple[list[Entry], dict[str, dict[str, int]]]:
    """Every shard, and by split the sums of FACTS."""
    entries, counts, started = list[Entry](), {split: Counter[str]() for split in PLACES}, time.monotonic()
    shards = [(split, entry) for split in PLACES for entry in data.shards(split)]
    for number, (split, entry) in enumerate(shards):
        progress.check()
        standing = committed_shard(run.store, f"{FOLDER}/{entry.file}", fingerprint)
        if standing is None:
            shard, texts, sources = teachers_rows(run.home("data"), entry)
            made = rows.made(shard, texts)
            standing = write_student_shard(run.store, made, sources, fingerprint)
        else:
            made = read_student_shard(run.store, standing)
        entries.append(standing)
        counts[split].update(made.counts())
        progress.counts("prepare, student", number + 1, len(shards), "shards", started)
    return entries, {s: {name: found[name] for name in FACTS} for s, found in counts.items() if found["tokens"]}


def _check_counts(config: Config, facts: dict[str, Any], setting: str, folder: Path) -> None:
    rows = {split: Counter(found) for split, found in facts["counts"].items()}
    total = sum(rows.values(), Counter[str]())
    if total["changed"] and total["changed"] > config.data.max_dropped * total["rows"]:
        raise UserError(
            f"{setting}: {folder}: its tokenizer changes {total['changed']:,} of {total['rows']:,} rows, by lower case"
            " or another form of characters, so that its tokens are not those of the text"
            + (", or its chat template refuses or changes them" if config.data.messages is not None else "")
            + ". Choose one that keeps texts as they are, or raise data.max_dropped"
        )
    for split, found in rows.items():
        if not found["spans"]:
            raise UserError(
                f"{setting}: {folder}: in {split} no span of text ends at tokens of both tokenizers. Raise"
                " data.max_length, or give other data"
            )


def rows_report(facts: dict[str, Any]) -> list[str]:
    """What is worth knowing about a student's rows, a line each."""
    counts = facts["counts"]
    lines = [
        "the student's tokens: " + ", ".join(f"{found['tokens']:,} {split}" for split, found in counts.items())
        + "; in spans with the teacher's are "
        + ", ".join(f"{found['in_spans'] / max(1, found['learnt']):.1%} of them in {s}" for s, found in counts.items())
    ]  # fmt: skip
    total = sum((Counter(found) for found in counts.values()), Counter[str]())
    left = total["teacher_learnt"] - total["teacher_in_spans"]
    lines.append(
        f"{left:,} of {total['teacher_learnt']:,} learnt tokens of the teacher are in no span: at the border of a row,"
        " of what is learnt, or beside unknown characters"
    )
    if total["cut"]:
        lines.append(
            f"{total['cut']:,} of the student's tokens are beyond its rows of {facts['max_length']:,} and left out;"
            " student.max_length may be raised"
        )
    if total["changed"]:
        lines.append(f"{total['changed']:,} rows, whose text the student's tokenizer changes, are not learnt")
    return lines
