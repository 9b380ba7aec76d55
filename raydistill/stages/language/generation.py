"""How fast language models read and write, interleaved on one idle machine, in what memory, and what they write."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raydistill.data.tokens import load_tokenizer
from raydistill.exports.onnx_file import OnnxModel
from raydistill.models.loading import held_bytes
from raydistill.models.source import ModelSource
from raydistill.models.writing import completions
from raydistill.stages.forward import DTYPES

WARM_UP = 2


@dataclass(frozen=True)
class Tokens:
    """Rows to read and prompts to go on with, in the tokens of one tokenizer."""

    rows: list[list[int]]
    prompts: list[list[int]]

    def read(self, requests: int) -> int:
        """Tokens of so many rows, taken in turn."""
        return sum(len(self.rows[number % len(self.rows)]) for number in range(requests))


def measure_generation(
    sources: dict[str, ModelSource], texts: dict[str, Tokens], *, requests: int, threads: int, new_tokens: int,
    samples: int, dtype: str,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """For every model: ms until a row's next token is known, tokens/s read and written, parameters, memory, samples.

    Rows are read one at a time and the models take turns, so that a noisy moment meets all of them. Every prompt is
    gone on with greedily, by `new_tokens` tokens; the first `samples` texts are given back, each up to its end. `texts`
    has the teacher's tokens, and under `student` those of all others where they have a tokenizer of their own.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {
        name: source.load_language(DTYPES[dtype]).to("cpu" if source.cpu_only else device)
        for name, source in sources.items()
    }
    known = {name: load_tokenizer(sources[name].folder(), "evaluate", pads=False) for name in texts}
    whose = {name: "student" if name != "teacher" and "student" in texts else "teacher" for name in models}
    of, tokenizers = ({name: found[one] for name, one in whose.items()} for found in (texts, known))
    with torch.inference_mode():
        seconds = _readings(models, of, requests)
        written, answers = _writings(models, of, tokenizers, new_tokens)
        memory = {name: memory_bytes(sources[name], one, max(of[name].rows, key=len)) for name, one in models.items()}
    return {
        name: {
            **memory[name],
            "latency_ms_p50": float(np.percentile(seconds[name], 50)) * 1e3,
            "latency_ms_p90": float(np.percentile(seconds[name], 90)) * 1e3,
            "prefill_tokens_per_second": of[name].read(requests) / sum(seconds[name]),
            "decode_tokens_per_second": new_tokens * len(of[name].prompts) / written[name],
            "parameters": sources[name].parameters(model),
            "samples": [written_text(tokenizers[name], tokens) for tokens in answers[name][:samples]],
        }
        for name, model in models.items()
    }


def _readings(models: dict[str, Any], texts: dict[str, Tokens], requests: int) -> dict[str, list[float]]:
    """Seconds of every request: one row, until its next token is known."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(-WARM_UP, requests):
        for name, model in models.items():
            rows = texts[name].rows
            started = time.perf_counter()
            next_token(model, rows[number % len(rows)])
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _writings(
    models: dict[str, Any], texts: dict[str, Tokens], tokenizers: dict[str, Any], new_tokens: int
) -> tuple[dict[str, float], dict[str, list[list[int]]]]:
    """Seconds that a model takes for all prompts, and what it writes after each."""
    seconds = dict.fromkeys(models, 0.0)
    answers: dict[str, list[list[int]]] = {name: [] for name in models}
    for number in range(len(texts["teacher"].prompts)):
        for name, model in models.items():
            prompt, vocabulary = texts[name].prompts[number], len(tokenizers[name])
            started = time.perf_counter()
            answers[name].append(written_by(model, prompt, new_tokens, vocabulary))
            seconds[name] += time.perf_counter() - started
    return seconds, answers


def next_token(model: Any, row: list[int]) -> int:
    """The likeliest token after a row."""
    ids = torch.tensor([row], device=model.device)
    if isinstance(model, OnnxModel):
        return int(model(ids, torch.ones_like(ids)).logits[0, -1].argmax())
    return int(model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())


def written_by(model: Any, prompt: list[int], new_tokens: int, vocabulary: int) -> list[int]:
    """The likeliest next tokens, one after the other; exactly so many, so that models are timed alike.

    An ONNX file keeps nothing between two tokens, as the program beside it.
    """
    if isinstance(model, OnnxModel):
        made = list(prompt)
        for _ in range(new_tokens):
            made.append(next_token(model, made))
        return made[len(prompt) :]
    return completions(model, [prompt], new_tokens, ends=(), vocabulary=vocabulary)[0]


def written_text(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(up_to(tokens, tokenizer.eos_token_id), skip_special_tokens=True)


def up_to(tokens: list[int], end: int | None) -> list[int]:
    """The tokens before the one that ends a text."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


def memory_bytes(source: ModelSource, model: Any, row: list[int]) -> dict[str, int]:
    """What a model takes up while it goes on with a row: its weights as they are loaded, and its keys and values.

    Of an ONNX file its weights as they are stored; it keeps no keys.
    """
    if isinstance(model, OnnxModel):
        return {"memory_weights_bytes": sum(path.stat().st_size for path in source.weights())}
    ids_1L = torch.tensor([row], device=model.device)
    cached = model(input_ids=ids_1L, use_cache=True, logits_to_keep=1).past_key_values
    tensors = [t for layer in getattr(cached, "layers", ()) for t in (layer.keys, layer.values) if t is not None]
    return {
        "memory_weights_bytes": held_bytes(model),
        "memory_cache_bytes": sum(t.nbytes for t in tensors),
        "memory_cache_tokens": ids_1L.shape[1],
    }
