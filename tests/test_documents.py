"""Documents of a language model: which rows of tokens they become, what is learnt of them, what is dropped."""

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from language_runs import tokenizer, write_jsonl

from raydistill.data.documents import Document, read_documents
from raydistill.data.readers import Fields
from raydistill.data.sources import Dropped, find_source
from raydistill.data.token_rows import Rules, Tokenised, tokenise_documents
from raydistill.data.token_shards import TokenShardWriter, read_token_shard
from raydistill.data.token_spool import TokenSpool
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
        "no token to learn from", True, "no response", "null text", "text is not text", "over max_row_bytes",
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


TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CHAT = (("system", "Be short."), ("user", "Who?"), ("assistant", "Tom."), ("user", "Where?"), ("assistant", "At home."))


def learnt_text(made, found) -> str:
    return made.decode([t for row in found.rows for t in row.tokens_L[row.learnt_L].tolist()])


@pytest.mark.parametrize(
    ("roles", "expected"),
    [(("assistant",), "Tom.</s>At home.</s>"), (("user",), "<s>user: Who?</s><s>user: Where?</s>")],
)
def test_of_a_chat_the_messages_of_some_roles_are_learnt(roles: tuple[str, ...], expected: str):
    made = tokenizer()
    made.chat_template = TEMPLATE
    (found,) = Rules(made, 300, True, roles).tokenised([Document(None, "x", 0, 1, CHAT)])
    whole = made.apply_chat_template([{"role": r, "content": c} for r, c in CHAT], tokenize=False)
    assert made.decode(found.rows[0].tokens_L) == whole
    assert learnt_text(made, found) == expected


def test_a_template_that_takes_no_system_message_alone_is_rendered_with_the_next_one():
    made = tokenizer()
    made.chat_template = (
        "{% if messages|length == 1 and messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        + TEMPLATE
    )
    (found,) = Rules(made, 300, True).tokenised([Document(None, "x", 0, 1, CHAT)])
    assert learnt_text(made, found) == "Tom.</s>At home.</s>"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('never') }}", "{{ messages|length }}" + TEMPLATE],
    ids=["refuses", "writes earlier messages otherwise"],
)
def test_a_chat_that_a_template_does_not_write_in_order_is_dropped(template: str, tmp_path: Path):
    made = tokenizer()
    made.chat_template = template
    chats = [{"messages": [{"role": role, "content": content} for role, content in CHAT]}]
    path = write_jsonl(tmp_path / "a.jsonl", chats)
    fields = Fields((("data.messages", "messages"),), 0, ",", 1000)
    (found,) = tokenise_documents(documents(path, fields), Rules(made, 300, True))
    assert isinstance(found, Dropped)


def test_what_is_no_chat_is_counted(tmp_path: Path):
    path = tmp_path / "a.csv"
    rows = ['"[{""role"": ""user"", ""content"": ""Who?""}]"', "no chat", "[]", '"[{""role"": ""user""}]"', "3"]
    path.write_text("messages\n" + "\n".join(rows) + "\n")
    found = documents(path, Fields((("data.messages", "messages"),), 0, ",", 1000))
    assert isinstance(found[0], Document)
    assert found[0].messages == (("user", "Who?"),)
    assert [one.reason for one in found[1:] if isinstance(one, Dropped)] == ["messages are malformed"] * 4


def zstd(text: str) -> bytes:
    return pa.compress(text.encode(), "zstd", asbytes=True)


TXT = "\ufeffOne line.\nAnother one.\r\n  \n\n  Tom is here.\n\nThe end"
BLOCKS = ["One line.\nAnother one.", "  Tom is here.", "The end"]


@pytest.mark.parametrize(
    ("name", "write"), [("a.txt", str.encode), ("a.TXT.gz", lambda text: gzip.compress(text.encode())),
    ("a.txt.zst", zstd)],
)  # fmt: skip
def test_a_txt_file_is_one_document_or_one_for_each_block(tmp_path: Path, name: str, write):
    (tmp_path / name).write_bytes(write(TXT))
    for kind, expected in {"file": [TXT.removeprefix("\ufeff")], "block": BLOCKS}.items():
        found = documents(tmp_path / name, replace(TEXT, txt=kind))
        assert [one.text for one in found if isinstance(one, Document)] == expected
        assert [one.number for one in found] == list(range(1, len(expected) + 1))


def test_blocks_and_files_that_are_too_long_or_empty_are_dropped(tmp_path: Path):
    (tmp_path / "a.txt").write_text("short\n\n" + "word\n" * 4 + "\n" + "x" * 30 + "\n\nend\n")
    fields = replace(TEXT, txt="block", max_row_bytes=19)
    found = documents(tmp_path / "a.txt", fields)
    # The second block has exactly 19 bytes without its last line's end.
    assert [one.reason if isinstance(one, Dropped) else one.text for one in found] == [
        "short", "word\nword\nword\nword", "over max_row_bytes", "end",
    ]  # fmt: skip
    (whole,) = documents(tmp_path / "a.txt", replace(fields, txt="file"))
    assert isinstance(whole, Dropped)
    assert whole.reason == "over max_row_bytes"
    (tmp_path / "b.txt").write_text(" \n\n")
    assert documents(tmp_path / "b.txt", fields) == []
    assert documents(tmp_path / "b.txt", replace(fields, txt="file")) == [Dropped("empty text", 0, 1)]


def test_txt_files_have_no_columns(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match=r"a\.txt: a \.txt file has texts and no columns, and data\.prompt, data\.resp"):
        documents(tmp_path / "a.txt", PAIRS)


def test_what_waits_between_two_passes_comes_back_as_it_was(made):
    rules, spool = Rules(made, 9, splits=True), TokenSpool()
    texts = [Document("Who?" if n % 3 else None, f"Tom has {n} apples. " * (n % 5 + 1), n % 2, n) for n in range(600)]
    found = list(rules.tokenised(texts))
    for one in found:
        spool.add(one)
    spool.close()
    for _ in range(2):
        for one, other in zip(found, spool, strict=True):
            assert (one.file, one.number, one.key, one.is_long) == (other.file, other.number, other.key, other.is_long)
            for row, again in zip(one.rows, other.rows, strict=True):
                assert np.array_equal(row.tokens_L, again.tokens_L)
                assert np.array_equal(row.learnt_L, again.learnt_L)
