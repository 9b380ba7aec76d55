"""What a causal language model writes to prompts, by transformers' generate, the same whenever it is asked again.

Each token is drawn by a number that is a function of (seed, prompt, answer, position): the first token, in the order of
their ids, up to which the probabilities add up to more than it. Temperature and top-p (Holtzman et al. 2020,
arXiv:1904.09751) are applied before. What remains is that a batch's shape changes the last bits of logits, so that
which prompts are given together is part of what is asked for.

Shapes: B prompts times answers, L tokens of each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raydistill.cache.counter_random import WRITING_STREAM, uniforms
from raydistill.data.tokens import pack_by_length

TOKENS_PER_BATCH = 4096  # of prompts and what is written after them
ANSWER_BITS = 40  # a prompt's number is below 2^40


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0: the likeliest one."""

    temperature: float
    top_p: float
    seed: int


def write_tokens(
    model: Any, prompts: Sequence[Sequence[int]], prompt_ids: Sequence[int], *, answers: int, new_tokens: int,
    sampling: Sampling, ends: Sequence[int], vocabulary: int,
) -> list[list[list[int]]]:  # fmt: skip
    """For each prompt its answers as tokens, at most `new_tokens` each, with the token that ended it, if one did.

    The prompts have the same length. Tokens from `vocabulary` on, of a padded output layer, are never written.
    """
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

    assert len({len(prompt) for prompt in prompts}) == 1, "prompts of several lengths"
    ids_BL = torch.tensor([list(prompt) for prompt in prompts for _ in range(answers)], device=model.device)
    keys_B = torch.tensor(
        [number + (answer << ANSWER_BITS) for number in prompt_ids for answer in range(answers)], device=model.device
    )
    steps = LogitsProcessorList([_Known(vocabulary)])
    if sampling.temperature:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            steps.append(TopPLogitsWarper(sampling.top_p))
        steps.append(_Drawn(keys_B, ids_BL.shape[1], sampling.seed))
    written = _generated(model, ids_BL, torch.ones_like(ids_BL), new_tokens, ends, steps)
    return [written[start : start + answers] for start in range(0, len(written), answers)]


def completions(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    ends: Sequence[int],
    vocabulary: int,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[list[int]]:
    """What a model goes on with after each prompt, the likeliest token each time: up to an end, with it, or so many.

    Prompts of about the same length are one batch, padded on the left, where no position and no attention counts it.
    Tokens from `vocabulary` on, of a padded output layer, are never written.
    """
    from transformers import LogitsProcessorList

    found = list[list[int]]([[]] * len(prompts))
    lengths_N = np.array([len(prompt) + new_tokens for prompt in prompts], np.int64)
    for batch in pack_by_length(lengths_N, tokens_per_batch) if prompts else []:
        longest = max(len(prompts[row]) for row in batch)
        ids_BL = torch.full((len(batch), longest), _pad(ends), device=model.device)
        mask_BL = torch.zeros_like(ids_BL)
        for place, row in enumerate(batch.tolist()):
            start = longest - len(prompts[row])
            ids_BL[place, start:] = torch.tensor(prompts[row])
            mask_BL[place, start:] = 1
        made = _generated(model, ids_BL, mask_BL, new_tokens, ends, LogitsProcessorList([_Known(vocabulary)]))
        for row, tokens in zip(batch.tolist(), made, strict=True):
            found[row] = tokens
    return found


def _generated(
    model: Any, ids_BL: torch.Tensor, mask_BL: torch.Tensor, new_tokens: int, ends: Sequence[int], steps: Any
) -> list[list[int]]:
    """What is written after each row, with the token that ended it, if one did; the steps change its logits."""
    from transformers import GenerationConfig

    # The model's own settings, such as a temperature, are not what was asked for.
    model.generation_config = GenerationConfig()
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=list(ends) or None, pad_token_id=_pad(ends),
        use_cache=True,
    )  # fmt: skip
    with torch.inference_mode():
        made_BL = model.generate(ids_BL, attention_mask=mask_BL, generation_config=settings, logits_processor=steps)
    return [up_to_end(row, ends) for row in made_BL[:, ids_BL.shape[1] :].tolist()]


def _pad(ends: Sequence[int]) -> int:
    return ends[0] if ends else 0


def up_to_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first that ends a text, with it."""
    first = next((place for place, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[: first + 1]


class _Known:
    """A step of transformers' generate: tokens that the tokenizer does not know have no probability."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        scores[:, self._vocabulary :] = float("-inf")
        return scores


class _Drawn:
    """A step of transformers' generate that leaves one token, drawn by its row's number for this position."""

    def __init__(self, keys_B: torch.Tensor, prompt_tokens: int, seed: int) -> None:
        self._keys_B, self._prompt_tokens, self._seed = keys_B, prompt_tokens, seed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = torch.full_like(self._keys_B, input_ids.shape[1] - self._prompt_tokens)
        number_B1 = uniforms(self._seed, self._keys_B, at, stream=WRITING_STREAM)
        sums_BV = scores.double().softmax(dim=-1).cumsum(dim=-1)
        # Sums end a little beside 1; times the last one no number lies beyond all of them.
        chosen_B1 = (sums_BV > number_B1 * sums_BV[:, -1:]).byte().argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen_B1, 0.0)
