"""A student with another tokenizer than its teacher's (`train.loss.cross_tokenizer`): what other settings it needs."""

from __future__ import annotations

from typing import Any

SPAN_TEMPERATURE = 100.0  # losses/cross_tokenizer.py: so large that unlikely spans teach too
OF_STUDENT = ("student.tokenizer", "student.model", "student.init", "student.max_length")


def crosses_tokenizers(config: Any) -> bool:
    """Whether the student has a tokenizer of its own."""
    return crossings(config) != {None}


def crossings(config: Any) -> set[str | None]:
    """What the losses of all stages ask for between tokenizers; None of one that does not."""
    return {loss.cross_tokenizer for loss in config.train.losses}


def student_length(config: Any) -> int:
    """Tokens that a row of the student's may have."""
    return config.student.max_length or config.data.max_length


def set_cross_defaults(tree: dict[str, Any], losses: list[dict[str, Any]]) -> None:
    """Sets, where settings as given leave them out, what a student with another tokenizer needs of data and cache."""
    asked = {loss.get("cross_tokenizer") for loss in losses} - {None}
    for loss in losses:
        if loss.get("cross_tokenizer") == "spans":
            loss.setdefault("temperature", SPAN_TEMPERATURE)
    if asked and isinstance(tree.get("data"), dict):
        tree["data"].setdefault("keep_text", True)
    if "spans" in asked and isinstance(tree.get("teacher"), dict):
        kept = tree["teacher"].setdefault("next_tokens", {})
        if isinstance(kept, dict) and kept.get("codec") != "none":
            kept.setdefault("text_logprobs", True)


def check_cross_tokenizer(config: Any) -> None:
    """Raises ValueError for settings that do not fit a student with, or without, a tokenizer of its own."""
    student = config.student
    if not crosses_tokenizers(config):
        for name in ("tokenizer", "max_length"):
            if getattr(student, name) is not None:
                raise ValueError(f"student.{name} means nothing without train.loss.cross_tokenizer; set it to spans")
        return
    _check_student(config)
    _check_kept(config)
    for number, stage in enumerate(config.train.stages or ()):
        if stage.teacher == "previous":
            raise ValueError(
                f"train.stages[{number}].teacher: previous scores rows as the teacher's tokenizer has them, and with"
                " train.loss.cross_tokenizer the student has others; leave it out"
            )
    _check_metrics(config)
    for name in config.tune.space if config.tune is not None else ():
        if name in OF_STUDENT:
            raise ValueError(f"tune.space.{name}: rows are tokenised once, for one student's tokenizer; remove it")


def _check_metrics(config: Any) -> None:
    metrics = {"train": config.train.metric, **({"tune": config.tune.metric} if config.tune else {})}
    metrics |= {f"train.stages[{n}]": stage.metric for n, stage in enumerate(config.train.stages or ())}
    for name, metric in metrics.items():
        if metric in ("kl", "agreement"):
            raise ValueError(
                f"{name}.metric: {metric} compares next tokens, which train.loss.cross_tokenizer has two kinds of; use"
                " nll or accuracy"
            )


def _check_student(config: Any) -> None:
    losses, student = config.train.losses, config.student
    if any(loss.cross_tokenizer is None for loss in losses):
        raise ValueError("train.loss.cross_tokenizer: some stages' losses have it and others not; give it to each")
    if student.init == "teacher_layers":
        raise ValueError(
            "train.loss.cross_tokenizer: with student.init: teacher_layers the tokenizer is the teacher's; remove it"
        )
    if student.init == "config" and student.tokenizer is None:
        raise ValueError("train.loss.cross_tokenizer: student.init: config needs student.tokenizer, a folder; add it")
    for loss in losses:
        if loss.kind != "forward_kl":
            raise ValueError(
                f"train.loss.kind: {loss.kind} compares tokens of one vocabulary; with cross_tokenizer leave it out"
            )


def _check_kept(config: Any) -> None:
    """What data and cache hold for such a student."""
    if not config.data.keep_text:
        raise ValueError("data.keep_text: train.loss.cross_tokenizer aligns tokens by the rows' texts; set it to true")
    kept = config.teacher.next_tokens
    learns = any(loss.cross_tokenizer == "spans" and loss.has_teacher for loss in config.train.losses)
    if learns and not (kept is not None and kept.text_logprobs):
        raise ValueError(
            "teacher.next_tokens.text_logprobs: train.loss.cross_tokenizer: spans learns from them; set it to true"
        )
