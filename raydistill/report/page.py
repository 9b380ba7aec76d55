"""The report for people: rows of a table, a verdict in words, and one self-contained HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from raydistill.report import proof_pictures as pictures
from raydistill.report.choices import choices_table, choices_verdict
from raydistill.report.language_page import language_table, language_verdict, render_language
from raydistill.report.over_seeds import Forms, seeds_table, seeds_verdict
from raydistill.report.review import review_lines, review_table

MODELS = ("teacher", "student", "control")
LOSING_CLASSES = 12
LINES = (
    ("accuracy", "accuracy", "{:.2%}"),
    ("micro F1", "micro_f1", "{:.2%}"),
    ("macro F1", "macro_f1", "{:.2%}"),
    ("agreement with the teacher", "agreement", "{:.2%}"),
    ("KL to the teacher, nats", "kl_to_teacher", "{:.3f}"),
    ("NLL, nats", "nll", "{:.3f}"),
    ("NLL, scaled", "nll_scaled", "{:.3f}"),
    ("Brier score", "brier", "{:.3f}"),
    ("Brier score, scaled", "brier_scaled", "{:.3f}"),
    ("calibration error", "ece", "{:.2%}"),
    ("calibration error, scaled", "ece_scaled", "{:.2%}"),
    ("parameters", "parameters", "{:,}"),
    ("weights, MB", "size_bytes", "{:.1f}"),
    ("in memory, MB", "memory_bytes", "{:.1f}"),
    ("latency p50, ms", "latency_ms_p50", "{:.2f}"),
    ("latency p90, ms", "latency_ms_p90", "{:.2f}"),
    ("latency p99, ms", "latency_ms_p99", "{:.2f}"),
    ("rows/s in batches", "rows_per_second", "{:,.0f}"),
    ("cost of a million requests", "cost_per_million", "{:,.2f}"),
)


def compared(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Every model of the report with its name and kind, in the order of the tables."""
    ours = [{"name": name, "kind": name, **report[name]} for name in MODELS if report.get(name)]
    return ours + report.get("others", [])


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison, as text."""
    if report["task"] == "causal_lm":
        return language_table(report)
    models = compared(report)
    rows = []
    for title, key, form in LINES:
        if key not in report["teacher"]:
            continue
        if key == "accuracy" and quality_of(report) != "accuracy":
            title = "all labels right"
        values = [one[key] / 1e6 if key.endswith("_bytes") else one[key] for one in models]
        rows.append([title, *(form.format(value) for value in values)])
    return ["", *(one["name"] for one in models)], rows


def quality_of(report: dict[str, Any]) -> str:
    """What retention and gain are counted in: where rows have sets of labels, micro F1."""
    return "micro F1" if report["task"] == "multi_label" else "accuracy"


def quality_key(report: dict[str, Any]) -> str:
    return quality_of(report).lower().replace(" ", "_")


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
        *_shown(report),
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
        if report["gap_closed"] is not None and report["gap_closed"] > 0:
            interval = report.get("gap_closed_ci95")
            within = f" (95 % interval {interval[0]:.0%} to {interval[1]:.0%})" if interval else ""
            lines.append(f"That closes {report['gap_closed']:.0%} of the gap between control and teacher{within}.")
    return lines + seeds_verdict(report, seed_forms(report)) + choices_verdict(report) + teacher_notes(report)


def seed_forms(report: dict[str, Any]) -> Forms:
    """What is told of trainings that differ in their seed."""
    quality = quality_of(report)
    return {
        quality_key(report): (quality, "{:.2%}".format),
        "retention": ("share of the teacher's", "{:.2%}".format),
        "agreement": ("agreement with the teacher", "{:.2%}".format),
        "control": (f"{quality} of the control", "{:.2%}".format),
        "gain_over_control": ("points over the control", lambda value: f"{value * 100:+.2f}"),
    }


def _shown(report: dict[str, Any]) -> list[str]:
    """Whether the retention that was asked for is proved, and what the test set could show at all."""
    if "retention_shown" not in report:
        return []
    states = {
        "shown": "shown",
        "not shown": "not shown with this test set",
        "refuted": "shown not to be reached",
    }
    test = report["mcnemar"]["teacher"]
    return [
        f"{report['retention_asked'] * 100:g} % retention: {states[report['retention_shown']]}. Drops in accuracy of"
        f" {report['smallest_drop'] * 100:.2f} points or more can be told from none here; {test['only_one']:,} rows are"
        f" right by the student alone, {test['only_other']:,} by the teacher alone (McNemar's exact test: p ="
        f" {test['p_value']:.2g})."
    ]


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
    if excluded := report.get("excluded"):
        notes.append(
            f"{excluded['rows']:,} of {excluded['of']:,} rows were learned from their labels alone, by train.exclude."
        )
    if temperature := report.get("teacher_temperature"):
        notes.append(
            f"The teacher is calibrated: its logits are divided by {temperature:g}, fitted on validation, in what the"
            " student learned from and in the teacher's figures here."
        )
    return notes


def retention_table(report: dict[str, Any]) -> list[list[str]]:
    """Of every model but the teacher: what it keeps with its interval, and what it does with the teacher's mistakes."""
    errors = report["teacher_errors"]
    rows = []
    for one in compared(report)[1:]:
        kept = report if one["kind"] == "student" else one
        cells = ["–", "–"]
        if kept.get("retention") is not None:
            low, high = kept["retention_ci95"]
            cells = [f"{kept['retention']:.2%}", f"{low:.2%} to {high:.2%}"]
        does = errors.get(one["name"])
        cells += [f"{does['copied']:.0%}", f"{does['mended']:.0%}"] if does else ["–", "–"]
        rows.append([one["name"], *cells])
    return rows


def losing_classes(report: dict[str, Any]) -> list[list[str]]:
    """The classes whose F1 falls most from teacher to student."""
    falls = sorted(report["classes"], key=lambda one: one["student"]["f1"] - one["teacher"]["f1"])
    return [
        [
            one["label"], f"{one['rows']:,}", f"{one['teacher']['f1']:.1%}", f"{one['student']['f1']:.1%}",
            f"{one['student']['precision']:.1%}", f"{one['student']['recall']:.1%}",
        ]
        for one in falls[:LOSING_CLASSES]
        if one["student"]["f1"] < one["teacher"]["f1"]
    ]  # fmt: skip


def set_tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]], str]]:
    """Title, header, rows and note of every further set."""
    found: list[tuple[str, list[str], list[list[str]], str]] = []
    for name, one in report.get("sets", {}).items():
        title = f"{name}, {one['rows']:,} rows"
        if one.get("out_of_domain"):
            rows = [[m, f"{v['auroc']:.3f}", f"{v['mean_probability']:.1%}"] for m, v in one["models"].items()]
            note = (
                "Rows of another task. AUROC: how often a test row gets a higher probability for its likeliest label"
                " than one of these; 0.5 is chance."
            )
            found.append((title, ["", "AUROC", "mean probability"], rows, note))
            continue
        rows = _reached("all rows", one["models"])
        for part in one.get("slices", []):
            rows += _reached(f"{part['value']} ({part['rows']:,})", part["models"])
        found.append((title, ["", "model", "accuracy", "agreement", "retention"], rows, ""))
    return found


def _reached(title: str, models: dict[str, Any]) -> list[list[str]]:
    rows = []
    for number, (name, values) in enumerate(models.items()):
        kept = values.get("retention")
        cells = [f"{values['accuracy']:.2%}", f"{values['agreement']:.2%}", "–" if kept is None else f"{kept:.2%}"]
        rows.append(["" if number else title, name, *cells])
    return rows


def report_pictures(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Title, SVG and caption of the pictures of what is compared."""
    models, quality, key = compared(report), quality_of(report), quality_key(report)
    found = [
        (
            "What it costs",
            pictures.trade_off(models, quality, key),
            "Up and to the left is better; sizes and times are on logarithmic scales.",
        ),
        (
            "How honest its certainty is",
            pictures.reliability({name: report["reliability"][name] for name in MODELS if report.get(name)}),
            "15 groups of equally many rows by the probability that the model gives its answer, and how often it holds."
            " On the line certainty is honest, below it the model is too sure.",
        ),
        (
            "Class by class",
            pictures.by_class(report["classes"]),
            "A point is a class; below the line it loses in the student.",
        ),
        (
            "How long a request takes",
            pictures.latency_by_length(models),
            "The median of requests of about that length.",
        ),
    ]
    curves = {name: points for name, points in report["curves"].items() if points}
    if curves:
        shown = pictures.training_curves(curves, key, quality)
        found.append(("How it was trained", shown, "Validation rows, which are neither train nor test."))
    return found


def render(report: dict[str, Any]) -> str:
    """The page: no scripts, no network, light and dark."""
    if report["task"] == "causal_lm":
        return render_language(report)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"]))
    header, rows = table(report)
    review = report.get("review")
    return environment.get_template("report.html.j2").render(
        review=(*review_table(review), review_lines(review)) if review else None,
        report=report, verdict=verdict(report), header=header, rows=rows, config=json.dumps(report["config"], indent=2),
        choices=choices_table(report),
        pictures=report_pictures(report), kept=retention_table(report), losing=losing_classes(report),
        sets=set_tables(report), quality=quality_of(report), seeds=seeds_table(report, seed_forms(report)),
    )  # fmt: skip
