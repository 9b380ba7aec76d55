"""An exported classifier's folder: weights in one format, tokenizer, labels, and a small program that uses them.

`export.json` says what the folder is: format, labels in the order of the logits, whether a row may have several, the
tokens that a row is cut to and at which end, the student's number of parameters.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydistill.adapters import whole
from raydistill.errors import UserError, first_line
from raydistill.exports.int4_file import read_int4, write_int4
from raydistill.exports.onnx_file import ONNX_FILE, OnnxModel, check_onnx, quantise_onnx, write_onnx
from raydistill.exports.torchao_weights import check_torchao, write_torchao
from raydistill.models.folders import weight_files
from raydistill.models.loading import count_parameters, empty_classifier
from raydistill.models.saving import save_tokenizer, share_weights
from raydistill.models.source import ModelSource
from raydistill.record.fingerprint import digest
from raydistill.record.store import sha256_file

FACTS = "export.json"
PROGRAM = "predict.py"


def check_packages(format_name: str) -> None:
    """Raises UserError, which names the extra to install, when a format's packages are not there."""
    if format_name.startswith("onnx"):
        check_onnx()
    if format_name.startswith("torchao"):
        check_torchao()


def write_export(
    model: Any,
    tokenizer: Any,
    folder: Path,
    format_name: str,
    *,
    max_length: int,
    multi_label: bool,
    scratch: Path | None = None,
    calibration: list[dict[str, npt.NDArray[np.int64]]] | None = None,
) -> None:
    """Writes a float32 classifier into a new folder; `calibration` are the inputs of single rows for static ranges.

    `scratch` is a folder that keeps the model as float32 ONNX from one format to the next.

    Raises UserError for a model or a tokenizer that the format cannot hold.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"export.formats: {format_name}: {type(tokenizer).__name__} has no tokenizer.json. Save the student's"
            " tokenizer as a fast one"
        )
    folder.mkdir()
    model = merged(model)
    facts = {
        "labels": [model.config.id2label[number] for number in range(model.config.num_labels)],
        "multi_label": multi_label,
        "max_length": max_length,
        "truncation_side": tokenizer.truncation_side,
    }
    if format_name.startswith("onnx"):
        model.config.save_pretrained(str(folder))
        _write_onnx(model, folder / ONNX_FILE, format_name, scratch, calibration)
        add_program(folder, PROGRAM, "predict_onnx")
    else:
        write_safetensors(model, folder, format_name)
        add_program(folder, PROGRAM, "predict_torch")
    close_folder(folder, model, tokenizer, format_name, facts)


def merged(model: Any) -> Any:
    """A model without adapters: those that it has are merged."""
    return whole(model) if hasattr(model, "peft_config") else model


def write_safetensors(model: Any, folder: Path, format_name: str) -> None:
    """Configuration and weights in a format that transformers loads. Raises UserError for what it cannot hold."""
    if format_name == "safetensors-bf16":
        model.to(torch.bfloat16).save_pretrained(str(folder))
    elif format_name == "torchao-int4":
        write_int4(model, folder)
    else:
        write_torchao(model, folder)


def add_program(folder: Path, name: str, source: str) -> None:
    """Puts a small program that uses the weights beside them."""
    text = Path(__file__).with_name(f"{source}.py.txt").read_text(encoding="utf-8")
    (folder / name).write_text(text, encoding="utf-8")


def close_folder(folder: Path, model: Any, tokenizer: Any, format_name: str, facts: dict[str, Any]) -> None:
    """Adds the tokenizer and what the folder is, and lets those read the weights who may read that."""
    save_tokenizer(tokenizer, folder, max_length=facts["max_length"])
    facts = {"format": format_name, **facts, "parameters": count_parameters(model)}
    (folder / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    share_weights(folder, like=folder / FACTS)


def _write_onnx(
    model: Any,
    path: Path,
    format_name: str,
    scratch: Path | None,
    calibration: list[dict[str, npt.NDArray[np.int64]]] | None,
) -> None:
    with contextlib.ExitStack() as stack:
        kept = scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        whole_file = kept / ONNX_FILE
        if not whole_file.exists():
            write_onnx(model, whole_file)
        if format_name == "onnx":
            shutil.copyfile(whole_file, path)
        else:
            quantise_onnx(whole_file, path, rows=calibration, bits=4 if format_name == "onnx-int4" else 8)


def is_export(folder: Path) -> bool:
    return (folder / FACTS).is_file()


@dataclass(frozen=True)
class ExportSource(ModelSource):
    """A folder that `write_export` wrote, in the place of a model's."""

    def folder(self) -> Path:
        """The folder on this machine. Raises UserError when it holds no exported model."""
        folder = Path(self.model) if self.store_url is None else self.fetched()
        if not is_export(folder) or not self._weights(folder):
            raise UserError(f"{self.setting}: {folder}: holds no exported model. Give a folder of a run's export/")
        return folder

    def facts(self) -> dict[str, Any]:
        """What `export.json` says. Raises UserError when it cannot be read."""
        path = self.folder() / FACTS
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{self.setting}: {path}: is not JSON ({first_line(error)}). Export it again") from None

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """The classifier as it is deployed, whatever the dtype."""
        return self._opened(dtype, super().load, empty_classifier)

    def _opened(self, dtype: torch.dtype, read: Callable[[torch.dtype], Any], empty: Callable[[str, Path], Any]) -> Any:
        """What stands in the folder: an ONNX file, weights of 4 bits for an `empty` model of the folder's
        configuration, or weights that `read` loads in a precision.
        """
        folder, format_name = self.folder(), self.facts()["format"]
        check_packages(format_name)
        if format_name.startswith("onnx"):
            return OnnxModel(folder / ONNX_FILE).eval()
        if format_name == "torchao-int4":
            return read_int4(self.setting, empty(self.setting, folder), folder)
        return read(torch.bfloat16 if format_name == "safetensors-bf16" else dtype)

    def identity(self) -> dict[str, str]:
        folder = self.folder()
        return {"export_sha256": digest({p.name: sha256_file(p) for p in sorted(folder.iterdir()) if p.is_file()})}

    def parameters(self, model: Any) -> int:
        return self.facts()["parameters"]

    @property
    def cpu_only(self) -> bool:
        return (self.folder() / ONNX_FILE).is_file()

    def weights(self) -> list[Path]:
        return self._weights(self.folder())

    @staticmethod
    def _weights(folder: Path) -> list[Path]:
        return [folder / ONNX_FILE] if (folder / ONNX_FILE).is_file() else weight_files(folder)
