"""What a person found in a sample of the teacher's answers, in figures, and the page to mark them on."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from raydistill.report.significance import NORMAL_95

MARKS = ("good", "bad", "unclear")
STRATA = {
    "random": "any rows",
    "unsure": "rows where the teacher is least certain",
    "label": "rows where the teacher contradicts the label",
    "student": "rows where the student contradicts the teacher",
}


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score (Wilson 1927); trials is at least 1."""
    share, square = hits / trials, NORMAL_95**2
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = NORMAL_95 / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def summary_of(sample: dict[str, Any], marks: dict[int, tuple[str, str]]) -> dict[str, Any]:
    """Marks counted in all, by stratum and by the teacher's answer; shares are of the rows judged good or bad."""
    rows = [{**row, "mark": marks.get(row["row_id"], ("", ""))[0]} for row in sample["rows"]]
    strata = []
    for name, title in STRATA.items():
        if of := [row for row in rows if row["stratum"] == name]:
            strata.append({"name": name, "title": title, "of": sample["of"].get(name), **_counted(of)})
    answers = Counter(row["teacher"] for row in rows if row["mark"] == "bad")
    classes = [
        {"label": label, **_counted([row for row in rows if row["teacher"] == label])}
        for label, _ in sorted(answers.items(), key=lambda item: (-item[1], item[0]))
    ]
    return {**_counted(rows), "strata": strata, "classes": classes}


def _counted(rows: list[dict[str, Any]]) -> dict[str, Any]:
    counts = Counter(row["mark"] for row in rows)
    judged = counts["good"] + counts["bad"]
    found: dict[str, Any] = {"rows": len(rows), "judged": judged, **{mark: counts[mark] for mark in MARKS}}
    if judged:
        found |= {"bad_share": counts["bad"] / judged, "bad_ci95": list(wilson(counts["bad"], judged))}
    return found


def review_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what was found in each stratum, as text."""
    rows = []
    for one in summary["strata"]:
        share = "–"
        if one["judged"]:
            low, high = one["bad_ci95"]
            share = f"{one['bad_share']:.0%} ({low:.0%} to {high:.0%})"
        rows.append([one["title"], f"{one['rows']}", *(f"{one[mark]}" for mark in MARKS), share])
    return ["", "drawn", *MARKS, "bad, 95 % interval"], rows


def review_lines(summary: dict[str, Any]) -> list[str]:
    """What the marks say, a sentence each."""
    if not summary["judged"]:
        return [f"None of {summary['rows']} rows is marked yet."]
    lines = [f"{summary['judged']} of {summary['rows']} rows are judged, {summary['bad']} of them bad."]
    random = next(one for one in summary["strata"] if one["name"] == "random")
    if random["judged"]:
        low, high = random["bad_ci95"]
        lines.append(
            f"Of all rows that the student learns from, the teacher has {random['bad_share']:.0%} wrong (95 % interval"
            f" {low:.0%} to {high:.0%}), by the {random['judged']} judged ones of the random rows."
        )
    often = [one for one in summary["classes"] if one["bad"] > 1][:5]
    if often:
        named = ", ".join(f"{one['label'] or 'none'} ({one['bad']} of {one['judged']})" for one in often)
        lines.append(f"It was bad more than once where the teacher says {named}.")
    return lines


def review_page(name: str, sample: dict[str, Any], marks: dict[int, tuple[str, str]], summary: dict[str, Any]) -> str:
    """The page to mark rows on: no network; its script keeps the marks in the browser and saves the table."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"]))
    rows = [
        {**row, "mark": marks.get(row["row_id"], ("", ""))[0], "note": marks.get(row["row_id"], ("", ""))[1]}
        for row in sample["rows"]
    ]
    header, table = review_table(summary)
    return environment.get_template("review.html.j2").render(
        name=name, rows=rows, strata=STRATA, marks=MARKS, header=header, table=table, lines=review_lines(summary),
        columns=["row_id", "mark", "note", *(key for key in rows[0] if key not in ("row_id", "mark", "note"))],
        key=hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16],
        sample=json.dumps(rows).replace("<", "\\u003c"),
    )  # fmt: skip
