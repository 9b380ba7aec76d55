"""Tables with fewer rows: the same outputs for the tokens and positions that stay; what cannot be cut is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ENCODERS, LABELS, batch, tiny

from raydistill.config.student import Student
from raydistill.errors import UserError
from raydistill.models.configuration import positions
from raydistill.students.build import build_student
from raydistill.students.skeleton import student_skeleton
from raydistill.students.tables import token_ids_of, with_positions, with_tokens

EVERY_SECOND = [0, 1, 2, 3, *range(4, 64, 2)]
# RoBERTa counts its positions from the padding id on, wherever that is.
CASES = {**{name: {} for name in ENCODERS}, "roberta, padding is 9": {"pad_token_id": 9}, "bart": {"d_model": 16}}


def inputs(pad_id: int, kept: list[int]) -> dict[str, torch.Tensor]:
    """The batch with tokens that are kept alone."""
    found = batch()
    ids = torch.tensor(kept)[found["input_ids"] % len(kept)]
    ids = torch.where(ids == pad_id, kept[0] if pad_id != kept[0] else kept[-1], ids)
    return {**found, "input_ids": torch.where(found["attention_mask"].bool(), ids, pad_id)}


def answers(model: Any, found: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**found).logits


@pytest.mark.parametrize("case", CASES)
def test_a_model_with_fewer_tokens_answers_as_before(case: str):
    changes = {"eos_token_id": 2, "num_hidden_layers": 2} if case == "bart" else {}
    model = tiny(case.partition(",")[0], **CASES[case], **changes)
    pad_id = model.config.pad_token_id
    kept = sorted({*EVERY_SECOND[2:], pad_id, *token_ids_of(model.config, 64)})
    before = inputs(pad_id, kept)
    if case == "bart":  # its head reads the last end of text
        before["input_ids"][:, 0] = model.config.eos_token_id
        before["input_ids"][:, 1:] = before["input_ids"][:, 1:].masked_fill(before["input_ids"][:, 1:] == 2, kept[-1])
    smaller = with_tokens(model, kept, pad_id=kept.index(pad_id))
    after = {**before, "input_ids": torch.searchsorted(torch.tensor(kept), before["input_ids"])}
    assert torch.equal(answers(smaller, after), answers(model, before))
    assert smaller.config.vocab_size == len(kept) == smaller.get_input_embeddings().num_embeddings
    for name, value in model.config.to_dict().items():
        if name.endswith("_token_id") and isinstance(value, int):
            assert getattr(smaller.config, name) == kept.index(value), name
    assert answers(model, before).std() > 0.01


def test_an_id_without_a_token_leaves_the_configuration():
    model = tiny("bert", eos_token_id=40, sep_token_id=900)
    assert token_ids_of(model.config, 64) == {1, 40}
    smaller = with_tokens(model, [0, 1, 2], pad_id=1)
    assert (smaller.config.eos_token_id, smaller.config.sep_token_id, smaller.config.pad_token_id) == (None, None, 1)


@pytest.mark.parametrize("case", [name for name in CASES if name != "bart"])
def test_a_model_with_fewer_positions_answers_as_before(case: str, tmp_path: Path):
    model = tiny(case.partition(",")[0], **CASES[case])
    found = inputs(model.config.pad_token_id, list(range(64)))
    smaller = with_positions(model, 9)
    assert torch.equal(answers(smaller, found), answers(model, found))
    smaller.save_pretrained(tmp_path)
    assert positions(tmp_path) == 9
    longer = {name: torch.cat([value, value], dim=1) for name, value in found.items()}
    answers(model, longer)
    with pytest.raises((IndexError, RuntimeError)):
        answers(smaller, longer)


def test_relative_distances_stay_what_they_were():
    # Without a number of their own DeBERTa's relative distances are as many as its positions.
    model = tiny("deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=-1)
    found = inputs(1, list(range(64)))
    assert torch.equal(answers(with_positions(model, 9), found), answers(model, found))


ROTARY = {"bos_token_id": 2, "eos_token_id": 2, "cls_token_id": 2, "sep_token_id": 2}


def test_positions_that_a_model_does_not_have_are_refused():
    with pytest.raises(UserError, match=r"student\.max_positions: found 41, the model has 40\. Set at most that"):
        with_positions(tiny("bert"), 41)
    with pytest.raises(UserError, match=r"student\.max_positions: found 39, the model has 38\. Set at most that"):
        with_positions(tiny("roberta"), 39)
    with pytest.raises(UserError, match=r"max_positions: ModernBertFor.* has no table of absolute positions\. Remove"):
        with_positions(tiny("modernbert", **ROTARY), 20)


def test_tables_that_are_not_known_are_refused():
    model = tiny("bert")
    model.bert.embeddings.second_table = torch.nn.Embedding(64, 4)
    with pytest.raises(UserError, match=r"student\.trim_vocabulary: BertFor.* keeps its embeddings in a way that"):
        with_tokens(model, EVERY_SECOND, pad_id=1)


@pytest.mark.parametrize("architecture", ENCODERS)
def test_what_can_be_cut_is_known_before_a_run(architecture: str, tmp_path: Path):
    tiny(architecture).save_pretrained(tmp_path)
    options = {"teacher_folder": tmp_path, "labels": LABELS, "max_length": 20}
    student = student_skeleton(Student(trim_vocabulary=True, max_positions=20), **options)
    assert student.config.max_position_embeddings < 40
    assert {parameter.device.type for parameter in student.parameters()} == {"meta"}
    with pytest.raises(UserError, match=r"student\.max_positions: found 41"):
        student_skeleton(Student(max_positions=41), **options)


def test_a_pretrained_student_is_cut_like_one_from_the_teacher(tiny_classifier: Path, tmp_path: Path):
    settings = Student(init="pretrained", model=str(tiny_classifier), max_positions=32)
    student, _ = build_student(settings, teacher_folder=tmp_path, labels=LABELS, max_length=32, seed=0)
    assert student.config.max_position_embeddings == 32
    assert student.bert.embeddings.position_embeddings.weight.shape == (32, 16)
    assert json.loads((tiny_classifier / "config.json").read_text())["max_position_embeddings"] > 32
