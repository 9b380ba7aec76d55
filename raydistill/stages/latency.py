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
class Timed:
    """A loaded model and its tokenizer."""

    model: Any
    tokenizer: Any
    device: torch.device
    max_length: int

    def answer(self, text: str) -> int:
        """The predicted class of one text, as a server would find it: tokenising included."""
        inputs = self.tokenizer(text, truncation=True, max_length=self.max_length, return_tensors="pt").to(self.device)
        return int(self.model(**inputs).logits.argmax())


def measure(
    sources: dict[str, ModelSource], texts: list[str], *, requests: int, threads: int, max_length: int, dtype: str
) -> dict[str, dict[str, float]]:
    """p50 and p90 of single requests and rows/s of batches for every model, and its number of parameters.

    The models take turns request by request, so that a noisy moment meets all of them.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {name: _load(source, device, max_length, dtype) for name, source in sources.items()}
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
                "parameters": count_parameters(timed.model),
            }
            for name, timed in models.items()
        }


def _load(source: ModelSource, device: torch.device, max_length: int, dtype: str) -> Timed:
    folder = source.folder()
    model = load_classifier("evaluate", folder, dtype=DTYPES[dtype]).to(device)
    return Timed(model, load_tokenizer(folder, "evaluate"), device, max_length)


def _throughput(timed: Timed, texts: list[str]) -> float:
    started = time.perf_counter()
    tokens = tokenise(timed.tokenizer, texts, timed.max_length)
    for batch in pack_by_length(tokens.lengths_N, TOKENS_PER_BATCH[timed.device.type]):
        inputs = pad([tokens.row(int(i)) for i in batch], timed.tokenizer.pad_token_id)
        timed.model(**{name: value.to(timed.device) for name, value in inputs.items()}).logits.argmax(dim=-1).cpu()
    return len(texts) / (time.perf_counter() - started)
