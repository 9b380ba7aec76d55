"""An exported language model's folder: weights in one format, configuration, tokenizer, and how it is served.

`export.json` says what the folder is: format, the tokens that the model reads at most, those that end a text, the
student's number of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raydistill.exports.folder import (
    ExportSource,
    add_program,
    check_packages,
    close_folder,
    merged,
    write_safetensors,
)
from raydistill.exports.gguf_file import (
    GGUF_FILE,
    check_gguf,
    check_gguf_model,
    context_length,
    gguf_config,
    write_gguf,
)
from raydistill.exports.gguf_tokenizer import gguf_tokenizer
from raydistill.exports.int4_file import check_int4_model
from raydistill.exports.onnx_file import ONNX_FILE, write_onnx
from raydistill.exports.serving import MODELFILE, chat_pieces, modelfile, ollama_template
from raydistill.exports.torchao_weights import check_torchao_model
from raydistill.models.folders import weight_files
from raydistill.models.loading import empty_language_model, load_gguf
from raydistill.models.saving import longest_input

PROGRAM = "generate.py"


def check_language_format(format_name: str, model: Any, tokenizer: Any) -> None:
    """Raises UserError for a format whose packages are not there, or that cannot hold the student.

    The student may be without weights.
    """
    if format_name.startswith("gguf"):
        check_gguf()
        check_gguf_model(model, tokenizer)
        return
    check_packages(format_name)
    if format_name == "torchao-int4":
        check_int4_model(model)
    elif format_name.startswith("torchao"):
        check_torchao_model(format_name, model)


def write_language_export(model: Any, tokenizer: Any, folder: Path, format_name: str, *, name: str) -> None:
    """Writes a float32 language model into a new folder. Raises UserError for what the format cannot hold."""
    folder.mkdir()
    model = merged(model)
    end = model.generation_config.eos_token_id
    facts = {
        "max_length": longest_input(model, tokenizer),
        "end_ids": end if isinstance(end, list) else [end] if end is not None else [],
    }
    if format_name == "onnx" or format_name.startswith("gguf"):
        config = gguf_config(model.config) if format_name.startswith("gguf") else model.config
        config.save_pretrained(str(folder))
        model.generation_config.save_pretrained(str(folder))
        _write_file(model, tokenizer, folder, format_name, name)
    else:
        write_safetensors(model, folder, format_name)
    if format_name == "torchao-int4":
        add_program(folder, PROGRAM, "generate_torch")
    close_folder(folder, model, tokenizer, format_name, facts)


def _write_file(model: Any, tokenizer: Any, folder: Path, format_name: str, name: str) -> None:
    """A format of one file, and what goes with it."""
    if format_name == "onnx":
        write_onnx(model, folder / ONNX_FILE)
        add_program(folder, PROGRAM, "generate_onnx")
        return
    write_gguf(model, tokenizer, folder / GGUF_FILE, format_name, name=name)
    held, pieces, template = gguf_tokenizer(tokenizer, model.config.vocab_size), chat_pieces(tokenizer), None
    if pieces is not None:
        template = ollama_template(pieces, adds_begin=held.adds_begin, begin_token=tokenizer.bos_token)
    text = modelfile(GGUF_FILE, context=context_length(model.config), template=template, stop=tokenizer.eos_token)
    (folder / MODELFILE).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class LanguageExport(ExportSource):
    """A folder that `write_language_export` wrote, in the place of a model's."""

    def load_language(self, dtype: torch.dtype = torch.float32) -> Any:
        """The language model as it is deployed, whatever the dtype."""
        folder = self.folder()
        if self.facts()["format"].startswith("gguf"):
            check_gguf()
            return load_gguf(self.setting, folder, GGUF_FILE)
        return self._opened(dtype, super().load_language, empty_language_model)

    @staticmethod
    def _weights(folder: Path) -> list[Path]:
        files = [folder / name for name in (ONNX_FILE, GGUF_FILE) if (folder / name).is_file()]
        return files or weight_files(folder)
