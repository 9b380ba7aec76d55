"""Whether `train.exclude` helps a student of a teacher that is wrong in a way that is known: refunds are billing to it.

Run with -s, it prints the table of docs/log.md.
"""

import csv
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import SmallRuns

from raydistill.data.tokens import load_tokenizer
from raydistill.demo import write_new_bert
from raydistill.models.loading import load_classifier, start_classifier
from raydistill.tickets import CATEGORIES, write_tickets

SEEDS = (0, 1)
WRONG, SAID = "refund", "billing"
RULES: dict[str, dict[str, Any] | None] = {
    "nothing excluded": None,
    "wrong: true": {"wrong": True},
    "classes: [refund]": {"classes": [WRONG]},
    "confidence_below: 0.6": {"confidence_below": 0.6},
}
BATCH = 32


def rows_of(path: Path) -> list[tuple[str, str]]:
    with open(path, newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def train_teacher(folder: Path, rows: list[tuple[str, str]], base: Path) -> None:
    """A classifier that learned the rows with every refund called billing, by a plain loop of torch."""
    labels, tokenizer = sorted(CATEGORIES), load_tokenizer(base, "teacher")
    torch.manual_seed(0)
    model = start_classifier("teacher", base, labels).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    answers = torch.tensor([labels.index(SAID if name == WRONG else name) for _, name in rows])
    random = np.random.default_rng(0)
    for _ in range(4):
        for batch in np.array_split(random.permutation(len(rows)), len(rows) // BATCH):
            inputs = tokenizer([rows[i][0] for i in batch], padding=True, return_tensors="pt")
            model(**inputs, labels=answers[torch.from_numpy(batch)]).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def accuracy(model: Path, rows: list[tuple[str, str]]) -> tuple[float, float]:
    """On all rows, and on those that the teacher has wrong by what it learned."""
    labels, tokenizer, made = sorted(CATEGORIES), load_tokenizer(model, "x"), load_classifier("x", model)
    found = []
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            inputs = tokenizer([text for text, _ in rows[start : start + BATCH]], padding=True, return_tensors="pt")
            found += made(**inputs).logits.argmax(dim=-1).tolist()
    right = np.array([labels[number] == name for number, (_, name) in zip(found, rows, strict=True)])
    return float(right.mean()), float(right[[name == WRONG for _, name in rows]].mean())


@pytest.fixture(scope="module")
def taught(runs: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with the teacher's cache, and the settings of the trainings on it."""
    place = tmp_path_factory.mktemp("planted")
    train, test = write_tickets(place, train_rows=1000, test_rows=1000)
    write_new_bert(
        place / "bert", [text for text, _ in rows_of(train)], hidden_size=64, layers=2, heads=2, vocabulary=800
    )
    train_teacher(place / "teacher", rows_of(train), place / "bert")
    changes = {
        "data.train": str(train), "data.test": str(test), "data.shard_rows": 512,
        "teacher.model": str(place / "teacher"),
        "student.hidden_size": 32, "train.epochs": 8, "train.batch_size": 32, "train.learning_rate": 2e-3,
        "train.choose": "last", "train.checkpoint_every": 1000, "train.loss": {"temperature": 2.0, "alpha": 0.9},
    }  # fmt: skip
    folder = runs.folder / "planted"
    answer = runs.run(folder, "prepare", "teach", changes=changes)
    assert answer["error"] is None, answer["error"]
    return folder, changes


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_student_without_the_rows_that_the_teacher_has_wrong_is_right_there(runs: SmallRuns, taught: Any):
    folder, changes = taught
    rows, found = rows_of(Path(changes["data.test"])), {}
    found["the teacher"] = [accuracy(Path(changes["teacher.model"]), rows)]
    for name, rule in RULES.items():
        found[name] = []
        for seed in SEEDS:
            copy = folder.with_name(f"planted-{len(found)}-{seed}")
            for part in ("data", "teacher"):
                shutil.copytree(folder / part, copy / part)
            asked = changes | {"train.seed": seed} | ({"train.exclude": rule} if rule else {})
            answer = runs.run(copy, "train", changes=asked, plain=True)
            assert answer["error"] is None, answer["error"]
            found[name].append(accuracy(copy / "student", rows))
    means = {name: tuple(map(statistics.fmean, zip(*values, strict=True))) for name, values in found.items()}
    print("\n" + json.dumps({"means": means, "seeds": found}, indent=1))
    plain, right = means["nothing excluded"], means["wrong: true"]
    assert means["the teacher"][1] < 0.2
    assert right[0] > plain[0] + 0.05  # of all rows a sixth are refunds
    assert right[1] > plain[1] + 0.3
