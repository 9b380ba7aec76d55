"""The teacher's cached features: which ones the config needs, where they stand, and what determines them.

A cache that holds more than is needed serves; one that holds less is refused by name.
"""

from __future__ import annotations

from pathlib import Path

from raydistill.cache.feature_shards import FeatureColumn
from raydistill.config.run import Config
from raydistill.data.shards import STUDENT_SPLITS
from raydistill.errors import UserError
from raydistill.losses.cached_features import all_names, axes_of, serving
from raydistill.models.configuration import Shape, shape_of
from raydistill.models.folders import model_identity
from raydistill.record.commit import Entry, Manifest, commit_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import PARTS, Run
from raydistill.stages.feature_scoring import FeatureOutput
from raydistill.stages.features import feature_terms
from raydistill.stages.teachers import feature_source
from raydistill.stages.training_stages import training_stages


def needed_features(config: Config, teacher_folder: Path) -> tuple[str, ...]:
    """The names of the features that training takes from the cache; none when the teacher runs beside it."""
    stages = (s for s in training_stages("student", config) if s.settings.loss.features_from == "cache")
    return all_names(term for s in stages for term in feature_terms(s.config, teacher_folder, s))


def columns_of(names: tuple[str, ...], teacher: Shape) -> tuple[FeatureColumn, ...]:
    """How each feature of this teacher is kept."""

    def size(name: str) -> int:
        if axes_of(name) != "ALL":
            return teacher.width
        return 1 if name.startswith("attention_mean") else teacher.heads

    return tuple(FeatureColumn(name, axes_of(name), size(name)) for name in names)


def features_plan(config: Config, run: Run, data: Manifest, teacher_folder: Path, dtype: str) -> Plan | None:
    """Everything that determines the bytes of the cached features; None when none are needed.

    It is the standing plan where that holds all that is needed. Raises UserError where it holds less, and where the
    run of teacher.cache_from has none.
    """
    needed = needed_features(config, teacher_folder)
    if not needed:
        return None
    check_lent_features(config, run, teacher_folder)
    inputs = {
        "data": data.fingerprint,
        "teacher": model_identity(feature_source(config, run).folder()),
        "data.max_length": config.data.max_length,
        "teacher.dtype": dtype,
        "teacher.features_codec": config.teacher.features_codec,
    }
    standing = run.plan("features")
    names = needed
    if standing is not None and {**standing.inputs, "features": None} == {**inputs, "features": None}:
        _check_holds(run, standing, needed)
        names = needed if _missing(standing, needed) else tuple(standing.inputs["features"])
    return Plan("features", {**inputs, "features": list(names)})


def check_lent_features(config: Config, run: Run, teacher_folder: Path) -> None:
    """Raises UserError, naming what is missing, when the run of teacher.cache_from lacks features that are needed."""
    needed = needed_features(config, teacher_folder)
    if not needed or run.lender is None:
        return
    where, plan = run.home("features").where(PARTS["features"].folder), run.plan("features")
    if plan is None or run.complete("features") is None:
        found = "is not there" if plan is None else "is not complete"
        raise UserError(
            f"teacher.cache_from: {where}: {found}, and train.loss.features needs {', '.join(needed)} from it. Run"
            " raydistill teach with that run's config and these features, or set train.loss.features_from=teacher"
        )
    _check_holds(run, plan, needed)


def _missing(standing: Plan, needed: tuple[str, ...]) -> list[str]:
    return [name for name in needed if serving(name, standing.inputs["features"]) is None]


def _check_holds(run: Run, standing: Plan, needed: tuple[str, ...]) -> None:
    missing = _missing(standing, needed)
    if not missing or run.redo in ("prepare", "teach"):
        return
    where, have = run.home("features").where(PARTS["features"].folder), ", ".join(standing.inputs["features"])
    again = "and run raydistill teach with that run's config and these features" if run.lender else "to score them anew"
    raise UserError(
        f"{where}: holds {have}, train.loss.features needs {', '.join(missing)} too. Move that folder away {again}"
        " (teacher and logits stay), or set train.loss.features_from=teacher"
    )


def feature_output(plan: Plan, teacher_folder: Path) -> FeatureOutput:
    """What the teacher's actors write for this plan."""
    columns = columns_of(tuple(plan.inputs["features"]), shape_of(teacher_folder))
    codec = plan.inputs["teacher.features_codec"]
    return FeatureOutput(PARTS["features"].folder, plan.fingerprint, codec, columns, STUDENT_SPLITS)


def commit_features(run: Run, output: FeatureOutput, entries: list[Entry]) -> Manifest:
    """Completes the features; their manifest."""
    rows = sum(entry.rows for entry in entries)
    facts = {
        "codec": output.codec,
        "features": [{"name": c.name, "axes": c.axes, "size": c.size} for c in output.columns],
        "rows": rows,
        "bytes_per_row": sum(entry.size for entry in entries) / rows,
    }
    return commit_manifest(run.store, output.folder, output.fingerprint, entries, facts)
