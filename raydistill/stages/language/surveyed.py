"""What is known of a language model's sources after the pass over them: documents, their numbers, their splits."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from raydistill.data.sources import Source
from raydistill.data.token_rows import Tokenised
from raydistill.data.token_spool import TokenSpool

SPLITS = ("train", "validation", "test")
WRITTEN = "unlabelled"  # the split of what a model wrote: for the student alone
PLACES, NOWHERE = (*SPLITS, WRITTEN), -1
COUNTS = ("documents", "rows", "tokens", "learnt", "long")
Bools = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int8]


@dataclass
class Survey:
    """The pass over a source: every usable document and its numbers, and the dropped ones by reason.

    A prompt without a response of its own is a document without rows.
    """

    documents: TokenSpool = field(default_factory=TokenSpool)
    rows: array[int] = field(default_factory=lambda: array("l"))
    tokens: array[int] = field(default_factory=lambda: array("l"))
    learnt: array[int] = field(default_factory=lambda: array("l"))
    long: array[int] = field(default_factory=lambda: array("l"))
    asked: array[int] = field(default_factory=lambda: array("b"))
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, found: Tokenised) -> None:
        self.documents.add(found)
        self.rows.append(len(found.rows))
        self.tokens.append(sum(len(row.tokens_L) for row in found.rows))
        self.learnt.append(sum(row.learnt for row in found.rows))
        self.long.append(found.is_long)
        self.asked.append(found.prompt is not None)

    def drop(self, reason: str, where: str) -> None:
        self.dropped[reason] += 1
        self.first_dropped = self.first_dropped or f"{where}: {reason}"

    def counts(self, chosen: Bools) -> Counter[str]:
        """COUNTS of the chosen documents that have rows."""
        of = {name: int(np.array(getattr(self, name), np.int64)[chosen].sum()) for name in COUNTS[1:]}
        return Counter({"documents": int((self.has_rows & chosen).sum()), **of})

    @property
    def has_rows(self) -> Bools:
        return np.array(self.rows, np.int64) > 0

    @property
    def is_asked(self) -> Bools:
        return np.array(self.asked, np.int64) > 0


@dataclass(frozen=True)
class SurveyedTexts:
    """The sources after the pass over them, and once prompts are answered what was written, by the split it goes to.

    drawn: which documents of train are for validation. taken: which prompts of data.unlabelled are asked.
    """

    sources: dict[str, Source]
    found: dict[str, Survey]
    drawn: Bools
    taken: Bools
    vocabulary: int
    written: dict[str, Survey] = field(default_factory=dict[str, Survey])

    def own_splits_of(self, source: str) -> Codes:
        """Of every document of a source the number, in PLACES, of the split that its own rows go to, or NOWHERE."""
        survey = self.found[source]
        return np.where(survey.has_rows, self._splits_of(source), NOWHERE)

    def asked_splits_of(self, source: str) -> Codes:
        """Likewise of what is written to its prompt: the student's own split for train's, the same for others'."""
        survey, splits = self.found[source], self._splits_of(source)
        asks = survey.is_asked
        if source == "train":  # a document that is drawn for validation needs one response
            asks &= ~(self.drawn & survey.has_rows)
            splits = np.where(self.drawn, splits, PLACES.index(WRITTEN))
        if source == WRITTEN:
            asks &= self.taken
        return np.where(asks, splits, NOWHERE)

    def _splits_of(self, source: str) -> Codes:
        survey = self.found[source]
        if source == "train":
            return np.where(self.drawn, PLACES.index("validation"), PLACES.index("train")).astype(np.int8)
        return np.full(len(survey), PLACES.index(WRITTEN if source == "answered" else source), np.int8)

    @property
    def own_counts(self) -> dict[str, dict[str, int]]:
        """COUNTS of every split without what is written here."""
        total = {split: Counter[str]() for split in PLACES}
        for source, survey in self.found.items():
            codes = self.own_splits_of(source)
            for number in np.unique(codes[codes != NOWHERE]):
                total[PLACES[number]].update(survey.counts(codes == number))
        kept = {split: found for split, found in total.items() if split in SPLITS or found["documents"]}
        return {split: {name: found[name] for name in COUNTS} for split, found in kept.items()}

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """COUNTS of every split."""
        total = self.own_counts
        for split, survey in self.written.items():
            more, own = survey.counts(np.ones(len(survey), bool)), total.get(split, {})
            total[split] = {name: own.get(name, 0) + more[name] for name in COUNTS}
        return total

    @property
    def rows(self) -> dict[str, int]:
        return {split: counts["rows"] for split, counts in self.counts.items()}

    @property
    def asked(self) -> dict[str, int]:
        """How many prompts are asked, by the split that their answers go to."""
        codes = np.concatenate([self.asked_splits_of(source) for source in self.found])
        return {split: count for n, split in enumerate(PLACES) if (count := int((codes == n).sum()))}

    @property
    def labels(self) -> list[str]:
        """None: what a language model predicts are tokens."""
        return []
