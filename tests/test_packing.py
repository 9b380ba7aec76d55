"""Packed rows: a language model answers as for one row at a time, next to nothing is padding, every step has rows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language_runs import SIZES, tiny_language_model

from raydistill.data.packing import PADDING, WIDEST, dealt, pack_inputs, packed
from raydistill.data.token_order import token_batches, token_steps
from raydistill.errors import UserError
from raydistill.next_token import check_parts, hidden_states, output_head

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=60)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", SIZES)
def test_packed_rows_have_the_logits_of_one_row_at_a_time(architecture: str, attention: str):
    model = tiny_language_model(architecture)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{architecture} has no sdpa")
    model.set_attn_implementation(attention)
    random = np.random.default_rng(0)
    rows = [random.integers(3, 60, length).astype(np.int32) for length in (9, 3, 6, 1, 12, 5)]
    inputs, starts = pack_inputs(rows, [[3, 0, 1], [2, 4, 5]])
    with torch.no_grad():
        logits = output_head(model, 60).logits(hidden_states(model, inputs).flatten(0, 1))
        for row, start in zip(rows, starts, strict=True):
            alone = model(input_ids=torch.from_numpy(row).long()[None]).logits[0, :, :60]
            assert (logits[start : start + len(row)] - alone).abs().max() <= 1e-4
    check_parts("student", model, 60)


def test_a_model_whose_rows_see_each_other_is_refused(monkeypatch: pytest.MonkeyPatch):
    # As an architecture that makes its mask of its own, whatever the positions say.
    import transformers.models.llama.modeling_llama as modeling

    whole = modeling.create_causal_mask
    monkeypatch.setattr(modeling, "create_causal_mask", lambda **given: whole(**{**given, "position_ids": None}))
    with pytest.raises(UserError, match="student: LlamaForCausalLM attends from one packed row to another"):
        check_parts("student", tiny_language_model(), 60)


def test_a_model_that_looks_ahead_is_refused(monkeypatch: pytest.MonkeyPatch):
    import transformers.models.llama.modeling_llama as modeling
    from transformers.masking_utils import create_bidirectional_mask

    def ahead(config, inputs_embeds, attention_mask, **given):
        return create_bidirectional_mask(config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask)

    monkeypatch.setattr(modeling, "create_causal_mask", ahead)
    model = tiny_language_model()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        check_parts("student", model, 60)


@given(LENGTHS)
def test_packs_hold_every_row_once_and_are_not_too_wide(lengths: list[int]):
    packs = packed(lengths)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    width = max(sum(lengths[index] for index in pack) for pack in packs)
    assert width <= (WIDEST + 1) * max(lengths)


def test_little_of_a_batch_is_padding():
    random = np.random.default_rng(0)
    for draw in (
        random.integers(2, 257, 32),
        random.integers(150, 257, 16),
        np.full(8, 200),
        random.geometric(0.02, 64),
    ):
        lengths = [int(min(length, 256)) for length in draw]
        width = max(sum(lengths[index] for index in pack) for pack in packed(lengths))
        assert 1 - sum(lengths) / (width * len(packed(lengths))) <= PADDING


def test_rows_are_dealt_evenly():
    assert dealt([3, 5, 4, 2, 2], 2) == [[1, 3, 4], [2, 0]]  # 5 + 2 + 2 and 4 + 3
    assert dealt([5], 3) == [[0], [], []]


@given(
    st.lists(st.lists(st.integers(2, 16), min_size=1, max_size=20), min_size=1, max_size=5), st.integers(16, 64),
    st.integers(0, 3),
)  # fmt: skip
def test_an_epoch_has_every_row_once_in_its_number_of_steps(shards: list[list[int]], batch_tokens: int, seed: int):
    lengths = [np.array(shard) for shard in shards]
    found = list(token_batches(lengths, seed=seed, epoch=1, batch_tokens=batch_tokens, window_rows=12))
    total = sum(map(sum, shards))
    assert len(found) == token_steps(total, batch_tokens)
    rows = [tuple(place) for places, _ in found for place in places.tolist()]
    assert sorted(rows) == [(shard, row) for shard, part in enumerate(shards) for row in range(len(part))]
    assert all(len(places) for places, _ in found)
    sizes = [sum(shards[shard][row] for shard, row in places.tolist()) for places, _ in found]
    # An even stretch, and at most one row at each end more or less.
    assert all(abs(size - total / len(found)) <= 32 for size in sizes)
    # Going on in the middle gives the same steps, and other epochs other ones.
    for first in range(len(found)):
        again = list(
            token_batches(lengths, seed=seed, epoch=1, batch_tokens=batch_tokens, window_rows=12, first_step=first)
        )
        assert [places.tolist() for places, _ in again] == [places.tolist() for places, _ in found[first:]]
