"""Texts to token ids: the tokenizer's own, padded per batch, packed by length."""

import contextlib
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.data import tokens as tokens_module
from raydistill.data.tokens import Tokens, load_tokenizer, pack_by_length, pad, tokenise
from raydistill.errors import UserError

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80).map(lambda v: np.array(v, np.int64))


@pytest.fixture(scope="module")
def tokenizer(tiny_encoder: Path) -> Any:
    return load_tokenizer(tiny_encoder, "teacher.model")


def test_tokens_are_the_tokenizers_own(tokenizer: Any, ticket_texts: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokens_module, "CHUNK_ROWS", 7)
    found = tokenise(tokenizer, ticket_texts, 24)
    assert len(found) == len(ticket_texts)
    expected = [tokenizer(text, truncation=True, max_length=24)["input_ids"] for text in ticket_texts]
    assert [found.row(index).tolist() for index in range(len(found))] == expected
    assert found.lengths_N.tolist() == [len(ids) for ids in expected]
    assert max(found.lengths_N) == 24
    assert found.row(0)[0] == tokenizer.cls_token_id
    assert found.row(0)[-1] == tokenizer.sep_token_id


def test_texts_without_letters_have_the_special_tokens_alone(tokenizer: Any):
    assert tokenise(tokenizer, ["", " "], 24).lengths_N.tolist() == [2, 2]
    assert len(tokenise(tokenizer, [], 24)) == 0


def test_padded_batch_is_the_tokenizers_own(tokenizer: Any, ticket_texts: list[str]):
    texts = ticket_texts[:9]
    found = tokenise(tokenizer, texts, 24)
    batch = pad([found.row(index) for index in range(9)], tokenizer.pad_token_id)
    expected = tokenizer(texts, truncation=True, max_length=24, padding=True, return_tensors="pt")
    assert {name: value.tolist() for name, value in batch.items()} == {
        name: expected[name].tolist() for name in ("input_ids", "attention_mask")
    }
    assert batch["input_ids"].dtype == expected["input_ids"].dtype


def test_padding_uses_the_models_id_and_masks_it():
    batch = pad([np.array([5, 6], np.int32), np.array([7], np.int32)], 3)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


@given(LENGTHS, st.integers(1, 200))
def test_packing_takes_each_row_once_within_the_budget(lengths_N: np.ndarray, budget: int):
    batches = pack_by_length(lengths_N, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths_N)))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * lengths_N[rows].max() <= budget
    order = lengths_N[np.concatenate(batches)]
    assert (np.diff(order) >= 0).all()


@given(LENGTHS, st.integers(1, 200))
def test_packing_leaves_no_room_for_the_next_row(lengths_N: np.ndarray, budget: int):
    batches = pack_by_length(lengths_N, budget)
    for rows, following in pairwise(batches):
        assert (len(rows) + 1) * lengths_N[following[0]] > budget


def test_packing_is_unique_and_keeps_the_order_of_ties():
    batches = pack_by_length(np.array([3, 2, 3, 2, 3, 9]), 6)
    assert [rows.tolist() for rows in batches] == [[1, 3], [0, 2], [4], [5]]
    assert pack_by_length(np.empty(0, np.int64), 6) == []


def test_rows_of_tokens_are_views_between_borders():
    tokens = Tokens(np.array([1, 2, 3], np.int32), np.array([0, 1, 1, 3]))
    assert [tokens.row(index).tolist() for index in range(len(tokens))] == [[1], [], [2, 3]]
    assert tokens.nbytes == 3 * 4 + 4 * 8


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
def test_a_folder_without_a_vocabulary_is_refused(tiny_encoder: Path, tmp_path: Path, kept: tuple[str, ...]):
    # transformers 5 loads an empty tokenizer from such a folder, and every word of every row became [UNK].
    for name in ("config.json", "model.safetensors", *kept):
        shutil.copy(tiny_encoder / name, tmp_path)
    with pytest.raises(
        UserError, match=r"^teacher.model: .*: has no vocabulary for its tokenizer\. Save the tokenizer"
    ):
        load_tokenizer(tmp_path, "teacher.model")


def test_a_broken_tokenizer_is_refused(tiny_encoder: Path, tmp_path: Path):
    shutil.copytree(tiny_encoder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"^teacher.model: .*: has no tokenizer that loads \("):
        load_tokenizer(tmp_path, "teacher.model")


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path: Path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"student.model: .*has no padding token\. Set pad_token"):
        load_tokenizer(tmp_path, "student.model")


def test_code_that_comes_with_a_tokenizer_is_not_run(tiny_encoder: Path, tmp_path: Path):
    shutil.copytree(tiny_encoder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for name in ("tokenizer_config.json", "config.json"):
        facts = json.loads((tmp_path / name).read_text())
        facts |= {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
        (tmp_path / name).write_text(json.dumps(facts))
    with contextlib.suppress(UserError):
        load_tokenizer(tmp_path, "teacher.model")
    assert not (tmp_path / "ran").exists()
