"""One process at a time works in a run's folder.

Locally the kernel holds the lock (flock), so that it ends with the process however that ends. On an object store a
lock object names its owner and is refreshed; one that is not refreshed for two minutes is stale.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from raydistill.errors import UserError
from raydistill.record.store import LocalStore, Store, unreachable

LOCK = ".lock"
REFRESH_SECONDS = 30.0
STALE_SECONDS = 120.0
SETTLE_SECONDS = 1.0
LOCK_ATTEMPTS = 20
log = logging.getLogger(__name__)


@contextlib.contextmanager
def run_lock(store: Store) -> Iterator[None]:
    """Holds the run; leaves behind no folder in which nothing was written. Raises UserError when it is held."""
    with _local_lock(store) if isinstance(store, LocalStore) else _object_lock(store):
        yield


@contextlib.contextmanager
def _local_lock(store: LocalStore) -> Iterator[None]:
    made: list[str] = []
    descriptor = _locked_file(store, made)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, Owner.here().written())
        yield
    finally:
        if made and os.listdir(store.root) == [LOCK]:
            os.remove(store.where(LOCK))
            for folder in made:
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        os.close(descriptor)


def _locked_file(store: LocalStore, made: list[str]) -> int:
    """The descriptor of the lock file, which is locked. Raises UserError when it is held or cannot be written.

    Adds to `made` the folders that were made for it, deepest first.
    """
    path, problem = store.where(LOCK), ""
    # An owner that ends may clear the file and its folders away between any two of these calls; they are made again.
    for _ in range(LOCK_ATTEMPTS):
        try:
            _make_folders(store.root, made)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError as error:
            problem = error.strerror
            continue
        except OSError as error:
            problem = error.strerror
            break
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            owner = Owner.read(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise _in_use(store, owner) from None
        except OSError as error:
            problem = error.strerror
        os.close(descriptor)
    raise UserError(f"storage: {store.root}: cannot be locked ({problem}). Choose another storage")


def _make_folders(path: str, made: list[str]) -> None:
    missing: list[str] = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for folder in reversed(missing):
        try:
            os.mkdir(folder)
            made.insert(0, folder)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(folder).st_mode):  # else another process made it meanwhile
                raise UserError(f"storage: {folder} is a file, not a folder. Choose another storage or name") from None


@contextlib.contextmanager
def _object_lock(store: Store) -> Iterator[None]:
    owner = Owner.here()
    _take_object(store, owner)
    stop = threading.Event()

    def refresh() -> None:
        while not stop.wait(REFRESH_SECONDS):
            _keep_object(store, owner)

    thread = threading.Thread(target=refresh, daemon=True, name="run-lock")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _keep_object(store, owner, release=True)


def _take_object(store: Store, owner: Owner) -> None:
    """Makes the lock object, in the place of a stale one if need be."""
    took_over = False
    try:
        while not store.create(LOCK, owner.written()):
            standing = _owner_of(store)
            if standing is not None and not standing.stale():
                raise _in_use(store, standing)
            with contextlib.suppress(FileNotFoundError):
                store.remove(LOCK)
            took_over = True
        if took_over:
            # Another process may have found the same stale lock, and removed ours for it.
            time.sleep(SETTLE_SECONDS)
            standing = _owner_of(store)
            if standing is None or standing.token != owner.token:
                raise _in_use(store, standing)
    except UserError:
        raise
    except Exception as error:  # each store's client raises its own kinds
        raise unreachable("storage", store.root, error) from None


def _keep_object(store: Store, owner: Owner, *, release: bool = False) -> None:
    """Refreshes or removes the lock object while it is ours. A store that does not answer must not end the run."""
    try:
        standing = _owner_of(store)
        if standing is None or standing.token != owner.token:
            log.warning("%s: another process has taken the run's lock over", store.root)
        elif release:
            store.remove(LOCK)
        else:
            store.write(LOCK, replace(owner, time=time.time()).written())
    except Exception as error:  # each store's client raises its own kinds
        log.warning("%s: the run's lock could not be refreshed or removed (%s)", store.root, error)


def _owner_of(store: Store) -> Owner | None:
    try:
        return Owner.read(store.read(LOCK))
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class Owner:
    """What a lock says about the process that holds it."""

    pid: int
    host: str
    boot: str
    token: str
    since: float
    time: float

    @staticmethod
    def here() -> Owner:
        now = time.time()
        return Owner(os.getpid(), socket.gethostname(), _boot_id(), uuid.uuid4().hex, now, now)

    @staticmethod
    def read(content: bytes) -> Owner | None:
        """None when the lock is empty or damaged."""
        try:
            return Owner(**json.loads(content))
        except (ValueError, TypeError):
            return None

    def written(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def stale(self) -> bool:
        """Whether the process is gone: it ended on this machine, or has not refreshed its lock."""
        here = self.boot == _boot_id() and self.host == socket.gethostname()
        return (here and not _alive(self.pid)) or time.time() - self.time > STALE_SECONDS


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _in_use(store: Store, owner: Owner | None) -> UserError:
    who = "another process"
    if owner:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.since))
        who = f"process {owner.pid} on {owner.host} since {since}"
    return UserError(f"{store.root}: is in use by {who}. Wait for it, end it, or take another run name")
