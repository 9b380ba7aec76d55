"""Texts made from those of train: by which rules, for whom, and the same again after a kill."""

import json
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_vocabulary
import torch
from hypothesis import given
from hypothesis import strategies as st
from run_files import column, equal, manifest, student_weights

from raydistill.data.augment import Rules, Words, augmented, augmented_rows
from raydistill.data.shards import DataShard
from raydistill.masked_words import MaskedWords, whole_words

pytestmark = pytest.mark.xdist_group("small_runs")
TRAIN, BATCH, COPIES = 55, 16, 2
TEXT = "one two three four five six seven eight nine ten"


def never(_place: int, _: random.Random) -> str:
    raise AssertionError("no word is to be drawn")


def made(rules: Rules, count: int = 400, text: str = TEXT) -> list[list[str]]:
    return [augmented(text, rules, lambda _place, _: "drawn", row_id=row, copy=0).split(" ") for row in range(count)]


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
    one, other = (augmented(text, rules, lambda _place, _: "drawn", row_id=row, copy=copy) for _ in range(2))
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


@pytest.mark.parametrize("first", [0, 1, 3, 5, 6])
def test_rows_that_stand_are_left_out_and_the_others_are_what_they_were(first: int):
    rules = Rules(0.2, 0.5, 0.3, "[MASK]", 0)
    whole = list(augmented_rows(read, rules, copies=2, keep_labels=True))
    assert list(augmented_rows(read, rules, copies=2, keep_labels=True, first=first)) == whole[first:]


# Words that a masked language model gives.

WORDS = ["red", "green", "blue", "cat", "dog", "cow", "trap", "par", "##cel", ".", "the"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
COLOURS, ANIMALS = ["red", "green", "blue"], ["cat", "dog", "cow"]


def write_masked_model(folder: Path) -> None:
    """A BERT that gives colours for the first word of a text and animals for those behind, and only where it is masked.

    Its layer adds nothing, so that a place's state is its position's vector plus its token's: dimension 0 for the first
    word, 1 for the others, 2 for the mask token, without which "trap" would be likeliest. Pieces and signs are likelier
    than any word, and are none.
    """
    from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

    folder.mkdir()
    vocabulary = SPECIAL + WORDS
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=12, tie_word_embeddings=False,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]:
            norm.weight.fill_(1)
        embeddings, head = model.bert.embeddings, model.cls.predictions
        embeddings.position_embeddings.weight[1, 0] = 1
        embeddings.position_embeddings.weight[2:, 1] = 1
        embeddings.word_embeddings.weight[vocabulary.index("[MASK]"), 2] = 1
        head.transform.dense.weight.copy_(torch.eye(8))
        for word in WORDS:
            scores = head.decoder.weight[vocabulary.index(word)]
            scores[0] = 5 + COLOURS.index(word) if word in COLOURS else 0
            scores[1] = 5 + ANIMALS.index(word) if word in ANIMALS else 0
        head.decoder.bias[vocabulary.index("trap")] = 30
        head.decoder.weight[vocabulary.index("trap"), 2] = -40
        for word in ("par", "##cel", "."):
            head.decoder.bias[vocabulary.index(word)] = 1000 if word != "par" else 0
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked") / "model"
    write_masked_model(folder)
    return folder


def test_candidates_are_the_likeliest_words_where_the_mask_stands(language_model: Path):
    guess = MaskedWords("data.augment.model", language_model, candidates=2)
    texts = ["the the the", "the (Parcel?) -- the,", "blue cow", "the [MASK] the the", "the " * 12]
    places = [[0, 1, 2], [1, 2, 3], [0, 1], [0, 2], [0, 11]]
    # Of each place the two likeliest, in the vocabulary's order, without the word itself; the last two of each list
    # are the likeliest. Signs around a word stay; what has no letter, or lies behind position 12, is left out.
    assert guess(texts, places) == [
        {0: ["green", "blue"], 1: ["dog", "cow"], 2: ["dog", "cow"]},
        {1: ["(dog?)", "(cow?)"], 3: ["dog,", "cow,"]},
        {0: ["red", "green"], 1: ["cat", "dog"]},
        {0: ["green", "blue"], 2: ["dog", "cow"]},
        {0: ["green", "blue"]},
    ]
    assert guess(texts, [[] for _ in texts]) == [{} for _ in texts]


def test_a_text_reads_the_same_beside_others_and_in_small_batches(
    language_model: Path, monkeypatch: pytest.MonkeyPatch
):
    texts = ["the " * count for count in range(1, 9)]
    places = [list(range(len(text.split()))) for text in texts]
    whole = MaskedWords("data.augment.model", language_model, candidates=2)(texts, places)
    monkeypatch.setattr("raydistill.masked_words.LOGITS_PER_BATCH", 1)
    small = MaskedWords("data.augment.model", language_model, candidates=2)
    assert small(texts, places) == whole
    assert [small([text], [place])[0] for text, place in zip(texts, places, strict=True)] == whole


@pytest.mark.parametrize(("kind", "sign"), [("roberta", "\u0120"), ("xlm_roberta", "\u2581"), ("wordpiece", "")])
def test_words_are_the_tokens_that_begin_and_end_one(kind: str, sign: str):
    tokenizer = getattr(test_vocabulary, kind)()
    words = whole_words(tokenizer, len(tokenizer))
    tokens = {
        token: number for token, number in tokenizer.get_vocab().items() if number not in tokenizer.all_special_ids
    }
    # Such a token is a word of letters behind the sign of a space; WordPiece marks those that go on instead.
    expected = {n: t[len(sign) :] for t, n in tokens.items() if t.startswith(sign) and t[len(sign) :].isascii()}
    expected = {n: text for n, text in expected.items() if text.isalnum()}
    assert len(expected) > 100
    assert {n: text for n, text in words.items() if text.isalnum() and text.isascii()} == expected


def test_the_model_s_words_replace_as_many_as_asked_and_each_is_as_likely(language_model: Path):
    guess = MaskedWords("data.augment.model", language_model, candidates=2)
    shard = DataShard("train-00000.parquet", np.arange(150), ["the the"] * 150, np.zeros(150, np.int32))
    rules = Rules(0, 0.4, 0, None, 0)
    rows = list(augmented_rows(lambda: iter([shard]), rules, copies=4, keep_labels=False, guess=guess))
    # Of 600 first and 600 second words 240 are replaced on average, 120 by either word; deviations of 12 and 10.
    for place, words in ((0, {"green", "blue"}), (1, {"dog", "cow"})):
        counts = Counter(row.text.split()[place] for row, _ in rows)
        assert set(counts) == {"the"} | words
        assert abs(counts["the"] - 360) < 5 * 12
        assert all(abs(counts[word] - 120) < 5 * 10 for word in words)
    # What stands is left out, and in whichever block it ends the others are what they were.
    for first in (1, 256, 300, 599):
        again = augmented_rows(lambda: iter([shard]), rules, copies=4, keep_labels=False, guess=guess, first=first)
        assert list(again) == rows[first:]


def spoilt(language_model: Path, folder: Path, fault: str) -> Path:
    shutil.copytree(language_model, folder)
    if fault == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif fault == "code":
        facts = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**facts, "auto_map": {"AutoModel": "x.Y"}}))
    elif fault == "no mask":
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.mask_token = None
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"model": "CLASSIFIER"}, "has no head for masked words (no cls.predictions."),
        ({"model": "pickled"}, "has no safetensors weights. Save it with save_pretrained again"),
        ({"model": "code"}, "brings code of its own (auto_map in config.json), which is never run"),
        ({"model": "no mask"}, "its tokenizer has no mask token. Give a masked language model, such as BERT's"),
        ({"model": "whole", "replace": 0}, "model means nothing with replace: 0; raise it, or remove the model"),
        ({"candidates": 3}, "candidates means nothing without model; remove it"),
        ({"revision": "main"}, "revision means nothing without model; remove it"),
        ({"model": "whole", "candidates": 0}, "data.augment.candidates: found 0 (number)"),
        ({"model": "./nowhere"}, "no such folder. Give a model's folder or a hub id"),
    ],
)
def test_a_model_that_has_no_words_to_give_is_refused(
    runs: Any, language_model: Path, tmp_path: Path, asked: dict[str, Any], message: str
):
    if asked.get("model") == "CLASSIFIER":
        asked = {**asked, "model": str(runs.input / "teacher")}
    elif asked.get("model", ".")[0] != ".":
        asked = {**asked, "model": str(spoilt(language_model, tmp_path / "model", asked["model"]))}
    folder = runs.start("prepare")
    answer = runs.run(folder, "prepare", changes={"data.augment": asked})
    assert message in answer["error"]
    assert "data.augment" in answer["error"]
    assert len(answer["error"].splitlines()) == 1
    assert not (folder / "data").exists()


def test_a_run_with_a_model_s_words_goes_on_after_a_kill_to_the_same_texts(
    runs: Any, language_model: Path, tmp_path: Path
):
    asked = {"model": str(language_model), "copies": COPIES, "replace": 0.5, "mask": 0, "ngram": 0, "candidates": 2}
    folder, again = runs.start("prepare"), runs.start("prepare")
    whole = runs.run(folder, "prepare", changes={"data.augment": asked})
    assert whole["error"] is None
    for text, origin in zip(
        column(folder, "augmented", "text"),
        [text for text in column(folder, "train", "text") for _ in range(COPIES)],
        strict=True,
    ):
        assert len(text.split()) == len(origin.split())
        changed = [w for w, o in zip(text.split(), origin.split(), strict=True) if w != o]
        assert {re.sub(r"^\W+|\W+$", "", word) for word in changed} <= {*COLOURS, *ANIMALS}
    number = whole["operations"].index("rename augmented-00002.json") + 2
    assert runs.run(again, "prepare", changes={"data.augment": asked}, fault=f"{number}:kill") == {"exit": -9}
    kept = (again / "data/augmented-00001.parquet").stat().st_mtime_ns
    answer = runs.run(again, "prepare", changes={"data.augment": asked})
    assert answer["error"] is None
    assert "rename augmented-00001.parquet" not in answer["operations"]
    assert (again / "data/augmented-00001.parquet").stat().st_mtime_ns == kept
    assert manifest(again, "data").files == manifest(folder, "data").files
    # Another model, as many candidates: other data.
    other = tmp_path / "other"
    write_masked_model(other)
    facts = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**facts, "layer_norm_eps": 1e-6}))
    answer = runs.run(folder, "prepare", changes={"data.augment": {**asked, "model": str(other)}})
    assert "data: data.augment.model.config_sha256: was made with" in answer["error"]


# A run.


@pytest.fixture(scope="module")
def changes() -> dict[str, Any]:
    return {"data.augment": {"copies": COPIES, "mask": 0.2}, "train.log_every": 1}


@pytest.fixture(scope="module")
def folder(runs: Any, changes: dict[str, Any]) -> Path:
    return runs.finished("prepare", "teach", "train", "evaluate", changes=changes)


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
    assert equal(student_weights(again), student_weights(folder))


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
