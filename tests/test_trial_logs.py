"""Trials in W&B and MLflow: a run for each, whatever process trained it, and the same run when a search goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_fused_search import FUSED, groups
from test_tune import searched, table

from raydistill.config.file import validate
from raydistill.config.run import Config
from raydistill.errors import UserError
from raydistill.record.commit import commit_manifest
from raydistill.record.run import Run, open_run
from raydistill.search.trials import Trial
from raydistill.stages import trackers
from raydistill.stages.trial import trial_folder, trial_name
from raydistill.stages.trial_logs import TrialLogs

POINT = {"train.learning_rate": 1e-3}


def config(folder: Path, *places: str) -> Config:
    tune = {"space": {"train.learning_rate": {"choice": [1e-3, 1e-2]}}, "search": "grid", "log_to": list(places)}
    tree = {
        "name": "run",
        "storage": str(folder),
        "data": {"train": "a.csv", "test": "b.csv"},
        "teacher": {"model": "t"},
    }
    return validate({**tree, "tune": tune}, {}, "test")


def trial(number: int, *losses: float, **rest: Any) -> Trial:
    curve = tuple({"nll": loss, "accuracy": 1 - loss} for loss in losses)
    return Trial(number, POINT, 3, curve, steps=10 * len(losses), **rest)


class Shelf:
    """A tracker whose runs are a dictionary that outlives it; it fails while `broken` says why."""

    runs: dict[str, dict[str, Any]]
    broken = ""

    def __init__(self, config: Config, run: Run) -> None:
        pass

    def begin(self, key: str, trial: Trial) -> tuple[Any, int]:
        if self.broken:
            raise ConnectionError(self.broken)
        run = self.runs.setdefault(key, {"point": dict(trial.point), "epochs": {}, "opened": 0})
        run["opened"] += 1
        run["status"] = "open"
        return run, max(run["epochs"], default=0)

    def log(self, run: Any, epoch: int, values: dict[str, float]) -> None:
        if self.broken:
            raise ConnectionError(self.broken)
        assert epoch not in run["epochs"], "logged twice"
        run["epochs"][epoch] = values["nll"]

    def end(self, run: Any, trial: Trial) -> None:
        run["status"] = trial.status

    def where(self) -> str:
        return "on the shelf"


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> type[Shelf]:
    kind = type("NewShelf", (Shelf,), {"runs": {}})
    monkeypatch.setitem(trackers.TRACKERS, "wandb", kind)  # type: ignore[arg-type]
    return kind


def logs(folder: Path, said: list[str]) -> TrialLogs:
    asked = config(folder, "wandb")
    return TrialLogs(asked, open_run(asked.storage, asked.name), said.append)


def commit(folder: Path, ended: Trial) -> None:
    """The record of a trial, as a search writes it."""
    place = trial_folder(trial_name(ended.number, ended.point))
    commit_manifest(open_run(str(folder), "run").store, place, "f", [], {"trial": ended.record()})


def test_every_trial_has_a_run_with_each_epoch_once(tmp_path: Path, shelf: type[Shelf]):
    told = logs(tmp_path, said := [])
    told.told(trial(0, 0.9))
    told.told(trial(1, 0.8))  # of the same group: both are open at once
    told.told(trial(0, 0.9, 0.7))
    told.told(trial(0, 0.9, 0.7, 0.6, status="finished"))
    told.told(trial(1, 0.8, status="stopped", reason="rung"))
    told.close()
    assert [run["epochs"] for run in shelf.runs.values()] == [{1: 0.9, 2: 0.7, 3: 0.6}, {1: 0.8}]
    assert [run["status"] for run in shelf.runs.values()] == ["finished", "stopped"]
    assert all(run["point"] == POINT for run in shelf.runs.values())
    assert said == ["tune: every trial in wandb: on the shelf"]


def test_a_search_that_goes_on_goes_on_with_its_runs(tmp_path: Path, shelf: type[Shelf]):
    first = logs(tmp_path, [])
    first.told(trial(0, 0.9, 0.8))
    first.told(trial(1, 0.5, status="failed", reason="not finite"))
    commit(tmp_path, trial(1, 0.5, status="failed", reason="not finite"))
    first.close()  # a signal came
    assert [run["status"] for run in shelf.runs.values()] == ["running", "failed"]
    commit(tmp_path, ended := trial(2, 0.4, status="finished"))  # and then a kill, before anyone was told
    second = logs(tmp_path, [])
    second.told(trial(0, 0.9, 0.8, 0.7))
    second.told(trial(0, 0.9, 0.8, 0.7, status="finished"))
    commit(tmp_path, trial(0, 0.9, 0.8, 0.7, status="finished"))
    second.close()
    found = {key[-4:]: run for key, run in shelf.runs.items()}
    assert found["0000"]["epochs"] == {1: 0.9, 2: 0.8, 3: 0.7}
    assert [found[key]["opened"] for key in ("0000", "0001", "0002")] == [2, 1, 1]
    assert (found["0002"]["epochs"], found["0002"]["status"]) == ({1: 0.4}, ended.status)
    logs(tmp_path, []).close()
    assert sum(run["opened"] for run in shelf.runs.values()) == 4  # nothing is left to send


def test_a_place_that_is_lost_is_named_once_and_has_all_in_the_end(tmp_path: Path, shelf: type[Shelf]):
    told = logs(tmp_path, said := [])
    told.told(trial(0, 0.9))
    shelf.broken = "no route to host"
    told.told(trial(0, 0.9, 0.8))
    told.told(trial(0, 0.9, 0.8, 0.7, status="finished"))
    commit(tmp_path, trial(0, 0.9, 0.8, 0.7, status="finished"))
    told.close()
    assert len(said) == 1
    assert "tune.log_to: wandb: " in said[0]
    assert "no route to host. The search goes on without it" in said[0]
    shelf.broken = ""
    logs(tmp_path, []).close()
    (run,) = shelf.runs.values()
    assert (run["epochs"], run["status"]) == ({1: 0.9, 2: 0.8, 3: 0.7}, "finished")


def test_another_search_in_the_same_place_has_runs_of_its_own(tmp_path: Path, shelf: type[Shelf]):
    for name in ("one", "two"):
        told = logs(tmp_path / name, [])
        told.told(trial(0, 0.9, status="finished"))
        told.close()
    assert len(shelf.runs) == 2


def test_mlflow_has_points_curves_and_how_trials_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    asked = config(tmp_path, "mlflow")
    for losses, states in (((0.9,), {}), ((0.9, 0.7), {"status": "finished"})):
        told = TrialLogs(asked, open_run(asked.storage, asked.name), (said := []).append)
        told.told(trial(0, *losses, **states))
        told.told(trial(1, 0.5, status="failed", reason="not finite"))
        told.close()
    uri = f"sqlite:///{tmp_path}/run/tune/logs/mlflow.db"
    assert said == [f"tune: every trial in mlflow: mlflow ui --backend-store-uri {uri}"]
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("raydistill/run")
    assert experiment is not None
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(found) == {"trial 0", "trial 1"}
    first = found["trial 0"]
    assert first.data.params == {"train.learning_rate": "0.001"}
    history = client.get_metric_history(first.info.run_id, "nll")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.9), (2, 0.7)]
    assert [(run.info.status, run.data.tags["reason"]) for _, run in sorted(found.items())] == [
        ("FINISHED", ""), ("FAILED", "not finite"),
    ]  # fmt: skip


def test_members_of_a_fused_group_are_in_wandb_one_by_one(runs):
    asked = {"environment": {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}}
    folder, answer = searched(runs, FUSED | {"tune.log_to": ["wandb"]}, **asked)
    assert answer["error"] is None
    assert groups(folder) == [[0, 1, 2, 3]]
    written = {
        path.parent.name[-4:]: path.read_bytes() for path in folder.glob("tune/logs/wandb/offline-run-*/*.wandb")
    }
    assert sorted(written) == ["0000", "0001", "0002", "0003"]
    for row in table(folder):
        name = trial_name(row["trial"], {"train.learning_rate": row["train.learning_rate"]})
        record = json.loads((folder / trial_folder(name) / "MANIFEST.json").read_text())["facts"]["trial"]
        assert record["curve"]
        for point in record["curve"]:
            assert repr(point["nll"]).encode() in written[f"{row['trial']:04d}"]
        assert b"train.learning_rate" in written[f"{row['trial']:04d}"]
    assert any("tune: every trial in wandb: wandb sync --sync-all" in line for line in answer["said"])
    plain, _ = searched(runs, FUSED)
    assert table(folder) == table(plain)


def test_what_is_missing_is_refused_by_name(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from raydistill.record.store import open_store

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        with pytest.raises(UserError, match=rf"tune.log_to: {name} needs a package .* 'raydistill\[{name}\]'"):
            trackers.check_trackers(config(tmp_path, name), open_run(str(tmp_path), "run"))
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    away = replace(open_run(str(tmp_path), "run"), store=open_store("memory://bucket/run"))
    with pytest.raises(UserError, match="mlflow: the run's storage is no local folder"):
        trackers.check_trackers(config(tmp_path, "mlflow"), away)
    keyless = {"WANDB_API_KEY": "", "HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    folder, answer = searched(runs, FUSED | {"tune.log_to": ["wandb"]}, environment={**keyless, "WANDB_MODE": "online"})
    assert answer["error"] == "tune.log_to: wandb: there is no key. Set WANDB_API_KEY, or WANDB_MODE=offline"
    assert not (folder / "tune").exists()
    answer = searched(runs, FUSED | {"tune.log_to": ["tensorboard"]})[1]
    assert "tune.log_to.0: found 'tensorboard' (text); it should be 'wandb' or 'mlflow'" in answer["error"]
