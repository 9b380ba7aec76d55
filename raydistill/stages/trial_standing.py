"""Where a trial stands by what is committed of it: the stages that have made their model, and the one under way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from raydistill.errors import UserError
from raydistill.record.commit import Manifest, damage, read_manifest
from raydistill.record.store import Store, open_store
from raydistill.stages.checkpoints import Checkpoints, State
from raydistill.stages.curves import read_curves
from raydistill.stages.job import TrainingJob

ROUNDED = 6  # digits of metrics
Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Standing:
    """What a trial has reached: its validations, one for each epoch, and what they took."""

    stages: int = 0  # that have made their model
    curve: tuple[dict[str, float], ...] = ()
    steps: int = 0
    seconds: float = 0.0

    def after(self, curve: Curve, state: State) -> Standing:
        """With what one more stage has reached."""
        return replace(
            self, curve=(*self.curve, *curve), steps=self.steps + state.step, seconds=self.seconds + state.seconds
        )


def finished_stages(jobs: Sequence[TrainingJob]) -> Standing:
    """What the stages before the one under way came to; the last one makes no model."""
    store, found = open_store(jobs[0].run_url), Standing()
    for job in jobs[:-1]:
        manifest = _model(store, job)
        if manifest is None:
            break
        steps, seconds = manifest.facts["steps"], manifest.facts["seconds"]
        found = found.after(committed_curve(store, job.folder, steps), State(step=steps, seconds=seconds))
        found = replace(found, stages=found.stages + 1)
    return found


def _model(store: Store, job: TrainingJob) -> Manifest | None:
    """What a stage has made, if it stands whole."""
    try:
        manifest = read_manifest(store, job.product)
    except UserError:
        return None
    if manifest is None or manifest.fingerprint != job.fingerprint or damage(store, job.product, manifest):
        return None
    return manifest


def standing(jobs: Sequence[TrainingJob]) -> Standing:
    """What a trial of these stages reached before a stop, as far as its newest checkpoint that verifies."""
    found = finished_stages(jobs)
    job = jobs[found.stages]
    store = open_store(job.run_url)
    checkpoints = Checkpoints(store, job.folder, job.fingerprint)
    step = checkpoints.newest()
    if step is None:
        return found
    return found.after(committed_curve(store, job.folder, step), checkpoints.load(step).state)


def committed_curve(store: Store, folder: str, step: int) -> Curve:
    """The metrics of each epoch of a training up to a step."""
    points = (p for p in read_curves(store, folder) if p["group"] == "validation" and p["step"] <= step)
    return [rounded({k: v for k, v in point.items() if k not in ("step", "epoch", "group")}) for point in points]


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """As the records hold them: so many digits that equal trainings compare as equal."""
    return {name: float(f"{value:.{ROUNDED}g}") for name, value in values.items()}
