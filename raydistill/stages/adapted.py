"""A student that trains with adapters (`student.lora`): made before its training, and saved after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raydistill.adapters import (
    ADAPTER_CONFIG,
    BASE,
    add_adapters,
    check_peft,
    frozen_parameters,
    is_language_model,
    load_trained,
    merged,
    save_adapter,
    target_layers,
    whole,
    without_spares,
)
from raydistill.config.student import Lora, Student
from raydistill.errors import UserError
from raydistill.models.loading import quiet_transformers
from raydistill.models.saving import save_model, save_tokenizer, share_weights
from raydistill.stages.cluster import Resources
from raydistill.students.quantised import check_quantising, dequantised, quantised


def check_adapters(settings: Lora, skeleton: Callable[[], Any]) -> None:
    """Raises UserError for packages that `student.lora` needs and that are not there, and for what is not there of the
    student, given without weights: a layer, or embeddings of their own.
    """
    check_peft()
    if settings.quantised:
        check_quantising()
    student = skeleton()
    target_layers(student, settings.targets)
    if "embeddings" in settings.also_train and is_language_model(student) and student.config.tie_word_embeddings:
        raise UserError(
            "student.lora.also_train: found embeddings, which are the student's output layer too: one of them would"
            " train and not the other. Remove it"
        )


def check_quantising_device(student: Student, resources: Resources) -> None:
    """Raises UserError where quantised weights are asked for and the cluster has no GPU."""
    if student.lora and student.lora.quantised and not resources.gpus:
        raise UserError(
            f"student.lora.quantised: found {student.lora.quantised}, which needs a GPU and the cluster has none."
            " Remove the setting"
        )


def with_adapters(student: Any, settings: Lora, seed: int, device: torch.device) -> Any:
    """The student with adapters in it, and its frozen weights quantised where that is asked for."""
    student = whole(student)  # it may go on from an adapter that a stage before wrote
    base = quantised(student, device) if settings.quantised else student
    return add_adapters(base, settings, seed=seed).get_base_model()


def save_adapted(
    student: Any,
    tokenizer: Any,
    weights: dict[str, torch.Tensor],
    folder: Path,
    settings: Lora,
    seed: int,
    device: torch.device,
    *,
    max_length: int,
    place: str,
) -> Any:
    """Writes a student, given anew with its first weights, with what was trained; the model as it was saved.

    Merged it is an ordinary Hugging Face model. Else the folder holds an adapter and its base in a folder of its own,
    which the adapter names as it will be at `place`, where the folder will stand.
    """
    quiet_transformers()
    student = whole(student)
    base = quantised(student, device) if settings.quantised else student
    if settings.merge:
        base = dequantised(base) if settings.quantised else base
    else:
        base.save_pretrained(str(folder / BASE))
    adapted = add_adapters(base, settings, seed=seed)
    model = adapted.get_base_model()
    load_trained(model, weights, frozen_parameters(model))
    if settings.merge:
        model = merged(adapted)
        save_model(model, tokenizer, model.state_dict(), folder, max_length=max_length)
        return model
    save_adapter(adapted, folder, base=f"{place}/{BASE}")
    save_tokenizer(tokenizer, folder, max_length=max_length)
    for holder in (folder, folder / BASE):
        share_weights(holder, like=folder / ADAPTER_CONFIG)
    return without_spares(model)
