"""The report of language models for people: rows of a table, a verdict in words, and one self-contained HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from raydistill.report import proof_pictures as pictures
from raydistill.report.over_seeds import Forms, seeds_table, seeds_verdict

MODELS = ("teacher", "student", "control")
LINES = [
    ("perplexity{of_unit}", "perplexity", "{:.3f}"),
    ("NLL, nats a {unit}", "nll", "{:.4f}"),
    ("bits a byte", "bits_per_byte", "{:.4f}"),
    ("next token right", "accuracy", "{:.2%}"),
    ("KL from the teacher, nats", "kl_to_teacher", "{:.4f}"),
    ("the teacher's likeliest token first", "agreement", "{:.2%}"),
    ("among the first five", "agreement_top5", "{:.2%}"),
    ("calibration error", "ece", "{:.2%}"),
    ("parameters", "parameters", "{:,}"),
    ("weights, MB", "size_bytes", "{:.1f}"),
    ("in memory, MB", "memory_weights_bytes", "{:.1f}"),
    ("keys and values of the longest timed row, MB", "memory_cache_bytes", "{:.3f}"),
    ("next token of a row p50, ms", "latency_ms_p50", "{:.2f}"),
    ("next token of a row p90, ms", "latency_ms_p90", "{:.2f}"),
    ("tokens/s read", "prefill_tokens_per_second", "{:,.0f}"),
    ("tokens/s written", "decode_tokens_per_second", "{:,.0f}"),
]

SEED_FORMS: Forms = {
    "perplexity": ("perplexity", "{:.3f}".format),
    "retention": ("share of the teacher's", "{:.2%}".format),
    "agreement": ("the teacher's likeliest token first", "{:.2%}".format),
    "control": ("perplexity of the control", "{:.3f}".format),
    "gain_over_control": ("lower than the control's by", "{:+.3f}".format),
}


def language_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison, as text."""
    ours, unit = [name for name in MODELS if report.get(name)], report.get("unit", "token")
    others = report.get("others", [])
    rows: list[list[str]] = []
    for title, key, form in LINES:
        values = [one.get(key) for one in (*(report[name] for name in ours), *others)]
        if not any(value is not None for value in values):  # of a report that was made before it was measured
            continue
        if key.endswith("bytes"):
            values = [None if value is None else value / 1e6 for value in values]
        title = title.format(unit=unit, of_unit=" a byte" if unit == "byte" else "")
        rows.append([title, *("" if value is None else form.format(value) for value in values)])
    harness = [row + [""] * len(others) for row in _harness_rows(report.get("harness") or {}, ours)]
    return ["", *ours, *(one["name"] for one in others)], rows + harness


def _harness_rows(found: dict[str, Any], models: list[str]) -> list[list[str]]:
    """A row for each task and metric, with its standard error where there is one."""
    rows: list[list[str]] = []
    for task, metrics in found[models[0]].items() if found else ():
        for metric in metrics:
            of_models = [found[name][task].get(metric, {}) for name in models]
            rows.append([f"{task}, {metric}", *map(_with_error, of_models)])
    return rows


def _with_error(found: dict[str, float]) -> str:
    error = f" ± {found['stderr']:.4f}" if found.get("stderr") is not None else ""
    return f"{found['value']:.4f}{error}" if found else ""


def language_verdict(report: dict[str, Any]) -> list[str]:
    """What the figures say, a sentence each."""
    teacher, student = report["teacher"], report["student"]
    low, high = report["retention_ci95"]
    lines = [
        f"The student keeps {report['retention']:.1%} of the teacher: its perplexity is {student['perplexity']:.3f},"
        f" the teacher's {teacher['perplexity']:.3f} (95 % interval {low:.1%} to {high:.1%}, {report['test_rows']:,}"
        f" test documents, {report['test_positions']:,} {report.get('unit', 'token')}s).",
        f"It has {teacher['parameters'] / student['parameters']:.1f} times fewer parameters and writes"
        f" {student['decode_tokens_per_second'] / teacher['decode_tokens_per_second']:.1f} times as fast.",
    ]
    if report.get("unit") == "byte":
        lines.append(
            "Teacher and student have different tokenizers, so that perplexity is that of a byte:"
            f" {teacher['bits_per_byte']:.3f} bits of the teacher, {student['bits_per_byte']:.3f} of the student, over"
            " the text that both have in spans. Next tokens right, calibration and tokens/s are of each model's own"
            " tokens; KL and agreement compare next tokens of one vocabulary and are left out."
        )
    if report.get("control"):
        low, high = report["gain_over_control_ci95"]
        shown = "more than chance" if low > 0 else "not shown to be more than chance"
        lines.append(
            f"Learning from the teacher brought a perplexity {abs(report['gain_over_control']):.3f}"
            f" {'lower' if report['gain_over_control'] >= 0 else 'higher'} than that of the same student without it"
            f" (95 % interval of the gain {low:+.3f} to {high:+.3f}: {shown})."
        )
        if (report["gap_closed"] or 0) > 0:
            lines.append(f"That closes {report['gap_closed']:.0%} of the gap between control and teacher, in nats.")
    lines += seeds_verdict(report, SEED_FORMS) + _files(report)
    cache = report["cache"]
    if cache["codec"] == "none":
        return [*lines, "It learned from what the teacher wrote alone, and from none of its logits."]
    lines.append(
        f"It learned from {cache['positions']:,} positions, {cache['bytes_per_position']:.1f} bytes each by codec"
        f" {cache['codec']} ({cache['promise']})."
    )
    return lines


def _files(report: dict[str, Any]) -> list[str]:
    """What each exported file keeps and weighs."""
    whole = report["teacher"]
    return [
        f"Of the teacher's perplexity {one['name']} keeps {one['retention']:.1%}, with"
        f" {whole['size_bytes'] / one['size_bytes']:.1f} times fewer bytes on disk and tokens written"
        f" {one['decode_tokens_per_second'] / whole['decode_tokens_per_second']:.1f} times as fast."
        for one in report.get("others", [])
    ]


def language_pictures(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Title, SVG and caption; of a report that was made before they were measured only what it has."""
    models = [{"name": name, "kind": name, **report[name]} for name in MODELS if report.get(name)]
    found = [
        (
            "What it costs",
            pictures.trade_off(
                models + report.get("others", []), "perplexity", "perplexity", asked="next token of a row",
                form=pictures.PLAIN,
            ),
            "Down and to the left is better; sizes and times are on logarithmic scales.",
        )
    ]  # fmt: skip
    if "reliability" in report:
        found.append((
            "How honest its certainty is",
            pictures.reliability(report["reliability"]),
            "15 groups of equally many positions by the probability of the likeliest token, and how often it is the"
            " next one. On the line certainty is honest, below it the model is too sure.",
        ))  # fmt: skip
    if curves := {name: points for name, points in report.get("curves", {}).items() if points}:
        shown = pictures.training_curves(curves, "nll", "NLL", form=pictures.PLAIN)
        found.append(("How it was trained", shown, "Validation documents, which are neither train nor test."))
    return found


def render_language(report: dict[str, Any]) -> str:
    """The page: no scripts, no network, light and dark."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["j2"]))
    header, rows = language_table(report)
    columns = ["test", *(name for name in MODELS if report.get(name))]
    return environment.get_template("language.html.j2").render(
        report=report, verdict=language_verdict(report), header=header, rows=rows, columns=columns,
        config=json.dumps(report["config"], indent=2), pictures=language_pictures(report),
        seeds=seeds_table(report, SEED_FORMS),
    )  # fmt: skip
