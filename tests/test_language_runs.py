"""Runs of language models through the real stages, without Ray."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from language_runs import mean_nll, texts, tiny_language_model, tokenizer, write_jsonl, write_model
from run_files import equal, facts, points, student_weights
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from raydistill.data.tokens import load_tokenizer
from raydistill.models.folders import tokenizer_identity
from raydistill.record.fingerprint import digest
from raydistill.record.store import sha256_file

CODECS = {
    "random": {"codec": "random", "kept": 20}, "topk": {"codec": "topk", "kept": 20}, "hidden": {"codec": "hidden"},
    "dense": {"codec": "dense"},
}  # fmt: skip
ALL = ("teach", "train")


@pytest.fixture(scope="module")
def by_codec(language_runs) -> dict[str, Path]:
    """A student from each codec, on the same data; sampled is the undisturbed run."""
    found = {"sampled": language_runs.whole}
    for name, settings in CODECS.items():
        found[name] = language_runs.start("teach")
        answer = language_runs.run(found[name], *ALL, changes={"teacher.next_tokens": settings})
        assert answer["error"] is None, answer["error"]
    return found


def test_every_codec_trains_a_student_that_comes_nearer_to_the_teacher(by_codec: dict[str, Path]):
    for name, folder in by_codec.items():
        first, last = points(folder, "validation")[0], points(folder, "validation")[-1]
        assert last["kl"] < first["kl"], name
        assert set(last) >= {"nll", "accuracy", "kl", "agreement"}
    sampled, dense = (points(by_codec[name], "validation")[-1]["nll"] for name in ("sampled", "dense"))
    assert sampled == pytest.approx(dense, rel=0.02)


def test_hidden_states_and_logits_teach_the_same(by_codec: dict[str, Path]):
    for one, other in zip(points(by_codec["hidden"], "train"), points(by_codec["dense"], "train"), strict=True):
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-2)
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-3)


def test_a_cut_teacher_gives_a_lower_bound_and_a_sample_the_loss_in_the_mean(by_codec: dict[str, Path]):
    # Before anything is learned all students are the same, and so are their first batches.
    first = {name: points(folder, "train")[0]["kl"] for name, folder in by_codec.items()}
    assert first["topk"] < first["dense"]
    assert first["sampled"] == pytest.approx(first["dense"], rel=0.1)
    assert first["random"] == pytest.approx(first["dense"], rel=0.1)


def test_a_cache_says_what_it_holds(by_codec: dict[str, Path]):
    for name, folder in by_codec.items():
        found = facts(folder, "teacher/cache")
        data = facts(folder, "data")["counts"]
        assert found["positions"] == data["train"]["learnt"] + data["validation"]["learnt"]
        assert (found["codec"], found["forwards"]) == (name, found["rows"])
        stored = sum(path.stat().st_size for path in (folder / "teacher/cache").glob("*.parquet"))
        assert found["bytes_per_position"] * found["positions"] == pytest.approx(stored)


@pytest.mark.parametrize(
    "place", ["rename train-00000.parquet", "rename validation-00000.json", "rename MANIFEST.json"]
)
def test_a_cache_whose_making_was_killed_has_the_same_bytes(language_runs, place: str):
    with language_runs.killed("teach", language_runs.place("teach", place)) as folder:
        language_runs.go_on(folder, "teach")


@pytest.mark.parametrize("place", ["rename train-00001.parquet", "rename alphabet.parquet"])
def test_data_whose_making_was_killed_have_the_same_bytes(language_runs, place: str):
    with language_runs.killed("prepare", language_runs.place("prepare", place)) as folder:
        language_runs.go_on(folder, "prepare")


def test_a_killed_training_goes_on_within_its_epoch_to_the_same_weights(language_runs):
    place = language_runs.place("train", "rename step-00000012")
    with language_runs.killed("train", place) as folder:
        answer = language_runs.go_on(folder, "train")
    assert next(post["going_on_from"] for post in answer["posts"] if "going_on_from" in post) == 9


@pytest.mark.parametrize(
    "changes",
    [
        {"train.workers": 2}, {"train.accumulation": 3}, {"train.deepspeed": {"zero_stage": 3}},
        pytest.param({"train.workers": 2, "train.deepspeed": {"zero_stage": 3}}, marks=pytest.mark.slow),
    ],
    ids=["two ranks", "three micro-batches", "ZeRO 3", "two ranks of ZeRO 3"],
)  # fmt: skip
def test_how_a_batch_is_spread_does_not_change_the_curve(language_runs, changes: dict[str, Any]):
    folder, answer = language_runs.trained(changes)
    assert answer["error"] is None
    ours, theirs = points(folder, "train"), points(language_runs.whole, "train")
    assert [point["loss"] for point in ours] == pytest.approx([point["loss"] for point in theirs], rel=1e-4)
    for one, other in zip(points(folder, "validation"), points(language_runs.whole, "validation"), strict=True):
        assert one["nll"] == pytest.approx(other["nll"], rel=1e-4)
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3)


def test_one_process_without_deepspeed_has_the_same_bits(language_runs):
    folder, answer = language_runs.trained({}, plain=True)
    assert answer["error"] is None
    assert equal(student_weights(folder), student_weights(language_runs.whole))


def test_checkpointed_gradients_and_changing_numbers(language_runs):
    folder, answer = language_runs.trained({"train.gradient_checkpointing": True})
    assert answer["error"] is None
    assert points(folder, "train")[-1]["loss"] == pytest.approx(
        points(language_runs.whole, "train")[-1]["loss"], rel=1e-5
    )
    folder, answer = language_runs.trained({"train.loss.alpha": 1.0, "train.loss.alpha_end": 0.0, "train.log_every": 1})
    assert answer["error"] is None
    for point in points(folder, "train"):
        assert point["loss"] == pytest.approx(
            point["alpha"] * point["kl"] + (1 - point["alpha"]) * point["cross_entropy"], rel=1e-5
        )


@pytest.fixture(scope="module")
def reported(language_runs) -> Path:
    """A whole run with a fine-tuned teacher, its control and its report."""
    folder = language_runs.start("prepare")
    changes = {
        "teacher.fine_tune": {"epochs": 1, "learning_rate": 1e-2, "batch_size": 8, "precision": "fp32"},
        "teacher.next_tokens": {"codec": "hidden"},
    }
    answer = language_runs.run(folder, "prepare", "teach", "train", "evaluate", changes=changes)
    assert answer["error"] is None, answer["error"]
    return folder


def test_the_report_has_the_perplexity_that_transformers_finds(reported: Path):
    report = json.loads((reported / "report/report.json").read_text())
    folders = {"teacher": "teacher/model", "student": "student", "control": "control/model"}
    for name, folder in folders.items():
        nll, count = mean_nll(reported, AutoModelForCausalLM.from_pretrained(reported / folder), "test")
        assert count == report["test_positions"]
        assert report[name]["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    teacher, student, control = (report[name]["perplexity"] for name in folders)
    assert report["retention"] == pytest.approx(teacher / student)
    assert report["gain_over_control"] == pytest.approx(control - student)
    low, high = report["retention_ci95"]
    assert low < report["retention"] < high
    assert report["teacher_forwards_per_row"] == 1
    assert "kl_to_teacher" not in report["teacher"]
    assert report["student"]["kl_to_teacher"] > 0
    assert report["student"]["agreement"] <= report["student"]["agreement_top5"] <= 1
    assert [set(sample) for sample in report["samples"]] == [{"prompt", "test", *folders}] * 2
    page = (reported / "report/report.html").read_text()
    assert report["samples"][0]["prompt"].split()[0] in page
    assert f"{student:.3f}" in page
    assert re.findall(r'aria-label="([^"]*)"', page) == [
        "perplexity against size and latency", "reliability of the models' probabilities",
        "validation over the training",
    ]  # fmt: skip
    assert {name: sum(one["rows"] for one in bins["as_it_is"]) for name, bins in report["reliability"].items()} == (
        dict.fromkeys(folders, report["test_positions"])
    )
    assert [p["nll"] for p in report["curves"]["student"]] == [p["nll"] for p in points(reported, "validation")]
    # Keys and values of the student's one layer: 2 heads of 8 numbers each, of 4 bytes.
    assert report["student"]["memory_cache_bytes"] == 2 * 16 * 4 * report["student"]["memory_cache_tokens"]
    assert report["student"]["memory_weights_bytes"] == pytest.approx(4 * report["student"]["parameters"], rel=0.01)


def test_the_student_opens_with_transformers(reported: Path):
    from transformers import pipeline

    write = pipeline("text-generation", model=str(reported / "student"))
    (found,) = write("Tom is at the mill", max_new_tokens=3, do_sample=False)
    assert found["generated_text"].startswith("Tom is at the mill")


def test_prompts_with_responses(language_runs, tmp_path: Path):
    rows = [{"question": text.split(". ")[0], "answer": " " + text.split(". ")[1]} for text in texts(50, seed=5)]
    source = tmp_path / "input"
    shutil.copytree(language_runs.input, source)
    write_jsonl(source / "train.jsonl", rows[:40])
    write_jsonl(source / "test.jsonl", rows[40:])
    changes = {"data.prompt": "question", "data.response": "answer", "train.batch_size": 2}
    folder = language_runs.start("prepare")
    answer = language_runs.run(folder, "prepare", *ALL, source=str(source), changes=changes)
    assert answer["error"] is None, answer["error"]
    counts = facts(folder, "data")["counts"]["train"]
    assert counts["rows"] == counts["documents"] == 32
    assert counts["learnt"] < counts["tokens"] / 2
    assert points(folder, "validation")[-1]["nll"] < points(folder, "validation")[0]["nll"]


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_chats_by_the_tokenizers_template(language_runs, tmp_path: Path):
    source, folder = tmp_path / "input", language_runs.start("prepare")
    shutil.copytree(language_runs.input, source)
    for name, seed in (("train", 6), ("test", 7)):
        chats = [
            {"chat": [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": text[:60]}]}
            for text in texts(30, seed=seed)
        ]
        write_jsonl(source / f"{name}.jsonl", chats)
    changes = {"data.messages": "chat", "train.batch_size": 2}
    refused = language_runs.run(folder, "prepare", *ALL, source=str(source), changes=changes)
    assert "data.messages: " in refused["error"]
    assert "the tokenizer has no chat template" in refused["error"]
    settings = json.loads((source / "teacher/tokenizer_config.json").read_text())
    (source / "teacher/tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    answer = language_runs.run(folder, "prepare", *ALL, source=str(source), changes=changes)
    assert answer["error"] is None, answer["error"]
    counts = facts(folder, "data")["counts"]["train"]
    assert counts["rows"] == counts["documents"] == 24
    assert 0 < counts["learnt"] < counts["tokens"]
    # Another template makes other tokens.
    again = {**settings, "chat_template": TEMPLATE.replace("assistant: ", "bot: ")}
    (source / "teacher/tokenizer_config.json").write_text(json.dumps(again))
    refused = language_runs.run(folder, "prepare", source=str(source), changes=changes)
    assert "sha256" in refused["error"]


def test_a_template_in_a_file_of_its_own_is_of_the_tokenizer_and_travels_with_the_student(
    language_runs, tmp_path: Path
):
    source, folder = tmp_path / "input", language_runs.start("prepare")
    shutil.copytree(language_runs.input, source)
    before = tokenizer_identity(source / "teacher")
    assert before == digest(
        {name: sha256_file(source / "teacher" / name) for name in ("tokenizer.json", "tokenizer_config.json")}
    )
    chat = [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "Tom is here."}]
    for name in ("train", "test"):
        write_jsonl(source / f"{name}.jsonl", [{"chat": chat}] * 12)
    (source / "teacher/chat_template.jinja").write_text(TEMPLATE)
    assert tokenizer_identity(source / "teacher") != before
    changes = {"data.messages": "chat", "train.epochs": 1}
    answer = language_runs.run(folder, "prepare", *ALL, source=str(source), changes=changes)
    assert answer["error"] is None, answer["error"]
    inputs = json.loads((folder / "data/plan.json").read_text())["inputs"]
    assert inputs["tokenizer_sha256"] == tokenizer_identity(source / "teacher")
    assert "chat_template_sha256" not in inputs
    assert (folder / "student/chat_template.jinja").read_text() == TEMPLATE


def test_blocks_of_a_txt_file(language_runs, tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n\n".join(texts(40, seed=3)))
    folder = language_runs.start("prepare")
    changes = {"data.train": str(tmp_path / "a.txt"), "data.txt_documents": "block"}
    answer = language_runs.run(folder, "prepare", changes=changes)
    assert answer["error"] is None, answer["error"]
    counts = facts(folder, "data")["counts"]
    assert counts["train"]["documents"] + counts["validation"]["documents"] == 40
    (tmp_path / "a.txt").write_text("\n\n".join(texts(41, seed=3)))
    refused = language_runs.run(folder, "prepare", changes=changes)
    assert "counts.train.documents: was made with 32, now asked for 33" in refused["error"]


MESSAGES = [
    ({"train.loss.temperature": 2.0}, "train.loss.temperature: temperature 2: a cache of codec sampled serves"),
    ({"train.loss.kind": "reverse_kl"}, "train.loss: reverse_kl weighs the student by the teacher's log-probability"),
    ({"train.loss.kind": "jsd"}, "train.loss: jsd needs the probability of each kept token"),
    ({"train.loss.kind": "dist"}, "train.loss: dist is no loss of single positions"),
    ({"data.label": "topic"}, "data.label is not known with task: causal_lm; remove it"),
    ({"teacher.calibrate": True}, "teacher.calibrate is not known with task: causal_lm; remove it"),
    ({"student.trim_vocabulary": True}, "student.trim_vocabulary is not known with task: causal_lm; remove it"),
    ({"train.metric": "macro_f1"}, "train.metric: macro_f1 is of classes; with task: causal_lm use nll, accuracy, kl"),
    ({"data.prompt": "text"}, "data.prompt and data.response name two columns of the same rows; give both, or neither"),
    ({"data.messages": "chat", "data.text": "words"}, "data.text means nothing with data.messages; remove it"),
    ({"data.txt_documents": "block"}, "data.txt_documents: found block, and the data are jsonl. Remove it"),
    ({"data.messages": "chat", "data.txt_documents": "block"}, "data.txt_documents means nothing with data.messages"),
    ({"data.learnt_roles": ["user"]}, "data.learnt_roles means nothing without data.messages; remove it"),
    ({"teacher.next_tokens": {"codec": "hidden", "kept": 4}}, "kept means nothing with codec: hidden; remove it"),
    ({"student.model_type": "bert"}, "student.model_type: bert is no causal language model"),
    ({"student.model_type": "vit"}, "student.model_type: 'vit' cannot be built as a causal language model"),
    ({"data.max_length": 65}, "data.max_length: found 65, the teacher"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MESSAGES, ids=[str(index) for index in range(len(MESSAGES))])
def test_what_does_not_fit_is_refused_before_anything_is_written(language_runs, changes: dict[str, Any], message: str):
    folder = language_runs.start("prepare")
    answer = language_runs.run(folder, "prepare", *ALL, changes=changes)
    assert message in (answer["error"] or "")
    assert not (folder / "data").exists()
    assert not (folder / "config.yaml").exists()


def test_a_student_with_other_tokens_is_refused_with_the_first_one(language_runs, tmp_path: Path):
    other = tokenizer(290)
    student = tmp_path / "student"
    tiny_language_model(vocabulary=290).save_pretrained(student)
    other.save_pretrained(student)
    folder = language_runs.start("prepare")
    changes = {"student": {"init": "pretrained", "model": str(student)}}
    answer = language_runs.run(folder, "prepare", *ALL, changes=changes)
    assert "its tokenizer is not the teacher's: token " in answer["error"]
    assert " there and " in answer["error"] or "alone" in answer["error"]


def test_a_teachers_output_that_is_not_finite_names_row_and_position(language_runs, tmp_path: Path):
    broken = tmp_path / "input"
    shutil.copytree(language_runs.input, broken)
    found = load_file(broken / "teacher/model.safetensors")
    found["model.norm.weight"][3] = np.nan
    save_file(found, broken / "teacher/model.safetensors", metadata={"format": "pt"})
    folder = language_runs.start("teach")
    answer = language_runs.run(folder, "teach", source=str(broken))
    assert "teacher.model: " in answer["error"]
    assert "not finite" in answer["error"] or "is not known" in answer["error"]


def test_a_student_of_the_teachers_layers(language_runs):
    folder, answer = language_runs.trained({"student": {"init": "teacher_layers", "layers": [1]}})
    assert answer["error"] is None
    config = json.loads((folder / "student/config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert points(folder, "validation")[-1]["kl"] < 1


def test_a_student_that_caps_its_logits(language_runs, tmp_path: Path):
    # Gemma 2: what the loss computes from hidden states is what transformers does.
    student = write_model(
        tmp_path / "student",
        load_tokenizer(language_runs.input / "teacher", "teacher", pads=False),
        architecture="gemma2",
        final_logit_softcapping=2.0,
    )
    folder, answer = language_runs.trained({"student": {"init": "pretrained", "model": str(student)}})
    assert answer["error"] is None
    nll, _ = mean_nll(folder, AutoModelForCausalLM.from_pretrained(folder / "student"), "validation")
    chosen = next(point for point in points(folder, "validation") if point["step"] == facts(folder)["step"])
    assert nll == pytest.approx(chosen["nll"], rel=1e-4)
