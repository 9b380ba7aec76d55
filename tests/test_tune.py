"""Stage tune over small runs without Ray: trials, stops, going on, the winner's training."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml
from processes import called, kill, kill_tree, program

from raydistill.config.file import load_config
from raydistill.record.commit import read_manifest
from raydistill.record.store import LocalStore

RATES = [1e-3, 1e-2, 3e-3, 3e-2]
SEARCH = {
    "tune.search": "grid", "tune.space": {"train.learning_rate": {"choice": RATES}}, "tune.data_fraction": 0.5,
    "tune.metric": "nll", "tune.generation": 2, "tune.reduction_factor": 2, "train.epochs": 4, "train.metric": "nll",
    "tune.fused": False,  # tests/test_fused_search.py has the others
}  # fmt: skip
WHOLE = {name: value for name, value in SEARCH.items() if name != "tune.reduction_factor"} | {"tune.scheduler": "none"}


def searched(runs: Any, changes: dict[str, Any] = SEARCH, **request: Any) -> tuple[Path, dict[str, Any]]:
    """A search on the undisturbed run's data and cache: its folder and the answer."""
    folder = runs.start("train")
    return folder, runs.run(folder, "tune", changes=changes, **request)


def facts(folder: Path) -> dict[str, Any]:
    manifest = read_manifest(LocalStore(str(folder)), "tune")
    assert manifest is not None
    return manifest.facts


def table(folder: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / "tune/trials.parquet").to_pylist()
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def curves(folder: Path) -> dict[int, list[dict[str, float]]]:
    """The validations of every trial, by its number, from what its training wrote."""
    found: dict[int, list[dict[str, float]]] = {}
    for path in sorted(folder.glob("tune/trials/*/metrics.jsonl")):
        points = [json.loads(line) for line in path.read_text().splitlines()]
        found[int(path.parent.name[:4])] = [point for point in points if point["group"] == "validation"]
    return found


@pytest.fixture(scope="module")
def whole(runs) -> Path:
    """A search that nothing stopped, neither a rule nor a fault."""
    folder, answer = searched(runs, WHOLE)
    assert answer["error"] is None
    return folder


@pytest.fixture(scope="module")
def halved(runs) -> tuple[Path, dict[str, Any]]:
    folder, answer = searched(runs)
    assert answer["error"] is None
    return folder, answer


def test_the_best_trial_wins_and_its_settings_can_be_run(whole: Path):
    reached = curves(whole)
    assert {number: len(curve) for number, curve in reached.items()} == dict.fromkeys(range(4), 4)
    best = {number: min(point["nll"] for point in curve) for number, curve in reached.items()}
    number = min(best, key=lambda n: best[n])
    won = facts(whole)["winner"]
    assert won["number"] == number
    assert won["value"] == pytest.approx(best[number], rel=1e-5)
    assert won["point"] == {"train.learning_rate": RATES[number]}
    config = load_config(whole / "tune/best.yaml")
    assert config.tune is None
    assert config.train.learning_rate == RATES[number]
    assert facts(whole)["teacher_forwards_per_row"] == 1


def test_the_tables_have_a_row_for_every_trial(whole: Path):
    rows = table(whole)
    assert [row["trial"] for row in rows] == [0, 1, 2, 3]
    assert [row["train.learning_rate"] for row in rows] == RATES
    assert {row["status"] for row in rows} == {"finished"}
    assert {row["steps"] for row in rows} == {4 * 2}  # half of 54 rows in batches of 16, 4 epochs
    with open(whole / "tune/trials.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["status"] for row in written] == ["finished"] * 4
    assert [float(row["nll"]) for row in written] == [row["nll"] for row in rows]


def test_the_page_says_what_the_tables_say(whole: Path):
    page, rows, found = (whole / "tune/report.html").read_text(), table(whole), facts(whole)
    won = found["winner"]
    assert f"Trial {won['number']} won: validation NLL {won['value']:.4f} with train.learning_rate" in page
    assert "Of 4 trials 4 trained to their end." in page
    # Half of 54 rows in batches of 16.
    assert "They took 32 optimiser steps, 100% of what all would have taken to their end" in page
    chosen = [pq.read_table(path)["fold"].to_pylist().count(0) for path in whole.glob("tune/rows/train-*.parquet")]
    assert f"on 50% of train ({sum(chosen)} rows)" in page
    assert all(f"<td>{row['nll']:.4f}</td>" in page for row in rows)
    assert page.count("<svg") >= 2
    assert "learning_rate:" in page


def test_tensorboard_has_settings_and_metrics_of_every_trial(whole: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for number in range(4):
        events = EventAccumulator(str(whole / f"tune/hparams/{number:04d}"))
        events.Reload()
        assert "_hparams_/session_start_info" in events.summary_metadata
        assert events.Scalars("best/nll")[0].value == pytest.approx(table(whole)[number]["nll"], rel=1e-5)


def test_a_trial_reaches_what_an_ordinary_training_reaches(runs):
    folder, answer = searched(runs, WHOLE | {"tune.data_fraction": 1})
    assert answer["error"] is None
    trained, _ = runs.trained({"train.epochs": 4, "train.metric": "nll", "train.learning_rate": 3e-3})
    points = [json.loads(line) for line in (trained / "train/metrics.jsonl").read_text().splitlines()]
    assert curves(folder)[2] == [point for point in points if point["group"] == "validation"]


def test_stopped_trials_are_the_beginnings_of_whole_ones(whole: Path, halved: tuple[Path, dict[str, Any]]):
    # Rungs at epochs 1 and 2. The schedule does not know where a trial ends.
    folder, _ = halved
    complete, stopped = curves(whole), curves(folder)
    for number, curve in stopped.items():
        assert curve == complete[number][: len(curve)]
    first = {number: curve[0]["nll"] for number, curve in complete.items()}
    # Of each generation of two, one goes on from epoch 1 when it is among the best half of all so far.
    assert len(stopped[min((0, 1), key=lambda n: first[n])]) > 1
    assert len(stopped[max((0, 1), key=lambda n: first[n])]) == 1
    places = sorted(first, key=lambda n: first[n])
    for number in (2, 3):
        assert (len(stopped[number]) > 1) == (places.index(number) < 2)
    statuses = {row["trial"]: row["status"] for row in table(folder)}
    assert statuses == {n: "finished" if len(curve) == 4 else "stopped" for n, curve in stopped.items()}
    assert "rung of epoch 1: place 2 of 2, 1 go on" in {row["reason"] for row in table(folder)}


def test_ended_trials_leave_no_checkpoints(halved: tuple[Path, dict[str, Any]]):
    assert not list(halved[0].glob("tune/trials/*/checkpoints"))


def test_a_second_run_finds_the_search_complete(runs, halved: tuple[Path, dict[str, Any]]):
    folder, _ = halved
    before = {path: path.read_bytes() for path in (folder / "tune").rglob("*") if path.is_file()}
    again = runs.run(folder, "tune", changes=SEARCH)
    assert again["error"] is None
    assert again["posts"] == []
    assert any(line.startswith("tune: complete, 4 trials") for line in again["said"])
    assert {path: path.read_bytes() for path in (folder / "tune").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6, 0.85, 0.97])
def test_a_killed_search_goes_on_to_the_same_winner(runs, halved: tuple[Path, dict[str, Any]], share: float):
    expected, answer = halved
    number = int(share * len(answer["operations"]))
    folder, killed = searched(runs, fault=f"{number}:kill")
    assert killed == {"exit": -9}
    again = runs.run(folder, "tune", changes=SEARCH)
    assert again["error"] is None
    assert table(folder) == table(expected)
    assert curves(folder) == curves(expected)
    name = "tune/best.yaml"
    assert (folder / name).read_text().replace(folder.name, "") == (expected / name).read_text().replace(
        expected.name, ""
    )
    # What had ended is not trained again: each epoch was posted at most once more than it was lost.
    assert len(again["posts"]) < len(answer["posts"]) or share < 0.2


def test_more_trials_can_be_added_to_a_finished_search(runs):
    random = SEARCH | {"tune.search": "random", "tune.space": {"train.learning_rate": {"loguniform": [1e-3, 1e-2]}}}
    whole, answer = searched(runs, random | {"tune.trials": 4})
    assert answer["error"] is None
    folder, _ = searched(runs, random | {"tune.trials": 2})
    again = runs.run(folder, "tune", changes=random | {"tune.trials": 4})
    assert again["error"] is None
    assert {post["trial"] for post in again["posts"]} == {2, 3}
    assert table(folder) == table(whole)
    fewer = runs.run(folder, "tune", changes=random | {"tune.trials": 3})
    assert "tune.trials: found 3, the search in" in fewer["error"]
    assert "has 4. Ask for as many at least" in fewer["error"]


def test_another_space_is_refused_and_the_setting_named(runs, halved: tuple[Path, dict[str, Any]]):
    changes = SEARCH | {"tune.space": {"train.learning_rate": {"choice": [*RATES[:3], 0.1]}}}
    message = runs.run(halved[0], "tune", changes=changes)["error"]
    assert (
        "/tune: tune.space.train.learning_rate.choice: was made with [0.001, 0.01, 0.003, 0.03], now asked" in message
    )
    assert "--redo tune" in message


def test_a_trial_that_fails_is_a_row_with_its_reason(runs):
    # Logits over such a temperature overflow.
    space = {"train.loss.temperature": {"choice": [1e-41, 2.0]}}
    folder, answer = searched(runs, SEARCH | {"tune.space": space})
    assert answer["error"] is None
    first, second = table(folder)
    assert first["status"] == "failed"
    assert first["reason"].startswith("the loss at step 1 is not finite. Lower train.learning_rate")
    assert first["nll"] is None
    assert second["status"] == "finished"
    assert facts(folder)["winner"]["number"] == 1


def test_a_search_whose_trials_all_fail_says_why(runs):
    space = {"train.loss.temperature": {"choice": [1e-41, 2e-41]}}
    folder, answer = searched(runs, SEARCH | {"tune.space": space})
    assert "tune: all 2 trials failed, most of them so: the loss at step 1 is not finite" in answer["error"]
    assert not (folder / "tune/MANIFEST.json").exists()


def test_train_takes_the_winners_settings(runs, whole: Path):
    folder = runs.start("train")
    shutil.copytree(whole / "tune", folder / "tune")
    assert runs.run(folder, "tune", "train", changes=WHOLE)["error"] is None
    plan = json.loads((folder / "train/plan.json").read_text())
    assert plan["inputs"]["train.learning_rate"] == facts(whole)["winner"]["point"]["train.learning_rate"]
    manifest = read_manifest(LocalStore(str(folder)), "student")
    assert manifest is not None
    assert manifest.facts["steps"] == 4 * 4  # all 54 rows


def test_train_waits_for_the_search_and_neither_looks_at_test_rows(runs):
    folder = runs.start("train")
    assert list((folder / "data").glob("test-*.parquet"))
    unfinished = runs.run(folder, "train", changes=SEARCH)
    assert "tune: is not complete. Run `raydistill tune` with its config first" in unfinished["error"]
    for changes in (SEARCH, SEARCH | {"tune.fused": "auto"}):
        folder = runs.start("train")
        assert runs.run(folder, "tune", "train", changes=changes, refused="test-*")["error"] is None
    # Who compares does look at them.
    with pytest.raises(AssertionError, match="was opened"):
        runs.run(folder, "evaluate", changes=changes, refused="test-*")


def test_trials_learn_from_cached_features_of_the_share(runs):
    features = [{"kind": "hidden_mse"}]
    changes = SEARCH | {
        "train.loss.features": features, "train.loss.features_from": "cache", "train.epochs": 2,
        "tune.space": {"train.loss.features": {"choice": [[], features]}},
    }  # fmt: skip
    folder = runs.start("teach")
    answer = runs.run(folder, "teach", "tune", changes=changes)
    assert answer["error"] is None
    lines = {number: path.read_text() for number, path in enumerate(sorted(folder.glob("tune/trials/*/metrics.jsonl")))}
    assert ["hidden_mse" in text for _, text in sorted(lines.items())] == [False, True]


def on_ray(runs: Any, like: Path, **cluster: Any) -> tuple[Path, list[str]]:
    """A folder with data and cache, and the command that searches there as another folder was searched."""
    folder = runs.start("train")
    cluster = cluster or {"cpus": 2}
    settings = yaml.safe_load((like / "config.yaml").read_text()) | {"name": folder.name, "cluster": cluster}
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return folder, [sys.executable, "-m", "raydistill", "tune", str(path)]


def trial_actors(tree: list[psutil.Process]) -> list[psutil.Process]:
    """Those of a driver's processes that are trials: Ray calls one after the class, and Tune's name for it at work."""
    return called(tree, "ray::TrialActor", "ray::ResourceTrainable")


@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_trials_on_ray_tune_two_at_once_find_the_same(runs):
    # Of each generation of four, three trials of one batch size are a group, and one is trained alone, or two are two.
    space = {"train.batch_size": {"choice": [8, 16]}, "train.learning_rate": {"choice": RATES[:3]}}
    changes = SEARCH | {"tune.space": space, "tune.generation": 4, "tune.fused": "auto", "train.epochs": 3}
    expected, answer = searched(runs, changes)
    assert answer["error"] is None
    folder, command = on_ray(runs, expected)
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "teacher forwards per row 1" in done.stdout
    assert "Configuration for experiment" not in done.stdout  # Ray Tune's own tables
    assert "View detailed results" not in done.stdout
    assert table(folder) == table(expected)
    assert curves(folder) == curves(expected)
    assert len(list(folder.glob("tune/groups/*/group.json"))) == 2
    assert not list(folder.glob("tune/.ray"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("killed", ["driver", "trial"])
def test_a_search_on_ray_goes_on_after_a_kill(runs, halved: tuple[Path, dict[str, Any]], killed: str):
    folder, command = on_ray(runs, halved[0])
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    with open(folder.parent / f"{folder.name}.log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)
        while not list(folder.glob("tune/trials/*/checkpoints/latest.json")):
            assert process.poll() is None, "the search ended before the moment to disturb it"
            time.sleep(0.02)
        tree = psutil.Process(process.pid).children(recursive=True)
        victims = trial_actors(tree) if killed == "trial" else [*tree, psutil.Process(process.pid)]
        assert victims
        kill(victims)
        process.wait(1000)
        if killed == "driver":
            subprocess.run(command, check=True, timeout=1000, env=environment)
    assert table(folder) == table(halved[0])
    assert curves(folder) == curves(halved[0])


@pytest.fixture
def two_nodes() -> Iterator[tuple[str, subprocess.Popen[str], dict[str, str]]]:
    """A cluster of two nodes of one CPU each: its address, the second node, and the environment of who connects."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = tempfile.mkdtemp(prefix="rd", dir="/tmp")  # short: the names of Ray's sockets stand below it
    environment = {**os.environ, "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
    shared = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]
    head = ["--head", "--node-ip-address=127.0.0.1", f"--port={address.split(':')[1]}", f"--temp-dir={folder}",
            "--include-dashboard=false"]  # fmt: skip
    nodes: list[subprocess.Popen[str]] = []
    try:
        for arguments in (head, [f"--address={address}", "--node-ip-address=127.0.0.2"]):
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments, *shared]
            with open(f"{folder}/node-{len(nodes)}.log", "w") as log:
                nodes.append(subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment))
            while not has_raylet(nodes[-1]):
                assert nodes[-1].poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
            time.sleep(2)  # until it is known to the head
        yield address, nodes[1], environment
    finally:
        for node in nodes:
            end_node(node)
        shutil.rmtree(folder, ignore_errors=True)


def has_raylet(node: subprocess.Popen[str]) -> bool:
    tree = psutil.Process(node.pid).children(recursive=True)
    return any(Path(line).name == "raylet" for line in map(program, tree))


def end_node(node: subprocess.Popen[str]) -> None:
    kill_tree(node.pid)
    node.wait(60)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_search_goes_on_after_a_node_is_killed(runs, halved: tuple[Path, dict[str, Any]], two_nodes: Any):
    address, second, environment = two_nodes

    def is_moment() -> bool:
        """A trial is being trained, and there is one on the second node."""
        on_second = trial_actors(psutil.Process(second.pid).children(recursive=True))
        return bool(on_second) and bool(list(folder.glob("tune/trials/*/checkpoints/latest.json")))

    for _ in range(4):  # trials are short: on a full machine the first node may have done them before the second begins
        folder, command = on_ray(runs, halved[0], address=address)
        with open(folder.parent / f"{folder.name}.log", "w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)
            while (running := process.poll() is None) and not is_moment():
                time.sleep(0.02)
            if not running:
                assert process.returncode == 0, Path(log.name).read_text()
                continue
            end_node(second)
            assert process.wait(1000) == 0, Path(log.name).read_text()
            break
    else:
        pytest.fail("the search ended before the moment to disturb it, each time")
    assert table(folder) == table(halved[0])
    assert curves(folder) == curves(halved[0])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"train.loss.features": [{"kind": "hidden_mse"}]}, "the teacher would run in every trial. Set"),
        (
            {"tune.space": {"student.layers": {"choice": [[0], [5]]}}, "student": {"init": "teacher_layers"}},
            "tune.space: student.layers=[5]: student.layers: found 5",
        ),
        ({"train.precision": "fp16"}, "train.precision: found fp16; trials are trained in bf16 or fp32"),
        ({"tune.max_concurrent": 3}, "tune.max_concurrent: found 3, the cluster has 1 CPUs at 1 for each trial"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(runs, changes: dict[str, Any], part: str):
    folder, answer = searched(runs, SEARCH | changes)
    assert part in (answer["error"] or "")
    assert not (folder / "tune").exists()
