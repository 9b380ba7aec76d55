"""Which texts stand in the data more than once: within train, and across the splits.

Texts are compared without case and with runs of white space as one space, by a 64-bit hash. The hashes are kept on
disk in buckets, so that memory stays flat for any number of rows; two different texts with one hash are expected once
in 10^8 rows or so, which a report may bear.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np

SPLITS = ("train", "validation", "test", "unlabelled")
UNLABELLED = SPLITS.index("unlabelled")
COUNTS = (
    "train_rows_repeating_another", "texts_with_two_labels", "validation_rows_also_in_train",
    "test_rows_also_in_train", "unlabelled_rows_repeating_another", "unlabelled_rows_also_in_validation",
    "unlabelled_rows_also_in_test",
)  # fmt: skip
BUCKETS = 64
BUFFER_ROWS = 1 << 16
ROW = np.dtype([("text", "<u8"), ("split", "u1"), ("label", "<i4")])


def text_key(text: str) -> int:
    """A 64-bit hash that texts have in common when they differ in case and white space at most."""
    hashed = hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=8).digest()
    return int.from_bytes(hashed, "little")


class TextIndex:
    """Takes every row once, then tells what stands twice. A context manager: its files end with it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="raydistill-texts-")
        self._buffer = np.empty(BUFFER_ROWS, ROW)
        self._used = 0

    def __enter__(self) -> TextIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def add(self, text: str, split: str, label: int) -> None:
        self.add_key(text_key(text), split, label)

    def add_key(self, key: int, split: str, label: int) -> None:
        self._buffer[self._used] = (key, SPLITS.index(split), label)
        self._used += 1
        if self._used == BUFFER_ROWS:
            self._spill()

    def _spill(self) -> None:
        rows = self._buffer[: self._used]
        bucket = rows["text"] >> np.uint64(58)
        for number in np.unique(bucket):
            with open(Path(self._folder.name) / str(number), "ab") as file:
                file.write(rows[bucket == number].tobytes())
        self._used = 0

    def report(self) -> dict[str, int]:
        """Counts of repeated rows.

        A row without a label repeats another when its text stands in train, or before it among those without a label.
        """
        self._spill()
        counts: dict[str, int] = dict.fromkeys(COUNTS, 0)
        for path in sorted(Path(self._folder.name).iterdir()):
            _count_bucket(np.fromfile(path, ROW), counts)
        return counts


def _count_bucket(rows: np.ndarray, counts: dict[str, int]) -> None:
    assert BUCKETS == 1 << 6
    rows = rows[np.argsort(rows["text"], kind="stable")]
    starts = np.flatnonzero(np.r_[True, rows["text"][1:] != rows["text"][:-1]])
    group = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(rows)]))
    found = {
        split: np.bincount(group[rows["split"] == number], minlength=len(starts)) for number, split in enumerate(SPLITS)
    }
    in_train, unlabelled = found["train"], found["unlabelled"]
    # A row without a label says nothing against another's label.
    bounds, has_label = np.iinfo(np.int32), rows["split"] != UNLABELLED
    lowest = np.minimum.reduceat(np.where(has_label, rows["label"], bounds.max), starts)
    highest = np.maximum.reduceat(np.where(has_label, rows["label"], bounds.min), starts)
    counts["train_rows_repeating_another"] += int(np.maximum(in_train - 1, 0).sum())
    counts["texts_with_two_labels"] += int((lowest < highest).sum())
    counts["unlabelled_rows_repeating_another"] += int(np.maximum(unlabelled - (in_train == 0), 0).sum())
    for name in ("validation", "test"):
        counts[f"{name}_rows_also_in_train"] += int(found[name][in_train > 0].sum())
        counts[f"unlabelled_rows_also_in_{name}"] += int(unlabelled[found[name] > 0].sum())
