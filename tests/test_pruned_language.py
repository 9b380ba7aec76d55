"""Language models that begin as a part of their teacher: fewer units and heads, by what the next token needs.

Shapes: R rows, L tokens.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_runs import SIZES, texts, tiny_language_model, tokenizer, write_model
from run_files import points
from safetensors.numpy import load_file

from raydistill.config.student import Student
from raydistill.data.token_shards import TokenShard
from raydistill.errors import UserError
from raydistill.models.loading import load_language_model
from raydistill.students.blocks import layers_of
from raydistill.students.build import needs_rows
from raydistill.students.importance import most_important
from raydistill.students.language import build_language_student, language_skeleton

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gpt2")
HEADS = {"num_attention_heads": 4}
WITH_HEADS = [name for name in ARCHITECTURES if name != "gpt2"]
LAYERED = {"init": "teacher_layers", "layers": (0, 1)}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four heads, of which two share keys and values where heads can; 32 units."""
    found, made = {}, tokenizer()
    for name in ARCHITECTURES:
        sizes = {**HEADS, **({"num_key_value_heads": 2} if name in WITH_HEADS else {})}
        sizes |= {"head_dim": 4} if "head_dim" in SIZES[name] else {}
        found[name] = write_model(tmp_path_factory.mktemp(name), made, architecture=name, **sizes)
    return found


@pytest.fixture(scope="module")
def shards() -> list[TokenShard]:
    """Two shards of rows of several lengths; of some rows the first tokens are not learnt."""
    made, found, row_id = tokenizer(), [], 0
    for part in (texts(9, seed=1), texts(14, seed=2)):
        rows = [np.array(made(text)["input_ids"][: 7 + 3 * (number % 5)], np.int32) for number, text in enumerate(part)]
        learnt = [np.arange(len(row)) > number % 3 for number, row in enumerate(rows)]
        borders = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        ids = np.arange(row_id, row_id + len(rows))
        found.append(TokenShard("train", ids, ids, borders, np.concatenate(rows), np.concatenate(learnt)))
        row_id += len(rows)
    return found


def built(folder: Path, shards: list[TokenShard] | None = None, seed: int = 0, **settings: Any) -> Any:
    student = Student(**{**LAYERED, **settings})
    assert needs_rows(student) == (shards is not None)
    rows = None if shards is None else lambda: iter(shards)
    return build_language_student(student, teacher_folder=folder, max_length=48, seed=seed, rows=rows)[0]


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(4, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_units_heads_and_layers_are_the_teacher(teachers, shards, architecture: str):
    heads = {} if architecture == "gpt2" else {"num_heads": 4}
    student = built(teachers[architecture], shards, feed_forward=32, **heads)
    assert torch.equal(logits(student), logits(load_language_model("x", teachers[architecture])))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_a_narrow_student_is_as_wide_as_its_skeleton_and_loads_again(
    teachers, shards, architecture: str, importance: str, tmp_path: Path
):
    settings = {"layers": (1,), "feed_forward": 9, "importance": importance}
    settings |= {} if architecture == "gpt2" else {"num_heads": 2}
    student = built(teachers[architecture], shards if importance == "taylor" else None, **settings)
    folder = teachers[architecture]
    skeleton = language_skeleton(Student(**{**LAYERED, **settings}), teacher_folder=folder, max_length=48)
    assert {n: v.shape for n, v in skeleton.state_dict().items()} == {
        n: v.shape for n, v in student.state_dict().items()
    }
    shapes = {tuple(parameter.shape) for parameter in student.parameters()}
    assert (9, 16) in shapes or (16, 9) in shapes
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(load_language_model("x", tmp_path)), logits(student))


def expected_parts(folder: Path, shards: list[TokenShard], outlet: str, parts: int) -> torch.Tensor:
    """Importance (layers, parts) by the gradients of the outlets' columns, one row at a time, over whole logits."""
    teacher = load_language_model("x", folder).double()
    sums = torch.zeros(2, parts, dtype=torch.float64)
    for shard in shards:
        for number in range(len(shard)):
            ids = torch.from_numpy(shard.row(number)).long()
            learnt = torch.from_numpy(shard.learnt[shard.borders_R1[number] : shard.borders_R1[number + 1]].copy())[1:]
            teacher.zero_grad()
            logprobs = teacher(input_ids=ids[None]).logits[0, :-1].log_softmax(dim=-1)
            (-logprobs.gather(1, ids[1:, None])[:, 0][learnt]).sum().backward()
            for layer, module in enumerate(layers_of(teacher)):
                weight = module.get_submodule(outlet).weight
                columns = weight.grad * weight if "c_proj" in outlet else (weight.grad * weight).T
                sums[layer] += columns.reshape(parts, -1).sum(dim=1).abs().detach()
    return sums


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_it_keeps_the_units_that_the_next_token_leans_on(teachers, shards, architecture: str):
    outlet = "mlp.c_proj" if architecture == "gpt2" else "mlp.down_proj"
    student, teacher = (
        built(teachers[architecture], shards, feed_forward=12),
        load_language_model("x", teachers[architecture]),
    )
    expected = expected_parts(teachers[architecture], shards, outlet, 32)
    for layer, (ours, theirs) in enumerate(zip(layers_of(student), layers_of(teacher), strict=True)):
        kept, whole = (module.get_submodule(outlet).weight for module in (ours, theirs))
        columns, all_columns = (kept, whole) if architecture == "gpt2" else (kept.T, whole.T)
        order = expected[layer].sort(descending=True).values
        assert order[11] > 1.0001 * order[12]  # no near-tie decides
        assert torch.equal(columns, all_columns[most_important(expected[layer], 12)])


def test_it_keeps_as_many_heads_of_every_group(teachers, shards):
    student, teacher = built(teachers["llama"], shards, num_heads=2), load_language_model("x", teachers["llama"])
    expected = expected_parts(teachers["llama"], shards, "self_attn.o_proj", 4)
    for layer, (ours, theirs) in enumerate(zip(layers_of(student), layers_of(teacher), strict=True)):
        chosen = [2 * group + int(expected[layer][2 * group : 2 * group + 2].argmax()) for group in range(2)]
        columns = torch.cat([torch.arange(4 * head, 4 * head + 4) for head in chosen])
        assert torch.equal(ours.self_attn.o_proj.weight, theirs.self_attn.o_proj.weight[:, columns])
        assert torch.equal(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight[columns])
        assert torch.equal(ours.self_attn.k_proj.weight, theirs.self_attn.k_proj.weight)


def test_other_rows_are_drawn_by_another_seed(teachers, shards):
    few = {"feed_forward": 16, "importance_rows": 2}
    one, again, other = (built(teachers["llama"], shards, seed, **few) for seed in (0, 0, 1))
    assert torch.equal(logits(one), logits(again))
    assert not torch.equal(logits(one), logits(other))


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("llama", {"feed_forward": 33}, "student.feed_forward: found 33, the teacher's layers have 32 units. Give at"),
        ("llama", {"num_heads": 3}, "student.num_heads: found 3, the teacher's 4 heads share 2 keys and values"),
        ("llama", {"num_heads": 5}, "student.num_heads: found 5, the teacher has 4. Give at most 4"),
        ("gpt2", {"num_heads": 2}, "student.num_heads: transformers cannot load a gpt2 with fewer heads of the same"),
    ],
)
def test_what_an_architecture_does_not_allow_is_refused(teachers, architecture: str, settings: dict, message: str):
    student = Student(**{**LAYERED, **settings})
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        language_skeleton(student, teacher_folder=teachers[architecture], max_length=48)


NARROW = {"init": "teacher_layers", "layers": [0, 1], "feed_forward": 8, "importance_rows": 10}


@pytest.fixture(scope="module")
def whole(language_runs) -> tuple[Path, dict[str, Any]]:
    folder, answer = language_runs.trained({"student": NARROW})
    assert answer["error"] is None, answer["error"]
    return folder, answer


def test_a_narrower_student_is_made_once_and_trains(language_runs, whole):
    folder, answer = whole
    start, student = (load_file(folder / place / "model.safetensors") for place in ("train/start", "student"))
    teacher = load_file(language_runs.input / "teacher/model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    assert student[name].shape == (8, 16)
    theirs = teacher[name].tolist()
    places = [theirs.index(row) for row in start[name].tolist()]
    assert places == sorted(set(places))
    assert answer["operations"].count("rename start") == 1
    assert json.loads((folder / "student/config.json").read_text())["intermediate_size"] == 8
    curve = points(folder, "validation")
    assert curve[-1]["kl"] < curve[0]["kl"]


@pytest.mark.parametrize("operation", ["rename start", "rename step-00000006"])
def test_a_run_that_is_killed_goes_on_to_the_same_student(language_runs, whole, operation: str):
    folder, answer = whole
    number = answer["operations"].index(operation) + 1
    disturbed, killed = language_runs.trained({"student": NARROW}, fault=f"{number}:kill")
    assert killed == {"exit": -9}
    again = language_runs.run(disturbed, "train", changes={"student": NARROW})
    assert again["error"] is None
    for place in ("train/start", "student"):
        name = f"{place}/model.safetensors"
        assert (disturbed / name).read_bytes() == (folder / name).read_bytes()


def test_a_narrower_student_takes_adapters(language_runs):
    folder, answer = language_runs.trained({"student": {**NARROW, "lora": {"rank": 2}}})
    assert answer["error"] is None
    start, student = (load_file(folder / place / "model.safetensors") for place in ("train/start", "student"))
    name = "model.layers.1.mlp.down_proj.weight"
    assert student[name].shape == start[name].shape == (16, 8)
    assert np.linalg.matrix_rank(student[name] - start[name], tol=1e-6) == 2


def test_tiny_models_of_every_architecture_differ_from_layer_to_layer():
    # What the tests above compare would be the same of any units, were a model's layers near the identity.
    for name in ARCHITECTURES:
        model = tiny_language_model(name)
        assert not torch.allclose(*(next(iter(layer.parameters())) for layer in layers_of(model)))
