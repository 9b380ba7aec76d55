"""Writes models and tokenizers in Hugging Face form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raydistill.models.loading import quiet_transformers


def save_model(model: Any, tokenizer: Any, weights: dict[str, torch.Tensor], folder: Path, *, max_length: int) -> None:
    """Writes a model in Hugging Face form: config, safetensors, and a tokenizer that can cut at max_length."""
    quiet_transformers()
    model.save_pretrained(str(folder), state_dict={name: value.contiguous() for name, value in weights.items()})
    save_tokenizer(tokenizer, folder, max_length=max_length)
    share_weights(folder, like=folder / "config.json")


def longest_input(model: Any, tokenizer: Any) -> int:
    """All the tokens that a language model can read, which its tokenizer may give it."""
    return getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length


def save_tokenizer(tokenizer: Any, folder: Path, *, max_length: int) -> None:
    """Writes a tokenizer that can cut at max_length."""
    tokenizer.model_max_length = max_length
    if tokenizer.is_fast:  # what this process did with it before must not show in the file
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(str(folder))


def share_weights(folder: Path, *, like: Path) -> None:
    """Lets those who may read another file read the weights, which safetensors makes for the owner alone."""
    for path in folder.glob("*.safetensors"):
        path.chmod(like.stat().st_mode)
