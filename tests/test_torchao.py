"""Files of 8 and 4 bits by torchao, which transformers imports in every process once it is there: it is not installed
with what the other tests need, and the last test makes an environment in which the others run.
"""

import os
import re
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from language_runs import texts, tiny_language_model, tokenizer
from safetensors.torch import load_file, save_file
from test_export import BOUNDS, asking, make_run, run_of, student_logits, texts_of
from tiny_models import LABELS, tiny

from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.exports.folder import ExportSource, write_export
from raydistill.exports.language_folder import LanguageExport, write_language_export
from raydistill.models.loading import held_bytes
from raydistill.stages import export as stage
from raydistill.stages.latency import Load, measure
from raydistill.stages.progress import Progress

ROOT = Path(__file__).parents[1]
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: number for number, name in enumerate(LABELS)}}
TEXTS = ["my card was charged twice", "where is my parcel?", "the app crashes on login"]


def numbers_of(file: Path) -> dict[str, torch.Tensor]:
    """What the file's documented names stand for, with shifts and products alone."""
    held, found = load_file(file), {}
    for name, value in held.items():
        if name.endswith(".int4"):
            whole = name.removesuffix(".int4")
            columns = np.empty((len(value), 2 * value.shape[1]))
            columns[:, 0::2], columns[:, 1::2] = value.numpy() % 16, value.numpy() // 16
            scale, zero = (held[f"{whole}.{part}"].double().numpy().repeat(32, axis=1) for part in ("scale", "zero"))
            found[whole] = torch.from_numpy(scale * (columns - 8 - zero)).float()
        elif name.endswith(".int8"):
            found[name.removesuffix(".int8")] = value.float() * held[f"{name.removesuffix('.int8')}.scale"]
        elif not name.endswith((".scale", ".zero")):
            found[name] = value
    return found


def rounded(model: Any, file: Path) -> Any:
    """The model with the numbers of a file in the place of its weights."""
    found = numbers_of(file)
    told = model.load_state_dict(found, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert not told.unexpected_keys
    assert set(told.missing_keys) <= tied
    return model.eval()


@pytest.fixture
def made(tiny_encoder: Path) -> Any:
    return load_tokenizer(tiny_encoder, "student")


@needs_torchao
def test_weights_take_four_bits_and_are_within_half_a_step(made: Any, tmp_path: Path):
    model = tiny("bert", vocab_size=len(made), hidden_size=32, intermediate_size=48, num_hidden_layers=2, **NAMES)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    write_export(model, made, tmp_path / "int4", "torchao-int4", max_length=16, multi_label=False)
    held, found = load_file(tmp_path / "int4/int4.safetensors"), numbers_of(tmp_path / "int4/int4.safetensors")
    assert found.keys() == weights.keys()
    in_four = {name.removesuffix(".int4") for name in held if name.endswith(".int4")}
    assert "bert.encoder.layer.0.attention.self.query.weight" in in_four
    assert "bert.encoder.layer.1.output.dense.weight.int8" in held  # of 48 inputs
    assert "bert.embeddings.word_embeddings.weight.int8" in held
    for name, value in weights.items():
        error = (found[name] - value).abs()
        if name in in_four:
            bits = 8 * sum(held[f"{name}.{part}"].nbytes for part in ("int4", "scale", "zero"))
            assert bits == 4.75 * value.numel()
            step = held[f"{name}.scale"].float().repeat_interleave(32, dim=1)
            assert (error <= 0.5 * step + 0.004 * value.abs().max() + 0.04 * step).all()  # scales have 8 bits
            assert error.max() > 0
        elif f"{name}.int8" in held:
            assert (error <= 0.51 * held[f"{name}.scale"] + 1e-7).all()
        else:
            assert torch.equal(found[name], value)


@needs_torchao
def test_it_computes_with_the_numbers_of_the_file(made: Any, tmp_path: Path):
    folder = tmp_path / "int4"
    for place in (folder, tmp_path / "again"):
        model = tiny("bert", vocab_size=len(made), hidden_size=32, intermediate_size=64, num_hidden_layers=2, **NAMES)
        write_export(model, made, place, "torchao-int4", max_length=16, multi_label=False)
    assert (folder / "int4.safetensors").read_bytes() == (tmp_path / "again/int4.safetensors").read_bytes()
    loaded, expected = ExportSource("export", str(folder)).load(), rounded(model, folder / "int4.safetensors")
    inputs = made(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits_NK, found_NK = (one(**inputs).logits for one in (expected, loaded))
    assert (found_NK - logits_NK).abs().max() <= 1e-4 * logits_NK.abs().max()
    parameters = sum(value.numel() for value in expected.parameters())
    assert ExportSource("export", str(folder)).parameters(loaded) == parameters
    # A byte for each weight of a linear layer, and of every 32 a scale of four bytes and a zero of one.
    four = [name for name in load_file(folder / "int4.safetensors") if name.endswith(".int4")]
    small = sum(expected.get_parameter(name.removesuffix(".int4")).numel() for name in four)
    assert held_bytes(loaded) == held_bytes(expected) - 4 * small + small + 5 * small // 32
    done = subprocess.run(
        [sys.executable, "-I", str(folder / "predict.py"), *TEXTS], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    shares = logits_NK.softmax(1)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert [float(share) for _, share in lines] == pytest.approx(shares.max(1).values.tolist(), abs=1e-3)
    assert [label for label, _ in lines] == [LABELS[k] for k in shares.argmax(1)]


@needs_torchao
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_language_model_goes_on_as_its_rounded_weights_do(architecture: str, tmp_path: Path):
    own, folder = tokenizer(), tmp_path / "int4"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "tie_word_embeddings": architecture == "qwen2"}
    model = tiny_language_model(architecture, vocabulary=len(own), **sizes)
    write_language_export(model, own, folder, "torchao-int4", name="tales")
    loaded, expected = (
        LanguageExport("export", str(folder)).load_language(),
        rounded(model, folder / "int4.safetensors"),
    )
    text = texts(1)[0][:24].rstrip()
    ids = own(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits, found = (one(input_ids=ids).logits for one in (expected, loaded))
    assert (found - logits).abs().max() <= 1e-4 * logits.abs().max()
    done = subprocess.run(
        [sys.executable, "-I", str(folder / "generate.py"), text], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(text)
    assert len(done.stdout.rstrip()) > len(text)


@needs_torchao
def test_the_stage_keeps_what_answers_as_the_student(runs: Any, tiny_classifier: Path, tmp_path: Path):
    config = asking(
        make_run(runs, tmp_path, tiny_classifier, "ao"), "torchao-int8", "torchao-int4", **BOUNDS
    )  # fmt: skip
    run, said = run_of(config), []
    stage.export(config, run, Progress(said.append))
    expected = student_logits(tiny_classifier, texts_of(config))
    files = stage.exported(config, run)
    for name, source in files.items():
        facts = run.require(f"export/{name}").facts
        assert 0 < facts["difference"] < 0.5 * np.abs(expected).max()
        assert facts["agreement"] >= 0.9
        assert facts["size_bytes"] == sum(path.stat().st_size for path in source.weights())
    sizes = {name: run.require(f"export/{name}").facts["size_bytes"] for name in files}
    assert sizes["torchao-int4"] < sizes["torchao-int8"]
    speed = measure({name: (one,) for name, one in files.items()}, TEXTS, Load(4, 1, 1, 48, "float32"), "cpu")
    whole = sum(value.numel() for value in load_file(tiny_classifier / "model.safetensors").values())
    assert {figures["parameters"] for figures in speed.values()} == {whole}
    assert all(figures["memory_bytes"] < 4 * whole for figures in speed.values())


@needs_torchao
def test_a_file_of_another_model_is_refused(made: Any, tmp_path: Path):
    model = tiny("bert", vocab_size=len(made), hidden_size=32, intermediate_size=64, num_hidden_layers=1, **NAMES)
    write_export(model, made, tmp_path / "int4", "torchao-int4", max_length=16, multi_label=False)
    file = tmp_path / "int4/int4.safetensors"
    held = load_file(file)
    save_file({name: value for name, value in held.items() if name != "classifier.bias"}, file)
    with pytest.raises(UserError, match=r"export: .*int4\.safetensors: classifier\.bias is not as in the model"):
        ExportSource("export", str(tmp_path / "int4")).load()


def test_a_model_without_a_layer_that_fits_is_refused(made: Any, tmp_path: Path):
    model = tiny("bert", vocab_size=len(made), hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    with pytest.raises(
        UserError, match="torchao-int4: no linear layer of BertForSequenceClassification has a multiple"
    ):
        write_export(model, made, tmp_path / "int4", "torchao-int4", max_length=16, multi_label=False)


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
def test_the_package_that_is_missing_is_named(runs: Any, tiny_classifier: Path, tmp_path: Path):
    config = asking(make_run(runs, tmp_path, tiny_classifier, "without"), "torchao-int4")
    with pytest.raises(UserError, match=r"needs the package torchao\. Install it: pip install 'raydistill\[torchao\]'"):
        stage.check_export(config)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchao") is not None, reason="the tests above have run")
@pytest.mark.timeout(1500)
def test_all_of_it_in_an_environment_with_torchao(tmp_path: Path):
    """This environment's packages, and beside them torchao in the version that the constraints name."""
    place = tmp_path / "environment"
    venv.create(place, with_pip=True)
    python, (site,) = place / "bin/python", place.glob("lib/python*/site-packages")
    pinned = re.search(r"^torchao==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", pinned[0]]
    done = subprocess.run(install, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    own = [path for path in sys.path if path.endswith("site-packages")]
    (site / "beside.pth").write_text("\n".join(own) + "\n")
    command = [str(python), "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", str(Path(__file__).resolve())]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=800, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.findall(r"^PASSED \S+::(\w+)", done.stdout, re.MULTILINE)
    assert len(passed) == 7, done.stdout[-4000:]
