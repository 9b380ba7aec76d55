"""`tune`: what a search space may be, each mistake in one line, and the point of a space as a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raydistill.config.file import load_config, parse_yaml, to_yaml, validate
from raydistill.config.points import with_point
from raydistill.config.run import Config
from raydistill.config.section import identity
from raydistill.errors import UserError

SPACE = {"train.learning_rate": {"loguniform": [1e-5, 1e-3]}, "train.loss.temperature": {"choice": [2, 4.0]}}


def config(tune: dict[str, Any], **sections: Any) -> Config:
    tree = {
        "name": "a", "data": {"train": "a.csv", "test": "b.csv"}, "teacher": {"model": "t"}, "tune": tune, **sections
    }  # fmt: skip
    return validate(tree, {}, "c.yaml")


def refusal(tune: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(UserError) as caught:
        config(tune, **sections)
    return str(caught.value)


def test_a_space_is_read_and_written_back():
    found = config({"space": SPACE, "trials": 5})
    assert found.tune is not None
    assert found.tune.space["train.loss.temperature"].values == (2, 4.0)
    assert found.tune.size is None
    assert found.tune.num_trials == 5
    again = validate(parse_yaml(to_yaml(found), "again")[0], {}, "again")
    assert again == found


@pytest.mark.parametrize(
    ("tune", "train", "epochs"),
    [
        ({}, {"epochs": 10, "warmup": 0.1}, 2),  # one epoch of warm-up
        ({}, {"epochs": 11, "warmup": 0.1}, 3),
        ({}, {"epochs": 8, "warmup": 0.0}, 1),
        ({}, {"epochs": 2, "warmup": 0.9}, 1),  # the last epoch decides nothing
        ({"space": SPACE | {"train.warmup": {"uniform": [0.0, 0.3]}}}, {"epochs": 10}, 6),
        ({"space": SPACE | {"train.epochs": {"choice": [4, 20]}}}, {}, 3),
        ({"grace_epochs": 1}, {"epochs": 10, "warmup": 0.1}, 1),
        ({"scheduler": "none"}, {"epochs": 10, "warmup": 0.1}, None),
    ],
)
def test_the_first_decision_comes_when_half_the_steps_were_no_warm_up(
    tune: dict[str, Any], train: dict[str, Any], epochs: int | None
):
    found = config({"space": SPACE, "trials": 5, **tune}, train=train)
    assert found.tune is not None
    assert found.tune.grace_epochs == epochs
    assert validate(parse_yaml(to_yaml(found), "again")[0], {}, "again") == found


@pytest.mark.parametrize("asked", ["auto", True, False])
def test_fused_is_auto_or_a_yes_or_a_no_and_changes_no_search_that_did_not_ask(asked: bool | str):
    found = config({"space": SPACE, "trials": 5, "fused": asked}).tune
    assert found is not None
    assert found.fused is asked or found.fused == asked == "auto"
    assert ("fused" in identity(found)) == (asked != "auto")
    assert "fused_members" not in identity(found)


def test_the_command_line_writes_a_space_in_sections(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("name: a\ndata: {train: a.csv, test: b.csv}\nteacher: {model: t}\ntune: {space: {}, trials: 3}\n")
    found = load_config(path, ["tune.space.train.loss.alpha={uniform: [0.5, 0.9]}"])
    assert found.tune is not None
    assert found.tune.space["train.loss.alpha"].ends == (0.5, 0.9)


def test_a_point_takes_the_place_of_the_settings_that_it_names():
    found = config({"space": SPACE, "trials": 2}, train={"epochs": 3, "learning_rate": 1e-4})
    point = {"train.learning_rate": 3e-4, "train.loss.temperature": 2}
    made = with_point(found, point)
    assert made.tune is None
    assert (made.train.learning_rate, made.train.loss.temperature, made.train.epochs) == (3e-4, 2.0, 3)
    assert made.train.loss.alpha == found.train.loss.alpha
    assert made.data == found.data


def test_a_point_may_be_a_section_or_lead_into_a_list():
    found = config(
        {
            "space": {"train.loss": {"choice": [{"kind": "logit_mse"}, {"temperature": 2.0}]}}, "search": "grid"
        },
        train={"stages": [{"name": "one"}, {"name": "two"}]},
    )  # fmt: skip
    assert with_point(found, {"train.loss": {"kind": "logit_mse"}}).train.loss.kind == "logit_mse"
    stages = with_point(found, {"train.stages.1.epochs": 7}).train.stages
    assert stages is not None
    assert [stage.epochs for stage in stages] == [None, 7]


def test_a_point_without_features_takes_none_from_the_cache():
    features = [{"kind": "hidden_mse"}]
    found = config(
        {"space": {"train.loss.features": {"choice": [[], features]}}, "search": "grid"},
        train={"loss": {"features": features, "features_from": "cache"}},
    )
    assert with_point(found, {"train.loss.features": []}).train.loss.features_from == "teacher"
    assert with_point(found, {"train.loss.features": features}).train.loss.features_from == "cache"


def test_what_changes_speed_alone_stays_out_of_the_fingerprint():
    one = config({"space": SPACE, "trials": 5})
    other = config({"space": dict(reversed(SPACE.items())), "trials": 9, "time_budget": 60, "max_concurrent": 2})
    different = config({"space": SPACE, "trials": 5, "seed": 1})
    assert one.tune
    assert other.tune
    assert different.tune
    assert identity(one.tune) == identity(other.tune)
    assert identity(one.tune) != identity(different.tune)


LEARNING_RATE = "tune.space.train.learning_rate: "
GRID = {"search": "grid"}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("nothing", {}, "tune.space: is missing"),
    ("an empty space", {"space": {}}, "tune.space: is empty. Name a setting"),
    ("an unknown setting", {"space": {"train.lerning_rate": {"choice": [1e-3]}}, "trials": 1},
     "tune.space.train.lerning_rate: unknown setting. Did you mean learning_rate?"),
    ("an unknown section", {"space": {"data.max_length": {"choice": [64]}}, "trials": 1},
     "data.max_length: a search is over settings of train and student"),
    ("a section alone", {"space": {"train": {"choice": [{}]}}, "trials": 1}, "train: a search is over settings of"),
    ("a setting within another", {"space": {"train.loss": {"choice": [{}]}, "train.loss.alpha": {"choice": [1]}}},
     "train.loss.alpha: stands within train.loss, which is searched too"),
    ("min above max", {"space": {"train.learning_rate": {"uniform": [0.1, 0.01]}}, "trials": 1},
     f"{LEARNING_RATE}uniform goes from 0.1 to 0.01: the first must be below the second"),
    ("the log of zero", {"space": {"train.learning_rate": {"loguniform": [0, 0.01]}}, "trials": 1},
     f"{LEARNING_RATE}loguniform begins at 0, which has no logarithm"),
    ("two kinds", {"space": {"train.learning_rate": {"uniform": [0.1, 0.2], "choice": [1]}}, "trials": 1},
     f"{LEARNING_RATE}takes one of choice, grid, uniform, loguniform, integer, found choice and uniform"),
    ("no kind", {"space": {"train.learning_rate": {}}, "trials": 1}, "found none"),
    ("an unknown kind", {"space": {"train.learning_rate": {"choices": [1]}}, "trials": 1},
     "tune.space.train.learning_rate.choices: unknown setting. Did you mean choice?"),
    ("no values", {"space": {"train.learning_rate": {"choice": []}}, "trials": 1}, f"{LEARNING_RATE}choice is empty"),
    ("a value twice", {"space": {"train.seed": {"choice": [1, 2, 1]}}, "trials": 1}, "choice holds 1 twice"),
    ("a value out of bounds", {"space": {"train.learning_rate": {"choice": [1e-3, -1]}}, "trials": 1},
     f"{LEARNING_RATE}found -1 (number); it should be greater than 0"),
    ("an end out of bounds", {"space": {"train.loss.alpha": {"uniform": [0.5, 1.5]}}, "trials": 1},
     "tune.space.train.loss.alpha: found 1.5 (number); it should be less than or equal to 1"),
    ("half a row", {"space": {"train.batch_size": {"uniform": [8, 32.5]}}, "trials": 1},
     "tune.space.train.batch_size: found 32.5"),
    ("a word", {"space": {"train.loss.kind": {"choice": ["forward_kl", "kl"]}}, "trials": 1},
     "tune.space.train.loss.kind: found 'kl' (text)"),
    ("an impossible combination",
     {"space": {"train.loss.kind": {"choice": ["jsd", "dkd"]}, "train.loss.beta": {"choice": [0.5]}}, **GRID},
     "tune.space: train.loss.kind='dkd', train.loss.beta=0.5: train.loss: beta means nothing with kind: dkd"),
    ("what changes speed alone", {"space": {"train.workers": {"choice": [1, 2]}}, **GRID},
     "tune.space.train.workers: changes speed alone"),
    ("a secret", {"space": {"student.model": {"choice": ["hf_abcdefghijklmnopqrst"]}}, "trials": 1},
     "tune.space.student.model.choice.0: looks like a secret"),
    ("a stage that is not there", {"space": {"train.stages.0.epochs": {"choice": [1]}}, "trials": 1},
     "tune.space.train.stages.0.epochs: 0 is a place in a list, and there is none"),
    ("a grid of a range", {"space": {"train.loss.alpha": {"uniform": [0.5, 0.9]}}, **GRID},
     "space.train.loss.alpha is a range and search: grid takes choices"),
    ("no end", {"space": SPACE}, "tune: trials is missing, and search: tpe would never end"),
    ("more trials than points", {"space": {"train.seed": {"integer": [1, 3]}}, "trials": 4},
     "trials: found 4, the space has 3 points"),
    ("too large a grid", {"space": {"train.seed": {"choice": list(range(200))},
                                    "train.epochs": {"choice": list(range(1, 101))}}, **GRID},
     "the grid has 20,000 points, the most is 10,000"),
    ("seed points of another search", {"space": SPACE, "trials": 9, "search": "random", "seed_points": "grid"},
     "seed_points means nothing with search: random"),
    ("more seed points than trials", {"space": SPACE, "trials": 5, "seed_points": "grid"},
     "seed_points: the grid has 6 points, trials are 5"),
    ("a setting of another scheduler", {"space": SPACE, "trials": 5, "keep": 2},
     "keep means nothing with scheduler: asha"),
    ("no epoch to stop at", {"space": SPACE, "trials": 5, "grace_epochs": 10},
     "tune.grace_epochs: found 10, a trial has 10 epochs"),
    ("KL as the metric", {"space": SPACE, "trials": 5, "metric": "kl"}, "tune.metric: found 'kl'"),
    ("micro F1 of one label", {"space": SPACE, "trials": 5, "metric": "micro_f1"}, "tune.metric: micro_f1 is accuracy"),
    ("no rows", {"space": SPACE, "trials": 5, "data_fraction": 0}, "tune.data_fraction: found 0"),
    ("neither fused nor not", {"space": SPACE, "trials": 5, "fused": "maybe"},
     "tune.fused: found 'maybe' (text); it should be auto, true or false"),
    ("a group of one", {"space": SPACE, "trials": 5, "fused_members": 1}, "tune.fused_members: found 1"),
    ("a group of more than a generation", {"space": SPACE, "trials": 5, "fused_members": 16},
     "fused_members: found 16, a group is of one generation, which has 8 trials. Lower it, or raise generation"),
    ("groups of trials that are alone", {"space": SPACE, "trials": 5, "fused_members": 4, "fused": False},
     "fused_members means nothing with fused: false"),
]  # fmt: skip


@pytest.mark.parametrize(("tune", "part"), [pytest.param(tune, part, id=name) for name, tune, part in CASES])
def test_a_mistake_is_one_line_that_names_the_setting(tune: dict[str, Any], part: str):
    message = refusal(tune)
    assert part in message
    assert "\n" not in message


def test_a_mistake_names_the_line_of_the_setting(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: a\ndata: {train: a.csv, test: b.csv}\nteacher: {model: t}\ntune:\n  trials: 2\n  space:\n"
        "    train.loss.alpha:\n      uniform: [0.5, 2]\n"
    )
    with pytest.raises(UserError, match=r"c\.yaml:7: tune\.space\.train\.loss\.alpha: found 2"):
        load_config(path)


def test_a_space_with_many_corners_is_checked_by_pairs():
    # 12 settings of 2 values each: 4,096 corners. The pair that does not go together is found.
    names = [
        "learning_rate", "weight_decay", "warmup", "clip", "loss.alpha", "loss.temperature", "loss.label_smoothing",
        "seed", "epochs", "batch_size",
    ]  # fmt: skip
    space: dict[str, Any] = {f"train.{name}": {"choice": [2, 3]} for name in names[7:]}
    space |= {f"train.{name}": {"choice": [0.1, 0.2]} for name in names[:7]}
    space |= {"train.loss.kind": {"choice": ["forward_kl", "jsd"]}, "train.schedule": {"choice": ["cosine", "linear"]}}
    assert config({"space": space, "trials": 5}).tune
    space["train.loss.beta"] = {"choice": [0.1, 0.2]}
    assert "beta means nothing with kind: forward_kl" in refusal({"space": space, "trials": 5})
