"""More texts from those of train: for the teacher to score and the student to learn from.

Masking, replacement and n-gram sampling as Tang et al. 2019 do (arXiv:1903.12136, section 3.2). Where they replace a
word by one of the same part of speech, which needs a tagger for each language, here a word comes from the texts of the
same label, as often as it stands there, or is what a masked language model would put there (`masked_words.py`).
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np

from raydistill.data.labels import NO_LABEL
from raydistill.data.shards import DataShard
from raydistill.data.sources import Row

LONGEST_NGRAM = 5
BLOCK_ROWS = 16  # of a shard, whose words a model is asked for at once: a signal waits no longer
# A word for a place of a text.
Draw = Callable[[int, random.Random], str]
# For each text and the places asked for in it, the words that could stand at each place.
Guess = Callable[[Sequence[str], Sequence[Sequence[int]]], list[dict[int, list[str]]]]


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


def augmented(text: str, rules: Rules, draw: Draw, *, row_id: int, copy: int) -> str:
    """One more text from this one; the same for the same seed, row, copy and words.

    Every word is masked, replaced by what `draw` gives for its place, or kept, and then the whole is cut to 1 to 5
    words in a row or left as it is. Words are what stands between white space. `draw` takes one random number.
    """
    randomly = random.Random(f"{rules.seed}:{row_id}:{copy}")
    words = text.split()
    for place, word in enumerate(words):
        chance = randomly.random()
        if chance < rules.mask:
            assert rules.mask_token is not None
            words[place] = rules.mask_token
        elif chance < rules.mask + rules.replace:
            words[place] = draw(place, randomly)
        else:
            words[place] = word
    if randomly.random() < rules.ngram:
        length = randomly.randint(1, LONGEST_NGRAM)
        start = randomly.randint(0, max(0, len(words) - length))
        words = words[start : start + length]
    return " ".join(words)


def replaced_places(text: str, rules: Rules, *, row_id: int, copies: int) -> list[int]:
    """The places of a text's words that any of its copies replaces, rising."""
    places = set[int]()

    def note(place: int, randomly: random.Random) -> str:
        places.add(place)
        return str(randomly.random())

    for copy in range(copies):
        augmented(text, rules, note, row_id=row_id, copy=copy)
    return sorted(places)


def augmented_rows(
    read: Callable[[], Iterator[DataShard]],
    rules: Rules,
    *,
    copies: int,
    keep_labels: bool,
    guess: Guess | None = None,
    first: int = 0,
) -> Iterator[tuple[Row, int | bytes]]:
    """`copies` more rows for each row of the shards, in their order, with the label as shards hold it, or without one.

    As its place such a row names the copy, counted from 0, in the file's stead, and the row id that it was made from.
    Words come from `guess`, or from texts of the same label. The first rows, that many, are left out, because they
    stand already; the others are what they would be with them.
    """
    words = Words(read()) if rules.replace and guess is None else None
    made = 0
    for shard in read():
        for start in range(0, len(shard.texts), BLOCK_ROWS):
            block = range(start, min(start + BLOCK_ROWS, len(shard.texts)))
            made += len(block) * copies
            if made <= first:
                continue
            rows = _rows_of(shard, block, rules, copies, keep_labels, _draws(shard, block, rules, copies, words, guess))
            yield from rows[max(0, first - made + len(rows)) :]


def _draws(
    shard: DataShard, block: range, rules: Rules, copies: int, words: Words | None, guess: Guess | None
) -> Iterator[Draw]:
    """For every row of a block, where its words come from."""
    if guess is None:
        for row in block:
            yield partial(_of_label, words, key_of(shard, row))
        return
    texts = [shard.texts[row] for row in block]
    places = [replaced_places(shard.texts[r], rules, row_id=int(shard.row_ids_N[r]), copies=copies) for r in block]
    for text, found in zip(texts, guess(texts, places), strict=True):
        yield partial(_of_candidates, text.split(), found)


def _of_label(words: Words | None, key: Hashable, _place: int, randomly: random.Random) -> str:
    assert words is not None
    return words.draw(key, randomly)


def _of_candidates(words: list[str], found: dict[int, list[str]], place: int, randomly: random.Random) -> str:
    """One of the words that could stand there, each as likely as another; the word itself where there are none."""
    candidates = found.get(place) or [words[place]]
    return candidates[int(randomly.random() * len(candidates))]


def _rows_of(
    shard: DataShard, block: range, rules: Rules, copies: int, keep_labels: bool, draws: Iterator[Draw]
) -> list[tuple[Row, int | bytes]]:
    """The copies of a block's rows."""
    found: list[tuple[Row, int | bytes]] = []
    for row, draw in zip(block, draws, strict=True):
        row_id, label = int(shard.row_ids_N[row]), shard.labels_N[row]
        held = label if keep_labels else np.full_like(label, NO_LABEL)
        number = held.tobytes() if shard.labels_N.ndim > 1 else int(held)
        for copy in range(copies):
            text = augmented(shard.texts[row], rules, draw, row_id=row_id, copy=copy)
            found.append((Row(text, None, copy, row_id), number))
    return found
