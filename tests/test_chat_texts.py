"""What two tokenizers with templates of their own share of a chat."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from language_runs import tokenizer, unigram_tokenizer

from raydistill.data.chat_texts import chat_bytes, mark_places
from raydistill.data.chats import Messages, segments, written_messages
from raydistill.data.student_rows import StudentRows
from raydistill.data.token_bytes import TokenBytes
from raydistill.data.token_rows import Answer, Rules, TokenPrompt, TokenRow
from raydistill.data.token_shards import TokenShard

MARKED = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# Without a prompt to the assistant, without spaces around what is said, and with another word for it.
TRIMMED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Answer: {{ m['content'] | trim }}</s>"
    "{% else %}Question: {{ m['content'] | trim }} {% endif %}{% endfor %}"
)
CHATS: list[Messages] = [
    (("user", "Who is Tom?"), ("assistant", "Tom is here.")),
    (("user", "a"), ("assistant", " Ann went home.\n"), ("user", "And s?"), ("assistant", "s")),
    (("system", "Be brief."), ("user", "Ünï? ✓"), ("assistant", "é ✓ Ünï"), ("assistant", "assistant")),
]


def with_template(made: Any, template: str) -> Any:
    made.chat_template = template
    return made


def rules(made: Any, roles: tuple[str, ...] = ("assistant",), length: int = 200) -> Rules:
    return Rules(made, length, splits=False, learnt_roles=roles, measured=TokenBytes(made, "x"))


def rows_of(made: Any, chats: list[Messages], roles: tuple[str, ...] = ("assistant",)) -> list[TokenRow]:
    return [rules(made, roles).chat(chat) for chat in chats]


def shard_of(rows: list[TokenRow]) -> TokenShard:
    borders = np.cumsum([0, *(len(row.tokens_L) for row in rows)])
    return TokenShard(
        "x", np.arange(len(rows)), np.arange(len(rows)), borders, np.concatenate([row.tokens_L for row in rows]),
        np.concatenate([row.learnt_L for row in rows]),
    )  # fmt: skip


AROUND = re.compile(rb"\s*(</s>)?\s*((<s>\s*)?(user|assistant|Answer:|Question:))?\s*")


def written(made: Any, ids: np.ndarray) -> bytes:
    """The bytes of tokens, which may end within a character."""
    return b"".join(TokenBytes(made, "x").of(ids.tolist()))


TEACHERS = {"marked": MARKED, "trimmed": TRIMMED}
STUDENTS = {"bytes": lambda: tokenizer(420), "pieces": unigram_tokenizer}


@pytest.mark.parametrize("roles", [("assistant",), ("assistant", "user")])
@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("template", TEACHERS)
def test_spans_hold_the_same_parts_of_messages(template: str, student: str, roles: tuple[str, ...]):
    # A vocabulary of letters for the pieces: what they lack is unknown to them, and in no span.
    chats = CHATS if student == "bytes" else CHATS[:1]
    teacher = with_template(tokenizer(), TEACHERS[template])
    ours = with_template(STUDENTS[student](), TRIMMED if template == "marked" else MARKED)
    rows = rows_of(teacher, chats, roles)
    shard = shard_of(rows)
    texts = [row.text for row in rows if row.text is not None]
    assert len(texts) == len(rows)
    made = StudentRows(ours, "x", teacher, 200, roles).made(shard, texts)
    assert not made.changed_R.any()
    assert not made.cut_R.any()
    for number, chat in enumerate(chats):
        said = [content.strip() for role, content in chat if role in roles]
        spans, mine = made.spans.row(number), made.tokens
        learnt = [one.row(number)[one.positions(number) + 1] for one in (shard, mine)]
        own = list[bytes]()
        for t0, t1, s0, s1, size in zip(*(spans[name].tolist() for name in spans), strict=True):
            parts = [written(teacher, learnt[0][t0:t1]), written(ours, learnt[1][s0:s1])]
            if size == 0:  # what begins a message or what ends it
                assert all(AROUND.fullmatch(part) for part in parts), parts
            else:
                assert parts[0].strip() == parts[1].strip()
                own.append(parts[0])
        assert spans["sizes"].sum() == sum(len(text.encode()) for text in said)
        assert b"".join(own).replace(b" ", b"") == "".join(said).replace(" ", "").encode()
        ends = [
            written(ours, learnt[1][a:b]) for a, b in zip(spans["student_begins"], spans["student_ends"], strict=True)
        ]
        if roles == ("assistant",):
            assert sum(b"</s>" in part for part in ends) == len(said)


def test_what_a_message_is_does_not_depend_on_what_stands_around_it():
    # "s" stands in "</s>" too, and "assistant" in what a template writes before a message.
    for template in TEACHERS.values():
        made = with_template(tokenizer(), template)
        for chat in CHATS:
            found = segments(made, chat, ("assistant", "user")) or []
            learnt = [part for part in found if part.is_learnt]
            said = [content.strip() for role, content in chat if role != "system"]
            assert [part.text[slice(*(part.own or (0, 0)))] for part in learnt] == said
            for part, (role, _) in zip(learnt, [one for one in chat if one[0] != "system"], strict=True):
                assert part.own is not None
                before = part.text[: part.own[0]]
                assert before.strip() in ("", f"<s>{role}", "Answer:", "Question:")


def test_an_answer_that_came_to_no_end_teaches_none():
    made = with_template(tokenizer(), MARKED)
    (asked,) = [TokenPrompt("Who?", np.zeros(1, np.int32), written_messages((("user", "Who?"),)))]
    found = rules(made).answered(asked, [Answer("s", False), Answer("s", True)], 0, 0)
    open_, closed = (row.text for row in found.rows)
    assert open_ is not None
    assert closed is not None
    assert made.decode(found.rows[0].tokens_L).endswith("assistant\ns")
    assert made.decode(found.rows[1].tokens_L).endswith("assistant\ns</s>\n")
    ours = with_template(tokenizer(420), TRIMMED)
    student = StudentRows(ours, "x", made, 200).made(shard_of(list(found.rows)), [open_, closed])
    written = [ours.decode(student.tokens.row(number)) for number in range(2)]
    assert [text.endswith("Answer: s") for text in written] == [True, False]
    assert student.spans.row(0)["sizes"].tolist() == [1]
    assert student.spans.row(1)["sizes"].tolist() == [1, 0]


def test_a_chat_that_the_students_template_refuses_or_changes_is_not_learnt():
    teacher = with_template(tokenizer(), MARKED)
    rows = rows_of(teacher, CHATS[:1])
    for template in ("{{ raise_exception('no') }}", MARKED.replace("m['content']", "m['content'] | upper")):
        ours = with_template(tokenizer(420), template)
        made = StudentRows(ours, "x", teacher, 200).made(shard_of(rows), [row.text for row in rows if row.text])
        assert made.changed_R.tolist() == [True]
        assert not made.tokens.learnt.any()
        assert len(made.spans) == 0


def test_rows_of_both_may_be_cut():
    teacher, ours = with_template(tokenizer(), MARKED), with_template(tokenizer(420), TRIMMED)
    chat = (("user", "Who?"), ("assistant", "Tom is here. " * 8))
    whole = rules(teacher).chat(chat)
    cut = rules(teacher, length=len(whole.tokens_L) - 9)._of_chat(whole)[0]
    assert cut.text is not None
    made = StudentRows(ours, "x", teacher, 30).made(shard_of([cut]), [cut.text])
    assert made.cut_R[0] > 0
    assert len(made.tokens.row(0)) == 30
    spans = made.spans.row(0)
    assert 0 < spans["sizes"].sum() < len(chat[1][1])
    assert spans["student_ends"].max() <= made.tokens.learnt_R[0]


def test_marks_stand_for_no_text():
    texts = ["é".encode(), b"", b"ab"]
    data = chat_bytes(texts)
    assert bytes(data[place] for place in mark_places(texts)) == b"\0" * 6
    assert len(data) == 6 + 4
