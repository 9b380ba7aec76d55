"""The share of train's rows that trials learn from, drawn once and committed as row ids beside the search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raydistill.config.cross_tokenizer import crosses_tokenizers, student_length
from raydistill.config.run import Config
from raydistill.data.folds import FoldRows, write_folds
from raydistill.data.order import steps_per_epoch
from raydistill.data.shards import read_split
from raydistill.data.share import assign_share, strata_of
from raydistill.data.student_rows import FOLDER as STUDENT_ROWS
from raydistill.data.token_order import token_steps
from raydistill.data.token_shards import read_token_shard
from raydistill.record.commit import Entry, commit_manifest, committed_shard, read_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.record.store import Store
from raydistill.stages.language.student_rows import student_rows_plan
from raydistill.stages.training_job import student_splits

FOLDER = "tune/rows"
CHOSEN, LEFT_OUT = 0, 1  # as folds
Int64 = npt.NDArray[np.int64]


def rows_plan(config: Config, run: Run) -> Plan:
    """Everything that determines the share."""
    assert config.tune is not None
    inputs = {"data": run.require("data").fingerprint, "seed": config.tune.seed, "share": config.tune.data_fraction}
    if crosses_tokenizers(config):
        inputs["student_rows"] = student_rows_plan(config, run).fingerprint
    return Plan("rows", inputs)


def draw_rows(config: Config, run: Run) -> FoldRows | None:
    """The share of the rows that students learn from; None for all of them. What stands committed is kept."""
    assert config.tune is not None
    if config.tune.data_fraction == 1:
        return None
    plan, rows = rows_plan(config, run), FoldRows(run.store.root, CHOSEN, inside=True, folder=FOLDER, stage="tune")
    manifest = read_manifest(run.store, FOLDER)
    if manifest is not None and manifest.fingerprint == plan.fingerprint:
        return rows
    made, counts = [], {}
    data = run.require("data")
    choose, tokens = _choose_rows if config.task != "causal_lm" else _choose_documents, 0
    store = run.home("data")
    if crosses_tokenizers(config):  # the same documents, counted in the student's tokens
        store, data, choose = run.store, run.require("student_rows"), _choose_own_documents
    for split in student_splits(config):
        for shard in choose(store, data.shards(split), config.tune.data_fraction, config.tune.seed):
            folds_N = np.where(shard.chosen_N, CHOSEN, LEFT_OUT).astype(np.int8)
            made.append(
                committed_shard(run.store, f"{FOLDER}/{shard.file}", plan.fingerprint)
                or write_folds(
                    run.store, shard.file, shard.row_ids_N, folds_N, fingerprint=plan.fingerprint, folder=FOLDER
                )
            )
            counts[shard.file] = np.bincount(folds_N, minlength=2).tolist()
            tokens += shard.tokens
    commit_manifest(
        run.store, FOLDER, plan.fingerprint, made, {"rows": counts, **({"tokens": tokens} if tokens else {})}
    )
    return rows


@dataclass(frozen=True)
class Chosen:
    """Which rows of a data shard are in the share, and of a language model's how many tokens those have."""

    file: str
    row_ids_N: Int64
    chosen_N: npt.NDArray[np.bool_]
    tokens: int = 0


def _choose_rows(store: Store, entries: list[Entry], share: float, seed: int) -> Iterator[Chosen]:
    """Even in every label."""
    shards = list(read_split(store, entries))
    if shards:
        chosen_N = assign_share(strata_of(np.concatenate([shard.labels_N for shard in shards])), share, seed)
        for shard, part_N in zip(shards, _parts(chosen_N, map(len, shards)), strict=True):
            yield Chosen(shard.name, shard.row_ids_N, part_N)


def _choose_own_documents(store: Store, entries: list[Entry], share: float, seed: int) -> Iterator[Chosen]:
    return _choose_documents(store, entries, share, seed, STUDENT_ROWS)


def _choose_documents(
    store: Store, entries: list[Entry], share: float, seed: int, folder: str = "data"
) -> Iterator[Chosen]:
    """Whole documents, whatever their length."""
    shards = [read_token_shard(store, entry, folder) for entry in entries]
    if shards:
        documents, document_N = np.unique(np.concatenate([s.documents_R for s in shards]), return_inverse=True)
        chosen_N = assign_share(np.zeros(len(documents), np.int64), share, seed)[document_N]
        for shard, part_N in zip(shards, _parts(chosen_N, map(len, shards)), strict=True):
            yield Chosen(shard.name, shard.row_ids_R, part_N, int(shard.lengths_R[part_N].sum()))


def _parts(values_N: npt.NDArray[np.bool_], counts: Iterable[int]) -> list[npt.NDArray[np.bool_]]:
    return np.split(values_N, np.cumsum(list(counts))[:-1])


def epoch_steps(config: Config, run: Run, batch_size: int) -> int:
    """The optimiser steps of a trial's epoch."""
    assert config.tune is not None
    data, share = run.require("data"), None if config.tune.data_fraction == 1 else read_manifest(run.store, FOLDER)
    if config.task == "causal_lm":
        counts = (run.require("student_rows") if crosses_tokenizers(config) else data).facts["counts"]
        whole = sum(counts[split]["tokens"] for split in student_splits(config) if split in counts)
        tokens = whole if share is None else share.facts["tokens"]
        return token_steps(tokens, batch_size * student_length(config))
    return steps_per_epoch(num_rows(config, run), batch_size)


def num_rows(config: Config, run: Run) -> int:
    """The rows that a trial learns from in an epoch."""
    manifest = read_manifest(run.store, FOLDER)
    if config.tune is not None and config.tune.data_fraction < 1 and manifest is not None:
        return sum(counts[CHOSEN] for counts in manifest.facts["rows"].values())
    return sum(entry.rows for entry in run.require("data").shards(*student_splits(config)))
