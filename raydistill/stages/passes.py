"""Several teachers over the same rows, and one cache made of what they say.

Each pass of a model writes its own shards, below the cache that they become, so that a stop loses none of them. They
are float32: nothing is rounded before the mean is taken. What is merged has one target for each row, by row id.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from raydistill.cache.shards import read_logits, write_logits
from raydistill.config.run import Config
from raydistill.data.duplicates import text_key
from raydistill.data.folds import FOLDER as FOLDS
from raydistill.data.folds import assign_folds, write_folds
from raydistill.data.shards import read_split
from raydistill.data.share import strata_of
from raydistill.errors import UserError
from raydistill.losses.ensemble import ensemble_logits
from raydistill.record.commit import Entry, Manifest, commit_manifest, committed_shard
from raydistill.record.run import Run
from raydistill.record.store import Store
from raydistill.stages.cluster import Share
from raydistill.stages.feature_scoring import FeatureOutput
from raydistill.stages.progress import Progress
from raydistill.stages.scoring import Scored, ScoringJob, score
from raydistill.stages.teachers import CROSS_FITTED, Pass, feature_source, folds_plan, is_ensemble, members, passes

MEMBER_CODEC = "dense-float32"


def pass_folder(part: str) -> str:
    """Where the pass of a teacher stands."""
    return f"teacher/cache/passes/{part.replace('/', '.')}"


@dataclass(frozen=True)
class PassShards:
    """The committed shards of one pass."""

    folder: str
    manifest: Manifest


def make_folds(config: Config, run: Run, progress: Progress) -> None:
    """Writes which fold every train row is in. Raises UserError when train has fewer texts than folds."""
    data = run.require("data")
    plan = folds_plan(config, data)
    if run.begin("folds", plan) is not None:
        return
    folds, entries = config.teacher.cross_fit or 0, data.shards(CROSS_FITTED)
    ids, labels, keys = [], [], []
    for shard in read_split(run.home("data"), entries):
        ids.append(shard.row_ids_N)
        labels.append(shard.labels_N)
        keys.append(np.array([text_key(text) for text in shard.texts], np.uint64))
    try:
        folds_N = assign_folds(
            strata_of(np.concatenate(labels)), np.concatenate(keys), folds=folds, seed=config.data.split_seed
        )
    except ValueError as error:
        raise UserError(f"teacher.cross_fit: found {folds}: {error}. Lower it, or give more rows") from None
    made, counts, start = [], {}, 0
    for entry, row_ids_N in zip(entries, ids, strict=True):
        part_N = folds_N[start : start + len(row_ids_N)]
        start += len(row_ids_N)
        name = f"{FOLDS}/{entry.file}"
        standing = committed_shard(run.store, name, plan.fingerprint)
        made.append(standing or write_folds(run.store, entry.file, row_ids_N, part_N, fingerprint=plan.fingerprint))
        counts[entry.file] = np.bincount(part_N, minlength=folds).tolist()
    commit_manifest(run.store, FOLDS, plan.fingerprint, made, {"folds": folds, "rows": counts})
    sizes = np.bincount(folds_N, minlength=folds)
    progress.say(f"folds: {folds} of {sizes.min():,} to {sizes.max():,} rows, by label, equal texts together")


def score_passes(
    config: Config,
    run: Run,
    data: Manifest,
    job: ScoringJob,
    splits: tuple[str, ...],
    share: Share,
    progress: Progress,
) -> tuple[list[Entry], list[Scored]]:
    """Scores every pass with the settings of `job` and merges them into its folder.

    The cache's entries in order, and what was scored by each pass.
    """
    by_member = passes(config, run, splits)
    flat = [one for member in by_member for one in member]
    jobs = [replace(job, source=p.source, folder=pass_folder(p.part), codec=MEMBER_CODEC, rows=p.rows) for p in flat]
    wanted = {pass_folder(p.part): p.splits for p in flat}
    scored = score(jobs, data, wanted, share, progress, "teach")
    facts = {"codec": MEMBER_CODEC, "classes": len(job.labels)}
    shards = {
        one.part: PassShards(
            done.folder, commit_manifest(run.store, done.folder, job.fingerprint, found.entries, facts)
        )
        for one, done, found in zip(flat, jobs, scored, strict=True)
    }
    entries = [entry for split in splits for entry in data.shards(split)]
    merged = [_merged(config, run.store, job, entry, by_member, shards, progress) for entry in entries]
    return merged, scored


def features_pass(
    config: Config,
    run: Run,
    data: Manifest,
    job: ScoringJob,
    output: FeatureOutput,
    share: Share,
    progress: Progress,
) -> list[Entry]:
    """Runs the one teacher whose features are learned from over the rows that students learn from; their entries.

    The cache's rows come from several models, and features of one cannot be told by another: its logits stand beside
    them and are not used.
    """
    folder = f"{output.folder}/logits"
    alone = replace(
        job, source=feature_source(config, run), folder=folder, fingerprint=output.fingerprint, codec=MEMBER_CODEC,
        features=output,
    )  # fmt: skip
    (scored,) = score([alone], data, {folder: output.splits}, share, progress, "features")
    facts = {"codec": MEMBER_CODEC, "classes": len(job.labels)}
    commit_manifest(run.store, folder, output.fingerprint, scored.entries, facts)
    return scored.features


def _merged(
    config: Config,
    store: Store,
    job: ScoringJob,
    entry: Entry,
    by_member: list[list[Pass]],
    shards: dict[str, PassShards],
    progress: Progress,
) -> Entry:
    """One shard of the cache: kept when it stands, else made of the members' outputs for its rows."""
    progress.check()
    name = f"{job.folder}/{entry.file}"
    if (standing := committed_shard(store, name, job.fingerprint)) is not None:
        return standing
    found = [_of_member(store, entry, [shards[one.part] for one in member]) for member in by_member]
    row_ids_N = found[0][0]
    assert all(np.array_equal(row_ids_N, ids_N) for ids_N, _ in found), f"{entry.file}: the members scored other rows"
    logits_NK = found[0][1]
    if is_ensemble(config):
        weights = [member.weight for member in members(config)]
        logits = [torch.from_numpy(logits_NK) for _, logits_NK in found]
        logits_NK = ensemble_logits(
            logits, weights, combine=config.teacher.combine, multi_label=config.task == "multi_label"
        ).numpy()
    try:
        return write_logits(store, name, row_ids_N, logits_NK, codec=job.codec, fingerprint=job.fingerprint)
    except ValueError as error:
        raise UserError(f"{job.source.setting}: shard {entry.file}: {error}") from None


def _of_member(
    store: Store, entry: Entry, of_passes: list[PassShards]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """A member's outputs for the rows of a data shard, put together from its passes, in the order of row ids."""
    parts = [
        read_logits(store, one.folder, scored, one.manifest)
        for one in of_passes
        for scored in one.manifest.files
        if scored.file == entry.file
    ]
    row_ids_N = np.concatenate([part.row_ids_N for part in parts])
    order_N = np.argsort(row_ids_N)
    row_ids_N = row_ids_N[order_N]
    once = len(row_ids_N) == entry.rows and bool((np.diff(row_ids_N) > 0).all())
    assert once, f"{entry.file}: {len(row_ids_N)} scored rows are not its {entry.rows} rows, each once"
    return row_ids_N, np.concatenate([part.logits_NK for part in parts])[order_N]
