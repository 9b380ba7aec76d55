"""What a task has of its own, stage by stage. The stages around it, and all that is committed, are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raydistill.config.run import Config
from raydistill.record.commit import Manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.stages import evaluate, export, preflight, prepare, teach
from raydistill.stages.cluster import Resources
from raydistill.stages.language import checks as language_checks
from raydistill.stages.language import evaluate as language_evaluate
from raydistill.stages.language import export as language_export
from raydistill.stages.language import prepare as language_prepare
from raydistill.stages.language import survey as language_survey
from raydistill.stages.language import teach as language_teach
from raydistill.stages.language import text_plan as language_text_plan
from raydistill.stages.progress import Progress


class Surveyed(Protocol):
    """The sources after a first pass."""

    @property
    def labels(self) -> list[str]: ...


class Cost(Protocol):
    """What a run will do."""

    def lines(self) -> list[str]: ...


@dataclass(frozen=True)
class Task:
    """survey reads the sources once and finds what is wrong in them; standing_data is what it would find the same.

    check_models is everything about models and losses that can be checked without a worker, check_training what of it a
    search may change with every trial, given the teacher's folder and the labels; cache_plan what determines
    the bytes of the teacher's cache.
    """

    survey: Callable[[Config, Progress], Any]
    standing_data: Callable[[Config, Run], Manifest | None]
    data_plan: Callable[[Config, Any], Plan]
    prepare: Callable[[Config, Run, Any, Progress], Manifest]
    check_models: Callable[[Config, Run, list[str]], None]
    check_training: Callable[[Config, Path, list[str]], None]
    cost: Callable[[Config, Run, Any], Cost]
    cache_plan: Callable[[Config, Run, Manifest, Resources], Plan]
    teach: Callable[[Config, Run, Resources, Progress], Manifest]
    export: Callable[[Config, Run, Progress], list[Manifest]]
    evaluate: Callable[[Config, Run, Resources, Progress], dict[str, Any]]


CLASSES = Task(
    survey=prepare.survey_sources,
    standing_data=prepare.standing_data,
    data_plan=prepare.data_plan,
    prepare=prepare.prepare,
    check_models=preflight.check_models,
    check_training=preflight.check_training,
    cost=preflight.run_cost,
    cache_plan=teach.cache_plan,
    teach=teach.teach,
    export=export.export,
    evaluate=evaluate.evaluate,
)
LANGUAGE = Task(
    survey=language_survey.survey_texts,
    standing_data=language_text_plan.standing_texts,
    data_plan=language_text_plan.texts_plan,
    prepare=language_prepare.prepare_texts,
    check_models=language_checks.check_language_models,
    check_training=language_checks.check_language_training,
    cost=language_checks.language_cost,
    cache_plan=language_teach.next_tokens_plan,
    teach=language_teach.teach_next_tokens,
    export=language_export.export_language,
    evaluate=language_evaluate.evaluate_language,
)


def task_of(config: Config) -> Task:
    return LANGUAGE if config.task == "causal_lm" else CLASSES
