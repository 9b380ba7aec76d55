"""The same commit protocol on object storage: an in-memory fsspec store, and S3 as moto serves it."""

import errno
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import boto3
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFileSystem
from moto.server import ThreadedMotoServer

from raydistill.cache.shards import read_logits, write_logits
from raydistill.config.file import validate
from raydistill.data.shards import read_split
from raydistill.errors import UserError, storage_problem
from raydistill.record import lock
from raydistill.record.commit import (
    MANIFEST,
    Entry,
    commit_folder,
    commit_manifest,
    commit_shard,
    committed_shard,
    damage,
    read_manifest,
)
from raydistill.record.fingerprint import Plan
from raydistill.record.lock import LOCK, Owner, run_lock
from raydistill.record.run import Run, find_run, leftovers, open_run, verify
from raydistill.record.store import FAULT_VARIABLE, LocalStore, ObjectStore, open_store
from raydistill.stages.prepare import prepare, survey_sources
from raydistill.stages.progress import Progress

BUCKET = "raydistill-tests"
DEADLINE = 60


@pytest.fixture(scope="module")
def server():
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    served = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    yield f"http://{host}:{port}"
    served.stop()


@pytest.fixture
def s3(server, monkeypatch):
    """The URL of an empty prefix on S3, which the environment leads to."""
    environment = {
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield f"s3://{BUCKET}/prefix/run"
    for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.delete_bucket(Bucket=BUCKET)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["memory", "s3"])
def url(request):
    if request.param == "s3":
        yield request.getfixturevalue("s3")
        return
    yield "memory://bucket/prefix/run"
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def store(url):
    return open_store(url)


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """Where staged and fetched files lie; a store leaves none that it staged."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def contents(store: ObjectStore) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.list()}


def damage_bit(store: ObjectStore, name: str) -> None:
    data = bytearray(store.read(name))
    data[len(data) // 2] ^= 4
    store.write(name, bytes(data))


def staged_folder(store: ObjectStore, name: str, content: bytes = b"w") -> Path:
    staged = store.staging(name)
    (staged / "inner").mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(content)
    (staged / "inner/config.json").write_bytes(b"{}")
    return staged


# --- the store


def test_files_are_written_read_listed_and_removed(store):
    assert not store.exists("data/plan.json")
    assert store.list() == store.folders() == []
    store.write("data/plan.json", b"one")
    store.write("data/plan.json", b"three")
    store.write("data/inner/file", b"")
    store.write("data.1/plan.json", b"another")
    assert store.read("data/plan.json") == b"three"
    assert store.size("data/plan.json") == 5
    assert store.sha256("data/plan.json") == "8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f"
    assert store.list() == ["data.1/plan.json", "data/inner/file", "data/plan.json"]
    assert store.list("data") == ["data/inner/file", "data/plan.json"]
    assert store.list("dat") == []
    assert store.folders() == ["data", "data.1"]
    assert store.folders("data") == ["data/inner"]
    assert [store.exists(name) for name in ("data", "dat", "data/inner", "data/plan.json")] == [True, False, True, True]
    assert store.input("data/plan.json").read() == b"three"
    assert store.where("data") == f"{store.root}/data"
    store.remove("data")
    assert store.list() == ["data.1/plan.json"]
    with pytest.raises(FileNotFoundError):
        store.read("data/plan.json")


def test_what_another_process_wrote_or_removed_is_seen_at_once(store):
    # s3fs keeps listings; a second client stands for the other process.
    other = ObjectStore(store.root)
    other._files = type(store._files)(skip_instance_cache=True)
    for turn in range(2):
        assert not store.exists("data/plan.json")
        assert store.list("data") == []
        other.write("data/plan.json", b"x" * (turn + 1))
        assert store.exists("data/plan.json")
        assert store.size("data/plan.json") == turn + 1
        assert store.list("data") == ["data/plan.json"]
        other.remove("data/plan.json")


def test_only_the_first_creates(store):
    assert store.create("file", b"first")
    # moto, like most S3 servers but not AWS, does not say which condition failed: s3fs raises a plain OSError then.
    assert not store.create("file", b"second")
    assert store.read("file") == b"first"


def test_a_create_that_fails_for_another_reason_is_not_taken_for_a_loss(store, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, "the network is gone")

    monkeypatch.setattr(store._files, "pipe_file", fail)
    with pytest.raises(OSError, match="the network is gone"):
        store.create("file", b"")


def test_a_folder_moves_with_all_it_holds(store):
    # s3fs cannot copy a folder as such: a redo or a repair on S3 failed with NoSuchKey, before.
    commit_folder(store, staged_folder(store, "student"), "student", "f")
    store.write("student.1/left", b"")
    before = {name: data for name, data in contents(store).items() if name.startswith("student/")}
    store.move("student", "student.2")
    after = {name.replace("student/", "student.2/"): data for name, data in before.items()}
    assert contents(store) == {**after, "student.1/left": b""}
    store.move("student.1/left", "student.1/left.bad-1")
    assert store.list("student.1") == ["student.1/left.bad-1"]


@pytest.mark.parametrize("number", range(1, 5))
def test_a_move_that_is_cut_short_never_leaves_a_manifest_without_its_files(store, monkeypatch, number):
    commit_folder(store, staged_folder(store, "student"), "student", "f")
    monkeypatch.setattr("raydistill.record.store.operations", 0)
    monkeypatch.setenv(FAULT_VARIABLE, f"{number}:EIO")
    try:
        store.move("student", "student.1")
        assert number == 4, "every operation of a move was reached"
    except OSError:
        manifest = read_manifest(store, "student")
        assert manifest is None or damage(store, "student", manifest) == []
        whole = [f for f in ("student", "student.1") if (m := read_manifest(store, f)) and not damage(store, f, m)]
        assert whole
        assert number < 4


def test_a_published_folder_comes_back_and_nothing_stays_behind(store, scratch):
    manifest = commit_folder(store, staged_folder(store, "student"), "student", "f", {"value": 0.5})
    assert list(scratch.iterdir()) == []
    assert store.list("student") == ["student/MANIFEST.json", "student/inner/config.json", "student/model.safetensors"]
    assert read_manifest(store, "student") == manifest
    folder = store.local("student")
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
        name.removeprefix("student/"): data for name, data in contents(store).items()
    }
    assert store.local("student/inner/config.json").read_bytes() == b"{}"
    with pytest.raises(FileNotFoundError):
        store.local("teacher")


@pytest.mark.parametrize("fault", [1, 2, 3])
def test_a_folder_is_there_when_its_manifest_is_which_comes_last(store, monkeypatch, fault):
    staged = staged_folder(store, "student", b"first")
    monkeypatch.setattr("raydistill.record.store.operations", 0)
    monkeypatch.setenv(FAULT_VARIABLE, f"{fault}:EIO")
    with pytest.raises(OSError, match="injected before put"):
        commit_folder(store, staged, "student", "f")
    monkeypatch.delenv(FAULT_VARIABLE)
    assert len(store.list("student")) == fault - 1
    assert read_manifest(store, "student") is None
    manifest = commit_folder(store, staged_folder(store, "student", b"second"), "student", "f")
    assert damage(store, "student", manifest) == []
    # What the first attempt put is not mixed with the second's files.
    stored = [name for name in store.list("student") if MANIFEST not in name]
    assert sorted(f"student/{entry.file}" for entry in manifest.files) == stored
    assert len(store.list("student.bad-1")) == fault - 1


def test_what_is_not_installed_or_not_known_is_one_line():
    for scheme in ("gs", "nowhere"):
        with pytest.raises(UserError, match=rf"^storage: {scheme}://bucket/run: .*Install the extra for {scheme}://$"):
            open_store(f"{scheme}://bucket/run")
    assert isinstance(open_store("file:///tmp/run"), LocalStore)


# --- commits


def test_shards_are_committed_by_their_sidecar(store):
    name, staged = "data/train-00000.parquet", store.staging("data/train-00000.parquet")
    pq.write_table(pa.table({"row_id": range(5)}), staged, write_page_checksum=True)
    entry = commit_shard(store, staged, name, rows=5, fingerprint="f")
    assert committed_shard(store, name, "f") == entry
    assert committed_shard(store, name, "g") is None
    store.remove("data/train-00000.json")
    assert committed_shard(store, name, "f") is None


def test_logits_are_written_and_read_and_a_damaged_shard_is_named(store):
    logits = np.arange(12, dtype=np.float32).reshape(4, 3)
    entry = write_logits(
        store, "teacher/cache/train-00000.parquet", np.arange(4), logits, codec="dense-float32", fingerprint="f"
    )
    manifest = commit_manifest(store, "teacher/cache", "f", [entry], {"codec": "dense-float32", "classes": 3})
    read = read_logits(store, "teacher/cache", entry, manifest)
    np.testing.assert_array_equal(read.logits_NK, logits)
    np.testing.assert_array_equal(read.row_ids_N, np.arange(4))
    damage_bit(store, "teacher/cache/train-00000.parquet")
    with pytest.raises(UserError, match=rf"{store.root}/teacher/cache/train-00000.parquet: has sha256"):
        read_logits(store, "teacher/cache", entry, manifest)


# --- a run


PLAN = Plan("student", {"cache": "c", "train.seed": 0})


def make_student(run: Run, plan: Plan) -> None:
    if run.begin("student", plan) is None:
        commit_folder(run.store, staged_folder(run.store, "student"), "student", plan.fingerprint)


def test_a_part_is_begun_completed_refused_and_redone(store):
    run = Run(store)
    assert run.complete("student") is None
    make_student(run, PLAN)
    first = contents(store)
    make_student(run, PLAN)
    assert contents(store) == first
    changed = Plan("student", {"cache": "c", "train.seed": 1})
    with pytest.raises(UserError, match=rf"{store.root}/train: train.seed: was made with 0, now asked for 1\."):
        run.begin("student", changed)
    again = Run(store, redo="train")
    again.set_aside("student")
    make_student(again, changed)
    assert run.require("student").fingerprint == changed.fingerprint
    now = contents(store)
    for name, data in first.items():
        folder = name.split("/")[0]
        assert now[name.replace(folder, f"{folder}.1", 1)] == data
    assert {name.split("/")[0] for name in leftovers(run)} == {"student.1", "train.1"}


def test_verify_finds_and_repair_sets_aside(store):
    run = Run(store)
    store.write("config.yaml", b"")
    make_student(run, PLAN)
    assert verify(run) == (4, [])
    for name in ("student/model.safetensors", f"student/{MANIFEST}", "train/plan.json"):
        before = contents(store)
        damage_bit(store, name)
        assert [finding.file for finding in verify(find_run(store.root), repair=True)[1]] == [name]
        make_student(run, PLAN)
        assert verify(run)[1] == []
        assert {n: d for n, d in contents(store).items() if ".bad-" not in n} == {
            n: d for n, d in before.items() if ".bad-" not in n
        }
    for name in leftovers(run):
        store.remove(name)
    assert verify(run) == (4, [])


def test_another_run_lends_its_parts(store, url):
    entry = Entry("train-00000.parquet", "0", 1, 1)
    store.write("data/plan.json", Plan("data", {"rows": 1}).sealed())
    commit_manifest(store, "data", Plan("data", {"rows": 1}).fingerprint, [entry])
    storage = url.rpartition("/")[0]
    borrower = open_run(storage, "second", cache_from=url)
    assert borrower.begin("data", Plan("data", {"rows": 1})) == Run(store).require("data")
    assert borrower.store.list() == []


# --- the lock


def test_the_lock_names_its_owner_and_goes_when_it_is_released(store):
    with run_lock(store):
        owner = json.loads(store.read(LOCK))
        assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
        with pytest.raises(UserError) as caught, run_lock(ObjectStore(store.root)):
            pass
        assert f"{store.root}: is in use by process {os.getpid()} on {socket.gethostname()} since " in str(caught.value)
        assert "\n" not in str(caught.value)
    assert store.list() == []


def test_the_lock_of_a_process_that_ended_here_is_taken_over_at_once(s3):
    store = open_store(s3)
    program = (
        "import sys, os, signal; from raydistill.record import lock, store\n"
        "with lock.run_lock(store.open_store(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", program, s3], timeout=DEADLINE)
    assert ended.returncode == -9
    assert store.exists(LOCK)
    with run_lock(store):
        assert json.loads(store.read(LOCK))["pid"] == os.getpid()
    assert not store.exists(LOCK)


@pytest.mark.parametrize(
    ("age", "holds"), [(lock.STALE_SECONDS - 30, True), (lock.STALE_SECONDS + 30, False), (-3600, True)]
)
def test_a_lock_from_another_machine_holds_while_it_is_refreshed(store, age, holds, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    refreshed = time.time() - age
    store.create(LOCK, Owner(1, "elsewhere", "another boot", "token", refreshed - 3600, refreshed).written())
    if holds:
        with pytest.raises(UserError, match="in use by process 1 on elsewhere since"), run_lock(store):
            pass
        return
    with run_lock(store):
        assert json.loads(store.read(LOCK))["pid"] == os.getpid()


@pytest.mark.parametrize("content", [b"", b"garbage", b"[]", b"{}", b'{"pid": 1}'])
def test_a_damaged_lock_object_holds_nothing(store, content, monkeypatch):
    # {} raised KeyError, before: no run could be started any more.
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.0)
    store.create(LOCK, content)
    with run_lock(store):
        pass
    assert not store.exists(LOCK)


def test_the_lock_is_refreshed_and_a_store_that_fails_meanwhile_does_not_end_that(store, monkeypatch, caplog):
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.05)
    failed = threading.Event()
    write = store.write

    def fail_once(name, data):
        if not failed.is_set():
            failed.set()
            raise OSError("the network is gone")
        write(name, data)

    monkeypatch.setattr(store, "write", fail_once)
    with run_lock(store):
        first = json.loads(store.read(LOCK))
        end = time.monotonic() + DEADLINE
        while (now := json.loads(store.read(LOCK))) == first and time.monotonic() < end:
            time.sleep(0.02)
    assert failed.is_set()
    assert now["time"] > first["time"]
    assert {**now, "time": 0} == {**first, "time": 0}
    assert "the network is gone" in caplog.text


def test_a_lock_that_was_taken_over_is_left_to_its_new_owner(store, monkeypatch, caplog):
    # A process that slept for minutes removed and overwrote the lock of the one that had followed it, before.
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.05)
    other = Owner(1, "elsewhere", "boot", "token", time.time(), time.time()).written()
    with run_lock(store):
        store.write(LOCK, other)
        end = time.monotonic() + DEADLINE
        while "taken the run's lock over" not in caplog.text and time.monotonic() < end:
            time.sleep(0.02)
    assert store.read(LOCK) == other


def test_of_two_that_take_a_stale_lock_over_one_gets_it(store, monkeypatch):
    # Both read the stale lock; the slower one removes the lock that the faster one has just made.
    stale = Owner(1, "elsewhere", "boot", "token", 0.0, 0.0).written()
    store.create(LOCK, stale)
    both = threading.Barrier(2)
    read, seen, outcomes = lock._owner_of, threading.local(), []
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.5)

    def read_together(of):
        found = read(of)
        if not getattr(seen, "once", False):
            seen.once = True
            both.wait(DEADLINE)
        return found

    monkeypatch.setattr(lock, "_owner_of", read_together)
    done = threading.Barrier(2)

    def work():
        try:
            with run_lock(ObjectStore(store.root)):
                outcomes.append("held")
                done.wait(DEADLINE)
        except UserError as error:
            outcomes.append("in use" if "is in use by" in str(error) else str(error))
            done.wait(DEADLINE)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert sorted(outcomes) == ["held", "in use"]


@pytest.mark.parametrize("place", ["s3://no-such-bucket-here/run", "server gone"])
def test_storage_that_cannot_be_reached_is_one_line(s3, place, monkeypatch):
    if place == "server gone":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        s3fs.S3FileSystem.clear_instance_cache()
        place = s3
        with pytest.raises(UserError, match=rf"^RUN: {place}: cannot be reached \("):
            find_run(place)
    refused = pytest.raises(UserError, match=rf"^storage: {place}: cannot be reached \(")
    with refused as caught, run_lock(open_store(place)):
        pass
    assert "\n" not in str(caught.value)


# --- prepare


def config(folder: Path, url: str):
    """Sixty rows of three labels; their shards go to the URL."""
    for split, rows in (("train", 60), ("test", 12)):
        lines = [f'"ticket {number}, about {"abc"[number % 3]}",{"abc"[number % 3]}' for number in range(rows)]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    storage, _, name = url.rpartition("/")
    return validate(
        {
            "name": name, "storage": storage,
            "data": {"train": str(folder / "train.csv"), "test": str(folder / "test.csv"), "shard_rows": 32},
            "teacher": {"model": "unused"},
        },
        {}, "test",
    )  # fmt: skip


def prepare_into(folder: Path, url: str):
    settings = config(folder, url)
    run = open_run(settings.storage, settings.name)
    return run, prepare(settings, run, survey_sources(settings, Progress()), Progress())


def test_prepare_writes_to_object_storage_what_it_writes_to_disk(url, tmp_path):
    run, manifest = prepare_into(tmp_path, url)
    local, same = prepare_into(tmp_path, str(tmp_path / "local/run"))
    assert manifest == same
    assert contents(run.store) == {name: local.store.read(name) for name in local.store.list()}
    assert damage(run.store, "data", manifest) == []
    splits = (read_split(run.store, manifest.shards(split)) for split in ("train", "validation", "test"))
    row_ids = [int(row_id) for split in splits for shard in split for row_id in shard.row_ids_N]
    assert row_ids == list(range(72))


def test_prepare_goes_on_after_a_fault_at_any_operation(url, tmp_path, monkeypatch):
    _, golden = prepare_into(tmp_path, str(tmp_path / "golden/run"))
    last = 1 + 2 * len(golden.files) + 1  # a plan, every shard and its sidecar, the manifest
    # S3 takes a request for each of these in turn, so only some: at a shard, at a sidecar, and at both ends.
    points = range(1, last + 1) if url.startswith("memory") else (1, 4, 7, last)
    kept = set()
    for number in points:
        place = f"{url}-{number}"
        store = open_store(place)
        monkeypatch.setattr("raydistill.record.store.operations", 0)
        monkeypatch.setenv(FAULT_VARIABLE, f"{number}:EIO")
        with pytest.raises(OSError, match="injected before put"):
            prepare_into(tmp_path, place)
        monkeypatch.delenv(FAULT_VARIABLE)
        assert read_manifest(store, "data") is None
        committed = {e.file for e in golden.files if committed_shard(store, f"data/{e.file}", golden.fingerprint)}
        kept.add(len(committed))
        before = {file: store._files.info(store._path(f"data/{file}")) for file in committed}
        run, manifest = prepare_into(tmp_path, place)
        assert manifest == golden
        assert damage(store, "data", manifest) == []
        assert {file: store._files.info(store._path(f"data/{file}")) for file in committed} == before
        assert leftovers(run) == []
    assert kept == ({*range(len(golden.files) + 1)} if len(points) == last else {0, 1, 2, len(golden.files)})
    monkeypatch.setattr("raydistill.record.store.operations", 0)
    monkeypatch.setenv(FAULT_VARIABLE, f"{last + 1}:EIO")
    assert prepare_into(tmp_path, f"{url}-whole")[1] == golden


def test_sources_are_read_from_object_storage(s3, tmp_path):
    local, _ = prepare_into(tmp_path, str(tmp_path / "local/run"))
    files = fsspec.filesystem("s3")
    for split in ("train", "test"):
        files.put_file(str(tmp_path / f"{split}.csv"), f"{BUCKET}/input/{split}.csv")
    settings = config(tmp_path, s3)
    data = settings.data.model_copy(update={s: f"s3://{BUCKET}/input/{s}.csv" for s in ("train", "test")})
    settings = settings.model_copy(update={"data": data})
    run = open_run(settings.storage, settings.name)
    manifest = prepare(settings, run, survey_sources(settings, Progress()), Progress())
    assert [entry.sha256 for entry in manifest.files] == [e.sha256 for e in local.require("data").files]
    assert manifest.fingerprint == local.require("data").fingerprint


class ClientError(Exception):
    """Like what a store's client raises: no OSError, no number."""


@pytest.mark.parametrize(
    ("raised", "number"),
    [(ClientError("Could not connect\nto the endpoint"), errno.EIO), (PermissionError("Forbidden"), errno.EACCES)],
)
def test_what_a_client_raises_is_told_in_one_line_with_its_place(store, monkeypatch, raised, number):
    # It ended in a traceback once the lock was taken, before.
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(store._files, "cat_file", fail)
    with pytest.raises(OSError, match=str(raised)[:8]) as error:
        store.read("data/plan.json")
    assert error.value.errno == number
    problem = str(storage_problem(error.value))
    assert problem.startswith(f"{store.root}: ")
    assert str(raised).splitlines()[0] in problem
    assert "\n" not in problem
