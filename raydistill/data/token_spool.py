"""Tokenised documents between two passes, on the local disk, so that no text is tokenised twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raydistill.data.sources import Reason
from raydistill.data.spool import Spool
from raydistill.data.token_rows import RowText, Tokenised, TokenPrompt, TokenRow

SCHEMA = pa.schema(
    [
        ("file", pa.int32()), ("number", pa.int64()), ("key", pa.uint64()), ("is_long", pa.bool_()),
        ("lengths", pa.list_(pa.int32())), ("tokens", pa.large_binary()), ("learnt", pa.large_binary()),
        ("prompt", pa.large_string()), ("messages", pa.large_string()), ("prompt_tokens", pa.large_binary()),
        ("texts", pa.list_(pa.large_binary())), ("ends", pa.large_binary()), ("given", pa.list_(pa.int32())),
        ("flags", pa.list_(pa.int8())), ("unusable", pa.string()),
    ]
)  # fmt: skip


class TokenSpool:
    """Takes tokenised documents one by one; gives them back as they were, as often as wanted."""

    def __init__(self) -> None:
        self._spool = Spool(SCHEMA)
        self.close = self._spool.close

    def add(self, found: Tokenised) -> None:
        lengths = [len(row.tokens_L) for row in found.rows]
        tokens = b"".join(row.tokens_L.tobytes() for row in found.rows)
        learnt = b"".join(row.learnt_L.tobytes() for row in found.rows)
        asked = found.prompt
        prompt = (None, None, None) if asked is None else (asked.text, asked.messages, asked.tokens_L.tobytes())
        texts = [row.text for row in found.rows if row.text is not None]
        ends = b"".join(text.ends_L.tobytes() for text in texts)
        flags = [text.begins + 2 * text.has_end for text in texts]
        of_texts = ([text.data for text in texts], ends, [text.given for text in texts], flags)
        row = (found.file, found.number, found.key, found.is_long, lengths, tokens, learnt)
        self._spool.add((*row, *prompt, *of_texts, found.unusable))

    def __iter__(self) -> Iterator[Tokenised]:
        for one in self._spool:
            rows: tuple[TokenRow, ...] = ()
            if one["lengths"]:
                borders = np.cumsum(one["lengths"])[:-1]
                tokens = np.split(np.frombuffer(one["tokens"], np.int32), borders)
                learnt = np.split(np.frombuffer(one["learnt"], np.bool_), borders)
                rows = tuple(map(TokenRow, tokens, learnt, _texts(one, borders)))
            prompt = None
            if one["prompt"] is not None:
                prompt = TokenPrompt(one["prompt"], np.frombuffer(one["prompt_tokens"], np.int32), one["messages"])
            unusable: Reason = one["unusable"]
            yield Tokenised(one["file"], one["number"], one["key"], rows, one["is_long"], prompt, unusable)


def _texts(one: dict[str, Any], borders: npt.NDArray[np.integer]) -> list[RowText | None]:
    """What the rows of a document stand for, where that is kept."""
    if not one["texts"]:
        return [None] * (len(borders) + 1)
    ends = np.split(np.frombuffer(one["ends"], np.int32), borders)
    parts = zip(one["texts"], ends, one["given"], one["flags"], strict=True)
    return [RowText(data, at, given, bool(flags & 1), bool(flags & 2)) for data, at, given, flags in parts]
