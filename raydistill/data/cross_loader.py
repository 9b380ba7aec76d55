"""A worker's batches for a student with a tokenizer of its own: its rows, and what the teacher says of their spans.

Shapes: N positions of the student's, J spans, M positions at which spans begin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from raydistill.cache.next_tokens import NextTokenCache
from raydistill.cache.text_logprobs import TextShard, read_text_logprobs
from raydistill.data.folds import FoldRows
from raydistill.data.spans import Int64
from raydistill.data.student_rows import StudentShard, read_student_shard
from raydistill.data.token_loader import Held, TokenSplit
from raydistill.data.token_shards import TokenShard
from raydistill.errors import UserError
from raydistill.losses.token_objective import CrossTeacher
from raydistill.record.commit import Entry, Manifest
from raydistill.record.store import Store
from raydistill.targets import HiddenTargets, RankTargets, SpanTargets, SparseTargets


@dataclass(frozen=True)
class CrossTaught:
    """What a batch takes of the teacher: `spans` or `uld` (losses/cross_tokenizer), from which cache."""

    cross_tokenizer: str
    cache: NextTokenCache


class CrossSplit(TokenSplit):
    """One split of the rows of a student with its own tokenizer; without `taught` nothing of a teacher."""

    def __init__(
        self, store: Store, rows_store: Store, splits: tuple[str, ...], data: Manifest, student_rows: Manifest,
        taught: CrossTaught | None, rows: FoldRows | None = None,
    ) -> None:  # fmt: skip
        self._rows_store, self._taught = rows_store, taught
        self._entries_of = {entry.file: entry for entry in student_rows.shards(*splits)}
        self._teacher_learnt: list[Int64] = []
        super().__init__(store, splits, data, taught.cache if taught else None, rows)

    def _read_whole(self, entry: Entry) -> StudentShard:
        return read_student_shard(self._rows_store, self._entries_of[entry.file])

    def _read(self, entry: Entry) -> TokenShard:
        shard = self._read_whole(entry)
        self._teacher_learnt.append(shard.teacher_learnt_R[self._rows(shard.tokens)])
        return shard.tokens

    def _load(self, number: int) -> CrossHeld:
        entry, taught = self.entries[number], self._taught
        shard = self._read_whole(entry)
        teacher, text = None, None
        if taught is not None:
            known = {"row_ids_R": shard.tokens.row_ids_R, "positions_R": shard.teacher_learnt_R}
            if taught.cross_tokenizer == "spans":
                cache = taught.cache
                text = read_text_logprobs(cache.store, cache.folder, cache.manifest, entry.file, **known)
            else:
                assert self._kept is not None
                teacher = taught.cache.shard(self._kept[number], **known)
        return CrossHeld(shard.tokens, teacher, self._rows(shard.tokens), shard, text)

    def _teacher(self, places: Int64) -> CrossTeacher:
        assert self._taught is not None
        return self._spans(places) if self._taught.cross_tokenizer == "spans" else self._ranks(places)

    def _rows_of(self, places: Int64) -> list[tuple[CrossHeld, int, int]]:
        """Of every row its shard, its place there, and how many of the batch's positions come before it."""
        found, before = list[tuple[CrossHeld, int, int]](), 0
        for number, row in places.tolist():
            held = self._held[number]
            assert isinstance(held, CrossHeld)
            found.append((held, int(held.rows_R[row]), before))
            before += int(self._learnt[number][row])
        return found

    def _spans(self, places: Int64) -> SpanTargets:
        begins, ends, logprobs = list[Int64](), list[Int64](), list[npt.NDArray[np.float64]]()
        for held, row, before in self._rows_of(places):
            assert held.text is not None
            spans, sums = held.shard.spans.row(row), np.cumsum(np.append(0.0, held.text.row(row)))
            begins.append(before + spans["student_begins"])
            ends.append(before + spans["student_ends"])
            logprobs.append(sums[spans["teacher_ends"]] - sums[spans["teacher_begins"]])
        first_J, last_J = (torch.from_numpy(np.concatenate(part)) for part in (begins, ends))
        return SpanTargets(first_J, last_J, torch.from_numpy(np.concatenate(logprobs)).float())

    def _ranks(self, places: Int64) -> RankTargets:
        """Where spans begin, both predict what follows the same text."""
        ours, theirs, before_theirs = list[Int64](), list[Int64](), 0
        for held, row, before in self._rows_of(places):
            spans = held.shard.spans.row(row)
            ours.append(before + spans["student_begins"])
            theirs.append(before_theirs + spans["teacher_begins"])
            before_theirs += int(held.shard.teacher_learnt_R[row])
        at_M = torch.from_numpy(np.concatenate(theirs))
        teacher = self._targets(places, self._teacher_learnt)
        if isinstance(teacher, SparseTargets):
            chosen: SparseTargets | HiddenTargets | torch.Tensor = teacher.select(at_M)
        elif isinstance(teacher, HiddenTargets):
            chosen = HiddenTargets(teacher.hidden_ND[at_M], teacher.head)
        else:
            chosen = teacher[at_M]
        return RankTargets(torch.from_numpy(np.concatenate(ours)), chosen)


@dataclass(frozen=True)
class CrossHeld(Held):
    """A shard as training needs it, with its spans and the teacher's log-probabilities of the text."""

    shard: StudentShard
    text: TextShard | None

    @property
    def nbytes(self) -> int:
        return super().nbytes + self.shard.spans.nbytes + (self.text.nbytes if self.text else 0)


def check_text_logprobs(cache: Manifest, where: str) -> None:
    """Raises UserError for a cache without the log-probabilities of the text."""
    if not cache.facts.get("text_logprobs"):
        raise UserError(
            f"{where}: keeps no log-probabilities of the text, which train.loss.cross_tokenizer: spans learns from. Set"
            " teacher.next_tokens.text_logprobs=true there, and score again with --redo teach"
        )
