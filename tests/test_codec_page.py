"""The page about codecs: what it says of the files is true."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "codecs.md"


def test_the_reader_of_the_page_reads_what_training_reads(language_runs):
    from raydistill.cache.next_tokens import NextTokenCache
    from raydistill.data.token_shards import read_token_shard
    from raydistill.record.commit import read_manifest
    from raydistill.record.store import LocalStore

    code, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    store = LocalStore(str(language_runs.whole))
    data, cache = read_manifest(store, "data"), read_manifest(store, "teacher/cache")
    assert data is not None
    assert cache is not None
    entry = cache.shards("train")[0]
    folder = language_runs.whole
    read = list(names["read_shard"](folder / "teacher/cache" / entry.file, folder / "data/alphabet.parquet"))
    rows = read_token_shard(store, data.shards("train")[0])
    shard = NextTokenCache.open(store, "teacher/cache", cache, data).shard(
        entry, row_ids_R=rows.row_ids_R, positions_R=rows.learnt_R
    )
    assert [row_id for row_id, _ in read] == rows.row_ids_R.tolist()
    for number, (_, positions) in enumerate(read):
        targets = shard.targets(rows.row_ids_R[number : number + 1] * 0 + number)
        assert len(positions) == len(targets.ids_NK)
        for found, ids, weights in zip(positions, targets.ids_NK.tolist(), targets.weights_NK.tolist(), strict=True):
            theirs = {token: weight for token, weight in zip(ids, weights, strict=True) if weight > 0}
            assert dict(found) == pytest.approx(theirs)
            assert sum(theirs.values()) == pytest.approx(1)
