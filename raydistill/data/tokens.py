"""Texts to token ids, kept ragged, and padded only when a batch is made.

Shapes: N rows, T tokens of the longest row in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydistill.errors import UserError, first_line

CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Tokens:
    """The token ids of N rows, end to end, with the rows' borders."""

    ids: npt.NDArray[np.int32]
    borders: npt.NDArray[np.int64]  # N + 1

    def __len__(self) -> int:
        return len(self.borders) - 1

    @property
    def lengths_N(self) -> npt.NDArray[np.int64]:
        return np.diff(self.borders)

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.borders.nbytes

    def row(self, index: int) -> npt.NDArray[np.int32]:
        return self.ids[self.borders[index] : self.borders[index + 1]]


def load_tokenizer(folder: Path, setting: str, *, pads: bool = True) -> Any:
    """The tokenizer in a model's folder. Raises UserError when it has none, or cannot pad where it must (`pads`)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
        raise UserError(
            f"{setting}: {folder}: has no tokenizer that loads ({first_line(error)}). Save it beside the weights"
        ) from None
    # Without vocabulary files transformers 5 makes a tokenizer that turns each word into [UNK], and says nothing. It
    # knows the special tokens and at most the sign for a space.
    if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:
        raise UserError(
            f"{setting}: {folder}: has no vocabulary for its tokenizer. Save the tokenizer beside the weights"
        )
    if pads and tokenizer.pad_token_id is None:
        raise UserError(
            f"{setting}: {folder}: the tokenizer has no padding token. Set pad_token in tokenizer_config.json"
        )
    return tokenizer


def ids_in(theirs: Any, ours: Any) -> npt.NDArray[np.int64] | None:
    """For every id of our tokenizer the id that the same token has in theirs, such as a trimmed student's teacher's.

    None when they are the same. Raises KeyError for a token that they do not have.
    """
    known = theirs.get_vocab()
    ids = np.array([known[token] for token in ours.convert_ids_to_tokens(list(range(len(ours))))], np.int64)
    return None if np.array_equal(ids, np.arange(len(ids))) else ids


def tokenise(tokenizer: Any, texts: Sequence[str], max_length: int) -> Tokens:
    """The token ids of every text with the model's special tokens, truncated to max_length."""
    pieces: list[list[int]] = []
    for start in range(0, len(texts), CHUNK_ROWS):
        chunk = list(texts[start : start + CHUNK_ROWS])
        encoded = tokenizer(
            chunk, truncation=True, max_length=max_length, return_attention_mask=False, return_token_type_ids=False
        )
        pieces += encoded["input_ids"]
    lengths = np.fromiter((len(p) for p in pieces), np.int64, len(pieces))
    borders = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    ids = np.empty(int(borders[-1]), np.int32)
    for piece, start, end in zip(pieces, borders[:-1], borders[1:], strict=True):
        ids[start:end] = piece
    return Tokens(ids, borders)


def pad(rows: Sequence[npt.NDArray[np.int32]], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids_NT and attention_mask_NT of the rows, padded on the right to the longest."""
    longest = max(len(row) for row in rows)
    ids_NT = np.full((len(rows), longest), pad_id, np.int64)
    mask_NT = np.zeros((len(rows), longest), np.int64)
    for index, row in enumerate(rows):
        ids_NT[index, : len(row)] = row
        mask_NT[index, : len(row)] = 1
    return {"input_ids": torch.from_numpy(ids_NT), "attention_mask": torch.from_numpy(mask_NT)}


def pack_by_length(lengths_N: npt.NDArray[np.int64], tokens_per_batch: int) -> list[npt.NDArray[np.int64]]:
    """Rows sorted by length and cut into batches of at most that many tokens, padding included; longest batch last.

    A row longer than the budget is a batch of its own. Ties keep the rows' order, so that the result is unique.
    """
    order = np.argsort(lengths_N, kind="stable")
    batches: list[npt.NDArray[np.int64]] = []
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths_N[order[end]] > tokens_per_batch:
            batches.append(order[start:end])
            start = end
    return batches
