"""Narrower students: what counts as important, which units and heads stay, and that a stock model comes out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ENCODERS, batch, outputs, tiny

from raydistill.errors import UserError
from raydistill.students.blocks import Attention, attention, feed_forward, is_transposed, layers_of
from raydistill.students.importance import head_magnitudes, most_important, taylor, unit_magnitudes
from raydistill.students.width import blocks_to_narrow, narrowed

# Four heads of width 4; in Qwen3 and Mistral two of them share keys and values.
HEADS = {
    name: {"num_attention_heads": 4, **changes}
    for name, changes in {
        "llama": {"num_key_value_heads": 4},
        "qwen2": {"num_key_value_heads": 4},
        "qwen3": {"num_key_value_heads": 2, "head_dim": 4},
        "mistral": {"num_key_value_heads": 2, "head_dim": 4},
        "eurobert": {"num_key_value_heads": 4, "head_dim": 4},
        "nomic_bert": {},
    }.items()
}
SPECIAL = {"bos_token_id": 2, "eos_token_id": 2}
UNITS = {
    **{name: {} for name in ENCODERS},
    "modernbert": {**SPECIAL, "cls_token_id": 2, "sep_token_id": 2},  # gate and values in one
    "phi3": SPECIAL,  # likewise
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, **SPECIAL},
    "gpt_neox": SPECIAL,
    **HEADS,
}
ALL = torch.arange(32)
LAYERS = range(4)
SOME = [torch.tensor(kept) for kept in ([0, 5, 6, 31], [1, 2, 3, 4], [7, 8, 20, 30], [9, 13, 14, 15])]


def teacher(architecture: str) -> Any:
    return tiny(architecture, **UNITS[architecture])


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


LABELS_N = torch.tensor([0, 3, 1, 4, 2, 2])


def rows() -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """The batch's rows one by one, without padding."""
    inputs = batch()
    found = []
    for row, label in enumerate(LABELS_N):
        length = int(inputs["attention_mask"][row].sum())
        found.append(({name: value[row : row + 1, :length] for name, value in inputs.items()}, label[None]))
    return found


def outlet_columns(linear: Any) -> torch.Tensor:
    """A view (in, out) of the weight of a linear layer, of either kind."""
    return linear.weight if is_transposed(linear) else linear.weight.T


def gradient_oracle(model: Any, path: str, parts: int) -> torch.Tensor:
    """Importance (layers, parts) from the weights' gradients: scaling a part is scaling its columns of the outlet."""
    model = copy.deepcopy(model).double().eval()
    found = torch.zeros(4, parts, dtype=torch.float64)
    for inputs, label in rows():
        model.zero_grad()
        loss_sum(model(**inputs).logits, label).backward()
        for layer, module in enumerate(layers_of(model)):
            linear = module.get_submodule(path)
            gradient = linear.weight.grad if is_transposed(linear) else linear.weight.grad.T
            found[layer] += (gradient * outlet_columns(linear)).reshape(parts, -1).sum(dim=1).abs().detach()
    found /= len(rows())
    return found / found.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("architecture", UNITS)
def test_the_importance_of_units_is_the_gradient_of_their_gate(architecture: str):
    model = teacher(architecture)
    block = feed_forward(model)
    assert block.units == 32
    (found,) = taylor(model.double(), [(batch(), LABELS_N)], [block.outlet], loss_sum=loss_sum)
    torch.testing.assert_close(torch.stack(found), gradient_oracle(model, block.down, 32), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("architecture", HEADS)
def test_the_importance_of_heads_is_the_gradient_of_their_mask(architecture: str):
    model = teacher(architecture)
    block = attention(model)
    (found,) = taylor(model.double(), [(batch(), LABELS_N)], [block.outlet], loss_sum=loss_sum)
    torch.testing.assert_close(torch.stack(found), gradient_oracle(model, "self_attn.o_proj", 4), rtol=1e-6, atol=1e-9)


def test_importance_is_the_slope_of_the_loss_over_a_gate():
    # The same by differences, with no autograd at all.
    model = teacher("bert").double()
    (found,) = taylor(model, [(batch(), LABELS_N)], [feed_forward(model).outlet], loss_sum=loss_sum)

    def losses(layer: int, unit: int, gate: float) -> torch.Tensor:
        scaled = copy.deepcopy(model)
        with torch.no_grad():
            scaled.bert.encoder.layer[layer].output.dense.weight[:, unit] *= gate
            return torch.stack([loss_sum(scaled(**inputs).logits, label) for inputs, label in rows()])

    step, units = 1e-5, [0, 7, 31]
    for layer in (0, 3):
        slopes = [losses(layer, unit, 1 + step) - losses(layer, unit, 1 - step) for unit in units]
        expected = torch.stack([slope.abs().mean() / (2 * step) for slope in slopes])
        assert expected.min() > 1e-4
        ratio = found[layer][units] / expected
        torch.testing.assert_close(ratio, ratio[0].expand(3), rtol=1e-5, atol=0.0)


def test_batches_and_padding_do_not_change_importance():
    model = teacher("bert").double()
    outlet = [feed_forward(model).outlet]
    (whole,) = taylor(model, [(batch(), LABELS_N)], outlet, loss_sum=loss_sum)
    (single,) = taylor(model, rows(), outlet, loss_sum=loss_sum)
    inputs = {name: torch.nn.functional.pad(value, (0, 6), value=0) for name, value in batch().items()}
    inputs["input_ids"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 33)
    (padded,) = taylor(model, [(inputs, LABELS_N)], outlet, loss_sum=loss_sum)
    for layer in LAYERS:
        torch.testing.assert_close(single[layer], whole[layer], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(padded[layer], whole[layer], rtol=1e-9, atol=1e-12)


def test_padding_never_counts_even_where_a_loss_reads_it():
    model = teacher("bert").double()
    inputs, block = batch(), feed_forward(model)
    encoder, head = model.bert, model.classifier

    class OverAll(torch.nn.Module):
        """Logits of the mean over all positions, padding among them."""

        def __init__(self) -> None:
            super().__init__()
            self.bert, self.config = encoder, model.config

        def forward(self, **inputs: torch.Tensor) -> Any:
            hidden = self.bert(**inputs).last_hidden_state
            return type("Output", (), {"logits": head(hidden.mean(dim=1))})

    (found,) = taylor(OverAll(), [(inputs, LABELS_N)], [block.outlet], loss_sum=loss_sum)
    seen: list[torch.Tensor] = []

    def keep(_module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        arguments[0].retain_grad()
        seen.append(arguments[0])

    model.requires_grad_(True)
    handles = [layer.output.dense.register_forward_pre_hook(keep) for layer in encoder.encoder.layer]
    loss_sum(OverAll()(**inputs).logits, LABELS_N).backward()
    for handle in handles:
        handle.remove()
    for layer, values in enumerate(seen):
        terms = values.detach() * values.grad
        assert terms[1, 3:].abs().max() > 1e-6  # row 1 has three tokens
        expected = (terms * inputs["attention_mask"][:, :, None]).sum(dim=1).abs().mean(dim=0)
        torch.testing.assert_close(found[layer], expected / expected.norm(), rtol=1e-9, atol=1e-12)


def test_importance_is_the_same_again_and_leaves_the_teacher_as_it_was():
    model = teacher("qwen3").train()
    before = copy.deepcopy(model.state_dict())
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    outlets = [feed_forward(model).outlet, attention(model).outlet]
    first, again = (taylor(model, [(batch(), LABELS_N)], outlets, loss_sum=loss_sum) for _ in range(2))
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_feed_forward_that_runs_in_chunks_is_measured_whole():
    model = teacher("bert")
    (whole,) = taylor(model, [(batch(), LABELS_N)], [feed_forward(model).outlet], loss_sum=loss_sum)
    for layer in layers_of(model):
        layer.chunk_size_feed_forward = 3
    (chunked,) = taylor(model, [(batch(), LABELS_N)], [feed_forward(model).outlet], loss_sum=loss_sum)
    assert all(torch.equal(one, other) for one, other in zip(whole, chunked, strict=True))


def permuted_units(model: Any, order: torch.Tensor) -> Any:
    """The same function with the units of each layer in another order."""
    other = copy.deepcopy(model)
    for layer in layers_of(other):
        with torch.no_grad():
            layer.intermediate.dense.weight.copy_(layer.intermediate.dense.weight[order])
            layer.intermediate.dense.bias.copy_(layer.intermediate.dense.bias[order])
            layer.output.dense.weight.copy_(layer.output.dense.weight[:, order])
    return other


@given(st.permutations(range(32)))
@settings(max_examples=5)
def test_units_in_another_order_have_their_importance_in_that_order(order: list[int]):
    model = teacher("bert").double()
    other, block = permuted_units(model, torch.tensor(order)), feed_forward(model)
    data = [(batch(), LABELS_N)]
    found, moved = (taylor(m, data, [block.outlet], loss_sum=loss_sum)[0] for m in (model, other))
    for layer in LAYERS:
        torch.testing.assert_close(moved[layer], found[layer][order], rtol=1e-9, atol=1e-12)
        size, size_moved = unit_magnitudes(model, block)[layer], unit_magnitudes(other, block)[layer]
        torch.testing.assert_close(size_moved, size[order], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("architecture", HEADS)
def test_heads_in_another_order_have_their_importance_in_that_order(architecture: str):
    model = teacher(architecture).double()
    block = attention(model)
    # Those that share keys and values stay side by side.
    order = [2, 3, 1, 0] if block.key_value_heads == 2 else [2, 0, 3, 1]
    shared = [1, 0] if block.key_value_heads == 2 else order

    def values(heads: list[int]) -> torch.Tensor:
        return (torch.tensor(heads)[:, None] * 4 + torch.arange(4)).flatten()

    other = copy.deepcopy(model)
    for layer in layers_of(other):
        module = layer.self_attn
        with torch.no_grad():
            for name, heads in (("q_proj", order), ("k_proj", shared), ("v_proj", shared)):
                linear = getattr(module, name)
                linear.weight.copy_(linear.weight[values(heads)])
                if linear.bias is not None:
                    linear.bias.copy_(linear.bias[values(heads)])
            module.o_proj.weight.copy_(module.o_proj.weight[:, values(order)])
    torch.testing.assert_close(outputs(other), outputs(model), rtol=1e-9, atol=1e-9)
    data = [(batch(), LABELS_N)]
    found, moved = (taylor(m, data, [block.outlet], loss_sum=loss_sum)[0] for m in (model, other))
    for layer in LAYERS:
        torch.testing.assert_close(moved[layer], found[layer][order], rtol=1e-7, atol=1e-9)
        size, size_moved = head_magnitudes(model, block)[layer], head_magnitudes(other, block)[layer]
        torch.testing.assert_close(size_moved, size[order], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "modernbert", "qwen3"])
def test_units_that_hardly_reach_the_rest_go_first(architecture: str, importance: str):
    model = teacher(architecture)
    block = feed_forward(model)
    for layer, kept in zip(layers_of(model), SOME, strict=True):
        others = [unit for unit in range(32) if unit not in kept.tolist()]
        with torch.no_grad():
            outlet_columns(layer.get_submodule(block.down))[others] *= 1e-5
    if importance == "taylor":
        (found,) = taylor(model, [(batch(), LABELS_N)], [block.outlet], loss_sum=loss_sum)
    else:
        found = unit_magnitudes(model, block)
    assert [most_important(values, 4).tolist() for values in found] == [kept.tolist() for kept in SOME]


def test_the_size_of_a_unit_is_what_goes_in_times_what_comes_out():
    model = teacher("modernbert")
    found = unit_magnitudes(model, feed_forward(model))
    for layer, module in enumerate(layers_of(model)):
        into, out = module.mlp.Wi.weight.tolist(), module.mlp.Wo.weight.T.tolist()
        sizes = [
            sum(w * w for w in into[unit]) ** 0.5
            * sum(w * w for w in into[unit + 32]) ** 0.5
            * sum(w * w for w in out[unit]) ** 0.5
            for unit in range(32)
        ]
        length = sum(size * size for size in sizes) ** 0.5
        assert found[layer].tolist() == pytest.approx([size / length for size in sizes], rel=1e-9)


def test_the_size_of_a_head_is_its_values_times_its_output():
    model = teacher("qwen2")  # with biases
    found = head_magnitudes(model, attention(model))
    for layer, module in enumerate(layers_of(model)):
        values, bias = module.self_attn.v_proj.weight.tolist(), module.self_attn.v_proj.bias.tolist()
        out = module.self_attn.o_proj.weight.T.tolist()
        sizes = []
        for head in range(4):
            own = range(4 * head, 4 * head + 4)
            into = sum(w * w for place in own for w in (*values[place], bias[place]))
            sizes.append((into * sum(w * w for place in own for w in out[place])) ** 0.5)
        length = sum(size * size for size in sizes) ** 0.5
        assert found[layer].tolist() == pytest.approx([size / length for size in sizes], rel=1e-9)


def test_a_unit_that_nothing_comes_out_of_has_no_size():
    model = teacher("bert")
    with torch.no_grad():
        layers_of(model)[2].output.dense.weight.zero_()
    assert torch.equal(unit_magnitudes(model, feed_forward(model))[2], torch.zeros(32, dtype=torch.float64))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_the_most_important_parts_are_kept_and_of_equals_the_first(values: list[int], data: st.DataObject):
    count = data.draw(st.integers(1, len(values)))
    expected = sorted(sorted(range(len(values)), key=lambda part: (-values[part], part))[:count])
    assert most_important(torch.tensor(values, dtype=torch.float64), count).tolist() == expected


@given(st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(1, 4))
def test_of_each_group_as_many_are_kept(values: list[list[int]], each: int):
    flat = torch.tensor(values, dtype=torch.float64).flatten()
    kept = most_important(flat, each * len(values), groups=len(values)).tolist()
    for group, own in enumerate(values):
        expected = most_important(torch.tensor(own, dtype=torch.float64), each).tolist()
        assert [part - 4 * group for part in kept if part // 4 == group] == expected


@pytest.mark.parametrize("architecture", UNITS)
def test_a_student_that_keeps_all_is_the_teacher(architecture: str):
    model = teacher(architecture)
    heads = [torch.arange(4)] * 4 if architecture in HEADS else None
    assert torch.equal(outputs(narrowed(model, units=[ALL] * 4, heads=heads)), outputs(model))


def without_outlets(model: Any, path: str, width: int, kept: list[torch.Tensor]) -> Any:
    """The teacher whose other units or heads give nothing."""
    other = copy.deepcopy(model)
    for layer, of_layer in zip(layers_of(other), kept, strict=True):
        columns = outlet_columns(layer.get_submodule(path))
        gone = [c for c in range(len(columns)) if c // width not in of_layer.tolist()]
        with torch.no_grad():
            columns[gone] = 0.0
    return other


@pytest.mark.parametrize("architecture", UNITS)
def test_a_narrower_student_is_the_teacher_whose_other_units_give_nothing(architecture: str, tmp_path: Path):
    from transformers import AutoModelForSequenceClassification

    model = teacher(architecture).double()
    expected = outputs(without_outlets(model, feed_forward(model).down, 1, SOME))
    assert not torch.allclose(expected, outputs(model), atol=1e-3)
    student = narrowed(model, units=SOME).double()
    torch.testing.assert_close(outputs(student), expected, rtol=1e-9, atol=1e-9)
    narrowed(teacher(architecture), units=SOME).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert feed_forward(loaded).units == 4
    assert all(torch.equal(value.double(), student.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("architecture", HEADS)
def test_a_student_with_fewer_heads_is_the_teacher_whose_other_heads_give_nothing(architecture: str, tmp_path: Path):
    from transformers import AutoModelForSequenceClassification

    model = teacher(architecture).double()
    kept = [torch.tensor(heads) for heads in ([0, 2], [1, 3], [0, 3], [1, 2])]
    expected = outputs(without_outlets(model, "self_attn.o_proj", 4, kept))
    assert not torch.allclose(expected, outputs(model), atol=1e-3)
    student = narrowed(model, heads=kept).double()
    torch.testing.assert_close(outputs(student), expected, rtol=1e-9, atol=1e-9)
    narrowed(teacher(architecture), heads=kept).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert attention(loaded) == Attention("self_attn", 2, 2, 4)
    assert all(torch.equal(value.double(), student.state_dict()[name]) for name, value in loaded.state_dict().items())


NO_HEADS = ["bert", "roberta", "distilbert", "electra", "deberta-v2", "gpt2", "modernbert", "phi3", "opt", "gpt_neox"]


@pytest.mark.parametrize("architecture", NO_HEADS)
def test_fewer_heads_are_refused_where_no_configuration_can_say_so(architecture: str):
    message = rf"student\.num_heads: transformers cannot load a {architecture} with fewer heads .*leave num_heads out"
    with pytest.raises(UserError, match=message):
        blocks_to_narrow(teacher(architecture), units=None, heads=1)
    assert blocks_to_narrow(teacher(architecture), units=32, heads=2) == (None, None)  # nothing goes


def test_heads_that_work_in_pairs_are_refused():
    model = tiny("diffllama", num_attention_heads=4, num_key_value_heads=4)
    with pytest.raises(UserError, match=r"student\.num_heads: transformers cannot load a diffllama"):
        blocks_to_narrow(model, units=None, heads=2)


@pytest.mark.parametrize(
    ("architecture", "units", "heads", "message"),
    [
        ("bert", 33, None, "student.feed_forward: found 33, the teacher's layers have 32 units. Give at most 32"),
        ("bert", None, 3, "student.num_heads: found 3, the teacher has 2. Give at most 2"),
        (
            "qwen3", None, 3, "student.num_heads: found 3, the teacher's 4 heads share 2 keys and values, of which"
            " each keeps as many. Give a multiple of 2",
        ),
    ],
)  # fmt: skip
def test_numbers_that_the_teacher_does_not_have_are_refused(architecture, units, heads, message: str):
    with pytest.raises(UserError) as refused:
        blocks_to_narrow(teacher(architecture), units=units, heads=heads)
    assert str(refused.value) == message


def test_a_number_of_heads_that_a_configuration_does_not_take_is_refused():
    model = teacher("llama")
    with pytest.raises(UserError, match=r"student: a llama cannot .* 3 heads .*\(The hidden size \(16\) is not a mul"):
        narrowed(model, heads=[torch.arange(3)] * 4)


def test_a_feed_forward_that_is_not_known_is_refused():
    with pytest.raises(UserError, match=r"student\.feed_forward: MixtralFor.* has no feed-forward that is known"):
        blocks_to_narrow(tiny("mixtral", num_key_value_heads=2), units=4, heads=None)


def test_an_architecture_with_more_of_the_same_size_is_refused():
    model = tiny("mobilebert", embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2)
    with pytest.raises(UserError, match=r"student: a mobilebert cannot .*\(more of its weights have them"):
        narrowed(model, units=SOME)


def test_gradients_that_are_not_finite_are_refused():
    model = teacher("bert")
    with torch.no_grad():
        model.classifier.bias[0] = torch.inf
    with pytest.raises(UserError, match=r"student\.importance: taylor: .* not finite\. Use student\.importance=magni"):
        taylor(model, [(batch(), LABELS_N)], [feed_forward(model).outlet], loss_sum=loss_sum)
