"""Two tokenisations of the same rows of text, aligned by bytes into the smallest spans that both end at together.

A span holds the tokens of either side that stand between two neighbouring bytes at which tokens of both sides end. It
counts where all of its tokens are learnt and none is unknown: so one that crosses the end of a row, or the border of
what is learnt, is left out as a whole. Tokens that stand for no byte belong to the span that follows them: what comes
next is predicted after them. Tokens with a role are no text: what begins a document is in no span, and the two that end
it are one of their own, of no byte.

Shapes: R rows, L tokens of all rows end to end, J spans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
COLUMNS = ("teacher_begins", "teacher_ends", "student_begins", "student_ends", "sizes")


@dataclass(frozen=True)
class Side:
    """One tokenisation of R rows. borders_R1: where rows begin and the last ends. Of every token: ends, the byte of its
    row before which it ends; learnt; unknown, whether it stands for characters that the vocabulary lacks.

    begins_R, has_end_R: whether the row's first token begins a document, and its last one ends it.
    """

    borders_R1: Int64
    ends_L: Int64
    learnt_L: Bools
    unknown_L: Bools
    begins_R: Bools
    has_end_R: Bools

    @property
    def rows_L(self) -> Int64:
        return np.repeat(np.arange(len(self.borders_R1) - 1), np.diff(self.borders_R1))

    @property
    def ranks_L(self) -> Int64:
        """Of every token that is learnt, the how manieth of its row it is, from 0."""
        before_L1 = np.concatenate([[0], np.cumsum(self.learnt_L)])
        return before_L1[:-1] - before_L1[self.borders_R1[:-1]][self.rows_L]

    @property
    def last_R(self) -> Int64:
        return self.borders_R1[1:] - 1


@dataclass(frozen=True)
class Spans:
    """The spans of R rows, one row after the other. Begins and ends count a row's learnt tokens, sizes are bytes."""

    borders_R1: Int64
    teacher_begins: Int64
    teacher_ends: Int64
    student_begins: Int64
    student_ends: Int64
    sizes: Int64

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        return self.borders_R1.nbytes + sum(getattr(self, name).nbytes for name in COLUMNS)

    def row(self, index: int) -> dict[str, Int64]:
        """COLUMNS of one row's spans."""
        cut = slice(self.borders_R1[index], self.borders_R1[index + 1])
        return {name: getattr(self, name)[cut] for name in COLUMNS}


def aligned(teacher: Side, student: Side, sizes_R: Int64, marks: Sequence[Sequence[int]] = ()) -> Spans:
    """The spans of the same rows, whose texts have so many bytes.

    marks: of every row the places of bytes that stand for no text, rising; they do not count in a span's size.
    """
    starts_R = np.cumsum(sizes_R + 1) - (sizes_R + 1)  # a byte between rows, so that none ends where the next begins
    sides = (teacher, student)
    places, texts = [side.ends_L + starts_R[side.rows_L] for side in sides], [_text(side) for side in sides]
    theirs, ours = map(_own_ends, sides, places, texts)
    common = np.intersect1d(theirs, ours)
    rows_J = np.searchsorted(starts_R, common, side="right") - 1
    found, whole_J = list[tuple[Int64, Int64]](), np.ones(len(common), bool)
    for side, at_L, is_text_L in zip(sides, places, texts, strict=True):
        span_L = _span_of(side, at_L, is_text_L, common, rows_J)
        begins_J, counts_J, is_whole_J = _counted(side, span_L, len(common))
        whole_J &= is_whole_J
        found.append((begins_J, begins_J + counts_J))
    # From the span before it in its row, or from the row's begin, to its end.
    before_J = np.concatenate([[0], common[:-1]])
    before_J = np.where(np.diff(rows_J, prepend=-1) > 0, starts_R[rows_J], before_J)
    (t0_J, t1_J), (s0_J, s1_J) = found
    none = np.array([start + place for start, row in zip(starts_R, marks, strict=False) for place in row], np.int64)
    sizes_J = common - before_J - (np.searchsorted(none, common) - np.searchsorted(none, before_J))
    text = np.stack([rows_J, common, t0_J, t1_J, s0_J, s1_J, sizes_J], axis=1)[whole_J]
    return _sorted(np.concatenate([text, _end_spans(teacher, student, starts_R + sizes_R)]), len(sizes_R))


def _text(side: Side) -> Bools:
    """Which tokens stand for text, and not for the begin or the end of a document."""
    is_text_L = np.ones(len(side.ends_L), bool)
    is_text_L[side.borders_R1[:-1][side.begins_R]] = False
    is_text_L[side.last_R[side.has_end_R]] = False
    return is_text_L


def _own_ends(side: Side, at_L: Int64, is_text_L: Bools) -> Int64:
    """The bytes of all rows at which a token with text ends."""
    return at_L[is_text_L & (_sizes(side) > 0)]


def _sizes(side: Side) -> Int64:
    """Bytes of every token."""
    sizes_L = np.diff(side.ends_L, prepend=0)
    firsts = side.borders_R1[:-1][np.diff(side.borders_R1) > 0]
    sizes_L[firsts] = side.ends_L[firsts]
    return sizes_L


def _span_of(side: Side, at_L: Int64, is_text_L: Bools, common: Int64, rows_J: Int64) -> Int64:
    """The number of every token's span; -1 of one that is in none."""
    ends_here_L = np.searchsorted(common, at_L, side="left")
    after_L = np.searchsorted(common, at_L, side="right")
    span_L = np.where(_sizes(side) > 0, ends_here_L, after_L)
    in_row_L = np.append(rows_J, -1)[span_L] == side.rows_L
    return np.where(is_text_L & in_row_L, span_L, -1)


def _counted(side: Side, span_L: Int64, spans: int) -> tuple[Int64, Int64, Bools]:
    """(begins_J, counts_J, is_whole_J): a span's first learnt token, its tokens, and whether all of them count."""
    inside = span_L >= 0
    counts_J = np.bincount(span_L[inside], minlength=spans)
    usable_J = np.bincount(span_L[inside & side.learnt_L & ~side.unknown_L], minlength=spans)
    begins_J = np.zeros(spans, np.int64)
    begins_J[span_L[inside][::-1]] = side.ranks_L[inside][::-1]  # of several the first is written last
    return begins_J, counts_J, (counts_J > 0) & (usable_J == counts_J)


def _end_spans(teacher: Side, student: Side, ends_R: Int64) -> Int64:
    """The spans of the tokens that end a document, where both have one and learn it."""
    rows = np.flatnonzero(teacher.has_end_R & student.has_end_R)
    rows = rows[teacher.learnt_L[teacher.last_R[rows]] & student.learnt_L[student.last_R[rows]]]
    t_J, s_J = teacher.ranks_L[teacher.last_R[rows]], student.ranks_L[student.last_R[rows]]
    # After all text of the row: between its end and where the next row begins there is a byte.
    return np.stack([rows, ends_R[rows] + 1, t_J, t_J + 1, s_J, s_J + 1, np.zeros_like(rows)], axis=1)


def _sorted(table_J7: Int64, rows: int) -> Spans:
    table_J7 = table_J7[np.lexsort((table_J7[:, 1], table_J7[:, 0]))]
    borders_R1 = np.searchsorted(table_J7[:, 0], np.arange(rows + 1))
    return Spans(borders_R1, *(np.ascontiguousarray(table_J7[:, place]) for place in range(2, 7)))
