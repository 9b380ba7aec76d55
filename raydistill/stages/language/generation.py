"""How fast language models read and write, interleaved on one idle machine, in what memory, and what they write."""

from __future__ import annotations

import time
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


def measure_generation(
    sources: dict[str, ModelSource], rows: list[list[int]], prompts: list[list[int]], *, requests: int, threads: int,
    new_tokens: int, samples: int, dtype: str,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """For every model: ms until a row's next token is known, tokens/s read and written, parameters, memory, samples.

    `rows` are read one at a time and the models take turns, so that a noisy moment meets all of them. Every prompt is
    gone on with greedily, by `new_tokens` tokens; the first `samples` texts are given back, each up to its end.
    """
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = {
        name: source.load_language(DTYPES[dtype]).to("cpu" if source.cpu_only else device)
        for name, source in sources.items()
    }
    tokenizer = load_tokenizer(sources["teacher"].folder(), "evaluate", pads=False)
    with torch.inference_mode():
        seconds = _readings(models, rows, requests)
        written, answers = _writings(models, prompts, new_tokens, len(tokenizer))
        memory = {name: memory_bytes(sources[name], model, max(rows, key=len)) for name, model in models.items()}
    read = sum(len(rows[number % len(rows)]) for number in range(requests))
    return {
        name: {
            **memory[name],
            "latency_ms_p50": float(np.percentile(seconds[name], 50)) * 1e3,
            "latency_ms_p90": float(np.percentile(seconds[name], 90)) * 1e3,
            "prefill_tokens_per_second": read / sum(seconds[name]),
            "decode_tokens_per_second": new_tokens * len(prompts) / written[name],
            "parameters": sources[name].parameters(model),
            "samples": [
                tokenizer.decode(up_to(tokens, tokenizer.eos_token_id), skip_special_tokens=True)
                for tokens in answers[name][:samples]
            ],
        }
        for name, model in models.items()
    }


def _readings(models: dict[str, Any], rows: list[list[int]], requests: int) -> dict[str, list[float]]:
    """Seconds of every request: one row, until its next token is known."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(-WARM_UP, requests):
        for name, model in models.items():
            started = time.perf_counter()
            next_token(model, rows[number % len(rows)])
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _writings(
    models: dict[str, Any], prompts: list[list[int]], new_tokens: int, vocabulary: int
) -> tuple[dict[str, float], dict[str, list[list[int]]]]:
    """Seconds that a model takes for all prompts, and what it writes after each."""
    seconds = dict.fromkeys(models, 0.0)
    answers: dict[str, list[list[int]]] = {name: [] for name in models}
    for prompt in prompts:
        for name, model in models.items():
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
