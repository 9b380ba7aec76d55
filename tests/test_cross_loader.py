"""Batches of a student with another tokenizer: which positions its spans have, and what the teacher says of them.

The teacher's log-probabilities and logits are made numbers, so that what a batch carries can be told by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from language_runs import texts, tokenizer, unigram_tokenizer

from raydistill.cache.next_tokens import DENSE, NextTokenCache, whole_writer
from raydistill.cache.text_logprobs import TextLogprobs, text_shard, write_text_logprobs
from raydistill.data.cross_loader import CrossSplit, CrossTaught
from raydistill.data.documents import Document
from raydistill.data.student_rows import (
    StudentRows,
    StudentShard,
    read_student_shard,
    teachers_rows,
    write_student_shard,
)
from raydistill.data.token_bytes import TokenBytes
from raydistill.data.token_rows import Rules
from raydistill.data.token_shards import TokenShard, TokenShardWriter
from raydistill.data.token_spool import TokenSpool
from raydistill.record.commit import Manifest, commit_manifest
from raydistill.record.store import LocalStore
from raydistill.targets import RankTargets, SpanTargets

VOCABULARY = 300
ENDINGS = ("", " \U0001f468\u200d\U0001f469 e\u0301", " \u65e5\u672c")


@dataclass(frozen=True)
class Made:
    """A small run's data, rows and cache, and what they were made from."""

    store: LocalStore
    data: Manifest
    rows: Manifest
    cache: NextTokenCache
    teacher: list[TokenShard]
    student: list[StudentShard]
    logprobs: list[npt.NDArray[np.float32]]
    logits: list[torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    store, theirs = LocalStore(str(tmp_path_factory.mktemp("cross"))), tokenizer(VOCABULARY)
    rules, spool = Rules(theirs, 48, splits=True, measured=TokenBytes(theirs, "teacher.model")), TokenSpool()
    writer = TokenShardWriter(store, "train", first_row_id=0, shard_rows=20, fingerprint="f", keeps_text=True)
    documents = [Document(None, text + ENDINGS[n % 3], 0, n) for n, text in enumerate(texts(12))]
    for found in rules.tokenised(documents):
        spool.add(found)
    spool.close()
    for found in spool:
        writer.add(found)
    data = commit_manifest(store, "data", "f", writer.close(), {"vocabulary": VOCABULARY, "keeps_text": True})
    rows, random = StudentRows(unigram_tokenizer(120), "student.tokenizer", theirs, 80), np.random.default_rng(0)
    entries, beside, dense, teacher, student, logprobs, logits = [], [], [], [], [], [], []
    for entry in data.shards("train"):
        shard, row_texts, sources = teachers_rows(store, entry)
        teacher.append(shard)
        student.append(rows.made(shard, row_texts))
        entries.append(write_student_shard(store, student[-1], sources, "f"))
        logprobs.append(-random.exponential(2, int(shard.learnt_R.sum())).astype(np.float32))
        name = f"teacher/cache/{text_shard(entry.file)}"
        beside.append(write_text_logprobs(store, name, shard.row_ids_R, shard.learnt_R, logprobs[-1], "f"))
        logits.append(torch.randn(len(shard), int(shard.learnt_R.max()), VOCABULARY))
        with whole_writer(store, f"teacher/cache/{entry.file}", "dense", VOCABULARY) as whole:
            whole.add(shard.row_ids_R, shard.learnt_R, {DENSE: logits[-1]})
            dense.append(whole.commit("f"))
    facts = {"codec": "dense", "vocabulary": VOCABULARY, "text_logprobs": True}
    manifest = commit_manifest(store, "teacher/cache", "f", dense + beside, facts)
    own = commit_manifest(store, "student_rows", "f", entries)
    cache = NextTokenCache.open(store, "teacher/cache", manifest, data)
    return Made(store, data, own, cache, teacher, student, logprobs, logits)


def split(made: Made, kind: str | None) -> CrossSplit:
    taught = CrossTaught(kind, made.cache) if kind else None
    return CrossSplit(made.store, made.store, ("train",), made.data, made.rows, taught)


def test_rows_are_read_as_they_were_made(made: Made):
    for entry, shard in zip(made.rows.shards("train"), made.student, strict=True):
        read = read_student_shard(made.store, entry)
        assert read.counts() == shard.counts()
        assert read.tokens.tokens.tolist() == shard.tokens.tokens.tolist()
        assert read.tokens.learnt.tolist() == shard.tokens.learnt.tolist()
        for row in range(len(shard.tokens)):
            for name, values in shard.spans.row(row).items():
                assert read.spans.row(row)[name].tolist() == values.tolist()
        for side, learnt in (("teacher", read.teacher_learnt_R), ("student", read.tokens.learnt_R)):
            expected = np.zeros(int(learnt.sum()), bool)
            for row, before in enumerate(np.cumsum(learnt) - learnt):
                spans = read.spans.row(row)
                for begin, end in zip(spans[f"{side}_begins"], spans[f"{side}_ends"], strict=True):
                    expected[before + begin : before + end] = True
            assert read.in_spans(side).tolist() == expected.tolist()
        assert read.bytes_R.sum() == read.spans.sizes.sum()


@pytest.mark.parametrize("kind", ["spans", "uld"])
def test_a_batch_has_its_rows_spans(made: Made, kind: str):
    places = np.array([[1, 3], [0, 2], [1, 0], [0, 19]])
    loaded = split(made, kind)
    teacher, before, number = loaded.batch(places).teacher, 0, 0
    for shard, row in places.tolist():
        spans = made.student[shard].spans.row(row)
        own = made.logprobs[shard][made.teacher[shard].learnt_R[:row].sum() :].astype(np.float16).astype(np.float64)
        for t0, t1, s0, s1 in zip(*(spans[name].tolist() for name in list(spans)[:4]), strict=True):
            if isinstance(teacher, SpanTargets):
                assert teacher.logprobs_J[number].item() == pytest.approx(own[t0:t1].sum(), rel=1e-5)
                assert (teacher.begins_J[number].item(), teacher.ends_J[number].item()) == (before + s0, before + s1)
            else:
                assert isinstance(teacher, RankTargets)
                assert isinstance(teacher.teacher, torch.Tensor)
                assert teacher.places_M[number] == before + s0
                torch.testing.assert_close(teacher.teacher[number], made.logits[shard][row, t0].half().float())
            number += 1
        before += int(made.student[shard].tokens.learnt_R[row])
    assert number > 50
    loaded.close()


def test_an_epoch_has_every_span_once_however_it_is_spread(made: Made):
    totals = []
    for world, accumulation in ((1, 1), (1, 3), (2, 2)):
        found: list[float] = []
        for rank in range(world):
            loaded = split(made, "spans")
            for count, micro in loaded.training_steps(
                seed=1, epoch=0, batch_tokens=400, first_step=0, rank=rank, world=world, accumulation=accumulation
            ):
                batches = list(micro())
                assert count >= sum(batch.rows for batch in batches)
                for batch in batches:
                    if isinstance(batch.teacher, SpanTargets):
                        found += batch.teacher.logprobs_J.tolist()
            loaded.close()
        totals.append(sorted(found))
    assert len(totals[0]) == sum(len(shard.spans) for shard in made.student)
    assert totals[0] == totals[1] == totals[2]


def test_without_a_teacher_there_are_rows_alone(made: Made):
    loaded = split(made, None)
    batches = list(loaded.token_batches(300))
    assert not loaded.has_teacher
    assert all(batch.teacher is None for batch in batches)
    assert sum(batch.rows for batch in batches) == sum(int(shard.tokens.learnt.sum()) for shard in made.student)
    loaded.close()


def test_logprobs_are_gathered_chunk_by_chunk():
    logits, labels = torch.randn(5, 7), torch.tensor([1, 2, 0, 6, 6])
    watch = TextLogprobs(labels)
    to_logits = watch.of(lambda part: part)
    for cut in (slice(0, 2), slice(2, 5)):
        torch.testing.assert_close(to_logits(logits[cut]), logits[cut])
    expected = logits.double().log_softmax(dim=-1)[torch.arange(5), labels].numpy()
    np.testing.assert_allclose(watch.values_N, expected, rtol=1e-5)
