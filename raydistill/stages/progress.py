"""What a stage tells the person who waits: lines of progress, and whether a signal asked it to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from raydistill.errors import Interrupted

GRACE_SECONDS = 8.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Overview:
    """What a stage is doing, as a table of texts."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Progress:
    """Passed through every stage. `say` is for people and takes one line; a subclass may draw bars instead."""

    def __init__(self, say: Callable[[str], None] = lambda line: None, every_seconds: float = 5.0) -> None:
        self.say = say
        self._every_seconds = every_seconds
        self._last: dict[str, float] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._stop = threading.Event()
        self.signal = 0

    def counts(self, what: str, done: int, total: int | None, unit: str, started: float, facts: str = "") -> None:
        """Says how far a count has come, its rate and the time left, at most once in a few seconds and at the end."""
        now = time.monotonic()
        finished = total is not None and done >= total
        if not finished and now - self._last.get(what, started) < self._every_seconds:
            return
        self._last[what] = now
        # After the first line the rate is counted from there: what came before it is mostly start-up.
        since, first = self._first.setdefault(what, (now, done))
        is_first = done <= first
        rate = done / max(now - started, 1e-9) if is_first else (done - first) / (now - since)
        text = f"{what}: {done:,}" + (f" of {total:,}" if total is not None else "") + f" {unit}"
        text += f", {per_second(rate)} {unit}/s" + (" with its start" if is_first and not finished else "")
        if total is not None and not finished and rate > 0:
            text += f", {'at most ' if is_first else ''}{duration((total - done) / rate)} left"
        self.say(text + (f", {facts}" if facts else ""))

    @contextlib.contextmanager
    def showing(self, overview: Callable[[], Overview]) -> Iterator[None]:
        """While a stage works: a subclass may draw what it does, made anew as it changes. `note` is silent then."""
        yield

    def note(self, line: str) -> None:
        """Says what an overview, where one is drawn, has in it."""
        self.say(line)

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def check(self) -> None:
        """Raises Interrupted when a signal has come."""
        if self.stopping:
            raise Interrupted(self.signal)

    @contextlib.contextmanager
    def catching_signals(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP ask for a stop once; the second one ends the process at once."""
        before = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():
                for signum, handler in before.items():
                    signal.signal(signum, handler)

    def listen(self) -> None:
        """Takes the signals; again after `ray.init`, which puts a handler of its own that aborts on SIGTERM."""
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                signal.signal(signum, self._ask_for_stop)

    def _ask_for_stop(self, signum: int, _frame: Any) -> None:
        if self.stopping:
            os._exit(128 + signum)
        self.signal = signum
        self._stop.set()


def per_second(rate: float) -> str:
    """A rate as people read it: two digits of a slow one."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """Seconds as people read them: 42 s, 3 min 20 s, 2 h 05 min."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(size_bytes: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.3g} PB"
