"""Staged -> committed: sidecars that commit a shard, manifests that commit a stage or a folder of files.

A shard's sidecar is written after the shard and names its sha256, size, rows and the fingerprint of the plan that it
belongs to. `MANIFEST.json` comes last of all and readers open only what it lists. Going on after a stop reads, keeps
what verifies and makes the rest again; nothing is deleted.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.errors import UserError
from raydistill.record.fingerprint import SCHEMA, seal, unseal
from raydistill.record.store import Store, naming, sha256_file

MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Entry:
    """One committed file: its name within the stage's folder and what it must be."""

    file: str
    sha256: str
    size: int
    rows: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a stage or a folder holds, once it is complete."""

    fingerprint: str
    files: tuple[Entry, ...]
    facts: dict[str, Any]

    def shards(self, *splits: str) -> list[Entry]:
        """The shards of these splits, one split after the other; a split that is not there has none."""
        shards = [entry for entry in self.files if entry.file.endswith(".parquet")]
        return [entry for split in splits for entry in shards if entry.file.startswith(f"{split}-")]


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.parquet"


def sidecar_name(name: str) -> str:
    return f"{name.removesuffix('.parquet')}.json"


def commit_shard(store: Store, staged: Path, name: str, *, rows: int, fingerprint: str) -> Entry:
    """Verifies a staged Parquet file, publishes it and commits it by its sidecar; the entry for the manifest."""
    with pq.ParquetFile(staged, page_checksum_verification=True) as file:
        # Row group by row group: a batch over several of them could be of any size.
        groups = range(file.num_row_groups)
        found = sum(batch.num_rows for group in groups for batch in file.iter_batches(row_groups=[group]))
        assert found == rows, f"{staged} has not {rows} rows"
    entry = Entry(Path(name).name, sha256_file(staged), staged.stat().st_size, rows)
    store.publish(staged, name)
    store.write(sidecar_name(name), seal({**asdict(entry), "fingerprint": fingerprint, "schema": SCHEMA}))
    return entry


def committed_shard(store: Store, name: str, fingerprint: str) -> Entry | None:
    """The entry of a shard that stands committed under this fingerprint and intact; None when it must be made."""
    sidecar = sidecar_name(name)
    if not store.exists(sidecar) or not store.exists(name):
        return None
    try:
        facts = unseal(store.read(sidecar), store.where(sidecar))
        entry = Entry(facts["file"], facts["sha256"], facts["size"], facts["rows"])
        ours = facts["fingerprint"] == fingerprint and entry.file == Path(name).name
    except (UserError, KeyError):
        return None
    if not ours or store.size(name) != entry.size or store.sha256(name) != entry.sha256:
        return None
    return entry


def commit_manifest(
    store: Store, folder: str, fingerprint: str, files: list[Entry], facts: dict[str, Any] | None = None
) -> Manifest:
    """Completes a stage: from here on readers see it."""
    manifest = Manifest(fingerprint, tuple(files), facts or {})
    store.write(f"{folder}/{MANIFEST}", _sealed(manifest))
    return manifest


def commit_folder(
    store: Store, staged: Path, name: str, fingerprint: str, facts: dict[str, Any] | None = None
) -> Manifest:
    """Publishes a staged folder, such as a model or a checkpoint, with the manifest of its files inside it.

    What stands under the name is set aside: the caller has found that it is not whole.
    """
    paths = sorted(p for p in staged.rglob("*") if p.is_file())
    entries = [Entry(p.relative_to(staged).as_posix(), sha256_file(p), p.stat().st_size) for p in paths]
    manifest = Manifest(fingerprint, tuple(entries), facts or {})
    with naming(staged):
        (staged / MANIFEST).write_bytes(_sealed(manifest))
    set_aside(store, name, ".bad-")
    store.publish(staged, name)
    return manifest


def set_aside(store: Store, name: str, mark: str) -> None:
    """Moves a file or a folder, when it is there, to the first free one of its numbered names."""
    if store.exists(name):
        number = 1
        while store.exists(f"{name}{mark}{number}"):
            number += 1
        store.move(name, f"{name}{mark}{number}")


def _sealed(manifest: Manifest) -> bytes:
    return seal(
        {
            "schema": SCHEMA,
            "fingerprint": manifest.fingerprint,
            "files": [asdict(entry) for entry in manifest.files],
            "facts": manifest.facts,
        }
    )


def read_manifest(store: Store, folder: str) -> Manifest | None:
    """The manifest of a complete stage or folder; None when it is not complete. Raises UserError when it is damaged."""
    name = f"{folder}/{MANIFEST}"
    if not store.exists(name):
        return None
    document = unseal(store.read(name), store.where(name))
    try:
        return Manifest(document["fingerprint"], tuple(Entry(**e) for e in document["files"]), document["facts"])
    except (KeyError, TypeError):
        raise UserError(f"{store.where(name)}: is damaged: not a manifest. Set it aside with verify --repair") from None


def damage(store: Store, folder: str, manifest: Manifest) -> list[tuple[str, str]]:
    """Every file of a manifest that is not what the manifest says, with what is wrong, by full sha256."""
    found: list[tuple[str, str]] = []
    for entry in manifest.files:
        name = f"{folder}/{entry.file}"
        if not store.exists(name):
            found.append((name, "is missing"))
        elif store.size(name) != entry.size:
            found.append((name, f"has {store.size(name)} bytes, expected {entry.size}"))
        elif (actual := store.sha256(name)) != entry.sha256:
            found.append((name, f"has sha256 {actual[:12]}…, expected {entry.sha256[:12]}…"))
    return found


def open_verified(store: Store, folder: str, entry: Entry) -> pa.NativeFile:
    """A listed file after its sha256 was checked, read from the store once. Raises UserError when it differs."""
    name, source, actual = f"{folder}/{entry.file}", None, "none: the file is missing or empty"
    if store.exists(name) and store.size(name):  # an empty file cannot be mapped
        source = store.input(name)
        actual = hashlib.sha256(source.read_buffer()).hexdigest()
    if source is None or actual != entry.sha256:
        raise _differs(store.where(name), actual, entry)
    source.seek(0)
    return source


def map_verified(store: Store, folder: str, entry: Entry) -> pa.Buffer:
    """A listed file mapped into memory after its sha256 was checked; a remote one from a copy on the local disk.

    The copy has no name any more and goes with the buffer. Raises UserError when the file differs.
    """
    name = f"{folder}/{entry.file}"
    if not store.exists(name) or not store.size(name):
        raise _differs(store.where(name), "none: the file is missing or empty", entry)
    path = store.local(name)
    buffer = pa.memory_map(str(path)).read_buffer()
    if str(path) != store.where(name):
        path.unlink()
        path.parent.rmdir()
    actual = hashlib.sha256(buffer).hexdigest()
    if actual != entry.sha256:
        raise _differs(store.where(name), actual, entry)
    return buffer


def _differs(where: str, actual: str, entry: Entry) -> UserError:
    found = actual[:32] if len(actual) == 64 else actual
    return UserError(
        f"{where}: has sha256 {found}, expected {entry.sha256[:32]}."
        " Run raydistill verify with --repair, then the same command again"
    )
