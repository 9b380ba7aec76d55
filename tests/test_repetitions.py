"""One training with several seeds: each one's student and control, and what the report says of all of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from run_files import equal, manifest, student_weights
from safetensors.numpy import load_file
from scipy import stats
from small_runs import SmallRuns

from raydistill.config.train import Stage, Train
from raydistill.record.run import Run, find_run, is_aside, verify
from raydistill.record.store import LocalStore
from raydistill.report.over_seeds import mean_interval, over_seeds, seeds_verdict, t_quantile
from raydistill.report.page import verdict
from raydistill.stages.status import standings

pytestmark = pytest.mark.xdist_group("small_runs")
EVALUATED = {"evaluate.latency_requests": 16, "evaluate.bootstrap": 100}
SEEDS = {"train.seeds": 3, "train.epochs": 1, **EVALUATED}


@pytest.mark.parametrize("degrees", [*range(1, 13), 29, 30, 98, 99])
def test_the_quantile_is_students(degrees: int):
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)


def test_the_interval_is_that_of_the_mean():
    values = [0.91, 0.94, 0.90, 0.935]
    expected = stats.t.interval(0.95, 3, stats.tmean(values), stats.sem(values))
    found = mean_interval(values)
    assert found["mean"] == pytest.approx(0.92125)
    assert found["ci95"] == pytest.approx(expected)
    assert mean_interval([0.5, 0.5])["ci95"] == (0.5, 0.5)


def test_a_figure_that_one_training_lacks_has_no_mean():
    found = over_seeds([{"seed": 0, "a": 1.0, "b": None}, {"seed": 1, "a": 2.0, "b": 3.0}])
    assert set(found["mean"]) == {"a"}
    (line,) = seeds_verdict({"seeds": found}, {"a": ("height", "{:.1f}".format), "b": ("width", str)})
    assert "Trained with 2 seeds (0, 1), mean and 95 % interval over them: height 1.5 (-4.9 to 7.9)." in line
    assert seeds_verdict({}, {}) == []


def test_every_seed_of_a_repetition_is_higher():
    train = Train(seed=2**32 - 2, stages=(Stage(name="a", seed=0), Stage(name="b")), seeds=4)
    third = train.repeated(3)
    assert third.seed == 1  # after the highest one comes 0
    assert [third.of_stage(0).seed, third.of_stage(1).seed] == [3, 2]
    assert third.seeds == 1
    assert train.repeated(0).of_stage(0).seed == 0


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report/report.json").read_text())


@pytest.fixture(scope="module")
def repeated(runs: SmallRuns) -> tuple[Path, dict[str, Any]]:
    folder = runs.start("train")
    answer = runs.run(folder, "train", "evaluate", changes=SEEDS)
    assert answer["error"] is None, answer["error"]
    return folder, answer


@pytest.fixture(scope="module")
def alone(runs: SmallRuns) -> dict[int, Path]:
    """Runs of their own with the first two seeds."""
    found = {}
    for seed in (0, 1):
        found[seed] = runs.start("train")
        changes = {"train.epochs": 1, "train.seed": seed, **EVALUATED}
        assert runs.run(found[seed], "train", "evaluate", changes=changes)["error"] is None
    return found


def test_the_student_that_is_kept_is_the_first_seeds(repeated, alone):
    folder, _ = repeated
    assert equal(student_weights(folder), student_weights(alone[0]))
    assert (folder / "train/plan.json").read_bytes() == (alone[0] / "train/plan.json").read_bytes()
    assert manifest(folder, "student").fingerprint == manifest(alone[0], "student").fingerprint
    assert report_of(folder)["student"]["accuracy"] == report_of(alone[0])["student"]["accuracy"]


def test_a_repetition_is_the_training_with_that_seed(repeated, alone):
    folder, _ = repeated
    for part in ("student", "control/model"):
        ours, theirs = (load_file(place / part / "model.safetensors") for place in (folder / "seeds/1", alone[1]))
        assert equal(ours, theirs)
        assert not equal(theirs, load_file(alone[0] / part / "model.safetensors"))
    assert sorted(path.name for path in (folder / "seeds").iterdir()) == ["1", "2"]
    assert (folder / "seeds/1/train/metrics.jsonl").exists()


def test_the_report_has_every_training_and_their_mean(repeated, alone):
    found, (folder, _) = report_of(repeated[0])["seeds"], repeated
    assert [training["seed"] for training in found["trainings"]] == [0, 1, 2]
    for training, other in zip(found["trainings"], (report_of(alone[seed]) for seed in (0, 1)), strict=False):
        assert training["accuracy"] == other["student"]["accuracy"]
        assert training["control"] == other["control"]["accuracy"]
        assert training["agreement"] == other["agreement"]
        assert training["retention"] == pytest.approx(other["retention"])
        assert training["gain_over_control"] == pytest.approx(other["gain_over_control"])
    for name, one in found["mean"].items():
        values = [training[name] for training in found["trainings"]]
        assert one["mean"] == pytest.approx(sum(values) / 3)
        assert one["ci95"][1] - one["mean"] == pytest.approx(4.302653 * stats.sem(values))
    assert set(found["mean"]) == {"accuracy", "agreement", "retention", "control", "gain_over_control"}
    page, mean = (folder / "report/report.html").read_text(), found["mean"]["accuracy"]
    assert "How much is chance" in page
    assert f"<td>mean</td><td>{mean['mean']:.2%}</td>" in page
    lines = [line for line in verdict(report_of(folder)) if line.startswith("Trained with 3 seeds (0, 1, 2)")]
    assert len(lines) == 1
    assert lines[0].endswith("The student that is kept is that of seed 0.")
    assert "seeds" not in report_of(alone[0])


def test_a_second_run_status_verify_and_the_fingerprints_know_them(runs: SmallRuns, repeated):
    folder, _ = repeated
    again = runs.run(folder, "train", "evaluate", changes=SEEDS)
    assert again["posts"] == []
    assert "seeds/2/control: complete" in " ".join(again["said"])
    run = find_run(str(folder))
    config = json.loads((folder / "report/report.json").read_text())["config"]
    assert config["train"]["seeds"] == 3
    assert verify(run)[1] == []
    fingerprints = report_of(folder)["fingerprints"]
    assert {"seeds/1/student", "seeds/2/control"} < set(fingerprints)


def test_status_asks_for_the_trainings_that_are_missing(runs: SmallRuns, alone, repeated):
    from raydistill.config.file import load_config

    config = load_config(repeated[0] / "config.yaml")
    states = {one.part: (one.stage, one.state) for one in standings(Run(LocalStore(str(repeated[0]))), config)}
    assert states["seeds/2/student"] == ("train", "complete")
    assert states["seeds/1/control"] == ("evaluate", "complete")
    missing = {one.part: one.state for one in standings(Run(LocalStore(str(alone[0]))), config)}
    assert missing["student"] == "complete"
    assert missing["seeds/1/student"] == "not begun"


def test_more_seeds_can_be_asked_for_later(runs: SmallRuns, repeated):
    folder = runs.start("train")
    assert runs.run(folder, "train", changes={**SEEDS, "train.seeds": 1})["error"] is None
    more = {**SEEDS, "train.seeds": 2}
    refused = runs.run(folder, "evaluate", changes=more)["error"]
    assert "seeds/1/student: is not complete. Run `raydistill train` with its config first" in refused
    answer = runs.run(folder, "train", changes=more)
    assert answer["error"] is None
    assert any(line.startswith("student: complete") for line in answer["said"])
    place = "seeds/1/student/model.safetensors"
    assert equal(load_file(folder / place), load_file(repeated[0] / place))


def test_a_training_that_was_killed_goes_on_within_its_seed(runs: SmallRuns, repeated):
    expected, answer = repeated
    published = [number for number, name in enumerate(answer["operations"]) if name == "rename student"]
    folder, changes = runs.start("train"), {**SEEDS, "train.seeds": 2}
    number = sum(published[:2]) // 2 + 1  # between the first student and the second one
    assert runs.run(folder, "train", changes=changes, fault=f"{number}:kill") == {"exit": -9}
    assert (folder / "student").exists()
    assert not (folder / "seeds/1/student").exists()
    assert runs.run(folder, "train", changes=changes)["error"] is None
    for part in ("student", "seeds/1/student"):
        assert equal(*(load_file(place / part / "model.safetensors") for place in (folder, expected)))


def test_redo_keeps_them_all_aside(runs: SmallRuns):
    folder = runs.start("train")
    changes = {"train.seeds": 2, "train.epochs": 1}
    assert runs.run(folder, "train", changes=changes)["error"] is None
    before = load_file(folder / "seeds/1/student/model.safetensors")
    hotter = changes | {"train.learning_rate": 5e-3}
    assert "train.learning_rate: was made with 0.001" in runs.run(folder, "train", changes=hotter)["error"]
    assert runs.run(folder, "train", changes=hotter, redo="train")["error"] is None
    assert equal(before, load_file(folder / "seeds/1/student.1/model.safetensors"))
    assert not equal(before, load_file(folder / "seeds/1/student/model.safetensors"))
    assert is_aside("seeds/1/student.1/model.safetensors")
    assert is_aside("seeds/1/control/train.2/plan.json")
    assert not is_aside("seeds/1/student/model.safetensors")


def test_a_report_over_more_seeds_keeps_the_controls_that_stand(runs: SmallRuns):
    # It took all of them aside and trained them again, before.
    folder, changes = runs.start("train"), {"train.epochs": 1}
    assert runs.run(folder, "train", "evaluate", changes=changes)["error"] is None
    made = (folder / "control/model/MANIFEST.json").read_bytes()
    more = changes | {"train.seeds": 2}
    assert runs.run(folder, "train", changes=more)["error"] is None
    refused = runs.run(folder, "evaluate", changes=more)["error"]
    assert "report: seeds: was made with" in refused
    answer = runs.run(folder, "evaluate", changes=more, redo="evaluate")
    assert answer["error"] is None, answer["error"]
    assert (folder / "control/model/MANIFEST.json").read_bytes() == made
    assert (folder / "seeds/1/control/model/MANIFEST.json").exists()
    assert not (folder / "control/model.1").exists()
    assert (folder / "report.1/report.json").exists()
    assert len(report_of(folder)["seeds"]["trainings"]) == 2


def test_a_student_whose_start_needs_rows_gives_it_to_its_control(runs: SmallRuns):
    folder = runs.start("train")
    changes = {**SEEDS, "train.seeds": 2, "student": {"init": "teacher_layers", "layers": [1], "trim_vocabulary": True}}
    assert runs.run(folder, "train", "evaluate", changes=changes)["error"] is None
    assert (folder / "seeds/1/train/start").exists()
    assert not (folder / "seeds/1/control/train/start").exists()
    starts = [json.loads((folder / place / "start/MANIFEST.json").read_text()) for place in ("train", "seeds/1/train")]
    assert starts[0]["fingerprint"] != starts[1]["fingerprint"]


def test_language_models_are_repeated_too(language_runs: SmallRuns):
    changes = {"train.epochs": 1, "evaluate.samples": 0}
    alone, folder = language_runs.start("train"), language_runs.start("train")
    assert language_runs.run(alone, "train", "evaluate", changes={**changes, "train.seed": 1})["error"] is None
    answer = language_runs.run(folder, "train", "evaluate", changes={**changes, "train.seeds": 2})
    assert answer["error"] is None, answer["error"]
    found, other = report_of(folder)["seeds"], report_of(alone)
    assert [training["seed"] for training in found["trainings"]] == [0, 1]
    second = found["trainings"][1]
    assert second["perplexity"] == pytest.approx(other["student"]["perplexity"], rel=1e-6)
    assert second["control"] == pytest.approx(other["control"]["perplexity"], rel=1e-6)
    assert second["retention"] == pytest.approx(other["retention"], rel=1e-6)
    assert second["gain_over_control"] == pytest.approx(other["gain_over_control"], rel=1e-4)
    assert "How much is chance" in (folder / "report/report.html").read_text()
    assert any(line.startswith("Trained with 2 seeds (0, 1)") for line in verdict(report_of(folder)))


@pytest.mark.parametrize("value", [0, 101, True, "many"])
def test_a_count_that_makes_no_sense_is_refused(runs: SmallRuns, value: Any):
    message = runs.run(runs.start("train"), "train", changes={"train.seeds": value})["error"]
    assert message.startswith("small run: train.seeds: ")
