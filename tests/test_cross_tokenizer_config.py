"""What settings a student with another tokenizer needs, and which ones do not fit it."""

from __future__ import annotations

from typing import Any

import pytest

from raydistill.config.cross_tokenizer import crosses_tokenizers, student_length
from raydistill.config.file import validate
from raydistill.config.run import Config
from raydistill.config.section import identity
from raydistill.errors import UserError

STUDENT = {"init": "config", "model_type": "llama", "hidden_size": 16, "num_layers": 1}


def made(**changes: Any) -> Config:
    settings: dict[str, Any] = {
        "name": "x", "task": "causal_lm", "data": {"train": "a.jsonl", "test": "b.jsonl"}, "teacher": {"model": "m"},
        "student": {**STUDENT, "tokenizer": "own"}, "train": {"loss": {"cross_tokenizer": "spans"}},
    }  # fmt: skip
    for name, value in changes.items():
        *sections, key = name.split("__")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return validate(settings, {}, "test")


def test_what_is_needed_is_set():
    config = made()
    assert config.data.keep_text
    assert config.teacher.next_tokens is not None
    assert config.teacher.next_tokens.text_logprobs
    assert config.train.loss.temperature == 100
    assert crosses_tokenizers(config)
    assert student_length(config) == config.data.max_length
    config = made(train__loss={"cross_tokenizer": "uld"}, student__max_length=300)
    assert config.data.keep_text
    assert config.teacher.next_tokens is None
    assert config.train.loss.temperature == 1
    assert student_length(config) == 300
    assert made(train__loss={"cross_tokenizer": "spans", "temperature": 7.0}).train.loss.temperature == 7


def test_a_run_without_it_keeps_its_fingerprints():
    config = made(student=STUDENT, train={}, teacher={"model": "m", "next_tokens": {}})
    assert not crosses_tokenizers(config)
    for section in (config.data, config.student, config.train.loss, config.teacher.next_tokens):
        assert section is not None
        added = {"keep_text", "tokenizer", "max_length", "cross_tokenizer", "text_logprobs"}
        assert set(identity(section)) & added <= {"max_length"}
    assert "max_length" not in identity(config.student)


def test_stages_have_it_all_or_none():
    stages = [{"name": "a", "loss": {"cross_tokenizer": "spans"}}, {"name": "b", "loss": {"cross_tokenizer": "uld"}}]
    config = made(train={"stages": stages})
    assert config.data.keep_text
    assert [loss.temperature for loss in config.train.losses] == [100, 1]
    with pytest.raises(UserError, match="some stages' losses have it and others not"):
        made(train={"stages": [stages[0], {"name": "b", "loss": {}}]})
    with pytest.raises(UserError, match=r"train.stages\[1\].teacher: previous scores rows as the teacher's tokenizer"):
        made(train={"stages": [stages[0], {**stages[1], "teacher": "previous"}]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student__tokenizer": None}, r"student.init: config needs student.tokenizer"),
        ({"student": {"init": "teacher_layers"}}, r"with student.init: teacher_layers the tokenizer is the teacher's"),
        ({"student": {"init": "pretrained", "model": "m", "tokenizer": "t"}}, r"tokenizer means nothing with init"),
        ({"train__loss": {"cross_tokenizer": "spans", "kind": "jsd"}}, r"train.loss.kind: jsd compares tokens of one"),
        ({"train__loss": {"cross_tokenizer": "words"}}, r"cross_tokenizer"),
        ({"train": {}}, r"student.tokenizer means nothing without train.loss.cross_tokenizer"),
        ({"train": {}, "student": {**STUDENT, "max_length": 9}}, r"student.max_length means nothing without"),
        ({"train__metric": "kl"}, r"train.metric: kl compares next tokens"),
        (
            {"train__stages": [{"name": "a", "metric": "agreement"}]},
            r"train.stages\[0\].metric: agreement compares next tokens",
        ),
        ({"data__keep_text": False}, r"data.keep_text: train.loss.cross_tokenizer aligns tokens"),
        ({"teacher__next_tokens": {"text_logprobs": False}}, r"spans learns from them; set it to true"),
        ({"teacher__next_tokens": {"codec": "none", "text_logprobs": True}}, r"text_logprobs means nothing with codec"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        made(**changes)


@pytest.mark.parametrize("name", ["student.tokenizer", "student.max_length"])
def test_a_search_has_one_tokenizer(name: str):
    space = {name: {"choice": [40, 50] if name.endswith("length") else ["one", "other"]}}
    with pytest.raises(UserError, match=r"rows are tokenised once, for one student's tokenizer"):
        made(tune={"space": space, "trials": 2})


def test_a_search_has_one_loss_between_tokenizers():
    """Trials of another one would find rows or a cache that were not made for it, where they are in lists as well."""
    stages = [[{"name": "a", "loss": {"cross_tokenizer": name}}] for name in ("spans", "uld")]
    for name, values in {"train.loss.cross_tokenizer": ["spans", "uld"], "train.stages": stages}.items():
        with pytest.raises(UserError, match=rf"tune.space.{name}: rows and cache are made for one train.loss.cross"):
            made(tune={"space": {name: {"choice": values}}, "trials": 2})
    alpha = {
        "train.loss.alpha": {"choice": [0.1, 0.9]},
        "train.stages": {"choice": [stages[0], [*stages[0], {**stages[0][0], "name": "b"}]]},
    }
    assert made(tune={"space": alpha, "trials": 2}).tune is not None


def test_other_tasks_do_not_know_it():
    data = {"train": "a.csv", "test": "b.csv", "label": "l"}
    for train in (
        {"loss": {"cross_tokenizer": "spans"}},
        {"stages": [{"name": "a", "loss": {"cross_tokenizer": "uld"}}]},
    ):
        with pytest.raises(UserError, match=r"loss.cross_tokenizer means nothing with task: classification"):
            made(task="classification", data=data, student={}, train=train)
