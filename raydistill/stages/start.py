"""A student's first weights where making them reads rows of train: made once, committed, and loaded by every rank.

The start of a training, `<its folder>/start/`, is a Hugging Face folder with the student before its first step. A
training that goes on, its other ranks, and the control beside it load it and read no row again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from raydistill.data.shards import STUDENT_SPLITS, read_split
from raydistill.errors import UserError
from raydistill.models.kinds import CLASSIFIER, ModelKind
from raydistill.models.saving import save_model
from raydistill.record.commit import Manifest, commit_folder, damage, read_manifest
from raydistill.record.run import PARTS
from raydistill.record.store import Store, naming
from raydistill.stages.ranks import in_group, rank_and_world
from raydistill.students.build import Rows

SETTING = "the student's start"
SEED = re.compile(r"seeds/\d+/")  # what the trainings of another seed stand in
# The other ranks wait while one reads all rows of train; torch gives a collective 30 minutes.
PATIENCE = timedelta(days=2)


def start_folders(folder: str) -> tuple[str, ...]:
    """Where the start of the training in this folder is written, then where the same may stand already.

    That is in the same folder, or that of the same stage, of the student's or the control's training.
    """
    seed = SEED.match(folder)
    parts = [(seed.group() if seed else "") + PARTS[part].folder for part in ("student", "control")]
    own = next((part for part in parts if folder == part or folder.startswith(f"{part}/")), None)
    if own is None:  # a trial's, which is of no part
        return (f"{folder}/start",)
    others = (f"{part}{folder.removeprefix(own)}/start" for part in parts if part != own)
    return (f"{folder}/start", *others)


def train_rows(store: Store, data: Manifest) -> Rows:
    """The rows that a student learns from, with and without labels, as `build_student` takes them."""
    return lambda: read_split(store, data.shards(*STUDENT_SPLITS))


def made_once(
    store: Store, folders: Sequence[str], fingerprint: str, make: Callable[[], tuple[Any, Any]], *, max_length: int,
    kind: ModelKind = CLASSIFIER,
) -> tuple[Any, Any]:  # fmt: skip
    """The model and tokenizer that stand committed under the fingerprint in one of the folders; else those of `make`.

    What is made is committed to the first folder. Collective: rank 0 looks, and makes, while the others wait; every
    rank then loads the same files. Raises, on every rank alike, the UserError that `make` raises on rank 0.
    """
    answer: list[Any] = [None]
    if rank_and_world()[0] == 0:
        try:
            answer = [
                _standing(store, folders, fingerprint) or _commit(store, folders[0], fingerprint, make, max_length)
            ]
        except UserError as error:
            answer = [error]
    if in_group():
        group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        dist.broadcast_object_list(answer, src=0, group=group)
        dist.destroy_process_group(group)
    if isinstance(answer[0], UserError):
        raise answer[0]
    return _loaded(store, answer[0], kind)


def made_before(
    store: Store, folders: Sequence[str], fingerprint: str, *, kind: ModelKind = CLASSIFIER
) -> tuple[Any, Any]:
    """What `made_once` gave when this training began, for one rank alone."""
    folder = _standing(store, folders, fingerprint)
    if folder is None:
        raise UserError(f"{SETTING}: {store.where(folders[0])}: is damaged. Run the same command again")
    return _loaded(store, folder, kind)


def _loaded(store: Store, folder: str, kind: ModelKind) -> tuple[Any, Any]:
    return kind.load(SETTING, store.local(folder))


def _standing(store: Store, folders: Sequence[str], fingerprint: str) -> str | None:
    """The first folder that stands committed under the fingerprint and intact."""
    for folder in folders:
        try:
            manifest = read_manifest(store, folder)
        except UserError:  # a damaged manifest: it is made again, and what stands there is set aside
            continue
        if manifest is not None and manifest.fingerprint == fingerprint and not damage(store, folder, manifest):
            return folder
    return None


def _commit(store: Store, folder: str, fingerprint: str, make: Callable[[], tuple[Any, Any]], max_length: int) -> str:
    model, tokenizer = make()
    staged: Path = store.staging(folder)
    staged.mkdir(parents=True)
    with naming(staged):
        save_model(model, tokenizer, model.state_dict(), staged, max_length=max_length)
    commit_folder(store, staged, folder, fingerprint)
    return folder
