"""The one place that opens, writes, syncs, renames and removes what a run keeps.

A `Store` is a run's folder: on a local file system, where a file appears by rename after fsync, or on any fsspec
store, where one PUT takes the rename's place. Every operation that changes something passes through `step`, so that a
test can make the N-th one fail or kill the process there (`RAYDISTILL_FAULT=N:kill`, `N:EIO`, `N:ENOSPC` …).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import os
import re
import shutil
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import fsspec
import pyarrow as pa
from safetensors import SafetensorError

from raydistill.errors import UserError, first_line

FAULT_VARIABLE = "RAYDISTILL_FAULT"
Method = TypeVar("Method", bound=Callable[..., Any])
operations = 0


def step(operation: str, path: str) -> None:
    """Counts one operation that is about to change the store, and injects the fault that was asked for."""
    global operations
    operations += 1
    number, _, action = os.environ.get(FAULT_VARIABLE, "").partition(":")
    if number != str(operations):
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(getattr(errno, action), f"injected before {operation}", path)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path into what a failed write raises: Python and Arrow leave it out, safetensors has its own error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number is None or getattr(error, "filename", None):
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


class Store(Protocol):
    """Files below one root, by names relative to it."""

    root: str

    def where(self, name: str) -> str:
        """The full path or URL of a name, for messages and for other processes."""
        ...

    def exists(self, name: str) -> bool: ...
    def size(self, name: str) -> int: ...
    def read(self, name: str) -> bytes: ...

    def list(self, folder: str = "") -> list[str]:
        """Names of all files below a folder, sorted, leftovers of interrupted writes included."""
        ...

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders directly below a folder, sorted."""
        ...

    def input(self, name: str) -> pa.NativeFile:
        """A file to read with Arrow: memory-mapped where the store allows it."""
        ...

    def sha256(self, name: str) -> str: ...

    def write(self, name: str, data: bytes) -> None:
        """Replaces a file by these bytes: whole or not at all, and durable."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file that must not exist yet; False when it does."""
        ...

    def staging(self, name: str) -> Path:
        """A new local path to write what `publish` then commits under the name."""
        ...

    def publish(self, staged: Path, name: str) -> None:
        """Commits a staged file, or a staged folder with all its files, under its name."""
        ...

    def local(self, name: str) -> Path:
        """A local path of a committed file or folder; fetched first where the store is remote."""
        ...

    def move(self, name: str, target: str) -> None: ...
    def remove(self, name: str) -> None: ...


def open_store(url: str) -> Store:
    """The store at a folder or an fsspec URL. Raises UserError for a scheme whose package is not installed."""
    scheme, sign, _ = url.partition("://")
    if not sign or scheme == "file":
        return LocalStore(url.removeprefix("file://"))
    try:
        return ObjectStore(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"storage: {url}: {str(error).splitlines()[0]}. Install the extra for {scheme}://") from None


def unreachable(setting: str, where: str, error: Exception) -> UserError:
    """What a store's client raised, in one line."""
    return UserError(
        f"{setting}: {where}: cannot be reached ({first_line(error)}). Check its name and your credentials"
    )


def _check_within(root: str, name: str) -> None:
    """Names come from manifests too, and a manifest may come from somebody else."""
    if name.startswith("/") or ".." in name.split("/"):
        raise UserError(f"{root}: refuses the name {name!r}, which leads out of it")


class LocalStore:
    """A folder on a local or shared POSIX file system."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)

    def where(self, name: str) -> str:
        _check_within(self.root, name)
        return os.path.normpath(os.path.join(self.root, name))

    def exists(self, name: str) -> bool:
        return os.path.exists(self.where(name))

    def size(self, name: str) -> int:
        return os.path.getsize(self.where(name))

    def read(self, name: str) -> bytes:
        return Path(self.where(name)).read_bytes()

    def list(self, folder: str = "") -> list[str]:
        top = self.where(folder)
        found = (os.path.join(base, file) for base, _, files in os.walk(top) for file in files)
        return sorted(os.path.relpath(path, self.root) for path in found)

    def folders(self, folder: str = "") -> list[str]:
        top = self.where(folder)
        if not os.path.isdir(top):
            return []
        return sorted(os.path.join(folder, entry.name) for entry in os.scandir(top) if entry.is_dir())

    def input(self, name: str) -> pa.NativeFile:
        return pa.memory_map(self.where(name))

    def sha256(self, name: str) -> str:
        return sha256_file(Path(self.where(name)))

    def write(self, name: str, data: bytes) -> None:
        staged = self.staging(name)
        step("write", str(staged))
        with naming(staged):
            staged.write_bytes(data)
        self.publish(staged, name)

    def create(self, name: str, data: bytes) -> bool:
        path = Path(self.where(name))
        _make_folders(path.parent)
        step("create", str(path))
        try:
            with open(path, "xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def staging(self, name: str) -> Path:
        path = Path(self.where(name))
        step("mkdir", str(path.parent))
        _make_folders(path.parent)
        return path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"

    def publish(self, staged: Path, name: str) -> None:
        target = Path(self.where(name))
        for path in [*sorted(staged.rglob("*")), staged] if staged.is_dir() else [staged]:
            step("fsync", str(path))
            _fsync(path)
        step("rename", str(target))
        os.replace(staged, target)
        step("fsync", str(target.parent))
        _fsync(target.parent)

    def local(self, name: str) -> Path:
        return Path(self.where(name))

    def move(self, name: str, target: str) -> None:
        step("rename", self.where(target))
        os.rename(self.where(name), self.where(target))
        _fsync(Path(self.where(target)).parent)

    def remove(self, name: str) -> None:
        path = self.where(name)
        step("remove", path)
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def reaching(method: Method) -> Method:
    """Gives what a store's client raises, each client its own kinds, a number and a place, so that it is told well."""

    @functools.wraps(method)
    def call(store: Store, *arguments: Any, **named: Any) -> Any:
        try:
            return method(store, *arguments, **named)
        except (UserError, FileNotFoundError, FileExistsError):
            raise
        except Exception as error:
            numbered = isinstance(error, OSError) and error.errno is not None
            if numbered or (type(error).__module__ == "builtins" and not isinstance(error, OSError)):
                raise
            number = errno.EACCES if isinstance(error, PermissionError) else errno.EIO
            raise OSError(number, first_line(error), store.root) from error

    return cast(Method, call)


class ObjectStore:
    """A prefix of an object store, by fsspec. A PUT is whole or absent; a folder is committed by its last file."""

    def __init__(self, url: str) -> None:
        self.root = url.rstrip("/")
        self._files, self._base = fsspec.core.url_to_fs(self.root)

    def where(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _path(self, name: str) -> str:
        _check_within(self.root, name)
        return f"{self._base}/{name}" if name else self._base

    @reaching
    def exists(self, name: str) -> bool:
        self._files.invalidate_cache()
        return self._files.exists(self._path(name))

    @reaching
    def size(self, name: str) -> int:
        self._files.invalidate_cache()
        return int(self._files.info(self._path(name))["size"])

    @reaching
    def read(self, name: str) -> bytes:
        return self._files.cat_file(self._path(name))

    @reaching
    def list(self, folder: str = "") -> list[str]:
        self._files.invalidate_cache()
        top = self._path(folder)
        found = self._files.find(top) if self._files.exists(top) else []
        return sorted(path[len(self._base) + 1 :] for path in found)

    def folders(self, folder: str = "") -> list[str]:
        depth = len(folder.split("/")) if folder else 0
        parts = (name.split("/") for name in self.list(folder))
        return sorted({"/".join(p[: depth + 1]) for p in parts if len(p) > depth + 1})

    def input(self, name: str) -> pa.NativeFile:
        return pa.BufferReader(self.read(name))

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.read(name)).hexdigest()

    @reaching
    def write(self, name: str, data: bytes) -> None:
        step("put", self.where(name))
        self._files.pipe_file(self._path(name), data)

    @reaching
    def create(self, name: str, data: bytes) -> bool:
        step("put-if-absent", self.where(name))
        try:
            self._files.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            # AWS says which condition failed, and s3fs makes it a FileExistsError; other S3 servers do not say.
            response = getattr(error.__cause__, "response", None)
            if response and response["Error"].get("Code") in ("PreconditionFailed", "ConditionalRequestConflict"):
                return False
            raise
        return True

    def staging(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix="raydistill-")) / Path(name).name

    @reaching
    def publish(self, staged: Path, name: str) -> None:
        # MANIFEST.json last: a folder without it is not there yet.
        files = sorted((p for p in staged.rglob("*") if p.is_file()), key=lambda p: (p.name == "MANIFEST.json", p))
        for path in files if staged.is_dir() else [staged]:
            target = f"{name}/{path.relative_to(staged).as_posix()}" if staged.is_dir() else name
            step("put", self.where(target))
            self._files.put_file(str(path), self._path(target))
        shutil.rmtree(staged.parent)

    @reaching
    def local(self, name: str) -> Path:
        target = Path(tempfile.mkdtemp(prefix="raydistill-")) / Path(name).name
        self._files.get(self._path(name), str(target), recursive=True)
        return target

    @reaching
    def move(self, name: str, target: str) -> None:
        step("move", self.where(target))
        # By file: s3fs cannot copy a folder, because it tries to copy a file of the folder's name as well.
        names = self.list(name)
        self._files.copy([self._path(n) for n in names], [self._path(target + n[len(name) :]) for n in names])
        self.remove(name)

    @reaching
    def remove(self, name: str) -> None:
        # MANIFEST.json first: a folder without it is not there any more.
        for manifests_turn in (True, False):
            step("remove", self.where(name))
            names = [n for n in self.list(name) if n.endswith("MANIFEST.json") == manifests_turn]
            if names:
                self._files.rm([self._path(n) for n in names])


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_folders(folder: Path) -> None:
    """Makes a folder and those above it, durably: a new folder is a name in the one above."""
    missing = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        with contextlib.suppress(PermissionError):  # a folder that may be written to and not be read
            _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
