"""Whole runs on Ray, by the command line, as a user starts them. One clean run is the measure for all the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from processes import kill_tree

from raydistill.demo import write_new_bert
from raydistill.record.store import sha256_file
from raydistill.tickets import generate, write_tickets

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
DEADLINE_SECONDS = 540
REPORT_KEYS = {
    "accuracy", "macro_f1", "nll", "ece", "ece_scaled", "parameters", "size_bytes", "latency_ms_p50", "latency_ms_p90",
    "rows_per_second",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_yielding() -> Iterator[None]:
    """Ray's workers run at niceness 15: beside any other work they would starve, and the deadlines pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A run small enough for a test: float32 and no dropout, so that equal runs give equal bytes."""
    folder = tmp_path_factory.mktemp("input")
    train, test = write_tickets(folder, train_rows=400, test_rows=60)
    write_new_bert(
        folder / "model", [t for t, _ in generate(200)], hidden_size=32, layers=2, heads=2, vocabulary=300, positions=64
    )
    return {
        "name": "clean",
        "storage": str(tmp_path_factory.mktemp("runs")),
        "data": {
            "train": str(train), "test": str(test), "label": "category", "max_length": 48, "shard_rows": 64,
            "validation": 0.2,
        },
        "teacher": {
            "model": str(folder / "model"), "codec": "dense-int8", "dtype": "float32",
            "fine_tune": {"epochs": 1, "precision": "fp32", "learning_rate": 1e-3},
        },
        "student": {"init": "config", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
        "train": {
            "epochs": 3, "precision": "fp32", "learning_rate": 3e-3, "log_every": 1, "cpus_per_worker": 1,
            "batch_size": 25,
        },
        "evaluate": {"latency_requests": 16, "bootstrap": 200},
        "cluster": {"cpus": 2},
    }  # fmt: skip


def write(settings: dict, **changes: object) -> Path:
    """A config file with some sections changed."""
    changed = {k: {**settings[k], **v} if isinstance(v, dict) else v for k, v in changes.items()}
    config = {**settings, **changed}
    path = Path(settings["storage"]) / f"{config['name']}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "raydistill", *map(str, arguments)]


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=DEADLINE_SECONDS, **options)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def clean(settings: dict) -> Path:
    """The run that nothing disturbed."""
    done = run("run", write(settings))
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(settings["storage"]) / "clean"


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder but the lock, which names its holder."""
    return {
        str(p.relative_to(folder)): sha256_file(p)
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def losses(folder: Path) -> list[float]:
    points = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    return [p["loss"] for p in points if p["group"] == "train"]


def test_report_has_the_figures_of_the_design(clean: Path) -> None:
    report = json.loads((clean / "report" / "report.json").read_text())
    for name in ("teacher", "student", "control"):
        assert set(report[name]) >= REPORT_KEYS
    assert report["retention"] == pytest.approx(report["student"]["accuracy"] / report["teacher"]["accuracy"])
    low, high = report["retention_ci95"]
    assert low <= report["retention"] <= high
    assert report["teacher_forwards_per_row"] == 1
    assert report["test_rows"] == 60
    assert {"agreement", "gain_over_control", "gain_over_control_ci95", "gap_closed"} <= set(report)
    page = (clean / "report" / "report.html").read_text()
    assert f"{report['student']['accuracy']:.2%}" in page


@pytest.mark.slow
def test_a_problem_that_one_of_two_workers_meets_ends_the_run_with_its_line(settings: dict, clean: Path) -> None:
    # The other worker waited for it at a barrier for half an hour, before. Only rank 0 does so many store operations.
    config = write(settings, name="full", train={"workers": 2}, teacher={"cache_from": str(clean)})
    full = run("train", config, env={**os.environ, "RAYDISTILL_FAULT": "14:ENOSPC"})
    assert full.returncode == 2, full.stdout + full.stderr
    assert "full/train/checkpoints" in full.stderr
    assert "Free some space" in full.stderr
    again = run("train", config)
    assert again.returncode == 0, again.stdout + again.stderr


def test_student_loads_by_hugging_faces_own_means(clean: Path) -> None:
    from transformers import pipeline

    answer = pipeline("text-classification", model=str(clean / "student"))("my parcel has not arrived")[0]
    assert answer["label"] in {"billing", "refund", "account", "shipping", "technical"}


def test_curves_are_written_for_tensorboard_and_as_lines(clean: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(clean / "train" / "tensorboard"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    wanted = {"loss", "kl", "cross_entropy", "learning_rate", "grad_norm", "rows_per_second"}
    assert {f"train/{n}" for n in wanted} <= names
    assert {f"validation/{n}" for n in ("accuracy", "macro_f1", "nll", "kl", "agreement")} <= names
    assert len(losses(clean)) == 3 * 13  # 320 train rows in batches of 25, 3 epochs, a point every step


def test_verify_status_and_a_second_run_find_it_complete(settings: dict, clean: Path) -> None:
    before = digests(clean)
    again = run("run", write(settings))
    assert again.returncode == 0
    assert again.stdout.count("complete") >= 5
    assert digests(clean) == before
    assert "files are intact" in run("verify", clean).stdout
    assert "complete; the report is" in run("status", clean).stdout


def test_two_workers_and_accumulation_give_the_one_worker_curve(settings: dict, clean: Path) -> None:
    # An uneven batch of 25 rows, and 20 at an epoch's end, over 2 workers x 2 micro-batches.
    two = {"workers": 2, "accumulation": 2, "deepspeed": {"zero_stage": 2}}
    done = run("train", write(settings, name="two", teacher={"cache_from": str(clean)}, train=two))
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(Path(settings["storage"]) / "two") == pytest.approx(losses(clean), rel=2e-4)


def wait_for(condition, process: subprocess.Popen, seconds: float = DEADLINE_SECONDS) -> None:
    """Waits until a condition holds; fails when the process ends first."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before the moment to disturb it"
        assert time.monotonic() < end, "the moment to disturb the run did not come"
        time.sleep(0.02)


def stop_in_training(arguments: list[object], folder: Path, signum: signal.Signals) -> str:
    """Sends a signal to a command once its training has a checkpoint; what it said, after its exit code is checked."""
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: (folder / "train/checkpoints/latest.json").exists(), process)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 128 + signum, output
    assert "state saved at step" in output or "stopped by" in output
    assert f"Go on with: raydistill {' '.join(map(str, arguments))}" in output
    return output


def test_a_run_that_is_killed_and_then_stopped_by_a_signal_ends_with_the_same_bytes(
    settings: dict, clean: Path
) -> None:
    path, folder = write(settings, name="disturbed", evaluate={"control": False}), clean.parent / "disturbed"
    process = subprocess.Popen(command("run", path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: (folder / "teacher/cache").exists() and any((folder / "teacher/cache").glob("*.json")), process)
    kill_tree(process.pid)
    process.wait(30)
    assert process.stdout is not None
    process.stdout.close()
    stop_in_training(["run", path], folder, signal.SIGTERM)
    done = run("run", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert digests(folder / "data") == digests(clean / "data")
    assert digests(folder / "teacher/cache") == digests(clean / "teacher/cache")
    assert sha256_file(folder / "student/model.safetensors") == sha256_file(clean / "student/model.safetensors")
    assert losses(folder) == losses(clean)


def test_ctrl_c_ends_a_stage_with_its_state_saved(settings: dict, clean: Path) -> None:
    long = {"epochs": 1000}  # it must not end before the signal comes
    path = write(settings, name="interrupted", teacher={"cache_from": str(clean)}, train=long)
    folder = clean.parent / "interrupted"
    assert "state saved at step" in stop_in_training(["train", path], folder, signal.SIGINT)
    assert "files are intact" in run("verify", folder).stdout


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch):
    """An S3 bucket on a server of the test's own; the environment points every client to it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    import boto3

    boto3.client("s3").create_bucket(Bucket="distilled")
    yield "s3://distilled/runs"
    server.stop()


@pytest.fixture
def head_node(tmp_path: Path):
    """A Ray head node of the test's own: ports, temporary folder, home and token."""
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        **os.environ, "HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 48,
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    port, dashboard, agent, metrics, client = (free_port() for _ in range(5))
    # The name of a unix socket has 107 bytes at most, so Ray's folder needs a short path.
    scratch = Path(f"/tmp/rd-{os.getpid()}")
    ray = str(Path(sys.executable).with_name("ray"))
    process = subprocess.Popen(
        [
            ray, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=2",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={scratch}",
            f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}",
            f"--ray-client-server-port={client}",
            "--object-store-memory=300000000", "--resources={\"trial_driver\": 100}",
        ],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
    )  # fmt: skip
    yield f"http://127.0.0.1:{dashboard}", environment, ray
    kill_tree(process.pid)
    process.wait(30)


def check_stored(bucket: str, name: str, clean: Path) -> None:
    """A run in the bucket is whole, and its student is the clean run's."""
    import hashlib

    import boto3

    client = boto3.client("s3")
    stored = {o["Key"] for o in client.list_objects_v2(Bucket="distilled", Prefix=f"runs/{name}/")["Contents"]}
    parts = {"config.yaml", "report/report.html", "train/metrics.jsonl"}
    assert {f"runs/{name}/{part}" for part in parts} <= stored
    weights = client.get_object(Bucket="distilled", Key=f"runs/{name}/student/model.safetensors")["Body"].read()
    assert hashlib.sha256(weights).hexdigest() == sha256_file(clean / "student" / "model.safetensors")
    assert "files are intact" in run("verify", f"{bucket}/{name}").stdout


def test_a_job_on_a_cluster_with_object_storage_ends_with_the_same_student(
    settings: dict, clean: Path, bucket: str, head_node
) -> None:
    address, environment, ray = head_node
    path = write(settings, name="job", teacher={"cache_from": str(clean)}, evaluate={"control": False})
    path.write_text(path.read_text().replace(settings["storage"], bucket, 1))
    root = Path(__file__).parents[1]
    submit = [ray, "job", "submit", "--address", address, "--working-dir", str(root), "--"]
    end = time.monotonic() + 120
    while True:  # the job server and its agent take a while to come up, and say so by an error
        done = subprocess.run(
            [*submit, sys.executable, "jobs/run.py", str(path)],
            env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS,
        )  # fmt: skip
        starting = "No available agent" in done.stderr or "Failed to connect" in done.stderr
        if not starting or time.monotonic() > end:
            break
        time.sleep(2)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    check_stored(bucket, "job", clean)


@pytest.mark.slow
def test_a_run_on_object_storage_ends_with_the_same_student(settings: dict, clean: Path, bucket: str) -> None:
    path = write(settings, name="remote", teacher={"cache_from": str(clean)}, evaluate={"control": False})
    done = run("run", path, f"storage={bucket}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    check_stored(bucket, "remote", clean)
