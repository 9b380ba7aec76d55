"""Factorised embeddings: the same function at full size, the smallest error below it, and a model that all can load."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import SmallRuns
from tiny_models import LABELS, batch, outputs, tiny

from raydistill.config.student import Student
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models.loading import count_parameters
from raydistill.students.build import build_student
from raydistill.students.factorised import factorised
from raydistill.students.skeleton import student_skeleton

pytestmark = pytest.mark.xdist_group("small_runs")
WIDTH = 16
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"type_vocab_size": 2, "hidden_act": "relu"}),
    "roberta": ("roberta", {"type_vocab_size": 1}),
    "roberta, padding is 9": ("roberta", {"pad_token_id": 9}),
    "camembert": ("camembert", {}),
    "xlm-roberta": ("xlm-roberta", {}),
    "distilbert": ("distilbert", {"hidden_dim": 32}),
    "electra": ("electra", {"embedding_size": WIDTH}),
    "deberta-v2": ("deberta-v2", {}),
    "deberta-v2, relative": ("deberta-v2", {"relative_attention": True, "pos_att_type": ["c2p"], "type_vocab_size": 2}),
    "deberta-v2, no absolute positions": (
        "deberta-v2", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    ),
    "deberta-v2, factorised already": ("deberta-v2", {"embedding_size": 12}),
}  # fmt: skip


def model(case: str) -> Any:
    name, changes = CASES[case]
    return tiny(name, **changes)


def answers(model: Any, pad_id: int) -> torch.Tensor:
    found = batch()
    ids = torch.where(found["attention_mask"].bool(), found["input_ids"].clamp(min=10), pad_id)
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=found["attention_mask"]).logits


@pytest.mark.parametrize("case", CASES)
def test_at_full_size_it_is_the_same_function(case: str):
    # One direction, that of the mean, is taken away by the norm, so that 15 of 16 lose nothing either.
    before = model(case)
    pad_id = before.config.pad_token_id
    expected = answers(before, pad_id)
    assert expected.std() > 0.01
    for size in (WIDTH, WIDTH - 1):
        made = factorised(before, size)
        torch.testing.assert_close(answers(made, pad_id), expected, rtol=1e-4, atol=1e-4)
        assert made.config.embedding_size == size
    assert made.config.id2label == before.config.id2label
    assert made.config.pad_token_id == pad_id


@pytest.mark.parametrize("case", CASES)
def test_a_smaller_size_saves_parameters_and_still_answers(case: str, tmp_path: Path):
    from transformers import AutoModelForSequenceClassification

    before = model(case)
    made = factorised(before, 4)
    table = made.get_input_embeddings().weight
    assert table.shape == (64, 4)
    assert count_parameters(made) < count_parameters(before)
    made.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    pad_id = before.config.pad_token_id
    assert torch.equal(answers(again, pad_id), answers(made, pad_id))
    assert answers(made, pad_id).isfinite().all()


@pytest.mark.parametrize("size", [1, 3, 8])
def test_no_projection_of_this_size_is_nearer_to_the_embeddings(size: int):
    before = model("bert")
    tables = {name: value.double().numpy() for name, value in before.bert.embeddings.state_dict().items()}
    types = tables["token_type_embeddings.weight"][0]
    sums = tables["word_embeddings.weight"][:, None] + tables["position_embeddings.weight"][None] + types
    sums = sums.reshape(-1, WIDTH)
    sums = sums - sums.mean(axis=1, keepdims=True)
    # The oracle: what is left of the singular values of all sums, written out.
    best = (np.linalg.svd(sums, compute_uv=False)[size:] ** 2).sum()
    made = factorised(before, size).deberta.embeddings
    narrow = made.word_embeddings.weight[:, None] + made.position_embeddings.weight[None]
    narrow = (narrow + made.token_type_embeddings.weight[0]).reshape(-1, size)
    ours = made.embed_proj(narrow).detach().double().numpy()
    ours = ours - ours.mean(axis=1, keepdims=True)
    assert ((sums - ours) ** 2).sum() == pytest.approx(best, rel=1e-4)


def test_embeddings_of_low_rank_lose_nothing():
    before = model("bert")
    with torch.no_grad():
        projection_EW = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
        for table in ("word", "position", "token_type"):
            weight = getattr(before.bert.embeddings, f"{table}_embeddings").weight
            weight.copy_(weight[:, :5] @ projection_EW)
    for size in (5, 9):  # more than the rank leaves directions that are anyone's choice
        torch.testing.assert_close(outputs(factorised(before, size)), outputs(before), rtol=1e-4, atol=1e-4)


def test_dropout_goes_where_it_was():
    before = tiny("roberta", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2, classifier_dropout=0.1)
    before.config.problem_type = "multi_label_classification"
    made = factorised(before, 4)
    config = made.config
    assert made.dropout.p == 0.1
    assert config.problem_type == "multi_label_classification"
    rates = (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.pooler_dropout, config.cls_dropout)
    assert rates == (0.3, 0.2, 0.1, 0.1)
    config = factorised(tiny("distilbert", dropout=0.3, seq_classif_dropout=0.05), 4).config
    assert (config.hidden_dropout_prob, config.pooler_dropout, config.cls_dropout) == (0.3, 0.0, 0.05)
    config = factorised(tiny("bert", hidden_dropout_prob=0.3), 4).config
    assert (config.pooler_dropout, config.cls_dropout) == (0.0, 0.3)


ROTARY = {"bos_token_id": 2, "eos_token_id": 2, "cls_token_id": 2, "sep_token_id": 2}


@pytest.mark.parametrize(
    ("architecture", "changes"), [("modernbert", ROTARY), ("electra", {"embedding_size": 8}), ("gpt2", {})]
)
def test_other_embeddings_are_refused(architecture: str, changes: dict[str, Any]):
    with pytest.raises(UserError, match=r"student\.embedding_size: the embeddings of this .* cannot be factorised"):
        factorised(tiny(architecture, **changes), 4)


def test_a_size_above_the_width_is_refused():
    with pytest.raises(UserError, match=r"student\.embedding_size: found 17, the student's width is 16"):
        factorised(tiny("bert"), 17)


@pytest.mark.parametrize("architecture", ["deberta-v2", "electra", "albert"])
def test_a_new_student_can_have_it(architecture: str, tiny_encoder: Path):
    settings = Student(
        init="config", model_type=architecture, hidden_size=16, num_layers=1, num_heads=2, embedding_size=4
    )
    student, tokenizer = build_student(settings, teacher_folder=tiny_encoder, labels=LABELS, max_length=32, seed=0)
    assert student.get_input_embeddings().weight.shape == (len(tokenizer), 4)


def test_it_is_known_before_a_run_whether_it_can(tmp_path: Path):
    tiny("bert").save_pretrained(tmp_path)
    options = {"teacher_folder": tmp_path, "labels": LABELS, "max_length": 20}
    settings = Student(layers=(0, 2), trim_vocabulary=True, max_positions=20, embedding_size=4)
    student = student_skeleton(settings, **options)
    assert {parameter.device.type for parameter in student.parameters()} == {"meta"}
    assert student.config.num_hidden_layers == 2
    with pytest.raises(UserError, match="found 17, the student's width is 16"):
        student_skeleton(Student(embedding_size=17), **options)


def test_a_trimmed_and_factorised_student_trains_with_features_and_loads_everywhere(runs: SmallRuns):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    changes = {
        "student": {
            "init": "teacher_layers", "layers": [0, 1], "dropout": 0.0, "trim_vocabulary": True, "max_positions": 48,
            "embedding_size": 15,
        },
        "train.loss.features": [{"kind": "hidden_mse"}, {"kind": "attention_kl"}, {"kind": "value_relation"}],
        "train.log_every": 1, "train.learning_rate": 1e-6,
    }  # fmt: skip
    folder, answer = runs.trained(changes)
    assert answer["error"] is None, answer["error"]
    line = (folder / "train/metrics.jsonl").read_text().splitlines()[0]
    first = json.loads(line)
    # Nothing is lost at 15 of 16, so that the student begins as the teacher.
    assert first["hidden_mse"] == pytest.approx(0, abs=1e-6)
    assert first["attention_kl"] == pytest.approx(0, abs=1e-6)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "student")
    assert model.config.model_type == "deberta-v2"
    texts = ["where is my parcel", "Ich möchte mein Geld zurück"]
    ours, plain = load_tokenizer(folder / "student", "x"), AutoTokenizer.from_pretrained(folder / "student")
    assert ours(texts)["input_ids"] == plain(texts)["input_ids"]
    inputs = ours(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.argmax(dim=1)
    found = pipeline("text-classification", model=str(folder / "student"))(texts)
    assert [model.config.label2id[prediction["label"]] for prediction in found] == expected.tolist()


def test_an_architecture_without_a_size_for_it_is_refused_before_anything_is_written(runs: SmallRuns):
    folder, answer = runs.trained({"student.embedding_size": 4})
    assert "student.embedding_size: found 4, and 'bert' has no size of its own for embeddings" in answer["error"]
    assert not (folder / "train").exists()
