"""The temperature of the teacher's cached logits, fitted on validation before anyone learns (`teacher.calibrate`).

The cache stays raw: whoever reads it divides by the temperature that stands committed beside it. It belongs to the run
whose config asks for it, so that a cache that another run lends can be calibrated too.
"""

from __future__ import annotations

import numpy as np
import torch

from raydistill.config.run import Config
from raydistill.errors import UserError
from raydistill.losses.calibration import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE, fit_label_temperature
from raydistill.record.commit import commit_manifest
from raydistill.record.fingerprint import Plan
from raydistill.record.run import Run
from raydistill.report.measures import measures_of
from raydistill.stages.progress import Progress
from raydistill.stages.taught_rows import taught_shards

FOLDER = "teacher/calibration"
CERTAIN_NLL = 1e-3  # nats at the lowest temperature: more than a teacher has that is right on every row


def calibrate(run: Run, progress: Progress) -> None:
    """Fits and commits the temperature of the cache, unless it stands there.

    Temperature scaling, Guo et al. 2017, arXiv:1706.04599, section 4.2. Raises UserError when no temperature fits
    validation best.
    """
    plan = calibration_plan(run)
    if (manifest := run.begin("calibration", plan)) is not None:
        progress.say(f"calibrate: complete, temperature {manifest.facts['temperature']:g}")
        return
    logits_NK, labels_N = _validation(run)
    temperature = fit_label_temperature(torch.from_numpy(logits_NK), torch.from_numpy(labels_N))
    # Six digits, so that machines that sum in another order find the same.
    temperature = float(f"{temperature:.6g}")
    if not LOWEST_TEMPERATURE < temperature < HIGHEST_TEMPERATURE:
        raise UserError(
            f"teacher.calibrate: {_reason(temperature, logits_NK, labels_N)}, so that no temperature from"
            f" {LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g} fits them best. Give more validation rows, or set"
            " teacher.calibrate=false"
        )
    nll = measures_of(labels_N).nll
    before, after = nll(logits_NK, labels_N), nll(logits_NK / temperature, labels_N)
    facts = {"temperature": temperature, "rows": len(labels_N), "nll_before": before, "nll_after": after}
    commit_manifest(run.store, FOLDER, plan.fingerprint, [], facts)
    progress.say(
        f"calibrate: temperature {temperature:g}, fitted on {len(labels_N):,} validation rows (NLL {before:.4f} before,"
        f" {after:.4f} after)"
    )


def _reason(temperature: float, logits_NK: np.ndarray, labels_N: np.ndarray) -> str:
    """Why the temperature that fits the labels lies at an end of the range."""
    rows = f"{len(labels_N):,} validation rows"
    if temperature >= HIGHEST_TEMPERATURE:
        return f"the teacher's logits fit the labels of the {rows} no better than chance"
    # Logits close to 0 could only be scaled up further.
    if measures_of(labels_N).nll(logits_NK / LOWEST_TEMPERATURE, labels_N) > CERTAIN_NLL:
        return f"the teacher's logits on the {rows} are all within {np.abs(logits_NK).max():.2g} of 0"
    return f"the teacher is right on all {rows}"


def calibration_plan(run: Run) -> Plan:
    """Everything that determines the temperature. Raises UserError when the cache is not complete."""
    return Plan("calibration", {"data": run.require("data").fingerprint, "cache": run.require("cache").fingerprint})


def teacher_temperature(config: Config, run: Run) -> float:
    """What the teacher's logits are divided by: 1 unless it is calibrated.

    Raises UserError when the temperature was not fitted yet, or to another cache.
    """
    if not config.teacher.calibrate:
        return 1.0
    run.check("calibration", calibration_plan(run))
    return run.require("calibration").facts["temperature"]


def _validation(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's cached logits on validation, and the labels."""
    shards = list(taught_shards(run, ("validation",)))
    return np.concatenate([logits for _, logits in shards]), np.concatenate([shard.labels_N for shard, _ in shards])
