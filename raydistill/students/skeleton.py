"""A student without weights: the modules that it will have, for what must be checked before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError, first_line
from raydistill.models import find_model
from raydistill.students.layers import every_other
from raydistill.students.sizes import student_from_config


def student_skeleton(settings: Any, *, teacher_folder: Path, labels: list[str], max_length: int) -> Any:
    """The student that the `student` section asks for, on the meta device. Raises UserError as building it would."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if settings.init == "config":
        tokenizer = load_tokenizer(teacher_folder, "teacher.model")
        with torch.device("meta"):
            return student_from_config(settings, tokenizer, labels, max_length)
    folder, setting = teacher_folder, "teacher.model"
    if settings.init == "pretrained":
        folder, setting = find_model("student.model", settings.model, settings.revision), "student.model"
    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    if settings.init == "teacher_layers":
        layers = settings.layers or every_other(config.num_hidden_layers)
        config.num_hidden_layers = len(layers)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[layer] for layer in layers]
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config)
    except (ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise UserError(f"{setting}: {folder}: makes no classifier ({first_line(error)}). Choose another") from None
