"""Which teachers a run has: one, several whose mean is the target, and for each of them one for every fold of train.

A row's target comes from one forward of every member: of the member itself, or with `teacher.cross_fit` of the one that
was trained without the row's fold. The member that was trained on all of train scores everything else: validation,
texts without labels, and test in the report. It has not learned from those rows either, so that its outputs there are
of the same kind, and it is the model that a student takes the place of. Augmented texts are its too, although it has
learned from the rows that they were made from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config.run import Config
from raydistill.data.folds import FoldRows
from raydistill.data.tokens import load_tokenizer
from raydistill.models.configuration import check_length, label_order
from raydistill.models.folders import model_identity, refuse_adapter
from raydistill.models.source import ModelSource
from raydistill.record.commit import Manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run, part_of

CROSS_FITTED = "train"  # the split that teachers learn from


@dataclass(frozen=True)
class Member:
    """One teacher: its name as a part of the run, the model it starts from, its fine-tuning's seed, its weight."""

    part: str
    start: ModelSource
    seed: int | None
    weight: float

    @property
    def title(self) -> str:
        """For people: the model, and the seed when there are several."""
        return self.start.model + (f", seed {self.seed}" if self.seed is not None else "")


@dataclass(frozen=True)
class TeacherTraining:
    """One fine-tuning: the part of the run that it makes, and the fold that it does not learn from."""

    part: str
    member: Member
    without_fold: int | None


@dataclass(frozen=True)
class Pass:
    """One model over the splits that it scores, or over the rows of one fold."""

    part: str
    source: ModelSource
    splits: tuple[str, ...]
    rows: FoldRows | None = None


def members(config: Config) -> list[Member]:
    """The teachers whose mean is the target; the first is `teacher.model`, with the first seed."""
    asked = config.teacher
    starts = [(ModelSource("teacher.model", asked.model, asked.revision), asked.weight)]
    starts += [
        (ModelSource(f"teacher.members[{number}].model", member.model, member.revision), member.weight)
        for number, member in enumerate(asked.members)
    ]
    found: list[Member] = []
    for start, weight in starts:
        for seed in asked.fine_tune_seeds or (None,):
            part = f"teacher/member-{len(found)}" if found else "teacher"
            found.append(Member(part, start, seed, weight))
    return found


def is_ensemble(config: Config) -> bool:
    return bool(config.teacher.members or config.teacher.fine_tune_seeds)


def has_passes(config: Config) -> bool:
    """Whether the cache is made of several models' outputs."""
    return is_ensemble(config) or config.teacher.cross_fit is not None


def trainings(config: Config) -> list[TeacherTraining]:
    """Every fine-tuning of a teacher that the config asks for: each member on all of train, then without each fold."""
    if config.teacher.fine_tune is None:
        return []
    folds = (None, *range(config.teacher.cross_fit or 0))
    return [TeacherTraining(_part(member, fold), member, fold) for member in members(config) for fold in folds]


def _part(member: Member, fold: int | None) -> str:
    return member.part if fold is None else f"{member.part}/fold-{fold}"


def config_of(config: Config, member: Member) -> Config:
    """The config with this member as its teacher, as its fine-tuning sees it."""
    tuning = config.teacher.fine_tune
    if tuning is not None and member.seed is not None:
        tuning = tuning.model_copy(update={"seed": member.seed})
    changed = {"model": member.start.model, "revision": member.start.revision, "fine_tune": tuning}
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=changed)})


def made_here(part: str, run: Run) -> ModelSource:
    """A model that a training of the run wrote."""
    return ModelSource(f"the {part}", part_of(part).product, store_url=run.home(part).root)


def member_source(config: Config, run: Run, member: Member, fold: int | None = None) -> ModelSource:
    """The model of a member that scores: fine-tuned here, or as the user gave it."""
    return member.start if config.teacher.fine_tune is None else made_here(_part(member, fold), run)


def teacher_source(config: Config, run: Run) -> ModelSource:
    """The first teacher: students take layers and tokenizer from it."""
    return member_source(config, run, members(config)[0])


def feature_source(config: Config, run: Run) -> ModelSource:
    """The teacher whose features students learn from: trained on all of train, with cross-fitting too."""
    return member_source(config, run, members(config)[config.teacher.features_of or 0])


def feature_folder(config: Config, teacher_folder: Path) -> Path:
    """A folder with the shape and the tokenizer of that teacher, `teacher_folder` being the first one's."""
    named = config.teacher.features_of
    return members(config)[named].start.folder() if named else teacher_folder


def teacher_sources(config: Config, run: Run) -> tuple[ModelSource, ...]:
    """The teacher that students are compared with: every member, trained on all of train."""
    return tuple(member_source(config, run, member) for member in members(config))


def passes(config: Config, run: Run, splits: tuple[str, ...]) -> list[list[Pass]]:
    """For each member the passes that together score every row once."""
    folds, url = config.teacher.cross_fit, run.home("folds").root
    if folds is None:
        return [[Pass(m.part, member_source(config, run, m), splits)] for m in members(config)]
    others = tuple(split for split in splits if split != CROSS_FITTED)
    return [
        [
            *(
                Pass(_part(m, k), member_source(config, run, m, k), (CROSS_FITTED,), FoldRows(url, k, inside=True))
                for k in range(folds)
            ),
            Pass(m.part, member_source(config, run, m), others),
        ]
        for m in members(config)
    ]


def folds_plan(config: Config, data: Manifest) -> Plan:
    """Everything that determines which fold a row is in."""
    inputs = {"data": data.fingerprint, "teacher.cross_fit": config.teacher.cross_fit}
    return Plan("folds", {**inputs, "data.split_seed": config.data.split_seed})


def targets_inputs(config: Config, run: Run, data: Manifest) -> dict[str, Any]:
    """What determines the cache beside the first teacher: every other one, its weight, and the folds."""
    if not has_passes(config):
        return {}
    inputs: dict[str, Any] = {"teachers": list(_identities(config, run, data.facts["labels"]))}
    if config.teacher.cross_fit is not None:
        inputs["teacher.cross_fit"] = config.teacher.cross_fit
        inputs["teacher.folds"] = folds_plan(config, data).fingerprint
    if is_ensemble(config):
        inputs["teacher.combine"] = config.teacher.combine
    return inputs


def _identities(config: Config, run: Run, labels: list[str]) -> Iterator[dict[str, Any]]:
    for member in members(config):
        sources = [member_source(config, run, member, k) for k in (None, *range(config.teacher.cross_fit or 0))]
        for source in sources:
            check_member(source, config.data.max_length)
        folders = [source.folder() for source in sources]
        yield {
            "weight": member.weight,
            "models": [model_identity(folder) for folder in folders],
            "label_orders": [label_order(s.setting, f, labels) for s, f in zip(sources, folders, strict=True)],
        }


def check_member(source: ModelSource, max_length: int) -> None:
    """Raises UserError for a teacher that cannot be loaded, has no tokenizer, or does not take rows so long."""
    folder = source.folder()
    refuse_adapter(source.setting, folder)
    load_tokenizer(folder, source.setting)
    check_length("the teacher", folder, max_length)
