"""What is in a source, and which of train's rows are for validation."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from raydistill.data.labels import Label
from raydistill.data.sources import Columns, Dropped, Source, read_rows
from raydistill.errors import UserError


@dataclass
class Survey:
    """A first pass over a source: rows by label and without one, dropped rows by reason."""

    labels: Counter[Label] = field(default_factory=Counter)
    unlabelled: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: str = ""

    @property
    def rows(self) -> int:
        """Rows with a label."""
        return sum(self.labels.values())

    @property
    def by_name(self) -> Counter[str]:
        """Rows by each name: a row with a set of labels counts for every name in it."""
        counts: Counter[str] = Counter()
        for label, rows in self.labels.items():
            for name in (label,) if isinstance(label, str) else label:
                counts[name] += rows
        return counts


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

    The draw depends on the seed, the label and the order of the label's rows alone. Rows with sets of labels are drawn
    from every set, as many as `share_of_sets` says.
    """

    def __init__(self, labels: Counter[Label], share: float, seed: int) -> None:
        if any(isinstance(label, tuple) for label in labels):
            self.rows = share_of_sets(labels, share, seed)
        else:
            self.rows = {label: int(count * share + 0.5) for label, count in labels.items()}
        self._wanted = dict(self.rows)
        self._left = dict(labels)
        self._random = {label: random.Random(f"{seed}:{label}") for label in labels}

    def takes(self, label: Label) -> bool:
        """Whether the next row of this label is for validation."""
        taken = self._random[label].random() * self._left[label] < self._wanted[label]
        self._left[label] -= 1
        self._wanted[label] -= taken
        return taken


def share_of_sets(sets: Counter[Label], share: float, seed: int) -> dict[Label, int]:
    """How many rows of each set of labels make a share in which every label has its part.

    Every set gives its share rounded down or up. Which are rounded up is decided label by label, the rarest first, as
    iterative stratification does (Sechidis et al. 2011, "On the stratification of multi-label data", section 3.2): so
    many of a label's sets that the label has its own share, rounded half up; first those that overshoot no other
    label, then those that rounding would cost most, then by seed. So every label gets at least its rounded share; a
    frequent one may get more on a rarer one's account. Rows without any label count as a label of their own. Memory
    grows with the number of different sets, not of rows.
    """
    names_of = {label: tuple(label) or ("",) for label in sets}
    of_name: dict[str, list[Label]] = defaultdict(list)
    for label, names in names_of.items():
        for name in names:
            of_name[name].append(label)
    rows = {label: int(count * share) for label, count in sets.items()}
    totals = {name: sum(sets[label] for label in found) for name, found in of_name.items()}
    missing = {n: int(totals[n] * share + 0.5) - sum(rows[label] for label in found) for n, found in of_name.items()}
    order = {label: random.Random(f"{seed}:{label}").random() for label in sets}
    for name in sorted(of_name, key=lambda n: (totals[n], n)):
        candidates = [label for label in of_name[name] if int(sets[label] * share) == rows[label] < sets[label] * share]
        candidates.sort(
            key=lambda label: (
                sum(missing[other] <= 0 for other in names_of[label]), rows[label] - sets[label] * share, order[label]
            )
        )  # fmt: skip
        for label in candidates[: max(0, missing[name])]:
            rows[label] += 1
            for other in names_of[label]:
                missing[other] -= 1
    return rows
