"""The language model that the `student` section asks for, with its first weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError, first_line
from raydistill.models.folders import find_model
from raydistill.models.loading import empty_language_model, load_language_model
from raydistill.students.layers import chosen_layers, student_from_layers
from raydistill.students.sizes import set_dropout, sizes_of


def build_language_student(settings: Any, *, teacher_folder: Path, max_length: int, seed: int) -> tuple[Any, Any]:
    """The student with its first weights, and its tokenizer; the same for the same seed. Raises UserError."""
    torch.manual_seed(seed)
    if settings.init == "pretrained":
        folder = find_model("student.model", settings.model, settings.revision)
        model = load_language_model("student.model", folder)
        _set_dropout(model, settings.dropout)
        return model, load_tokenizer(folder, "student.model", pads=False)
    tokenizer = load_tokenizer(teacher_folder, "teacher.model", pads=False)
    if settings.init == "config":
        return _new(settings, tokenizer, max_length), tokenizer
    return _of_layers(settings, load_language_model("teacher.model", teacher_folder)), tokenizer


def language_skeleton(settings: Any, *, teacher_folder: Path, max_length: int) -> Any:
    """The student on the meta device, for what its sizes decide. Raises UserError as building it would."""
    with torch.device("meta"):
        if settings.init == "config":
            return _new(settings, load_tokenizer(teacher_folder, "teacher.model", pads=False), max_length)
        if settings.init == "pretrained":
            return empty_language_model("student.model", find_model("student.model", settings.model, settings.revision))
        return _of_layers(settings, empty_language_model("teacher.model", teacher_folder))


def _of_layers(settings: Any, teacher: Any) -> Any:
    layers = chosen_layers(settings.layers, settings.num_layers, teacher.config.num_hidden_layers)
    student = student_from_layers(teacher, layers, settings.dropout)
    student.generation_config = teacher.generation_config
    return student


def _new(settings: Any, tokenizer: Any, max_length: int) -> Any:
    """A new model with the sizes in the `student` section."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        known = AutoConfig.for_model(settings.model_type)
        sizes = sizes_of(settings, known, tokenizer, max_length)
        if hasattr(known, "head_dim"):  # left at its default, it may be that of a much larger model
            sizes["head_dim"] = settings.hidden_size // sizes["num_attention_heads"]
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        tied = {} if settings.tie_embeddings is None else {"tie_word_embeddings": settings.tie_embeddings}
        config = AutoConfig.for_model(settings.model_type, **sizes, **special, **tied)
        set_dropout(config, settings.dropout)
        return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"student.model_type: {settings.model_type!r} cannot be built as a causal language model of these sizes"
            f" ({first_line(error)}). Choose another architecture, such as llama or gpt2, or other sizes"
        ) from None


def _set_dropout(model: Any, dropout: float | None) -> None:
    if dropout is None:
        return
    set_dropout(model.config, dropout)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
