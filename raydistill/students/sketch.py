"""A student of its teacher's layers without weights: what its sizes decide is found before a worker starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raydistill.models.loading import empty_classifier
from raydistill.students.layers import chosen_layers, student_from_layers
from raydistill.students.width import blocks_to_narrow, narrowed


def sketch(settings: Any, teacher_folder: Path) -> Any:
    """The student of these settings, with init: teacher_layers, on torch's device "meta": sizes without values.

    It reads the teacher's configuration alone. Raises UserError for layers, units or heads that the teacher does not
    have, and for an architecture that does not allow them.
    """
    with torch.device("meta"):
        return sketch_of(settings, empty_classifier("teacher.model", teacher_folder))


def sketch_of(settings: Any, teacher: Any) -> Any:
    """The same of a teacher that has no weights either; call it with torch's device "meta"."""
    chosen = chosen_layers(settings.layers, settings.num_layers, teacher.config.num_hidden_layers)
    student = student_from_layers(teacher, chosen, settings.dropout)
    units, heads = blocks_to_narrow(teacher, units=settings.feed_forward, heads=settings.num_heads)
    return narrowed(
        student,
        units=None if units is None else [torch.arange(settings.feed_forward)] * len(chosen),
        heads=None if heads is None else [torch.arange(settings.num_heads)] * len(chosen),
    )
