"""Stage prepare: from the user's files to data shards with row ids and labels mapped by name.

Two passes over train: one that counts, so that every mistake is found before anything is written, and one that writes.
Both stream; memory does not grow with the files.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

from raydistill.config.run import Config
from raydistill.data.duplicates import TextIndex
from raydistill.data.labels import Label, LabelNumbers
from raydistill.data.shards import SPLITS, ShardWriter
from raydistill.data.sources import Columns, Dropped, Row, Source, find_sources, read_rows
from raydistill.data.splits import Survey, ValidationDraw, survey
from raydistill.errors import UserError
from raydistill.record.commit import Entry, Manifest, commit_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.stages.augmenting import augment_settings, augmented, mask_token, masked_words
from raydistill.stages.progress import Progress


@dataclass(frozen=True)
class Surveyed:
    """The sources after the first pass."""

    sources: dict[str, Source]
    found: dict[str, Survey]
    labels: list[str]
    validation_rows: dict[Label, int]  # by label, when validation is a share of train
    copies: int = 0  # of each row of train, as augmented ones

    @property
    def rows(self) -> dict[str, int]:
        """Rows of every split; "unlabelled" and "augmented" are there when they have any."""
        drawn = sum(self.validation_rows.values())
        rows = {split: self.found[split].rows for split in ("train", "validation", "test") if split in self.found}
        rows |= {"train": rows["train"] - drawn} | ({} if "validation" in rows else {"validation": drawn})
        unlabelled = sum(found.unlabelled for found in self.found.values())
        more = {"unlabelled": unlabelled, "augmented": self.copies * rows["train"]}
        return {split: rows[split] for split in ("train", "validation", "test")} | {s: n for s, n in more.items() if n}

    @property
    def files(self) -> dict[str, list[str]]:
        """The files of every split, by whose place a row names its own."""
        files = {split: list(source.files) for split, source in self.sources.items()}
        if self.found["train"].unlabelled:
            files["unlabelled"] = files["train"] + files.get("unlabelled", [])
        return files


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
        if _find(config, split).sha256 != source.sha256:
            raise UserError(f"{source.setting}: {source.files[0]}: changed while it was read. Use --redo prepare")
    facts = {
        "labels": surveyed.labels,
        "rows": surveyed.rows,
        "rows_by_label": {split: dict(sorted(found.by_name.items())) for split, found in surveyed.found.items()},
        "dropped": {split: dict(sorted(found.dropped.items())) for split, found in surveyed.found.items()},
        "repeated": report,
        "files": surveyed.files,
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
    sources = {split: _find(config, split).identity() for split in _splits(config)}
    asked = {"sources_sha256": dict(sorted(sources.items())), **_settings(config)}
    return manifest if all(plan.inputs.get(name) == value for name, value in asked.items()) else None


def _splits(config: Config) -> list[str]:
    """The splits that have sources of their own."""
    more = {"validation": isinstance(config.data.validation, str), "unlabelled": bool(config.data.unlabelled)}
    return ["train", "test", *(split for split, is_there in more.items() if is_there)]


def survey_sources(config: Config, progress: Progress) -> Surveyed:
    """The first pass: everything about the sources that can be wrong is found here."""
    splits = _splits(config)
    sources = {split: _find(config, split) for split in splits}
    found: dict[str, Survey] = {}
    for split, source in sources.items():
        found[split] = survey(source, columns_of(config, split), config.data.max_dropped)
        progress.check()
    labels = sorted(found["train"].by_name)
    if len(labels) < 2:
        raise UserError(
            f"data.train: {sources['train'].files[0]}: has"
            f" {f'one class only ({labels[0]!r})' if labels else 'no class at all'}. Two are needed at least"
        )
    for split in splits[1:]:
        _check_labels(sources[split], found[split], labels)
    drawn: dict[Label, int] = {}
    if not isinstance(config.data.validation, str):
        drawn = ValidationDraw(found["train"].labels, config.data.validation, config.data.split_seed).rows
        if not sum(drawn.values()):
            raise UserError(
                f"data.validation: a share of {config.data.validation} of {found['train'].rows} rows draws none."
                " Raise it, or give a validation file"
            )
    mask_token(config)
    masked_words(config)
    return Surveyed(sources, found, labels, drawn, config.data.augment.copies if config.data.augment else 0)


def columns_of(config: Config, split: str) -> Columns:
    """What is read of a split's sources: of the unlabelled ones the text alone."""
    data = config.data
    label = None if split == "unlabelled" else data.label
    keeps = data.keep_unlabelled and split == "train"
    separator = data.label_separator if config.task == "multi_label" else None
    return Columns(data.text, label, data.delimiter, data.max_row_bytes, keeps, separator)


def _find(config: Config, split: str) -> Source:
    places = getattr(config.data, split)
    return find_sources(f"data.{split}", places if isinstance(places, tuple) else (places,))


def _check_labels(source: Source, found: Survey, labels: list[str]) -> None:
    unknown = sorted(set(found.by_name) - set(labels))
    if unknown:
        raise UserError(
            f"{source.setting}: {source.files[0]}: label {unknown[0]!r} ({found.by_name[unknown[0]]} rows) is not in"
            f" train, which has {', '.join(labels[:8])}{' …' if len(labels) > 8 else ''}. Mend it or add rows"
        )


def data_plan(config: Config, surveyed: Surveyed) -> Plan:
    """Everything that determines the bytes of the data shards."""
    inputs = {
        "sources_sha256": {split: source.identity() for split, source in sorted(surveyed.sources.items())},
        "rows": surveyed.rows,
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
        **({"data.keep_unlabelled": True} if config.data.keep_unlabelled else {}),
        **({"data.label_separator": config.data.label_separator} if config.task == "multi_label" else {}),
        **augment_settings(config),
    }


def _write(
    config: Config, run: Run, surveyed: Surveyed, fingerprint: str, progress: Progress
) -> tuple[list[Entry], dict[str, int]]:
    """The second pass: every row to its split's shard; the entries, and what stands twice."""
    writers, total = _writers(config, run, surveyed, fingerprint)
    places, done, started = _Places(config, surveyed), 0, time.monotonic()
    with TextIndex() as index:
        for split, source in surveyed.sources.items():
            for row in read_rows(source, columns_of(config, split)):
                if isinstance(row, Dropped):
                    continue
                target, number, row = places.of(split, row)
                if number is None or target not in writers:
                    raise UserError(
                        f"{source.setting}: {source.files[row.file]}: changed while it was read. Use --redo prepare"
                    )
                writers[target].add(row, number)
                index.add(row.text, target, number if isinstance(number, int) else crc32(number) >> 1)
                done += 1
                if done % 4096 == 0:
                    progress.check()
                    progress.counts("prepare", done, total, "rows", started)
        repeated = index.report()
    train = writers["train"].close()
    if "augmented" in writers:
        standing = writers["augmented"].keep_standing()
        done += standing
        for row, number in augmented(config, run, train, first=standing):
            writers["augmented"].add(row, number)
            done += 1
            progress.check()
            progress.counts("prepare", done, total, "rows", started)
    others = [entry for split, writer in writers.items() if split != "train" for entry in writer.close()]
    return train + others, repeated


class _Places:
    """Which split each row goes to, with the number of its class."""

    def __init__(self, config: Config, surveyed: Surveyed) -> None:
        self._numbers = LabelNumbers(surveyed.labels, sets=config.task == "multi_label")
        share, found = config.data.validation, surveyed.found["train"]
        self._draw = None if isinstance(share, str) else ValidationDraw(found.labels, share, config.data.split_seed)
        # Rows without a label come from train's files too, which then stand before the others'.
        self._files_before = len(surveyed.sources["train"].files) if found.unlabelled else 0

    def of(self, split: str, row: Row) -> tuple[str, int | bytes | None, Row]:
        """The split, the label as shards hold it (None for an unknown one), the row with its place among the files."""
        number = self._numbers.of(row.label)
        if split == "unlabelled":
            return split, number, replace(row, file=row.file + self._files_before)
        if row.label is None:
            return "unlabelled", number, row
        drawn = split == "train" and number is not None and self._draw is not None and self._draw.takes(row.label)
        return "validation" if drawn else split, number, row


def _writers(config: Config, run: Run, surveyed: Surveyed, fingerprint: str) -> tuple[dict[str, ShardWriter], int]:
    """A writer for each split, and the number of all rows: row ids count on from split to split."""
    writers, first = {}, 0
    for split, rows in surveyed.rows.items():
        writers[split] = ShardWriter(
            run.store, split, first_row_id=first, shard_rows=config.data.shard_rows, fingerprint=fingerprint,
            classes=len(surveyed.labels) if config.task == "multi_label" else None,
        )  # fmt: skip
        first += rows
    return writers, first


def data_report(facts: dict[str, Any]) -> list[str]:
    """What is worth knowing about the data, a line each."""
    rows = facts["rows"]
    counts = ", ".join(f"{rows[split]:,} {split}" for split in SPLITS if split in rows)
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
        "unlabelled_rows_repeating_another": "unlabelled rows repeat another one or stand in train",
        "unlabelled_rows_also_in_validation": "unlabelled rows are in validation too",
        "unlabelled_rows_also_in_test": "unlabelled rows are in the test too, whose labels they do not have",
    }
    lines += [f"note: {repeated[key]:,} {text}" for key, text in names.items() if repeated.get(key)]
    rare = [label for label, count in Counter(facts["rows_by_label"]["train"]).items() if count < 5]
    if rare:
        lines.append(f"note: {len(rare)} labels have fewer than 5 rows in train, such as {rare[0]!r}")
    return lines
