"""Where a run stands: what is complete, what is under way, what comes next."""

from __future__ import annotations

from dataclasses import dataclass

from raydistill.record.run import PARTS, Run
from raydistill.stages.checkpoints import Checkpoints


@dataclass(frozen=True)
class Standing:
    """One part of a run."""

    part: str
    stage: str
    state: str  # complete, under way, not begun
    detail: str


def standings(run: Run) -> list[Standing]:
    """Every part of the run in order."""
    return [_standing(run, part) for part in PARTS]


def _standing(run: Run, part: str) -> Standing:
    facts, manifest, plan = PARTS[part], run.complete(part), run.plan(part)
    if manifest is not None:
        rows = sum(entry.rows for entry in manifest.files)
        detail = f"{rows:,} rows in {len(manifest.files)} shards" if rows else f"{len(manifest.files)} files"
        if "value" in manifest.facts:
            detail = f"validation {manifest.facts['metric']} {manifest.facts['value']:.4f}"
        return Standing(part, facts.stage, "complete", detail)
    if plan is None:
        return Standing(part, facts.stage, "not begun", "")
    steps = Checkpoints(run.store, facts.folder, plan.fingerprint).steps()
    shards = [name for name in run.store.list(facts.folder) if name.endswith(".parquet")]
    detail = f"newest checkpoint at step {steps[-1]:,}" if steps else f"{len(shards)} shards written"
    return Standing(part, facts.stage, "under way", detail)


def next_stage(found: list[Standing], *, fine_tunes: bool, has_control: bool) -> str | None:
    """The first stage that has something left to do, or None."""
    for standing in found:
        if (standing.part == "teacher" and not fine_tunes) or (standing.part == "control" and not has_control):
            continue
        if standing.state != "complete":
            return standing.stage
    return None
