"""Words that a masked language model puts in the place of others, for augmented texts.

As TinyBERT's augmentation does (Jiao et al. 2020, arXiv:1909.10351, section 3.3 and algorithm 1): the model sees the
text with one word masked, and its most probable words for that place are the candidates. Where TinyBERT takes the
nearest GloVe vectors for a word of several pieces, here the word as a whole is masked by one token.

Shapes: B masked texts, T tokens of the longest, V tokens of the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydistill.data.tokens import load_tokenizer, pack_by_length, pad, tokenise
from raydistill.errors import UserError
from raydistill.models.configuration import positions
from raydistill.models.folders import refuse_adapter
from raydistill.models.loading import load_masked_model

LONGEST = 512  # tokens of a text that are read; a word behind them is left as it is
LOGITS_PER_BATCH = 1 << 25  # numbers, 128 MiB: how many texts go through the model at once follows from it
WORD = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)  # a word and the signs around it, which stay


class MaskedWords:
    """A masked language model as a source of words."""

    def __init__(self, setting: str, folder: Path, *, candidates: int) -> None:
        """Raises UserError for a folder without such a model, or without a mask token or words in its tokenizer."""
        refuse_adapter(setting, folder)
        self._tokenizer = load_tokenizer(folder, setting)
        if self._tokenizer.mask_token is None:
            raise UserError(
                f"{setting}: {folder}: its tokenizer has no mask token. Give a masked language model, such as BERT's"
            )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_masked_model(setting, folder).to(self._device)
        self._words = whole_words(self._tokenizer, self._model.config.vocab_size)
        if not self._words:
            raise UserError(f"{setting}: {folder}: its vocabulary has no whole words. Give another model")
        self._ids = torch.tensor(sorted(self._words), device=self._device)
        self._candidates = candidates
        self._longest = min(LONGEST, positions(folder) or LONGEST)

    def __call__(self, texts: Sequence[str], places: Sequence[Sequence[int]]) -> list[dict[int, list[str]]]:
        """For each text, by place among its words, the words that could stand there, in the vocabulary's order.

        A place that holds no letter or digit, or that stands behind what the model reads, is left out. The word itself
        is never among them. Which texts are given together decides which go through the model side by side, and so the
        last bits of its outputs: the same call gives the same words.
        """
        found: list[dict[int, list[str]]] = [{} for _ in texts]
        asked: list[tuple[int, int, str, int]] = []
        for row, wanted in enumerate(places):
            for place in sorted(wanted):
                if (masked := self._masked(texts[row].split(), place)) is not None:
                    asked.append((row, place, *masked))
        if not asked:
            return found
        tokens = tokenise(self._tokenizer, [text for _, _, text, _ in asked], self._longest)
        budget = max(1, LOGITS_PER_BATCH // self._model.config.vocab_size)
        for batch in pack_by_length(tokens.lengths_N, budget):
            numbers: list[int] = batch.tolist()
            best = self._best([tokens.row(n) for n in numbers], [asked[n][3] for n in numbers])
            for number, ids in zip(numbers, best, strict=True):
                row, place, _, _ = asked[number]
                if ids is not None:
                    found[row][place] = self._as_words(ids, texts[row].split()[place])
        return found

    def _masked(self, words: list[str], place: int) -> tuple[str, int] | None:
        """The text with the word at a place masked, and which of the text's mask tokens that is."""
        before, core, behind = _parts(words[place])
        if not core:
            return None
        mask = self._tokenizer.mask_token
        start = " ".join([*words[:place], before])
        return " ".join([*words[:place], before + mask + behind, *words[place + 1 :]]), start.count(mask)

    @torch.no_grad()
    def _best(self, rows: list[Any], numbers: list[int]) -> list[list[int] | None]:
        """For each masked text the ids of the likeliest words at its mask token of that number; None where it is not.

        One more than the candidates, because the word itself may be among them.
        """
        inputs_BT = {n: v.to(self._device) for n, v in pad(rows, self._tokenizer.pad_token_id).items()}
        logits_BTV = self._model(**inputs_BT).logits
        found: list[list[int] | None] = []
        for row, ids, number in zip(logits_BTV, rows, numbers, strict=True):
            masks = np.flatnonzero(ids == self._tokenizer.mask_token_id)
            if number >= len(masks):
                found.append(None)
                continue
            scores = row[int(masks[number])][self._ids]
            best = scores.topk(min(self._candidates + 1, len(scores))).indices
            found.append(self._ids[best].tolist())
        return found

    def _as_words(self, ids: list[int], word: str) -> list[str]:
        """The candidates with the signs around the word."""
        before, core, behind = _parts(word)
        others = [number for number in ids if self._words[number].casefold() != core.casefold()]
        return [before + self._words[number] + behind for number in sorted(others[: self._candidates])]


def _parts(word: str) -> tuple[str, str, str]:
    match = WORD.match(word)
    assert match is not None
    return match[1], match[2], match[3]


def whole_words(tokenizer: Any, size: int) -> dict[int, str]:
    """The tokens that are a word by themselves, by id: those that the word, with a space before it, is cut into."""
    count = min(size, len(tokenizer))
    special = set(tokenizer.all_special_ids)
    texts = {n: tokenizer.decode([n]).strip() for n in range(count) if n not in special}
    texts = {n: text for n, text in texts.items() if any(map(str.isalnum, text)) and len(text.split()) == 1}
    if not texts:
        return {}
    pieces = tokenizer([f" {text}" for text in texts.values()], add_special_tokens=False)["input_ids"]
    return {n: text for (n, text), ids in zip(texts.items(), pieces, strict=True) if ids == [n]}
