"""The ways a run ends early that are not bugs: the user can mend it, or a signal asked for it."""

import errno
import os
import shutil
import signal

FULL = (errno.ENOSPC, errno.EDQUOT)
MENDABLE = (
    *FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG, errno.ENAMETOOLONG,
    errno.ENOLCK, errno.ETIMEDOUT, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip


class UserError(ValueError):
    """Something the user gave is wrong; the message is one line that says what was found and what to do."""


def storage_problem(error: OSError) -> UserError | None:
    """A full disk, a missing right or a failing device as one line for the user; None for what only a bug explains."""
    if error.errno not in MENDABLE:
        return None
    remedy = "Mend the storage, or its permissions"
    if error.errno in FULL:
        remedy = f"Free some space{_free_space(error.filename)}"
    what = f"{error.filename}: " if error.filename else ""
    return UserError(f"{what}{error.strerror}. {remedy}, then run the same command again: what is committed stays")


def _free_space(path: str | None) -> str:
    """How much a local path's disk has left, in words; a quota or a remote store does not say."""
    folder = os.path.dirname(path or "")
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return f" ({shutil.disk_usage(folder).free / 1e6:,.0f} MB are left there)" if os.path.isabs(folder) else ""


def first_line(error: BaseException) -> str:
    """What an exception of another package says, cut to what fits into one line; its kind when it says nothing."""
    return (str(error).strip().splitlines() or [""])[0][:200] or type(error).__name__


class Interrupted(Exception):
    """A signal asked the run to stop; what was committed stays and the same command goes on."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum
