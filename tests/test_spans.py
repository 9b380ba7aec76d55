"""Tokens of two tokenizers aligned by bytes, against texts cut by hand and a search over all spans."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from language_runs import texts, tokenizer, unigram_tokenizer
from tokenizers import AddedToken

from raydistill.data.spans import COLUMNS, Side, aligned
from raydistill.data.token_bytes import TokenBytes
from raydistill.errors import UserError

HARD = [
    "plain words",
    " leading and  double spaces ",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family, flag \U0001f1e9\U0001f1ea.",
    "e\u0301 combining, \u00e9 composed, n\u0303\u0323 both",
    "\u65e5\u672c\u8a9e\u3068\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0001 \u00a0",
    "line\n\n\tbreaks\r\n",
    "",
]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {"bytes": tokenizer(300), "more bytes": tokenizer(500), "pieces": unigram_tokenizer(120)}


def ids_of(made: Any, text: str) -> list[int]:
    return made(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", HARD)
@pytest.mark.parametrize("name", ["bytes", "more bytes"])
def test_bytes_of_tokens_are_the_texts_own(tokenizers: dict[str, Any], name: str, text: str):
    made = tokenizers[name]
    ids, ends = ids_of(made, text), TokenBytes(made, "here").ends(ids_of(made, text), text)
    assert ends is not None
    assert len(ends) == len(ids)
    # What a tokenizer decodes of the first tokens is the text up to there, as far as characters are whole.
    for count, end in enumerate(ends.tolist(), 1):
        whole = text.encode()[:end].decode(errors="ignore")
        assert made.decode(ids[:count]).rstrip("\ufffd") == whole.rstrip("\ufffd"), (count, end)


def test_the_sign_that_is_put_before_a_text_stands_for_no_byte(tokenizers: dict[str, Any]):
    made = tokenizers["pieces"]
    for text in ("the cat", " the cat", "x", "the  cat "):
        ends = TokenBytes(made, "here").ends(ids_of(made, text), text)
        assert ends is not None
        assert ends[-1] == len(text)
        assert made.convert_ids_to_tokens(ids_of(made, text))[0].startswith("\u2581")


@pytest.mark.parametrize("strips", [{}, {"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_added_tokens_may_take_in_the_spaces_beside_them(kind: str, strips: dict[str, bool]):
    made = tokenizer(300) if kind == "bytes" else unigram_tokenizer(120)
    made.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", **strips)]})
    for text in ("the cat<|end|>the", "the cat  <|end|>  the", " the<|end|> <|end|>the cat ", "the <|end|> "):
        ids = ids_of(made, text)
        ends = TokenBytes(made, "here").ends(ids, text)
        assert ends is not None, made.convert_ids_to_tokens(ids)
        ends = ends.tolist()
        found = [end for token, end in zip(ids, ends, strict=True) if token == made.convert_tokens_to_ids("<|end|>")]
        assert found == [match.end() for match in re.finditer(re.escape("<|end|>"), text)]
        assert ends == sorted(ends)
        # The words beside them, each in the bytes up to where its last token ends.
        words = [b"".join(TokenBytes(made, "here").of(ids[:count])).split() for count in range(1, len(ids) + 1)]
        for end, word in zip(ends, words, strict=True):
            assert "".join(text[:end].split()).encode() == b"".join(word)


def test_unknown_characters_are_found_by_offsets(tokenizers: dict[str, Any]):
    made = tokenizers["pieces"]
    text = "the \u65e5\u672c cat \U0001f600 the"
    ids = ids_of(made, text)
    assert made.unk_token_id in ids
    ends = TokenBytes(made, "here").ends(ids, text)
    assert ends is not None
    assert ends[-1] == len(text.encode())
    last = max(place for place, token in enumerate(ids) if token == made.unk_token_id)
    assert ends[last] == text.encode().index(b" the", 5)
    # Also where the sign before a text has the offsets of its first character.
    text = "the \u65e5\u672c"
    ends = TokenBytes(made, "here").ends(ids_of(made, text), text)
    assert ends is not None
    assert ends[-2:].tolist() == [4, 10]


def test_a_text_that_a_tokenizer_changes_has_no_bytes():
    from tokenizers import normalizers

    for step, changed, same in (
        (normalizers.Lowercase(), "Hello", "hello"),
        (normalizers.NFC(), "e\u0301", "\u00e9"),
    ):
        made = tokenizer(300)
        made.backend_tokenizer.normalizer = step
        measured = TokenBytes(made, "here")
        assert measured.ends(ids_of(made, changed), changed) is None
        assert measured.ends(ids_of(made, same), same) is not None


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(UserError, match=r"student.model: its tokenizer is not one of the tokenizers library"):
        TokenBytes(Slow(), "student.model")


def side(rows: list[list[int]], learnt: list[list[int]] | None = None, **flags: Any) -> Side:
    """Rows given by the ends of their tokens."""
    flat = [end for row in rows for end in row]
    learns = [one for row in learnt for one in row] if learnt else [1] * len(flat)
    return Side(
        np.cumsum([0, *map(len, rows)]), np.array(flat, np.int64), np.array(learns, bool),
        np.array(flags.get("unknown", [0] * len(flat)), bool), np.array(flags.get("begins", [0] * len(rows)), bool),
        np.array(flags.get("has_end", [0] * len(rows)), bool),
    )  # fmt: skip


def spans(teacher: Side, student: Side, sizes: list[int]) -> list[list[tuple[int, ...]]]:
    found = aligned(teacher, student, np.array(sizes))
    return [list(zip(*(found.row(row)[name].tolist() for name in COLUMNS), strict=True)) for row in range(len(sizes))]


def test_spans_are_the_smallest_that_both_end_at():
    # |ab|cde|f|gh|  against  |a|b|c|defg|h|
    assert spans(side([[2, 5, 6, 8]]), side([[1, 2, 3, 7, 8]]), [8]) == [[(0, 1, 0, 2, 2), (1, 4, 2, 5, 6)]]


def test_a_span_across_what_is_not_learnt_is_left_out():
    teacher = side([[2, 4, 6]], [[0, 1, 1]])
    assert spans(teacher, side([[2, 3, 6]], [[0, 1, 1]]), [6]) == [[(0, 2, 0, 2, 4)]]
    # The student's first token reaches over the border, so that the first span is not the teacher's to judge.
    assert spans(teacher, side([[3, 4, 6]], [[0, 1, 1]]), [6]) == [[(1, 2, 1, 2, 2)]]
    assert spans(teacher, side([[3, 6]], [[1, 1]]), [6]) == [[]]


def test_a_span_with_an_unknown_token_is_left_out():
    assert spans(side([[2, 4, 6]]), side([[2, 4, 6]], unknown=[0, 1, 0]), [6]) == [[(0, 1, 0, 1, 2), (2, 3, 2, 3, 2)]]


def test_a_token_without_bytes_belongs_to_what_follows():
    # The second one is a sign that one tokenizer puts before the second part.
    assert spans(side([[2, 2, 5]]), side([[2, 5]]), [5]) == [[(0, 1, 0, 1, 2), (1, 3, 1, 2, 3)]]
    assert spans(side([[0, 2, 5]]), side([[2, 5]]), [5]) == [[(0, 2, 0, 1, 2), (2, 3, 1, 2, 3)]]
    # At the end of a row nothing follows, and the next row's tokens are another's.
    assert spans(side([[2, 2], [3]]), side([[2], [3]]), [2, 3]) == [[(0, 1, 0, 1, 2)], [(0, 1, 0, 1, 3)]]


def test_begin_and_end_of_a_document_are_aligned_by_role():
    teacher = side([[0, 2, 4, 4]], [[0, 1, 1, 1]], begins=[1], has_end=[1])
    assert spans(teacher, side([[1, 4, 4]], [[0, 1, 1]], has_end=[1]), [4]) == [[(2, 3, 1, 2, 0)]]
    student = side([[0, 1, 2, 4, 4]], [[0, 1, 1, 1, 1]], begins=[1], has_end=[1])
    assert spans(teacher, student, [4]) == [[(0, 1, 0, 2, 2), (1, 2, 2, 3, 2), (2, 3, 3, 4, 0)]]
    # A student without such a token has no span of it.
    assert spans(teacher, side([[0, 2, 4]], [[0, 1, 1]], begins=[1]), [4]) == [[(0, 1, 0, 1, 2), (1, 2, 1, 2, 2)]]


def test_rows_without_text_or_tokens_in_common():
    assert spans(side([[3], [2], [1, 4]]), side([[0], [2], [2, 4]]), [3, 2, 4]) == [
        [], [(0, 1, 0, 1, 2)], [(0, 2, 0, 2, 4)],
    ]  # fmt: skip


@st.composite
def a_row(draw: Any) -> tuple[int, list[list[int]], list[list[int]]]:
    """A text's size, and for each side the ends of its tokens, some of no byte, and which are learnt."""
    size = draw(st.integers(1, 12))
    cuts = [sorted([*draw(st.lists(st.integers(0, size - 1), max_size=8)), size]) for _ in range(2)]
    return size, cuts, [draw(st.lists(st.sampled_from([1, 1, 1, 0]), min_size=len(c), max_size=len(c))) for c in cuts]


def by_search(size: int, cuts: list[list[int]], learnt: list[list[int]]) -> list[tuple[int, ...]]:
    """The spans of a row by walking over its bytes."""
    common = [byte for byte in range(1, size + 1) if all(byte in row for row in cuts)]
    found, before = [], 0
    for end in common:
        tokens = []
        for row in cuts:
            sizes = np.diff([0, *row])
            mine = [
                place for place, at in enumerate(row)
                if (before < at <= end and sizes[place] > 0) or (sizes[place] == 0 and before <= at < end)
            ]  # fmt: skip
            tokens.append(mine)
        if all(learnt[n][place] for n in range(2) for place in tokens[n]):
            ranks = [[sum(learnt[n][:place]) for place in tokens[n]] for n in range(2)]
            found.append((ranks[0][0], ranks[0][-1] + 1, ranks[1][0], ranks[1][-1] + 1, end - before))
        before = end
    return found


@settings(max_examples=200, deadline=None)
@given(st.lists(a_row(), min_size=1, max_size=5))
def test_spans_are_those_of_a_search(rows: list[Any]):
    one, other = (side([cuts[n] for _, cuts, _ in rows], [learnt[n] for _, _, learnt in rows]) for n in range(2))
    assert spans(one, other, [size for size, _, _ in rows]) == [by_search(*row) for row in rows]


def test_real_texts_are_covered_by_their_spans(tokenizers: dict[str, Any]):
    for one, other in (("bytes", "more bytes"), ("bytes", "pieces")):
        for text in texts(5, seed=3):
            ends = [TokenBytes(tokenizers[n], n).ends(ids_of(tokenizers[n], text), text) for n in (one, other)]
            assert ends[0] is not None
            assert ends[1] is not None
            (found,) = spans(side([ends[0].tolist()]), side([ends[1].tolist()]), [len(text.encode())])
            assert sum(size for *_, size in found) == len(text.encode())
            assert [t[0] for t in found[1:]] == [t[1] for t in found[:-1]]
