"""How language models train: adapters, stages, unfreezing. What they are pruned from is in test_pruned_language.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_runs import mean_nll, tiny_language_model
from run_files import checkpoint_weights, equal, facts, points, student_weights
from safetensors.numpy import load_file
from tiny_models import with_trained_adapters

from raydistill import adapters
from raydistill.config.run import Config
from raydistill.config.student import Lora
from raydistill.models.loading import count_parameters, load_language_model
from raydistill.record.commit import read_manifest
from raydistill.record.store import LocalStore

ARCHITECTURES = ("llama", "qwen2", "gpt2", "gemma2")
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(4, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def trained(architecture: str, **settings: Any) -> Any:
    return with_trained_adapters(tiny_language_model(architecture), **settings)


@every_architecture
def test_adapters_change_nothing_at_first_and_all_that_came_with_the_model_is_frozen(architecture: str):
    plain = tiny_language_model(architecture)
    model = adapters.add_adapters(tiny_language_model(architecture), Lora(), seed=0).get_base_model()
    assert torch.equal(logits(model), logits(plain))
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trains)
    assert len(trains) == 2 * len(adapters.linear_layers(plain))
    frozen = {name.replace(".base_layer", "") for name in adapters.frozen_parameters(model)}
    assert frozen == {name for name, _ in plain.named_parameters(remove_duplicate=False)}


@every_architecture
@pytest.mark.parametrize("also_train", [(), ("norms",)], ids=lambda value: "+".join(value))
def test_a_merged_and_a_saved_adapter_have_its_logits(architecture: str, also_train: tuple[str, ...], tmp_path: Path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    adapted = trained(architecture, also_train=also_train)
    expected = logits(adapted.get_base_model())
    assert not torch.allclose(expected, logits(tiny_language_model(architecture)), atol=1e-2)
    tiny_language_model(architecture).save_pretrained(tmp_path / adapters.BASE)
    adapters.save_adapter(adapted, tmp_path, base=str(tmp_path / adapters.BASE))
    for loaded in (
        load_language_model("student", tmp_path),
        AutoPeftModelForCausalLM.from_pretrained(str(tmp_path)),
        AutoModelForCausalLM.from_pretrained(str(tmp_path)),
    ):
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)
    model = adapters.merged(adapted)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == set(tiny_language_model(architecture).state_dict())


# Runs of the real stages: 42 steps, of which every third leaves a checkpoint.

INITS = {
    "config": {},
    "teacher_layers": {"student": {"init": "teacher_layers", "layers": [1]}},
    "pretrained": {"student": {"init": "pretrained"}},
}


def changes(runs: Any, init: str, **lora: Any) -> dict[str, Any]:
    found = json.loads(json.dumps(INITS[init]))
    if init == "pretrained":
        found["student"]["model"] = str(runs.input / "teacher")
    return {**found, "student.lora": {**LORA, **lora}}


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
@pytest.mark.parametrize("init", INITS)
def test_the_saved_student_is_the_one_that_was_trained(language_runs, init: str, merge: bool):
    folder, answer = language_runs.trained(changes(language_runs, init, merge=merge))
    assert answer["error"] is None
    curve = points(folder, "validation")
    chosen = next(point for point in curve if point["step"] == facts(folder)["step"])
    nll, _ = mean_nll(folder, load_language_model("student", folder / "student"), "validation")
    assert nll == pytest.approx(chosen["nll"], rel=1e-5)
    assert curve[-1]["kl"] < curve[0]["kl"]
    assert facts(folder)["parameters"] == count_parameters(load_language_model("student", folder / "student"))
    names = {path.name for path in (folder / "student").iterdir()}
    assert ({"config.json", "model.safetensors"} <= names) == merge
    assert (adapters.ADAPTER_CONFIG in names) != merge


def test_a_checkpoint_holds_what_trains_and_nothing_else(language_runs):
    folder, answer = language_runs.trained(changes(language_runs, "config", merge=False, also_train=["norms"]))
    assert answer["error"] is None
    base = load_language_model("base", folder / "student" / adapters.BASE)
    norms = [name for name, _ in base.named_parameters() if "norm" in name]
    checkpoint = checkpoint_weights(folder, facts(folder)["steps"])
    assert len(checkpoint) == 2 * len(adapters.linear_layers(base)) + len(norms)
    assert all(".lora_" in name or ".modules_to_save." in name for name in checkpoint)


def test_a_reported_adapter_is_measured_as_it_is_served(language_runs):
    folder = language_runs.start("train")
    asked = changes(language_runs, "config", merge=False) | {"evaluate.control": False}
    answer = language_runs.run(folder, "train", "evaluate", changes=asked)
    assert answer["error"] is None
    report = json.loads((folder / "report/report.json").read_text())
    base = load_language_model("base", folder / "student" / adapters.BASE)
    assert report["student"]["parameters"] == facts(folder)["parameters"] > count_parameters(base)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
def test_a_training_with_adapters_goes_on_after_a_kill_to_the_same_bytes(language_runs, merge: bool):
    asked = changes(language_runs, "teacher_layers", merge=merge)
    whole, folder = language_runs.killed_training(asked, killed=6, goes_on=3)
    names = ["model.safetensors"] if merge else [adapters.ADAPTER_WEIGHTS, f"{adapters.BASE}/model.safetensors"]
    for name in names:
        assert (folder / "student" / name).read_bytes() == (whole / "student" / name).read_bytes()


@pytest.mark.parametrize(
    "how",
    [{"train.gradient_checkpointing": True}, {"train.deepspeed": {"zero_stage": 3}}],
    ids=["recomputed", "ZeRO 3"],
)
def test_how_adapters_are_trained_does_not_change_the_curve(language_runs, how: dict[str, Any]):
    asked = changes(language_runs, "config")
    plain, _ = language_runs.trained(asked)
    folder, answer = language_runs.trained(asked | how)
    assert answer["error"] is None
    ours, theirs = ([point["loss"] for point in points(place, "train")] for place in (folder, plain))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_adapters_that_cannot_be_are_refused_before_anything_is_written(language_runs):
    messages = [
        ({"targets": ["q_prj"]}, "student.lora.targets: 'q_prj' is no linear layer of the student below its head."),
        ({"targets": ["lm_head"]}, "student.lora.targets: 'lm_head' is no linear layer of the student below its head"),
        ({"also_train": ["embeddings"]}, "student.lora.also_train: found embeddings, which are the student's output"),
        ({"quantised": "nf4"}, "student.lora.quantised: nf4 needs the package bitsandbytes, and a GPU. Install it:"),
    ]
    for lora, message in messages:
        folder, answer = language_runs.trained(changes(language_runs, "config", **lora))
        assert message in answer["error"]
        assert "\n" not in answer["error"]
        assert not (folder / "train").exists()


# Stages.

SOFT = {"name": "soft", "epochs": 1}
AGAIN = {"name": "again", "teacher": "previous", "epochs": 1, "loss": {"alpha": 1.0}}
COOLING = {**SOFT, "loss": {"temperature": 3.0, "temperature_end": 1.0}}
GENERATIONS = {
    "teacher.next_tokens": {"codec": "hidden"}, "train.log_every": 1, "train.stages": [COOLING, AGAIN],
}  # fmt: skip


@pytest.fixture(scope="module")
def generations(language_runs) -> tuple[Path, dict[str, Any]]:
    """The teacher's student, then that student's student, which begins as it."""
    folder = language_runs.start("teach")
    answer = language_runs.run(folder, "teach", "train", changes=GENERATIONS)
    assert answer["error"] is None, answer["error"]
    return folder, answer


def test_a_stage_goes_on_from_the_weights_of_the_one_before(language_runs):
    stages = [SOFT, {"name": "more", "epochs": 1, "learning_rate": 2e-3, "loss": {"alpha": 0.5}}]
    folder, answer = language_runs.trained({"train.stages": stages})
    assert answer["error"] is None
    start = {"init": "pretrained", "model": str(folder / "train/stages/1-soft/model")}
    asked = {"student": start, "train.seed": 1, "train.loss": {"alpha": 0.5}, "train.epochs": 1}
    plain, answer = language_runs.trained(asked | {"train.learning_rate": 2e-3})
    assert answer["error"] is None
    assert equal(student_weights(folder), student_weights(plain))


def test_a_generation_learns_from_the_one_before(generations):
    folder, _ = generations
    manifest = read_manifest(LocalStore(str(folder)), "train/stages/2-again/cache")
    assert manifest is not None
    assert manifest.facts["codec"] == "hidden"
    first = points(folder, "train", "train/stages/2-again")[0]
    # It begins as its own teacher, whose hidden states are kept in 16 bits.
    assert abs(first["kl"]) < 1e-3
    assert points(folder, "train", "train/stages/1-soft")[0]["kl"] > 0.01


def test_a_temperature_may_fall_where_the_cache_serves_any(generations):
    found = [point["temperature"] for point in points(generations[0], "train", "train/stages/1-soft")]
    assert (found[0], found[-1]) == (3.0, 1.0)
    assert found == sorted(found, reverse=True)


def test_a_generation_that_was_killed_goes_on_to_the_same_weights(language_runs, generations):
    whole, done = generations
    operations = done["operations"]
    taught = operations.index("rename head.parquet", operations.index("rename head.parquet") + 1)
    for number in (taught + 1, len(operations) - operations[::-1].index("rename step-00000003")):
        folder = language_runs.start("teach")
        assert language_runs.run(folder, "teach", "train", changes=GENERATIONS, fault=f"{number}:kill") == {"exit": -9}
        answer = language_runs.run(folder, "teach", "train", changes=GENERATIONS)
        assert answer["error"] is None
        assert equal(student_weights(folder), student_weights(whole))


BASE = {
    "name": "x", "task": "causal_lm", "data": {"train": "a", "test": "b"}, "teacher": {"model": "m"},
    "student": {"init": "teacher_layers"},
}  # fmt: skip


def test_a_stages_own_loss_has_the_temperature_of_language_models():
    stages = [{"name": "a", "loss": {"alpha": 0.5}}, {"name": "b", "loss": {"kind": "logit_mse"}}]
    train = Config.model_validate({**BASE, "train": {"stages": stages}}).train
    assert [train.of_stage(number).loss.temperature for number in (0, 1)] == [1.0, 4.0]


STAGES_REFUSED = [
    ([SOFT, {"name": "b", "loss": {"kind": "reverse_kl"}}], "train.stages[1].loss: reverse_kl weighs the student by"),
    ([SOFT, {"name": "b", "loss": {"temperature_end": 2.0}}], "train.stages[1].loss.temperature_end: temperature 2: a"),
    ([{"name": "a", "loss": {"features": [{"kind": "hidden_mse"}]}}],
     "train.stages[0].loss.features is not known with task: causal_lm; remove it"),
    ([SOFT, {"name": "b", "metric": "macro_f1"}], "train.stages[1].metric: macro_f1 is of classes"),
    ([{"name": "a", "group_by_length": True}], "train.stages[0].group_by_length is not known with task: causal_lm"),
]  # fmt: skip


@pytest.mark.parametrize(("stages", "message"), STAGES_REFUSED, ids=[str(n) for n in range(len(STAGES_REFUSED))])
def test_a_stage_that_does_not_fit_is_refused_by_its_number(language_runs, stages: list[Any], message: str):
    folder, answer = language_runs.trained({"train.stages": stages})
    assert message in answer["error"]
    assert not (folder / "train").exists()


# Unfreezing: a student of two layers and an output layer of its own, 42 steps.

THAWS = {"model.layers.1.": 7, "model.layers.0.": 14, "embed_tokens": 21}
UNFREEZE = {
    "train.unfreeze": 0.5, "train.log_every": 1, "train.warmup": 0.0, "student.num_layers": 2,
    "student.tie_embeddings": False,
}  # fmt: skip


def thaw_of(name: str) -> int:
    return next((step for part, step in THAWS.items() if part in name), 0)


@pytest.fixture(scope="module")
def unfrozen(language_runs) -> Path:
    folder, answer = language_runs.trained(UNFREEZE)
    assert answer["error"] is None
    assert facts(folder)["steps"] == 42
    return folder


def test_layers_thaw_from_the_last_to_the_first(unfrozen: Path):
    last = load_file(unfrozen / "train/checkpoints/step-00000042/model.safetensors")
    assert any("lm_head" in name for name in last)
    found = [point["trained_parameters"] for point in points(unfrozen, "train")]
    assert found == [sum(v.size for n, v in last.items() if thaw_of(n) <= step) for step in range(42)]


def test_what_is_frozen_keeps_its_bytes_and_a_killed_training_goes_on_to_the_same(language_runs, unfrozen: Path):
    whole, folder = language_runs.killed_training(UNFREEZE, killed=6, goes_on=3)
    assert equal(student_weights(whole), student_weights(unfrozen))
    assert equal(student_weights(folder), student_weights(whole))


def test_a_frozen_layer_has_its_first_bytes_when_it_thaws(language_runs):
    asked = {**UNFREEZE, "train.checkpoint_every": 1}
    _, answer = language_runs.trained(asked)
    number = answer["operations"].index("rename step-00000008") + 2
    folder, killed = language_runs.trained(asked, fault=f"{number}:kill")
    assert killed == {"exit": -9}
    before, after = checkpoint_weights(folder, 7), checkpoint_weights(folder, 8)
    for name, value in before.items():
        assert np.array_equal(value, after[name]) == (thaw_of(name) >= 8), name


def test_more_shares_than_depths_are_refused(language_runs):
    folder, answer = language_runs.trained({**UNFREEZE, "train.unfreeze": [0.1, 0.2]})
    assert "train.unfreeze: found 2 shares, the student has 3 depths below its head: 2 layers" in answer["error"]
    assert not (folder / "train").exists()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_weights_below_the_head_are_asked_for_in_four_bits(monkeypatch: pytest.MonkeyPatch, architecture: str):
    # What is asked of transformers and bitsandbytes, which need a GPU to do it.
    from raydistill.students.quantised import quantised

    model, asked = tiny_language_model(architecture), {}

    def from_pretrained(kind: type, folder: str, **settings: Any) -> str:
        asked.update(settings, kind=kind, files={path.name for path in Path(folder).iterdir()})
        return "loaded"

    monkeypatch.setattr(type(model), "from_pretrained", classmethod(from_pretrained))
    assert quantised(model, torch.device("cuda", 0)) == "loaded"
    how = asked["quantization_config"]
    assert (how.load_in_4bit, how.bnb_4bit_quant_type, how.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert how.bnb_4bit_compute_dtype == torch.bfloat16
    assert how.llm_int8_skip_modules == ["lm_head"]
    assert asked["dtype"] == torch.float32  # norms and what trains as a whole
    assert asked["device_map"] == {"": torch.device("cuda", 0)}
    assert asked["kind"] is type(model)
    assert {"config.json", "model.safetensors"} <= asked["files"]
