"""What the command line prints: lines, a stage's overview as a table, the figures of a report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from raydistill.stages.progress import Overview, Progress

# Texts are printed as they are: rich would turn the place `config.yaml:100:` into an emoji and drop a label `[b]`.
out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
err = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, stderr=True)


class TerminalProgress(Progress):
    """Draws what a stage is doing as a table below the lines, where there is a terminal to draw on."""

    _draws = False

    @contextlib.contextmanager
    def showing(self, overview: Callable[[], Overview]) -> Iterator[None]:
        with Live(get_renderable=lambda: _drawn(overview()), console=out, refresh_per_second=2):
            self._draws = True
            try:
                yield
            finally:
                self._draws = False

    def note(self, line: str) -> None:
        if not self._draws:
            self.say(line)


def _drawn(overview: Overview) -> Table:
    table = Table(*overview.columns, title=overview.title, title_justify="left", box=None)
    for row in overview.rows:
        table.add_row(*row)
    return table


def print_report(report: dict[str, Any]) -> None:
    """The comparison as a table, and the verdict under it."""
    from raydistill.report.page import table as report_table
    from raydistill.report.page import verdict

    header, rows = report_table(report)
    table = Table(*header, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    out.print(table)
    for line in verdict(report):
        out.print(line)
