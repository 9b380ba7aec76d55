"""The report for people: rows of a table, a verdict in words, and one self-contained HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from raydistill.report.language_page import language_table, language_verdict, render_language

MODELS = ("teacher", "student", "control")


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison, as text."""
    if report["task"] == "causal_lm":
        return language_table(report)
    models = [name for name in MODELS if report.get(name)]
    header = ["", *models]
    lines = [
        ("accuracy" if quality_of(report) == "accuracy" else "all labels right", "accuracy", "{:.2%}"),
        ("micro F1", "micro_f1", "{:.2%}"),
        ("macro F1", "macro_f1", "{:.2%}"),
        ("agreement with the teacher", "agreement", "{:.2%}"),
        ("NLL, nats", "nll", "{:.3f}"),
        ("calibration error", "ece", "{:.2%}"),
        ("calibration error, scaled", "ece_scaled", "{:.2%}"),
        ("parameters", "parameters", "{:,}"),
        ("weights, MB", "size_bytes", "{:.1f}"),
        ("latency p50, ms", "latency_ms_p50", "{:.2f}"),
        ("latency p90, ms", "latency_ms_p90", "{:.2f}"),
        ("rows/s in batches", "rows_per_second", "{:,.0f}"),
    ]
    rows = []
    for title, key, form in lines:
        if key not in report["teacher"]:
            continue
        values = [report[name][key] / 1e6 if key == "size_bytes" else report[name][key] for name in models]
        rows.append([title, *(form.format(value) for value in values)])
    return header, rows


def quality_of(report: dict[str, Any]) -> str:
    """What retention and gain are counted in: where rows have sets of labels, micro F1."""
    return "micro F1" if report["task"] == "multi_label" else "accuracy"


def verdict(report: dict[str, Any]) -> list[str]:
    """What the figures say, a sentence each."""
    if report["task"] == "causal_lm":
        return language_verdict(report)
    teacher, student = report["teacher"], report["student"]
    if report["retention"] is None:
        return ["The teacher is right on no test row, so there is nothing that a student could keep."]
    low, high = report["retention_ci95"]
    smaller = teacher["parameters"] / student["parameters"]
    faster = teacher["latency_ms_p50"] / student["latency_ms_p50"]
    lines = [
        f"The student keeps {report['retention']:.1%} of the teacher's {quality_of(report)}"
        f" (95 % interval {low:.1%} to {high:.1%}, {report['test_rows']:,} test rows).",
        f"It has {smaller:.1f} times fewer parameters and answers a single request {faster:.1f} times as fast.",
    ]
    if report.get("control"):
        low, high = report["gain_over_control_ci95"]
        shown = "more" if low > 0 else "not shown to be more"
        lines.append(
            f"Learning from the teacher brought {report['gain_over_control'] * 100:+.2f} points over the same student"
            " without it"
            f" (95 % interval {low * 100:+.2f} to {high * 100:+.2f}: {shown} than chance)."
        )
        if report["gap_closed"] is not None:
            lines.append(f"That closes {report['gap_closed']:.0%} of the gap between control and teacher.")
    return lines + teacher_notes(report)


def teacher_notes(report: dict[str, Any]) -> list[str]:
    """What was done to the teacher's outputs before anyone learned from them, a sentence each."""
    notes: list[str] = []
    if found := report.get("teacher_members"):
        alone = ", ".join(f"{member['accuracy']:.2%}" for member in found)
        notes.append(
            f"The teacher is the mean of {len(found)} models' {report['teacher_combine']}; its parameters and its"
            f" latency are theirs together. Alone they reach {alone} accuracy."
        )
    if folds := report.get("cross_fit"):
        notes.append(
            f"Its targets for train are cross-fitted: each row was scored by a teacher trained without the row's fold,"
            f" one of {folds}. The teacher that stands here was trained on all of train."
        )
    if temperature := report.get("teacher_temperature"):
        notes.append(
            f"The teacher is calibrated: its logits are divided by {temperature:g}, fitted on validation, in what the"
            " student learned from and in the teacher's figures here."
        )
    return notes


def render(report: dict[str, Any]) -> str:
    """The page: no scripts, no network, light and dark."""
    if report["task"] == "causal_lm":
        return render_language(report)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"]))
    header, rows = table(report)
    return environment.get_template("report.html.j2").render(
        report=report, verdict=verdict(report), header=header, rows=rows, config=json.dumps(report["config"], indent=2)
    )
