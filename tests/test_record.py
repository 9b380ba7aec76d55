"""The record of a run on local disk: fingerprints, commits, manifests, the lock, redo, verify and gc."""

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill import cli
from raydistill.cache.shards import read_logits, write_logits
from raydistill.data.shards import ShardWriter, read_shard, read_split
from raydistill.data.sources import Row
from raydistill.errors import UserError, storage_problem
from raydistill.record import store as store_module
from raydistill.record.commit import (
    MANIFEST,
    Entry,
    commit_folder,
    commit_manifest,
    commit_shard,
    committed_shard,
    damage,
    open_verified,
    read_manifest,
    set_aside,
    sidecar_name,
)
from raydistill.record.fingerprint import SCHEMA, Plan, canonical, digest, first_difference, seal, unseal
from raydistill.record.lock import LOCK, run_lock
from raydistill.record.run import PARTS, Run, find_run, leftovers, open_run, verify
from raydistill.record.store import LocalStore, naming, open_store

DEADLINE = 60
SHARD_ROWS = 4
ROWS = {"train": 10, "validation": 4, "test": 6}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def make_data(run: Run, plan: Plan) -> None:
    """The data part, as prepare makes it."""
    if run.begin("data", plan) is not None:
        return
    entries, first = [], 0
    for split, rows in ROWS.items():
        writer = ShardWriter(run.store, split, first_row_id=first, shard_rows=SHARD_ROWS, fingerprint=plan.fingerprint)
        for number in range(rows):
            writer.add(Row(f"{split} ticket {number}", "a", 0, number + 1), number % 3)
        entries += writer.close()
        first += rows
    commit_manifest(run.store, "data", plan.fingerprint, entries, {"rows": ROWS})


def make_cache(run: Run, plan: Plan) -> None:
    """The cache part, as teach makes it."""
    if run.begin("cache", plan) is not None:
        return
    data = run.require("data")
    entries = []
    for shard in read_split(run.store, data.shards("train") + data.shards("validation")):
        name = f"teacher/cache/{shard.name}"
        logits = np.random.default_rng(shard.row_ids_N[0]).normal(size=(len(shard.texts), 3)).astype(np.float32)
        entries.append(
            committed_shard(run.store, name, plan.fingerprint)
            or write_logits(
                run.store, name, shard.row_ids_N, logits, codec="dense-float16", fingerprint=plan.fingerprint
            )
        )
    commit_manifest(run.store, "teacher/cache", plan.fingerprint, entries, {"codec": "dense-float16", "classes": 3})


def make_student(run: Run, plan: Plan) -> None:
    """The student part, as train makes it."""
    if run.begin("student", plan) is not None:
        return
    staged = run.store.staging("student")
    staged.mkdir()
    (staged / "model.safetensors").write_bytes(bytes(range(256)))
    (staged / "config.json").write_text("{}")
    commit_folder(run.store, staged, "student", plan.fingerprint, {"value": 0.5})


PLANS = {
    "data": Plan("data", {"rows": ROWS, "data.shard_rows": SHARD_ROWS}),
    "cache": Plan("cache", {"data": "d", "teacher": {"weights_sha256": "w", "tokenizer_sha256": "t"}}),
    "student": Plan("student", {"cache": "c", "train.seed": 0}),
}
MAKERS = {"data": make_data, "cache": make_cache, "student": make_student}


def make_all(run: Run) -> None:
    for part, maker in MAKERS.items():
        maker(run, PLANS[part])


@pytest.fixture
def store(tmp_path):
    return LocalStore(str(tmp_path / "run"))


@pytest.fixture
def run(store):
    made = Run(store)
    store.write("config.yaml", b"name: run\n")
    make_all(made)
    return made


# --- fingerprints


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"b": 1, "a": [1.5, None, True]}, b'{"a":[1.5,null,true],"b":1}'),
        ({"é": "ü"}, b'{"\\u00e9":"\\u00fc"}'),
        ([], b"[]"),
    ],
)
def test_canonical_json_is_sorted_compact_and_ascii(value, expected):
    assert canonical(value) == expected
    assert digest(value) == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_json_has_no_fingerprint(number):
    with pytest.raises(ValueError, match="JSON"):
        digest({"value": number})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text().filter(lambda name: name not in ("check", "schema")), JSON, max_size=6), st.randoms())
def test_any_document_comes_back_from_its_seal_and_key_order_does_not_matter(document, order):
    keys = list(document)
    order.shuffle(keys)
    shuffled = {key: document[key] for key in keys}
    assert digest(shuffled) == digest(document)
    assert unseal(seal(shuffled), "here") == document


def test_every_flipped_bit_of_a_sealed_document_is_found():
    sealed = seal({"schema": SCHEMA, "fingerprint": "0af3", "files": [{"file": "a", "size": 12}], "facts": {"x": 0.5}})
    for bit in range(8 * len(sealed)):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(UserError, match=r"^runs/a/plan.json: is damaged"):
            unseal(bytes(damaged), "runs/a/plan.json")


def test_a_flipped_bit_in_an_escape_or_exponent_is_found_or_changes_nothing():
    document = {"labels": ["Kündigung", "日本"], "rate": 1e-05}
    sealed = seal(document)
    for bit in range(8 * len(sealed)):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << (bit % 8)
        try:
            assert unseal(bytes(damaged), "here") == document  # \u00fc and \u00FC are the same letter
        except UserError:
            continue


# b"[]" and b"3": popping the checksum from a list raised TypeError, and nobody caught it.
# 1e999 reads as infinity, which has no digest.
@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"null", b'"x"', b"{}", b"\xff\xfe", b'{"check": 1', b'{"a": 1}',
                                  b'{"check": "x", "a": 1e999}', b"[1, 2]"])  # fmt: skip
def test_what_was_never_sealed_is_named(data):
    with pytest.raises(UserError, match=r"^here: is damaged"):
        unseal(data, "here")


def test_a_document_of_a_newer_version_is_refused_by_number():
    with pytest.raises(UserError, match=rf"here: has format {SCHEMA + 1}, this version reads up to {SCHEMA}"):
        unseal(seal({"schema": SCHEMA + 1}), "here")


def test_a_plan_comes_back_with_its_fingerprint():
    plan = PLANS["cache"]
    again = Plan.unsealed(plan.sealed(), "here")
    assert again == plan
    assert again.fingerprint == plan.fingerprint == json.loads(plan.sealed())["fingerprint"]
    assert Plan("data", plan.inputs).fingerprint != plan.fingerprint
    assert Plan("cache", {**plan.inputs, "data": "other"}).fingerprint != plan.fingerprint


def test_a_sealed_document_of_another_kind_is_no_plan_and_no_manifest(store):
    with pytest.raises(UserError, match="here: is damaged: not a plan"):
        Plan.unsealed(seal({"schema": SCHEMA}), "here")
    store.write(f"data/{MANIFEST}", PLANS["data"].sealed())
    with pytest.raises(UserError, match=r"MANIFEST\.json: is damaged: not a manifest"):
        read_manifest(store, "data")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ("b", 2, 3)),
        ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, ("a.b.c", 1, 2)),
        ({"a": 1}, {"a": 1, "b": 2}, ("b", None, 2)),
        ({"a": 1, "b": 2}, {"a": 1}, ("b", 2, None)),
        ({"a": [1, 2]}, {"a": [2, 1]}, ("a", [1, 2], [2, 1])),
        ({"a": {"b": 1}}, {"a": 1}, ("a", {"b": 1}, 1)),
    ],
)
def test_first_difference(old, new, expected):
    assert first_difference(old, new) == expected


# --- shards


def test_new_folders_outlast_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # A file is as durable as the names that lead to it.
    synced: list[Path] = []
    monkeypatch.setattr(store_module, "_fsync", synced.append)
    store = LocalStore(str(tmp_path / "runs/one"))
    store.write("teacher/cache/a", b"a")
    made = [tmp_path / "runs/one/teacher", tmp_path / "runs/one", tmp_path / "runs", tmp_path]
    assert synced[:4] == made
    assert synced[-1] == tmp_path / "runs/one/teacher/cache"
    synced.clear()
    store.write("teacher/cache/b", b"b")
    assert not set(made) & set(synced)
    assert store.create("train/LOCK", b"")
    assert tmp_path / "runs/one" in synced


def a_shard(store: LocalStore, name: str = "data/train-00000.parquet", rows: int = 5, fingerprint: str = "f") -> Entry:
    staged = store.staging(name)
    pq.write_table(pa.table({"row_id": range(rows)}), staged, write_page_checksum=True)
    return commit_shard(store, staged, name, rows=rows, fingerprint=fingerprint)


def test_a_committed_shard_is_known_by_content_and_fingerprint(store):
    entry = a_shard(store)
    path = Path(store.where("data/train-00000.parquet"))
    assert entry == Entry(
        path.name, hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size, pq.read_metadata(path).num_rows
    )
    assert committed_shard(store, "data/train-00000.parquet", "f") == entry
    assert committed_shard(store, "data/train-00000.parquet", "other") is None
    assert committed_shard(store, "data/train-00001.parquet", "f") is None
    assert store.list() == ["data/train-00000.json", "data/train-00000.parquet"]


def test_a_staged_shard_that_lacks_rows_or_is_damaged_is_not_published(store):
    name = "data/train-00000.parquet"
    staged = store.staging(name)
    pq.write_table(pa.table({"row_id": range(5)}), staged, write_page_checksum=True)
    with pytest.raises(AssertionError, match="has not 6 rows"):
        commit_shard(store, staged, name, rows=6, fingerprint="f")
    flip(staged, 8 * 30)  # in the first page
    with pytest.raises(OSError, match=r"CRC|[Cc]hecksum|Couldn't|Unexpected"):
        commit_shard(store, staged, name, rows=5, fingerprint="f")
    assert not store.exists(name)
    assert not store.exists(sidecar_name(name))


# F16: whatever happened to a shard or its sidecar, it is made again and never taken as it is.
@pytest.mark.parametrize("harm", ["flipped", "truncated", "empty", "longer", "missing", "sidecar flipped",
                                  "sidecar missing", "sidecar truncated", "sidecar of a newer version",
                                  "plan as sidecar", "file swapped", "file and sidecar swapped"])  # fmt: skip
def test_a_shard_that_is_not_as_committed_is_made_again(store, harm):
    first, second = "data/train-00000.parquet", "data/train-00001.parquet"
    a_shard(store, first, rows=5)
    a_shard(store, second, rows=6)
    path, sidecar = (Path(store.where(name)) for name in (first, sidecar_name(first)))
    data = path.read_bytes()
    harms = {
        "flipped": lambda: flip(path, 8 * len(data) // 2),
        "truncated": lambda: path.write_bytes(data[:-1]),
        "empty": lambda: path.write_bytes(b""),
        "longer": lambda: path.write_bytes(data + b"\0"),
        "missing": path.unlink,
        "sidecar flipped": lambda: flip(sidecar, 100),
        "sidecar missing": sidecar.unlink,
        "sidecar truncated": lambda: sidecar.write_bytes(sidecar.read_bytes()[:20]),
        "sidecar of a newer version": lambda: sidecar.write_bytes(seal({"schema": SCHEMA + 1})),
        "plan as sidecar": lambda: sidecar.write_bytes(PLANS["data"].sealed()),  # KeyError, before
        "file swapped": lambda: shutil.copy(store.where(second), path),
        # Both files intact, under another shard's name: was taken for that shard, before.
        "file and sidecar swapped": lambda: (
            shutil.copy(store.where(second), path),
            shutil.copy(store.where(sidecar_name(second)), sidecar),
        ),
    }
    harms[harm]()
    assert committed_shard(store, first, "f") is None
    assert committed_shard(store, second, "f") is not None
    assert a_shard(store, first, rows=5) == committed_shard(store, first, "f")


def test_a_shard_with_a_new_modification_time_stands(store):
    entry = a_shard(store)
    os.utime(store.where("data/train-00000.parquet"), (0, 0))
    assert committed_shard(store, "data/train-00000.parquet", "f") == entry


def test_committing_a_shard_twice_gives_the_same_bytes(store, tmp_path):
    entry = a_shard(store)
    before = files(tmp_path)
    assert a_shard(store) == entry
    assert files(tmp_path) == before


# --- manifests


def test_a_manifest_lists_splits_in_order(store):
    entries = [Entry(f"{split}-0000{n}.parquet", "0", 1, 2) for split in ("train", "test") for n in range(2)]
    manifest = commit_manifest(store, "data", "f", entries, {"labels": ["a"]})
    assert read_manifest(store, "data") == manifest
    assert manifest.shards("train") == entries[:2]
    assert manifest.shards("validation") == []
    assert read_manifest(store, "teacher/cache") is None


def test_damage_and_reading_name_the_file_and_what_is_wrong(store):
    entries = [a_shard(store, f"data/train-0000{n}.parquet", rows=5 + n) for n in range(3)]
    manifest = commit_manifest(store, "data", "f", entries)
    assert damage(store, "data", manifest) == []
    with open_verified(store, "data", entries[0]) as source:
        assert source.read() == store.read("data/train-00000.parquet")
    paths = [Path(store.where(f"data/train-0000{n}.parquet")) for n in range(3)]
    flip(paths[0], 1000)
    actual = hashlib.sha256(paths[0].read_bytes()).hexdigest()
    paths[1].write_bytes(b"")
    paths[2].unlink()
    assert damage(store, "data", manifest) == [
        ("data/train-00000.parquet", f"has sha256 {actual[:12]}…, expected {entries[0].sha256[:12]}…"),
        ("data/train-00001.parquet", f"has 0 bytes, expected {entries[1].size}"),
        ("data/train-00002.parquet", "is missing"),
    ]
    with pytest.raises(UserError) as caught:
        open_verified(store, "data", entries[0])
    message = str(caught.value)
    assert message.startswith(f"{paths[0]}: has sha256 {actual[:32]}, expected {entries[0].sha256[:32]}.")
    assert "raydistill verify with --repair" in message
    assert "\n" not in message
    with pytest.raises(UserError, match=r"train-00002.parquet.*the file is missing"):
        open_verified(store, "data", entries[2])


def test_readers_of_shards_refuse_a_damaged_file(run):
    for folder, read in (
        ("data", lambda entry, _: read_shard(run.store, entry)),
        ("teacher/cache", lambda entry, manifest: read_logits(run.store, "teacher/cache", entry, manifest)),
    ):
        manifest = read_manifest(run.store, folder)
        assert manifest is not None
        entry = manifest.shards("train")[1]
        assert len(read(entry, manifest).row_ids_N) == entry.rows
        flip(Path(run.store.where(f"{folder}/{entry.file}")), 8 * entry.size - 40)
        with pytest.raises(UserError, match=rf"{folder}/train-00001.parquet: has sha256"):
            read(entry, manifest)


def test_a_folder_takes_the_place_of_one_that_is_not_whole(store):
    for content in (b"one", b"two", b"three"):
        staged = store.staging("student")
        (staged / "inner").mkdir(parents=True)
        (staged / "inner" / "weights").write_bytes(content)
        commit_folder(store, staged, "student", "f")
        os.remove(store.where(f"student/{MANIFEST}"))
    # A rename onto a folder that is not empty fails: a student without manifest could not be made again, before.
    assert store.list() == ["student.bad-1/inner/weights", "student.bad-2/inner/weights", "student/inner/weights"]
    assert [store.read(name) for name in store.list()] == [b"one", b"two", b"three"]


def test_what_is_set_aside_takes_the_first_free_number(store):
    set_aside(store, "data", ".")
    for number in (1, 2, 3):
        store.write("data/plan.json", str(number).encode())
        set_aside(store, "data", ".")
    assert files(Path(store.root)) == {f"data.{number}/plan.json": str(number).encode() for number in (1, 2, 3)}


@pytest.mark.parametrize("name", ["../outside", "data/../../outside", "/etc/passwd", ".."])
@pytest.mark.parametrize("url", ["{}", "memory://outside/run"])
def test_names_that_leave_the_root_are_refused(tmp_path, url, name):
    store = open_store(url.format(tmp_path / "run"))
    operations = {
        "read": lambda: store.read(name), "write": lambda: store.write(name, b""), "exists": lambda: store.exists(name),
        "remove": lambda: store.remove(name), "list": lambda: store.list(name), "local": lambda: store.local(name),
        "move": lambda: store.move("a", name), "sha256": lambda: store.sha256(name),
    }  # fmt: skip
    store.write("a", b"1")
    for operation in operations.values():
        with pytest.raises(UserError, match="refuses the name"):
            operation()
    # A manifest may come from somebody else.
    manifest = commit_manifest(store, "data", "f", [Entry(f"../{name}", "0", 0)])
    with pytest.raises(UserError, match="refuses the name"):
        damage(store, "data", manifest)
    assert sorted(p.name for p in tmp_path.iterdir()) == ([] if url.startswith("memory") else ["run"])


def test_a_failed_write_names_file_and_cause(tmp_path):
    from safetensors import SafetensorError

    path = tmp_path / "x.parquet"
    for raised in (
        OSError(28, "Error writing bytes to file. Detail: [errno 28] No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        with pytest.raises(OSError, match=r".") as caught, naming(path):
            raise raised
        assert (caught.value.errno, caught.value.strerror, caught.value.filename) == (
            28, "No space left on device", str(path),
        )  # fmt: skip
    for raised in (SafetensorError("header too large"), FileNotFoundError(2, "none", "elsewhere")):
        with pytest.raises(type(raised)) as caught, naming(path):
            raise raised
        assert caught.value is raised


# --- the lock


HOLD = """
import sys
from raydistill.errors import UserError
from raydistill.record.lock import run_lock
from raydistill.record.store import open_store
try:
    with run_lock(open_store(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except UserError as error:
    sys.exit(f"error: {error}")
"""


def hold(root: Path) -> subprocess.Popen:
    """A process that holds the lock until it is killed or a line comes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.communicate(timeout=DEADLINE)


# F9
def test_a_second_process_is_told_who_holds_the_run(run):
    holder = hold(Path(run.store.root))
    try:
        command = [sys.executable, "-m", "raydistill", "gc", run.store.root]
        second = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
        assert second.returncode == 2
        (line,) = second.stderr.splitlines()
        assert line.startswith(f"error: {run.store.root}: is in use by process {holder.pid} on ")
        assert line.endswith("Wait for it, end it, or take another run name")
        with pytest.raises(UserError, match=f"process {holder.pid} "), run_lock(run.store):
            pass
        assert holder.poll() is None
    finally:
        end(holder)


def test_a_killed_process_holds_nothing(run):
    holder = hold(Path(run.store.root))
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate(timeout=DEADLINE)
    with run_lock(run.store):
        assert json.loads(run.store.read(LOCK))["pid"] == os.getpid()


def test_the_lock_can_be_taken_again_after_an_exception(store):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="body"), run_lock(store):
            raise RuntimeError("body")


def test_no_folder_stays_in_which_nothing_was_written(tmp_path):
    (tmp_path / "runs").mkdir()
    for root in (tmp_path / "runs/a/b/run", tmp_path / "runs/run"):
        with run_lock(LocalStore(str(root))):
            assert root.is_dir()
    assert list((tmp_path / "runs").iterdir()) == []
    with run_lock(LocalStore(str(tmp_path / "runs/kept"))):
        (tmp_path / "runs/kept/file").write_text("")
    assert sorted(files(tmp_path)) == ["runs/kept/.lock", "runs/kept/file"]


def test_a_folder_that_cannot_be_made_or_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    refused = pytest.raises(UserError, match=f"storage: {tmp_path}/file is a file")
    with refused, run_lock(LocalStore(f"{tmp_path}/file/a")):
        pass
    refused = pytest.raises(UserError, match="storage: /proc/none/run: cannot be locked")
    with refused, run_lock(LocalStore("/proc/none/run")):
        pass
    with pytest.raises(UserError, match="storage: /proc/self: cannot be locked"), run_lock(LocalStore("/proc/self")):
        pass


@pytest.mark.parametrize("content", [b"", b"garbage", b"[]", b"{}", b'{"pid": 1}', b"\xff"])
def test_a_damaged_lock_file_neither_holds_nor_hides_a_run(store, content):
    store.write("config.yaml", b"")
    path = Path(store.where(LOCK))
    path.write_bytes(content)
    with run_lock(store):
        pass
    with open(path, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        path.write_bytes(content)
        with pytest.raises(UserError, match="is in use by another process"), run_lock(store):
            pass


# Two runs that began together: the one that lost the race to make the folder was told that it is a file, before; and
# the first one's clearing away of an empty folder let two others in at once, one with the old lock file, one with
# a new.
def test_threads_that_race_for_new_folders_get_it_one_at_a_time(tmp_path):
    rounds, workers = 60, 4
    barrier, inside, outcomes = threading.Barrier(workers), threading.Semaphore(1), Counter()

    def work() -> None:
        for number in range(rounds):
            barrier.wait(DEADLINE)
            store = LocalStore(str(tmp_path / str(number) / "a" / "run"))
            try:
                with run_lock(store):
                    alone = inside.acquire(blocking=False)
                    outcomes["held" if alone else "held by two"] += 1
                    if alone:
                        inside.release()
            except UserError as error:
                outcomes["in use" if "is in use by" in str(error) else str(error)] += 1

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert set(outcomes) <= {"held", "in use"}
    assert outcomes.total() == rounds * workers
    assert outcomes["held"] >= rounds


# --- a run's parts


def test_a_part_is_begun_made_and_complete(store):
    run = Run(store)
    assert run.complete("data") is None
    with pytest.raises(UserError, match=r"run/data: is not complete. Run `raydistill prepare`"):
        run.require("data")
    assert run.begin("data", PLANS["data"]) is None
    assert run.begin("data", PLANS["data"]) is None
    make_data(run, PLANS["data"])
    manifest = run.begin("data", PLANS["data"])
    assert manifest is not None
    assert manifest == run.require("data")


# F27
def test_other_inputs_are_refused_by_field_old_and_new(run):
    before = files(Path(run.store.root))
    changed = Plan("cache", {"data": "d", "teacher": {"weights_sha256": "x" * 64, "tokenizer_sha256": "t"}})
    with pytest.raises(UserError) as caught:
        run.begin("cache", changed)
    assert str(caught.value) == (
        f"{run.store.root}/teacher/cache: teacher.weights_sha256: was made with w, now asked for {'x' * 19}…."
        " Take another run name, or --redo teach (what stands there is kept aside)"
    )
    assert files(Path(run.store.root)) == before
    added = Plan("cache", {**PLANS["cache"].inputs, "teacher.codec": "dense-int8"})
    with pytest.raises(UserError, match=r"teacher.codec: was made with nothing, now asked for dense-int8\."):
        run.begin("cache", added)


def test_redo_keeps_what_stood_there_under_numbers(run):
    root = Path(run.store.root)
    first = files(root)
    for number in (1, 2):
        again = Run(run.store, redo="teach")
        again.set_aside("cache")
        changed = Plan("cache", {"data": f"d{number}"})
        make_cache(again, changed)
        # The student was made from the old cache: it gives way too, because a later stage no longer fits.
        make_student(again, Plan("student", {"cache": changed.fingerprint}))
    now = files(root)
    for name, content in first.items():
        for folder in ("teacher/cache", "student", "train"):
            if name.startswith(f"{folder}/"):
                assert now[name.replace(folder, f"{folder}.1", 1)] == content
        if name.startswith("data/"):
            assert now[name] == content
    assert {name.split("/")[0] for name in now if name.startswith("student")} == {"student", "student.1", "student.2"}
    assert read_manifest(run.store, "teacher/cache") is not None


def test_an_earlier_stage_does_not_give_way_to_a_redo(run):
    with pytest.raises(UserError, match=r"data\.shard_rows: was made with 4, now asked for 5"):
        Run(run.store, redo="train").begin("data", Plan("data", {"rows": ROWS, "data.shard_rows": 5}))


def test_a_finished_folder_of_another_plan_is_set_aside_when_its_plan_is_gone(run):
    os.remove(run.store.where("train/plan.json"))
    changed = Plan("student", {"cache": "c", "train.seed": 1})
    make_student(run, changed)
    assert run.require("student").fingerprint == changed.fingerprint
    assert run.store.exists(f"student.1/{MANIFEST}")


def test_another_run_lends_its_data_and_cache(run, tmp_path):
    borrower = open_run(str(tmp_path), "second", cache_from=run.store.root)
    assert borrower.begin("data", PLANS["data"]) == run.require("data")
    assert borrower.begin("cache", PLANS["cache"]) == run.require("cache")
    make_student(borrower, PLANS["student"])
    assert (tmp_path / "second/student/MANIFEST.json").exists()
    with pytest.raises(UserError, match="data: was made with d, now asked for e") as caught:
        Run(borrower.store, borrower.lender, redo="prepare").begin("cache", Plan("cache", {"data": "e"}))
    assert "--redo" not in str(caught.value)  # would not help: another run's parts are never moved
    with pytest.raises(UserError, match=r"teacher.cache_from: .*teacher/train/plan.json is missing"):
        borrower.begin("teacher", Plan("teacher", {}))
    assert sorted(files(tmp_path / "second")) == [
        "student/MANIFEST.json", "student/config.json", "student/model.safetensors", "train/plan.json",
    ]  # fmt: skip


@pytest.mark.parametrize("location", ["nowhere", "s3x://bucket/run"])
def test_a_run_that_is_not_there_is_one_line(tmp_path, location):
    with pytest.raises(UserError, match=r"no config.yaml|Install the extra"):
        find_run(location if "://" in location else str(tmp_path / location))


# --- verify, repair, gc


def committed(root: Path) -> list[Path]:
    """Files whose content matters to a reader: everything but sidecars."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and p.name != "config.yaml")
    return [p for p in files if not p.name[-7:-5].isdigit()]


def test_an_intact_run_verifies(run):
    checked, findings = verify(run)
    assert findings == []
    assert checked == len(committed(Path(run.store.root)))


# F15, F17: one flipped bit at 200 places.
def test_every_flipped_bit_is_found_and_named(run):
    root, draw = Path(run.store.root), random.Random(0)
    candidates = committed(root)
    assert {p.name for p in candidates} >= {MANIFEST, "plan.json", "train-00000.parquet", "model.safetensors"}
    for _ in range(200):
        path = draw.choice(candidates)
        bit = draw.randrange(8 * path.stat().st_size)
        flip(path, bit)
        _, findings = verify(run)
        assert [finding.file for finding in findings] == [path.relative_to(root).as_posix()]
        assert "sha256" in findings[0].problem or "is damaged" in findings[0].problem
        flip(path, bit)
    assert verify(run)[1] == []


def test_a_damaged_sidecar_of_a_complete_part_does_no_harm(run):
    for name in run.store.list("data"):
        if name.endswith(".json") and name not in ("data/plan.json", f"data/{MANIFEST}"):
            flip(Path(run.store.where(name)), 77)
    assert verify(run)[1] == []
    assert run.begin("data", PLANS["data"]) is not None


# F15, F16, F17: what is damaged, and only that, is made again, and is as it was.
KEPT_BESIDE = {
    "data/train-00001.parquet": ["data/train-00000.parquet", "data/test-00000.parquet", "data/plan.json"],
    "teacher/cache/validation-00000.parquet": ["teacher/cache/train-00000.parquet", f"data/{MANIFEST}"],
    "student/model.safetensors": ["train/plan.json"],
    f"data/{MANIFEST}": ["data/train-00000.parquet", "data/plan.json"],
    f"student/{MANIFEST}": ["train/plan.json"],
    "data/plan.json": ["data/train-00000.parquet", f"data/{MANIFEST}"],
}


@pytest.mark.parametrize(
    ("name", "harm"),
    [(name, harm) for name in KEPT_BESIDE for harm in ("flipped", "truncated", "empty")]
    # A manifest or a plan that is missing is a part that is not complete, and no damage.
    + [(name, "missing") for name in list(KEPT_BESIDE)[:3]],
)
def test_repair_sets_aside_what_is_damaged_and_the_next_run_makes_that_again(run, name, harm):
    root = Path(run.store.root)
    before = files(root)
    inodes = {other: (root / other).stat().st_ino for other in KEPT_BESIDE[name]}
    path = root / name
    harms = {
        "flipped": lambda: flip(path, 8 * (path.stat().st_size // 2)),
        "truncated": lambda: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "missing": path.unlink,
        "empty": lambda: path.write_bytes(b""),
    }
    harms[harm]()
    damaged = files(root)
    _, findings = verify(run)
    assert [finding.file for finding in findings] == [name]
    assert files(root) == damaged  # looking changes nothing
    verify(run, repair=True)
    assert Counter(files(root).values()) == Counter(damaged.values())  # repairing moves and removes nothing
    make_all(run)
    assert verify(run)[1] == []
    aside = set(leftovers(run))
    assert {n: c for n, c in files(root).items() if n not in aside} == before
    assert {other: (root / other).stat().st_ino for other in inodes} == inodes


def test_a_damaged_report_is_made_again_without_its_logits(run):
    # The report's folder was set aside with the manifests of its logits in it, and verify then fell over those, before.
    store, plan = run.store, Plan("report", {"student": "s"})
    run.begin("report", plan)
    for name in ("report.html", "report.json"):
        store.write(f"report/{name}", name.encode())
    entries = [Entry(n, store.sha256(f"report/{n}"), store.size(f"report/{n}")) for n in ("report.html", "report.json")]
    logits = write_logits(
        store, "report/logits/student/test-00000.parquet", np.arange(3), np.ones((3, 2), np.float32),
        codec="dense-float32", fingerprint=plan.fingerprint,
    )  # fmt: skip
    commit_manifest(store, "report/logits/student", plan.fingerprint, [logits])
    commit_manifest(store, "report", plan.fingerprint, entries)
    flip(Path(store.where("report/report.html")), 3)
    assert [finding.file for finding in verify(run, repair=True)[1]] == ["report/report.html"]
    assert run.begin("report", plan) is None
    assert store.exists("report/report.html.bad-1")
    assert read_manifest(store, "report/logits/student") is not None


def test_gc_removes_temporary_files_and_what_was_set_aside_and_nothing_else(run, capsys):
    root = Path(run.store.root)
    kept = files(root)
    # TensorBoard's names end in a number too; gc took its curves for something set aside, before.
    kept["train/tensorboard/events.out.tfevents.1763810236.host.4711.0"] = b"curves"
    kept["train/checkpoints/step-00000004/state.json"] = b"{}"
    litter = {
        "data/.train-00000.parquet.0a1b2c3d.tmp", ".student.0a1b2c3d.tmp/model.safetensors", "data.1/plan.json",
        "teacher/cache.12/train-00000.parquet", "student.bad-1/config.json", "data/train-00001.parquet.bad-2",
        "train/checkpoints/step-00000004.bad-1/state.json", "train/.ray/0a1b2c3d/notes", f"data/{MANIFEST}.bad-1",
        "train/checkpoints/.step-00000006.0a1b2c3d.tmp/state.json", "control/model.1/config.json",
    }  # fmt: skip
    for name in [*kept, *litter]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(kept.get(name, b"litter"))
    assert set(leftovers(run)) == litter
    for option, expected in (["--dry-run"], {*kept, *litter}), ([], set(kept)):
        with pytest.raises(SystemExit) as ended:
            cli.main(["gc", str(root), *option])
        assert not ended.value.code
        assert set(files(root)) - {LOCK} == expected
    assert any(root.rglob("*.tmp")) == (expected != set(kept))  # nor does a temporary folder stay behind, emptied
    assert {name: content for name, content in files(root).items() if name != LOCK} == kept
    assert f"removed {len(litter)} files" in capsys.readouterr().out
    assert verify(run)[1] == []


def test_every_part_is_known_when_it_was_set_aside(store):
    for part in PARTS.values():
        for folder in {part.folder, part.product}:
            store.write(f"{folder}/file", b"")
            set_aside(store, folder, ".")
    assert leftovers(Run(store)) == store.list()


def test_repair_waits_for_no_one_who_works_in_the_run(run, capsys):
    # It moved files from under a run that was writing them, before.
    with run_lock(run.store), pytest.raises(SystemExit) as ended:
        cli.main(["verify", run.store.root, "--repair"])
    assert ended.value.code == 2
    assert "is in use" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "MB are left there"), (errno.EROFS, "permissions")])
def test_a_storage_problem_is_told_with_its_remedy(tmp_path, number, told):
    problem = storage_problem(OSError(number, os.strerror(number), str(tmp_path / "not" / "there" / "file")))
    assert told in str(problem)
    assert str(tmp_path) in str(problem)
    assert storage_problem(OSError(errno.EBADF, "a bug")) is None
