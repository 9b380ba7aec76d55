"""The page about a search: who won and by how much, what was spent, what each setting did, every trial."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from raydistill.report import pictures
from raydistill.report.pictures import short, text_of, words


def search_verdict(search: dict[str, Any]) -> list[str]:
    """What the search says, a sentence each.

    `search` has name, created, metric, lower_is_better, search, scheduler, seed, data_fraction, rows,
    teacher_forwards_per_row, steps, full_steps, seconds, space {setting: text}, importance {setting: share},
    winner (a trial's number or None), config, environment, and trials: number, point, status, reason, curve (metrics
    after each epoch), epochs, steps, seconds, value and chosen_epoch (None for a trial that reached nothing).
    """
    trials = search["trials"]
    counts = Counter(trial["status"] for trial in trials)
    parts = [("finished", "trained to their end"), ("stopped", "were stopped early"), ("failed", "failed"),
             ("running", "are not done")]  # fmt: skip
    told = ", ".join(f"{counts[status]} {text}" for status, text in parts if counts[status])
    lines = [
        f"Of {len(trials)} trials {told}.",
        f"They took {search['steps']:,} optimiser steps, {search['steps'] / search['full_steps']:.0%} of what all would"
        f" have taken to their end, on {search['data_fraction']:.0%} of train ({search['rows']:,} rows). The teacher"
        f" ran {search['teacher_forwards_per_row']:g} time{'s' if search['teacher_forwards_per_row'] != 1 else ''} for"
        " each row.",
    ]
    if (number := search["winner"]) is not None:
        best = next(trial for trial in trials if trial["number"] == number)
        point = ", ".join(f"{name} {text_of(value)}" for name, value in best["point"].items())
        lines.insert(
            0,
            f"Trial {number} won: validation {words(search['metric'])} {best['value']:.4f} with {point}.",
        )
        lines += _margin(search, best)
    return lines


def _margin(search: dict[str, Any], best: dict[str, Any]) -> list[str]:
    """How close the next trials are: those within what one validation row more or less would change."""
    others = [trial["value"] for trial in search["trials"] if trial["value"] is not None and trial is not best]
    if not others or search["metric"] not in ("accuracy", "agreement"):
        return []
    rows = search["validation_rows"]
    close = sum(abs(round(rows * (best["value"] - value))) <= 3 for value in others)
    if not close:
        return []
    return [
        f"{close} other trial{'s are' if close > 1 else ' is'} within three of {rows:,} validation"
        " rows of it: between these the search does not decide."
    ]


def trial_table(search: dict[str, Any]) -> tuple[list[str], list[tuple[bool, list[str]]]]:
    """Header, and of every trial whether it won and its cells; the best come first, what failed last."""
    metric, names = search["metric"], list(search["space"])
    header = ["trial", *map(short, names), words(metric), "epoch", "state", "steps", "seconds"]
    rows = [
        (
            trial["number"] == search["winner"],
            [
                str(trial["number"]),
                *(text_of(trial["point"].get(name)) for name in names),
                "–" if trial["value"] is None else f"{trial['value']:.4f}",
                f"{trial['chosen_epoch'] or '–'} of {len(trial['curve'])}",
                trial["status"] + (f": {trial['reason']}" if trial["reason"] else ""),
                f"{trial['steps']:,}",
                f"{trial['seconds']:.1f}",
            ],
        )
        for trial in in_order(search)
    ]
    return header, rows


def in_order(search: dict[str, Any]) -> list[dict[str, Any]]:
    """The trials, the winner first, then the best; those that reached nothing last."""
    sign = 1 if search["lower_is_better"] else -1

    def rank(trial: dict[str, Any]) -> tuple[bool, bool, float, int]:
        value = trial["value"]
        return trial["number"] != search["winner"], value is None, sign * (value or 0.0), trial["number"]

    return sorted(search["trials"], key=rank)


def search_pictures(search: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Title, SVG and caption of every picture that these trials allow."""
    trials, metric = search["trials"], search["metric"]
    reached = [trial for trial in trials if trial["value"] is not None]
    if not reached:
        return []
    found = [
        (
            "Learning curves",
            pictures.learning_curves(trials, metric, search["winner"]),
            "Every trial. The schedule of the learning rate does not depend on where a trial was stopped.",
        ),
        (
            "What each trial reached with which settings",
            pictures.parallel_coordinates(trials, list(search["space"]), metric),
            "A line is a trial; its colour is what it reached.",
        ),
    ]
    if pair := heat_axes(reached, list(search["space"])):
        found.append((
            f"{short(pair[0])} and {short(pair[1])}".replace("_", " ").capitalize(),
            pictures.heat_map(trials, *pair, metric, search["lower_is_better"]),
            "The best that was reached at each pair; stopped trials with what they had.",
        ))  # fmt: skip
    if search["importance"]:
        found.append((
            "Which settings matter",
            pictures.importance_bars(search["importance"]),
            "Shares of how well settings tell the best trials from the rest (PED-ANOVA, Watanabe et al. 2023,"
            " arXiv:2304.10255). Of few trials a hint, not a proof.",
        ))  # fmt: skip
    return found


def heat_axes(trials: Sequence[dict[str, Any]], settings: Sequence[str]) -> tuple[str, str] | None:
    """Temperature and alpha where both were searched, else the first two settings that are numbers; None without."""
    numbers = [
        name
        for name in settings
        if all(isinstance(v := trial["point"].get(name), int | float) and not isinstance(v, bool) for trial in trials)
        and len({trial["point"][name] for trial in trials}) > 1
    ]
    wanted = ("train.loss.temperature", "train.loss.alpha")
    if set(wanted) <= set(numbers):
        return wanted
    return (numbers[0], numbers[1]) if len(numbers) > 1 else None


def render_search(search: dict[str, Any], best_yaml: str = "") -> str:
    """The page: no scripts, no network, light and dark."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"]))
    header, rows = trial_table(search)
    points = {trial["number"]: trial["point"] for trial in search["trials"]}
    settings = [(name, text_of(value)) for name, value in points.get(search["winner"], {}).items()]
    return environment.get_template("search.html.j2").render(
        search=search, verdict=search_verdict(search), header=header, rows=rows, metric=words(search["metric"]),
        pictures=search_pictures(search), best_yaml=best_yaml, settings=settings,
        config=json.dumps(search["config"], indent=2),
    )  # fmt: skip
