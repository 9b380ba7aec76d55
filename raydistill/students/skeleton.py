"""A student without weights: the modules that it will have, for what must be checked before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raydistill.data.tokens import load_tokenizer
from raydistill.models.folders import find_model
from raydistill.models.loading import empty_classifier
from raydistill.students.factorised import factorised
from raydistill.students.sizes import student_from_config
from raydistill.students.sketch import sketch
from raydistill.students.tables import with_positions, with_tokens


def student_skeleton(settings: Any, *, teacher_folder: Path, labels: list[str], max_length: int) -> Any:
    """The student that the `student` section asks for, on the meta device. Raises UserError as building it would.

    Of a trimmed vocabulary it is not known yet how many tokens stay: here all but one do.
    """
    folder, setting = teacher_folder, "teacher.model"
    if settings.init == "pretrained":
        folder, setting = find_model("student.model", settings.model, settings.revision), "student.model"
    with torch.device("meta"):
        if settings.init == "config":
            return student_from_config(settings, load_tokenizer(folder, setting), labels, max_length)
        student = sketch(settings, folder) if settings.init == "teacher_layers" else empty_classifier(setting, folder)
        if settings.trim_vocabulary:
            student = with_tokens(student, list(range(student.config.vocab_size - 1)), pad_id=0)
        if settings.max_positions is not None:
            student = with_positions(student, settings.max_positions)
        return student if settings.embedding_size is None else factorised(student, settings.embedding_size)
