"""LoRA students: what trains, what is frozen, what is saved, and that it is what was trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import equal, facts, points, student_weights
from safetensors.torch import load_file
from tiny_models import ENCODERS, LABELS, outputs, tiny, with_trained_adapters

from raydistill import adapters
from raydistill.config.student import Lora, Student
from raydistill.data.shards import read_split
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models.configuration import label_order
from raydistill.models.folders import weight_files
from raydistill.models.loading import count_parameters, load_classifier
from raydistill.models.source import ModelSource
from raydistill.record.commit import read_manifest
from raydistill.record.store import LocalStore
from raydistill.stages.adapted import with_adapters
from raydistill.students.skeleton import student_skeleton

pytestmark = pytest.mark.xdist_group("small_runs")
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
MODERNBERT = {"bos_token_id": 2, "eos_token_id": 2, "cls_token_id": 2, "sep_token_id": 2}
ARCHITECTURES = {**{name: {} for name in ENCODERS}, "modernbert": MODERNBERT}
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def build(architecture: str) -> Any:
    return tiny(architecture, **ARCHITECTURES[architecture])


def trained(architecture: str, **settings: Any) -> Any:
    return with_trained_adapters(build(architecture), **settings)


@every_architecture
def test_adapters_change_nothing_at_first_and_leave_the_encoder_frozen(architecture: str):
    before = outputs(build(architecture))
    model = adapters.add_adapters(build(architecture), Lora(), seed=0).get_base_model()
    assert torch.equal(outputs(model), before)
    head = adapters.head_modules(build(architecture))
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".modules_to_save.")[0] for name in trains if ".lora_" not in name} == set(head)
    plain = dict(build(architecture).named_parameters())
    in_head = {name for name in plain if name.startswith(tuple(f"{part}." for part in head))}
    frozen = adapters.frozen_parameters(model)
    assert len(frozen) == len(plain)
    assert {n.replace(".base_layer", "").replace(".original_module", "") for n in frozen} == set(plain)
    assert len(trains) == len(in_head) + 2 * len(adapters.linear_layers(build(architecture)))


@every_architecture
def test_a_linear_layer_with_an_adapter_is_w_plus_scaled_b_times_a(architecture: str):
    model = trained(architecture, rank=3, alpha=12.0, dropout=0.5).get_base_model().eval()
    name = adapters.linear_layers(build(architecture))[0]
    layer = model.get_submodule(name)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert down.shape[0] == up.shape[1] == 3
    transposed = type(layer.base_layer).__name__ == "Conv1D"  # GPT-2 keeps its weights the other way round
    weight = layer.base_layer.weight.T if transposed else layer.base_layer.weight
    row = torch.randn(2, weight.shape[1])
    bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias
    expected = row @ (weight + 12.0 / 3 * up @ down).T + bias
    torch.testing.assert_close(layer(row), expected, rtol=1e-4, atol=1e-5)


@every_architecture
@pytest.mark.parametrize("also_train", [(), ("norms",), ("norms", "embeddings")], ids=lambda value: "+".join(value))
def test_merged_logits_are_those_of_the_adapters(architecture: str, also_train: tuple[str, ...]):
    adapted = trained(architecture, also_train=also_train)
    expected = outputs(adapted.get_base_model())
    assert not torch.allclose(expected, outputs(build(architecture)), atol=1e-2)
    model = adapters.merged(adapted)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == set(build(architecture).state_dict())


@every_architecture
def test_a_saved_adapter_is_what_peft_and_transformers_load(architecture: str, tmp_path: Path):
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification

    adapted = trained(architecture, also_train=("norms",), targets="all-linear")
    expected = outputs(adapted.get_base_model())
    build(architecture).save_pretrained(tmp_path / adapters.BASE)
    adapters.save_adapter(adapted, tmp_path, base=str(tmp_path / adapters.BASE))
    for loaded in (
        load_classifier("student", tmp_path),
        AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path)),
        AutoModelForSequenceClassification.from_pretrained(str(tmp_path)),
    ):
        torch.testing.assert_close(outputs(loaded), expected, rtol=1e-5, atol=1e-5)
    plain, layers = build(architecture), adapters.linear_layers(build(architecture))
    shapes = [plain.get_submodule(name).weight.shape for name in layers]
    added = sum(8 * sum(shape) for shape in shapes)
    assert count_parameters(load_classifier("student", tmp_path)) == count_parameters(plain) + added


@every_architecture
def test_a_student_that_goes_on_from_an_adapter_begins_with_what_it_had_learned(architecture: str, tmp_path: Path):
    # Adapters were put on the layers of the adapters that stood there.
    adapted = trained(architecture)
    expected = outputs(adapted.get_base_model())
    build(architecture).save_pretrained(tmp_path / adapters.BASE)
    adapters.save_adapter(adapted, tmp_path, base=str(tmp_path / adapters.BASE))
    model = with_adapters(load_classifier("student", tmp_path), Lora(), 1, torch.device("cpu"))
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in adapted.get_base_model().named_parameters()}


def test_an_adapters_files_are_the_same_bytes_each_time(tmp_path: Path):
    # peft itself writes the names of its sets in the order of their hashes.
    written = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        adapters.save_adapter(trained("bert", targets=["query", "value"]), tmp_path / name, base="base")
        written.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert written[0] == written[1]
    facts = json.loads((tmp_path / "one" / adapters.ADAPTER_CONFIG).read_text())
    for names in (facts["target_modules"], facts["modules_to_save"]):
        assert names == sorted(set(names))


def test_targets_are_the_ends_of_names():
    def layers(*targets: str) -> list[str]:
        return adapters.target_layers(tiny("bert"), targets)

    assert layers("query") == [f"bert.encoder.layer.{n}.attention.self.query" for n in range(4)]
    assert layers("0.attention.self.query") == ["bert.encoder.layer.0.attention.self.query"]
    assert len(layers("dense")) == 12  # attention output, intermediate and output; the pooler is of the head
    assert adapters.target_layers(tiny("bert"), "all-linear") == layers("query", "key", "value", "dense")
    for end in ("uery", "encoder.layer", "LayerNorm", "pooler.dense", "classifier"):
        with pytest.raises(UserError, match=rf"student\.lora\.targets: '{end}' is no linear layer"):
            layers(end)


def test_a_target_that_matches_nothing_is_answered_with_names_that_exist():
    with pytest.raises(UserError) as error:
        adapters.target_layers(tiny("bert"), ["query", "valeu"])
    assert "'valeu'" in str(error.value)
    names = str(error.value).partition("such as ")[2].split(", ")
    assert names[0] == "value"
    known = [name for name, module in tiny("bert").named_modules() if isinstance(module, torch.nn.Linear)]
    assert all(any(f".{name}".endswith(f".{end}") for name in known) for end in names)


@pytest.mark.parametrize(
    ("student", "layers"),
    [
        ({"init": "teacher_layers", "layers": (1,)}, 1),
        ({"init": "pretrained", "model": "FOLDER"}, 2),
        ({"init": "config", "hidden_size": 16, "num_layers": 3}, 3),
    ],
    ids=lambda value: value["init"] if isinstance(value, dict) else "",
)
def test_a_skeleton_has_the_students_modules_and_no_weights(tiny_classifier: Path, student: dict, layers: int):
    from raydistill.students.build import build_student

    given = Student(**{name: str(tiny_classifier) if value == "FOLDER" else value for name, value in student.items()})
    where = {"teacher_folder": tiny_classifier, "labels": LABELS, "max_length": 32}
    skeleton = student_skeleton(given, **where)
    built, _ = build_student(given, **where, seed=0)
    assert [name for name, _ in skeleton.named_modules()] == [name for name, _ in built.named_modules()]
    assert len(adapters.target_layers(skeleton, ["query"])) == layers
    assert all(parameter.is_meta for parameter in skeleton.parameters())


# Runs of the real stages. The teacher has 2 layers of width 16; training stops with 8 steps.

INITS = {
    "config": {},
    "teacher_layers": {"student.init": "teacher_layers", "student.layers": [1]},
    "pretrained": {"student.init": "pretrained"},
    # Its first weights are committed before the training and loaded again to save it.
    "trimmed": {"student.init": "pretrained", "student.trim_vocabulary": True},
}


def changes(runs: Any, init: str = "config", **lora: Any) -> dict[str, Any]:
    """Settings of a small run; what the run's own student has, and another kind of student not, is taken back."""
    found = {"student.lora": {**LORA, **lora}, "train.learning_rate": 5e-3, **INITS[init]}
    if init != "config":
        found |= {"student.hidden_size": None, "student.num_layers": None, "student.num_heads": None}
    if init in ("pretrained", "trimmed"):
        found["student.model"] = str(runs.input / "bert")
    return found


def validation_figures(folder: Path, student: Path) -> dict[str, float]:
    """Accuracy and NLL of a finished student on the run's validation rows, one row at a time."""
    store = LocalStore(str(folder))
    data = read_manifest(store, "data")
    assert data is not None
    model, tokenizer = load_classifier("student", student), load_tokenizer(student, "student")
    right, nll, rows = 0, 0.0, 0
    for shard in read_split(store, data.shards("validation")):
        for text, label in zip(shard.texts, shard.labels_N.tolist(), strict=True):
            inputs = tokenizer(text, truncation=True, max_length=48, return_tensors="pt")
            with torch.no_grad():
                logprobs = torch.log_softmax(model(**inputs).logits[0].double(), dim=-1)
            right, nll, rows = right + int(logprobs.argmax() == label), nll - float(logprobs[label]), rows + 1
    return {"accuracy": right / rows, "nll": nll / rows}


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapter"])
@pytest.mark.parametrize("init", INITS)
def test_the_saved_student_is_the_one_that_was_trained(runs, init: str, merge: bool):
    folder, answer = runs.trained(changes(runs, init, merge=merge))
    assert answer["error"] is None
    curve = {point["step"]: point for point in points(folder, "validation")}
    found = validation_figures(folder, folder / "student")
    for name, value in found.items():
        assert value == pytest.approx(curve[facts(folder)["step"]][name], abs=1e-5)
    assert label_order("student", folder / "student", LABELS) == list(range(5))
    assert facts(folder)["parameters"] == count_parameters(load_classifier("student", folder / "student"))
    plain = {"config.json", "model.safetensors"} <= {path.name for path in (folder / "student").iterdir()}
    assert plain == merge
    assert len(weight_files(folder / "student")) == (1 if merge else 2)


def test_an_adapter_is_scored_and_timed_as_it_is_served(runs):
    from raydistill.stages.latency import Load, measure

    folder, _ = runs.trained(changes(runs, merge=False))
    source = ModelSource("the student", "student", store_url=str(folder))
    load = Load(requests=1, rounds=1, threads=1, max_length=48, dtype="bfloat16")
    figures = measure({"student": (source,)}, ["where is my parcel"] * 4, load, "cpu")
    base = load_classifier("base", folder / "student" / adapters.BASE)
    assert figures["student"]["parameters"] == facts(folder)["parameters"] > count_parameters(base)


def test_a_checkpoint_holds_what_trains_and_nothing_else(runs):
    folder, answer = runs.trained(changes(runs, merge=False))
    assert answer["error"] is None
    checkpoint = load_file(folder / "train/checkpoints/step-00000008/model.safetensors")
    moments = load_file(folder / "train/checkpoints/step-00000008/optimizer.safetensors")
    base = load_classifier("base", folder / "student" / adapters.BASE)
    head = tuple(f"{part}." for part in adapters.head_modules(base))
    whole = {name for name in dict(base.named_parameters()) if name.startswith(head)}
    expected = 2 * len(adapters.linear_layers(base)) + len(whole)
    assert len(checkpoint) == expected
    assert all(".lora_" in name or ".modules_to_save." in name for name in checkpoint)
    assert set(moments) == {f"{moment}.{name}" for moment in ("exp_avg", "exp_avg_sq") for name in checkpoint}
    adapter = load_file(folder / "student" / adapters.ADAPTER_WEIGHTS)
    assert len(adapter) == expected


def test_adapters_learn(runs):
    # Nothing but adapters can bring hidden states nearer to the teacher's: encoder and embeddings are frozen.
    settings = {"train.loss.features": [{"kind": "hidden_mse"}], "train.epochs": 25, "train.learning_rate": 0.03}
    folder, answer = runs.trained({**changes(runs, rank=8, alpha=32.0, dropout=0.0), **settings, "train.log_every": 1})
    assert answer["error"] is None
    curve = [point["hidden_mse"] for point in points(folder, "train")]
    assert sum(curve[-8:]) < 0.97 * sum(curve[:8])
    checkpoint = load_file(folder / "train/checkpoints/step-00000100/model.safetensors")
    assert all(value.abs().max() > 0.01 for name, value in checkpoint.items() if ".lora_B." in name)


@pytest.mark.parametrize("init", INITS)
def test_a_training_with_adapters_goes_on_after_a_kill_to_the_same_weights(runs, init: str):
    whole, folder = runs.killed_training(changes(runs, init, also_train=["norms"]))
    assert equal(student_weights(folder), student_weights(whole))


def test_an_adapter_goes_on_after_a_kill_to_the_same_files(runs):
    whole, folder = runs.killed_training(changes(runs, merge=False))
    for name in (adapters.ADAPTER_WEIGHTS, f"{adapters.BASE}/model.safetensors"):
        assert (folder / "student" / name).read_bytes() == (whole / "student" / name).read_bytes()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_adapters_train_alike_at_every_zero_stage(runs, stage: int):
    settings = {**changes(runs), "train.log_every": 1}
    plain, _ = runs.trained(settings)
    folder, answer = runs.trained({**settings, "train.deepspeed": {"zero_stage": stage}})
    assert answer["error"] is None
    expected = [point["loss"] for point in points(plain, "train")]
    assert [point["loss"] for point in points(folder, "train")] == pytest.approx(expected, rel=1e-4)
    for name, value in student_weights(plain).items():
        torch.testing.assert_close(
            torch.from_numpy(student_weights(folder)[name]), torch.from_numpy(value), rtol=1e-3, atol=1e-4
        )


def test_adapters_with_gradient_checkpointing_learn_the_same(runs):
    settings = {**changes(runs), "train.log_every": 1}
    plain, _ = runs.trained(settings)
    folder, answer = runs.trained({**settings, "train.gradient_checkpointing": True})
    assert answer["error"] is None
    expected = [point["loss"] for point in points(plain, "train")]
    assert [point["loss"] for point in points(folder, "train")] == pytest.approx(expected, rel=1e-5)


def test_feature_losses_train_adapters_and_leave_no_trace_in_the_student(runs):
    features = [
        {"kind": "hidden_mse"}, {"kind": "value_relation", "relation_heads": 4, "weight": 1000.0},
        {"kind": "embeddings_cosine"},
    ]  # fmt: skip
    settings = {**changes(runs, dropout=0.0, also_train=["norms", "embeddings"]), "student.hidden_size": 8}
    settings |= {"train.loss.features": features, "train.epochs": 25, "train.log_every": 1}
    settings["train.learning_rate"] = 3e-3
    folder, answer = runs.trained(settings)
    assert answer["error"] is None
    for kind in ("hidden_mse", "value_relation", "embeddings_cosine"):
        curve = [point[kind] for point in points(folder, "train")]
        assert sum(curve[-8:]) < sum(curve[:8]), f"{kind} does not fall"
    names = set(student_weights(folder))
    assert not [name for name in names if "projection" in name or name.startswith("student.") or "lora" in name]
    checkpoint = load_file(next((folder / "train/checkpoints").glob("step-*/model.safetensors")))
    assert any(name.startswith("projections.") for name in checkpoint)
    assert not any("base_layer" in name or "original_module" in name for name in checkpoint)


# Bad input: one line, before anything is written.


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"targets": ["qury"]},
            "student.lora.targets: 'qury' is no linear layer of the student below its head. Use all-",
        ),
        ({"targets": "query"}, "student.lora.targets: found 'query' (text); targets is all-linear or a list of names"),
        ({"targets": []}, "student.lora.targets: found [] (list); a list of targets holds names of layers, at least"),
        ({"rank": 0}, "student.lora.rank: found 0 (number); it should be greater than or equal to 1"),
        ({"quantised": "nf4"}, "student.lora.quantised: nf4 needs the package bitsandbytes, and a GPU. Install it:"),
        ({"quantised": "int3"}, "student.lora.quantised: found 'int3' (text); it should be 'nf4'"),
        ({"also_train": ["biases"]}, "student.lora.also_train"),
        ({"merge": "maybe"}, "student.lora.merge: found 'maybe' (text); it should be true or false"),
    ],
)
def test_adapters_that_cannot_be_are_refused_before_anything_is_written(runs, lora: dict, message: str):
    folder, answer = runs.trained(changes(runs, **lora))
    assert answer["error"] is not None
    assert message in answer["error"]
    assert "\n" not in answer["error"]
    assert not (folder / "train").exists()


def test_quantised_weights_are_refused_with_zero_stage_3_and_without_a_gpu(runs):
    from raydistill.stages.adapted import check_quantising_device
    from raydistill.stages.cluster import Resources

    _, answer = runs.trained({**changes(runs, quantised="nf4"), "train.deepspeed": {"zero_stage": 3}})
    assert "student.lora.quantised: found nf4 with train.deepspeed.zero_stage 3" in answer["error"]
    student = Student(lora=Lora(quantised="nf4"))
    with pytest.raises(UserError, match=r"student\.lora\.quantised: found nf4, which needs a GPU and the cluster has"):
        check_quantising_device(student, Resources(cpus=2, gpus=0, node_cpus=2))
    check_quantising_device(student, Resources(cpus=2, gpus=1, node_cpus=2))
    check_quantising_device(Student(lora=Lora()), Resources(cpus=2, gpus=0, node_cpus=2))


def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"student\.lora: needs the package peft\. Install it: pip install 'raydistill"):
        adapters.check_peft()


def test_an_adapter_as_teacher_or_as_start_is_refused(runs, tmp_path: Path):
    folder, _ = runs.trained(changes(runs, merge=False))
    given = tmp_path / "adapter"
    shutil.copytree(folder / "student", given)
    pretrained = changes(runs, "pretrained") | {"student.model": str(given)}
    _, answer = runs.trained(pretrained)
    assert f"student.model: {given}: holds an adapter, not a whole model. Merge it first" in answer["error"]
    _, answer = runs.trained({"teacher.model": str(given)})
    assert f"teacher.model: {given}: holds an adapter" in answer["error"]


def test_a_run_without_adapters_has_the_plan_that_it_had(runs):
    plan = json.loads((runs.whole / "train/plan.json").read_text())
    assert not [name for name in plan["inputs"] if "lora" in name]
