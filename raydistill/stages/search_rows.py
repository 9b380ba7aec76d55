"""The share of train's rows that trials learn from, drawn once and committed as row ids beside the search."""

from __future__ import annotations

import numpy as np

from raydistill.config.run import Config
from raydistill.data.folds import FoldRows, write_folds
from raydistill.data.shards import STUDENT_SPLITS, read_split
from raydistill.data.share import assign_share, strata_of
from raydistill.record.commit import commit_manifest, committed_shard, read_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run

FOLDER = "tune/rows"
CHOSEN, LEFT_OUT = 0, 1  # as folds


def rows_plan(config: Config, run: Run) -> Plan:
    """Everything that determines the share."""
    assert config.tune is not None
    inputs = {"data": run.require("data").fingerprint, "seed": config.tune.seed, "share": config.tune.data_fraction}
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
    for split in STUDENT_SPLITS:
        shards = list(read_split(run.home("data"), data.shards(split)))
        if not shards:
            continue
        strata_N = strata_of(np.concatenate([shard.labels_N for shard in shards]))
        chosen_N = assign_share(strata_N, config.tune.data_fraction, config.tune.seed)
        start = 0
        for shard in shards:
            end = start + len(shard.row_ids_N)
            folds_N = np.where(chosen_N[start:end], CHOSEN, LEFT_OUT).astype(np.int8)
            start = end
            made.append(
                committed_shard(run.store, f"{FOLDER}/{shard.name}", plan.fingerprint)
                or write_folds(
                    run.store, shard.name, shard.row_ids_N, folds_N, fingerprint=plan.fingerprint, folder=FOLDER
                )
            )
            counts[shard.name] = np.bincount(folds_N, minlength=2).tolist()
    commit_manifest(run.store, FOLDER, plan.fingerprint, made, {"rows": counts})
    return rows
