"""What is in a source, and which of train's rows are for validation."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from raydistill.data.sources import Columns, Dropped, Source, read_rows
from raydistill.errors import UserError


@dataclass
class Survey:
    """A first pass over a source: rows by label and without one, dropped rows by reason."""

    labels: Counter[str] = field(default_factory=Counter)
    unlabelled: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: str = ""

    @property
    def rows(self) -> int:
        """Rows with a label."""
        return sum(self.labels.values())


def survey(source: Source, columns: Columns, max_dropped: float) -> Survey:
    """Counts the source's rows. Raises UserError when none can be used or too many cannot."""
    found = Survey()
    for row in read_rows(source, columns):
        if isinstance(row, Dropped):
            found.dropped[row.reason] += 1
            found.first_dropped = found.first_dropped or f"{source.files[row.file]}: row {row.number}: {row.reason}"
        elif row.label is None:
            found.unlabelled += 1
        else:
            found.labels[row.label] += 1
    dropped, used = sum(found.dropped.values()), found.rows + found.unlabelled
    if not found.rows and not (columns.label is None and used):
        reason = f"; {found.first_dropped}" if dropped else ""
        without = f", {found.unlabelled} without a label" if found.unlabelled else ""
        raise UserError(f"{source.setting}: {source.files[0]}: has no usable rows ({dropped} dropped{without}{reason})")
    if dropped > max_dropped * (dropped + used):
        raise UserError(
            f"{source.setting}: {found.first_dropped}; {dropped} of {dropped + used} rows cannot be used."
            " Mend the file, or raise data.max_dropped"
        )
    return found


class ValidationDraw:
    """Draws an exact share of every label's rows in one pass: selection sampling (Knuth, TAOCP 2, 3.4.2, algorithm S).

    The draw depends on the seed, the label and the order of the label's rows alone.
    """

    def __init__(self, labels: Counter[str], share: float, seed: int) -> None:
        self.rows = {label: int(count * share + 0.5) for label, count in labels.items()}
        self._wanted = dict(self.rows)
        self._left = dict(labels)
        self._random = {label: random.Random(f"{seed}:{label}") for label in labels}

    def takes(self, label: str) -> bool:
        """Whether the next row of this label is for validation."""
        taken = self._random[label].random() * self._left[label] < self._wanted[label]
        self._left[label] -= 1
        self._wanted[label] -= taken
        return taken
