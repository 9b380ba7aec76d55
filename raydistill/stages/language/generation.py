"""How fast language models read and write, interleaved on one idle machine, in what memory, and what they write."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from raydistill.data.tokens import load_tokenizer, pack_by_length
from raydistill.models.loading import count_parameters, load_language_model
from raydistill.models.source import ModelSource
from raydistill.stages.forward import DTYPES

WARM_UP = 2
TOKENS_PER_BATCH = 4096  # of prompts and what is written after them


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
        name: load_language_model("evaluate", source.folder(), dtype=DTYPES[dtype]).to(device)
        for name, source in sources.items()
    }
    tokenizer = load_tokenizer(sources["teacher"].folder(), "evaluate", pads=False)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    read: list[int] = []
    written: dict[str, list[float]] = {name: [] for name in models}
    texts: dict[str, list[str]] = {name: [] for name in models}
    with torch.inference_mode():
        for number in range(WARM_UP + requests):
            ids = torch.tensor([rows[number % len(rows)]], device=device)
            if number >= WARM_UP:
                read.append(ids.shape[1])
            for name, model in models.items():
                started = time.perf_counter()
                int(model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].argmax())
                if number >= WARM_UP:
                    seconds[name].append(time.perf_counter() - started)
        for prompt in prompts:
            for name, model in models.items():
                started = time.perf_counter()
                tokens = written_by(model, prompt, new_tokens, tokenizer.pad_token_id)
                written[name].append(time.perf_counter() - started)
                if len(texts[name]) < samples:
                    texts[name].append(
                        tokenizer.decode(up_to(tokens, tokenizer.eos_token_id), skip_special_tokens=True)
                    )
        longest = torch.tensor([max(rows, key=len)], device=device)
        memory = {name: memory_bytes(model, longest) for name, model in models.items()}
    return {
        name: {
            **memory[name],
            "latency_ms_p50": float(np.percentile(seconds[name], 50)) * 1e3,
            "latency_ms_p90": float(np.percentile(seconds[name], 90)) * 1e3,
            "prefill_tokens_per_second": sum(read) / sum(seconds[name]),
            "decode_tokens_per_second": new_tokens * len(prompts) / sum(written[name]),
            "parameters": count_parameters(model),
            "samples": texts[name],
        }
        for name, model in models.items()
    }


def completions(
    model: Any,
    prompts: list[list[int]],
    new_tokens: int,
    *,
    ends: Collection[int],
    pad_id: int | None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[list[int]]:
    """What a model goes on with after each prompt, the likeliest token each time: up to an end, with it, or so many.

    Prompts of about the same length are one batch, padded on the left, where no position and no attention counts it.
    """
    found, spare = list[list[int]]([[]] * len(prompts)), 0 if pad_id is None else pad_id
    lengths_N = np.array([len(prompt) + new_tokens for prompt in prompts], np.int64)
    with torch.inference_mode():
        for batch in pack_by_length(lengths_N, tokens_per_batch) if prompts else []:
            longest = max(len(prompts[row]) for row in batch)
            ids = torch.full((len(batch), longest), spare, device=model.device)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(batch.tolist()):
                start = longest - len(prompts[row])
                ids[place, start:] = torch.tensor(prompts[row])
                mask[place, start:] = 1
            made = model.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=spare,
                eos_token_id=sorted(ends) or -1,
            )  # fmt: skip
            for row, tokens in zip(batch.tolist(), made[:, longest:].tolist(), strict=True):
                length = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
                found[row] = tokens[:length]
    return found


def written_by(model: Any, prompt: list[int], new_tokens: int, pad_id: int | None) -> list[int]:
    """The likeliest next tokens, one after the other; exactly so many, so that models are timed alike."""
    ids = torch.tensor([prompt], device=model.device)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, eos_token_id=-1, do_sample=False,
        pad_token_id=0 if pad_id is None else pad_id,
    )  # fmt: skip
    return made[0, len(prompt) :].tolist()


def up_to(tokens: list[int], end: int | None) -> list[int]:
    """The tokens before the one that ends a text."""
    return tokens[: tokens.index(end)] if end in tokens else tokens


def memory_bytes(model: Any, ids_1L: torch.Tensor) -> dict[str, int]:
    """What a model takes up while it goes on with a row: its weights as they are loaded, and its keys and values."""
    cached = model(input_ids=ids_1L, use_cache=True, logits_to_keep=1).past_key_values
    tensors = [t for layer in getattr(cached, "layers", ()) for t in (layer.keys, layer.values) if t is not None]
    weights = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return {
        "memory_weights_bytes": sum(weights.values()),
        "memory_cache_bytes": sum(t.nbytes for t in tensors),
        "memory_cache_tokens": ids_1L.shape[1],
    }
