"""Models on disk: what is found, what is refused, what is saved and loaded again."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LABELS, outputs, tiny

from raydistill.config.student import Student
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models.configuration import check_length, label_order, positions
from raydistill.models.folders import find_model, model_identity
from raydistill.models.loading import count_parameters, load_classifier, start_classifier
from raydistill.models.saving import save_model
from raydistill.students.build import build_student


def test_labels_that_differ_are_refused_by_name(tiny_classifier: Path, tiny_encoder: Path):
    with pytest.raises(UserError, match=r"its labels are not the data's.*'taxes' unknown to it.*'refund' unknown"):
        label_order("teacher.model", tiny_classifier, [*(set(LABELS) - {"refund"}), "taxes"])
    with pytest.raises(UserError, match="its labels are not the data's: the data have 5"):
        label_order("teacher.model", tiny_encoder, LABELS)


def test_a_head_for_other_labels_is_replaced(tiny_classifier: Path):
    torch.manual_seed(0)
    model = start_classifier("teacher.model", tiny_classifier, ["yes", "no", "maybe"])
    assert model.classifier.weight.shape == (3, 16)
    assert model.config.id2label == {0: "yes", 1: "no", 2: "maybe"}


def test_a_saved_student_is_a_hugging_face_model(tiny_classifier: Path, tmp_path: Path, ticket_texts: list[str]):
    from transformers import AutoModelForSequenceClassification, pipeline

    settings = Student(layers=(1,))
    student, tokenizer = build_student(settings, teacher_folder=tiny_classifier, labels=LABELS, max_length=32, seed=0)
    save_model(student, tokenizer, student.state_dict(), tmp_path / "student", max_length=12)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert torch.equal(outputs(loaded), outputs(student))
    found = pipeline("text-classification", model=str(tmp_path / "student"))(ticket_texts[:8], truncation=True)
    inputs = tokenizer(ticket_texts[:8], truncation=True, max_length=12, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = student.eval()(**inputs).logits.argmax(dim=1)
    assert [prediction["label"] for prediction in found] == [LABELS[number] for number in expected]
    assert not list((tmp_path / "student").glob("*.bin"))
    find_model("student.model", str(tmp_path / "student"))


def test_weights_given_are_the_weights_saved(tiny_classifier: Path, tmp_path: Path):
    model = load_classifier("teacher.model", tiny_classifier)
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    save_model(model, load_tokenizer(tiny_classifier, "teacher.model"), weights, tmp_path / "saved", max_length=32)
    saved = load_classifier("student.model", tmp_path / "saved").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in weights.items())


def test_a_loaded_classifier_is_ready_to_score(tiny_classifier: Path):
    model = load_classifier("teacher.model", tiny_classifier, dtype=torch.bfloat16)
    assert not model.training
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"has no config\.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "has no safetensors weights"),
        (
            lambda f: (f / "config.json").write_text(
                (f / "config.json").read_text().replace("{", '{"auto_map": {"AutoModel": "evil.Evil"},', 1)
            ),
            r"brings code of its own \(auto_map",
        ),
    ],
)
def test_a_folder_that_is_not_safe_to_load_is_refused(tiny_classifier: Path, tmp_path: Path, change: Any, message: str):
    folder = tmp_path / "model"
    shutil.copytree(tiny_classifier, folder)
    change(folder)
    with pytest.raises(UserError, match=f"^teacher.model: .*model.*: .*{message}"):
        find_model("teacher.model", str(folder))


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"teacher\.model: .*no such folder\. Give"):
        find_model("teacher.model", str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"student\.model: nobody/nothing: is no folder here and the hub gives none"):
        find_model("student.model", "nobody/nothing")


def test_a_folder_with_broken_weights_is_refused(tiny_classifier: Path, tmp_path: Path):
    shutil.copytree(tiny_classifier, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"^teacher\.model: .*does not load as a classifier"):
        load_classifier("teacher.model", tmp_path)


def test_identity_names_weights_configuration_and_tokenizer(tiny_classifier: Path, tmp_path: Path):
    first = model_identity(tiny_classifier)
    for key, file in (
        ("weights_sha256", "model.safetensors"),
        ("config_sha256", "config.json"),
        ("tokenizer_sha256", "tokenizer.json"),
    ):
        folder = tmp_path / key
        shutil.copytree(tiny_classifier, folder)
        assert model_identity(folder) == first
        with open(folder / file, "ab") as changed:
            changed.write(b"\n")
        assert {name for name, value in model_identity(folder).items() if value != first[name]} == {key}


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "electra"])
def test_the_longest_row_a_model_takes_is_known(architecture: str, tmp_path: Path):
    model = tiny(architecture)
    model.save_pretrained(tmp_path)
    longest = positions(tmp_path)
    assert longest is not None
    check_length("teacher.model", tmp_path, longest)
    with pytest.raises(UserError, match=rf"data\.max_length: found {longest + 1}, .* takes at most {longest}\. Lower"):
        check_length("teacher.model", tmp_path, longest + 1)
    row = torch.full((1, longest), 5)
    assert model(input_ids=row, attention_mask=torch.ones_like(row)).logits.shape == (1, 5)
    row = torch.full((1, longest + 1), 5)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=row, attention_mask=torch.ones_like(row))


def test_tied_parameters_count_once():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    assert count_parameters(model) == 18
    model[1].weight = model[0].weight
    assert count_parameters(model) == 9
