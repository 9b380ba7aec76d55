"""lm-evaluation-harness on a task file of one's own, against the same figure by plain log-probabilities."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from language_runs import texts, tokenizer, write_jsonl, write_model

from raydistill.config.evaluate import Harness
from raydistill.errors import UserError
from raydistill.models.source import ModelSource
from raydistill.record.store import LocalStore
from raydistill.report.language_page import language_table
from raydistill.stages.language.harness import (
    check_harness,
    harness_inputs,
    harness_results,
    read_results,
    write_results,
)

pytest.importorskip("lm_eval")
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}, cache_dir: CACHE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["{{one}}", "{{other}}"]
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> tuple[Harness, Path, list[dict]]:
    folder = tmp_path_factory.mktemp("tasks")
    found = [text.split(". ") for text in texts(24, seed=2)]
    rows = [
        {"question": f"{a[0]}.", "one": b[1], "other": a[1], "right": n % 2} for n, (a, b) in enumerate(pairwise(found))
    ]
    write_jsonl(folder / "data.jsonl", rows)
    (folder / "mine.yaml").write_text(
        TASK.replace("FILE", str(folder / "data.jsonl")).replace("CACHE", str(folder / "cache"))
    )
    made = tokenizer()
    write_model(folder / "model", made, max_position_embeddings=256)
    return Harness(tasks=("mine",), tasks_from=str(folder), limit=20), folder, rows


def test_a_task_of_ones_own(asked):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings, folder, rows = asked
    check_harness(settings)
    found = harness_results(ModelSource("the teacher", str(folder / "model")), settings, "float32")
    model, made = (
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    right = 0
    for row in rows[:20]:
        scores = []
        for choice in (row["one"], row["other"]):
            ids = made(f"{row['question']} {choice}", return_tensors="pt", add_special_tokens=False)["input_ids"]
            start = len(made(row["question"], add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(logprobs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])))
        right += int(scores[1] > scores[0]) == row["right"]
    assert found["mine"]["acc"]["value"] == pytest.approx(right / 20)
    mean = right / 20
    assert found["mine"]["acc"]["stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / 19))


def test_results_are_kept_for_the_report_that_they_belong_to(tmp_path: Path):
    store, results = LocalStore(str(tmp_path)), {"mine": {"acc": {"value": 0.5, "stderr": 0.1}}}
    assert read_results(store, "student", "one") is None
    write_results(store, "student", "one", results)
    assert read_results(store, "student", "one") == results
    assert read_results(store, "student", "other") is None
    assert read_results(store, "control", "one") is None


def test_the_table_has_a_row_for_each_metric():
    models = {name: {"perplexity": 2.0} for name in ("teacher", "student")}
    found = {"teacher": {"mine": {"acc": {"value": 0.5, "stderr": 0.1}}}, "student": {"mine": {"acc": {"value": 0.25}}}}
    _, rows = language_table({**models, "harness": found})
    assert rows[-1] == ["mine, acc", "0.5000 ± 0.1000", "0.2500"]


def test_task_files_are_of_the_reports_plan(asked):
    settings, folder, _ = asked
    before = harness_inputs(settings)
    assert list(before["harness_files"]) == ["mine.yaml"]
    (folder / "mine.yaml").write_text((folder / "mine.yaml").read_text() + "\n")
    assert harness_inputs(settings) != before
    assert harness_inputs(Harness(tasks=("arc_easy",))) == {}


def test_what_the_harness_does_not_know(asked, tmp_path: Path):
    settings, _, _ = asked
    with pytest.raises(
        UserError, match=r"evaluate.harness.tasks: arc_easyy: is no task that is known; there is arc_easy"
    ):
        check_harness(Harness(tasks=("arc_easyy",)))
    with pytest.raises(UserError, match=r"evaluate.harness.tasks_from: .*nowhere: no such folder"):
        check_harness(settings.model_copy(update={"tasks_from": str(tmp_path / "nowhere")}))
    broken = tmp_path / "tasks"
    broken.mkdir()
    (broken / "mine.yaml").write_text(
        TASK.replace("FILE", str(tmp_path / "no.jsonl")).replace("CACHE", str(tmp_path / "cache"))
    )
    asks = Harness(tasks=("mine",), tasks_from=str(broken))
    with pytest.raises(UserError, match=r"evaluate.harness.tasks: mine: cannot be run \("):
        harness_results(ModelSource("the teacher", settings.tasks_from + "/model"), asks, "float32")
