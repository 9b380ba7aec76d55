"""What a search leaves for people: a table with a row for every trial, and TensorBoard's HParams."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from raydistill.record.store import Store
from raydistill.search.trials import Trial

HPARAMS = "tune/hparams"


def table_files(trials: Sequence[Trial], metric: str, choose: str) -> dict[str, bytes]:
    """trials.parquet and trials.csv: number, status, value, epoch …, and a column for every setting searched."""
    rows = [_row(trial, metric, choose) for trial in trials]
    settings = sorted({name for trial in trials for name in trial.point})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {name: _column([trial.point[name] for trial in trials]) for name in settings}
    table = pa.table(columns)
    parquet, csv = io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet, store_schema=False)
    pa_csv.write_csv(table, csv)
    return {"trials.parquet": parquet.getvalue(), "trials.csv": csv.getvalue()}


def _row(trial: Trial, metric: str, choose: str) -> dict[str, Any]:
    epoch = trial.chosen_epoch(metric, choose)
    value = None if epoch is None else trial.curve[epoch - 1][metric]
    return {
        "trial": trial.number, "status": trial.status, metric: value,
        "best_epoch": epoch, "epochs": len(trial.curve), "steps": trial.steps, "seconds": trial.seconds,
        "reason": trial.reason,
    }  # fmt: skip


def _column(values: list[Any]) -> list[Any]:
    """Values of one kind as they are; whole and broken numbers as numbers, all others as JSON texts."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in values] if float in kinds else values
    if kinds in ({str}, {bool}):
        return values
    return [None if value is None else json.dumps(value, sort_keys=True) for value in values]


def write_hparams(store: Store, trials: Sequence[Trial], metric: str, choose: str) -> None:
    """A run of TensorBoard for every trial that reached something, with its settings and its metrics."""
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    if store.exists(HPARAMS):
        store.remove(HPARAMS)
    with tempfile.TemporaryDirectory() as scratch:
        for trial in trials:
            epoch = trial.chosen_epoch(metric, choose)
            if epoch is None:
                continue
            folder = Path(scratch) / f"{trial.number:04d}"
            metrics = {f"best/{name}": value for name, value in trial.curve[epoch - 1].items()}
            settings = {
                name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
                for name, value in trial.point.items()
            }
            writer = SummaryWriter(str(folder))
            for summary in hparams(settings, metrics):
                writer._get_file_writer().add_summary(summary)
            for name, value in metrics.items():
                writer.add_scalar(name, value, epoch)
            writer.close()
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                store.write(f"{HPARAMS}/{path.relative_to(scratch).as_posix()}", path.read_bytes())
