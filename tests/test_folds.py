"""Which fold a row is in, and what a teacher sees that leaves one out.

Shapes: N rows.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.data.duplicates import text_key
from raydistill.data.folds import FoldRows, assign_folds, write_folds
from raydistill.data.loader import Split
from raydistill.data.order import epoch_batches
from raydistill.data.shards import ShardWriter, read_shard
from raydistill.data.sources import Row
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.record.commit import Manifest, commit_manifest
from raydistill.record.store import LocalStore

FOLDS = 3
ROWS, SHARD_ROWS = 50, 8


@given(
    st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 30)), min_size=1, max_size=80),
    st.integers(2, 7),
    st.integers(0, 2**32 - 1),
)
def test_texts_stay_together_and_folds_are_even(rows: list[tuple[int, int]], folds: int, seed: int):
    strata_N = np.array([stratum for stratum, _ in rows])
    texts_N = np.array([text for _, text in rows], np.uint64)
    texts = len(set(texts_N.tolist()))
    if texts < folds:
        with pytest.raises(ValueError, match=f"{texts} different texts cannot fill {folds} folds"):
            assign_folds(strata_N, texts_N, folds=folds, seed=seed)
        return
    found = assign_folds(strata_N, texts_N, folds=folds, seed=seed)
    assert np.array_equal(found, assign_folds(strata_N, texts_N, folds=folds, seed=seed))
    fold_of, stratum_of = {}, {}
    for stratum, text, fold in zip(strata_N.tolist(), texts_N.tolist(), found.tolist(), strict=True):
        assert fold_of.setdefault(text, fold) == fold
        stratum_of.setdefault(text, stratum)
    # Texts, in all and within a stratum, differ by one at most from fold to fold.
    for chosen in (None, *set(stratum_of.values())):
        counts = Counter(fold for text, fold in fold_of.items() if chosen in (None, stratum_of[text]))
        assert set(counts) <= set(range(folds))
        sizes = [counts[fold] for fold in range(folds)]
        assert max(sizes) - min(sizes) <= 1


def test_another_seed_gives_other_folds_and_another_key_of_the_texts_the_same():
    strata_N, texts_N = np.arange(60) % 4, np.arange(60).astype(np.uint64)
    first = assign_folds(strata_N, texts_N, folds=5, seed=0)
    assert not np.array_equal(first, assign_folds(strata_N, texts_N, folds=5, seed=1))
    assert np.array_equal(first, assign_folds(strata_N, texts_N * np.uint64(7919) % np.uint64(61), folds=5, seed=0))


def test_texts_that_differ_in_case_and_space_are_the_same():
    assert text_key("My  card\twas Charged ") == text_key("my card was charged")
    assert text_key("my card was charged") != text_key("my card was not charged")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, ticket_texts: list[str]) -> tuple[LocalStore, Manifest, np.ndarray]:
    """A store with data and folds, the data's manifest, and every row's fold: the whole third shard is in fold 0."""
    store = LocalStore(str(tmp_path_factory.mktemp("run")))
    writer = ShardWriter(store, "train", first_row_id=100, shard_rows=SHARD_ROWS, fingerprint="d")
    for number, text in enumerate(ticket_texts[:ROWS]):
        writer.add(Row(text, "", 0, number), number % 5)
    data = Manifest("d", tuple(writer.close()), {})
    folds_N = np.random.default_rng(0).integers(0, FOLDS, ROWS).astype(np.int8)
    folds_N[2 * SHARD_ROWS : 3 * SHARD_ROWS] = 0
    entries, counts, start = [], {}, 0
    for entry in data.files:
        part_N = folds_N[start : start + entry.rows]
        ids_N = np.arange(100 + start, 100 + start + entry.rows)
        entries.append(write_folds(store, entry.file, ids_N, part_N, fingerprint="f"))
        counts[entry.file] = np.bincount(part_N, minlength=FOLDS).tolist()
        start += entry.rows
    commit_manifest(store, "teacher/folds", "f", entries, {"folds": FOLDS, "rows": counts})
    return store, data, folds_N


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> Any:
    return load_tokenizer(tiny_encoder, "teacher.model")


def split_of(place: tuple[LocalStore, Manifest, np.ndarray], tokenizer: Any, rows: FoldRows | None) -> Split:
    return Split(place[0], "train", place[1], None, tokenizer=tokenizer, max_length=40, rows=rows)


def seen(split: Split, **changes: int) -> list[list[list[int]]]:
    """The token ids of every row of every step, padding removed."""
    place = {"seed": 3, "epoch": 1, "batch_size": 7, "first_step": 0, "rank": 0, "world": 1, "accumulation": 1}
    found = []
    for _, micro_batches in split.training_steps(**{**place, **changes}):
        batches = [batch for batch in micro_batches() if batch.rows]
        rows = [(b.inputs["input_ids"], b.inputs["attention_mask"]) for b in batches]
        found.append([i[m.bool()].tolist() for ids, mask in rows for i, m in zip(ids, mask, strict=True)])
    return found


@pytest.mark.parametrize("fold", range(FOLDS))
def test_a_split_without_a_fold_has_exactly_the_other_rows(place, tokenizer: Any, ticket_texts: list[str], fold: int):
    store, _, folds_N = place
    tokens = tokenizer(ticket_texts[:ROWS], truncation=True, max_length=40)["input_ids"]
    for inside in (False, True):
        split = split_of(place, tokenizer, FoldRows(store.root, fold, inside=inside))
        expected = [row for row, of in zip(tokens, folds_N, strict=True) if (of == fold) == inside]
        assert split.rows == len(expected)
        assert sorted(row for step in seen(split) for row in step) == sorted(expected)
        batches = [(b.inputs["input_ids"], b.inputs["attention_mask"]) for b in split.length_batches(200)]
        in_order = [i[m.bool()].tolist() for ids, mask in batches for i, m in zip(ids, mask, strict=True)]
        assert sorted(in_order) == sorted(expected)
        split.close()


def test_its_order_is_that_of_data_that_never_had_the_fold(place, tokenizer: Any, ticket_texts: list[str]):
    store, data, folds_N = place
    split = split_of(place, tokenizer, FoldRows(store.root, 1, inside=False))
    of_shard = [np.arange(8 * n, 8 * n + entry.rows) for n, entry in enumerate(data.files)]
    left = [rows[folds_N[rows] != 1] for rows in of_shard]
    order = epoch_batches([len(rows) for rows in left], seed=3, epoch=1, batch_size=7)
    tokens = tokenizer(ticket_texts[:ROWS], truncation=True, max_length=40)["input_ids"]
    whole = seen(split)
    assert whole == [[tokens[left[shard][row]] for shard, row in places] for places, _ in order]
    assert seen(split, first_step=3) == whole[3:]
    by_rank = [seen(split, rank=rank, world=2) for rank in (0, 1)]
    assert [one + other for one, other in zip(*by_rank, strict=True)] == whole
    assert seen(split, epoch=2) != whole
    split.close()


def test_folds_of_other_rows_are_refused(place):
    store, data, _ = place
    shard = read_shard(store, data.files[0])
    moved = type(shard)(shard.name, shard.row_ids_N + 1, shard.texts, shard.labels_N)
    with pytest.raises(UserError, match=r"teacher/folds/train-00000.parquet: holds other rows than its data shard"):
        FoldRows(store.root, 0, inside=True).open().chosen(moved.name, moved.row_ids_N)


def test_folds_that_are_not_there_name_their_stage(tmp_path: Path):
    with pytest.raises(UserError, match=r"teacher/folds: is not complete. Run `raydistill teach`"):
        FoldRows(str(tmp_path), 0, inside=True).open()
