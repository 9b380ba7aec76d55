"""Prompts that the teacher answers, and students of what it wrote, through the real stages without Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from language_runs import texts, tokenizer, write_jsonl
from run_files import column, facts, manifest, points

from raydistill.config.file import validate
from raydistill.data.documents import Document
from raydistill.data.prompts import StoredPrompt
from raydistill.data.sources import Dropped
from raydistill.data.token_rows import Answer, Rules, TokenPrompt, tokenise_documents
from raydistill.data.tokens import load_tokenizer
from raydistill.stages.language.answering import batches
from raydistill.stages.pipeline import plan
from raydistill.stages.progress import Progress

ASKED = {
    "data.prompt": "question", "data.response": "answer", "train.batch_size": 2, "evaluate.control": False,
    "data.synthesis": {"max_new_tokens": 8, "answers": 2, "seed": 3},
}  # fmt: skip
OWN_ROWS, ASKED_ROWS = 12, 24


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    return [{"question": text.split(". ")[0], "answer": " " + text.split(". ")[1]} for text in texts(count, seed=seed)]


@pytest.fixture(scope="module")
def source(language_runs, tmp_path_factory) -> Path:
    """A third of train with responses, prompts of another domain, and a test with responses."""
    folder = tmp_path_factory.mktemp("asked") / "input"
    shutil.copytree(language_runs.input, folder)
    rows = pairs(OWN_ROWS + ASKED_ROWS, seed=5)
    for number, row in enumerate(rows):
        if number % 3:
            row["answer"] = (None, "", " ")[number % 5 % 3]
        if number % 5 == 4 and number % 3:
            del row["answer"]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", pairs(10, seed=6))
    write_jsonl(folder / "other.jsonl", [{"question": f"How far is it to {n} mills?"} for n in range(30)])
    return folder


@pytest.fixture(scope="module")
def answered(language_runs, source: Path) -> tuple[Path, dict[str, Any]]:
    folder = language_runs.start("prepare")
    answer = language_runs.run(folder, "prepare", source=str(source), changes=ASKED)
    assert answer["error"] is None, answer["error"]
    return folder, answer


def answers_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [
        row
        for e in manifest(folder, "answers").shards(split)
        for row in pq.read_table(folder / "answers" / e.file).to_pylist()
    ]


def shards(folder: Path, part: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted((folder / part).rglob("*.parquet"))}


def test_every_prompt_without_a_response_is_answered_and_learnt(answered, source: Path):
    folder, _ = answered
    found = facts(folder, "data")
    counts = found["counts"]
    # A fifth of train's documents is drawn for validation, whoever wrote their responses.
    assert counts["validation"]["documents"] == 7
    assert sum(found["asked"].values()) == ASKED_ROWS
    assert counts["train"]["documents"] + counts["unlabelled"]["documents"] == 36 - 7
    assert counts["unlabelled"]["rows"] <= 2 * counts["unlabelled"]["documents"]
    questions = [
        row["question"]
        for row in map(json.loads, (source / "train.jsonl").read_text().splitlines())
        if not (row.get("answer") or "").strip()
    ]
    asked = [row["prompt"] for split in ("unlabelled", "validation") for row in answers_of(folder, split)]
    assert sorted(asked) == sorted(questions)


def test_rows_are_prompt_answer_and_end(answered, source: Path):
    folder, _ = answered
    made = load_tokenizer(source / "teacher", "teacher.model")
    rows, learnt = column(folder, "unlabelled", "tokens"), column(folder, "unlabelled", "learnt")
    documents = column(folder, "unlabelled", "document")
    expected, borders, of = [], [], []
    for number, row in enumerate(answers_of(folder, "unlabelled")):
        prompt = [made.bos_token_id, *made(row["prompt"], add_special_tokens=False)["input_ids"]]
        assert len(row["answers"]) == 2
        for one in row["answers"]:
            end = [made.eos_token_id] if one["has_end"] else []
            assert one["tokens"] <= 8
            assert one["has_end"] or one["tokens"] == min(8, 48 - len(prompt))
            if one["text"].strip():
                expected.append((prompt + made(one["text"], add_special_tokens=False)["input_ids"] + end)[:48])
                borders.append(len(prompt))
                of.append(number)
    assert rows == expected
    assert [np.frombuffer(mask, bool).argmax() for mask in learnt] == borders
    # Both answers to a prompt are one document.
    assert np.unique(of, return_inverse=True)[1].tolist() == documents


def test_another_run_and_other_actors_write_the_same(language_runs, source: Path, answered):
    folder = language_runs.start("prepare")
    changes = {**ASKED, "teacher.actors": 1, "teacher.tokens_per_batch": 64}
    answer = language_runs.run(folder, "prepare", source=str(source), changes=changes)
    assert answer["error"] is None, answer["error"]
    assert shards(folder, "answers") == shards(answered[0], "answers")
    assert shards(folder, "data") == shards(answered[0], "data")


def places(operations: list[str]) -> dict[str, int]:
    """Where a run may be killed: as its first shard of answers is published, once it stands, as data are written."""
    published = [n for n, operation in enumerate(operations, 1) if operation == "rename unlabelled-00000.parquet"]
    return {"first answers": published[1], "committed": published[1] + 4, "data": published[2]}


@pytest.mark.parametrize("place", ["first answers", "committed", "data"])
def test_a_killed_synthesis_goes_on_to_the_same_bytes(language_runs, source: Path, answered, place: str):
    whole, answer = answered
    folder = language_runs.start("prepare")
    number = places(answer["operations"])[place]
    assert language_runs.run(folder, "prepare", source=str(source), changes=ASKED, fault=f"{number}:kill") == {
        "exit": -9
    }
    standing = {path.name for path in (folder / "answers").glob("*-*.json")}
    again = language_runs.run(folder, "prepare", source=str(source), changes=ASKED)
    assert again["error"] is None, again["error"]
    assert not {name.replace(".json", ".parquet") for name in standing} & set(again["scored"])
    assert len(again["scored"]) + len(standing) == len(answer["scored"])
    assert shards(folder, "answers") == shards(whole, "answers")
    assert shards(folder, "data") == shards(whole, "data")


def test_the_plan_says_how_much_the_teacher_writes(source: Path, tmp_path: Path):
    settings = {
        "name": "planned", "storage": str(tmp_path), "task": "causal_lm",
        "data": {
            "train": str(source / "train.jsonl"), "test": str(source / "test.jsonl"), "max_length": 48,
            "prompt": "question", "response": "answer", "synthesis": {"max_new_tokens": 8, "answers": 2},
        },
        "teacher": {"model": str(source / "teacher")},
        "student": {"init": "config", "model_type": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2},
    }  # fmt: skip
    lines = plan(validate(settings, {}, "test"), Progress()).lines()
    assert "answers that the teacher writes: 48 to 24 prompts, of 8 tokens at most, which come to those above" in lines
    assert not (tmp_path / "planned").exists()


def test_a_student_of_logits_over_what_the_teacher_wrote(language_runs, source: Path, answered):
    folder = Path(answered[0])
    answer = language_runs.run(folder, "teach", "train", source=str(source), changes=ASKED)
    assert answer["error"] is None, answer["error"]
    counts, cache = facts(folder, "data")["counts"], facts(folder, "teacher/cache")
    assert cache["positions"] == sum(counts[split]["learnt"] for split in ("train", "validation", "unlabelled"))
    assert points(folder, "validation")[-1]["kl"] < points(folder, "validation")[0]["kl"]


def test_sequence_level_distillation_with_a_control_of_the_texts(language_runs, source: Path):
    folder = language_runs.start("prepare")
    changes = {
        **ASKED, "data.synthesis": {"max_new_tokens": 8, "rows": "all", "temperature": 0}, "evaluate.control": True,
        "teacher.next_tokens": {"codec": "none"}, "train.metric": "nll",
    }  # fmt: skip
    answer = language_runs.run(folder, "prepare", "teach", "train", "evaluate", source=str(source), changes=changes)
    assert answer["error"] is None, answer["error"]
    counts = facts(folder, "data")["counts"]
    # Those drawn for validation that have no response of their own are the only ones that are answered for it.
    asked = facts(folder, "data")["asked"]
    own = counts["validation"]["documents"] - asked.get("validation", 0)
    assert counts["train"]["documents"] == OWN_ROWS - own
    assert asked["unlabelled"] == 36 - 7
    assert counts["unlabelled"]["documents"] <= 29
    assert facts(folder, "teacher/cache")["positions"] == 0
    assert not list((folder / "teacher/cache").glob("*.parquet"))
    # A batch has 2 x 48 tokens, and there are two epochs.
    assert abs(facts(folder, "student")["steps"] - 2 * counts["unlabelled"]["tokens"] / 96) <= 2
    assert facts(folder, "student")["steps"] == facts(folder, "control/model")["steps"]
    report = json.loads((folder / "report/report.json").read_text())
    assert report["cache"]["codec"] == "none"
    assert any("the teacher answered" in line for line in report["data_report"])
    assert "and from none of its logits" in (folder / "report/report.html").read_text()


def test_prompts_of_another_domain_are_a_drawn_share(language_runs, source: Path):
    folder = language_runs.start("prepare")
    changes = {**ASKED, "data.unlabelled": str(source / "other.jsonl"), "data.unlabelled_share": 0.25}
    answer = language_runs.run(folder, "prepare", source=str(source), changes=changes)
    assert answer["error"] is None, answer["error"]
    # 29 documents of train are not for validation: 10 of 39 are about a quarter.
    assert facts(folder, "data")["out_of_domain"] == {"asked": 10, "there": 30}
    assert any("10 of those are of data.unlabelled's 30" in line for line in answer["said"])
    mills = [row["prompt"] for row in answers_of(folder, "unlabelled") if row["prompt"].startswith("How far")]
    assert len(set(mills)) == 10
    assert mills != [f"How far is it to {n} mills?" for n in range(10)]
    refused = language_runs.run(
        language_runs.start("prepare"), "prepare", source=str(source),
        changes={**changes, "data.unlabelled_share": 0.8},
    )  # fmt: skip
    assert "data.unlabelled_share: a share of 0.8 beside 29 documents is 116 prompts" in refused["error"]


def test_responses_of_another_model_are_for_the_student_alone(language_runs, source: Path):
    write_jsonl(source / "theirs.jsonl", pairs(14, seed=9))
    folder = language_runs.start("prepare")
    changes = {
        "data.prompt": "question", "data.response": "answer", "data.train": str(source / "test.jsonl"),
        "data.answered": str(source / "theirs.jsonl"), "teacher.next_tokens": {"codec": "none"}, "train.metric": "nll",
        "train.batch_size": 2,
    }  # fmt: skip
    answer = language_runs.run(folder, "prepare", "teach", "train", source=str(source), changes=changes)
    assert answer["error"] is None, answer["error"]
    assert facts(folder, "data")["counts"]["unlabelled"]["documents"] == facts(folder, "data")["answered"] == 14
    assert not (folder / "answers").exists()


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_chats_that_end_with_a_question_are_answered(language_runs, source: Path, tmp_path: Path):
    chats = tmp_path / "input"
    shutil.copytree(source, chats)
    (chats / "teacher/chat_template.jinja").write_text(TEMPLATE)
    question = [{"role": "user", "content": "Where is Tom?"}]
    write_jsonl(
        chats / "train.jsonl",
        [{"chat": [*question, *([{"role": "user", "content": str(n)}] * (n % 2))]} for n in range(12)],
    )
    write_jsonl(chats / "test.jsonl", [{"chat": [*question, {"role": "assistant", "content": "At the mill."}]}] * 4)
    folder = language_runs.start("prepare")
    changes = {**ASKED, "data.prompt": None, "data.response": None, "data.messages": "chat"}
    answer = language_runs.run(folder, "prepare", source=str(chats), changes=changes)
    assert answer["error"] is None, answer["error"]
    asked = answers_of(folder, "unlabelled")
    assert {row["prompt"] for row in asked} >= {"user: Where is Tom?</s>assistant: "}
    assert facts(folder, "data")["counts"]["train"]["documents"] == 0
    made = load_tokenizer(chats / "teacher", "teacher.model")
    rows = column(folder, "unlabelled", "tokens")
    for tokens, mask in zip(rows, column(folder, "unlabelled", "learnt"), strict=True):
        text, border = made.decode(tokens), int(np.frombuffer(mask, bool).argmax())
        assert made.decode(tokens[:border]).endswith("</s>assistant: ")
        assert text.startswith("user: Where is Tom?</s>")


def test_what_did_not_come_to_its_end_teaches_none():
    made = tokenizer()
    made.chat_template = TEMPLATE
    rules, messages = Rules(made, 60, splits=True), (("user", "Where?"),)
    (asked,) = rules.tokenised([Document(None, None, 0, 1, messages, is_asked=True)])
    assert asked.prompt is not None
    for prompt, before in [
        (asked.prompt, "user: Where?</s>assistant: "),
        (
            TokenPrompt("Where?", np.array([made.bos_token_id, *made("Where?")["input_ids"]], np.int32), None),
            "<s>Where?",
        ),
    ]:
        answers = [Answer("There.", True), Answer("In the", False), Answer(" ", True)]
        whole, cut = rules.answered(prompt, answers, 0, 1).rows
        assert made.decode(whole.tokens_L) == before + "There.</s>"
        assert made.decode(cut.tokens_L) == before + "In the"
        assert made.decode(cut.tokens_L[cut.learnt_L]) == "In the"


def test_prompts_of_equal_length_are_answered_together_in_order():
    lengths = [3, 5, 3, 3, 2, 5, 3]
    prompts = [StoredPrompt(n, TokenPrompt("", np.zeros(k, np.int32), None), 0, n) for n, k in enumerate(lengths)]
    for size, expected in {1: [[4], [0], [2], [3], [6], [1], [5]], 3: [[4], [0, 2, 3], [6], [1, 5]]}.items():
        assert [[one.prompt_id for one in group] for group in batches(prompts, size)] == expected


def test_a_prompt_that_fills_its_row_is_not_asked():
    made = tokenizer()
    length = len(made("Where is Tom?")["input_ids"]) + 1
    prompt = Document("Where is Tom?", None, 0, 7, is_asked=True)
    (full,) = tokenise_documents([prompt], Rules(made, length, splits=True))
    assert full == Dropped("no room for a response", 0, 7)
    (asked,) = tokenise_documents([prompt], Rules(made, length + 1, splits=True))
    assert not isinstance(asked, Dropped)
    assert asked.prompt is not None
    assert len(asked.prompt.tokens_L) == length


MESSAGES = [
    ({"data.synthesis": {"temperature": 0, "answers": 2}}, "answers: found 2 with temperature 0"),
    ({"data.synthesis": {"engine": "vllm"}}, "data.synthesis.engine: vllm needs the package vllm. Run pip install"),
    ({"data.synthesis": {}, "data.prompt": None, "data.response": None}, "data.synthesis is about prompts; name thei"),
    ({"data.synthesis": {}, "teacher.fine_tune": {}}, "teacher.fine_tune trains a teacher on prepared rows"),
    ({"data.synthesis": None}, "train.jsonl: row 2: no response; 24 of 36 rows cannot be used"),
    ({"data.response": None}, "data.response: test needs responses; name their column, or set data.synthesis.test"),
    ({"data.synthesis": None, "data.unlabelled": "other.jsonl"}, "data.unlabelled has prompts alone, which nobody ans"),
    ({"data.unlabelled_share": 0.2}, "data.unlabelled_share means nothing without data.unlabelled"),
    ({"data.synthesis": None, "teacher.next_tokens": {"codec": "none"}}, "codec: none learns from what the teacher wr"),
    ({"teacher.next_tokens": {"codec": "none"}, "train.loss.alpha": 0.5}, "train.loss.alpha: teacher.next_tokens."),
    ({"teacher.next_tokens": {"codec": "none"}}, "train.metric: kl needs logits"),
    ({"data.train": "TEST"}, "data.synthesis: every prompt has its response, so that nothing is written"),
    ({"data.train": "OTHER", "evaluate.control": True}, "evaluate.control: the control learns without the teacher"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MESSAGES, ids=[str(index) for index in range(len(MESSAGES))])
def test_what_does_not_fit_is_refused_before_a_worker(
    language_runs, source: Path, changes: dict[str, Any], message: str
):
    files = {"TEST": str(source / "test.jsonl"), "OTHER": str(source / "other.jsonl")}
    changes = {name: files.get(str(value), value) for name, value in changes.items()}
    folder = language_runs.start("prepare")
    answer = language_runs.run(
        folder, "prepare", "teach", "train", "evaluate", source=str(source), changes={**ASKED, **changes}
    )
    assert message in (answer["error"] or "")
    assert not (folder / "config.yaml").exists()
    assert not answer["scored"]
