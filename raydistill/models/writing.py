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

import torch

from raydistill.cache.counter_random import WRITING_STREAM, uniforms

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
    from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

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
    # The model's own settings, such as a temperature, are not what was asked for.
    model.generation_config = GenerationConfig()
    pad = ends[0] if ends else 0
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=list(ends) or None, pad_token_id=pad, use_cache=True
    )
    with torch.inference_mode():
        made_BL = model.generate(
            ids_BL, attention_mask=torch.ones_like(ids_BL), generation_config=settings, logits_processor=steps
        )
    written = [up_to_end(row, ends) for row in made_BL[:, ids_BL.shape[1] :].tolist()]
    return [written[start : start + answers] for start in range(0, len(written), answers)]


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
