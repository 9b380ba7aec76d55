"""The start of a training: a student's first weights where they need rows of train, made once and loaded ever after."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import tiny

from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.record.run import Run, leftovers, verify
from raydistill.record.store import LocalStore
from raydistill.stages.start import made_once, start_folders

pytestmark = pytest.mark.xdist_group("small_runs")
TRIMMED = {"student.trim_vocabulary": True}


def digests(folder: Path) -> dict[str, bytes]:
    files = [p for place in ("train/start", "student") for p in (folder / place).iterdir() if p.name != "MANIFEST.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(runs) -> tuple[Path, dict[str, Any]]:
    """A trimmed student that nothing disturbed, and what its run did."""
    folder, answer = runs.trained(TRIMMED)
    assert answer["error"] is None, answer["error"]
    return folder, answer


def test_a_start_is_made_when_it_needs_rows_and_only_then(runs, whole):
    folder, answer = whole
    assert answer["operations"].count("rename start") == 1
    assert json.loads((folder / "train/start/config.json").read_text())["vocab_size"] < 200
    assert not (runs.whole / "train/start").exists()
    checked, findings = verify(Run(LocalStore(str(folder))))
    assert not findings
    assert checked > len(list((folder / "train/start").iterdir()))


def test_a_run_that_is_killed_at_any_moment_of_its_start_ends_with_the_same_bytes(runs, whole):
    folder, answer = whole
    operations = answer["operations"]
    last = operations.index("rename start") + 2
    first = next(number for number, operation in enumerate(operations) if "start" in operation)
    for number in range(first, last + 1):
        disturbed, killed = runs.trained(TRIMMED, fault=f"{number + 1}:kill")
        assert killed == {"exit": -9}
        again = runs.run(disturbed, "train", changes=TRIMMED)
        assert again["error"] is None
        # Once it stands it is not made again.
        assert again["operations"].count("rename start") == (number < last - 1)
        assert digests(disturbed) == digests(folder)


def test_a_training_that_goes_on_does_not_make_its_start_again(runs, whole):
    folder, answer = whole
    number = answer["operations"].index("rename step-00000006") + 1
    disturbed, killed = runs.trained(TRIMMED, fault=f"{number}:kill")
    assert killed == {"exit": -9}
    again = runs.run(disturbed, "train", changes=TRIMMED)
    assert again["error"] is None
    assert not [operation for operation in again["operations"] if "start" in operation]
    assert digests(disturbed) == digests(folder)


def test_a_damaged_start_is_set_aside_and_made_again(runs, whole):
    folder, answer = whole
    number = answer["operations"].index("rename step-00000006") + 1
    disturbed, _ = runs.trained(TRIMMED, fault=f"{number}:kill")
    path = disturbed / "train/start/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    _, findings = verify(Run(LocalStore(str(disturbed))))
    assert [finding.file for finding in findings] == ["train/start/model.safetensors"]
    again = runs.run(disturbed, "train", changes=TRIMMED)
    assert again["error"] is None
    assert digests(disturbed) == digests(folder)
    assert any(name.startswith("train/start.bad-1/") for name in leftovers(Run(LocalStore(str(disturbed)))))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_control_takes_the_students_start(alone: None, tmp_path: Path, tiny_classifier: Path):
    store, made = LocalStore(str(tmp_path / "run")), []

    def make() -> tuple[Any, Any]:
        made.append(1)
        return tiny("bert"), load_tokenizer(tiny_classifier, "x")

    student, _ = made_once(store, start_folders("train"), "one", make, max_length=32)
    control, tokenizer = made_once(store, start_folders("control/train"), "one", make, max_length=32)
    assert len(made) == 1
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), control.parameters(), strict=True))
    assert len(tokenizer) == 200
    made_once(store, start_folders("control/train"), "another", make, max_length=32)
    assert len(made) == 2
    assert (tmp_path / "run/control/train/start").exists()


def test_a_mistake_that_is_found_while_it_is_made_is_the_users(alone: None, tmp_path: Path):
    def make() -> tuple[Any, Any]:
        raise UserError("student: is wrong")

    with pytest.raises(UserError, match="student: is wrong"):
        made_once(LocalStore(str(tmp_path / "run")), ("train/start",), "one", make, max_length=32)
    assert not (tmp_path / "run").exists()


RANK = """
import sys
from pathlib import Path
import torch.distributed as dist
from tiny_models import tiny
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.record.store import LocalStore
from raydistill.stages.start import made_once

rank, folder, classifier = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)

def make():
    assert rank == 0
    return tiny("bert"), load_tokenizer(classifier, "x")

def fail():
    raise UserError(f"found by rank {rank}")

store = LocalStore(str(folder / "run"))
model, tokenizer = made_once(store, ("train/start",), "one", make, max_length=32)
print(sum(float(p.detach().double().sum()) for p in model.parameters()), len(tokenizer))
try:
    made_once(store, ("train/start",), "two", fail, max_length=32)
except UserError as error:
    print(error)
dist.destroy_process_group()
"""


def test_every_rank_has_what_one_made_and_the_same_mistake(tmp_path: Path, tiny_classifier: Path):
    places = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path), str(tiny_classifier)], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    answers = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    expected = sum(float(p.detach().double().sum()) for p in tiny("bert").parameters())
    weights, error = answers[0][0].splitlines()
    assert float(weights.split()[0]) == pytest.approx(expected)
    assert error == "found by rank 0"
