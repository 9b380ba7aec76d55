"""A model's folder: found here or fetched from the hub, checked to be safe to load, and fingerprinted.

Weights are read from safetensors alone; repositories with code of their own (`auto_map`) are refused.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

from raydistill.adapters import ADAPTER_CONFIG, BASE, is_adapter
from raydistill.errors import UserError, first_line
from raydistill.record.fingerprint import digest
from raydistill.record.store import sha256_file

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "spm.model", "tokenizer.model",
    CHAT_TEMPLATE,
)  # fmt: skip
HUB_FILES = [
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", *TOKENIZER_FILES,
]  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def find_model(setting: str, model: str, revision: str | None = None) -> Path:
    """The local folder of a model, fetched from the hub when it is a hub id, and checked to be safe to load.

    Raises UserError when it is not there, has no safetensors weights, or brings code.
    """
    if os.path.isabs(model) or os.path.isdir(model):
        folder = Path(model)
        if not folder.is_dir():
            raise UserError(f"{setting}: {model}: no such folder. Give a model's folder or a hub id")
    else:
        folder = _from_hub(setting, model, revision)
    _check_folder(setting, folder)
    return folder


def find_tokenizer(setting: str, tokenizer: str) -> Path:
    """The local folder of a tokenizer, with or without a model, fetched from the hub when it is a hub id.

    Raises UserError when it is not there.
    """
    if os.path.isdir(tokenizer):
        return Path(tokenizer)
    if os.path.isabs(tokenizer):
        raise UserError(f"{setting}: {tokenizer}: no such folder. Give a tokenizer's folder or a hub id")
    return _from_hub(setting, tokenizer, None, [*TOKENIZER_FILES, "config.json"])


def _from_hub(setting: str, model: str, revision: str | None, files: list[str] = HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=files))
    except Exception as error:  # the hub client raises many kinds, from bad names to network errors
        raise UserError(f"{setting}: {model}: is no folder here and the hub gives none ({first_line(error)})") from None


def _check_folder(setting: str, folder: Path) -> None:
    config = base_folder(folder) / "config.json"
    if not config.is_file():
        raise UserError(f"{setting}: {folder}: has no config.json. Give the folder that save_pretrained wrote")
    try:
        facts = json.loads(config.read_text())
    except ValueError:
        raise UserError(f"{setting}: {config}: is not JSON. Save the model again") from None
    if "auto_map" in facts:
        raise UserError(f"{setting}: {folder}: brings code of its own (auto_map in config.json), which is never run")
    weights = weight_files(folder)
    if not weights:
        raise UserError(f"{setting}: {folder}: has no safetensors weights. Save it with save_pretrained again")
    for path in weights:
        _check_weights(setting, path)


def base_folder(folder: Path) -> Path:
    """The folder with a model's configuration: an adapter's base is in one of its own."""
    return folder / BASE if is_adapter(folder) else folder


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, its base's too where it is an adapter."""
    return sorted({*folder.glob("*.safetensors"), *base_folder(folder).glob("*.safetensors")})


def refuse_adapter(setting: str, folder: Path) -> None:
    """Raises UserError for a folder that holds an adapter where whole weights are needed."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{setting}: {folder}: holds an adapter, not a whole model. Merge it first: train it with"
            " student.lora.merge=true, or with peft's merge_and_unload()"
        )


def _check_weights(setting: str, path: Path) -> None:
    """A safetensors file begins with the length of a JSON header that says where every tensor ends."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise UserError(f"{setting}: {path}: is not a safetensors file. Fetch or save the weights again") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise UserError(f"{setting}: {path}: has {size} bytes, its header says {expected}. Fetch or save it again")


def model_identity(folder: Path) -> dict[str, str]:
    """sha256 of a model's weights, configuration and tokenizer: what a fingerprint holds of it."""
    weights = {
        p.name: _digest_of(p, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.safetensors"))
    }
    return {
        "weights_sha256": digest(weights),
        "config_sha256": sha256_file(folder / "config.json"),
        "tokenizer_sha256": tokenizer_identity(folder),
    }


def tokenizer_identity(folder: Path) -> str:
    """sha256 over a tokenizer's files."""
    return digest({name: sha256_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()})


@functools.cache
def _digest_of(path: Path, size: int, time_ns: int) -> str:
    """A file's sha256, computed once in a process while size and time stay what they are."""
    return sha256_file(path)
