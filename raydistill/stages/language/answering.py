"""A language model over shards of prompts: each is answered, as often as asked, and its shard of answers committed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raydistill.config.data import Synthesis
from raydistill.data.prompts import StoredPrompt, Written, read_prompts, write_answers
from raydistill.data.token_rows import Answer
from raydistill.data.tokens import load_tokenizer
from raydistill.models.configuration import end_tokens
from raydistill.models.loading import load_language_model
from raydistill.models.source import ModelSource
from raydistill.models.writing import Sampling, write_tokens
from raydistill.record.commit import Entry, committed_shard
from raydistill.record.store import open_store
from raydistill.stages.forward import DTYPES


@dataclass(frozen=True)
class AnsweringJob:
    """Which model answers which prompts how. Every field can be sent to a worker."""

    source: ModelSource
    output_url: str
    folder: str
    fingerprint: str
    settings: Synthesis
    max_length: int
    features: None = None  # of classifiers
    rows: None = None

    def scorer(self, threads: int) -> Answerer:
        return Answerer(self, threads=threads)


class Answerer:
    """A language model in eval mode on its device, for shards of prompts."""

    def __init__(self, job: AnsweringJob, threads: int | None = None) -> None:
        if threads:
            torch.set_num_threads(threads)
        self._job, self._store = job, open_store(job.output_url)
        folder, setting = job.source.folder(), job.source.setting
        self.decoder = Decoder(job.source)
        model = load_language_model(setting, folder, dtype=DTYPES[job.settings.dtype])
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)

    def score_shard(self, entry: Entry) -> tuple[Entry, dict[str, Any]]:
        """Answers and commits one shard: its entry, and the seconds and tokens it took; one that stands is kept."""
        job, name = self._job, f"{self._job.folder}/{entry.file}"
        if (standing := committed_shard(self._store, name, job.fingerprint)) is not None:
            return standing, {"seconds": 0.0, "tokens": 0.0}
        prompts, started = read_prompts(self._store, entry), time.perf_counter()
        written: dict[int, list[Written]] = {}
        for group in batches(prompts, job.settings.prompts_per_batch):
            written |= self._answers(group)
        seconds = time.perf_counter() - started
        made = write_answers(self._store, name, prompts, [written[one.prompt_id] for one in prompts], job.fingerprint)
        tokens = sum(one.tokens for found in written.values() for one in found)
        return made, {"seconds": seconds, "tokens": float(tokens)}

    def _answers(self, group: Sequence[StoredPrompt]) -> dict[int, list[Written]]:
        asked, given = self._job.settings, [one.prompt.tokens_L.tolist() for one in group]
        made = write_tokens(
            self._model, given, [one.prompt_id for one in group], answers=asked.answers,
            new_tokens=new_tokens(asked, len(given[0]), self._job.max_length),
            sampling=Sampling(asked.temperature, asked.top_p, asked.seed), ends=self.decoder.ends,
            vocabulary=self.decoder.vocabulary,
        )  # fmt: skip
        return {
            one.prompt_id: [self.decoder.written(prompt, tokens) for tokens in answers]
            for one, prompt, answers in zip(group, given, made, strict=True)
        }


def new_tokens(asked: Synthesis, prompt_tokens: int, max_length: int) -> int:
    """How many tokens a response may have: as many as asked for, and what the row has room for."""
    return min(asked.max_new_tokens, max_length - prompt_tokens)


def batches(prompts: Sequence[StoredPrompt], size: int) -> Iterator[list[StoredPrompt]]:
    """Prompts of equal length, by length and then in order, at most `size` at once."""
    by_length: dict[int, list[StoredPrompt]] = {}
    for one in prompts:
        by_length.setdefault(len(one.prompt.tokens_L), []).append(one)
    for length in sorted(by_length):
        for start in range(0, len(by_length[length]), size):
            yield by_length[length][start : start + size]


class Decoder:
    """Tokens that a model wrote, as text."""

    def __init__(self, source: ModelSource) -> None:
        self._tokenizer = load_tokenizer(source.folder(), source.setting, pads=False)
        self.ends, self.vocabulary = end_tokens(source.folder(), self._tokenizer.eos_token_id), len(self._tokenizer)

    def written(self, prompt: list[int], tokens: list[int]) -> Written:
        """The text as it goes on from its prompt: some tokenizers leave out a space where a text begins."""
        has_end = bool(tokens) and tokens[-1] in self.ends
        own = tokens[:-1] if has_end else tokens
        before, whole = self._text(prompt), self._text([*prompt, *own])
        text = whole.removeprefix(before) if whole.startswith(before) else self._text(own)
        return Written(Answer(text, has_end), len(tokens))

    def _text(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
