"""Pictures of a report as SVG: what each model costs and reaches, how honest its certainty is, where classes lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from raydistill.report.pictures import COLOURS, INK, drawn

PERCENT = FuncFormatter(
    lambda value, _: f"{value:.0%}" if abs(value * 100 - round(value * 100)) < 1e-6 else f"{value:.1%}"
)
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")
KINDS = {
    "teacher": ("s", 0.22), "student": ("o", 0.65), "control": ("^", 0.35), "export": ("D", 0.8),
    "quantised teacher": ("X", 0.3), "model": ("P", 0.5),
}  # fmt: skip
LINES = ("-", "--", ":", "-.")
NAMED_CLASSES = 6  # those that lose most
AROUND = ((0, 10), (10, 0), (0, -10), (-10, 0))  # where a number stands beside its point; neighbours in turn

Models = Sequence[dict[str, Any]]


def trade_off(
    models: Models, quality: str, key: str, *, asked: str = "single request", form: FuncFormatter = PERCENT
) -> str:
    """Quality against bytes on disk and against the time of what is asked, one point for each model."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _points(left, [(one, one["size_bytes"] / 1e6) for one in models], key, "weights on disk, MB")
        _points(right, [(one, one["latency_ms_p50"]) for one in models], key, f"{asked}, p50, ms")
        left.yaxis.set_major_formatter(form)
        left.set_ylabel(quality)
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)

    return drawn("tradeoff", 4.0, draw, f"{quality} against size and latency")


def _points(axes: Axes, places: list[tuple[dict[str, Any], float]], key: str, title: str) -> None:
    _logarithmic(axes, "x", [across for _, across in places])
    for number, (one, across) in enumerate(places, 1):
        marker, shade = KINDS[one["kind"]]
        label = f"{number} {one['name']}"
        axes.plot(across, one[key], marker, color=COLOURS(shade), markersize=8, linestyle="none", label=label)
        dx, dy = AROUND[number % len(AROUND)]
        axes.annotate(
            str(number), (across, one[key]), xytext=(dx, dy), textcoords="offset points", fontsize=8, ha="center",
            va="center",
        )  # fmt: skip
    axes.margins(0.15, 0.2)
    axes.set_xlabel(title)
    axes.grid(alpha=0.25, linewidth=0.6)


def _logarithmic(axes: Axes, which: Literal["x", "y"], values: Sequence[float]) -> None:
    """A logarithmic scale whose ticks have their numbers, also where the values lie within one power of ten."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    steps = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if max(values) < 10 * min(values) else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(PLAIN)


def reliability(diagrams: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """How often predictions hold against how probable the model says they are; scaled, too, where that is known."""

    def draw(figure: Figure) -> None:
        columns = figure.subplots(1, len(diagrams), sharey=True, squeeze=False)[0]
        for axes, (name, bins) in zip(columns, diagrams.items(), strict=True):
            axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, alpha=0.5)
            for title, line, shade in (("as_it_is", "o-", 0.35), ("scaled", "^--", 0.7))[: len(bins)]:
                across, up = [b["probability"] for b in bins[title]], [b["held"] for b in bins[title]]
                label = title.replace("_", " ")
                axes.plot(across, up, line, color=COLOURS(shade), markersize=4, linewidth=1.2, label=label)
            axes.set_title(name, fontsize=9, parse_math=False)
            axes.set_xlabel("probability")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(FixedLocator([0, 0.5, 1]))
                axis.set_major_formatter(PERCENT)
            axes.set_aspect("equal")
        columns[0].set_ylabel("holds")
        if any(len(bins) > 1 for bins in diagrams.values()):
            columns[0].legend(frameon=False, fontsize=8)

    return drawn("reliability", 2.9, draw, "reliability of the models' probabilities")


def by_class(classes: Sequence[dict[str, Any]]) -> str:
    """Each class's F1 of the student against the teacher's; those that lose most are named."""
    losing = sorted(classes, key=lambda one: one["student"]["f1"] - one["teacher"]["f1"])[:NAMED_CLASSES]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        across, up = ([one[name]["f1"] for one in classes] for name in ("teacher", "student"))
        low = max(0.0, min(*across, *up) - 0.03)
        axes.plot([low, 1], [low, 1], color=INK, linewidth=0.8, alpha=0.5)
        axes.plot(across, up, "o", color=COLOURS(0.45), markersize=5, alpha=0.8)
        for one in losing:
            if one["student"]["f1"] < one["teacher"]["f1"]:
                axes.annotate(
                    _short(one["label"]), (one["teacher"]["f1"], one["student"]["f1"]), xytext=(6, -3),
                    textcoords="offset points", fontsize=7.5, parse_math=False,
                )  # fmt: skip
        axes.set_xlabel("teacher, F1")
        axes.set_ylabel("student, F1")
        axes.margins(x=0.15)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PERCENT)

    return drawn("classes", 3.8, draw, "F1 of every class, student against teacher")


def _short(label: str) -> str:
    return label if len(label) <= 32 else label[:31] + "…"


def training_curves(
    curves: dict[str, list[dict[str, Any]]], metric: str, title: str, *, form: FuncFormatter = PERCENT
) -> str:
    """Validation of student and control over the training."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for name, points in curves.items():
            marker, shade = KINDS[name]
            known = [point for point in points if metric in point]
            axes.plot(
                [point["step"] for point in known], [point[metric] for point in known], f"{marker}-",
                color=COLOURS(shade), markersize=4, linewidth=1.4, label=name,
            )  # fmt: skip
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(f"validation {title}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(form)
        axes.legend(frameon=False)

    return drawn("training", 2.8, draw, "validation over the training")


def latency_by_length(models: Models) -> str:
    """The median time of a request by the row's tokens, one line for each model."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, one in enumerate(models):
            marker, shade = KINDS[one["kind"]]
            groups = one["latency_by_length"]
            across, up = [g["tokens_to"] for g in groups], [g["latency_ms_p50"] for g in groups]
            line = LINES[number % len(LINES)]
            axes.plot(
                across, up, marker, linestyle=line, color=COLOURS(shade), markersize=4, linewidth=1.2, label=one["name"]
            )
        _logarithmic(axes, "y", [group["latency_ms_p50"] for one in models for group in one["latency_by_length"]])
        figure.legend(loc="outside right center", frameon=False, fontsize=8)
        axes.set_xlabel("tokens of a row, up to")
        axes.set_ylabel("single request, p50, ms")
        axes.grid(alpha=0.25, linewidth=0.6)

    return drawn("lengths", 3.0, draw, "latency by the length of rows")
