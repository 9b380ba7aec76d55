"""Progressive unfreezing: what thaws when, of which students, and the same again after a kill."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_files import checkpoint_weights, equal, points, student_weights
from safetensors.numpy import load_file
from test_training import STEPS
from tiny_models import batch, tiny

from raydistill.config.run import Config
from raydistill.depths import parameter_depths
from raydistill.errors import UserError
from raydistill.stages.unfreezing import thaw_steps

pytestmark = [pytest.mark.xdist_group("small_runs"), pytest.mark.timeout(1800)]

# Depths.

DEBERTA = {
    "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "conv_kernel_size": 3, "norm_rel_ebd": "layer_norm",
}  # fmt: skip
MODERNBERT = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
# By architecture: what makes it, and the depth of what stands outside its 4 layers.
OUTSIDE = {
    "bert": ({}, {"bert.embeddings.": 5, "bert.pooler.": 0, "classifier.": 0}),
    "roberta": ({}, {"roberta.embeddings.": 5, "classifier.": 0}),
    "distilbert": ({}, {"distilbert.embeddings.": 5, "pre_classifier.": 0, "classifier.": 0}),
    "electra": ({"embedding_size": 8}, {"electra.embeddings": 5, "classifier.": 0}),
    "deberta-v2": (
        DEBERTA,
        {
            "deberta.embeddings.": 5, "deberta.encoder.rel_embeddings.": 5, "deberta.encoder.LayerNorm.": 5,
            "deberta.encoder.conv.": 4, "pooler.": 0, "classifier.": 0,
        },
    ),
    "modernbert": (MODERNBERT, {"model.embeddings.": 5, "model.final_norm.": 0, "head.": 0, "classifier.": 0}),
    "gpt2": ({}, {"transformer.wte.": 5, "transformer.wpe.": 5, "transformer.ln_f.": 0, "score.": 0}),
    "mpnet": ({}, {"mpnet.embeddings.": 5, "mpnet.encoder.relative_attention_bias.": 5, "classifier.": 0}),
}  # fmt: skip


@pytest.mark.parametrize("architecture", OUTSIDE)
def test_depths_go_from_the_head_down_to_the_embeddings(architecture: str):
    changes, outside = OUTSIDE[architecture]
    model = tiny(architecture, **changes)
    depths = parameter_depths(model, "train.unfreeze")
    assert set(depths) == {name for name, _ in model.named_parameters()}
    layers = [[name for name in depths if f".{layer}." in name] for layer in range(4)]
    for layer, names in enumerate(layers):
        assert names
        assert {depths[name] for name in names} == {4 - layer}, names
    inside = {name for names in layers for name in names}
    for name in depths.keys() - inside:
        assert depths[name] == next(depth for start, depth in outside.items() if name.startswith(start)), name
    # The probe leaves no trace.
    assert not model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("architecture", OUTSIDE)
def test_what_is_less_deep_needs_no_gradient_of_what_is_deeper(architecture: str):
    changes, _ = OUTSIDE[architecture]
    model = tiny(architecture, **changes)
    depths = parameter_depths(model, "train.unfreeze")
    stack = next(m for _, m in model.named_modules() if type(m).__name__ == "ModuleList" and len(m) == 4)
    goes_back = dict[int, bool]()
    for layer, module in enumerate(stack):
        module.register_forward_hook(
            lambda _module, _inputs, output, layer=layer: goes_back.update(
                {layer: (output[0] if isinstance(output, tuple) else output).requires_grad}
            )
        )
    for trained in range(6):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(depths[name] <= trained)
        model(**batch()).logits.sum().backward()
        assert goes_back == {layer: layer >= 4 - trained for layer in range(4)}


def test_a_tied_parameter_is_as_deep_as_its_deepest_use():
    model = tiny("bert", num_labels=2)
    model.classifier.weight = model.bert.embeddings.token_type_embeddings.weight
    depths = parameter_depths(model, "train.unfreeze")
    assert depths["bert.embeddings.token_type_embeddings.weight"] == 5
    assert "classifier.weight" not in depths


def test_a_model_without_one_stack_of_layers_is_refused():
    with pytest.raises(
        UserError, match=r"^train.unfreeze: AlbertForSequenceClassification has 0 stacks of layers, one"
    ):
        parameter_depths(tiny("albert"), "train.unfreeze")


# Steps.


def test_one_share_is_when_all_train_and_a_list_has_one_for_each_depth():
    depths = {"head": 0, "last": 1, "first": 2, "embeddings": 3}
    assert thaw_steps(0.6, depths, 100) == {"head": 0, "last": 20, "first": 40, "embeddings": 60}
    assert thaw_steps((0.0, 0.29, 0.999), depths, 100) == {"head": 0, "last": 0, "first": 29, "embeddings": 99}
    assert thaw_steps(0.6, {"head": 0, "only": 1}, 10) == {"head": 0, "only": 6}
    assert set(thaw_steps(0.0, depths, 100).values()) == {0}


# Runs. The student has 2 layers, its training 8 steps: layer 1 thaws at step 1, layer 0 at step 3, the rest at step 4.

UNFREEZE = {
    "train.unfreeze": 0.5, "train.log_every": 1, "train.checkpoint_every": 1, "train.warmup": 0.0,
    "train.weight_decay": 0.5, "train.clip": 0.1,
}  # fmt: skip
THAWS = {"bert.encoder.layer.1.": 1, "bert.encoder.layer.0.": 3, "bert.embeddings.": 4}
TAUGHT = {
    "student.hidden_size": 8, "train.loss.features": [{"kind": "hidden_mse"}, {"kind": "embeddings_mse"}],
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ZeRO-1, two shares at once": {"train.deepspeed": {"zero_stage": 1}, "train.unfreeze": [0.125, 0.4, 0.5]},
    "ZeRO-2 with features": {"train.deepspeed": {"zero_stage": 2}, **TAUGHT},
    "ZeRO-3 with features": {"train.deepspeed": {"zero_stage": 3}, **TAUGHT},
    "recomputed activations": {"train.gradient_checkpointing": True},
}


def thaw_of(name: str) -> int:
    return next((step for part, step in THAWS.items() if part in name), 0)


@pytest.fixture(scope="module")
def whole(runs) -> dict[str, tuple[Path, dict[str, Any]]]:
    made = {}
    for kind, changes in KINDS.items():
        made[kind] = runs.trained(UNFREEZE | changes)
        assert made[kind][1]["error"] is None
    return made


@pytest.mark.parametrize("kind", ["plain", "ZeRO-2 with features"])
def test_what_is_frozen_keeps_its_bytes_and_a_killed_training_goes_on_to_the_same(runs, whole, kind: str):
    undisturbed, answer = whole[kind]
    number = answer["operations"].index("rename step-00000003") + 2
    folder, killed = runs.trained(UNFREEZE | KINDS[kind], fault=f"{number}:kill")
    assert killed == {"exit": -9}
    second, third = checkpoint_weights(folder, 2), checkpoint_weights(folder, 3)
    for name, value in second.items():
        if not name.endswith("key.bias"):  # softmax cannot see it
            assert np.array_equal(value, third[name]) == (thaw_of(name) >= 3), name
    assert any("projections" in name for name in second) == ("features" in kind)
    again = runs.run(folder, "train", changes=UNFREEZE | KINDS[kind])
    assert again["error"] is None
    assert next(post["going_on_from"] for post in again["posts"] if "going_on_from" in post) == 3
    assert equal(student_weights(folder), student_weights(undisturbed))
    for step in (STEPS - 1, STEPS):
        names = [f"train/checkpoints/step-{step:08d}/{part}.safetensors" for part in ("model", "optimizer")]
        assert all((folder / name).read_bytes() == (undisturbed / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
def test_zero_and_recomputing_do_not_change_it(whole, kind: str):
    if "features" in kind:
        kind, other = "ZeRO-3 with features", "ZeRO-2 with features"
    else:
        other = "plain"
    ours, theirs = student_weights(whole[kind][0]), student_weights(whole[other][0])
    for name, value in theirs.items():
        if not name.endswith("key.bias"):
            np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("kind", ["plain", "ZeRO-3 with features"])
def test_the_curves_show_how_much_trains_and_how_strongly_each_term_pulls(whole, kind: str):
    folder = whole[kind][0]
    last = load_file(folder / f"train/checkpoints/step-{STEPS:08d}/model.safetensors")
    found = [point["trained_parameters"] for point in points(folder, "train")]
    assert found == [sum(v.size for n, v in last.items() if thaw_of(n) <= step) for step in range(STEPS)]
    terms = ["kl", "cross_entropy", *(["hidden_mse", "embeddings_mse"] if "features" in kind else [])]
    assert all(point[f"grad_norm/{term}"] > 0 for point in points(folder, "train") for term in terms)
    assert all(point["grad_norm"] > 0 for point in points(folder, "train"))


def test_without_it_nothing_is_frozen_and_the_curves_are_what_they_were(runs):
    folder, answer = runs.trained({"train.unfreeze": 0})
    assert answer["error"] is None
    assert equal(student_weights(folder), student_weights(runs.whole))
    assert "trained_parameters" not in points(folder, "train")[0]


def test_a_stage_has_a_schedule_of_its_own_and_the_control_has_the_student_s(runs):
    stages = [{"name": "slow", "epochs": 1}, {"name": "free", "epochs": 1, "unfreeze": 0}]
    changes = {"train.unfreeze": [0.25, 0.5, 0.5], "train.stages": stages, "train.log_every": 1}
    folder = runs.start("train")
    answer = runs.run(folder, "train", "evaluate", changes=changes)
    assert answer["error"] is None
    for role in ("train", "control/train"):
        curves = []
        for stage in ("1-slow", "2-free"):
            lines = (folder / role / f"stages/{stage}/metrics.jsonl").read_text().splitlines()
            curves.append([point for point in map(json.loads, lines) if point["group"] == "train"])
        sizes = [point["trained_parameters"] for point in curves[0]]
        assert sizes[0] < sizes[1] < sizes[2] == sizes[3]
        assert all("trained_parameters" not in point for point in curves[1])


BASE = {"name": "x", "data": {"train": "a", "test": "b"}, "teacher": {"model": "m"}}
FORM = "it should be a share of the training, from 0 to below 1, or a list of rising ones"
ALBERT = {"init": "config", "model_type": "albert", "hidden_size": 16, "num_layers": 3, "num_heads": 2}
ADAPTERS = "train.unfreeze: found with student.lora, whose encoder stays frozen; remove the one or the other"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.unfreeze": 1.0}, f"train.unfreeze: found 1.0 (number); {FORM}"),
        ({"train.unfreeze": [0.1, 1.5, 2]}, f"train.unfreeze: found [0.1, 1.5, 2] (list); {FORM}"),
        ({"train.unfreeze": [0.5, 0.1, 0.6]}, FORM),
        ({"train.unfreeze": []}, FORM),
        ({"train.unfreeze": True}, "train.unfreeze: found true (true/false)"),
        ({"train.unfreeze": [True]}, FORM),
        ({"train.unfreeze": "soon"}, FORM),
        ({"train.unfreeze": {"every": 1}}, FORM),
        ({"train.unfreeze": -0.1}, FORM),
        ({"train.unfreeze": [0.1, 0.2, 0.3, 0.4]},
         "train.unfreeze: found 4 shares, the student has 3 depths below its head: 2 layers, the last one first, and"
         " its embeddings. Give 3, or one share for all"),
        ({"train.unfreeze": [0.1]}, "train.unfreeze: found 1 shares, the student has 3 depths below its head"),
        ({"train.stages": [{"name": "a"}, {"name": "b", "unfreeze": [0.1, 0.2]}]},
         "train.stages[1].unfreeze: found 2 shares, the student has 3 depths"),
        ({"train.stages": [{"name": "a", "unfreeze": 2}]}, f"train.stages.0.unfreeze: found 2 (number); {FORM}"),
        ({"train.unfreeze": 0.5, "student.lora": {"rank": 2}}, ADAPTERS),
        ({"train.stages": [{"name": "a", "unfreeze": 0.5}], "student.lora": {"rank": 2}}, ADAPTERS),
        ({"train.unfreeze": 0.5, "student": ALBERT},
         "train.unfreeze: AlbertForSequenceClassification has 0 stacks of layers, one that transformers shows is"),
    ],
)  # fmt: skip
def test_what_cannot_thaw_is_refused_before_anything_is_written(runs, changes: dict[str, Any], message: str):
    folder, answer = runs.trained(changes)
    assert message in answer["error"]
    assert len(answer["error"].splitlines()) == 1
    assert not (folder / "train").exists()


def test_it_stays_out_of_the_plans_of_runs_without_it_and_determines_those_with_it(runs, whole):
    refused = runs.run(whole["plain"][0], "train", changes={**UNFREEZE, "train.unfreeze": 0.4})
    assert "train.unfreeze: was made with 0.5, now asked for 0.4." in refused["error"]
    plan = json.loads((runs.whole / "train/plan.json").read_text())
    assert not [name for name in plan["inputs"] if "unfreeze" in name]
    assert Config.model_validate({**BASE, "train": {"unfreeze": 0.5}}).train.unfreezes
    assert not Config.model_validate({**BASE, "train": {"unfreeze": 0}}).train.unfreezes
