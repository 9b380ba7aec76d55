"""What the teacher gives to the text that stands there, gathered while its logits are made for the cache.

Shapes: R rows, N positions of a shard, C of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from raydistill.cache.sampling import Head
from raydistill.cache.text_logprobs import Int64, TextLogprobs, text_shard, write_text_logprobs
from raydistill.data.token_shards import TokenShard
from raydistill.record.store import Store


class _Watched:
    """An output head whose logits are looked at as they are made."""

    def __init__(self, head: Head, watch: TextLogprobs) -> None:
        self.products, self._seen = head.products, watch.of(head.from_products)

    def from_products(self, products_NV: torch.Tensor) -> torch.Tensor:
        return self._seen(products_NV)


class ShardText:
    """The log-probabilities of a shard's own tokens; without `is_kept` nothing is gathered and nothing written."""

    def __init__(self, shard: TokenShard, *, is_kept: bool, device: torch.device) -> None:
        self._shard, self._is_kept, self._device = shard, is_kept, device
        counts_R = shard.learnt_R
        self._begins_R = np.cumsum(counts_R) - counts_R
        self._values_N: npt.NDArray[np.float32] = np.full(int(counts_R.sum()), np.nan, np.float32)
        self._watched: list[tuple[Int64, TextLogprobs]] = []

    def watched(self, rows: Int64, head: Head) -> Head:
        """The head, to make logits of the positions of these rows, row after row, some at a time."""
        if not self._is_kept:
            return head
        shard, labels, places = self._shard, list[npt.NDArray[np.int32]](), list[Int64]()
        for row in rows.tolist():
            at = shard.positions(row)
            labels.append(shard.row(row)[at + 1])
            places.append(int(self._begins_R[row]) + np.arange(len(at)))
        watch = TextLogprobs(torch.from_numpy(np.concatenate(labels).astype(np.int64)).to(self._device))
        self._watched.append((np.concatenate(places), watch))
        return _Watched(head, watch)

    def watch_hidden(self, rows: Int64, hidden_ND: torch.Tensor, head: Head, chunk: int) -> None:
        """As `watched`, where nobody else asks for logits."""
        if self._is_kept:
            watched = self.watched(rows, head)
            for hidden_CD in hidden_ND.split(chunk):
                watched.from_products(watched.products(hidden_CD))

    def commit(self, store: Store, folder: str, fingerprint: str) -> None:
        """Writes the shard that stands by the cache's. Raises ValueError for a number that is not finite."""
        if not self._is_kept:
            return
        for places, watch in self._watched:
            self._values_N[places] = watch.values_N
        shard = self._shard
        name = f"{folder}/{text_shard(shard.name)}"
        write_text_logprobs(store, name, shard.row_ids_R, shard.learnt_R, self._values_N, fingerprint)
