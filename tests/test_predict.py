"""`raydistill predict`: the answers that evaluate counted, from every kind of file and model, and what is refused.

Shapes: N texts, K classes.
"""

import csv
import gzip
import io
import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from language_runs import texts as stories
from language_runs import tiny_language_model, tokenizer, write_model
from small_runs import SmallRuns

from raydistill import cli
from raydistill.cache.shards import read_logits
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import Interrupted
from raydistill.models.loading import load_classifier
from raydistill.record.commit import read_manifest
from raydistill.record.store import LocalStore
from raydistill.serving import predict as command
from raydistill.tickets import CATEGORIES

pytestmark = pytest.mark.xdist_group("small_runs")
LABELS = sorted(CATEGORIES)
TEXTS = ["my card was charged twice", "where is my parcel?", "the app crashes on login and then it hangs"]


def answers(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command writes to standard output."""
    assert cli._main(["predict", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def shares_of(folder: Path, texts: list[str]) -> np.ndarray:
    """Probabilities by transformers alone, one text at a time."""
    from transformers import AutoTokenizer

    model, made = load_classifier("model", folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [model(**made(text, truncation=True, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(logits).double().softmax(1).numpy()


def test_the_answers_of_a_run_are_those_that_evaluate_counted(runs: SmallRuns, capsys: pytest.CaptureFixture[str]):
    folder = runs.start("train")
    for part in ("train", "student"):
        shutil.copytree(runs.whole / part, folder / part)
    settings = {"evaluate.control": False, "evaluate.latency_requests": 16, "evaluate.bootstrap": 100}
    assert runs.run(folder, "evaluate", changes=settings)["error"] is None
    found = records(answers(capsys, folder, runs.input / "test.csv", "--all", "--format", "jsonl", "--chunk-rows", "7"))
    store, place = LocalStore(str(folder)), "report/logits/student"
    manifest = read_manifest(store, place)
    assert manifest is not None
    shards = [read_logits(store, place, entry, manifest) for entry in manifest.shards("test")]
    logits = torch.from_numpy(np.concatenate([shard.logits_NK for shard in shards])).double()
    assert [row["row"] for row in found] == list(range(1, 21))
    expected = logits.softmax(1).numpy()
    assert [list(row["all"]) for row in found] == [LABELS] * 20
    assert np.array([list(row["all"].values()) for row in found]) == pytest.approx(expected, abs=2e-6)
    assert [row["label"] for row in found] == [LABELS[k] for k in expected.argmax(1)]
    assert [row["probability"] for row in found] == pytest.approx(expected.max(1), abs=2e-6)


def write_files(folder: Path) -> dict[str, Path]:
    """The texts in every format that is read."""
    paths = {name: folder / f"in.{name}" for name in ("csv", "tsv", "jsonl", "parquet", "txt", "csv.gz")}
    paths["csv"].write_text("id,body\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(TEXTS)))
    paths["tsv"].write_text("id\tbody\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(TEXTS)))
    paths["jsonl"].write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    pq.write_table(pa.table({"body": TEXTS}), paths["parquet"])
    paths["txt"].write_text("\n".join(TEXTS))
    paths["csv.gz"].write_bytes(gzip.compress(paths["csv"].read_bytes()))
    return paths


def test_every_format_gives_the_same_answers(
    tiny_classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    expected = shares_of(tiny_classifier, TEXTS)
    for path in write_files(tmp_path).values():
        found = table(answers(capsys, tiny_classifier, path, "--text", "body"))
        assert [row["label"] for row in found] == [LABELS[k] for k in expected.argmax(1)], path
        assert [float(row["probability"]) for row in found] == pytest.approx(expected.max(1), abs=2e-6), path
    stdin = io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert table(answers(capsys, tiny_classifier)) == found


def test_classes_in_their_order_and_texts_beside_them(
    tiny_classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    expected = shares_of(tiny_classifier, TEXTS)
    order = np.argsort(-expected, axis=1)
    path = write_files(tmp_path)["jsonl"]
    arguments = (tiny_classifier, path, "--text", "body", "--top", "2", "--all", "--with-text")
    out = tmp_path / "out.csv"
    assert answers(capsys, *arguments, "--out", out) == ""
    found = table(out.read_text())
    assert list(found[0])[:8] == [
        "row", "text", "label", "probability", "label_1", "probability_1", "label_2", "probability_2",
    ]  # fmt: skip
    assert [row["text"] for row in found] == TEXTS
    assert [row["label_2"] for row in found] == [LABELS[k] for k in order[:, 1]]
    assert [[float(row[f"p:{name}"]) for name in LABELS] for row in found] == pytest.approx(expected, abs=2e-6)
    lines = records(answers(capsys, *arguments, "--format", "jsonl"))
    assert [[one["label"] for one in row["top"]] for row in lines] == [[LABELS[k] for k in row[:2]] for row in order]
    wide = table(answers(capsys, *arguments[:4], "--top", "7"))[0]  # there are five classes
    assert (wide["label_5"], wide["label_6"], wide["problem"]) == (LABELS[order[0, 4]], "", "")


def test_rows_without_a_text_keep_their_place(
    tiny_classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "in.jsonl"
    rows = [{"text": TEXTS[0]}, {"text": "  "}, {"text": None}, {"text": 7}, {"text": TEXTS[1]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    assert cli._main(["predict", str(tiny_classifier), str(path)]) == 0
    captured = capsys.readouterr()
    found = table(captured.out)
    assert [row["problem"] for row in found] == [
        "", "empty text", "null text", "text is not text", "", "malformed",
    ]  # fmt: skip
    assert [bool(row["label"]) for row in found] == [True, False, False, False, True, False]
    assert "6 rows" in captured.err
    assert "4 have no answer (empty text 1, malformed 1, null text 1, text is not text 1)" in captured.err


def test_several_labels_from_a_threshold_on(tiny_classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "sets"
    model = load_classifier("model", tiny_classifier)
    model.config.problem_type = "multi_label_classification"
    model.save_pretrained(folder)
    load_tokenizer(tiny_classifier, "model").save_pretrained(folder)
    path = write_files(tmp_path)["txt"]
    with torch.no_grad():
        made = load_tokenizer(folder, "model")
        logits = torch.stack([model(**made(text, return_tensors="pt")).logits[0] for text in TEXTS])
    shares = logits.double().sigmoid().numpy()
    for arguments, threshold in (((), 0.5), (("--threshold", "0.3"), 0.3), (("--threshold", "0.9"), 0.9)):
        assert np.abs(shares - threshold).min() > 1e-4
        found = records(answers(capsys, folder, path, "--format", "jsonl", *arguments))
        expected = [{LABELS[k]: row[k] for k in np.flatnonzero(row > threshold)} for row in shares]
        for row, chosen in zip(found, expected, strict=True):
            assert {one["label"]: one["probability"] for one in row["labels"]} == pytest.approx(chosen, abs=2e-6)
    rows = table(answers(capsys, folder, path))
    counts = [len(one["labels"]) for one in records(answers(capsys, folder, path, "--format", "jsonl"))]
    assert [len(row["label"].split("|")) if row["label"] else 0 for row in rows] == counts


def greedy(model: Any, made: Any, text: str, new_tokens: int) -> str:
    """Token by token, each by a forward over all before it; the likeliest is far from the second."""
    ids, found = made(text)["input_ids"], []
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(input_ids=torch.tensor([ids + found])).logits[0, -1]
            first, second = logits.topk(2).values
            assert first - second > 1e-3, "a near tie, which rounding may decide"
            found.append(int(logits.argmax()))
            if found[-1] == made.eos_token_id:
                return made.decode(found[:-1], skip_special_tokens=True)
    return made.decode(found, skip_special_tokens=True)


def test_a_language_model_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = tokenizer()
    folder = write_model(tmp_path / "llama", made)
    model = tiny_language_model(vocabulary=len(made))
    texts = ["The fox", "Once a small bird flew over", "A"]
    path = tmp_path / "in.txt"
    path.write_text("\n".join(texts))
    found = records(answers(capsys, folder, path, "--max-tokens", "6", "--format", "jsonl"))
    assert [row["completion"] for row in found] == [greedy(model, made, text, 6) for text in texts]
    long = " ".join(stories(8))
    path.write_text(long)
    (row,) = records(answers(capsys, folder, path, "--max-tokens", "6", "--format", "jsonl"))
    ids = made(long)["input_ids"][-(64 - 6) :]
    assert row["cut"] is True
    assert row["completion"] == greedy(model, TokensOf(made, ids), long, 6)


class TokensOf:
    """A tokenizer whose every text is these tokens."""

    def __init__(self, made: Any, ids: list[int]) -> None:
        self._made, self._ids, self.eos_token_id = made, ids, made.eos_token_id

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self._ids}

    def decode(self, *arguments: Any, **named: Any) -> str:
        return self._made.decode(*arguments, **named)


def test_a_file_appears_when_it_is_whole(tiny_classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, out = tmp_path / "in.txt", tmp_path / "out.csv"
    path.write_bytes("\n".join(TEXTS).encode() + b"\n" + b"x" * 20_000 + b"\n\xff\xfe\n")
    arguments = ["predict", str(tiny_classifier), str(path), "--out", str(out), "--chunk-rows", "1"]
    assert cli._main(arguments) == 2
    assert "in.txt: is not UTF-8" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.txt"]


def test_sigterm_leaves_nothing_behind(tiny_classifier: Path, tmp_path: Path):
    reading, writing = os.pipe()
    os.write(writing, b"one text\nanother\n")
    request = command.Request(str(tiny_classifier), out=str(tmp_path / "out.csv"), chunk_rows=1)
    begun = threading.Event()

    class Watched(command.Progress):
        def counts(self, *_: Any, **__: Any) -> None:
            begun.set()

    def end() -> None:
        begun.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)

    ending = threading.Thread(target=end)
    ending.start()
    with os.fdopen(reading, "rb") as stdin, pytest.raises(Interrupted):
        command.predict(request, Watched(), stdin, io.StringIO())
    ending.join()
    os.close(writing)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "MODEL: ./nowhere: is no folder here and the hub gives none"),
        (["EMPTY"], "has no config.json. Give the folder that save_pretrained wrote"),
        (["RUN"], "is a run without a finished student. Finish it: raydistill run "),
        (["ENCODER"], "its architecture is BertModel. Give a classifier or a causal language model"),
        (["MODEL", "no.csv"], "FILE: no.csv: no such file. Check the path"),
        (["MODEL", "in.xlsx"], "the ending says no known format. Use .csv, .tsv, .jsonl or .parquet"),
        (["MODEL", "CSV"], "has no column 'text', it has 'id', 'body'. Set --text or --delimiter"),
        (["MODEL", "CSV", "--text", "body", "--out", "CSV"], "is the file that is read. Give another"),
        (["MODEL", "CSV", "--text", "body", "--out", "nowhere/x.csv"], "its folder is not there. Make it first"),
        (["MODEL", "CSV", "--out", "x.txt"], "--out: x.txt: found 'txt'; it takes one of csv, jsonl"),
        (["MODEL", "CSV", "--format", "xml"], "--format: found 'xml'; it takes one of csv, jsonl"),
        (
            ["MODEL", "CSV", "--threshold", "0.4"],
            "--threshold: is for multi_label, and the model is for classification",
        ),
        (["MODEL", "CSV", "--max-tokens", "4"], "--max-tokens: is for causal_lm, and the model is for classification"),
        (["MODEL", "CSV", "--delimiter", "ab"], "--delimiter: found 'ab'; it is one character"),
        (["MODEL", "CSV", "--top", "-1"], "Invalid value for '--top'"),
    ],
)
def test_what_is_refused(
    runs: SmallRuns, tiny_classifier: Path, tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str,
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    shutil.copy(runs.whole / "config.yaml", tmp_path / "run")
    write_files(tmp_path)
    (tmp_path / "in.xlsx").write_text("x")
    names = {"MODEL": tiny_classifier, "ENCODER": tiny_encoder, "CSV": "in.csv", "EMPTY": "empty", "RUN": "run"}
    before = sorted(tmp_path.rglob("*"))
    assert cli._main(["predict", *(str(names.get(name, name)) for name in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
