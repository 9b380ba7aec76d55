"""Small runs of the real stages without Ray, each in a forked child (`faults/small_run.py`)."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from raydistill.data.shards import SPLITS
from raydistill.record.commit import MANIFEST, read_manifest
from raydistill.record.run import Run, leftovers
from raydistill.record.store import LocalStore
from raydistill.stages.checkpoints import KEPT

DEADLINE = 120
STAGES = ("prepare", "teach", "train")
FOLDERS = {"prepare": "data", "teach": "teacher/cache", "train": "train"}


class SmallRuns:
    """The process that forks the runs, their input, and the run that nothing disturbed."""

    def __init__(self, folder: Path, kind: str = "classes") -> None:
        script = Path(__file__).parent / "faults" / "small_run.py"
        self._log = open(folder / "log", "w")  # noqa: SIM115 - the process writes to it until `close`
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.folder, self.input, self.whole = folder, folder / "input", folder / "whole"
        assert self._ask({"do": "input", "source": str(self.input), "kind": kind}) == {"exit": 0}
        self._number = 0
        answer = self.run(self.whole, *STAGES)
        assert answer["error"] is None, answer["error"]
        self.expected = results(self.whole)
        self.run_ids = row_ids(self.whole)
        # A stage that begins in a folder where those before it stand.
        self.operations = {stage: self.go_on(self.start(stage), stage)["operations"] for stage in STAGES}

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        too_slow = threading.Timer(2 * DEADLINE, process.kill)
        too_slow.start()
        line = process.stdout.readline()
        too_slow.cancel()
        assert line, f"small_run.py ended: {Path(self._log.name).read_text()[-2000:]}"
        return json.loads(line)

    def run(self, folder: Path, *stages: str, fault: str = "", **request: Any) -> dict[str, Any]:
        """Does stages of the run in the folder; {"exit": -9} alone when the fault killed it."""
        answer = self._ask(
            {
                "do": "run", "folder": str(folder), "source": str(self.input), "stages": stages, "fault": fault,
                "deadline": DEADLINE, **request,
            }
        )  # fmt: skip
        assert answer["exit"] in (0, -9), answer
        assert "bug" not in answer, answer["error"]
        return answer

    def go_on(self, folder: Path, *stages: str, **request: Any) -> dict[str, Any]:
        """Runs the stages undisturbed, and checks that all is as in the run that nothing disturbed."""
        answer = self.run(folder, *stages, **request)
        assert answer["exit"] == 0
        assert answer["error"] is None, answer["error"]
        self.compare(folder, stages[-1])
        return answer

    def compare(self, folder: Path, last: str) -> None:
        done = STAGES[: STAGES.index(last) + 1]
        places = tuple(f"{FOLDERS[stage]}/" for stage in done) + (("student/",) if last == "train" else ())
        assert results(folder) == {name: data for name, data in self.expected.items() if name.startswith(places)}

    def trained(self, changes: dict[str, Any], **request: Any) -> tuple[Path, dict[str, Any]]:
        """A training with other settings on the undisturbed run's data and cache: its folder and the answer."""
        folder = self.start("train")
        return folder, self.run(folder, "train", changes=changes, **request)

    def finished(self, *stages: str, changes: dict[str, Any], folder: Path | None = None) -> Path:
        """A new run, or that in the folder, after stages that went well; DeepSpeed trains once in a process."""
        folder = folder or self.start("prepare")
        for stage in stages:
            answer = self.run(folder, stage, changes=changes)
            assert answer["error"] is None, answer["error"]
        return folder

    def killed_training(self, changes: dict[str, Any], *, killed: int = 6, goes_on: int = 4) -> tuple[Path, Path]:
        """The folders of a training and of the same one that was killed while it wrote a step's checkpoint, and went
        on from the checkpoint before.
        """
        whole, answer = self.trained(changes)
        assert answer["error"] is None, answer["error"]
        operations = answer["operations"]
        number = len(operations) - operations[::-1].index(f"rename step-{killed:08d}")
        folder, answer = self.trained(changes, fault=f"{number}:kill")
        assert answer == {"exit": -9}
        again = self.run(folder, "train", changes=changes)
        assert again["error"] is None, again["error"]
        assert next(post["going_on_from"] for post in again["posts"] if "going_on_from" in post) == goes_on
        return whole, folder

    def fused(
        self, members: dict[str, dict[str, Any]], folder: Path | None = None, **request: Any
    ) -> tuple[Path, dict[str, Any]]:
        """The trainings of several settings as one group, on that run's data and cache: its folder and the answer."""
        folder = folder or self.start("train")
        answer = self._ask(
            {
                "do": "fused", "folder": str(folder), "source": str(self.input), "members": members, "fault": "",
                "deadline": DEADLINE, **request,
            }
        )  # fmt: skip
        assert answer["exit"] in (0, -9), answer
        assert "bug" not in answer, answer["error"]
        return folder, answer

    def start(self, stage: str) -> Path:
        """A new run's folder in which the stages before this one are complete."""
        self._number += 1
        folder = self.folder / f"{stage}-{self._number}"
        folder.mkdir()
        for before in STAGES[: STAGES.index(stage)]:
            shutil.copytree(self.whole / FOLDERS[before], folder / FOLDERS[before])
        return folder

    def place(self, stage: str, operation: str) -> int:
        """The number, counted from 1, of the first such operation ("rename MANIFEST.json") of a stage."""
        return self.operations[stage].index(operation) + 1

    @contextmanager
    def killed(self, stage: str, number: int) -> Iterator[Path]:
        """A run that was killed at an operation of this stage; its folder is removed afterwards."""
        folder = self.start(stage)
        assert self.run(folder, stage, fault=f"{number}:kill") == {"exit": -9}, f"{stage} passed operation {number}"
        yield folder
        shutil.rmtree(folder)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()


def results(folder: Path) -> dict[str, bytes]:
    """What a run is for: every file of data, cache, checkpoints and student; without wall-clock seconds."""
    aside, found = set(leftovers(Run(LocalStore(str(folder))))), {}
    # A training that is killed at its end, before it clears an old checkpoint away, keeps one more.
    checkpoints = sorted(path.name for path in folder.glob("train/checkpoints/step-*") if not path.suffix)[-KEPT:]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name in aside or name.split("/")[0] not in ("data", "teacher", "train", "student"):
            continue
        data = path.read_bytes()
        if name.startswith("train/checkpoints/") and (path.suffix == ".json" or path.parent.name not in checkpoints):
            continue
        if "/tensorboard/" in name:
            continue
        if name == f"student/{MANIFEST}":
            document = json.loads(data)
            del document["facts"]["seconds"], document["check"]
            data = json.dumps(document).encode()
        if path.name == "metrics.jsonl":
            points = [json.loads(line) for line in data.decode().splitlines()]
            data = json.dumps([{k: v for k, v in p.items() if not k.endswith("_per_second")} for p in points]).encode()
        found[name] = data
    return found


def row_ids(folder: Path) -> list[int]:
    manifest = read_manifest(LocalStore(str(folder)), "data")
    assert manifest is not None
    return [i for e in manifest.shards(*SPLITS) for i in pq.read_table(folder / "data" / e.file)["row_id"].to_pylist()]
