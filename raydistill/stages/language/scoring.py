"""A language model over data shards: one forward for each row, its distributions reduced on the device, chunk by chunk.

Shapes: R rows, L tokens of the longest row, N positions that are learnt from, C of a chunk, V vocabulary, D width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydistill.cache.alphabet import Alphabet
from raydistill.cache.hidden_shards import write_head
from raydistill.cache.next_tokens import HEAD, column_of, whole_writer
from raydistill.cache.sampling import Head, drawn_targets, reduced, sampled_targets, top_targets
from raydistill.cache.sparse_rows import SparseFormat
from raydistill.cache.sparse_shards import write_sparse
from raydistill.cache.text_logprobs import text_shard
from raydistill.config.language import SPARSE
from raydistill.data.token_shards import TokenShard, read_token_shard
from raydistill.data.tokens import pack_by_length, pad
from raydistill.errors import UserError
from raydistill.models.loading import load_language_model
from raydistill.models.source import ModelSource
from raydistill.next_token import check_parts, chunk_of, hidden_states, output_head
from raydistill.record.commit import Entry, committed_shard
from raydistill.record.store import open_store
from raydistill.stages.forward import DTYPES, TOKENS_PER_BATCH
from raydistill.stages.language.text_scoring import ShardText
from raydistill.targets import SparseTargets

FLOAT16_MAX = 65504.0
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LanguageScoringJob:
    """Which model, over which shards, into which folder, as what. Every field can be sent to a worker."""

    source: ModelSource
    data_url: str
    output_url: str
    folder: str
    fingerprint: str
    codec: str
    form: SparseFormat | None  # of a codec that keeps some tokens
    alphabet: Entry
    head_with: str  # the shard of data with which the output head is written, where the codec needs it
    vocabulary: int
    dtype: str
    text_logprobs: bool
    tokens_per_batch: int | None
    features: None = None  # of classifiers
    rows: None = None

    def scorer(self, threads: int) -> LanguageScorer:
        return LanguageScorer(self, threads=threads)


class NotFinite(ValueError):
    """A logit that is not finite, at a row and a position in it."""


class LanguageScorer:
    """A language model in eval mode on its device, for shards of token rows."""

    def __init__(self, job: LanguageScoringJob, device: str | None = None, threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._job = job
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._data, self._output = open_store(job.data_url), open_store(job.output_url)
        model = load_language_model(job.source.setting, job.source.folder(), dtype=DTYPES[job.dtype])
        self._model = model.to(self._device).requires_grad_(False)
        check_parts(job.source.setting, self._model, job.vocabulary)
        self._head = output_head(self._model, job.vocabulary)
        self._alphabet = Alphabet.read(self._data, "data", job.alphabet) if job.form else None

    def score_shard(self, entry: Entry) -> tuple[Entry, dict[str, Any]]:
        """Scores and commits one shard: its entry, and the seconds and tokens it took; one that stands is kept."""
        job, name = self._job, f"{self._job.folder}/{entry.file}"
        facts: dict[str, Any] = {"seconds": 0.0, "tokens": 0.0}
        if job.codec == "hidden" and entry.file == job.head_with:
            self._commit_head()
        beside = not job.text_logprobs or committed_shard(self._output, self._text_name(entry), job.fingerprint)
        if beside and (standing := committed_shard(self._output, name, job.fingerprint)) is not None:
            return standing, facts
        shard = read_token_shard(self._data, entry)
        started = time.perf_counter()
        try:
            text = ShardText(shard, is_kept=job.text_logprobs, device=self._device)
            made = (self._sparse if job.form else self._whole)(name, shard, text)
        except ValueError as error:
            raise UserError(f"{job.source.setting}: shard {entry.file}: {error}") from None
        return made, {"seconds": time.perf_counter() - started, "tokens": float(len(shard.tokens))}

    def _text_name(self, entry: Entry) -> str:
        return f"{self._job.folder}/{text_shard(entry.file)}"

    def _commit_head(self) -> None:
        name = f"{self._job.folder}/{HEAD}"
        if committed_shard(self._output, name, self._job.fingerprint) is None:
            write_head(self._output, name, self._head, self._job.fingerprint)

    def _batches(self, shard: TokenShard) -> Iterator[tuple[Int64, list[Int64], torch.Tensor]]:
        """Rows about as long, the positions of each that are learnt from, and the hidden states (R, L, D)."""
        budget = self._job.tokens_per_batch or TOKENS_PER_BATCH[self._device.type]
        with torch.inference_mode():
            for rows in pack_by_length(shard.lengths_R, budget):
                inputs = pad([shard.row(int(row)) for row in rows], 0)
                inputs = {name: value.to(self._device) for name, value in inputs.items()}
                yield rows, [shard.positions(int(row)) for row in rows], hidden_states(self._model, inputs)

    def _sparse(self, name: str, shard: TokenShard, text: ShardText) -> Entry:
        """Scores into sparse targets, in the order of the shard's rows."""
        assert self._job.form is not None
        assert self._alphabet is not None
        parts, order = [], []
        for rows, positions, hidden_RLD in self._batches(shard):
            taken = [
                hidden[torch.from_numpy(at).to(self._device)] for hidden, at in zip(hidden_RLD, positions, strict=True)
            ]
            row_ids_N = np.repeat(shard.row_ids_R[rows], [len(at) for at in positions])
            head = text.watched(rows, self._head)
            kept = self._kept(torch.cat(taken), head, row_ids_N, np.concatenate(positions))
            parts.append(kept.to(torch.device("cpu")))
            order.append(rows)
        scored = np.concatenate(order)
        counts = shard.learnt_R[scored]
        begins = np.empty(len(scored), np.int64)
        begins[scored] = np.cumsum(counts) - counts
        places = np.concatenate([np.arange(b, b + n) for b, n in zip(begins, shard.learnt_R, strict=True)])
        targets = SparseTargets.joined(parts).select(torch.from_numpy(places))
        text.commit(self._output, self._job.folder, self._job.fingerprint)
        return write_sparse(
            self._output, name, shard.row_ids_R, shard.learnt_R, targets,
            form=self._job.form, alphabet=self._alphabet, fingerprint=self._job.fingerprint,
        )  # fmt: skip

    def _kept(self, hidden_ND: torch.Tensor, head: Head, row_ids_N: Int64, positions_N: Int64) -> SparseTargets:
        return reduced(
            hidden_ND, head, self._keep,
            row_ids_N=torch.from_numpy(row_ids_N).to(self._device),
            positions_N=torch.from_numpy(positions_N).to(self._device), chunk=chunk_of(self._job.vocabulary),
        )  # fmt: skip

    def _keep(self, logits_CV: torch.Tensor, row_ids_C: torch.Tensor, positions_C: torch.Tensor) -> SparseTargets:
        """What the codec keeps of a chunk."""
        form = self._job.form
        assert form is not None
        try:
            if form.codec == "sampled":
                return sampled_targets(logits_CV, row_ids_C, positions_C, width=form.kept, seed=form.seed)
            if form.codec == "random":
                return drawn_targets(logits_CV, row_ids_C, positions_C, draws=form.kept, seed=form.seed)
            return top_targets(logits_CV, width=form.kept)
        except ValueError as error:
            check_finite(logits_CV, row_ids_C, positions_C)
            raise error

    def _whole(self, name: str, shard: TokenShard, text: ShardText) -> Entry:
        """Scores into hidden states or logits, row by row as they come."""
        job = self._job
        width = job.vocabulary if job.codec == "dense" else self._head.weight_VD.shape[1]
        with whole_writer(self._output, name, job.codec, width) as writer:
            for rows, positions, hidden_RLD in self._batches(shard):
                counts = np.array([len(at) for at in positions])
                kept = torch.zeros(len(rows), int(counts.max()), width, dtype=torch.float32, device=self._device)
                for number, at in enumerate(positions):
                    hidden_ND = hidden_RLD[number, torch.from_numpy(at).to(self._device)]
                    ids = torch.full((len(at),), int(shard.row_ids_R[rows[number]]))
                    check_finite(hidden_ND, ids, torch.from_numpy(at))
                    row = rows[number : number + 1]
                    if job.codec == "hidden":
                        text.watch_hidden(row, hidden_ND, self._head, chunk_of(job.vocabulary))
                        kept[number, : len(at)] = hidden_ND
                    else:
                        kept[number, : len(at)] = self._dense(text.watched(row, self._head), hidden_ND)
                writer.add(shard.row_ids_R[rows], counts, {column_of(job.codec): kept})
            text.commit(self._output, job.folder, job.fingerprint)
            return writer.commit(job.fingerprint)

    @staticmethod
    def _dense(head: Head, hidden_ND: torch.Tensor) -> torch.Tensor:
        logits_NV = head.from_products(head.products(hidden_ND))
        if (largest := logits_NV.abs().max().item()) > FLOAT16_MAX:
            raise ValueError(f"a logit of {largest:.4g} does not fit float16; use teacher.next_tokens.codec=hidden")
        return logits_NV


def check_finite(values_CV: torch.Tensor, row_ids_C: torch.Tensor, positions_C: torch.Tensor) -> None:
    """Raises NotFinite that names the first row and position with a number that is not finite."""
    broken_C = ~torch.isfinite(values_CV).all(dim=-1)
    if broken_C.any():
        first = int(broken_C.nonzero()[0])
        raise NotFinite(
            f"its output for row {int(row_ids_C[first])}, position {int(positions_C[first])} is not finite, like"
            f" {int(broken_C.sum()) - 1} more. Check its weights, or use teacher.dtype=float32"
        )


def sparse_format(settings: Any) -> SparseFormat | None:
    """The format that `teacher.next_tokens` asks for; None of a codec that keeps every token."""
    if settings.codec not in SPARSE:
        return None
    fine = settings.units or max(64, 1 << (3 * settings.kept - 1).bit_length())
    units = {"sampled": fine, "random": settings.kept, "topk": 1}[settings.codec]
    return SparseFormat(settings.codec, settings.kept, units, settings.probabilities, settings.seed)
