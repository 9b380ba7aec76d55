"""How fast models answer: single requests one after another, and batches offline, interleaved on one idle machine."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydistill.data.tokens import load_tokenizer, pack_by_length, pad, tokenise
from raydistill.exports.onnx_file import OnnxModel
from raydistill.models.loading import held_bytes
from raydistill.models.source import ModelSource
from raydistill.stages.forward import DTYPES, TOKENS_PER_BATCH

WARM_UP = 8
ROUNDS = 3  # of batches, the models in turn; the median counts, so that no model pays for being first
LENGTHS = 4  # groups of requests by their tokens, about as many in each

Sources = dict[str, tuple[ModelSource, ...]]


@dataclass(frozen=True)
class Load:
    """What is asked of the models: so many rounds of so many single requests, and how."""

    requests: int
    rounds: int
    threads: int
    max_length: int
    dtype: str


class Loaded:
    """A loaded model and its tokenizer. An ONNX file is used as its predict.py does, without transformers."""

    def __init__(self, source: ModelSource, device: torch.device, dtype: str, max_length: int) -> None:
        self.model = source.load(DTYPES[dtype]).to(device)
        self.tokenizer = load_tokenizer(source.folder(), source.setting)
        self.parameters = source.parameters(self.model)
        self.memory_bytes = _memory_bytes(source, self.model)
        self._device, self._max_length = device, max_length
        self._bare = None
        if isinstance(self.model, OnnxModel):
            self._bare = copy.deepcopy(self.tokenizer.backend_tokenizer)
            self._bare.no_padding()
            self._bare.enable_truncation(max_length, direction=self.tokenizer.truncation_side)

    def logits(self, text: str) -> torch.Tensor:
        """(1, K) of one text, as a server would compute them: tokenising included."""
        if self._bare is not None:
            found = self._bare.encode(text)
            return torch.from_numpy(self.model.logits(np.array([found.ids]), np.array([found.attention_mask])))
        inputs = self.tokenizer(text, truncation=True, max_length=self._max_length, return_tensors="pt")
        return self.model(**inputs.to(self._device)).logits


def _memory_bytes(source: ModelSource, model: Any) -> int:
    """Of weights and buffers as they are loaded; of an ONNX file as they are stored."""
    return held_bytes(model) or sum(path.stat().st_size for path in source.weights())


@dataclass(frozen=True)
class Timed:
    """What answers: one model, or an ensemble, whose models answer one after the other."""

    parts: tuple[Loaded, ...]
    device: torch.device
    max_length: int

    def answer(self, text: str) -> int:
        """The predicted class of one text."""
        return int(torch.as_tensor(sum(part.logits(text) for part in self.parts)).argmax())

    def rows_per_second(self, texts: list[str]) -> float:
        """Of texts in batches, offline."""
        started = time.perf_counter()
        for part in self.parts:
            tokens = tokenise(part.tokenizer, texts, self.max_length)
            for batch in pack_by_length(tokens.lengths_N, TOKENS_PER_BATCH[self.device.type]):
                inputs = pad([tokens.row(int(i)) for i in batch], part.tokenizer.pad_token_id)
                inputs = {name: value.to(self.device) for name, value in inputs.items()}
                part.model(**inputs).logits.argmax(dim=-1).cpu()
        return len(texts) / (time.perf_counter() - started)


def timed_device(sources: tuple[ModelSource, ...], asked: str) -> str:
    """Where a model is timed: an exported file where it runs, the others where it is asked for."""
    return "cpu" if any(source.cpu_only for source in sources) else asked


def measure(sources: Sources, texts: list[str], load: Load, device: str) -> dict[str, dict[str, Any]]:
    """Latency of single requests, rows/s of batches, parameters and bytes in memory of every model on a device.

    The models take turns request by request, so that a noisy moment meets all of them, and a round goes over the same
    texts as the one before.
    """
    torch.set_num_threads(load.threads)
    models: dict[str, Timed] = {}
    for name, parts in sources.items():
        place = torch.device(timed_device(parts, device))
        loaded = tuple(Loaded(part, place, load.dtype, load.max_length) for part in parts)
        models[name] = Timed(loaded, place, load.max_length)
    asked = [texts[number % len(texts)] for number in range(load.requests)]
    with torch.inference_mode():
        for text in asked[:WARM_UP]:
            for timed in models.values():
                timed.answer(text)
        seconds = _requests(models, asked, load.rounds)
        rates: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(ROUNDS):
            for name, timed in models.items():
                rates[name].append(timed.rows_per_second(texts))
    first = next(iter(models.values())).parts[0]
    lengths_N = tokenise(first.tokenizer, asked, load.max_length).lengths_N
    return {
        name: {
            **_percentiles(seconds[name]),
            "latency_by_length": by_length(np.tile(lengths_N, load.rounds), seconds[name]),
            "rows_per_second": float(np.median(rates[name])),
            "parameters": sum(part.parameters for part in timed.parts),
            "memory_bytes": sum(part.memory_bytes for part in timed.parts),
            "device": timed.device.type,
        }
        for name, timed in models.items()
    }


def _requests(models: dict[str, Timed], texts: list[str], rounds: int) -> dict[str, npt.NDArray[np.float64]]:
    """Seconds of every request, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for text in texts:
            for name, timed in models.items():
                started = time.perf_counter()
                timed.answer(text)
                seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def _percentiles(seconds: npt.NDArray[np.float64]) -> dict[str, float]:
    return {f"latency_ms_p{share}": float(np.percentile(seconds, share)) * 1e3 for share in (50, 90, 99)}


def by_length(lengths_N: npt.NDArray[np.integer], seconds_N: npt.NDArray[np.float64]) -> list[dict[str, float]]:
    """The median of groups of requests by their tokens, in milliseconds; equal lengths are in one group."""
    ends = sorted({int(np.quantile(lengths_N, (group + 1) / LENGTHS, method="higher")) for group in range(LENGTHS)})
    found, above = [], 0
    for end in ends:
        inside = (lengths_N > above) & (lengths_N <= end)
        p50 = float(np.median(seconds_N[inside])) * 1e3
        found.append({"tokens_above": above, "tokens_to": end, "requests": int(inside.sum()), "latency_ms_p50": p50})
        above = end
    return found
