"""Texts made from those of train: by which rules, for whom, and the same again after a kill."""

import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from raydistill.data.augment import Rules, Words, augmented, augmented_rows
from raydistill.data.shards import DataShard
from raydistill.record.commit import read_manifest
from raydistill.record.store import LocalStore

pytestmark = pytest.mark.xdist_group("small_runs")
TRAIN, BATCH, COPIES = 55, 16, 2
TEXT = "one two three four five six seven eight nine ten"


def never(_: random.Random) -> str:
    raise AssertionError("no word is to be drawn")


def made(rules: Rules, count: int = 400, text: str = TEXT) -> list[list[str]]:
    return [augmented(text, rules, lambda _: "drawn", row_id=row, copy=0).split(" ") for row in range(count)]


# The rules.


def test_as_many_words_are_masked_and_replaced_as_asked():
    # 4000 words: 1200 are masked and 800 replaced on average, with standard deviations of 29 and 25.
    counts = Counter(word for words in made(Rules(0.3, 0.2, 0, "[MASK]", 0)) for word in words)
    assert abs(counts["[MASK]"] - 1200) < 5 * 29
    assert abs(counts["drawn"] - 800) < 5 * 25
    assert sum(counts.values()) == 4000


def test_other_words_stay_where_they_are():
    for words in made(Rules(0.3, 0.2, 0, "[MASK]", 0)):
        assert all(found in (kept, "[MASK]", "drawn") for found, kept in zip(words, TEXT.split(), strict=True))


def test_a_text_is_cut_to_some_words_in_a_row():
    found = made(Rules(0, 0, 0.5, None, 0))
    whole = sum(words == TEXT.split() for words in found)
    assert abs(whole - 200) < 5 * 10
    cut = [words for words in found if words != TEXT.split()]
    assert {len(words) for words in cut} == {1, 2, 3, 4, 5}
    assert all(" ".join(words) in TEXT for words in cut)
    assert {words[0] for words in cut} == set(TEXT.split())


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip),
    st.integers(0, 10**9), st.integers(0, 999), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 1),
)  # fmt: skip
def test_any_text_gives_a_text_and_the_same_again(
    text: str, row: int, copy: int, mask: float, replace: float, ngram: float
):
    rules = Rules(mask, replace, ngram, "[MASK]", 3)
    one, other = (augmented(text, rules, lambda _: "drawn", row_id=row, copy=copy) for _ in range(2))
    assert one == other
    assert one.strip()


def test_rows_copies_and_seeds_give_other_texts():
    rules = Rules(0.3, 0, 0, "[MASK]", 0)
    assert len({tuple(words) for words in made(rules, 50)}) > 40
    assert len({augmented(TEXT, rules, never, row_id=0, copy=copy) for copy in range(50)}) > 30
    assert len({augmented(TEXT, Rules(0.3, 0, 0, "[MASK]", s), never, row_id=0, copy=0) for s in range(50)}) > 30


SHARDS = [
    DataShard("train-00000.parquet", np.array([4, 5]), ["a a a b", "c c"], np.array([0, 1], np.int32)),
    DataShard("train-00001.parquet", np.array([6]), ["b b"], np.array([0], np.int32)),
]


def read() -> Iterator[DataShard]:
    return iter(SHARDS)


def test_words_come_from_texts_of_the_same_label_as_often_as_they_stand_there():
    words, randomly = Words(read()), random.Random(0)
    of_zero, of_one = (np.int32(label).tobytes() for label in (0, 1))
    assert {words.draw(of_one, randomly) for _ in range(50)} == {"c"}
    # 1000 draws of "a" (3 of 6) and "b" (3 of 6): 500 each, with a standard deviation of 16.
    counts = Counter(words.draw(of_zero, randomly) for _ in range(1000))
    assert set(counts) == {"a", "b"}
    assert abs(counts["a"] - 500) < 5 * 16


@pytest.mark.parametrize("keep_labels", [False, True])
def test_every_row_has_its_copies_in_order(keep_labels: bool):
    rows = list(augmented_rows(read, Rules(0, 1, 0, None, 0), copies=2, keep_labels=keep_labels))
    assert [(row.number, row.file) for row, _ in rows] == [(4, 0), (4, 1), (5, 0), (5, 1), (6, 0), (6, 1)]
    assert [label for _, label in rows] == ([0, 0, 1, 1, 0, 0] if keep_labels else [-100] * 6)
    assert {word for row, _ in rows[2:4] for word in row.text.split()} == {"c"}
    assert all(set(row.text.split()) <= {"a", "b"} for row, _ in [*rows[:2], *rows[4:]])


def test_sets_of_labels_keep_their_bytes():
    sets = DataShard("train-00000.parquet", np.array([0, 1]), ["a a", "b"], np.array([[1, 0], [1, 1]], np.int8))
    for keeps, expected in ((True, [b"\1\0", b"\1\1"]), (False, [np.full(2, -100, np.int8).tobytes()] * 2)):
        rows = list(augmented_rows(lambda: iter([sets]), Rules(0, 1, 0, None, 0), copies=1, keep_labels=keeps))
        assert [label for _, label in rows] == expected
        assert [row.text for row, _ in rows] == ["a a", "b"]


# A run.


@pytest.fixture(scope="module")
def changes() -> dict[str, Any]:
    return {"data.augment": {"copies": COPIES, "mask": 0.2}, "train.log_every": 1}


@pytest.fixture(scope="module")
def folder(runs: Any, changes: dict[str, Any]) -> Path:
    made = runs.start("prepare")
    for stage in ("prepare", "teach", "train", "evaluate"):
        answer = runs.run(made, stage, changes=changes)
        assert answer["error"] is None, answer["error"]
    return made


def manifest(folder: Path, part: str) -> Any:
    found = read_manifest(LocalStore(str(folder)), part)
    assert found is not None
    return found


def column(folder: Path, split: str, name: str) -> list[Any]:
    entries = manifest(folder, "data").shards(split)
    return [value for e in entries for value in pq.read_table(folder / "data" / e.file)[name].to_pylist()]


def test_the_texts_stand_in_shards_of_their_own_and_name_the_rows_they_came_from(folder: Path, runs: Any):
    assert manifest(folder, "data").facts["rows"]["augmented"] == COPIES * TRAIN
    assert column(folder, "augmented", "row_id") == list(range(80, 80 + COPIES * TRAIN))
    assert column(folder, "augmented", "source_row") == [row for row in range(TRAIN) for _ in range(COPIES)]
    assert set(column(folder, "augmented", "label")) == {-100}
    texts, origins = column(folder, "augmented", "text"), column(folder, "train", "text")
    assert any("[MASK]" in text for text in texts)
    known = {word for text in origins for word in text.split()} | {"[MASK]"}
    assert {word for text in texts for word in text.split()} <= known
    assert column(folder, "train", "text") == column(runs.whole, "train", "text")


def test_the_teacher_scores_them_and_the_student_alone_learns_them(folder: Path):
    cache = manifest(folder, "teacher/cache")
    assert cache.facts["forwards"] == cache.facts["rows"] == 60 + COPIES * TRAIN
    steps = 2 * math.ceil((1 + COPIES) * TRAIN / BATCH)
    assert manifest(folder, "student").facts["steps"] == manifest(folder, "control/model").facts["steps"] == steps
    report = json.loads((folder / "report/report.json").read_text())
    assert report["data_report"][0] == "55 train, 5 validation, 20 test, 110 augmented rows, 5 labels"


def test_prepare_and_train_go_on_after_a_kill_to_the_same_bytes(folder: Path, runs: Any, changes: dict[str, Any]):
    again = runs.start("prepare")
    operations = runs.run(runs.start("prepare"), "prepare", changes=changes)["operations"]
    number = operations.index("rename augmented-00002.json") + 1
    assert runs.run(again, "prepare", changes=changes, fault=f"{number}:kill") == {"exit": -9}
    assert runs.run(again, "prepare", "teach", changes=changes)["error"] is None
    assert manifest(again, "data").files == manifest(folder, "data").files
    assert runs.run(again, "train", changes=changes, fault="60:kill") == {"exit": -9}
    assert runs.run(again, "train", changes=changes)["error"] is None
    ours, whole = (load_file(f / "student/model.safetensors") for f in (again, folder))
    assert all(np.array_equal(ours[name], whole[name]) for name in whole)


def test_kept_labels_reach_the_cross_entropy(folder: Path, runs: Any, changes: dict[str, Any]):
    kept = runs.start("prepare")
    asked = {**changes, "data.augment": {**changes["data.augment"], "keep_labels": True}, "train.loss.alpha": 0.0}
    assert runs.run(kept, "prepare", "teach", "train", changes=asked)["error"] is None
    assert column(kept, "augmented", "label") == [
        label for label in column(kept, "train", "label") for _ in range(COPIES)
    ]
    assert column(kept, "augmented", "text") == column(folder, "augmented", "text")

    def first(run: Path) -> float:
        lines = (run / "train/metrics.jsonl").read_text().splitlines()
        return json.loads(lines[0])["cross_entropy"]

    # A mean over all rows of the batch: near log 5 where all have labels, a third of it where a third of them has.
    assert first(kept) == pytest.approx(math.log(5), rel=0.2)
    assert first(folder) < 0.7 * math.log(5)


def test_another_seed_or_mask_is_not_taken_for_the_same_data(folder: Path, runs: Any, changes: dict[str, Any]):
    for name, value in (("seed", 1), ("mask", 0.3)):
        asked = {"data.augment": {**changes["data.augment"], name: value}}
        answer = runs.run(folder, "prepare", changes=asked)
        assert f"data: data.augment.{name}: was made with" in answer["error"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"mask": 0, "replace": 0, "ngram": 0},
            "mask, replace and ngram are all 0, so that every copy would be its row",
        ),
        ({"mask": 0.6, "replace": 0.6}, "mask 0.6 and replace 0.6 are shares of the same words; lower one"),
        ({"copies": 0}, "data.augment.copies: found 0 (number)"),
    ],
)
def test_rules_that_make_no_sense_are_refused(runs: Any, asked: dict[str, Any], message: str):
    answer = runs.run(runs.start("prepare"), "prepare", changes={"data.augment": asked})
    assert message in answer["error"]


def test_texts_that_nobody_learns_from_are_refused(runs: Any):
    answer = runs.run(runs.start("prepare"), "prepare", changes={"data.augment": {}, "train.loss.alpha": 0.0})
    assert "data.augment asks for rows without labels, of which train.loss.alpha: 0 learns nothing" in answer["error"]


def test_a_mask_token_must_be_there_and_be_the_student_s_too(runs: Any, tmp_path: Path):
    from transformers import AutoTokenizer

    other = shutil.copytree(runs.input / "teacher", tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.mask_token = "[PAD]"
    tokenizer.save_pretrained(other)
    asked = {"data.augment": {}, "student": {"init": "pretrained", "model": str(other)}}
    made = runs.start("prepare")
    answer = runs.run(made, "prepare", "teach", changes=asked)
    assert "texts are masked with the teacher's '[MASK]', the student's mask token is '[PAD]'" in answer["error"]
    assert not list(made.glob("data/*"))
