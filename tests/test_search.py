"""Points, decisions and winners of a search: pure functions of settings and results, against counts made by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from raydistill.config.tune import Tune
from raydistill.search.importance import FEWEST, importance
from raydistill.search.points import next_points
from raydistill.search.rungs import decide, rungs
from raydistill.search.space import every_point, grid, point_id
from raydistill.search.trials import Trial, commonest_reason, trial_of, winner

SPACE = {
    "train.learning_rate": {"loguniform": [1e-5, 1e-3]}, "train.loss.alpha": {"uniform": [0.5, 0.9]},
    "train.loss.temperature": {"choice": [2.0, 4.0]}, "student.num_layers": {"integer": [1, 4]},
}  # fmt: skip


def tune(**settings: Any) -> Tune:
    return Tune.model_validate({"space": SPACE, "trials": 12, "search": "random", "generation": 4, **settings})


def curve(*values: float) -> tuple[dict[str, float], ...]:
    return tuple({"accuracy": value, "nll": 1 - value} for value in values)


def trials(*curves: Sequence[float], epochs: int = 8) -> list[Trial]:
    return [Trial(number, {"train.seed": number}, epochs, curve(*values)) for number, values in enumerate(curves)]


def whats(settings: Tune, found: list[Trial]) -> list[str]:
    return [decide(settings, found, trial.number).what for trial in found]


# Points.


def proposed(settings: Tune, found: Sequence[Trial] = ()) -> list[dict[str, Any]]:
    """The points of a search whose trials all end at once with a value of their learning rate."""
    known = list(found)
    while points := next_points(settings, known):
        for point in points:
            value = 1 - abs(math.log10(point["train.learning_rate"]) + 4) / 4
            known.append(Trial(len(known), point, 1, curve(value), status="finished"))
    return [dict(trial.point) for trial in known]


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_points_lie_in_the_space_and_are_all_different(search: str):
    points = proposed(tune(search=search, trials=30))
    assert len({point_id(point) for point in points}) == 30
    for point in points:
        assert list(point) == sorted(SPACE)
        assert 1e-5 <= point["train.learning_rate"] <= 1e-3
        assert 0.5 <= point["train.loss.alpha"] <= 0.9
        assert point["train.loss.temperature"] in (2.0, 4.0)
        assert point["student.num_layers"] in (1, 2, 3, 4)
        assert isinstance(point["student.num_layers"], int)
        assert json.loads(json.dumps(point)) == point


def test_numbers_are_drawn_evenly_over_their_range_or_its_logarithm():
    points = proposed(tune(trials=1000, generation=1000))
    rates = [math.log10(point["train.learning_rate"]) for point in points]
    # The mean of n even draws over a width w has a deviation of w / sqrt(12 n): 0.018 for the logarithm.
    assert sum(rates) / len(rates) == pytest.approx(-4, abs=0.08)
    assert sum(p["train.loss.alpha"] for p in points) / 1000 == pytest.approx(0.7, abs=0.016)
    assert sum(p["student.num_layers"] for p in points) / 1000 == pytest.approx(2.5, abs=0.15)


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_a_search_that_grows_or_goes_on_proposes_the_points_that_it_would_have(search: str):
    whole = proposed(tune(search=search))
    assert proposed(tune(search=search)) == whole
    fewer = proposed(tune(search=search, trials=6))
    assert fewer == whole[:6]
    known = [Trial(n, point, 1, curve(1 - abs(math.log10(point["train.learning_rate"]) + 4) / 4), status="finished")
             for n, point in enumerate(fewer)]  # fmt: skip
    assert proposed(tune(search=search), known) == whole
    assert proposed(tune(search=search, seed=1)) != whole


def test_the_order_in_which_settings_are_named_changes_nothing():
    other = Tune.model_validate({**tune().model_dump(exclude_none=True), "space": dict(reversed(SPACE.items()))})
    assert proposed(other) == proposed(tune())


def test_a_grid_is_every_combination():
    space = {"train.loss.temperature": {"choice": [2, 4, 6]}, "train.loss.alpha": {"grid": [0.5, 0.7, 0.9]}}
    settings = Tune.model_validate({"space": space, "search": "grid", "generation": 4})
    points, known = [], []
    while found := next_points(settings, known):
        assert len(found) in (4, 1)
        points += found
        known += [Trial(len(known) + n, point, 1) for n, point in enumerate(found)]
    wanted = [{"train.loss.alpha": a, "train.loss.temperature": t} for a in (0.5, 0.7, 0.9) for t in (2, 4, 6)]
    assert points == wanted


def test_a_grid_over_ranges_has_their_ends_and_middles():
    points = list(grid(tune().space))
    assert len(points) == 3 * 3 * 2 * 3 == tune().grid_size
    assert {p["train.learning_rate"] for p in points} == {1e-5, 1e-4, 1e-3}
    assert {p["train.loss.alpha"] for p in points} == {0.5, 0.7, 0.9}
    assert {p["student.num_layers"] for p in points} == {1, 2, 4}


def test_tpe_begins_with_the_grid_where_it_is_asked_to():
    settings = tune(search="tpe", seed_points="grid", trials=60)
    assert proposed(settings)[:54] == list(grid(settings.space))


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_a_small_space_is_used_up_without_a_point_twice(search: str):
    space = {"train.loss.temperature": {"choice": [2, 4, 6]}, "train.seed": {"integer": [1, 5]}}
    settings = Tune.model_validate({"space": space, "search": search, "trials": 15})
    known: list[Trial] = []
    while points := next_points(settings, known):
        known += [Trial(len(known) + n, p, 1, curve(0.5), status="finished") for n, p in enumerate(points)]
    wanted = {point_id(point) for point in every_point(settings.space)}
    assert {point_id(trial.point) for trial in known} == wanted
    assert len(known) == len(wanted) == 15


def test_tpe_waits_for_earlier_generations_and_random_does_not():
    for search, waits in {"tpe": True, "random": False}.items():
        settings = tune(search=search)
        points = next_points(settings, [])
        assert points is not None
        assert len(points) == 4
        known = [Trial(n, point, 8, curve(0.5)) for n, point in enumerate(points)]
        assert (next_points(settings, known) is None) == waits
        ended = [replace(trial, status="stopped") for trial in known]
        assert next_points(settings, ended)


def test_tpe_learns_from_results():
    # 40 trials of a value that falls with the distance from 1e-4: the last ones lie nearer to it than even draws do.
    rates = [math.log10(p["train.learning_rate"]) for p in proposed(tune(search="tpe", trials=48))]
    assert sum(abs(rate + 4) for rate in rates[-16:]) / 16 < 0.35  # even draws: 0.5 in the mean


def test_tpe_takes_failed_trials_and_choices_of_any_value():
    space = {"train.loss": {"choice": [{"kind": "dkd"}, {"alpha": 0.5}]}, "train.patience": {"choice": [None, 3]},
             "train.learning_rate": {"uniform": [0.1, 0.2]}}  # fmt: skip
    settings = Tune.model_validate({"space": space, "trials": 16, "generation": 4})
    known: list[Trial] = []
    while points := next_points(settings, known):
        for point in points:
            outcome = {"status": "failed"} if len(known) % 3 else {"status": "stopped", "curve": curve(math.nan, 0.5)}
            known.append(Trial(len(known), point, 4, **outcome))  # type: ignore[arg-type]
    assert len(known) == 16


# Decisions.


def test_rungs_grow_by_the_reduction_factor_from_the_grace():
    assert rungs(tune(reduction_factor=3), 10) == [1, 3, 9]
    assert rungs(tune(grace_epochs=2, reduction_factor=4), 8) == [2]
    assert rungs(tune(grace_epochs=2, reduction_factor=4), 9) == [2, 8]


def test_halving_keeps_the_best_of_a_generation_and_of_those_before_it():
    settings = tune(reduction_factor=2, generation=4, trials=8)
    first = trials([0.3], [0.9], [0.5], [0.7])
    assert whats(settings, first) == ["stop", "go", "stop", "go"]
    # The next generation is measured against all eight: four are better than the rest.
    both = trials([0.3], [0.9], [0.5], [0.7], [0.6], [0.8], [0.2], [0.65])
    assert whats(settings, both)[4:] == ["stop", "go", "stop", "go"]


def test_halving_waits_for_its_generation_and_not_for_later_ones():
    settings = tune(reduction_factor=2, trials=8)
    assert whats(settings, trials([0.9], [0.1], [0.8], [])) == ["wait", "wait", "wait", "go"]
    found = trials([0.9], [0.1], [0.8], [], [], [])
    found[3] = replace(found[3], status="failed", reason="x")
    assert whats(settings, found)[:3] == ["go", "stop", "stop"]  # one in two of the three that reached it


def test_of_equal_trials_the_earlier_goes_on():
    assert whats(tune(reduction_factor=2), trials(*[[0.5]] * 4)) == ["go", "go", "stop", "stop"]


@pytest.mark.parametrize("scheduler", [{"reduction_factor": 2}, {"scheduler": "screen", "keep": 2}])
def test_trials_of_equal_accuracy_are_told_apart_by_nll(scheduler: dict[str, Any]):
    found = [
        replace(t, curve=({"accuracy": 0.2, "nll": nll},))
        for t, nll in zip(trials(*[[0]] * 4), (3, 1, 4, 2), strict=True)
    ]
    assert whats(tune(**scheduler, trials=4), found) == ["stop", "go", "stop", "go"]


def test_what_is_not_a_number_is_worst_and_a_lower_nll_is_better():
    found = trials([math.nan], [0.1], [0.2], [0.3])
    assert whats(tune(reduction_factor=2), found) == ["stop", "stop", "go", "go"]
    nll = [replace(t, curve=({"nll": t.number / 10},)) for t in found]
    assert whats(tune(reduction_factor=2, metric="nll"), nll) == ["go", "go", "stop", "stop"]


def test_between_rungs_all_go_on_and_at_the_end_all_are_finished():
    settings = tune(reduction_factor=4)
    assert whats(settings, trials(*[[0.1, 0.1]] * 4)) == ["go"] * 4
    assert whats(settings, trials(*[[0.1] * 8] * 4)) == ["finished"] * 4


def test_the_median_of_earlier_generations_stops_what_lies_below():
    settings = tune(scheduler="median", generation=3, trials=6, grace_epochs=2)
    first = [[0.1, 0.2], [0.3, 0.5], [0.5, 0.6]]  # running means 0.15, 0.4, 0.55
    assert whats(settings, trials(*first, [0.3, 0.39], [0.4, 0.3], [0.9])) == ["go", "go", "go", "stop", "go", "go"]
    late = trials([0.1], [0.3, 0.5], [0.5, 0.6], [0.3, 0.39])
    assert decide(settings, late, 3).what == "wait"
    late[0] = replace(late[0], status="failed")
    assert decide(settings, late, 3).what == "go"  # two curves are too few


def test_the_screen_keeps_the_best_few_of_all():
    settings = tune(scheduler="screen", keep=2, trials=5, grace_epochs=1)
    assert whats(settings, trials([0.1], [0.5], [0.4], [0.9])) == ["wait"] * 4  # the fifth is not proposed yet
    assert whats(settings, trials([0.1], [0.5], [0.4], [0.9], [])) == ["wait"] * 4 + ["go"]
    assert whats(settings, trials([0.1], [0.5], [0.4], [0.9], [0.3])) == ["stop", "go", "stop", "go", "stop"]


def test_a_screen_lets_tpe_go_on_and_tells_it_what_was_reached_there():
    settings = tune(scheduler="screen", search="tpe", trials=16, generation=8)
    known = [
        Trial(n, point, 4, curve(n / 10)) for n, point in enumerate(next_points(settings, []) or [])
    ]  # fmt: skip
    points = next_points(settings, known)
    assert points
    later = [replace(trial, curve=curve(trial.number / 10, 0.99)) if trial.number < 3 else trial for trial in known]
    assert next_points(settings, later) == points


def test_patience_ends_a_trial_that_no_longer_gains():
    settings = tune(scheduler="none", patience=2)
    assert whats(settings, trials([0.5, 0.4], [0.5, 0.5, 0.5], [0.5, 0.4, 0.6])) == ["go", "stop", "go"]
    assert decide(settings, trials([0.5, 0.5, 0.5]), 0).reason == "patience"


# The same trials end the same way in whatever order they run.


def simulate(settings: Tune, value: Callable[[Any, int], float], at_once: int, order: random.Random) -> list[Trial]:
    """A search on a machine that trains some trials at once, an epoch of one of them at a time, by chance."""
    found: list[Trial] = []
    while True:
        if points := next_points(settings, found):
            found += [Trial(len(found) + n, point, 8) for n, point in enumerate(points)]
        decisions = {t.number: decide(settings, found, t.number) for t in found if not t.has_ended}
        for number, decision in decisions.items():
            if decision.what in ("stop", "finished"):
                status = "stopped" if decision.what == "stop" else "finished"
                found[number] = replace(found[number], status=status, reason=decision.reason)
        ready = [number for number, decision in decisions.items() if decision.what == "go"]
        if not ready and not any(decision.what in ("stop", "finished") for decision in decisions.values()):
            assert not decisions, "trials wait for each other"
            if not points:
                return found
        if ready:
            number = order.choice(ready[:at_once])
            trial = found[number]
            reached = value(trial.point, len(trial.curve) + 1)
            found[number] = replace(trial, curve=(*trial.curve, *curve(reached)))


@pytest.mark.parametrize("search", ["random", "tpe"])
@pytest.mark.parametrize("scheduler", ["asha", "median", "screen", "none"])
def test_what_a_search_finds_depends_on_no_order_and_no_number_at_once(search: str, scheduler: str):
    settings = tune(search=search, scheduler=scheduler, trials=14, patience=5, generation=4)

    def value(point: dict[str, Any], epoch: int) -> float:
        noise = random.Random(f"{point_id(point)}{epoch}").random()
        return 1 - abs(math.log10(point["train.learning_rate"]) + 4) / 4 + 0.02 * epoch + 0.1 * noise

    runs = [simulate(settings, value, at_once, random.Random(seed)) for seed, at_once in enumerate((1, 2, 3, 50, 50))]
    assert len(runs[0]) == 14
    for run in runs[1:]:
        assert run == runs[0]


def test_halving_spends_a_fraction_of_the_epochs():
    settings = tune(trials=16, generation=8, reduction_factor=4)
    found = simulate(settings, lambda point, epoch: point["train.loss.alpha"], 2, random.Random(0))
    # 8 and 8 trials have one epoch; 2 of the first 8 and at most 4 of all go on to 4, of those one or two to 8.
    epochs = sorted(len(trial.curve) for trial in found)
    assert sum(epochs) <= 16 + 4 * 3 + 2 * 4
    assert epochs[-1] == 8
    best = max(found, key=lambda trial: trial.point["train.loss.alpha"])
    assert winner(found, "accuracy", "best") == best


# Winners and records.


def test_the_winner_is_the_best_that_trained_to_its_end():
    found = trials([0.9], [0.5, 0.8], [0.7, 0.75], [0.99, 0.99], epochs=2)
    statuses = [("stopped", "rung"), ("finished", ""), ("stopped", "patience"), ("failed", "loss")]
    found = [replace(t, status=s, reason=r) for t, (s, r) in zip(found, statuses, strict=True)]  # type: ignore[arg-type]
    won = winner(found, "accuracy", "best")
    assert won is not None
    assert won.number == 1
    only_stopped = winner([found[0], found[3]], "accuracy", "best")
    assert only_stopped is not None
    assert only_stopped.number == 0
    assert winner([found[3]], "accuracy", "best") is None


def test_best_or_last_epoch_as_training_chooses():
    found = [replace(t, status="finished") for t in trials([0.9, 0.5], [0.6, 0.6], epochs=2)]
    for choose, number, epoch in (("best", 0, 1), ("last", 1, 2)):
        won = winner(found, "accuracy", choose)
        assert won is not None
        assert (won.number, won.chosen_epoch("accuracy", choose)) == (number, epoch)


def test_equal_winners_are_told_apart_by_nll_then_by_number():
    one, other = (Trial(n, {}, 1, ({"accuracy": 0.5, "nll": 0.7},), "finished") for n in range(2))
    assert winner([one, other], "accuracy", "best") == one
    surer = replace(other, curve=({"accuracy": 0.5, "nll": 0.6},))
    assert winner([one, surer], "accuracy", "best") == surer


def test_the_commonest_reason():
    reasons = ["a", "b", "b", "a", "c"]
    found = [replace(t, status="failed", reason=r) for t, r in zip(trials(*[[]] * 5), reasons, strict=True)]
    assert commonest_reason(found) == "a"


def test_a_trial_comes_back_from_its_record():
    trial = Trial(3, {"train.loss.features": [{"kind": "hidden_mse"}]}, 8, curve(0.1, 0.2), "stopped", "rung", 10, 1.5)
    assert trial_of(json.loads(json.dumps(trial.record()))) == trial
    assert [list(pair) for pair in itertools.pairwise(trial.values("accuracy"))] == [[0.1, 0.2]]


# Importance.


def test_the_setting_that_decides_is_the_important_one():
    rng = random.Random(0)
    found = []
    for number in range(60):
        point = {
            "train.learning_rate": 10 ** rng.uniform(-5, -3), "train.loss.alpha": rng.uniform(0.5, 0.9),
            "train.loss.temperature": rng.choice([2.0, 4.0]), "student.num_layers": rng.randint(1, 4),
        }  # fmt: skip
        value = 0.8 - 0.1 * abs(math.log10(point["train.learning_rate"]) + 4) + 0.001 * rng.random()
        found.append(Trial(number, point, 1, curve(value), status="finished"))
    shares = importance(tune(trials=60), found, "best")
    assert set(shares) == set(SPACE)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["train.learning_rate"] > 0.6
    stopped = [replace(trial, status="stopped") for trial in found]
    assert importance(tune(trials=60), stopped, "best") == shares
    lower = [replace(t, curve=tuple({"nll": -t.curve[0]["accuracy"]} for _ in range(1))) for t in found]
    assert importance(tune(trials=60, metric="nll"), lower, "best") == pytest.approx(shares)


def test_of_few_equal_or_failed_trials_nothing_is_said():
    points = [dict(trial) for trial in itertools.islice(proposed(tune(trials=FEWEST)), FEWEST)]
    found = [Trial(n, point, 1, curve(0.1 * n), status="finished") for n, point in enumerate(points)]
    assert importance(tune(), found, "last") != {}
    assert importance(tune(), found[1:], "last") == {}
    assert importance(tune(), [replace(found[0], status="failed"), *found[1:]], "last") == {}
    assert importance(tune(), [replace(trial, curve=curve(0.5)) for trial in found], "last") == {}
