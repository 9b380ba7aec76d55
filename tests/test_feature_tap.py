"""The feature tap against what transformers itself gives back, on tiny models of each architecture."""

from __future__ import annotations

import functools
import logging
from typing import Any

import pytest
import torch

from raydistill.feature_tap import ARCHITECTURES, FeatureTap
from raydistill.targets import Features

LAYERS, WIDTH, HEADS, VOCABULARY = 3, 16, 2, 64
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTILBERT = {
    "vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 32,
    "max_position_embeddings": 64, "pad_token_id": 1, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
# name: model_type and what its configuration is told
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", SIZES | NO_DROPOUT),
    "roberta": ("roberta", SIZES | NO_DROPOUT),
    "camembert": ("camembert", SIZES | NO_DROPOUT),
    "xlm-roberta": ("xlm-roberta", SIZES | NO_DROPOUT),
    "electra": ("electra", SIZES | NO_DROPOUT | {"embedding_size": 8}),  # its embeddings are projected before layer 0
    "distilbert": ("distilbert", DISTILBERT),
    "modernbert": (
        "modernbert",
        SIZES | {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
    ),
    "deberta-v2": ("deberta-v2", SIZES | NO_DROPOUT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2-conv": ("deberta-v2", SIZES | NO_DROPOUT | {"conv_kernel_size": 3}),  # between the first two layers
}
every_model = pytest.mark.parametrize("name", MODELS)
ALL = tuple(range(LAYERS))


@functools.cache
def build(name: str, *, kind: str = "AutoModel", seed: int = 0, **options: Any) -> Any:
    import transformers

    model_type, sizes = MODELS[name]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **(sizes | options))
    model = getattr(transformers, kind).from_config(config).eval()
    # Wider than the usual start, so that layers and heads differ clearly.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def batch() -> dict[str, torch.Tensor]:
    """Three rows of 7, 4 and 1 tokens; token 1 is padding."""
    ids = torch.randint(4, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([7, 4, 1])[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def tapped(model: Any, **wanted: Any) -> Features:
    with FeatureTap(model, **wanted) as tap, torch.no_grad():
        model(**batch())
        return tap.take()


def hooks(model: Any) -> int:
    """Hooks of ours and of transformers', which installs its own at the first forward that asks for outputs."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@every_model
@pytest.mark.parametrize("kind", ["AutoModel", "AutoModelForSequenceClassification"])
def test_embeddings_and_hidden_states_are_those_of_transformers(name: str, kind: str):
    model = build(name, kind=kind)
    with torch.no_grad():
        expected = model(**batch(), output_hidden_states=True).hidden_states
    features = tapped(model, embeddings=True, hidden=ALL)
    assert features.embeddings_NLW is not None
    torch.testing.assert_close(features.embeddings_NLW, expected[0], rtol=0, atol=0)
    assert list(features.hidden_NLW) == list(ALL)
    for layer in ALL:
        torch.testing.assert_close(features.hidden_NLW[layer], expected[layer + 1], rtol=0, atol=0)
    assert not any((features.attention_NALL, features.queries_NLW, features.keys_NLW, features.values_NLW))


@every_model
def test_attention_is_that_of_transformers(name: str):
    model = build(name)
    before = model.config._attn_implementation
    features = tapped(model, attention=(0, 2))
    assert model.config._attn_implementation == before
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**batch(), output_attentions=True).attentions
    model.set_attn_implementation(before)
    assert list(features.attention_NALL) == [0, 2]
    for layer in (0, 2):
        torch.testing.assert_close(features.attention_NALL[layer], expected[layer], rtol=0, atol=0)
    real = batch()["attention_mask"].bool()
    sums = features.attention_NALL[2].sum(dim=-1).transpose(1, 2)[real]
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-5, atol=1e-5)
    assert features.embeddings_NLW is None
    assert not features.hidden_NLW


@every_model
def test_projections_are_the_linear_layers_applied_to_their_input(name: str):
    model = build(name)
    architecture = ARCHITECTURES[MODELS[name][0]]
    attention = model.get_submodule(architecture.layers)[1].get_submodule(architecture.attention)
    seen: list[torch.Tensor] = []
    handle = attention.register_forward_pre_hook(
        lambda _module, inputs, named: seen.append(inputs[0] if inputs else named["hidden_states"]), with_kwargs=True
    )
    features = tapped(model, projections=(1,))
    handle.remove()
    names = dict(attention.named_parameters())
    fused = len(architecture.projections) == 1
    for place, found in enumerate((features.queries_NLW, features.keys_NLW, features.values_NLW)):
        assert list(found) == [1]
        path = architecture.projections[0 if fused else place]
        rows = slice(place * WIDTH, (place + 1) * WIDTH) if fused else slice(None)
        expected = seen[0] @ names[f"{path}.weight"].detach()[rows].T
        if f"{path}.bias" in names:
            expected = expected + names[f"{path}.bias"].detach()[rows]
        torch.testing.assert_close(found[1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "camembert", "xlm-roberta", "electra", "distilbert"])
def test_softmax_of_queries_and_keys_is_the_attention(name: str):
    features = tapped(build(name), attention=ALL, projections=ALL)
    real = batch()["attention_mask"].bool()
    depth = WIDTH // HEADS
    for layer in ALL:
        for head in range(HEADS):
            part = slice(head * depth, (head + 1) * depth)
            scores = features.queries_NLW[layer][..., part] @ features.keys_NLW[layer][..., part].mT / depth**0.5
            expected = scores.masked_fill(~real[:, None, :], -torch.inf).softmax(dim=-1)
            torch.testing.assert_close(features.attention_NALL[layer][:, head], expected, rtol=1e-5, atol=1e-6)


@every_model
def test_attention_applied_to_the_values_is_what_the_attention_gives_on(name: str):
    # Ties the captured values to the captured attention in every architecture, rotary and disentangled ones too.
    model = build(name)
    architecture = ARCHITECTURES[MODELS[name][0]]
    attention = model.get_submodule(architecture.layers)[1].get_submodule(architecture.attention)
    last = {"distilbert": "out_lin", "modernbert": "Wo"}.get(name)
    seen: list[torch.Tensor] = []
    if last:
        handle = attention.get_submodule(last).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    else:
        handle = attention.register_forward_hook(lambda _module, _inputs, output: seen.append(output[0]))
    features = tapped(model, attention=(1,), projections=(1,))
    handle.remove()
    values_NALD = features.values_NLW[1].unflatten(2, (HEADS, -1)).transpose(1, 2)
    expected = (features.attention_NALL[1] @ values_NALD).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


@every_model
def test_tapping_changes_no_output_and_leaves_nothing_behind(name: str):
    model = build(name, kind="AutoModelForSequenceClassification")
    with torch.no_grad():
        before = model(**batch()).logits
    count, implementation = hooks(model), model.config._attn_implementation
    with FeatureTap(model, embeddings=True, hidden=ALL, attention=ALL, projections=ALL) as tap, torch.no_grad():
        assert hooks(model) > count
        assert model.config._attn_implementation == "eager"
        torch.testing.assert_close(model(**batch()).logits, before, rtol=1e-4, atol=1e-5)
    assert hooks(model) == count
    assert model.config._attn_implementation == implementation
    with pytest.raises(RuntimeError, match="no forward has run"):
        tap.take()
    with torch.no_grad():
        assert torch.equal(model(**batch()).logits, before)


@every_model
def test_features_carry_gradients_to_the_model_in_training(name: str):
    model = build(name).train()
    with FeatureTap(model, hidden=(1,), attention=(1,), projections=(1,)) as tap:
        model(**batch())
        features = tap.take()
    model.eval()
    architecture = ARCHITECTURES[MODELS[name][0]]
    first = model.get_submodule(architecture.layers)[0]
    captured = (features.hidden_NLW, features.attention_NALL, features.queries_NLW, features.values_NLW)
    for by_layer in captured:
        (by_layer[1] ** 2).sum().backward(retain_graph=True)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in first.parameters())
        model.zero_grad()


def test_only_what_was_asked_for_is_kept():
    features = tapped(build("bert"), hidden=(2, 0, 2))
    assert sorted(features.hidden_NLW) == [0, 2]
    assert features.embeddings_NLW is None


def test_each_forward_has_its_own_features():
    model = build("bert")
    with FeatureTap(model, hidden=(0,)) as tap, torch.no_grad():
        model(**batch())
        first = tap.take()
        model(**{name: value[:1] for name, value in batch().items()})
        second = tap.take()
        with pytest.raises(RuntimeError, match="no forward has run"):
            tap.take()
        model(**batch())
        with pytest.raises(RuntimeError, match="a second forward before take"):
            model(**batch())
    assert (first.hidden_NLW[0].shape[0], second.hidden_NLW[0].shape[0]) == (3, 1)


def test_a_tap_is_opened_once_at_a_time_and_again_afterwards():
    model = build("bert")
    tap = FeatureTap(model, hidden=(0,))
    with tap, pytest.raises(RuntimeError, match="already open"):
        tap.__enter__()
    with tap, torch.no_grad():
        model(**batch())
        assert list(tap.take().hidden_NLW) == [0]


def test_hooks_go_when_the_forward_fails():
    model = build("bert")
    count = hooks(model)

    def fail() -> None:
        with FeatureTap(model, hidden=ALL, attention=(0,)):
            model(input_ids=torch.tensor([[VOCABULARY + 1]]))

    with pytest.raises(IndexError):
        fail()
    assert hooks(model) == count
    assert model.config._attn_implementation == "sdpa"


def test_the_switch_to_eager_attention_is_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="raydistill"):
        tapped(build("bert"), hidden=ALL, projections=ALL)
        assert caplog.text == ""
        tapped(build("bert"), attention=(0,))
    assert "BertModel: attention switched from sdpa to eager while it is tapped" in caplog.text


def test_a_model_that_cannot_be_switched_is_refused(monkeypatch: pytest.MonkeyPatch):
    model = build("bert", seed=1)
    monkeypatch.setattr(model, "set_attn_implementation", lambda _: None)
    with (
        pytest.raises(ValueError, match="cannot be switched from 'sdpa' to 'eager'"),
        FeatureTap(model, attention=(0,)),
    ):
        pass
    assert hooks(model) == 0


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "deberta-v2"])
def test_attention_after_an_active_dropout_is_refused(name: str):
    model = build(
        name, **{"attention_dropout" if name in ("distilbert", "modernbert") else "attention_probs_dropout_prob": 0.1}
    )
    with FeatureTap(model, attention=(0,)) as tap:
        model(**batch())  # in eval mode nothing is dropped
        assert tap.take().attention_NALL
        model.train()
        with pytest.raises(ValueError, match=r"after a dropout of 0\.1 and no longer sums to 1"):
            model(**batch())
        model.eval()
        model(**batch())  # a forward that failed leaves nothing that counts as one
        assert tap.take().attention_NALL


@pytest.mark.parametrize("wanted", [{"attention": (0,)}, {"projections": (0,)}])
def test_the_inside_of_a_checkpointed_layer_is_refused_and_its_hidden_states_are_not(wanted: dict[str, Any]):
    model = build("bert", seed=2).train()
    model.gradient_checkpointing_enable()
    with FeatureTap(model, **wanted), pytest.raises(ValueError, match="Turn it off, or distil hidden states alone"):
        model(**batch())
    with FeatureTap(model, hidden=(0, 2)) as tap:
        model(**batch())
        hidden = tap.take().hidden_NLW
    (hidden[0].sum() + hidden[2].sum()).backward()
    assert model.embeddings.word_embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("wanted", [{"hidden": (3,)}, {"attention": (0, 3)}, {"projections": (3,)}])
def test_a_layer_that_is_not_there_is_refused(wanted: dict[str, Any]):
    with pytest.raises(ValueError, match="BertModel has no layer 3, it has 3, counted from 0 to 2"):
        FeatureTap(build("bert"), **wanted)
    with pytest.raises(ValueError, match="has no layer -1"):
        FeatureTap(build("bert"), hidden=(-1,))


def test_a_tap_for_nothing_is_refused():
    with pytest.raises(ValueError, match="nothing to capture"):
        FeatureTap(build("bert"))


def new_model(model_type: str, **sizes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | sizes))
    return transformers.AutoModel.from_config(config).eval()


def test_an_architecture_without_a_table_gives_hidden_states_and_no_more():
    model = new_model("mpnet")
    with torch.no_grad():
        expected = model(**batch(), output_hidden_states=True).hidden_states
    features = tapped(model, embeddings=True, hidden=ALL)
    assert features.embeddings_NLW is not None
    for found, theirs in zip((features.embeddings_NLW, *features.hidden_NLW.values()), expected, strict=True):
        torch.testing.assert_close(found, theirs, rtol=0, atol=0)
    for wanted in ({"attention": (0,)}, {"projections": (0,)}):
        with pytest.raises(ValueError, match=r"of 'mpnet' are not known\. Supported: bert, camembert, deberta-v2"):
            FeatureTap(model, **wanted)


def test_layers_that_are_one_module_are_refused():
    model = new_model("albert", embedding_size=8)
    with pytest.raises(ValueError, match="'albert' has no one stack of 3 layers"):
        FeatureTap(model, hidden=(0,))
