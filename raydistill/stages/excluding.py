"""The rows that the student does not learn from the teacher (`train.exclude`): the rule, and how many they are."""

from __future__ import annotations

from typing import Any

from raydistill.config.run import Config
from raydistill.data.exclusion import Exclusion
from raydistill.data.shards import STUDENT_SPLITS
from raydistill.errors import UserError
from raydistill.record.fingerprint import digest
from raydistill.record.run import Run
from raydistill.stages.calibration import teacher_temperature
from raydistill.stages.review import has_review, marked_bad
from raydistill.stages.taught_rows import taught_shards


def exclusion_of(config: Config, run: Run) -> Exclusion | None:
    """The rule as workers apply it; None without one. Raises UserError for an unknown class and for missing marks."""
    asked = config.train.exclude
    if asked is None:
        return None
    return Exclusion(
        confidence_below=asked.confidence_below,
        wrong=asked.wrong,
        classes=class_numbers(config, run.require("data").facts["labels"]),
        row_ids=marked_bad(run) if asked.marked_bad else frozenset(),
    )


def check_exclusion(config: Config, run: Run, labels: list[str]) -> None:
    """Raises UserError for an unknown class, and for marks that there are none of, before any work."""
    class_numbers(config, labels)
    if config.train.exclude and config.train.exclude.marked_bad and not has_review(run):
        marked_bad(run)


def class_numbers(config: Config, labels: list[str]) -> tuple[int, ...]:
    """The numbers of the classes that the rule names. Raises UserError for one that the data do not have."""
    names = config.train.exclude.classes if config.train.exclude else ()
    if unknown := next((name for name in names if name not in labels), None):
        shown = ", ".join(labels[:8]) + (" …" if len(labels) > 8 else "")
        raise UserError(f"train.exclude.classes: {unknown!r} is not one of the data's labels, which are {shown}")
    return tuple(labels.index(name) for name in names)


def marks_input(config: Config, run: Run) -> dict[str, Any]:
    """What determines a training beside the rule's own settings: which rows are marked bad."""
    if config.train.exclude is None or not config.train.exclude.marked_bad:
        return {}
    return {"train.exclude.marked": digest(sorted(marked_bad(run)))}


def excluded_rows(config: Config, run: Run) -> dict[str, int] | None:
    """How many rows of those that the student learns from are excluded ("rows" of "of"), and by each part of the rule.

    None without a rule. Raises UserError when all are.
    """
    exclusion = exclusion_of(config, run)
    if exclusion is None:
        return None
    divisor = teacher_temperature(config, run)
    shards = taught_shards(run, STUDENT_SPLITS)
    found = exclusion.count((shard.row_ids_N, shard.labels_N, logits / divisor) for shard, logits in shards)
    total = sum(entry.rows for entry in run.require("data").shards(*STUDENT_SPLITS))
    if found["rows"] == total:
        raise UserError(f"train.exclude: excludes all {total:,} rows, so that nothing is learned from the teacher")
    return {"of": total, **found}


def exclusion_line(found: dict[str, int] | None) -> str:
    """How many rows are excluded and why, in words; None before the teacher has scored them."""
    if found is None:
        return "excluded from the teacher's losses: known when teach is complete"
    reasons = {name: count for name, count in found.items() if name not in ("rows", "of")}
    named = ", ".join(f"{name} {count:,}" for name, count in reasons.items())
    return f"excluded from the teacher's losses: {found['rows']:,} of {found['of']:,} rows ({named})"
