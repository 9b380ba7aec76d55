"""Small runs that are killed or fail at their store operations, and then go on as if nothing had been.

The runs are the real stages without Ray (`faults/small_run.py`), each in a forked child. What they leave is compared,
byte by byte, with a run that nothing disturbed. Numbers such as F1 name faults of the project's list.
"""

import errno
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import DEADLINE, FOLDERS, STAGES, SmallRuns, results, row_ids

from raydistill.record.commit import MANIFEST, committed_shard, damage, read_manifest, sidecar_name
from raydistill.record.run import Run, find_run, verify
from raydistill.record.store import LocalStore
from raydistill.stages.checkpoints import Checkpoints

pytestmark = pytest.mark.timeout(1800)  # a loop over many runs; each has its own deadline


def committed(runs: SmallRuns, folder: Path, stage: str) -> dict[str, tuple[int, int]]:
    """The committed shards of a stage, whose bytes were checked, and which file each one is."""
    if stage == "train":
        return {}
    store, place = LocalStore(str(folder)), FOLDERS[stage]
    manifest = read_manifest(LocalStore(str(runs.whole)), place)
    assert manifest is not None
    found = {}
    for entry in manifest.files:
        entry_there = committed_shard(store, f"{place}/{entry.file}", manifest.fingerprint)
        if entry_there is not None:
            assert entry_there == entry
            status = (folder / place / entry.file).stat()
            found[entry.file] = (status.st_ino, status.st_mtime_ns)
    return found


def check_what_readers_see(runs: SmallRuns, folder: Path) -> None:
    """Every part is either complete and intact, or not there at all."""
    store = LocalStore(str(folder))
    for place in ("data", "teacher/cache", "student"):
        manifest = read_manifest(store, place)
        assert manifest is None or damage(store, place, manifest) == []
        assert manifest is None or manifest.files == read_manifest(LocalStore(str(runs.whole)), place).files  # type: ignore[union-attr]


def newest_checkpoint(folder: Path) -> int:
    plan = Run(LocalStore(str(folder))).plan("student")
    return 0 if plan is None else Checkpoints(LocalStore(str(folder)), "train", plan.fingerprint).newest() or 0


def went_on_from(answer: dict[str, Any]) -> int:
    return next((post["going_on_from"] for post in answer["posts"] if "going_on_from" in post), 0)


def check_going_on(runs: SmallRuns, folder: Path, stage: str) -> dict[str, Any]:
    """After a fault in this stage: nothing half-done is seen, what was committed stays, and the rest is made."""
    check_what_readers_see(runs, folder)
    kept = committed(runs, folder, stage)
    step = newest_checkpoint(folder) if stage == "train" else 0
    complete = read_manifest(LocalStore(str(folder)), "student") is not None
    answer = runs.go_on(folder, stage)
    now = committed(runs, folder, stage)
    assert {file: now[file] for file in kept} == kept, "a committed shard was written again"
    if stage == "teach":
        assert sorted(answer["scored"]) == sorted(set(now) - set(kept)), "a committed shard was scored again"
    if stage == "train" and not complete:
        assert went_on_from(answer) == step
    return answer


def test_a_run_that_nothing_disturbs_does_each_thing_once(runs):
    assert runs.run_ids == list(range(80))
    assert verify(Run(LocalStore(str(runs.whole))))[1] == []
    again = runs.run(runs.whole, *STAGES)
    assert (again["error"], again["operations"], again["scored"], again["posts"]) == (None, [], [], [])
    other = runs.folder / "other"
    runs.go_on(other, *STAGES)
    shutil.rmtree(other)


# F1, F6, F8, F10, F11: the plan, each shard, each sidecar, the manifest; each file of a checkpoint and the pointer.
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_at_an_operation_goes_on(runs, stage):
    last = len(runs.operations[stage])
    for number in range(1, last + 1, 5 if stage == "train" else 1):
        with runs.killed(stage, number) as folder:
            check_going_on(runs, folder, stage)
    runs.go_on(runs.start(stage), stage, fault=f"{last + 1}:kill")


@pytest.mark.slow
def test_a_whole_run_killed_at_any_operation_goes_on(runs):
    number = 0
    while True:
        number += 1
        folder = runs.folder / "slow" / str(number)
        folder.parent.mkdir(exist_ok=True)
        if runs.run(folder, *STAGES, fault=f"{number}:kill")["exit"] == 0:
            break
        check_what_readers_see(runs, folder)
        kept = {stage: committed(runs, folder, stage) for stage in ("prepare", "teach")}
        answer = runs.go_on(folder, *STAGES)
        for stage, files in kept.items():
            now = committed(runs, folder, stage)
            assert {file: now[file] for file in files} == files
        assert len(answer["scored"]) == 5 - len(kept["teach"])
        assert row_ids(folder) == runs.run_ids
        shutil.rmtree(folder)
    # Each of the stages alone writes config.yaml, in five operations; a whole run writes it once.
    assert number - 1 == sum(len(operations) for operations in runs.operations.values()) - 2 * 5


# R2
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_a_whole_run_killed_twice_goes_on(runs, seed):
    draw, folder = random.Random(seed), runs.folder / "twice" / str(seed)
    folder.parent.mkdir(exist_ok=True)
    last = sum(len(operations) for operations in runs.operations.values()) - 2 * 5
    first = draw.randint(1, last - 1)
    assert runs.run(folder, *STAGES, fault=f"{first}:kill")["exit"] == -9
    runs.run(folder, *STAGES, fault=f"{draw.randint(1, last - first)}:kill")
    check_what_readers_see(runs, folder)
    runs.go_on(folder, *STAGES)
    assert row_ids(folder) == runs.run_ids
    shutil.rmtree(folder)


# R2
@pytest.mark.parametrize("seed", range(10))
def test_a_run_killed_twice_goes_on(runs, seed):
    draw = random.Random(seed)
    stage = STAGES[seed % 3]
    last = len(runs.operations[stage])
    with runs.killed(stage, draw.randint(1, last)) as folder:
        before = committed(runs, folder, stage)
        runs.run(folder, stage, fault=f"{draw.randint(1, last // 2)}:kill")
        after = committed(runs, folder, stage)
        assert {file: after[file] for file in before} == before
        check_going_on(runs, folder, stage)


# F6: the shard has its name, its sidecar does not stand yet.
@pytest.mark.parametrize("stage", ["prepare", "teach"])
def test_a_shard_without_its_sidecar_is_made_again(runs, stage):
    shard = "train-00001.parquet"
    with runs.killed(stage, runs.place(stage, f"rename {sidecar_name(shard)}")) as folder:
        assert (folder / FOLDERS[stage] / shard).exists()
        assert not (folder / FOLDERS[stage] / sidecar_name(shard)).exists()
        assert list(committed(runs, folder, stage)) == ["train-00000.parquet"]
        answer = check_going_on(runs, folder, stage)
        assert stage == "prepare" or answer["scored"][0] == shard


# F7: the sidecar stands, the answer is lost and the task is done again: it finds the shard and writes nothing. Ray
# Data's own checkpoints lose the rows of such a shard in silence.
def test_a_task_that_is_repeated_keeps_its_shard(runs):
    shard = "train-00000.parquet"
    with runs.killed("teach", runs.place("teach", "rename train-00001.parquet")) as folder:
        before = results(folder)
        request = {"do": "score again", "folder": str(folder), "source": str(runs.input), "deadline": DEADLINE}
        assert runs._ask({**request, "fault": "1:kill"})["exit"] == 0
        assert shard in committed(runs, folder, "teach")
        assert results(folder) == before
        answer = runs.go_on(folder, "teach")
        assert shard not in answer["scored"]


# F8: before, at and after the manifest's rename.
@pytest.mark.parametrize("stage", ["prepare", "teach"])
@pytest.mark.parametrize(("after", "seen"), [(-2, False), (-1, False), (0, False), (1, True)])
def test_a_manifest_is_seen_whole_or_not_at_all(runs, stage, after, seen):
    with runs.killed(stage, runs.place(stage, f"rename {MANIFEST}") + after) as folder:
        assert (read_manifest(LocalStore(str(folder)), FOLDERS[stage]) is not None) == seen
        answer = check_going_on(runs, folder, stage)
        assert answer["scored"] == []


# F10, F11: between the checkpoint's rename and its pointer.
def test_a_checkpoint_whose_pointer_was_not_written_is_gone_on_from(runs):
    with runs.killed("train", runs.place("train", "rename step-00000006") + 2) as folder:
        pointer = folder / "train/checkpoints/latest.json"
        assert json.loads(pointer.read_text()) == {"step": 4}
        answer = check_going_on(runs, folder, "train")
        assert went_on_from(answer) == 6
        assert answer["warnings"] == []
        assert json.loads(pointer.read_text()) == {"step": 8}


# F17: the newest checkpoint is not what its manifest says.
@pytest.mark.parametrize("harm", ["model flipped", "optimizer flipped", "state truncated", "manifest flipped",
                                  "manifest missing", "model missing", "empty folder"])  # fmt: skip
def test_a_damaged_checkpoint_gives_way_to_the_one_before_with_one_warning(runs, harm):
    with runs.killed("train", runs.place("train", "rename step-00000008")) as folder:
        newest = folder / "train/checkpoints/step-00000006"
        name = {"model": "model.safetensors", "optimizer": "optimizer.safetensors", "state": "state.json"}.get(
            harm.split()[0], MANIFEST
        )
        path = newest / name
        if harm == "empty folder":
            shutil.rmtree(newest)
            newest.mkdir()
        elif harm.endswith("missing"):
            path.unlink()
        elif harm.endswith("truncated"):
            path.write_bytes(path.read_bytes()[:-1])
        else:
            flip(path, 8 * (path.stat().st_size - 9))
        answer = runs.go_on(folder, "train")
        assert went_on_from(answer) == 4
        (warning,) = answer["warnings"]
        assert str(newest) in warning
        assert "going on from an older checkpoint" in warning
        assert verify(Run(LocalStore(str(folder))))[1] == []


def test_a_training_whose_checkpoints_are_all_damaged_begins_again(runs):
    with runs.killed("train", runs.place("train", "rename step-00000008")) as folder:
        steps = sorted((folder / "train/checkpoints").glob("step-*"))
        for step in steps:
            flip(step / "model.safetensors", 3000)
        answer = runs.go_on(folder, "train")
        assert went_on_from(answer) == 0
        assert len(answer["warnings"]) == len(steps)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


# F15, F17: refused by name with both sums, repaired, and only that is made again.
@pytest.mark.parametrize(
    ("name", "made_again"),
    [
        ("data/train-00002.parquet", []),
        ("teacher/cache/train-00002.parquet", ["train-00002.parquet"]),
        ("teacher/cache/validation-00000.parquet", ["validation-00000.parquet"]),
        (f"data/{MANIFEST}", []),
        (f"teacher/cache/{MANIFEST}", []),
        ("data/plan.json", []),
        ("teacher/cache/plan.json", []),
    ],
)
def test_a_flipped_bit_is_refused_by_name_and_repaired(runs, name, made_again):
    folder = runs.start("train")
    shutil.copy(runs.whole / "config.yaml", folder)
    path = folder / name
    data = path.read_bytes()
    for seed in range(3):
        path.write_bytes(data)
        flip(path, random.Random(f"{name}{seed}").randrange(8 * len(data)))
        refused = runs.run(folder, *STAGES)
        assert str(path) in refused["error"]
        assert "errno" not in refused
        assert "\n" not in refused["error"]
        assert "--repair" in refused["error"]
        assert path.suffix == ".json" or refused["error"].count("sha256") == 1
        assert not (folder / "student").exists()
    _, findings = verify(find_run(str(folder)), repair=True)
    assert [finding.file for finding in findings] == [name]
    answer = runs.go_on(folder, *STAGES)
    assert answer["scored"] == made_again
    shutil.rmtree(folder)


# F12, F18: an error in the place of a kill. It is told with its path, nothing half-done is seen, and the run goes on.
@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EACCES"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_store_operation_that_fails_is_told_and_the_run_goes_on(runs, stage, error):
    last = len(runs.operations[stage])
    for number in random.Random(f"{stage}{error}").sample(range(1, last + 1), 2 if stage == "train" else 4):
        folder = runs.start(stage)
        failed = runs.run(folder, stage, fault=f"{number}:{error}")
        assert failed["error"], f"{stage} passed operation {number}"
        assert str(folder) in failed["error"]
        assert failed.get("errno", getattr(errno, error)) == getattr(errno, error)
        check_going_on(runs, folder, stage)
        shutil.rmtree(folder)


# F12: a real write that ends in the middle, as on a full disk; Arrow, safetensors and Python each fail in their way.
@pytest.mark.parametrize(
    ("stage", "place", "file_bytes", "file"),
    [
        ("prepare", "rename train-00000.parquet", 1600, "data/.train-00000.parquet."),
        ("teach", "rename train-00000.parquet", 450, "teacher/cache/.train-00000.parquet."),
        ("train", "rename step-00000003", 20_000, "train/checkpoints/.step-00000003."),
    ],
)
def test_a_write_that_ends_in_the_middle_is_told_with_its_file(runs, stage, place, file_bytes, file):
    with runs.killed(stage, runs.place(stage, place)) as folder:
        failed = runs.run(folder, stage, file_bytes=file_bytes)
        # A worker's problem comes back as its one line, the driver's own as the error itself.
        assert failed.get("errno", errno.EFBIG) == errno.EFBIG
        assert f"{folder}/{file}" in failed["error"]
        check_going_on(runs, folder, stage)


# F25
def test_an_odd_environment_changes_nothing(runs):
    folder = runs.folder / "odd"
    environment = {"TZ": "Pacific/Kiritimati", "HOME": "/nonexistent", "LC_ALL": "C", "COLUMNS": "1"}
    runs.go_on(folder, *STAGES, umask=0o077, lost_folder=True, environment=environment)
    assert (folder / "data/MANIFEST.json").stat().st_mode & 0o077 == 0
    shutil.rmtree(folder)


# F27: what determines the result is refused by name; what only changes speed is taken, and changes nothing.
@pytest.mark.parametrize(
    ("stage", "setting", "value", "was"),
    [
        ("prepare", "data.split_seed", 1, "data.split_seed: was made with 0, now asked for 1"),
        ("prepare", "data.shard_rows", 15, "data.shard_rows: was made with 16, now asked for 15"),
        ("teach", "data.max_length", 40, "data.max_length: was made with 48, now asked for 40"),
        ("teach", "teacher.codec", "dense-float16", "codec: was made with dense-int8, now asked for dense-float16"),
        ("teach", "teacher.model", "other", "teacher.weights_sha256: was made with "),
        ("train", "train.seed", 7, "train.seed: was made with 0, now asked for 7"),
        ("train", "train.loss.temperature", 2.0, "temperature: was made with 4.0, now asked for 2.0"),
        ("teach", "teacher.tokens_per_batch", 64, None),
        ("train", "train.checkpoint_every", 1, None),
        ("train", "train.log_every", 3, None),
    ],
)
def test_settings_changed_after_a_kill(runs, stage, setting, value, was):
    if value == "other":
        value = str(runs.folder / "other-teacher")
        shutil.copytree(runs.input / "teacher", value, dirs_exist_ok=True)
        flip(Path(value) / "model.safetensors", 8 * 30_000)
    with runs.killed(stage, len(runs.operations[stage]) // 2) as folder:
        if was is None:
            changed = runs.run(folder, stage, changes={setting: value})
            assert changed["error"] is None
            mine, other = results(folder), runs.expected
            assert {n: d for n, d in mine.items() if n.startswith(("teacher", "student"))} == {
                n: d for n, d in other.items() if n.startswith(("teacher", "student")) and n in mine
            }
            assert stage == "train" or set(mine) <= set(other)
            return
        before = results(folder)
        changed = runs.run(folder, stage, changes={setting: value})
        assert was in changed["error"]
        assert str(folder / FOLDERS[stage]) in changed["error"]
        assert "\n" not in changed["error"]
        assert results(folder) == before
        check_going_on(runs, folder, stage)


# F28
def test_input_changed_after_a_kill_is_refused(runs):
    source = runs.input / "train.csv"
    text = source.read_text()
    with runs.killed("prepare", 40) as folder:
        source.write_text(text.replace(" ", "  ", 1))
        try:
            changed = runs.run(folder, "prepare")
        finally:
            source.write_text(text)
        assert f"{folder}/data: sources_sha256.train: was made with" in changed["error"]
        check_going_on(runs, folder, "prepare")
