"""The feature losses of the config as terms of an objective, checked against teacher and student before any worker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from raydistill.config.loss import Features
from raydistill.config.run import Config
from raydistill.errors import UserError
from raydistill.feature_tap import ARCHITECTURES
from raydistill.losses.feature_objective import FEATURE_LOSSES, FeatureTerm
from raydistill.losses.layer_maps import layer_map
from raydistill.models.configuration import Shape, shape_of
from raydistill.models.folders import find_model, tokenizer_identity
from raydistill.stages.teachers import feature_folder, members
from raydistill.stages.training_stages import TrainingStage
from raydistill.students.build import student_shape

OF_LAYERS_INSIDE = ("attention", "queries", "keys", "values")


def feature_terms(config: Config, teacher_folder: Path, stage: TrainingStage | None = None) -> tuple[FeatureTerm, ...]:
    """The terms of `train.loss.features`; in a stage that learns from the one before, both sides are the student.

    Raises UserError, naming the entry, for what either model does not have.
    """
    if not config.train.loss.features:
        return ()
    own_teacher = stage is not None and stage.own_teacher
    student = student_shape(config.student, teacher_folder)
    teacher = student if own_teacher else shape_of(feature_folder(config, teacher_folder))
    if not own_teacher:
        _check_tokenizer(config)
    section = stage.loss_section if stage else "train.loss"
    terms: list[FeatureTerm] = []
    for number, asked in enumerate(config.train.loss.features):
        try:
            term = _term(asked, teacher, student)
            _check(term, teacher, student, dropout=config.student.dropout)
        except ValueError as error:
            raise UserError(f"{section}.features[{number}]: {asked.kind}: {error}") from None
        twins = sum(other.kind == term.kind for other in terms)
        name = f"{term.kind}_{twins + 1}" if twins else term.kind
        terms.append(replace(term, name=name))
    return tuple(terms)


def _term(asked: Features, teacher: Shape, student: Shape) -> FeatureTerm:
    definition = FEATURE_LOSSES[asked.kind]
    pairs = ((0, 0),)
    if definition.what != "embeddings":
        pairs = layer_map(asked.layers or definition.layers, student.layers, teacher.layers)  # type: ignore[arg-type]
    heads = asked.relation_heads or teacher.heads if definition.relation else None
    averaged = definition.what == "attention" and student.heads != teacher.heads
    return FeatureTerm(asked.kind, asked.weight, pairs, heads, averaged=averaged)


def _check(term: FeatureTerm, teacher: Shape, student: Shape, *, dropout: float | None) -> None:
    what = term.definition.what
    for owner, shape in (("teacher", teacher), ("student", student)):
        if what in OF_LAYERS_INSIDE and shape.model_type not in ARCHITECTURES:
            known = ", ".join(sorted(ARCHITECTURES))
            raise ValueError(f"the {owner} is a {shape.model_type}; attention and projections are known of {known}")
        if term.relation_heads and shape.width % term.relation_heads:
            raise ValueError(
                f"{term.relation_heads} relation heads do not divide the {owner}'s width {shape.width}."
                " Set relation_heads to a number that divides both widths"
            )
    if what == "attention" and dropout != 0:
        raise ValueError("the student's attention must be seen without dropout. Set student.dropout=0")


def _check_tokenizer(config: Config) -> None:
    """Raises UserError unless the model that the student's tokenizer comes from has that of the features' teacher.

    They are compared as the user gave them: a model that was trained here has its tokenizer's files saved anew.
    """
    teachers = members(config)
    teacher, student = teachers[config.teacher.features_of or 0].start.folder(), teachers[0].start.folder()
    if config.student.init == "pretrained":
        assert config.student.model is not None
        student = find_model("student.model", config.student.model, config.student.revision)
    if student != teacher and tokenizer_identity(student) != tokenizer_identity(teacher):
        raise UserError(
            f"train.loss.features: {student}: has another tokenizer than the teacher, so that their tokens cannot be"
            " compared. Choose a student with the teacher's tokenizer, or remove the features"
        )
