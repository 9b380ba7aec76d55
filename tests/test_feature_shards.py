"""Shards of features: what was given comes back as the codec rounds it, in the data's order, from a mapped file.

Shapes: N rows, L tokens, W width, A attention heads.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill.cache import feature_shards
from raydistill.cache.feature_shards import FeatureColumn, FeatureShard, FeatureWriter, read_features
from raydistill.errors import UserError
from raydistill.record.commit import Entry, Manifest
from raydistill.record.store import LocalStore, ObjectStore, Store

FOLDER, FILE = "teacher/features", "train-00000.parquet"
FINGERPRINT = "f" * 64
COLUMNS = (
    FeatureColumn("hidden.1", "LW", 6), FeatureColumn("pooled.1", "W", 6), FeatureColumn("attention.0", "ALL", 2),
)  # fmt: skip
FIRST = 1000
Rows = dict[str, list[torch.Tensor]]


def made_rows(tokens: list[int], columns: tuple[FeatureColumn, ...] = COLUMNS, seed: int = 0) -> Rows:
    """Every feature of rows with so many tokens, a tensor a row, in float32."""
    random = torch.Generator().manual_seed(seed)
    return {c.name: [torch.randn(c.shape(n), generator=random) for n in tokens] for c in columns}


def write(
    store: Store, tokens: list[int], rows: Rows, *, codec: str = "float16", cuts: tuple[int, ...] = (),
    columns: tuple[FeatureColumn, ...] = COLUMNS, order: list[int] | None = None, fill: float = 7.0,
) -> Entry:  # fmt: skip
    """Writes the rows in batches that end at the cuts, padded with something that must not be stored."""
    order = list(range(len(tokens))) if order is None else order
    with FeatureWriter(store, f"{FOLDER}/{FILE}", columns, codec) as writer:
        for part in np.split(np.array(order), cuts):
            if not len(part):
                continue
            longest, batch = max(tokens[i] for i in part), {}
            for column in columns:
                padded = torch.full((len(part), *column.shape(longest)), fill)
                for target, i in zip(padded, part, strict=True):
                    target[tuple(slice(n) for n in column.shape(tokens[i]))] = rows[column.name][i]
                batch[column.name] = padded
            writer.add(FIRST + part, np.array([tokens[i] for i in part]), batch)
        return writer.commit(FINGERPRINT)


def read(
    store: Store, entry: Entry, tokens: list[int], *, codec: str = "float16", names: set[str] | None = None,
    columns: tuple[FeatureColumn, ...] = COLUMNS, ids: np.ndarray | None = None,
) -> FeatureShard:  # fmt: skip
    facts = {"codec": codec, "features": [{"name": c.name, "axes": c.axes, "size": c.size} for c in columns]}
    return read_features(
        store, FOLDER, entry, Manifest(FINGERPRINT, (entry,), facts), tokens_N=np.array(tokens),
        row_ids_N=FIRST + np.arange(len(tokens)) if ids is None else ids, names=names or {c.name for c in columns},
    )  # fmt: skip


def value(shard: FeatureShard, name: str, index: int) -> torch.Tensor:
    return torch.from_numpy(shard.row(name, index).copy()).view(shard.dtype)


def check(shard: FeatureShard, rows: Rows) -> None:
    for name, values in rows.items():
        for index, expected in enumerate(values):
            assert torch.equal(value(shard, name, index), expected.to(shard.dtype)), (name, index)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


@given(
    tokens=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 12), max_size=4).map(sorted).map(tuple),
    codec=st.sampled_from(["float16", "bfloat16"]),
    group_bytes=st.sampled_from([1, 100, 1000, 1 << 26]),
    seed=st.integers(0, 99),
)
def test_rows_come_back_rounded_and_in_the_datas_order(tmp_path_factory, tokens, cuts, codec, group_bytes, seed):
    store = LocalStore(str(tmp_path_factory.mktemp("shard")))
    rows, order = made_rows(tokens, seed=seed), np.random.default_rng(seed).permutation(len(tokens)).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feature_shards, "GROUP_BYTES", group_bytes)
        entry = write(store, tokens, rows, codec=codec, cuts=cuts, order=order)
    check(read(store, entry, tokens, codec=codec), rows)


def test_row_groups_stay_small_and_do_not_depend_on_the_batches(store: LocalStore, monkeypatch: pytest.MonkeyPatch):
    tokens = [3, 1, 8, 8, 2, 5, 5, 9, 4, 4, 6, 7]
    rows = made_rows(tokens)
    monkeypatch.setattr(feature_shards, "GROUP_BYTES", 600)
    whole = write(store, tokens, rows).sha256
    assert {write(store, tokens, rows, cuts=cuts).sha256 for cuts in [(1, 2, 3), (5,), tuple(range(1, 12))]} == {whole}
    metadata = pq.read_metadata(store.where(f"{FOLDER}/{FILE}"))
    sizes = [2 * (6 * n + 6 + 2 * n * n) for n in tokens]
    assert metadata.num_row_groups > 3
    first = 0
    for group in range(metadata.num_row_groups):
        count = metadata.row_group(group).num_rows
        assert sum(sizes[first : first + count]) <= 600 or count == 1
        first += count
    monkeypatch.setattr(feature_shards, "GROUP_BYTES", 1 << 26)
    monkeypatch.setattr(feature_shards, "GROUP_ROWS", 5)
    entry = write(store, tokens, rows)
    metadata = pq.read_metadata(store.where(f"{FOLDER}/{FILE}"))
    assert [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)] == [5, 5, 2]
    check(read(store, entry, tokens), rows)


def test_more_rows_than_arrow_puts_on_a_page(store: LocalStore):
    columns = (FeatureColumn("pooled.0", "W", 3),)
    tokens = [1] * 40_000
    rows = made_rows(tokens, columns)
    entry = write(store, tokens, rows, columns=columns)
    shard = read(store, entry, tokens, columns=columns)
    found = torch.stack([value(shard, "pooled.0", i) for i in range(len(tokens))])
    assert torch.equal(found, torch.stack(rows["pooled.0"]).half())


def test_padding_is_not_stored_and_any_parquet_reader_reads_a_shard(store: LocalStore):
    tokens = [4, 2, 9]
    rows = made_rows(tokens)
    entry = write(store, tokens, rows)
    table = pq.read_table(store.where(f"{FOLDER}/{FILE}"), page_checksum_verification=True)
    assert table["row_id"].to_pylist() == [FIRST, FIRST + 1, FIRST + 2]
    assert table["tokens"].to_pylist() == tokens
    assert all(not field.nullable for field in table.schema)
    for column in COLUMNS:
        kept = table[column.name].to_pylist()
        assert [struct.unpack(f"<{len(raw) // 2}e", raw) for raw in kept] == [
            tuple(row.half().flatten().tolist()) for row in rows[column.name]
        ]
    numbers = sum(6 * n + 6 + 2 * n * n for n in tokens)
    assert entry.size < 2 * numbers + 3000  # of which the footer is most


def test_a_row_is_read_where_it_lies_in_the_mapped_file(store: LocalStore):
    tokens = [4, 2, 9]
    shard = read(store, write(store, tokens, made_rows(tokens)), tokens, names={"hidden.1"})
    assert np.shares_memory(shard.row("hidden.1", 2), shard.file)
    assert not shard.file.flags.writeable
    assert set(shard.starts) == {"hidden.1"}
    assert shard.nbytes == 3 * 8 * 2  # counts of tokens, and where each row begins: nothing of the file
    assert str(store.where(f"{FOLDER}/{FILE}")) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("name", ["hidden.1", "pooled.1", "attention.0"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused_by_its_row(store: LocalStore, name: str, bad: float):
    tokens = [4, 2, 9]
    rows = made_rows(tokens)
    rows[name][1].flatten()[-1] = bad
    with pytest.raises(ValueError, match=rf"row 1001: {name} is not finite"):
        write(store, tokens, rows)
    assert store.list() == []


def test_padding_may_hold_anything(store: LocalStore):
    tokens = [4, 2, 9]
    rows = made_rows(tokens)
    check(read(store, write(store, tokens, rows, fill=float("nan")), tokens), rows)


def test_a_number_beyond_float16_is_refused_with_the_way_out(store: LocalStore):
    tokens = [4, 2]
    rows = made_rows(tokens)
    rows["hidden.1"][1][0, 0] = 1e5
    with pytest.raises(
        ValueError, match=r"row 1001: hidden\.1 has 1e\+05, which does not fit.*features_codec=bfloat16"
    ):
        write(store, tokens, rows)
    check(read(store, write(store, tokens, rows, codec="bfloat16"), tokens, codec="bfloat16"), rows)


def test_a_shard_of_other_rows_is_refused(store: LocalStore):
    entry = write(store, [4, 2], made_rows([4, 2]))
    for ids in ([FIRST, FIRST + 2], [FIRST], [FIRST, FIRST]):
        with pytest.raises(UserError, match=r"train-00000\.parquet: holds other rows than its data shard"):
            read(store, entry, [4, 2][: len(ids)], ids=np.array(ids))


def test_another_count_of_tokens_is_refused_by_its_row(store: LocalStore):
    entry = write(store, [4, 2], made_rows([4, 2]))
    with pytest.raises(UserError, match=r"has 2 tokens for row 1001, the student's tokenizer gives 3"):
        read(store, entry, [4, 3])


@pytest.mark.parametrize("place", [4, -30, 700])
def test_a_damaged_shard_is_refused(store: LocalStore, place: int):
    entry = write(store, [4, 2, 9], made_rows([4, 2, 9]))
    path = Path(store.where(f"{FOLDER}/{FILE}"))
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00000\.parquet: has sha256 .* expected"):
        read(store, entry, [4, 2, 9])
    path.unlink()
    with pytest.raises(UserError, match="the file is missing or empty"):
        read(store, entry, [4, 2, 9])


def test_a_file_that_is_laid_out_in_another_way_is_refused(store: LocalStore):
    # What another writer made of the same table: compressed, or with more than one page.
    tokens = [4, 2, 9]
    entry = write(store, tokens, made_rows(tokens))
    path = Path(store.where(f"{FOLDER}/{FILE}"))
    table = pq.read_table(path)
    for other in ({"compression": "zstd"}, {"compression": "NONE", "use_dictionary": True}):
        pq.write_table(table, path, **other)  # type: ignore[arg-type]
        changed = Entry(FILE, store.sha256(f"{FOLDER}/{FILE}"), path.stat().st_size, entry.rows)
        with pytest.raises(UserError, match="is not laid out as this version writes it"):
            read(store, changed, tokens)


def test_a_remote_shard_is_mapped_from_a_copy_that_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store: Any = ObjectStore("memory://features-test/run")
    tokens = [4, 2, 9]
    rows = made_rows(tokens)
    entry = write(store, tokens, rows)
    check(read(store, entry, tokens), rows)
    assert list(tmp_path.iterdir()) == []
    fsspec.filesystem("memory").rm("/features-test", recursive=True)
