"""Documents of a language model: which rows of tokens they become, what is learnt of them, what is dropped."""

from pathlib import Path

import numpy as np
import pytest
from language_runs import tokenizer, write_jsonl

from raydistill.data.documents import Document, Rules, Tokenised, read_documents, tokenise_documents
from raydistill.data.sources import Dropped, Fields, find_source
from raydistill.data.token_shards import TokenShardWriter, read_token_shard
from raydistill.errors import UserError
from raydistill.record.store import LocalStore

TEXT = Fields((("data.text", "text"),), 1, ",", 1000)
PAIRS = Fields((("data.prompt", "question"), ("data.response", "answer")), 2, ",", 1000)


@pytest.fixture(scope="module")
def made():
    return tokenizer()


def documents(path: Path, fields: Fields) -> list[Document | Dropped]:
    return list(read_documents(find_source("data.train", str(path)), fields))


@pytest.mark.parametrize("length", [4, 7, 50])
def test_every_token_of_a_text_but_its_first_is_learnt_once(made, length: int):
    text = "Tom goes to the market. There he buys two apples: Tom has more now."
    whole = [made.bos_token_id, *made(text, add_special_tokens=False)["input_ids"], made.eos_token_id]
    (found,) = Rules(made, length, splits=True).tokenised([Document(None, text, 0, 1)])
    learnt = np.concatenate([row.tokens_L[row.learnt_L] for row in found.rows])
    assert learnt.tolist() == whole[1:]
    assert all(len(row.tokens_L) <= length and not row.learnt_L[0] for row in found.rows)
    # Each row begins with the token that ended the one before, so that the first learnt one has something before it.
    for row, following in zip(found.rows, found.rows[1:], strict=False):
        assert row.tokens_L[-1] == following.tokens_L[0]
    assert found.is_long == (len(whole) > length)


def test_a_cut_text_is_one_row(made):
    text = "Tom goes to the market. " * 9
    (found,) = Rules(made, 10, splits=False).tokenised([Document(None, text, 0, 1)])
    (row,) = found.rows
    assert row.tokens_L.tolist() == [made.bos_token_id, *made(text, add_special_tokens=False)["input_ids"]][:10]
    assert found.is_long


def test_of_a_prompt_with_its_response_the_response_and_the_end_are_learnt(made):
    (found,) = Rules(made, 50, splits=True).tokenised([Document("Where is Tom?", " At the mill.", 0, 1)])
    (row,) = found.rows
    prompt, answer = (made(text, add_special_tokens=False)["input_ids"] for text in ("Where is Tom?", " At the mill."))
    assert row.tokens_L.tolist() == [made.bos_token_id, *prompt, *answer, made.eos_token_id]
    assert row.tokens_L[row.learnt_L].tolist() == [*answer, made.eos_token_id]


def test_a_prompt_that_fills_the_row_leaves_nothing_to_learn_and_is_counted(made, tmp_path: Path):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [
            {"question": "Where is Tom? " * 5, "answer": "There."},
            {"question": "Tom?", "answer": "At the mill. " * 9},
            {"question": "Tom?", "answer": ""},
            {"question": None, "answer": "There."},
            {"question": 3, "answer": "There."},
            {"question": "x" * 2000, "answer": "There."},
        ],
    )
    found = list(tokenise_documents(documents(path, PAIRS), Rules(made, 12, splits=True)))
    reasons = [one.reason if isinstance(one, Dropped) else one.is_long for one in found]
    assert reasons == [
        "no token to learn from", True, "empty text", "null text", "text is not text", "over max_row_bytes",
    ]  # fmt: skip
    assert isinstance(found[1], Tokenised)
    assert len(found[1].rows[0].tokens_L) == 12


def test_a_tokenizer_without_begin_and_end_adds_none(made):
    plain = tokenizer()
    plain.bos_token = plain.eos_token = None
    (found,) = Rules(plain, 50, splits=True).tokenised([Document(None, "Tom is here.", 0, 1)])
    ids = plain("Tom is here.", add_special_tokens=False)["input_ids"]
    assert found.rows[0].tokens_L.tolist() == ids
    assert found.rows[0].learnt_L.tolist() == [False] + [True] * (len(ids) - 1)


def test_a_missing_column_is_named_with_the_settings_that_ask_for_it(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "a", "reply": "b"}])
    with pytest.raises(UserError, match=r"no column 'answer', it has 'question', 'reply'\. Set data.prompt, data.resp"):
        documents(path, PAIRS)


def test_texts_keep_the_spaces_around_them(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "  two lines\n"}])
    (found,) = documents(path, TEXT)
    assert isinstance(found, Document)
    assert found.text == "  two lines\n"


def test_shards_hold_rows_as_they_were_added(made, tmp_path: Path):
    rules, store = Rules(made, 9, splits=True), LocalStore(str(tmp_path))
    pairs = [Document("Who?", "Tom is here.", 0, 1), Document(None, "Anna goes to the mill. " * 4, 1, 7)]
    found = list(rules.tokenised(pairs))
    writer = TokenShardWriter(store, "train", first_row_id=40, shard_rows=4, fingerprint="f")
    for one in found:
        writer.add(one)
    entries = writer.close()
    rows = [row for one in found for row in one.rows]
    assert [entry.rows for entry in entries] == [4] * (len(rows) // 4) + [len(rows) % 4] * (len(rows) % 4 > 0)
    shards = [read_token_shard(store, entry) for entry in entries]
    assert np.concatenate([shard.row_ids_R for shard in shards]).tolist() == list(range(40, 40 + len(rows)))
    read = [(shard.row(n), shard.positions(n)) for shard in shards for n in range(len(shard))]
    for (tokens, positions), row in zip(read, rows, strict=True):
        assert np.array_equal(tokens, row.tokens_L)
        assert (positions + 1).tolist() == np.flatnonzero(row.learnt_L).tolist()
    assert [int(n) for shard in shards for n in shard.learnt_R] == [row.learnt for row in rows]
    assert np.concatenate([shard.documents_R for shard in shards]).tolist() == [0] + [1] * (len(rows) - 1)
