"""Students with tokenizers of their own, through the real stages without Ray."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from language_runs import texts, tokenizer, unigram_tokenizer, write_jsonl, write_model
from run_files import equal, facts, manifest, points, student_weights
from small_runs import SmallRuns, results
from transformers import AutoModelForCausalLM, AutoTokenizer

from raydistill.data.student_rows import read_student_shard
from raydistill.data.token_shards import read_row_texts, read_token_shard
from raydistill.record.store import LocalStore

pytestmark = pytest.mark.xdist_group("small_runs")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tokenizers, and of a student with weights and one of them."""
    folder = tmp_path_factory.mktemp("own")
    tokenizer(420).save_pretrained(folder / "bytes")
    unigram_tokenizer(120).save_pretrained(folder / "pieces")
    write_model(folder / "pretrained", tokenizer(420))
    return {name: folder / name for name in ("bytes", "pieces", "pretrained")}


def crossing(tokenizer_folder: Path, loss: str = "spans", more: dict[str, Any] | None = None) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train.loss": {"cross_tokenizer": loss, "alpha": 0.8}, "student.tokenizer": str(tokenizer_folder),
        "student.max_length": 60, "train.metric": "nll",
    }  # fmt: skip
    return settings | (more or {})


@pytest.fixture(scope="module")
def spans_run(language_runs: SmallRuns, own: dict[str, Path]) -> Path:
    """A student whose tokenizer is of SentencePiece's kind, from a teacher whose is of bytes."""
    folder = language_runs.start("prepare")
    changes = crossing(own["pieces"], more={"train.log_every": 1})
    answer = language_runs.run(folder, "prepare", "teach", "train", changes=changes)
    assert answer["error"] is None, answer["error"]
    return folder


def test_a_student_learns_from_spans(spans_run: Path, own: dict[str, Path]):
    train, validation = points(spans_run, "train"), points(spans_run, "validation")
    third = len(train) // 3
    first, last = (np.mean([point["spans"] for point in part]) for part in (train[:third], train[-third:]))
    assert last < 0.85 * first
    assert set(validation[-1]) & {"kl", "agreement"} == set()
    for point in train:
        assert point["loss"] == pytest.approx(0.8 * point["spans"] + 0.2 * point["cross_entropy"], rel=1e-5)
    saved, given = (AutoTokenizer.from_pretrained(place) for place in (spans_run / "student", own["pieces"]))
    assert saved.get_vocab() == given.get_vocab()


def test_rows_are_the_same_texts_and_spans_their_parts(spans_run: Path):
    store, ours = LocalStore(str(spans_run)), AutoTokenizer.from_pretrained(spans_run / "student")
    theirs = AutoTokenizer.from_pretrained(facts_config(spans_run)["teacher"]["model"])
    checked = 0
    for entry in manifest(spans_run, "data").shards("train", "validation", "test"):
        shard, texts = read_token_shard(store, entry), read_row_texts(store, entry)
        mine = read_student_shard(
            store, next(e for e in manifest(spans_run, "student_rows").files if e.file == entry.file)
        )
        assert mine.tokens.row_ids_R.tolist() == shard.row_ids_R.tolist()
        for row, (text, _, _) in enumerate(texts):
            assert theirs.decode(shard.row(row), skip_special_tokens=True).encode() == text.data
            learnt = [one.row(row)[one.positions(row) + 1] for one in (shard, mine.tokens)]
            spans = mine.spans.row(row)
            for t0, t1, s0, s1, size in zip(*(spans[name].tolist() for name in spans), strict=True):
                part = theirs.decode(learnt[0][t0:t1], skip_special_tokens=True)
                pieces = ours.convert_ids_to_tokens(learnt[1][s0:s1].tolist())
                written = "".join(pieces).replace("\u2581", " ").replace("</s>", "")
                assert part.strip() == written.strip()
                assert size in (len(part.encode()), len(part.strip().encode()))
                checked += 1
            # Of the row with which a document begins every byte is in a span. Another row is read up to the first byte
            # at which tokens of both end, as their first tokens have nothing before them, and what follows is in spans.
            common = byte_ends(theirs, shard.row(row), text.data) & byte_ends(ours, mine.tokens.row(row), text.data)
            assert spans["sizes"].sum() == len(text.data) - (0 if text.begins else min(common))
    assert checked > 500


def byte_ends(tokenizer: Any, tokens: np.ndarray, data: bytes) -> set[int]:
    """The bytes of a row at which its tokens end, by how the two kinds of tokenizers write them."""
    ends, at = set[int](), 0
    for token in tokenizer.convert_ids_to_tokens(tokens.tolist()):
        if token in tokenizer.all_special_tokens:
            assert token != tokenizer.unk_token
        elif tokenizer.unk_token is None:  # byte-level BPE: a sign a byte
            at += len(token)
        else:
            text = token.replace("\u2581", " ").encode()
            at += len(text.lstrip() if at == 0 and not data.startswith(b" ") else text)
        ends.add(at)
    assert at == len(data)
    return ends - {0}


def facts_config(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_the_cache_holds_what_the_teacher_gives_to_the_text(spans_run: Path):
    store = LocalStore(str(spans_run))
    teacher = AutoModelForCausalLM.from_pretrained(facts_config(spans_run)["teacher"]["model"]).eval()
    cache = manifest(spans_run, "teacher/cache")
    assert cache.facts["text_logprobs"]
    for entry in manifest(spans_run, "data").shards("train")[:1]:
        shard = read_token_shard(store, entry)
        table = pq.read_table(spans_run / "teacher/cache" / f"text-{entry.file}")
        assert table["row_id"].to_pylist() == shard.row_ids_R.tolist()
        for row, kept in enumerate(table["logprobs"].to_pylist()):
            ids = torch.from_numpy(shard.row(row)).long()
            with torch.no_grad():
                logprobs = teacher(input_ids=ids[None]).logits[0, :-1].double().log_softmax(dim=-1)
            expected = logprobs.gather(1, ids[1:, None])[:, 0].numpy()
            np.testing.assert_allclose(np.frombuffer(kept, "<f2"), expected, rtol=2e-3, atol=1e-4)
    assert {f"text-{entry.file}" for entry in manifest(spans_run, "data").shards("train", "validation")} <= {
        entry.file for entry in cache.files
    }


def test_the_pages_reader_of_spans_reads_them(spans_run: Path):
    page = Path(__file__).parents[1] / "docs" / "codecs.md"
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1], names)
    entry = manifest(spans_run, "student_rows").shards("train")[0]
    places = spans_run / "student_rows" / entry.file, spans_run / "teacher/cache" / f"text-{entry.file}"
    own = read_student_shard(LocalStore(str(spans_run)), entry)
    for row, (row_id, found) in enumerate(names["read_spans"](*places)):
        spans = own.spans.row(row)
        assert row_id == own.tokens.row_ids_R[row]
        assert [size for size, _ in found] == spans["sizes"].tolist()
        (kept,) = pq.read_table(places[1])["logprobs"][row : row + 1].to_pylist()
        kept = np.frombuffer(kept, "<f2").astype(float)
        expected = [kept[a:b].sum() for a, b in zip(spans["teacher_begins"], spans["teacher_ends"], strict=True)]
        np.testing.assert_allclose([nats for _, nats in found], expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher.next_tokens": {"codec": "hidden"}}, {"teacher.next_tokens": {"codec": "dense"}},
        {"teacher.next_tokens": {"codec": "topk", "kept": 20}}, {},
    ],
    ids=["hidden", "dense", "topk", "sampled"],
)  # fmt: skip
def test_a_student_learns_from_sorted_probabilities(language_runs: SmallRuns, own: dict[str, Path], changes: Any):
    folder = language_runs.start("prepare")
    answer = language_runs.run(
        folder, "prepare", "teach", "train", plain=True, changes=crossing(own["bytes"], "uld", changes)
    )
    assert answer["error"] is None, answer["error"]
    assert points(folder, "train")[-1]["uld"] < points(folder, "train")[0]["uld"]
    assert "text_logprobs" not in facts(folder, "teacher/cache")


CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
PROMPTING = CHAT + "{% if add_generation_prompt %}assistant: {% endif %}"


def chat_input(language_runs: SmallRuns, source: Path) -> None:
    shutil.copytree(language_runs.input, source)
    for name, seed in (("train", 6), ("test", 7)):
        chats = [
            {"chat": [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": text[:20]}]}
            for text in texts(30, seed=seed)
        ]
        write_jsonl(source / f"{name}.jsonl", chats)
    (source / "teacher/chat_template.jinja").write_text(PROMPTING)


def test_a_student_learns_chats_that_its_own_template_writes(
    language_runs: SmallRuns, own: dict[str, Path], tmp_path: Path
):
    source, folder, mine = tmp_path / "input", language_runs.start("prepare"), tmp_path / "own"
    chat_input(language_runs, source)
    shutil.copytree(own["pieces"], mine)
    changes = crossing(mine, more={"data.messages": "chat", "train.log_every": 1, "train.batch_size": 4})
    stages = ("prepare", "teach", "train", "evaluate")
    refused = language_runs.run(folder, *stages, source=str(source), changes=changes)
    assert "student.tokenizer: " in refused["error"]
    assert "the tokenizer has no chat template, which data.messages are written by for the student" in refused["error"]
    template = PROMPTING.replace("{{ m['role'] }}: ", "[{{ m['role'] }}] ").replace("assistant: ", "[assistant] ")
    (mine / "chat_template.jinja").write_text(template)
    answer = language_runs.run(folder, *stages, source=str(source), changes=changes)
    assert answer["error"] is None, answer["error"]
    train = points(folder, "train")
    assert train[-1]["spans"] < train[0]["spans"]
    counts = facts(folder, "student_rows")["counts"]["test"]
    assert counts["bytes"] == sum(len(text[:20].strip().encode()) for text in texts(30, seed=7))
    # Not those that a tokenizer of pieces puts beside </s> for spaces that are none of the text's.
    assert counts["learnt"] - 2 * counts["rows"] <= counts["in_spans"] <= counts["learnt"]
    report = json.loads((folder / "report/report.json").read_text())
    assert report["test_positions"] == counts["bytes"]
    assert report["student"]["bits_per_byte"] > 0
    assert (folder / "student/chat_template.jinja").read_text() == template


def test_sorted_probabilities_are_learnt_of_chats_too(language_runs: SmallRuns, own: dict[str, Path], tmp_path: Path):
    """Where both begin the same message, whatever their templates put before it."""
    source, folder, mine = tmp_path / "input", language_runs.start("prepare"), tmp_path / "own"
    chat_input(language_runs, source)
    shutil.copytree(own["bytes"], mine)
    (mine / "chat_template.jinja").write_text(PROMPTING.replace("assistant: ", "[assistant] "))
    more = {"data.messages": "chat", "train.log_every": 1, "train.batch_size": 4}
    changes = crossing(mine, "uld", {"teacher.next_tokens": {"codec": "hidden"}, **more})
    answer = language_runs.run(folder, "prepare", "teach", "train", plain=True, source=str(source), changes=changes)
    assert answer["error"] is None, answer["error"]
    assert points(folder, "train")[-1]["uld"] < points(folder, "train")[0]["uld"]
    counts = facts(folder, "student_rows")["counts"]["train"]
    assert counts["bytes"] > 0
    assert counts["in_spans"] > counts["rows"]


def test_a_killed_training_goes_on_to_the_same_bytes(language_runs: SmallRuns, own: dict[str, Path], spans_run: Path):
    changes = crossing(own["pieces"], more={"train.log_every": 1})
    folder = language_runs.start("prepare")
    for part in ("data", "teacher", "student_rows"):
        shutil.copytree(spans_run / part, folder / part)
    last = max(p.name for p in (spans_run / "train/checkpoints").glob("step-*") if p.is_dir())
    done = language_runs.run(folder, "train", changes=changes, fault="1:kill")
    assert done == {"exit": -9}
    whole = language_runs.run(folder, "train", changes=changes)
    number = 1 + whole["operations"].index(f"rename {last}")
    again = language_runs.start("prepare")
    for part in ("data", "teacher", "student_rows"):
        shutil.copytree(spans_run / part, again / part)
    assert language_runs.run(again, "train", changes=changes, fault=f"{number}:kill") == {"exit": -9}
    answer = language_runs.run(again, "train", changes=changes)
    assert answer["error"] is None, answer["error"]
    assert any("going_on_from" in post for post in answer["posts"])
    for other in (folder, again):
        assert equal(student_weights(other), student_weights(spans_run))
    assert results(again) == results(folder)


def test_rows_whose_making_was_killed_have_the_same_bytes(
    language_runs: SmallRuns, own: dict[str, Path], spans_run: Path
):
    changes = crossing(own["pieces"], more={"train.log_every": 1})
    folder = language_runs.start("prepare")
    shutil.copytree(spans_run / "data", folder / "data")
    assert language_runs.run(folder, "prepare", changes=changes, fault="6:kill") == {"exit": -9}
    answer = language_runs.run(folder, "prepare", changes=changes)
    assert answer["error"] is None, answer["error"]
    for path in (spans_run / "student_rows").glob("*.parquet"):
        assert (folder / "student_rows" / path.name).read_bytes() == path.read_bytes()


def test_a_pretrained_student_and_two_ranks(language_runs: SmallRuns, own: dict[str, Path], spans_run: Path):
    found = []
    for workers in (1, 2):
        folder = language_runs.start("prepare")
        for part in ("data", "teacher"):
            shutil.copytree(spans_run / part, folder / part)
        changes = {
            "train.loss": {"cross_tokenizer": "spans", "alpha": 0.8}, "train.metric": "nll", "train.workers": workers,
            "student": {"init": "pretrained", "model": str(own["pretrained"])}, "train.log_every": 1,
        }  # fmt: skip
        answer = language_runs.run(folder, "prepare", "teach", "train", changes=changes)
        assert answer["error"] is None, answer["error"]
        found.append([point["loss"] for point in points(folder, "train")])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][-1] < found[0][0]


@pytest.fixture(scope="module")
def reported(language_runs: SmallRuns, own: dict[str, Path], spans_run: Path) -> Path:
    """The run with its control, its report and an exported file."""
    changes = crossing(own["pieces"], more={"train.log_every": 1, "export": {"formats": ["safetensors-bf16"]}})
    changes["export"] |= {"min_agreement": 0.5, "max_perplexity_rise": 1.0}
    for stage in ("evaluate", "export"):
        answer = language_runs.run(spans_run, stage, changes=changes)
        assert answer["error"] is None, answer["error"]
    return spans_run


def logprobs_of_spans(folder: Path, model: Path, side: str) -> tuple[np.ndarray, int]:
    """What a model gives to each span of test, one row at a time by transformers; and the bytes of all."""
    store, found, size = LocalStore(str(folder)), list[float](), 0
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    for entry in manifest(folder, "data").shards("test"):
        own_entry = next(e for e in manifest(folder, "student_rows").files if e.file == entry.file)
        own = read_student_shard(store, own_entry)
        shard = read_token_shard(store, entry) if side == "teacher" else own.tokens
        for row in range(len(shard)):
            ids = torch.from_numpy(shard.row(row)).long()
            with torch.no_grad():
                logprobs = loaded(input_ids=ids[None]).logits[0].double().log_softmax(dim=-1)
            at, spans = shard.positions(row), own.spans.row(row)
            for begin, end in zip(spans[f"{side}_begins"].tolist(), spans[f"{side}_ends"].tolist(), strict=True):
                found.append(sum(logprobs[place, ids[place + 1]].item() for place in at[begin:end].tolist()))
            size += int(spans["sizes"].sum())
    return np.array(found), size


def folders_of_models(folder: Path) -> dict[str, tuple[Path, str]]:
    """Of each model its folder, and which tokens it has."""
    teacher = Path(facts_config(folder)["teacher"]["model"])
    ours = {"student": folder / "student", "control": folder / "control/model"}
    return {"teacher": (teacher, "teacher"), **{name: (place, "student") for name, place in ours.items()}}


def test_the_student_gives_spans_what_the_teacher_gives_them(reported: Path):
    found = {n: logprobs_of_spans(reported, *place)[0] for n, place in folders_of_models(reported).items()}
    far = {name: np.abs(found[name] - found["teacher"]).mean() for name in ("student", "control")}
    assert far["student"] < 0.9 * far["control"]
    # The control learns the text, which the teacher, whose weights are drawn, knows nothing of.
    of_control = [point["nll"] for point in points(reported, "validation", "control/train")]
    assert of_control[-1] < of_control[0] < math.log(120)


def test_the_report_has_bits_of_the_same_bytes(reported: Path):
    report = json.loads((reported / "report/report.json").read_text())
    assert report["unit"] == "byte"
    for name, place in folders_of_models(reported).items():
        logprobs, size = logprobs_of_spans(reported, *place)
        nats = -logprobs.sum()
        assert size == report["test_positions"]
        assert report[name]["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-4)
        assert report[name]["perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-4)
        assert "agreement" not in report[name]
    assert report["agreement"] is None
    assert report["retention"] == pytest.approx(report["teacher"]["perplexity"] / report["student"]["perplexity"])
    page = (reported / "report/report.html").read_text()
    assert "perplexity a byte" in page
    assert "different tokenizers" in page
    assert "KL from the teacher" not in page
    assert page.count("<svg") == 3
    assert facts(reported, "export/safetensors-bf16")


def test_the_same_tokenizer_has_a_span_for_each_token(language_runs: SmallRuns):
    folder = language_runs.start("prepare")
    teacher = language_runs.input / "teacher"
    answer = language_runs.run(folder, "prepare", changes=crossing(teacher))
    assert answer["error"] is None, answer["error"]
    for counts in facts(folder, "student_rows")["counts"].values():
        assert counts["spans"] == counts["in_spans"] == counts["teacher_in_spans"] == counts["learnt"]
        assert counts["learnt"] == counts["teacher_learnt"]
    store = LocalStore(str(folder))
    for entry in manifest(folder, "data").shards("train"):
        own_entry = next(e for e in manifest(folder, "student_rows").files if e.file == entry.file)
        one, other = read_token_shard(store, entry), read_student_shard(store, own_entry).tokens
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.learnt.tolist() == other.learnt.tolist()


def test_prompts_and_responses(language_runs: SmallRuns, own: dict[str, Path], tmp_path: Path):
    rows = [
        {"q": f"Who was {name}?", "a": f" {name} was a cat, \U0001f431 and e\u0301."} for name in "ABCDEFGHIJKLMNOP"
    ]
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", rows) for name in ("train", "test")}
    folder = language_runs.start("prepare")
    changes = crossing(own["bytes"]) | {f"data.{name}": str(path) for name, path in files.items()}
    changes |= {"data.prompt": "q", "data.response": "a"}
    answer = language_runs.run(folder, "prepare", "teach", "train", plain=True, changes=changes)
    assert answer["error"] is None, answer["error"]
    counts = facts(folder, "student_rows")["counts"]["train"]
    # A response's bytes, whose end is a span of its own, and nothing of the prompts.
    rows_there = manifest(folder, "data").facts["counts"]["train"]["rows"]
    assert counts["bytes"] == rows_there * len(rows[0]["a"].encode())
    assert counts["teacher_in_spans"] == counts["teacher_learnt"]


def refused(language_runs: SmallRuns, changes: dict[str, Any], *stages: str, folder: Path | None = None) -> str:
    answer = language_runs.run(folder or language_runs.start("prepare"), *(stages or ("prepare",)), changes=changes)
    assert answer["error"] is not None
    return answer["error"]


def test_bad_inputs_are_refused_in_one_line(
    language_runs: SmallRuns, own: dict[str, Path], spans_run: Path, tmp_path: Path
):
    from tokenizers import normalizers

    lower = tokenizer(420)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    lower.save_pretrained(tmp_path / "lower")
    assert "its tokenizer changes " in refused(language_runs, crossing(tmp_path / "lower"))
    assert "no such folder" in refused(language_runs, crossing(tmp_path / "nothing"), "prepare", "teach")
    drawn = crossing(own["bytes"], "uld", more={"teacher.next_tokens": {"codec": "random", "kept": 8}})
    assert "cross_tokenizer: uld compares probabilities by rank" in refused(language_runs, drawn, "prepare", "teach")
    # Without the setting the other tokenizer is refused, with the setting that allows it.
    other = {"student": {"init": "pretrained", "model": str(own["pretrained"])}}
    assert "or set train.loss.cross_tokenizer=spans" in refused(language_runs, other, "prepare", "teach")
    # A run without texts and without the column, and one that lends its cache.
    assert "data.keep_text" in refused(language_runs, crossing(own["bytes"]), folder=language_runs.start("train"))
    lent = crossing(own["bytes"], more={"teacher.cache_from": str(language_runs.whole)})
    assert "Set data.keep_text=true there, and do it again with --redo prepare" in refused(language_runs, lent)
    folder = language_runs.start("prepare")
    kept = language_runs.run(folder, "prepare", "teach", changes={"data.keep_text": True})
    assert kept["error"] is None, kept["error"]
    lent["teacher.cache_from"] = str(folder)
    assert "score again with --redo teach" in refused(language_runs, lent, "prepare", "teach")


def test_a_lent_cache_serves_a_student_of_another_tokenizer(
    language_runs: SmallRuns, own: dict[str, Path], spans_run: Path
):
    folder = language_runs.start("prepare")
    changes = crossing(own["bytes"], more={"teacher.cache_from": str(spans_run)})
    answer = language_runs.run(folder, "prepare", "teach", "train", plain=True, changes=changes)
    assert answer["error"] is None, answer["error"]
    assert not (folder / "data").exists()
    assert answer["scored"] == []
    assert points(folder, "train")[-1]["spans"] < points(folder, "train")[0]["spans"]


def test_a_search_over_students_of_another_tokenizer(language_runs: SmallRuns, own: dict[str, Path], spans_run: Path):
    """Trials learn half of the documents in the student's tokens, and the winner is trained as if asked for alone."""
    folder = language_runs.start("prepare")
    for part in ("data", "teacher"):
        shutil.copytree(spans_run / part, folder / part)
    tune = {"space": {"train.learning_rate": {"choice": [1e-2, 1e-4]}}, "trials": 2, "search": "grid",
            "data_fraction": 0.5, "scheduler": "none"}  # fmt: skip
    changes = crossing(own["pieces"], more={"train.log_every": 1, "tune": tune, "train.learning_rate": 1e-3})
    answer = language_runs.run(folder, "prepare", "teach", "tune", "train", changes=changes)
    assert answer["error"] is None, answer["error"]
    trials = {row["trial"]: row["nll"] for row in pq.read_table(folder / "tune/trials.parquet").to_pylist()}
    winner = facts(folder, "tune")["winner"]
    assert winner["number"] == min(trials, key=lambda number: trials[number])
    alone = language_runs.start("prepare")
    for part in ("data", "teacher"):
        shutil.copytree(spans_run / part, alone / part)
    changes = crossing(own["pieces"], more={"train.log_every": 1, **winner["point"]})
    answer = language_runs.run(alone, "prepare", "teach", "train", changes=changes)
    assert answer["error"] is None, answer["error"]
    assert equal(student_weights(folder), student_weights(alone))
