"""The student that the `student` section asks for, with its first weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raydistill.data.tokens import load_tokenizer
from raydistill.models import Shape, find_model, label_maps, label_order, load_classifier, shape_of, start_classifier
from raydistill.students.layers import every_other, reorder_head, student_from_layers
from raydistill.students.sizes import set_dropout, student_from_config


def student_shape(settings: Any, teacher_folder: Path) -> Shape:
    """The shape that the `student` section asks for."""
    if settings.init == "pretrained":
        return shape_of(find_model("student.model", settings.model, settings.revision))
    if settings.init == "config":
        heads = settings.num_heads or max(1, settings.hidden_size // 64)
        return Shape(settings.model_type, settings.num_layers, heads, settings.hidden_size)
    teacher = shape_of(teacher_folder)
    return replace(teacher, layers=len(settings.layers or every_other(teacher.layers)))


def build_student(
    settings: Any, *, teacher_folder: Path, labels: list[str], max_length: int, seed: int
) -> tuple[Any, Any]:
    """The student with its first weights, and its tokenizer, by the `student` section; the same for the same seed."""
    torch.manual_seed(seed)
    if settings.init == "pretrained":
        folder = find_model("student.model", settings.model, settings.revision)
        student = start_classifier("student.model", folder, labels)
        tokenizer = load_tokenizer(folder, "student.model")
        for module in student.modules():
            if settings.dropout is not None and isinstance(module, torch.nn.Dropout):
                module.p = settings.dropout
        set_dropout(student.config, settings.dropout)
        return student, tokenizer
    tokenizer = load_tokenizer(teacher_folder, "teacher.model")
    if settings.init == "config":
        return student_from_config(settings, tokenizer, labels, max_length), tokenizer
    teacher = load_classifier("teacher.model", teacher_folder)
    layers = list(settings.layers) if settings.layers else None
    student = student_from_layers(teacher, layers, settings.dropout)
    order = label_order("teacher.model", teacher_folder, labels)
    reorder_head(student, order)
    student.config.id2label, student.config.label2id = label_maps(labels)
    return student, tokenizer
