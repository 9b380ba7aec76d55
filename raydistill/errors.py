"""The two ways a run ends early that are not bugs: the user can mend it, or a signal asked for it."""

import signal


class UserError(ValueError):
    """Something the user gave is wrong; the message is one line that says what was found and what to do."""


class Interrupted(Exception):
    """A signal asked the run to stop; what was committed stays and the same command goes on."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum
