"""Further files that the models of a report are compared on (`evaluate.sets`).

Each becomes shards as `prepare` writes them, in `report/sets/<name>/`, so that it is scored over the cluster as the
test is, however large it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from raydistill.config.evaluate import EvaluationSet
from raydistill.config.run import Config
from raydistill.data.labels import LabelNumbers
from raydistill.data.shards import ShardWriter
from raydistill.data.sources import Columns, Dropped, Source, find_source, read_rows
from raydistill.data.splits import Survey, survey
from raydistill.errors import UserError
from raydistill.record.commit import Manifest, commit_manifest, read_manifest
from raydistill.record.fingerprint import digest
from raydistill.record.run import Run
from raydistill.record.store import Store, open_store
from raydistill.stages.progress import Progress

SPLIT = "test"
WITHOUT_VALUE = "(none)"


@dataclass(frozen=True)
class ExtraSet:
    """One file, or several by a glob, and what is read of it."""

    name: str
    asked: EvaluationSet
    source: Source
    columns: Columns

    def identity(self) -> dict[str, Any]:
        """What determines its rows: contents and columns, not paths."""
        asked = self.asked.model_dump(mode="json", exclude={"path"})
        return {"sha256": self.source.identity(), **asked, "text": self.columns.text, "label": self.columns.label}


def find_sets(config: Config) -> list[ExtraSet]:
    """The sets that the config names. Raises UserError for files that are not there."""
    return [
        ExtraSet(name, asked, find_source(f"evaluate.sets.{name}.path", asked.path), _columns(config, name, asked))
        for name, asked in config.evaluate.sets.items()
    ]


def _columns(config: Config, name: str, asked: EvaluationSet) -> Columns:
    data = config.data
    separator = data.label_separator if config.task == "multi_label" else None
    label = None if asked.out_of_domain else asked.label or data.label
    settings = (f"evaluate.sets.{name}.text", f"evaluate.sets.{name}.label")
    return Columns(
        asked.text or data.text, label, data.delimiter, data.max_row_bytes, separator=separator, settings=settings
    )


def check_sets(config: Config, labels: list[str]) -> None:
    """Raises UserError for a set with other columns or labels, or with too many rows that cannot be used."""
    for one in find_sets(config):
        found = survey(one.source, one.columns, config.data.max_dropped)
        _check_labels(one, found, labels)
        if one.asked.slice_by is not None:
            next(read_rows(one.source, _slice_columns(one)), None)


def _check_labels(one: ExtraSet, found: Survey, labels: list[str]) -> None:
    unknown = sorted(set(found.by_name) - set(labels))
    if unknown:
        raise UserError(
            f"{one.source.setting}: {one.source.files[0]}: label {unknown[0]!r} ({found.by_name[unknown[0]]} rows) is"
            f" not one of the run's, which are {', '.join(labels[:8])}{' …' if len(labels) > 8 else ''}. Mend it, or"
            f" set evaluate.sets.{one.name}.out_of_domain=true where its rows are of another task"
        )


def set_store(run: Run, name: str) -> Store:
    """Where a set's shards stand, as a run's data do."""
    return open_store(f"{run.store.root}/report/sets/{name}")


def write_set(one: ExtraSet, config: Config, run: Run, labels: list[str], progress: Progress) -> Manifest:
    """The shards of a set; those that stand for the same rows are kept."""
    store, sets = set_store(run, one.name), config.task == "multi_label"
    fingerprint = digest({"set": one.identity(), "labels": labels, "shard_rows": config.data.shard_rows})
    manifest = read_manifest(store, "data")
    if manifest is not None and manifest.fingerprint == fingerprint:
        return manifest
    numbers = LabelNumbers(labels, sets=sets)
    writer = ShardWriter(
        store, SPLIT, first_row_id=0, shard_rows=config.data.shard_rows, fingerprint=fingerprint,
        classes=len(labels) if sets else None,
    )  # fmt: skip
    for row in read_rows(one.source, one.columns):
        if isinstance(row, Dropped):
            continue
        number = numbers.of(row.label)
        if number is None:
            raise UserError(f"{one.source.setting}: {one.source.files[row.file]}: changed while it was read")
        writer.add(row, number)
        if row.number % 4096 == 0:
            progress.check()
    return commit_manifest(store, "data", fingerprint, writer.close(), {"labels": labels})


def slices_of(one: ExtraSet) -> list[str] | None:
    """Of each row, in the order of the shards, the value of the column to slice by; None where there is none."""
    if one.asked.slice_by is None:
        return None
    values = {
        (row.file, row.number): str(row.label) if row.label is not None else WITHOUT_VALUE
        for row in read_rows(one.source, _slice_columns(one))
        if not isinstance(row, Dropped)
    }
    kept = (row for row in read_rows(one.source, one.columns) if not isinstance(row, Dropped))
    return [values.get((row.file, row.number), WITHOUT_VALUE) for row in kept]


def _slice_columns(one: ExtraSet) -> Columns:
    """The same rows with the value to slice by in the place of the label."""
    settings = (one.columns.settings[0], f"evaluate.sets.{one.name}.slice_by")
    return replace(one.columns, label=one.asked.slice_by, keep_unlabelled=True, separator=None, settings=settings)
