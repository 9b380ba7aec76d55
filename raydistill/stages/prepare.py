"""Stage prepare: from the user's files to data shards with row ids and labels mapped by name.

Two passes over train: one that counts, so that every mistake is found before anything is written, and one that writes.
Both stream; memory does not grow with the files.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from raydistill.config import Config
from raydistill.data.duplicates import TextIndex
from raydistill.data.shards import ShardWriter
from raydistill.data.sources import Columns, Dropped, Source, find_source, read_rows
from raydistill.data.splits import Survey, ValidationDraw, survey
from raydistill.errors import UserError
from raydistill.record.commit import Entry, Manifest, commit_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.stages.progress import Progress


@dataclass(frozen=True)
class Surveyed:
    """The sources after the first pass."""

    sources: dict[str, Source]
    found: dict[str, Survey]
    labels: list[str]
    validation_rows: dict[str, int]  # by label, when validation is a share of train

    def rows(self, split: str) -> int:
        drawn = sum(self.validation_rows.values())
        if split == "validation" and "validation" not in self.sources:
            return drawn
        return self.found[split].rows - (drawn if split == "train" else 0)


def prepare(config: Config, run: Run, surveyed: Surveyed | None, progress: Progress) -> Manifest:
    """Writes the data shards; their manifest. What stands complete for the same inputs is kept.

    `surveyed` is what `survey_sources` found; None when the data stand already (`standing_data`, or another run's).
    Raises UserError when the data stand there for other inputs.
    """
    plan = data_plan(config, surveyed) if surveyed else None
    manifest = run.begin("data", plan) if plan else run.require("data")
    if manifest is not None:
        progress.say(f"prepare: complete, {data_report(manifest.facts)[0]}")
        return manifest
    assert surveyed is not None
    assert plan is not None
    entries, report = _write(config, run, surveyed, plan.fingerprint, progress)
    for split, source in surveyed.sources.items():
        if find_source(source.setting, _location(config, split)).sha256 != source.sha256:
            raise UserError(f"{source.setting}: {source.files[0]}: changed while it was read. Use --redo prepare")
    facts = {
        "labels": surveyed.labels,
        "rows": {split: surveyed.rows(split) for split in ("train", "validation", "test")},
        "rows_by_label": {split: dict(sorted(found.labels.items())) for split, found in surveyed.found.items()},
        "dropped": {split: dict(sorted(found.dropped.items())) for split, found in surveyed.found.items()},
        "repeated": report,
        "files": {split: list(source.files) for split, source in surveyed.sources.items()},
    }
    manifest = commit_manifest(run.store, "data", plan.fingerprint, entries, facts)
    for line in data_report(facts):
        progress.say(f"prepare: {line}")
    return manifest


def standing_data(config: Config, run: Run) -> Manifest | None:
    """The manifest of data that are complete for these very sources and settings, known without reading a row."""
    plan, manifest = run.plan("data"), run.complete("data")
    if plan is None or manifest is None or run.redo == "prepare":
        return None
    sources = {split: find_source(f"data.{split}", _location(config, split)).identity() for split in _splits(config)}
    asked = {"sources_sha256": dict(sorted(sources.items())), **_settings(config)}
    return manifest if all(plan.inputs.get(name) == value for name, value in asked.items()) else None


def _splits(config: Config) -> list[str]:
    return ["train", "test"] + (["validation"] if isinstance(config.data.validation, str) else [])


def survey_sources(config: Config, progress: Progress) -> Surveyed:
    """The first pass: everything about the sources that can be wrong is found here."""
    columns, limit = columns_of(config), config.data.max_dropped
    splits = _splits(config)
    sources = {split: find_source(f"data.{split}", _location(config, split)) for split in splits}
    found: dict[str, Survey] = {}
    for split, source in sources.items():
        found[split] = survey(source, columns, limit)
        progress.check()
    labels = sorted(found["train"].labels)
    if len(labels) < 2:
        raise UserError(
            f"data.train: {sources['train'].files[0]}: has one class only ({labels[0]!r}). Two are needed at least"
        )
    for split in splits[1:]:
        _check_labels(sources[split], found[split], labels)
    drawn: dict[str, int] = {}
    if not isinstance(config.data.validation, str):
        drawn = ValidationDraw(found["train"].labels, config.data.validation, config.data.split_seed).rows
        if not sum(drawn.values()):
            raise UserError(
                f"data.validation: a share of {config.data.validation} of {found['train'].rows} rows draws none."
                " Raise it, or give a validation file"
            )
    return Surveyed(sources, found, labels, drawn)


def columns_of(config: Config) -> Columns:
    return Columns(config.data.text, config.data.label, config.data.delimiter, config.data.max_row_bytes)


def _location(config: Config, split: str) -> str:
    return str(getattr(config.data, split))


def _check_labels(source: Source, found: Survey, labels: list[str]) -> None:
    unknown = sorted(set(found.labels) - set(labels))
    if unknown:
        raise UserError(
            f"{source.setting}: {source.files[0]}: label {unknown[0]!r} ({found.labels[unknown[0]]} rows) is not in"
            f" train, which has {', '.join(labels[:8])}{' …' if len(labels) > 8 else ''}. Mend it or add rows"
        )


def data_plan(config: Config, surveyed: Surveyed) -> Plan:
    """Everything that determines the bytes of the data shards."""
    inputs = {
        "sources_sha256": {split: source.identity() for split, source in sorted(surveyed.sources.items())},
        "rows": {split: surveyed.rows(split) for split in ("train", "validation", "test")},
        "labels": surveyed.labels,
    }
    return Plan("data", inputs | _settings(config))


def _settings(config: Config) -> dict[str, Any]:
    """The settings that determine the data shards."""
    names = ("text", "label", "delimiter", "max_row_bytes", "shard_rows", "split_seed")
    share = "a source" if isinstance(config.data.validation, str) else config.data.validation
    return {
        "task": config.task,
        **{f"data.{name}": getattr(config.data, name) for name in names},
        "data.validation": share,
    }


def _write(
    config: Config, run: Run, surveyed: Surveyed, fingerprint: str, progress: Progress
) -> tuple[list[Entry], dict[str, int]]:
    """The second pass: every row to its split's shard; the entries, and what stands twice."""
    number = {label: index for index, label in enumerate(surveyed.labels)}
    writers, first = {}, 0
    for split in ("train", "validation", "test"):
        writers[split] = ShardWriter(
            run.store, split, first_row_id=first, shard_rows=config.data.shard_rows, fingerprint=fingerprint
        )
        first += surveyed.rows(split)
    share = config.data.validation
    draw = (
        None
        if isinstance(share, str)
        else ValidationDraw(surveyed.found["train"].labels, share, config.data.split_seed)
    )
    done, started = 0, time.monotonic()
    with TextIndex() as index:
        for source_split, source in surveyed.sources.items():
            for row in read_rows(source, columns_of(config)):
                if isinstance(row, Dropped):
                    continue
                split = "validation" if source_split == "train" and draw and draw.takes(row.label) else source_split
                if row.label not in number:
                    raise UserError(
                        f"{source.setting}: {source.files[row.file]}: changed while it was read. Use --redo prepare"
                    )
                writers[split].add(row, number[row.label])
                index.add(row.text, split, number[row.label])
                done += 1
                if done % 4096 == 0:
                    progress.check()
                    progress.counts("prepare", done, first, "rows", started)
        entries = [entry for writer in writers.values() for entry in writer.close()]
        return entries, index.report()


def data_report(facts: dict[str, Any]) -> list[str]:
    """What is worth knowing about the data, a line each."""
    rows = facts["rows"]
    counts = ", ".join(f"{rows[split]:,} {split}" for split in ("train", "validation", "test"))
    lines = [f"{counts} rows, {len(facts['labels'])} labels"]
    for split, dropped in facts["dropped"].items():
        if dropped:
            lines.append(f"dropped from {split}: " + ", ".join(f"{n:,} with {reason}" for reason, n in dropped.items()))
    repeated = facts["repeated"]
    names = {
        "train_rows_repeating_another": "train rows repeat another one",
        "texts_with_two_labels": "texts stand with more than one label",
        "validation_rows_also_in_train": "validation rows are in train too",
        "test_rows_also_in_train": "test rows are in train too: the test is easier than it looks",
    }
    lines += [f"note: {repeated[key]:,} {text}" for key, text in names.items() if repeated[key]]
    rare = [label for label, count in Counter(facts["rows_by_label"]["train"]).items() if count < 5]
    if rare:
        lines.append(f"note: {len(rare)} labels have fewer than 5 rows in train, such as {rare[0]!r}")
    return lines
