"""Pictures of a search as SVG: no fixed ink or paper, so that one picture serves a light and a dark page, and print."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK = "#010203"  # replaced by the page's own colour of text
WIDTH = 7.6  # inches
LONGEST = 36  # characters of a label
MOST_CELLS = 12  # of a heat map, one above the other, whose numbers can be read
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "axes.spines.top": False,
    "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "text.parse_math": False,
}  # fmt: skip
# Without its last, light yellow, which a white page swallows.
COLOURS = ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, 256)))
STOPPED = {"stopped": "x", "failed": "v"}

Trials = Sequence[dict[str, Any]]


def drawn(name: str, height: float, draw: Callable[[Figure], None], label: str) -> str:
    """The SVG element of one picture; `name` keeps its inner references apart from those of others on the page."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = re.sub(r"(<svg\b[^>]*?) height=\"[^\"]*\"", r"\1", svg[svg.index("<svg") :], count=1)
    svg = re.sub(r"(<svg\b[^>]*?) width=\"[^\"]*\"", rf'\1 role="img" aria-label="{label}"', svg, count=1)
    svg = svg.replace(INK, "currentColor")
    # Inner names are counted from the start in every picture.
    return re.sub(r'((?:id="|href="#|url\(#))', rf"\g<1>{name}-", svg)


def learning_curves(trials: Trials, metric: str, winner: int | None) -> str:
    """The metric after every epoch of every trial, and where trials were stopped."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for trial in sorted(trials, key=lambda one: one["number"] == winner):
            values = [epoch[metric] for epoch in trial["curve"]]
            if not values:
                continue
            best = trial["number"] == winner
            colour = COLOURS(0.65) if best else INK
            style = {"color": colour, "linewidth": 2.2 if best else 0.9, "alpha": 1 if best else 0.45}
            epochs = range(1, len(values) + 1)
            axes.plot(epochs, values, **style, label=f"trial {trial['number']}, the winner" if best else None)
            marker = STOPPED.get(trial["status"], "o")
            axes.plot(epochs[-1], values[-1], marker, color=colour, markersize=4.5, alpha=style["alpha"])
        axes.set_xlabel("epoch (× stopped early, ▾ failed, • trained to its end)")
        axes.set_ylabel(f"validation {words(metric)}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if winner is not None:
            axes.legend(frameon=False, loc="best")

    return drawn("curves", 3.2, draw, "learning curves of all trials")


def parallel_coordinates(trials: Trials, settings: Sequence[str], metric: str) -> str:
    """A line for each trial through its settings to what it reached."""
    shown = [trial for trial in trials if trial["value"] is not None]
    axes_of = [place_values([trial["point"].get(name) for trial in shown]) for name in settings]
    reached, ticks = place_values([trial["value"] for trial in shown], even=True)
    columns = [*(places for places, _ in axes_of), reached]
    marks = [*(labels for _, labels in axes_of), ticks]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = [trial["value"] for trial in shown]
        scale = Normalize(min(values), max(values))
        for trial, *places in sorted(zip(shown, *columns, strict=True), key=lambda line: line[0]["value"]):
            colour = COLOURS(scale(trial["value"]))
            axes.plot(range(len(places)), places, color=colour, linewidth=1.2, alpha=0.85)
        for number, labels in enumerate(marks):
            axes.axvline(number, color=INK, linewidth=0.7)
            for place, text in labels:
                axes.text(number + 0.03, place, text, fontsize=7.5, va="center")
        names = [*map(short, settings), words(metric)]
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks([])
        axes.set_xlim(-0.1, len(names) - 0.6)
        axes.spines[["left", "bottom"]].set_visible(False)

    return drawn("parallel", 3.4, draw, "settings of every trial and what it reached")


def heat_map(trials: Trials, across: str, up: str, metric: str, lower_is_better: bool) -> str:
    """The best value that was reached at each pair of two settings."""
    shown = [trial for trial in trials if trial["value"] is not None]
    columns = sorted({trial["point"][across] for trial in shown})
    rows = sorted({trial["point"][up] for trial in shown})

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        was_sampled = len(columns) * len(rows) > 3 * len(shown)  # hardly a pair comes twice
        if was_sampled or max(len(columns), len(rows)) > MOST_CELLS:
            points = axes.scatter(
                [trial["point"][across] for trial in shown], [trial["point"][up] for trial in shown],
                c=[trial["value"] for trial in shown], cmap=COLOURS, s=42, edgecolors=INK, linewidths=0.4,
            )  # fmt: skip
            figure.colorbar(points, label=f"validation {words(metric)}").outline.set_visible(False)
        else:
            best = np.full((len(rows), len(columns)), np.nan)
            for trial in shown:
                place = rows.index(trial["point"][up]), columns.index(trial["point"][across])
                better = np.fmin if lower_is_better else np.fmax
                best[place] = better(best[place], trial["value"])
            image = axes.imshow(best, cmap=COLOURS, aspect="auto", origin="lower")
            axes.set_xticks(range(len(columns)), [text_of(value) for value in columns])
            axes.set_yticks(range(len(rows)), [text_of(value) for value in rows])
            middle = (np.nanmin(best) + np.nanmax(best)) / 2
            for (row, column), value in np.ndenumerate(best):
                if not math.isnan(value):
                    ink = "#000000" if value > middle else "#ffffff"
                    axes.text(column, row, f"{value:.4f}", ha="center", va="center", fontsize=8, color=ink)
            figure.colorbar(image, label=f"validation {words(metric)}").outline.set_visible(False)
        axes.set_xlabel(across)
        axes.set_ylabel(up)

    return drawn("heat", 3.2, draw, f"best value by {across} and {up}")


def importance_bars(shares: dict[str, float]) -> str:
    """How much of the trials' difference each setting accounts for."""
    ordered = sorted(shares.items(), key=lambda item: item[1])

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        bars = axes.barh([name for name, _ in ordered], [share for _, share in ordered], color=COLOURS(0.55))
        axes.bar_label(bars, [f"{share:.0%}" for _, share in ordered], padding=3)
        axes.set_xlim(0, 1.08 * max(shares.values(), default=1) or 1)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)

    return drawn("importance", 0.5 + 0.32 * len(ordered), draw, "importance of each setting")


def place_values(values: Sequence[Any], *, even: bool = False) -> tuple[list[float], list[tuple[float, str]]]:
    """Values of one setting on an axis from 0 to 1, and its labels: numbers to scale (logarithmic over a factor of
    20, unless they are to be `even`), words side by side; a trial that lacks the setting stands among the words."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        known = set(values)
        low, high = min(known), max(known)
        if low == high:
            return [0.5] * len(values), [(0.5, text_of(low))]
        scale = math.log if not even and low > 0 and high / low > 20 else float
        places = [(scale(value) - scale(low)) / (scale(high) - scale(low)) for value in values]
        if len(known) <= 8:
            return places, sorted({(p, text_of(v)) for p, v in zip(places, values, strict=True)})
        return places, [(0.0, text_of(low)), (1.0, text_of(high))]
    ordered = sorted({text_of(value) for value in values})
    at = {text: i / max(1, len(ordered) - 1) for i, text in enumerate(ordered)}
    return [at[text_of(value)] for value in values], [(place, cut(text)) for text, place in at.items()]


def cut(text: str) -> str:
    """As much of a text as a picture has room for."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def text_of(value: Any) -> str:
    """A setting's value as a person writes it; a section by its name or kind and what else it says."""
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return ", ".join(f"({text_of(one)})" if isinstance(one, list) else text_of(one) for one in value) or "none"
    if isinstance(value, dict):
        named = next((key for key in ("name", "kind") if key in value), None)
        rest = ", ".join(f"{key} {text_of(inner)}" for key, inner in value.items() if key != named)
        return rest if named is None else f"{value[named]} ({rest})" if rest else str(value[named])
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short(setting: str) -> str:
    """A setting's dotted name without what a reader guesses."""
    return setting.removeprefix("train.").removeprefix("loss.")


def words(metric: str) -> str:
    """A metric's name as a person writes it."""
    return {"nll": "NLL", "macro_f1": "macro F1", "micro_f1": "micro F1"}.get(metric, metric)
