"""Students of some layers, heads and units of their teacher, by the config: what is kept, made once, refused."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import ENCODERS, LABELS, outputs, tiny

from raydistill.config.student import Student
from raydistill.data.shards import DataShard
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.losses.layer_maps import layer_map
from raydistill.models.loading import load_classifier
from raydistill.students.build import build_student, needs_rows, student_shape
from raydistill.students.kept import cross_entropy_sum, drawn_rows
from raydistill.students.layers import chosen_layers
from raydistill.students.sketch import sketch
from raydistill.tickets import CATEGORIES

LAYERED = {"init": "teacher_layers", "dropout": 0.1}


@given(st.integers(1, 40), st.data())
def test_layers_by_a_rule_are_what_the_layer_maps_say(count: int, data: st.DataObject):
    number = data.draw(st.integers(1, count))
    assert chosen_layers("first", number, count) == list(range(count))[:number]
    assert chosen_layers("last", number, count) == [teacher for _, teacher in layer_map("last", number, count)]
    uniform = chosen_layers("uniform", number, count)
    assert uniform == [teacher for _, teacher in layer_map("uniform", number, count)]
    assert uniform == sorted(set(uniform))
    assert len(uniform) == number
    assert uniform[-1] == count - 1
    if number > 1:
        assert uniform[0] == 0
        gaps = np.diff(uniform)
        assert gaps.max() - gaps.min() <= 1


def test_layers_by_a_rule_for_known_numbers():
    assert chosen_layers("uniform", 4, 12) == [0, 4, 7, 11]
    assert chosen_layers("uniform", 1, 12) == [11]
    assert chosen_layers(None, None, 12) == [1, 3, 5, 7, 9, 11]
    with pytest.raises(UserError, match=r"student\.num_layers: found 13, the teacher has 12 layers\. Give at most 12"):
        chosen_layers("first", 13, 12)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> dict[str, Path]:
    """Folders of teachers with four layers and outputs in the order of the data's labels."""
    shapes: dict[str, Any] = {**ENCODERS, "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}}
    folders = {}
    for architecture, changes in shapes.items():
        folders[architecture] = tmp_path_factory.mktemp("teachers") / architecture
        names = {"id2label": dict(enumerate(LABELS)), "vocab_size": 200, "pad_token_id": 0}
        tiny(architecture, **changes, **names).save_pretrained(folders[architecture])
        load_tokenizer(tiny_encoder, "x").save_pretrained(folders[architecture])
    return folders


def shards_of(texts: list[str], labels: list[int], size: int = 20) -> list[DataShard]:
    return [
        DataShard(
            f"train-{n:05d}", np.arange(n, n + size), texts[n : n + size], np.array(labels[n : n + size], np.int32)
        )
        for n in range(0, len(texts), size)
    ]


@pytest.fixture(scope="module")
def shards(ticket_csvs: tuple[Path, Path], ticket_texts: list[str]) -> list[DataShard]:
    with ticket_csvs[0].open(encoding="utf-8", newline="") as file:
        labels = [sorted(CATEGORIES).index(row["category"]) for row in csv.DictReader(file)]
    return shards_of(ticket_texts[:90], labels[:90])


def built(folder: Path, shards: list[DataShard] | None = None, seed: int = 0, **settings: Any) -> Any:
    student = Student(**LAYERED, **settings)
    assert needs_rows(student) == (shards is not None)
    rows = None if shards is None else lambda: iter(shards)
    return build_student(student, teacher_folder=folder, labels=LABELS, max_length=32, seed=seed, rows=rows)[0]


@pytest.mark.parametrize("architecture", [*ENCODERS, "qwen3"])
@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_a_student_is_as_wide_as_asked_and_as_its_sketch(teachers, shards, architecture: str, importance: str):
    settings = {"layers": "uniform", "num_layers": 2, "feed_forward": 9, "importance": importance}
    settings |= {"num_heads": 2} if architecture == "qwen3" else {}
    student = built(teachers[architecture], shards if importance == "taylor" else None, **settings)
    skeleton = sketch(Student(**LAYERED, **settings), teachers[architecture])
    assert {n: v.shape for n, v in skeleton.state_dict().items()} == {
        n: v.shape for n, v in student.state_dict().items()
    }
    assert next(skeleton.parameters()).device.type == "meta"
    shapes = {tuple(parameter.shape) for parameter in student.parameters()}
    assert (9, 16) in shapes or (16, 9) in shapes
    assert not any(32 in shape for shape in shapes)
    shape = student_shape(Student(**LAYERED, **settings), teachers[architecture])
    assert (shape.layers, shape.width) == (2, 16)
    assert shape.heads == student.config.num_attention_heads == 2
    assert outputs(student).isfinite().all()


def test_all_units_and_layers_are_the_teacher(teachers, shards):
    student = built(teachers["qwen3"], shards, layers=[0, 1, 2, 3], feed_forward=32, num_heads=4)
    assert torch.equal(outputs(student), outputs(load_classifier("x", teachers["qwen3"])))


def expected_parts(folder: Path, shards: list[DataShard], stack: str, outlet: str, parts: int) -> torch.Tensor:
    """Importance (layers, parts) by the gradients of the outlets' columns, one row at a time."""
    teacher, tokenizer = load_classifier("x", folder).double(), load_tokenizer(folder, "x")
    sums = torch.zeros(4, parts, dtype=torch.float64)
    for shard in shards:
        for text, label in zip(shard.texts, shard.labels_N, strict=True):
            encoded = tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
            logits = teacher(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits
            teacher.zero_grad()
            torch.nn.functional.cross_entropy(logits, torch.tensor([int(label)])).backward()
            for number, layer in enumerate(teacher.get_submodule(stack)):
                weight = layer.get_submodule(outlet).weight
                sums[number] += (weight.grad * weight).T.reshape(parts, -1).sum(dim=1).abs().detach()
    return sums


def test_the_units_that_matter_to_the_rows_of_train_are_kept(teachers, shards):
    student = built(teachers["bert"], shards, layers=[1, 3], feed_forward=7)
    teacher = load_classifier("x", teachers["bert"])
    found = expected_parts(teachers["bert"], shards, "bert.encoder.layer", "output.dense", 32)
    units = [sorted(sorted(range(32), key=lambda unit: -float(values[unit]))[:7]) for values in found]
    for layer, place in zip(student.bert.encoder.layer, (1, 3), strict=True):
        theirs = teacher.bert.encoder.layer[place]
        assert torch.equal(layer.intermediate.dense.weight, theirs.intermediate.dense.weight[units[place]])
        assert torch.equal(layer.intermediate.dense.bias, theirs.intermediate.dense.bias[units[place]])
        assert torch.equal(layer.output.dense.weight, theirs.output.dense.weight[:, units[place]])
        assert torch.equal(layer.output.dense.bias, theirs.output.dense.bias)
    again = built(teachers["bert"], shards, layers=[1, 3], feed_forward=7)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True))


def test_of_heads_that_share_keys_and_values_as_many_are_kept(teachers, shards):
    student = built(teachers["qwen3"], shards, layers=[0, 1, 2, 3], num_heads=2)
    teacher = load_classifier("x", teachers["qwen3"])
    found = expected_parts(teachers["qwen3"], shards, "model.layers", "self_attn.o_proj", 4)
    assert not all(set(values.topk(2).indices.tolist()) & {0, 1} for values in found)  # two of one pair
    for layer, theirs, values in zip(student.model.layers, teacher.model.layers, found, strict=True):
        heads = [int(values[:2].argmax()), 2 + int(values[2:].argmax())]
        places = [4 * head + place for head in heads for place in range(4)]
        assert torch.equal(layer.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight[places])
        assert torch.equal(layer.self_attn.o_proj.weight, theirs.self_attn.o_proj.weight[:, places])
        assert torch.equal(layer.self_attn.k_proj.weight, theirs.self_attn.k_proj.weight)
        assert torch.equal(layer.self_attn.v_proj.weight, theirs.self_attn.v_proj.weight)


def rows_drawn(shards: list[DataShard], count: int, seed: int, order: list[int]) -> list[tuple[Any, int]]:
    """What was drawn: each row's words and its label as a number of the teacher's outputs."""

    class Letters:
        """One token a row, the number that the text is."""

        pad_token_id = 0

        def __call__(self, chunk: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[int(text)] * (1 + int(text) % 3) for text in chunk]}

    def rows() -> Iterator[DataShard]:
        return iter(shards)

    found = []
    for inputs, labels in drawn_rows(rows, count, seed=seed, tokenizer=Letters(), max_length=8, order=order):
        found += zip(inputs["input_ids"][:, 0].tolist(), labels.tolist(), strict=True)
    return found


def test_rows_are_drawn_evenly_by_seed_and_keep_their_labels():
    # A file sorted by label: its first rows know one of them.
    texts, labels = [str(n) for n in range(1, 101)], [n // 20 for n in range(100)]
    shards, order = shards_of(texts, labels, size=16), [3, 0, 4, 1, 2]
    drawn = rows_drawn(shards, 30, 0, order)
    assert len({row for row, _ in drawn}) == 30
    assert all(label == order[(row - 1) // 20] for row, label in drawn)
    assert {label for _, label in drawn} == set(range(5))
    assert drawn == rows_drawn(shards, 30, 0, order)
    assert sorted(drawn) != sorted(rows_drawn(shards, 30, 1, order))
    assert sorted(row for row, _ in rows_drawn(shards, 1000, 0, order)) == list(range(1, 101))


def test_a_row_without_a_label_has_the_teachers_class():
    texts, labels = ["1", "2", "3"], [1, -100, 0]
    drawn = dict(rows_drawn(shards_of(texts, labels), 3, 0, [1, 0]))
    assert drawn == {1: 0, 2: -100, 3: 1}
    logits = torch.tensor([[0.0, 2.0], [3.0, 1.0]])
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 0]), reduction="sum")
    assert torch.equal(cross_entropy_sum(logits, torch.tensor([0, -100])), expected)


def test_sets_of_labels_are_put_in_the_order_of_the_outputs():
    sets = np.array([[1, 0, 1], [0, 0, 1], [-100, 1, 0]], np.int8)
    shard = DataShard("train-00000", np.arange(3), ["1", "2", "3"], sets)
    drawn = dict(rows_drawn([shard], 3, 0, [2, 0, 1]))  # the first label is the last output
    assert drawn == {1: [0, 1, 1], 2: [0, 1, 0], 3: [1, 0, -100]}
    logits = torch.tensor([[0.5, -1.0, 2.0], [-0.5, 3.0, -2.0]])
    terms = [[(1, 0.5), (0, -1.0), (1, 2.0)], [(0, -0.5), (1, 3.0), (0, -2.0)]]
    expected = sum(np.log1p(np.exp(-logit if yes else logit)) for row in terms for yes, logit in row)
    # The last entry of each row is not known: the teacher says yes to the one and no to the other.
    labels = torch.tensor([[1, 0, -100], [0, 1, -100]])
    assert float(cross_entropy_sum(logits, labels)) == pytest.approx(float(expected), rel=1e-6)


def test_layers_that_do_not_fit_and_other_sizes_are_found_without_weights(teachers, tmp_path: Path):
    special = {"bos_token_id": 2, "eos_token_id": 2, "cls_token_id": 2, "sep_token_id": 2}
    tiny("modernbert", **special).config.save_pretrained(tmp_path)  # a configuration alone
    with pytest.raises(UserError, match=r"student\.layers: found \[2, 3\]; the layers of ModernBert.* differ"):
        sketch(Student(layers="last", num_layers=2), tmp_path)
    with pytest.raises(UserError, match=r"student\.num_heads: found 3, the teacher's 4 heads share 2 keys and values"):
        sketch(Student(layers=(0,), num_heads=3), teachers["qwen3"])
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    with pytest.raises(UserError, match=r"teacher\.model: .*: does not load as a classifier"):
        sketch(Student(), tmp_path)


NARROW = {**LAYERED, "layers": "uniform", "num_layers": 2, "feed_forward": 24, "importance_rows": 20}


@pytest.fixture(scope="module")
def whole(runs) -> tuple[Path, dict[str, Any]]:
    """A narrower student that nothing disturbed, and what its run did."""
    folder, answer = runs.trained({"student": NARROW})
    assert answer["error"] is None, answer["error"]
    return folder, answer


small_runs = pytest.mark.xdist_group("small_runs")


@small_runs
def test_a_narrower_student_is_made_once_and_trains(runs, whole):
    folder, answer = whole
    start, student = (load_file(folder / place / "model.safetensors") for place in ("train/start", "student"))
    teacher = load_file(runs.input / "teacher/model.safetensors")
    for layer in range(2):
        name = f"bert.encoder.layer.{layer}.intermediate.dense.weight"
        assert student[name].shape == (24, 16)
        assert teacher[name].shape == (64, 16)
        theirs = teacher[name].tolist()
        places = [theirs.index(row) for row in start[name].tolist()]
        assert places == sorted(set(places))
        assert not torch.equal(student[name], start[name])
    assert answer["operations"].count("rename start") == 1
    config = json.loads((folder / "student/config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"], config["hidden_size"]) == (24, 2, 16)
    loaded = load_classifier("x", folder / "student")
    assert outputs(loaded).isfinite().all()


@small_runs
@pytest.mark.parametrize("operation", ["rename start", "rename step-00000006"])
def test_a_run_that_is_killed_goes_on_to_the_same_student(runs, whole, operation: str):
    folder, answer = whole
    number = answer["operations"].index(operation) + 1
    disturbed, killed = runs.trained({"student": NARROW}, fault=f"{number}:kill")
    assert killed == {"exit": -9}
    again = runs.run(disturbed, "train", changes={"student": NARROW})
    assert again["error"] is None
    assert again["operations"].count("rename start") == (operation == "rename start")
    for place in ("train/start", "student"):
        name = f"{place}/model.safetensors"
        assert (disturbed / name).read_bytes() == (folder / name).read_bytes()


@small_runs
def test_magnitude_needs_no_start_and_other_rows_make_another_student(runs, whole):
    settings = {name: value for name, value in NARROW.items() if name != "importance_rows"}
    folder, answer = runs.trained({"student": {**settings, "importance": "magnitude"}})
    assert answer["error"] is None
    assert not (folder / "train/start").exists()
    again = runs.run(whole[0], "train", changes={"student": {**NARROW, "importance_rows": 21}})
    assert "student.importance_rows" in again["error"]


@small_runs
def test_a_narrower_student_with_a_trimmed_vocabulary_and_feature_losses(runs):
    features = [{"kind": "hidden_mse"}, {"kind": "value_relation"}]
    changes = {"student": {**NARROW, "trim_vocabulary": True}, "train.loss.features": features}
    folder, answer = runs.trained(changes)
    assert answer["error"] is None
    config = json.loads((folder / "student/config.json").read_text())
    assert config["intermediate_size"] == 24
    assert config["vocab_size"] < 200


@small_runs
def test_a_narrower_student_takes_adapters(runs):
    folder, answer = runs.trained({"student": {**NARROW, "lora": {"rank": 2}}})
    assert answer["error"] is None
    start, student = (load_file(folder / place / "model.safetensors") for place in ("train/start", "student"))
    name = "bert.encoder.layer.1.output.dense.weight"
    assert student[name].shape == start[name].shape == (16, 24)
    assert torch.linalg.matrix_rank(student[name] - start[name], atol=1e-6) == 2


@small_runs
@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"feed_forward": 65}, "student.feed_forward: found 65, the teacher's layers have 64 units. Give at most 64"),
        ({"num_heads": 3}, "student.num_heads: found 3, the teacher has 2. Give at most 2"),
        ({"num_heads": 1}, "student.num_heads: transformers cannot load a bert with fewer heads of the same width: "),
        ({"layers": "last", "num_layers": 3}, "student.num_layers: found 3, the teacher has 2 layers. Give at most 2"),
        ({"layers": [1, 2]}, "student.layers: found 2, the teacher's layers are 0 to 1"),
    ],
)
def test_sizes_that_the_teacher_does_not_have_are_refused_before_anything_is_written(runs, student, message: str):
    folder, answer = runs.trained({"student": {**LAYERED, **student}})
    assert answer["error"].startswith(message)
    assert not (folder / "train").exists()
