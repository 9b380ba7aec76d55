"""How fast models answer: single requests one after another, and batches offline, interleaved on one idle machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raydistill.data.tokens import load_tokenizer, pack_by_length, pad, tokenise
from raydistill.models import ModelSource, count_parameters, load_classifier
from raydistill.stages.scoring import DTYPES, TOKENS_PER_BATCH

WARM_UP = 8
ROUNDS = 3  # of batches, the models in turn; the median counts, so that no model pays for being first


@dataclass(frozen=True)
class Loaded:
    """A loaded model and its tokenizer."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class Timed:
    """What answers: one model, or an ensemble, whose models answer one after the other."""

    parts: tuple[Loaded, ...]
    device: torch.device
    max_length: int

    def answer(self, text: str) -> int:
        """The predicted class of one text, as a server would find it: tokenising included."""
        total = 0
        for part in self.parts:
            inputs = part.tokenizer(text, truncation=True, max_length=self.max_length, return_tensors="pt")
            total = total + part.model(**inputs.to(self.device)).logits
        return int(torch.as_tensor(total).argmax())

    @property
    def parameters(self) -> int:
        return sum(count_parameters(part.model) for part in self.parts)


def measure(
    sources: dict[str, tuple[ModelSource, ...]],
    texts: list[str],
    *,
    requests: int,
    threads: int,
    max_length: int,
    dtype: str,
) -> dict[str, dict[str, float]]:
    """p50 and p90 of single requests and rows/s of batches for every model, and its number of parameters.

    The models take turns request by request, so that a noisy moment meets all of them.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {
        name: Timed(tuple(_load(part, device, dtype) for part in parts), device, max_length)
        for name, parts in sources.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for number in range(WARM_UP + requests):
            text = texts[number % len(texts)]
            for name, timed in models.items():
                started = time.perf_counter()
                timed.answer(text)
                if number >= WARM_UP:
                    seconds[name].append(time.perf_counter() - started)
        rates: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(ROUNDS):
            for name, timed in models.items():
                rates[name].append(_throughput(timed, texts))
        return {
            name: {
                "latency_ms_p50": float(np.percentile(seconds[name], 50)) * 1e3,
                "latency_ms_p90": float(np.percentile(seconds[name], 90)) * 1e3,
                "rows_per_second": float(np.median(rates[name])),
                "parameters": timed.parameters,
            }
            for name, timed in models.items()
        }


def _load(source: ModelSource, device: torch.device, dtype: str) -> Loaded:
    folder = source.folder()
    model = load_classifier("evaluate", folder, dtype=DTYPES[dtype]).to(device)
    return Loaded(model, load_tokenizer(folder, "evaluate"))


def _throughput(timed: Timed, texts: list[str]) -> float:
    started = time.perf_counter()
    for part in timed.parts:
        tokens = tokenise(part.tokenizer, texts, timed.max_length)
        for batch in pack_by_length(tokens.lengths_N, TOKENS_PER_BATCH[timed.device.type]):
            inputs = pad([tokens.row(int(i)) for i in batch], part.tokenizer.pad_token_id)
            part.model(**{name: value.to(timed.device) for name, value in inputs.items()}).logits.argmax(dim=-1).cpu()
    return len(texts) / (time.perf_counter() - started)
