"""A worker's batches: joined by row id, the same rows for any number of ranks, whatever is held in memory.

Shapes: N rows, K classes.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raydistill.cache.shards import write_logits
from raydistill.data import held_shards, loader
from raydistill.data.loader import Batch, Split
from raydistill.data.order import epoch_batches, steps_per_epoch
from raydistill.data.shards import ShardWriter
from raydistill.data.sources import Row
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.record.commit import Entry, Manifest
from raydistill.record.store import LocalStore

SHARD_ROWS = 16
ROWS = 107  # six whole shards and one of 11 rows
FIRST_ROW_ID = 1000  # the split is not the first of the data
CLASSES = 5
FINGERPRINT = "f" * 64


def logits_of(row_ids: np.ndarray) -> np.ndarray:
    """Teacher logits that name their row."""
    return (row_ids[:, None] + np.arange(CLASSES) / 8).astype(np.float32)


def write_cache(store: LocalStore, row_ids_of_shard: list[np.ndarray]) -> Manifest:
    entries = [
        write_logits(
            store, f"teacher/cache/train-{number:05d}.parquet", row_ids, logits_of(row_ids),
            codec="dense-float32", fingerprint=FINGERPRINT,
        )
        for number, row_ids in enumerate(row_ids_of_shard)
    ]  # fmt: skip
    return Manifest(FINGERPRINT, tuple(entries), {"codec": "dense-float32", "classes": CLASSES})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    return LocalStore(str(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def data(store: LocalStore, ticket_texts: list[str]) -> Manifest:
    writer = ShardWriter(store, "train", first_row_id=FIRST_ROW_ID, shard_rows=SHARD_ROWS, fingerprint=FINGERPRINT)
    for number, text in enumerate(ticket_texts[:ROWS]):
        writer.add(Row(text, "", 0, number), number % CLASSES)
    return Manifest(FINGERPRINT, tuple(writer.close()), {})


@pytest.fixture(scope="module")
def row_ids(data: Manifest) -> list[np.ndarray]:
    starts = np.cumsum([FIRST_ROW_ID, *(entry.rows for entry in data.files)])
    return [np.arange(a, b) for a, b in pairwise(starts)]


@pytest.fixture(scope="module")
def cache(store: LocalStore, row_ids: list[np.ndarray]) -> Manifest:
    return write_cache(store, row_ids)


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> Any:
    return load_tokenizer(tiny_encoder, "teacher.model")


@pytest.fixture
def split(store: LocalStore, data: Manifest, cache: Manifest, tokenizer: Any) -> Iterator[Split]:
    made = Split(store, "train", data, cache, tokenizer=tokenizer, max_length=20)
    yield made
    made.close()


def steps(split: Split, *, rank: int = 0, world: int = 1, accumulation: int = 1, **changes: int) -> list[list[Batch]]:
    """The micro-batches of every step."""
    place = {"seed": 0, "epoch": 0, "batch_size": 10, "first_step": 0, **changes}
    made = split.training_steps(**place, rank=rank, world=world, accumulation=accumulation)
    return [list(micro_batches()) for _, micro_batches in made]


def ids(batch: Batch) -> list[int]:
    """The row ids of a batch, read off the teacher's logits."""
    assert batch.teacher is not None
    return batch.teacher.logits_NK[:, 0].int().tolist()


def real_ids(batches: list[Batch]) -> list[int]:
    return [row for batch in batches if batch.rows for row in ids(batch)]


def test_a_batch_carries_text_label_and_logits_of_the_same_rows(split: Split, tokenizer: Any, ticket_texts: list[str]):
    seen: list[int] = []
    for (batch,) in steps(split):
        rows = [row - FIRST_ROW_ID for row in ids(batch)]
        seen += rows
        assert batch.rows == len(rows)
        assert batch.labels_N.tolist() == [row % CLASSES for row in rows]
        assert batch.labels_N.dtype == torch.int64
        assert batch.teacher is not None
        assert np.array_equal(batch.teacher.logits_NK, logits_of(np.array(rows) + FIRST_ROW_ID))
        texts = [ticket_texts[row] for row in rows]
        expected = tokenizer(texts, truncation=True, max_length=20, padding=True, return_tensors="pt")
        assert torch.equal(batch.inputs["input_ids"], expected["input_ids"])
        assert torch.equal(batch.inputs["attention_mask"], expected["attention_mask"])
    assert sorted(seen) == list(range(ROWS))


def test_batches_by_length_hold_the_same_rows_with_less_padding(
    store: LocalStore, data: Manifest, cache: Manifest, tokenizer: Any, ticket_texts: list[str]
):
    def tokens(batches: list[list[Batch]]) -> int:
        return sum(batch.inputs["input_ids"].numel() for (batch,) in batches)

    split = Split(store, "train", data, cache, tokenizer=tokenizer, max_length=64)
    found = steps(split, by_length=True)
    real = sum(int(batch.inputs["attention_mask"].sum()) for (batch,) in found)
    assert real <= tokens(found) < 0.9 * tokens(steps(split))
    assert sorted(row for (batch,) in found for row in ids(batch)) == list(range(FIRST_ROW_ID, FIRST_ROW_ID + ROWS))
    for (batch,) in found:
        rows = [row - FIRST_ROW_ID for row in ids(batch)]
        assert batch.labels_N.tolist() == [row % CLASSES for row in rows]
        texts = [ticket_texts[row] for row in rows]
        expected = tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
        assert torch.equal(batch.inputs["input_ids"], expected["input_ids"])
    split.close()


def test_global_row_counts_are_those_of_the_order(split: Split):
    made = split.training_steps(seed=0, epoch=0, batch_size=10, first_step=0, rank=0, world=1, accumulation=1)
    counts = [rows for rows, _ in made]
    assert counts == [10] * 10 + [7]
    assert len(counts) == steps_per_epoch(split.rows, 10)


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 3), (2, 2), (3, 4)])
def test_ranks_and_micro_batches_together_are_the_one_batch(split: Split, world: int, accumulation: int):
    whole = [ids(batch) for (batch,) in steps(split)]
    parts = [steps(split, rank=rank, world=world, accumulation=accumulation) for rank in range(world)]
    for step, rows in enumerate(whole):
        mine = [parts[rank][step] for rank in range(world)]
        assert all(len(batches) == accumulation for batches in mine)
        assert [row for batches in mine for row in real_ids(batches)] == rows
        assert sum(batch.rows for batches in mine for batch in batches) == len(rows)
        sizes = [batch.rows for batches in mine for batch in batches]
        assert max(sizes) - min(sizes) <= 1


def test_a_rank_without_rows_gets_a_batch_that_counts_nothing(split: Split):
    # 107 rows in batches of 35 leave 2 for the last step: fewer than the three ranks.
    last = [steps(split, rank=rank, world=3, batch_size=35)[-1][0] for rank in range(3)]
    assert [batch.rows for batch in last] == [1, 1, 0]
    assert len(last[2].labels_N) == 1


def test_going_on_from_a_step_gives_the_batches_that_are_left(split: Split):
    whole = [ids(batch) for (batch,) in steps(split)]
    assert [ids(batch) for (batch,) in steps(split, first_step=4)] == whole[4:]
    assert [ids(batch) for (batch,) in steps(split, epoch=1)] != whole


@pytest.mark.parametrize("held_bytes", [0, 4000])
def test_little_memory_changes_no_batch_and_reads_no_shard_twice(
    split: Split, monkeypatch: pytest.MonkeyPatch, held_bytes: int
):
    # With the shards of a window above the limit, each batch used to read all of its window's shards again.
    small_windows = partial(epoch_batches, window_rows=40)
    monkeypatch.setattr(loader, "epoch_batches", small_windows)
    expected = [ids(batch) for (batch,) in steps(split)]
    reads: Counter[str] = Counter()

    def counted(store: LocalStore, entry: Entry) -> Any:
        reads[entry.file] += 1
        return read_shard(store, entry)

    read_shard = loader.read_shard
    monkeypatch.setattr(loader, "read_shard", counted)
    monkeypatch.setattr(held_shards, "HELD_BYTES", held_bytes)
    split._held = held_shards.HeldShards(split._load)
    assert [ids(batch) for (batch,) in steps(split)] == expected
    assert set(reads.values()) == {1}
    assert len(reads) == 7


def test_shards_that_are_not_needed_again_are_let_go(split: Split, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(held_shards, "HELD_BYTES", 0)
    for number in range(7):
        split._held[number]
    assert split._held.numbers == [6]


def test_length_batches_take_each_row_once_in_order_of_length(split: Split):
    batches = list(split.length_batches(60))
    assert sorted(real_ids(batches)) == list(range(FIRST_ROW_ID, FIRST_ROW_ID + ROWS))
    for batch in batches:
        assert batch.rows == 1 or batch.inputs["input_ids"].numel() <= 60
    widths = [batch.inputs["input_ids"].shape[1] for batch in batches]
    first_shard = [width for batch, width in zip(batches, widths, strict=True) if ids(batch)[0] < FIRST_ROW_ID + 16]
    assert first_shard == sorted(first_shard)


def test_without_a_cache_there_are_no_targets(store: LocalStore, data: Manifest, tokenizer: Any):
    split = Split(store, "train", data, None, tokenizer=tokenizer, max_length=20)
    batches = [batch for micro_batches in steps(split) for batch in micro_batches]
    split.close()
    assert sum(batch.rows for batch in batches) == ROWS
    assert all(batch.teacher is None for batch in batches)


@pytest.fixture
def other_cache(store: LocalStore, cache: Manifest, row_ids: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The row ids of the cache's shards, to be changed and written; the right cache stands again afterwards."""
    yield [ids.copy() for ids in row_ids]
    write_cache(store, row_ids)


def test_a_cache_with_its_rows_in_another_order_is_refused(
    store: LocalStore, data: Manifest, tokenizer: Any, other_cache: list[np.ndarray]
):
    other_cache[2] = other_cache[2][::-1].copy()
    split = Split(store, "train", data, write_cache(store, other_cache), tokenizer=tokenizer, max_length=20)
    with pytest.raises(UserError, match=r"teacher/cache/train-00002\.parquet: holds other rows than its data shard"):
        steps(split)
    split.close()


def test_a_cache_shard_with_another_number_of_rows_is_refused(
    store: LocalStore, data: Manifest, tokenizer: Any, other_cache: list[np.ndarray]
):
    other_cache[0] = other_cache[0][:-1]
    with pytest.raises(UserError, match=r"train-00000\.parquet: expected a shard of 16 rows, found one of 15 rows"):
        Split(store, "train", data, write_cache(store, other_cache), tokenizer=tokenizer, max_length=20)


def test_a_missing_cache_shard_is_refused(
    store: LocalStore, data: Manifest, tokenizer: Any, other_cache: list[np.ndarray]
):
    with pytest.raises(UserError, match=r"train-00006\.parquet: expected a shard of 11 rows, found none"):
        Split(store, "train", data, write_cache(store, other_cache[:-1]), tokenizer=tokenizer, max_length=20)
