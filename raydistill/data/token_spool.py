"""Tokenised documents between two passes, on the local disk, so that no text is tokenised twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from raydistill.data.spool import Spool
from raydistill.data.token_rows import Tokenised, TokenPrompt, TokenRow

SCHEMA = pa.schema(
    [
        ("file", pa.int32()), ("number", pa.int64()), ("key", pa.uint64()), ("is_long", pa.bool_()),
        ("lengths", pa.list_(pa.int32())), ("tokens", pa.large_binary()), ("learnt", pa.large_binary()),
        ("prompt", pa.large_string()), ("messages", pa.large_string()), ("prompt_tokens", pa.large_binary()),
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
        self._spool.add((found.file, found.number, found.key, found.is_long, lengths, tokens, learnt, *prompt))

    def __iter__(self) -> Iterator[Tokenised]:
        for one in self._spool:
            rows: tuple[TokenRow, ...] = ()
            if one["lengths"]:
                borders = np.cumsum(one["lengths"])[:-1]
                tokens = np.split(np.frombuffer(one["tokens"], np.int32), borders)
                learnt = np.split(np.frombuffer(one["learnt"], np.bool_), borders)
                rows = tuple(TokenRow(t, w) for t, w in zip(tokens, learnt, strict=True))
            prompt = None
            if one["prompt"] is not None:
                prompt = TokenPrompt(one["prompt"], np.frombuffer(one["prompt_tokens"], np.int32), one["messages"])
            yield Tokenised(one["file"], one["number"], one["key"], rows, one["is_long"], prompt)
