"""The language model that the `student` section asks for, with its first weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raydistill.data.token_shards import TokenShard
from raydistill.data.tokens import load_tokenizer, pack_by_length, pad
from raydistill.errors import UserError, first_line
from raydistill.losses.response import IGNORED_LABEL
from raydistill.losses.token_objective import TokenObjective
from raydistill.models.folders import find_model, find_tokenizer
from raydistill.models.loading import empty_language_model, load_language_model
from raydistill.next_token import NextTokenModel, hidden_states
from raydistill.students.kept import (
    IMPORTANCE_ROWS,
    TOKENS_PER_BATCH,
    Batches,
    drawn_of,
    is_narrower,
    kept_parts,
    narrower,
    narrows_by_rows,
)
from raydistill.students.layers import chosen_layers, student_from_layers
from raydistill.students.sizes import set_dropout, sizes_of
from raydistill.students.sketch import sketch_of

TokenRows = Callable[[], Iterator[TokenShard]]  # the rows of train from the first on, shard by shard, at each call


def build_language_student(
    settings: Any, *, teacher_folder: Path, max_length: int, seed: int, rows: TokenRows | None = None
) -> tuple[Any, Any]:
    """The student with its first weights, and its tokenizer; the same for the same seed. Raises UserError.

    `rows` gives the rows of train as often as it is called; it is needed where `needs_rows` says so.
    """
    torch.manual_seed(seed)
    if settings.init == "pretrained":
        folder = find_model("student.model", settings.model, settings.revision)
        model = load_language_model("student.model", folder)
        _set_dropout(model, settings.dropout)
        return model, load_tokenizer(folder, "student.model", pads=False)
    if settings.init == "config":
        tokenizer = _tokenizer_of_new(settings, teacher_folder)
        return _new(settings, tokenizer, max_length), tokenizer
    tokenizer = load_tokenizer(teacher_folder, "teacher.model", pads=False)
    teacher = load_language_model("teacher.model", teacher_folder)
    return _of_layers(settings, teacher, rows, seed=seed, vocabulary=len(tokenizer)), tokenizer


def own_tokenizer(settings: Any) -> tuple[str, Path]:
    """The setting that names a student's own tokenizer, and its folder."""
    if settings.init == "pretrained":
        return "student.model", find_model("student.model", settings.model, settings.revision)
    return "student.tokenizer", find_tokenizer("student.tokenizer", settings.tokenizer)


def _tokenizer_of_new(settings: Any, teacher_folder: Path) -> Any:
    """The tokenizer of a student that begins with new weights: the teacher's, or one of its own."""
    if settings.tokenizer is None:
        return load_tokenizer(teacher_folder, "teacher.model", pads=False)
    setting, folder = own_tokenizer(settings)
    return load_tokenizer(folder, setting, pads=False)


def language_skeleton(settings: Any, *, teacher_folder: Path, max_length: int) -> Any:
    """The student on the meta device, for what its sizes decide. Raises UserError as building it would."""
    with torch.device("meta"):
        if settings.init == "config":
            return _new(settings, _tokenizer_of_new(settings, teacher_folder), max_length)
        if settings.init == "pretrained":
            return empty_language_model("student.model", find_model("student.model", settings.model, settings.revision))
        return sketch_of(settings, empty_language_model("teacher.model", teacher_folder))


def _of_layers(settings: Any, teacher: Any, rows: TokenRows | None, *, seed: int, vocabulary: int) -> Any:
    layers = chosen_layers(settings.layers, settings.num_layers, teacher.config.num_hidden_layers)
    student = student_from_layers(teacher, layers, settings.dropout)
    if is_narrower(settings):
        batches: Batches = ()
        if narrows_by_rows(settings):
            assert rows is not None
            batches = drawn_token_rows(rows, settings.importance_rows or IMPORTANCE_ROWS, seed=seed)
        loss_sum = partial(_next_token_sum, NextTokenModel(teacher, vocabulary))
        kept = kept_parts(settings, teacher, batches, loss_sum=loss_sum, outputs=hidden_states)
        student = narrower(student, layers, *kept)
    student.generation_config = teacher.generation_config
    return student


def drawn_token_rows(rows: TokenRows, count: int, *, seed: int) -> Batches:
    """So many rows, drawn by seed, as inputs and next tokens (R, L); -100 where none is learnt."""
    for shard, here in drawn_of(rows, count, seed=seed):
        for batch in pack_by_length(shard.lengths_R[here], TOKENS_PER_BATCH) if len(here) else []:
            chosen = [int(row) for row in here[batch]]
            inputs = pad([shard.row(row) for row in chosen], 0)
            labels_RL = torch.full_like(inputs["input_ids"], IGNORED_LABEL)
            for number, row in enumerate(chosen):
                at = torch.from_numpy(shard.positions(row))
                labels_RL[number, at] = inputs["input_ids"][number, at + 1]
            yield inputs, labels_RL


def _next_token_sum(model: NextTokenModel, hidden_RLD: torch.Tensor, labels_RL: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over all that is learnt, without whole logits."""
    learnt_RL = labels_RL != IGNORED_LABEL
    return model.head(hidden_RLD[learnt_RL], labels_RL[learnt_RL], None, TokenObjective())[0]


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
