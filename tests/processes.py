"""Processes that tests look for and end, any of which may end by itself between two looks."""

from __future__ import annotations

from collections.abc import Iterable

import psutil


def called(processes: Iterable[psutil.Process], *beginnings: str) -> list[psutil.Process]:
    """Those whose command line begins so; what has ended meanwhile is called nothing."""
    return [process for process in processes if "".join(_command(process)).startswith(beginnings)]


def program(process: psutil.Process) -> str:
    """The path of what it runs; nothing of one that has ended meanwhile."""
    return next(iter(_command(process)), "")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # a zombie too has none to read
        return []


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and everything that it started, as a machine that loses its power does."""
    try:
        whole = [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess:
        return
    kill(whole)


def kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
