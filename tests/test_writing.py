"""What a model writes: greedy and drawn tokens against plain loops and plain probabilities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from language_runs import tiny_language_model

from raydistill.models.writing import Sampling, up_to_end, write_tokens

PROMPT = [1, 7, 9, 12]


@pytest.fixture(scope="module")
def model():
    return tiny_language_model(vocabulary=64)


def write(model, prompts, numbers, **changes):
    settings = {
        "answers": 1, "new_tokens": 6, "sampling": Sampling(1.0, 1.0, 0), "ends": [], "vocabulary": 64, **changes,
    }  # fmt: skip
    return write_tokens(model, prompts, numbers, **settings)


def logits_of(model, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokens])).logits[0, -1].double().numpy()


def test_without_a_temperature_the_likeliest_token_follows(model):
    expected = list(PROMPT)
    for _ in range(6):
        expected.append(int(logits_of(model, expected).argmax()))
    assert write(model, [PROMPT], [0], sampling=Sampling(0.0, 1.0, 0)) == [[expected[len(PROMPT) :]]]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (2.0, 0.7)])
def test_tokens_are_drawn_by_their_probabilities(model, temperature: float, top_p: float):
    draws = 4000
    found = write(model, [PROMPT] * draws, range(draws), new_tokens=1, sampling=Sampling(temperature, top_p, 3))
    logits = logits_of(model, PROMPT) / temperature
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    expected = np.zeros_like(p)
    expected[kept] = p[kept] / p[kept].sum()
    counts = np.bincount([answers[0][0] for answers in found], minlength=64)
    assert not counts[expected == 0].any()
    error = np.sqrt(draws * expected * (1 - expected)) + 1e-9
    assert (np.abs(counts - draws * expected) < 5 * error + 1).all()


def test_an_answer_depends_on_seed_prompt_and_its_number_alone(model):
    one = write(model, [PROMPT], [5], answers=3)[0]
    assert write(model, [PROMPT], [5], answers=3)[0] == one
    assert len({tuple(tokens) for tokens in one}) == 3
    torch.manual_seed(1)
    torch.rand(7)
    assert write(model, [PROMPT], [5], answers=3)[0] == one
    assert write(model, [PROMPT], [6], answers=3)[0] != one
    assert write(model, [PROMPT], [5], answers=3, sampling=Sampling(1.0, 1.0, 1))[0] != one


def test_the_models_own_settings_change_nothing(model):
    from transformers import GenerationConfig

    before = write(model, [PROMPT], [5])
    model.generation_config = GenerationConfig(temperature=0.1, top_k=1, repetition_penalty=5.0, do_sample=True)
    assert write(model, [PROMPT], [5]) == before


def test_tokens_that_the_tokenizer_does_not_know_are_never_written(model):
    found = write(model, [PROMPT] * 200, range(200), vocabulary=10, new_tokens=3)
    assert {token for answers in found for tokens in answers for token in tokens} <= set(range(10))


def test_an_answer_ends_with_its_first_end(model):
    free = write(model, [PROMPT] * 50, range(50), new_tokens=8)
    ends = [free[0][0][2], free[1][0][4]]
    for (tokens,), (whole,) in zip(write(model, [PROMPT] * 50, range(50), new_tokens=8, ends=ends), free, strict=True):
        assert tokens == up_to_end(whole, ends)
    assert up_to_end([4, 2, 9, 2], [2, 9]) == [4, 2]
    assert up_to_end([4, 5], [2]) == [4, 5]
    assert up_to_end([], [2]) == []
