"""The page about a search: what it says, that its pictures are whole, and that nothing in it can run or call out."""

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from raydistill.report.pictures import place_values, text_of
from raydistill.report.search_page import heat_axes, in_order, render_search, search_verdict, trial_table

TEMPERATURE, ALPHA, RATE, KIND = "train.loss.temperature", "train.loss.alpha", "train.learning_rate", "train.loss.kind"


def trial(number: int, point: dict[str, Any], curve: list[float], status: str = "stopped", **more: Any) -> dict:
    return {
        "number": number, "point": point, "curve": [{"accuracy": v, "nll": 2 - v} for v in curve], "status": status,
        "reason": "", "epochs": 4, "steps": 10 * len(curve), "seconds": 1.0,
        "value": max(curve) if curve else None, "chosen_epoch": curve.index(max(curve)) + 1 if curve else None, **more,
    }  # fmt: skip


def search(trials: list[dict], **more: Any) -> dict[str, Any]:
    space = dict.fromkeys(trials[0]["point"], "some values")
    return {
        "name": "runs/one", "created": "now", "metric": "accuracy", "lower_is_better": False, "search": "grid",
        "scheduler": "asha", "seed": 3, "data_fraction": 0.2, "rows": 540, "validation_rows": 1000,
        "teacher_forwards_per_row": 1, "steps": sum(t["steps"] for t in trials), "full_steps": 40 * len(trials),
        "seconds": 12.0, "space": space, "importance": {}, "winner": 1, "trials": trials, "config": {"name": "one"},
        "environment": {"python": "3.11"}, **more,
    }  # fmt: skip


@pytest.fixture
def found() -> dict[str, Any]:
    points = [{TEMPERATURE: t, ALPHA: a} for t in (2.0, 4.0) for a in (0.5, 0.9)]
    curves = [[0.5, 0.6], [0.5, 0.7, 0.8, 0.9], [0.4], []]
    states = ["stopped", "finished", "stopped", "failed"]
    trials = [trial(n, p, c, s) for n, (p, c, s) in enumerate(zip(points, curves, states, strict=True))]
    trials[3]["reason"] = "the loss is not finite at step 3 <b>&"
    return search(trials, importance={TEMPERATURE: 0.25, ALPHA: 0.75})


def pictures_of(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_verdict_says_who_won_and_what_it_cost(found: dict[str, Any]):
    assert search_verdict(found) == [
        "Trial 1 won: validation accuracy 0.9000 with train.loss.temperature 2, train.loss.alpha 0.9.",
        "Of 4 trials 1 trained to their end, 2 were stopped early, 1 failed.",
        "They took 70 optimiser steps, 44% of what all would have taken to their end, on 20% of train (540 rows). The"
        " teacher ran 1 time for each row.",
    ]
    assert search_verdict({**found, "winner": None})[0].startswith("Of 4 trials")


def test_trials_too_close_to_tell_apart_are_named(found: dict[str, Any]):
    found["trials"][0]["value"] = 0.897
    assert search_verdict(found)[-1] == (
        "1 other trial is within three of 1,000 validation rows of it: between these the search does not decide."
    )
    found["trials"][2]["value"] = 0.898
    assert search_verdict(found)[-1].startswith("2 other trials are within three")
    found["trials"][0]["value"] = found["trials"][2]["value"] = 0.896
    assert "within three" not in search_verdict(found)[-1]


def test_the_table_has_the_winner_first_and_what_failed_last(found: dict[str, Any]):
    header, rows = trial_table(found)
    assert header == ["trial", "temperature", "alpha", "accuracy", "epoch", "state", "steps", "seconds"]
    assert [is_winner for is_winner, _ in rows] == [True, False, False, False]
    assert [cells[0] for _, cells in rows] == ["1", "0", "2", "3"]
    assert rows[0][1] == ["1", "2", "0.9", "0.9000", "4 of 4", "finished", "40", "1.0"]
    assert rows[3][1][3:6] == ["–", "– of 0", "failed: the loss is not finite at step 3 <b>&"]
    lower = search([trial(n, {RATE: 1e-3}, [v]) for n, v in enumerate([0.4, 0.2, 0.3])], lower_is_better=True)
    assert [one["number"] for one in in_order({**lower, "winner": 1})] == [1, 2, 0]


def test_the_page_is_whole_and_has_every_picture(found: dict[str, Any]):
    page = render_search(found, "train:\n  epochs: 4\n")
    whole = pictures_of(page)
    assert [svg.get("aria-label") for svg in whole] == [
        "learning curves of all trials", "settings of every trial and what it reached",
        "best value by train.loss.temperature and train.loss.alpha", "importance of each setting",
    ]  # fmt: skip
    names = [element.get("id") for svg in whole for element in svg.iter() if element.get("id")]
    assert len(names) == len(set(names))
    for svg in whole:
        inner = {element.get("id") for element in svg.iter()}
        text = ET.tostring(svg, encoding="unicode")
        assert set(re.findall(r"url\(#([^)]*)\)", text)) | set(re.findall(r'href="#([^"]*)"', text)) <= inner
        assert "currentColor" in text
        assert svg.get("height") is None
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!#|data:image/png)', page)
    assert "url(" not in re.sub(r"url\(#", "", page)
    assert "epochs: 4" in page
    assert "step 3 &lt;b&gt;&amp;" in page


def test_a_search_in_which_all_failed_has_a_page_too():
    trials = [trial(n, {RATE: 1.0}, [], "failed", reason="out of memory") for n in range(2)]
    page = render_search(search(trials, winner=None))
    assert pictures_of(page) == []
    assert "failed: out of memory" in page
    assert "The winner" not in page


def test_settings_that_are_words_or_missing_are_drawn():
    points = [{KIND: "forward_kl", RATE: 1e-3}, {KIND: "dist", RATE: 1e-3}, {KIND: None, RATE: 1e-3}]
    points.append({KIND: ["a", "list"], RATE: 1e-3})
    page = render_search(search([trial(n, p, [0.1 * n, 0.2]) for n, p in enumerate(points)]))
    texts = {element.text for svg in pictures_of(page) for element in svg.iter() if element.text}
    assert {"forward_kl", "dist", "–", "0.001"} <= {text.strip() for text in texts}


def test_values_are_placed_to_scale():
    assert place_values([2.0, 4.0, 3.0]) == ([0.0, 1.0, 0.5], [(0.0, "2"), (0.5, "3"), (1.0, "4")])
    assert place_values([1e-4, 1e-2, 1e-3])[0] == pytest.approx([0, 1, 0.5])  # logarithmic
    assert place_values([0.01, 0.97, 0.49], even=True)[0] == pytest.approx([0, 1, 0.5])  # accuracies are not
    assert place_values([7, 7]) == ([0.5, 0.5], [(0.5, "7")])
    assert place_values(["b", "a", True])[0] == [1.0, 0.5, 0.0]
    # A list of losses, or of stages, is a value too.
    assert place_values([[{"kind": "hidden_mse"}], []]) == ([0.0, 1.0], [(0.0, "hidden_mse"), (1.0, "none")])
    stages = [{"name": "soft", "epochs": 1}, {"name": "more", "loss": {"kind": "jsd", "beta": 0.25}, "batch_size": 8}]
    assert text_of(stages) == "soft (epochs 1), more (loss jsd (beta 0.25), batch_size 8)"
    assert text_of([[0, 1], [1, 3]]) == "(0, 1), (1, 3)"
    ((_, label),) = place_values([stages])[1]
    assert label == "soft (epochs 1), more (loss jsd (be…"
    many = [float(n) for n in range(20)]
    assert place_values(many)[1] == [(0.0, "0"), (1.0, "19")]


def test_the_heat_map_is_of_temperature_and_alpha_where_both_were_searched():
    points = [{RATE: r, ALPHA: a, TEMPERATURE: t, KIND: "dist"} for r, a, t in [(1e-3, 0.5, 2.0), (1e-4, 0.9, 4.0)]]
    assert heat_axes([trial(n, p, [0.1]) for n, p in enumerate(points)], list(points[0])) == (TEMPERATURE, ALPHA)
    without = [{name: p[name] for name in (RATE, KIND, ALPHA)} for p in points]
    assert heat_axes([trial(n, p, [0.1]) for n, p in enumerate(without)], list(without[0])) == (RATE, ALPHA)
    alone = [{RATE: p[RATE], KIND: "dist"} for p in points]
    assert heat_axes([trial(n, p, [0.1]) for n, p in enumerate(alone)], list(alone[0])) is None


@pytest.mark.parametrize(("trials", "temperatures"), [(9, 9), (24, 3)])
def test_sampled_pairs_are_points_and_not_a_grid_of_holes(trials: int, temperatures: int):
    points = [{TEMPERATURE: 2.0 + 0.37 * (n % temperatures), ALPHA: 0.5 + 0.014 * n} for n in range(trials)]
    page = render_search(search([trial(n, p, [0.1 * n]) for n, p in enumerate(points)]))
    (heat,) = [svg for svg in pictures_of(page) if str(svg.get("aria-label")).startswith("best value")]
    drawn = [e for e in heat.iter() if str(e.get("id")).startswith("heat-PathCollection")]
    assert len(drawn) == 1
    assert len([e for e in drawn[0].iter() if e.tag.endswith("use")]) == trials
