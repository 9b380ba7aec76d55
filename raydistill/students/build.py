"""The student that the `student` section asks for, with its first weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raydistill.data.shards import DataShard
from raydistill.data.tokens import load_tokenizer
from raydistill.models.configuration import Shape, label_maps, label_order, shape_of
from raydistill.models.folders import find_model
from raydistill.models.loading import load_classifier, start_classifier
from raydistill.students.factorised import factorised
from raydistill.students.kept import (
    IMPORTANCE_ROWS,
    Batches,
    drawn_rows,
    is_narrower,
    kept_parts,
    narrower,
    narrows_by_rows,
)
from raydistill.students.layers import chosen_layers, reorder_head, student_from_layers
from raydistill.students.sizes import set_dropout, student_from_config
from raydistill.students.tables import token_ids_of, with_positions, with_tokens
from raydistill.students.vocabulary import trimmed_tokenizer

Rows = Callable[[], Iterator[DataShard]]  # the rows of train from the first on, shard by shard, at each call


def needs_rows(settings: Any) -> bool:
    """Whether the first weights, or the tokenizer, of the student depend on rows of train.

    They are then made once for a training (`stages/start.py`), and `build_student` is given the rows.
    """
    return settings.trim_vocabulary or narrows_by_rows(settings)


def student_shape(settings: Any, teacher_folder: Path) -> Shape:
    """The shape that the `student` section asks for."""
    if settings.init == "pretrained":
        return _factorised_shape(settings, shape_of(find_model("student.model", settings.model, settings.revision)))
    if settings.init == "config":
        heads = settings.num_heads or max(1, settings.hidden_size // 64)
        return Shape(settings.model_type, settings.num_layers, heads, settings.hidden_size)
    teacher = shape_of(teacher_folder)
    layers = chosen_layers(settings.layers, settings.num_layers, teacher.layers)
    heads = settings.num_heads or teacher.heads
    return _factorised_shape(settings, replace(teacher, layers=len(layers), heads=heads))


def _factorised_shape(settings: Any, shape: Shape) -> Shape:
    return shape if settings.embedding_size is None else replace(shape, model_type="deberta-v2")


def build_student(
    settings: Any, *, teacher_folder: Path, labels: list[str], max_length: int, seed: int, rows: Rows | None = None
) -> tuple[Any, Any]:
    """The student with its first weights, and its tokenizer, by the `student` section; the same for the same seed.

    `rows` gives the rows of train as often as it is called; it is needed where `needs_rows` says so. What is made here
    is saved and loaded again before the training, so that all of it stands in weights, configuration and tokenizer.
    """
    torch.manual_seed(seed)
    folder, setting = teacher_folder, "teacher.model"
    if settings.init == "pretrained":
        folder, setting = find_model("student.model", settings.model, settings.revision), "student.model"
    tokenizer = load_tokenizer(folder, setting)
    trim = None
    if settings.trim_vocabulary:
        assert rows is not None
        least = settings.vocabulary_min_count
        trim = functools.partial(trimmed_tokenizer, tokenizer, rows(), max_length=max_length, min_count=least)
    if settings.init == "config":
        tokenizer = tokenizer if trim is None else trim()[0]
        return student_from_config(settings, tokenizer, labels, max_length), tokenizer
    if settings.init == "pretrained":
        student = _pretrained(settings, folder, labels)
    else:
        draw = functools.partial(drawn_rows, rows, seed=seed, tokenizer=tokenizer, max_length=max_length)
        student = _of_layers(settings, folder, labels, draw)
    if trim is not None:
        tokenizer, kept = trim(needed=token_ids_of(student.config, len(tokenizer)))
        student = with_tokens(student, kept, pad_id=tokenizer.pad_token_id)
    if settings.max_positions is not None:
        student = with_positions(student, settings.max_positions)
    if settings.embedding_size is not None:
        student = factorised(student, settings.embedding_size)
    return student, tokenizer


def _pretrained(settings: Any, folder: Path, labels: list[str]) -> Any:
    student = start_classifier("student.model", folder, labels)
    for module in student.modules():
        if settings.dropout is not None and isinstance(module, torch.nn.Dropout):
            module.p = settings.dropout
    set_dropout(student.config, settings.dropout)
    return student


def _of_layers(settings: Any, teacher_folder: Path, labels: list[str], draw: Callable[..., Batches]) -> Any:
    teacher = load_classifier("teacher.model", teacher_folder)
    order = label_order("teacher.model", teacher_folder, labels)
    layers = chosen_layers(settings.layers, settings.num_layers, teacher.config.num_hidden_layers)
    student = student_from_layers(teacher, layers, settings.dropout)
    if is_narrower(settings):
        batches = draw(settings.importance_rows or IMPORTANCE_ROWS, order=order) if narrows_by_rows(settings) else ()
        student = narrower(student, layers, *kept_parts(settings, teacher, batches))
    reorder_head(student, order)
    student.config.id2label, student.config.label2id = label_maps(labels)
    return student
