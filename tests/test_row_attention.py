"""Attention row by row: the same model, forward and backward, as attention over whole packs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_runs import tiny_language_model
from transformers import AutoConfig

from raydistill.data.packing import pack_inputs
from raydistill.models.row_attention import ARCHITECTURES, NAME, attend_by_rows, row_layout, with_rows
from raydistill.next_token import check_parts, hidden_states

LENGTHS = (9, 7, 6, 8, 9, 5)
PACKS = [[3, 0, 1], [2, 4, 5]]  # of 24 and 20 tokens, so that four places are padding


def packs() -> tuple[dict[str, torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Packed inputs, the rows themselves, and where each token of them stands in the packs laid end to end."""
    random = np.random.default_rng(0)
    rows = [random.integers(3, 60, length).astype(np.int32) for length in LENGTHS]
    inputs, starts = pack_inputs(rows, PACKS)
    places = torch.cat(
        [torch.arange(start, start + len(row)) for start, row in zip(starts.tolist(), rows, strict=True)]
    )
    return inputs, [torch.from_numpy(row).long() for row in rows], places


def gradients(model: Any, hidden_TD: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (hidden_TD * torch.linspace(-1, 1, hidden_TD.numel()).view_as(hidden_TD)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_gradients_are_those_of_one_row_at_a_time(architecture: str, heads: int):
    window = {"sliding_window": None} if architecture == "mistral" else {}
    model = tiny_language_model(architecture, num_key_value_heads=heads, **window).train()
    inputs, rows, places = packs()
    alone_TD = torch.cat([model.model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows])
    expected = gradients(model, alone_TD)
    attend_by_rows(model)
    assert model.config._attn_implementation == NAME
    assert "rows" in with_rows(model, inputs)
    found_TD = hidden_states(model, inputs).flatten(0, 1)[places]
    torch.testing.assert_close(found_TD, alone_TD, atol=1e-4, rtol=1e-4)
    found = gradients(model, found_TD)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name
    check_parts("student", model.eval(), 60)


def test_the_layout_by_hand():
    # Rows of 3 and 2 tokens and one place of padding; then a row of 4 and padding.
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]])
    layout = row_layout(positions)
    assert layout is not None
    assert layout.rows == 3
    assert layout.slot_T.tolist() == [0, 1, 2, 4, 5, 0, 8, 9, 10, 11, 0, 0]
    assert layout.real_T1[:, 0].tolist() == [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0]
    assert layout.token_S.tolist() == [0, 1, 2, 0, 3, 4, 0, 0, 6, 7, 8, 9]
    assert layout.filled_S1[:, 0].tolist() == [1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1]


def test_one_long_row_among_short_ones_is_left_in_its_pack():
    assert row_layout(torch.tensor([[*range(10), *[0, 1] * 10]])) is None


@pytest.mark.parametrize(
    ("architecture", "changes"), [("gpt2", {}), ("gemma2", {}), ("mistral", {"sliding_window": 4})]
)
def test_an_architecture_that_attends_otherwise_stays_as_it_is(architecture: str, changes: dict[str, Any]):
    model = tiny_language_model(architecture, **changes)
    before = model.config._attn_implementation
    attend_by_rows(model)
    assert model.config._attn_implementation == before
    inputs = packs()[0]
    assert with_rows(model, inputs) is inputs


def test_what_is_saved_does_not_name_it(tmp_path: Path):
    model = tiny_language_model()
    attend_by_rows(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation != NAME


def test_padded_rows_are_masked_as_by_transformers():
    model, other = tiny_language_model(), tiny_language_model()
    attend_by_rows(model)
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        found, expected = (m(input_ids=ids, attention_mask=mask).logits[0, 2:] for m in (model, other))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
