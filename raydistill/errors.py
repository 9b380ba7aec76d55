"""The ways a run ends early that are not bugs: the user can mend it, or a signal asked for it."""

import errno
import signal

MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)


class UserError(ValueError):
    """Something the user gave is wrong; the message is one line that says what was found and what to do."""


def storage_problem(error: OSError) -> UserError | None:
    """A full disk, a missing right or a failing device as one line for the user; None for what only a bug explains."""
    if error.errno not in MENDABLE:
        return None
    remedy = (
        "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Mend the storage, or its permissions"
    )
    what = f"{error.filename}: " if error.filename else ""
    return UserError(f"{what}{error.strerror}. {remedy}, then run the same command again: what is committed stays")


class Interrupted(Exception):
    """A signal asked the run to stop; what was committed stays and the same command goes on."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum
