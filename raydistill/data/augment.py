"""More texts from those of train, by rules: for the teacher to score and the student to learn from.

Masking, replacement and n-gram sampling as Tang et al. 2019 do (arXiv:1903.12136, section 3.2). Where they replace a
word by one of the same part of speech, which needs a tagger for each language, here a word comes from the texts of the
same label, as often as it stands there.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from raydistill.data.labels import NO_LABEL
from raydistill.data.shards import DataShard
from raydistill.data.sources import Row

LONGEST_NGRAM = 5


@dataclass(frozen=True)
class Rules:
    """How often a word is masked or replaced, and a text cut to some words in a row; probabilities from 0 to 1."""

    mask: float
    replace: float
    ngram: float
    mask_token: str | None
    seed: int


class Words:
    """The words of each label's texts, to be drawn as often as they stand there. Memory grows with different words."""

    def __init__(self, shards: Iterator[DataShard]) -> None:
        counts: dict[Hashable, Counter[str]] = defaultdict(Counter)
        for shard in shards:
            for row, text in enumerate(shard.texts):
                counts[key_of(shard, row)].update(text.split())
        self._words = {key: (list(found), list(accumulate(found.values()))) for key, found in counts.items()}

    def draw(self, key: Hashable, randomly: random.Random) -> str:
        """One word of a label's texts."""
        words, cumulative = self._words[key]
        return randomly.choices(words, cum_weights=cumulative)[0]


def key_of(shard: DataShard, row: int) -> Hashable:
    """What rows of one label, or of one set of labels, have in common."""
    return shard.labels_N[row].tobytes()


def augmented(text: str, rules: Rules, draw: Callable[[random.Random], str], *, row_id: int, copy: int) -> str:
    """One more text from this one; the same for the same seed, row, copy and words.

    Every word is masked, replaced by what `draw` gives, or kept, and then the whole is cut to 1 to 5 words in a row or
    left as it is. Words are what stands between white space.
    """
    randomly = random.Random(f"{rules.seed}:{row_id}:{copy}")
    words = text.split()
    for place, word in enumerate(words):
        chance = randomly.random()
        if chance < rules.mask:
            assert rules.mask_token is not None
            words[place] = rules.mask_token
        elif chance < rules.mask + rules.replace:
            words[place] = draw(randomly)
        else:
            words[place] = word
    if randomly.random() < rules.ngram:
        length = randomly.randint(1, LONGEST_NGRAM)
        start = randomly.randint(0, max(0, len(words) - length))
        words = words[start : start + length]
    return " ".join(words)


def augmented_rows(
    read: Callable[[], Iterator[DataShard]], rules: Rules, *, copies: int, keep_labels: bool
) -> Iterator[tuple[Row, int | bytes]]:
    """`copies` more rows for each row of the shards, in their order, with the label as shards hold it, or without one.

    As its place such a row names the copy, counted from 0, in the file's stead, and the row id that it was made from.
    """
    words = Words(read()) if rules.replace else None
    for shard in read():
        for row, text in enumerate(shard.texts):
            key, row_id = key_of(shard, row), int(shard.row_ids_N[row])
            label = shard.labels_N[row]
            held = label if keep_labels else np.full_like(label, NO_LABEL)
            number = held.tobytes() if shard.labels_N.ndim > 1 else int(held)

            def draw(randomly: random.Random, key: Hashable = key) -> str:
                assert words is not None
                return words.draw(key, randomly)

            for copy in range(copies):
                made = augmented(text, rules, draw, row_id=row_id, copy=copy)
                yield Row(made, None, copy, row_id), number
