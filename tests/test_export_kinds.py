"""Exports of students of other kinds: RoBERTa, one in an adapter, one whose rows may have several labels."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import LABELS, tiny

from raydistill.adapters import add_adapters, save_adapter
from raydistill.config.student import Lora
from raydistill.data.tokens import load_tokenizer
from raydistill.exports.folder import ExportSource, write_export
from raydistill.models.loading import load_classifier
from raydistill.models.source import ModelSource
from raydistill.serving.answers import Asked, open_model
from raydistill.serving.served import find_served
from raydistill.stages.forward import Forward

pytest.importorskip("onnxruntime")
TEXTS = ["my card was charged twice", "where is my parcel?", "the app crashes on login and then it hangs", "refund me"]
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: number for number, name in enumerate(LABELS)}}


def roberta(folder: Path, tokenizer: Any) -> Any:
    """A RoBERTa, whose positions begin after its padding id."""
    pad = tokenizer.pad_token_id
    model = tiny("roberta", vocab_size=len(tokenizer), pad_token_id=pad, num_hidden_layers=2, **NAMES)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def adapter(folder: Path, tokenizer: Any) -> Any:
    """A BERT in an adapter, not merged, whose adapters are not 0."""
    pytest.importorskip("peft")
    base = tiny("bert", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, num_hidden_layers=2, **NAMES)
    base.save_pretrained(folder / "base")
    adapted = add_adapters(base, Lora(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    save_adapter(adapted, folder, base=str(folder / "base"))
    tokenizer.save_pretrained(folder)
    return adapted


def sets(folder: Path, tokenizer: Any) -> Any:
    """A DistilBERT each of whose classes is a question of its own."""
    names = {**NAMES, "problem_type": "multi_label_classification"}
    model = tiny("distilbert", vocab_size=len(tokenizer), n_layers=2, dim=16, n_heads=2, pad_token_id=0, **names)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("make", [roberta, adapter, sets])
def test_the_files_answer_as_the_student(tiny_encoder: Path, tmp_path: Path, make: Any):
    tokenizer = load_tokenizer(tiny_encoder, "student")
    tokenizer.model_max_length = 16
    model = make(tmp_path / "student", tokenizer).eval()
    with torch.no_grad():
        inputs = [tokenizer(t, truncation=True, max_length=16, return_tensors="pt") for t in TEXTS]
        logits = [model(input_ids=i["input_ids"], attention_mask=i["attention_mask"]).logits[0] for i in inputs]
    expected, multi_label = torch.stack(logits).numpy(), make is sets
    student = ModelSource("student", str(tmp_path / "student"))
    for format_name, within in (("onnx", 1e-4), ("safetensors-bf16", 0.1)):
        folder = tmp_path / format_name
        loaded = load_classifier("student", tmp_path / "student")
        write_export(loaded, copy.deepcopy(tokenizer), folder, format_name, max_length=16, multi_label=multi_label)
        forward = Forward(ExportSource("export", str(folder)), LABELS, max_length=16)
        found = forward.logits(forward.tokens(TEXTS))
        assert abs(found - expected).max() <= within * max(1, abs(expected).max()), format_name
    forward = Forward(student, LABELS, max_length=16)
    assert abs(forward.logits(forward.tokens(TEXTS)) - expected).max() <= 1e-4
    served = find_served(str(tmp_path / "onnx"))
    assert served.task == ("multi_label" if multi_label else "classification")
    assert served.labels == tuple(LABELS)
    answers = open_model(served, Asked())(TEXTS)
    if multi_label:
        assert abs(expected).min() > 1e-3  # no probability is near one half
        found_sets = [{one["label"] for one in answer["labels"]} for answer in answers]
        assert found_sets == [{LABELS[k] for k, value in enumerate(row) if value > 0} for row in expected]
        _check_program(tmp_path / "onnx", found_sets)
    else:
        assert [answer["label"] for answer in answers] == [LABELS[k] for k in expected.argmax(1)]


def _check_program(folder: Path, expected: list[set[str]]) -> None:
    """Its own program prints every label with its probability."""
    command = [sys.executable, "-I", str(folder / "predict.py"), *TEXTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") if line else [] for line in done.stdout.splitlines()]
    assert [set(line[::2]) for line in lines] == expected
