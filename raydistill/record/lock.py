"""One process at a time works in a run's folder.

Locally the kernel holds the lock (flock), so that it ends with the process however that ends. On an object store a
lock object names its owner and is refreshed; one that is not refreshed for two minutes is stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

from raydistill.errors import UserError
from raydistill.record.store import LocalStore, Store

LOCK = ".lock"
REFRESH_SECONDS = 30.0
STALE_SECONDS = 120.0


@contextlib.contextmanager
def run_lock(store: Store) -> Iterator[None]:
    """Holds the run; leaves behind no folder in which nothing was written. Raises UserError when it is held."""
    with _local_lock(store) if isinstance(store, LocalStore) else _object_lock(store):
        yield


@contextlib.contextmanager
def _local_lock(store: LocalStore) -> Iterator[None]:
    made = _make_folders(store.root)
    descriptor = os.open(store.where(LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(store, os.read(descriptor, 4096)) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, _owner())
        yield
    finally:
        os.close(descriptor)
        if made and os.listdir(store.root) == [LOCK]:
            os.remove(store.where(LOCK))
            for folder in made:
                with contextlib.suppress(OSError):
                    os.rmdir(folder)


def _make_folders(path: str) -> list[str]:
    """Makes a folder; the folders that were made for it, deepest first."""
    missing: list[str] = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    try:
        for folder in reversed(missing):
            os.mkdir(folder)
    except FileExistsError as error:
        raise UserError(f"storage: {error.filename} is a file, not a folder. Choose another storage or name") from None
    except OSError as error:
        raise UserError(
            f"storage: {error.filename} cannot be made ({error.strerror}). Choose another storage"
        ) from None
    return missing


@contextlib.contextmanager
def _object_lock(store: Store) -> Iterator[None]:
    while not store.create(LOCK, _owner()):
        content = store.read(LOCK)
        if not _stale(content):
            raise _in_use(store, content)
        store.remove(LOCK)
    stop = threading.Event()

    def refresh() -> None:
        while not stop.wait(REFRESH_SECONDS):
            store.write(LOCK, _owner())

    thread = threading.Thread(target=refresh, daemon=True, name="run-lock")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        store.remove(LOCK)


def _owner() -> bytes:
    facts = {"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot_id(), "time": time.time()}
    return json.dumps(facts).encode()


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _stale(content: bytes) -> bool:
    try:
        owner = json.loads(content)
    except ValueError:
        return True
    if owner["boot"] == _boot_id() and owner["host"] == socket.gethostname() and not _alive(owner["pid"]):
        return True
    return time.time() - owner["time"] > STALE_SECONDS


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _in_use(store: Store, content: bytes) -> UserError:
    try:
        owner = json.loads(content)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["time"]))
        who = f"process {owner['pid']} on {owner['host']} since {since}"
    except (ValueError, KeyError):
        who = "another process"
    return UserError(f"{store.root}: is in use by {who}. Wait for it, end it, or take another run name")
