"""Files to deploy: each is compared with the student by means of its own, kept only when it passes, and made once."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import SmallRuns

from raydistill import cli
from raydistill.config.file import load_config
from raydistill.config.run import Config
from raydistill.data.shards import read_split
from raydistill.errors import UserError
from raydistill.exports import folder as export_folder
from raydistill.exports import onnx_file
from raydistill.models.loading import load_classifier
from raydistill.record.commit import commit_folder, read_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run, clear, leftovers, open_run, verify
from raydistill.record.store import LocalStore
from raydistill.stages import export as stage
from raydistill.stages.progress import Progress
from raydistill.stages.status import standings
from raydistill.tickets import CATEGORIES

pytestmark = pytest.mark.xdist_group("small_runs")
onnxruntime = pytest.importorskip("onnxruntime")
FORMATS = ("onnx", "onnx-int8", "onnx-int8-static", "onnx-int4", "safetensors-bf16")
BOUNDS = {"min_agreement": 0.9, "max_accuracy_loss": 0.1}
TEXTS = ["my card was charged twice", "where is my parcel?", "the app crashes on login"]


def make_run(runs: SmallRuns, place: Path, classifier: Path, name: str) -> Config:
    """A run whose student is a classifier with clear margins, so that no rounding decides an answer."""
    folder = place / name
    shutil.copytree(runs.whole / "data", folder / "data")
    store = LocalStore(str(folder))
    staged = store.staging("student")
    shutil.copytree(classifier, staged)
    commit_folder(store, staged, "student", Plan("student", {"model": name}).fingerprint, {"metric": "accuracy"})
    config = load_config(runs.whole / "config.yaml", [f"name={name}", f"storage={place}"])
    (folder / "config.yaml").write_text((runs.whole / "config.yaml").read_text())
    return config


def asking(config: Config, *formats: str, **settings: Any) -> Config:
    from raydistill.config.export import Export

    return config.model_copy(update={"export": Export.model_validate({"formats": formats, **settings})})


def run_of(config: Config) -> Run:
    return open_run(config.storage, config.name)


@pytest.fixture(scope="module")
def made(runs: SmallRuns, tiny_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with every format exported."""
    config = make_run(runs, tmp_path_factory.mktemp("exports"), tiny_classifier, "made")
    config = asking(config, *FORMATS, **BOUNDS)
    stage.export(config, run_of(config), Progress())
    return config


def folder_of(config: Config, name: str) -> Path:
    return Path(config.storage) / config.name / "export" / name


def texts_of(config: Config) -> list[str]:
    store = LocalStore(f"{config.storage}/{config.name}")
    data = read_manifest(store, "data")
    assert data is not None
    return [text for shard in read_split(store, data.shards("test")) for text in shard.texts]


def student_logits(classifier: Path, texts: list[str]) -> np.ndarray:
    """By transformers alone, one text at a time."""
    from transformers import AutoTokenizer

    model, tokenizer = load_classifier("student", classifier), AutoTokenizer.from_pretrained(classifier)
    with torch.no_grad():
        found = [model(**tokenizer(t, truncation=True, max_length=48, return_tensors="pt")).logits[0] for t in texts]
    return torch.stack(found).numpy()


def clear_texts(config: Config, classifier: Path) -> list[str]:
    """The test rows with the clearest answers."""
    texts = texts_of(config)
    ordered = np.sort(student_logits(classifier, texts), axis=1)
    return [texts[row] for row in np.argsort(ordered[:, -2] - ordered[:, -1])[:3]]


def file_logits(folder: Path, texts: list[str]) -> np.ndarray:
    """By onnxruntime and tokenizers alone."""
    from tokenizers import Tokenizer

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(48)
    found = []
    for text in texts:
        ids = np.array([tokenizer.encode(text).ids])
        found.append(session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0])
    return np.stack(found)


def test_the_onnx_file_computes_what_the_student_does(made: Config, tiny_classifier: Path):
    texts = texts_of(made)
    expected = student_logits(tiny_classifier, texts)
    assert np.abs(file_logits(folder_of(made, "onnx"), texts) - expected).max() < 1e-4
    for name in ("onnx-int8", "onnx-int8-static"):
        found = file_logits(folder_of(made, name), texts)
        assert 1e-6 < np.abs(found - expected).max() < 0.2 * np.abs(expected).max()
        assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.9
    # The float file with its weights rounded to 15 steps between the least and the greatest of each block.
    found = file_logits(folder_of(made, "onnx-int4"), texts)
    assert 1e-6 < np.abs(found - expected).max() < 0.5 * np.abs(expected).max()


def test_eight_bits_take_a_quarter_of_the_bytes(made: Config):
    import onnx

    sizes = {}
    for name in ("onnx", "onnx-int8", "onnx-int8-static"):
        model = onnx.load(folder_of(made, name) / "model.onnx")
        sizes[name] = sum(np.prod(t.dims) * onnx.numpy_helper.to_array(t).itemsize for t in model.graph.initializer)
        assert not any(tensor.data_location for tensor in model.graph.initializer)  # all in the file itself
    assert sizes["onnx-int8"] < 0.45 * sizes["onnx"]
    assert sizes["onnx-int8-static"] < 0.45 * sizes["onnx"]


def test_weights_of_products_take_four_bits_in_blocks(made: Config, tiny_classifier: Path):
    import onnx

    model = onnx.load(folder_of(made, "onnx-int4") / "model.onnx")
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    weights = [
        w.numpy() for name, w in load_file(tiny_classifier / "model.safetensors").items()
        if w.dim() == 2 and name.endswith("weight") and "embeddings" not in name
    ]  # fmt: skip
    assert len(products) == len(weights)
    assert not any(node.op_type == "MatMul" and set(node.input) & set(held) for node in model.graph.node)
    for node in products:
        packed, scales, zeros = (held[name] for name in node.input[1:4])
        rows, blocks = packed.shape[:2]
        low_high = np.stack([packed & 15, packed >> 4], -1).reshape(rows, blocks, 32).astype(np.float32)
        zero = np.stack([zeros & 15, zeros >> 4], -1).reshape(rows, -1)[:, :blocks, None].astype(np.float32)
        whole = ((low_high - zero) * scales.reshape(rows, blocks, 1)).reshape(rows, -1)
        step = scales.reshape(rows, blocks).max(1, keepdims=True)
        near = [w for w in weights if w.shape[0] == rows and w.shape[1] <= whole.shape[1] < w.shape[1] + 32]
        assert any((np.abs(whole[:, : w.shape[1]] - w) <= 0.51 * step + 1e-6).all() for w in near)


def test_a_file_says_nothing_of_the_machine_that_made_it(made: Config):
    content = (folder_of(made, "onnx") / "model.onnx").read_bytes()
    assert str(Path(onnx_file.__file__).parents[2]).encode() not in content
    assert b"site-packages" not in content


def test_bf16_weights_are_the_students_rounded(made: Config, tiny_classifier: Path):
    from safetensors.torch import load_file

    whole, half = (load_file(f / "model.safetensors") for f in (tiny_classifier, folder_of(made, "safetensors-bf16")))
    assert whole.keys() == half.keys()
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)


@pytest.mark.parametrize("name", ["onnx", "safetensors-bf16"])
def test_its_program_prints_labels_and_probabilities(made: Config, tiny_classifier: Path, name: str):
    texts = clear_texts(made, tiny_classifier)
    logits = torch.from_numpy(student_logits(tiny_classifier, texts)).softmax(1)
    expected = [(sorted(CATEGORIES)[row.argmax()], float(row.max())) for row in logits]
    done = subprocess.run(
        [sys.executable, "-I", str(folder_of(made, name) / "predict.py")], input="\n".join(texts) + "\n",
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [line.split("\t") for line in done.stdout.splitlines()]
    assert [label for label, _ in found] == [label for label, _ in expected]
    assert [float(p) for _, p in found] == pytest.approx([p for _, p in expected], abs=0.02)


@pytest.mark.parametrize("name", ["onnx", "safetensors-bf16"])
def test_predict_answers_with_it(made: Config, tiny_classifier: Path, name: str, capsys: pytest.CaptureFixture[str]):
    texts = clear_texts(made, tiny_classifier)
    logits = torch.from_numpy(student_logits(tiny_classifier, texts)).softmax(1)
    path = Path(made.storage) / "in.txt"
    path.write_text("\n".join(texts))
    assert cli._main(["predict", str(folder_of(made, name)), str(path), "--format", "jsonl"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["label"] for row in found] == [sorted(CATEGORIES)[row.argmax()] for row in logits]
    within = {"onnx": 1e-4, "safetensors-bf16": 0.02}[name]
    assert [row["probability"] for row in found] == pytest.approx([float(row.max()) for row in logits], abs=within)


def test_the_manifest_has_what_was_found_and_the_run_knows_the_files(made: Config):
    run = run_of(made)
    facts = run.require("export/onnx").facts
    assert facts["rows"] == 80  # all that the data have: 20 of test, then validation and train
    assert facts["splits"] == ["test", "validation", "train"]
    assert facts["difference"] <= 1e-4
    assert facts["agreement"] == 1
    assert facts["accuracy"] == facts["student_accuracy"]
    assert facts["size_bytes"] == (folder_of(made, "onnx") / "model.onnx").stat().st_size
    assert verify(run)[1] == []
    state = {one.part: one for one in standings(run, made)}
    assert state["export/onnx"].state == "complete"
    assert "100.00% of 80 rows" in state["export/onnx"].detail
    assert "export/torchao-int8" not in state


def test_what_stands_is_kept_and_what_is_damaged_is_made_again(made: Config, tmp_path: Path):
    shutil.copytree(Path(made.storage) / made.name, tmp_path / "copy")
    config = asking(made.model_copy(update={"name": "copy", "storage": str(tmp_path)}), "onnx")
    run, path = run_of(config), folder_of(config, "onnx") / "model.onnx"
    whole, said = path.read_bytes(), []
    stage.export(config, run, Progress(said.append))
    assert said == ["export: onnx is complete"]
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [finding.file for finding in verify(run, repair=True)[1]] == ["export/onnx/model.onnx"]
    stage.export(config, run, Progress())
    assert path.read_bytes() == whole
    assert verify(run)[1] == []
    clear(run, leftovers(run))
    assert sorted(p.name for p in folder_of(config, "onnx").parent.iterdir()) == sorted(FORMATS)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(runs: SmallRuns, made: Config, tmp_path: Path):
    formats = {"export.formats": ["safetensors-bf16"], "export.max_accuracy_loss": 1, "export.min_agreement": 0}
    found = {}
    for name in ("whole", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        for part in ("data", "student"):
            shutil.copytree(runs.whole / part, folder / part)
        if name == "killed":
            number = found["operations"].index("rename safetensors-bf16") + 1
            assert runs.run(folder, "export", changes=formats, fault=f"{number}:kill") == {"exit": -9}
            assert not (folder / "export/safetensors-bf16").exists()
        answer = runs.run(folder, "export", changes=formats)
        assert answer["error"] is None
        found["operations"] = answer["operations"]
        found[name] = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted((folder / "export").rglob("*"))
            if path.is_file() and ".tmp" not in str(path)
        }
    assert "export/safetensors-bf16/predict.py" in found["whole"]
    assert found["killed"] == found["whole"]


def test_a_file_that_answers_otherwise_is_kept_nowhere(made: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(Path(made.storage) / made.name / "data", tmp_path / "other/data")
    shutil.copytree(Path(made.storage) / made.name / "student", tmp_path / "other/student")
    config = made.model_copy(update={"name": "other", "storage": str(tmp_path)})
    config = asking(config, "safetensors-bf16", "onnx", "onnx-int8", min_agreement=0.9, max_accuracy_loss=0.1)
    real = onnx_file.write_onnx

    def broken(model: Any, path: Path) -> None:
        with torch.no_grad():
            model.classifier.weight.neg_()
        real(model, path)

    monkeypatch.setattr(export_folder, "write_onnx", broken)
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"export\.formats: onnx: largest difference of a logit .* Leave the format out"
    ):
        stage.export(config, run_of(config), Progress(said.append))
    assert [p.name for p in (tmp_path / "other/export").iterdir()] == ["safetensors-bf16"]  # the others went on
    assert any(line.startswith("export: onnx-int8 was not kept: export.formats: onnx-int8:") for line in said)
    assert any("asked are an agreement of 90.00% and at most 10 points less accuracy" in line for line in said)


def test_an_export_of_another_student_is_refused_until_it_is_done_again(made: Config, tmp_path: Path):
    shutil.copytree(Path(made.storage) / made.name, tmp_path / "again")
    config = asking(
        made.model_copy(update={"name": "again", "storage": str(tmp_path)}), "safetensors-bf16", **BOUNDS, rows=300
    )
    with pytest.raises(UserError, match=r"export/safetensors-bf16: export\.rows: was made with 1024, now asked"):
        stage.export(config, run_of(config), Progress())
    stage.export(config, replace(run_of(config), redo="export"), Progress())
    assert (tmp_path / "again/export/safetensors-bf16.1/model.safetensors").exists()
    assert run_of(config).require("export/safetensors-bf16").facts["rows"] == 80


def test_exports_that_are_done_again_are_those_that_changed_or_else_all(runs: SmallRuns, tmp_path: Path):
    # All of them were set aside, whichever had changed, before.
    loose = {"export.max_accuracy_loss": 1, "export.min_agreement": 0}
    folder = runs.start("train")
    shutil.copytree(runs.whole / "student", folder / "student")
    both = {"export.formats": ["onnx", "safetensors-bf16"], **loose}
    assert runs.run(folder, "export", changes=both)["error"] is None
    other = both | {"export.min_agreement": 0.01}  # which determines the rounded file alone
    answer = runs.run(folder, "export", changes=other, redo="export")
    assert answer["error"] is None
    assert "export: onnx is complete" in answer["said"]
    assert sorted(path.name for path in (folder / "export").iterdir()) == [
        "onnx", "safetensors-bf16", "safetensors-bf16.1"
    ]  # fmt: skip
    assert runs.run(folder, "export", changes=other, redo="export")["error"] is None  # all fit: all are made again
    assert sorted(path.name for path in (folder / "export").iterdir()) == [
        "onnx", "onnx.1", "safetensors-bf16", "safetensors-bf16.1", "safetensors-bf16.2"
    ]  # fmt: skip


def test_a_package_that_is_missing_is_named_with_its_extra(made: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(UserError, match=r"onnx needs onnxruntime\. Install it: pip install 'raydistill\[onnx\]'"):
        stage.check_export(asking(made, "safetensors-bf16", "onnx-int8"))


def test_without_a_finished_student_there_is_nothing_to_export(runs: SmallRuns, tmp_path: Path):
    folder = tmp_path / "empty"
    folder.mkdir()
    shutil.copytree(runs.whole / "data", folder / "data")
    answer = runs.run(folder, "export", changes={"export.formats": ["safetensors-bf16"]})
    assert answer["error"].endswith("student: is not complete. Run `raydistill train` with its config first")
    assert not (folder / "export").exists()


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new environment with what predict.py names and nothing else."""
    place = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True, timeout=300)
    python = place / "bin/python"
    versions = [f"{name}=={__import__(name).__version__}" for name in ("onnxruntime", "tokenizers", "numpy")]
    subprocess.run([str(python), "-m", "pip", "install", "-q", *versions], check=True, timeout=600)
    yield python
    shutil.rmtree(place)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "onnx-int8", "onnx-int8-static", "onnx-int4"])
def test_the_program_runs_where_torch_and_ray_are_not(made: Config, bare_python: Path, name: str, tmp_path: Path):
    shutil.copytree(folder_of(made, name), tmp_path / "deployed")
    probe = "import importlib.util as u; print([n for n in ('torch', 'ray', 'transformers') if u.find_spec(n)])"
    assert subprocess.run([bare_python, "-c", probe], capture_output=True, text=True).stdout.strip() == "[]"
    done = subprocess.run(
        [bare_python, tmp_path / "deployed/predict.py", *TEXTS], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = file_logits(folder_of(made, name), TEXTS).argmax(1)
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == [sorted(CATEGORIES)[k] for k in expected]


def test_facts_beside_the_file(made: Config):
    facts = json.loads((folder_of(made, "onnx") / "export.json").read_text())
    assert facts["labels"] == sorted(CATEGORIES)
    assert (facts["max_length"], facts["multi_label"], facts["format"]) == (48, False, "onnx")
