"""Students and their first weights: which layers, which labels, which sizes, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ENCODERS, LABELS, outputs, tiny

from raydistill.config.student import Student
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models.configuration import label_order
from raydistill.models.loading import count_parameters, load_classifier
from raydistill.students.build import build_student
from raydistill.students.layers import student_from_layers
from raydistill.students.sizes import student_from_config


@pytest.mark.parametrize("architecture", ENCODERS)
def test_a_student_of_all_layers_is_the_teacher(architecture: str):
    teacher = tiny(architecture)
    student = student_from_layers(teacher, [0, 1, 2, 3], None)
    assert torch.equal(outputs(student), outputs(teacher))
    assert count_parameters(student) == count_parameters(teacher)


@pytest.mark.parametrize("architecture", ENCODERS)
def test_a_student_of_some_layers_is_the_teacher_without_the_others(architecture: str):
    teacher = tiny(architecture)
    student = student_from_layers(teacher, [1, 3], None)
    stack = next(m for m in teacher.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    del stack[2], stack[0]
    teacher.config.num_hidden_layers = 2
    teacher.config.use_cache = False  # GPT-2's layers know their number in it
    assert torch.equal(outputs(student), outputs(teacher))
    assert student.config.num_hidden_layers == 2


def test_layers_are_every_other_one_unless_said():
    def first_weight(model: Any, layer: int) -> torch.Tensor:
        return model.bert.encoder.layer[layer].attention.self.query.weight

    teacher = tiny("bert")
    student = student_from_layers(teacher, None, None)
    assert len(student.bert.encoder.layer) == 2
    for place, layer in enumerate([1, 3]):
        assert torch.equal(first_weight(student, place), first_weight(teacher, layer))
    assert len(student_from_layers(student_from_layers(teacher, [2], None), None, None).bert.encoder.layer) == 1


def test_a_student_does_not_share_its_teachers_weights():
    teacher = tiny("bert")
    before = outputs(teacher)
    with torch.no_grad():
        for parameter in student_from_layers(teacher, [0, 1], None).parameters():
            parameter.zero_()
    assert torch.equal(outputs(teacher), before)


def test_a_layer_that_the_teacher_has_not_is_refused():
    with pytest.raises(UserError, match=r"student\.layers: found 4, the teacher's layers are 0 to 3"):
        student_from_layers(tiny("bert"), [0, 4], None)


@pytest.mark.parametrize("architecture", ["albert", "bart", "t5"])
def test_an_architecture_without_one_stack_of_layers_is_refused(architecture: str):
    sizes = {
        "albert": {},
        "bart": {"encoder_layers": 4, "decoder_layers": 4, "d_model": 16},
        "t5": {"d_model": 16, "num_layers": 4},
    }
    with pytest.raises(UserError, match=r"student\.init: teacher_layers: .* stacks of 4 layers, expected one"):
        student_from_layers(tiny(architecture, **sizes[architecture]), [0, 1], None)


def test_layers_that_do_not_fit_together_are_refused():
    # ModernBERT's first layer has no norm of its own: the student's load_state_dict ended in a traceback.
    teacher = tiny("modernbert", bos_token_id=2, eos_token_id=2, cls_token_id=2, sep_token_id=2)
    assert torch.equal(
        outputs(student_from_layers(teacher, [0, 2], None)).isfinite(), torch.ones(6, 5, dtype=torch.bool)
    )
    with pytest.raises(UserError, match=r"student\.layers: found \[1, 3\]; the layers of ModernBert.* differ"):
        student_from_layers(teacher, [1, 3], None)


@pytest.mark.parametrize("architecture", ENCODERS)
def test_dropout_reaches_every_dropout_of_an_architecture(architecture: str):
    # GPT-2 calls its settings *_pdrop, and a list of the names of other architectures missed them.
    def rates(dropout: float | None) -> list[float]:
        student = student_from_layers(tiny(architecture), [0, 1], dropout)
        return [m.p for m in student.modules() if "Dropout" in type(m).__name__]  # DeBERTa has a class of its own

    assert set(rates(0.25)) <= {0.25}
    assert set(rates(0.0)) <= {0.0}
    assert len(rates(None)) == len(rates(0.25)) > 0


def student_settings(**settings: Any) -> Student:
    return Student(**settings)


@pytest.fixture
def permuted(tiny_classifier: Path, tmp_path: Path) -> Path:
    """The tiny classifier with its outputs in another order, names and weights alike."""
    order = [3, 0, 4, 1, 2]
    shutil.copytree(tiny_classifier, tmp_path / "permuted")
    config = tmp_path / "permuted" / "config.json"
    names = [LABELS[number] for number in order]
    facts = json.loads(config.read_text())
    facts |= {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    config.write_text(json.dumps(facts))
    weights = load_file(tmp_path / "permuted" / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name][order].contiguous()
    save_file(weights, tmp_path / "permuted" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "permuted"


def test_a_students_head_follows_label_names_not_numbers(tiny_classifier: Path, permuted: Path):
    settings = student_settings(layers=(0, 1), dropout=0.0)
    students = [
        build_student(settings, teacher_folder=folder, labels=LABELS, max_length=32, seed=0)[0]
        for folder in (tiny_classifier, permuted)
    ]
    assert label_order("teacher.model", permuted, LABELS) == [1, 3, 4, 0, 2]
    assert not torch.equal(outputs(load_classifier("teacher.model", permuted)), outputs(students[0]))
    torch.testing.assert_close(outputs(students[1]), outputs(students[0]), rtol=1e-5, atol=1e-5)
    assert students[1].config.id2label == dict(enumerate(LABELS))
    assert students[1].config.label2id == {name: number for number, name in enumerate(LABELS)}


def test_a_head_of_two_linear_layers_is_put_in_order_too(tmp_path: Path, tiny_encoder: Path):
    for architecture, names in (("roberta", "zyxwv"), ("distilbert", "zyxwv")):
        folder = tmp_path / architecture
        model = tiny(architecture, id2label=dict(enumerate(names)))
        model.save_pretrained(folder)
        load_tokenizer(tiny_encoder, "teacher.model").save_pretrained(folder)
        settings = student_settings(layers=(0, 1, 2, 3))
        student, _ = build_student(settings, teacher_folder=folder, labels=sorted(names), max_length=32, seed=0)
        torch.testing.assert_close(outputs(student), outputs(model)[:, [4, 3, 2, 1, 0]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "electra", "qwen2", "gpt2"])
def test_a_new_student_has_the_sizes_that_were_asked_for(architecture: str, tiny_encoder: Path):
    # DistilBERT's feed-forward size is `hidden_dim`: `intermediate_size` was ignored and stayed 3072. Qwen2's key
    # heads stayed 32, and its first forward pass failed.
    settings = student_settings(
        init="config", model_type=architecture, hidden_size=24, num_layers=3, num_heads=2, feed_forward=40, dropout=0.2
    )
    tokenizer = load_tokenizer(tiny_encoder, "teacher.model")
    student = student_from_config(settings, tokenizer, LABELS, 200)
    shapes = {tuple(parameter.shape) for parameter in student.parameters()}
    assert (len(tokenizer), student.config.embedding_size if architecture == "electra" else 24) in shapes
    assert (24, 40) in shapes or (40, 24) in shapes
    assert not any(size in shape for shape in shapes for size in (3072, 768, 512))
    assert student.config.num_hidden_layers == 3
    assert student.config.id2label == dict(enumerate(LABELS))
    assert {module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)} <= {0.2}
    ids = torch.full((2, 200), tokenizer.cls_token_id)
    assert student(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (2, 5)


def test_a_roberta_student_has_room_for_its_longest_row_whatever_the_padding_id(tiny_encoder: Path):
    # Positions start after the padding id: with an id above 1 the longest rows ran out of positions.
    tokenizer = load_tokenizer(tiny_encoder, "teacher.model")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(9)
    settings = student_settings(init="config", model_type="roberta", hidden_size=16, num_layers=1)
    student = student_from_config(settings, tokenizer, LABELS, 200)
    ids = torch.full((1, 200), 4)
    assert student(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape == (1, 5)


def test_new_students_weights_are_those_of_the_seed(tiny_encoder: Path):
    settings = student_settings(init="config", hidden_size=16, num_layers=1)

    def weights(seed: int) -> torch.Tensor:
        student, _ = build_student(settings, teacher_folder=tiny_encoder, labels=LABELS, max_length=32, seed=seed)
        return torch.cat([parameter.flatten() for parameter in student.parameters()])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize(
    ("architecture", "found"), [("vit", "vit"), ("no-such-model", "no-such-model"), ("xlm", "xlm")]
)
def test_an_architecture_that_cannot_be_built_is_refused(architecture: str, found: str, tiny_encoder: Path):
    settings = student_settings(init="config", model_type=architecture, hidden_size=16, num_layers=1)
    with pytest.raises(
        UserError, match=rf"student\.model_type: '{found}' cannot be built with these sizes \(.+\)\. Choose"
    ):
        student_from_config(settings, load_tokenizer(tiny_encoder, "teacher.model"), LABELS, 32)


def test_a_pretrained_student_keeps_its_encoder_and_gets_a_new_head(tiny_encoder: Path, tmp_path: Path):
    from transformers import AutoModel

    settings = student_settings(init="pretrained", model=str(tiny_encoder), dropout=0.3)
    made = [
        build_student(settings, teacher_folder=tmp_path / "not read", labels=LABELS, max_length=32, seed=seed)
        for seed in (0, 0, 1)
    ]
    student, tokenizer = made[0]
    encoder = AutoModel.from_pretrained(tiny_encoder).state_dict()
    assert all(torch.equal(student.bert.state_dict()[name], value) for name, value in encoder.items())
    assert student.classifier.weight.shape == (5, 16)
    assert torch.equal(student.classifier.weight, made[1][0].classifier.weight)
    assert not torch.equal(student.classifier.weight, made[2][0].classifier.weight)
    assert {module.p for module in student.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    assert len(tokenizer) == 200
