"""Distil, quantise, or both? What each smaller model of a report keeps, weighs and takes for a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raydistill.report.significance import kept_share

WAYS = {"student": "distil", "export": "distil and export", "quantised teacher": "quantise"}
STATES = {"shown": "shown", "not shown": "not shown", "refuted": "no"}
CHOICES_HEADER = ("", "way", "keeps", "95 % interval", "times smaller on disk", "requests, times as fast")


@dataclass(frozen=True)
class Choice:
    """A model to take in the teacher's place; sizes and speeds are the teacher's in its own."""

    name: str
    kind: str
    retention: float
    interval: tuple[float, float]
    smaller: float
    faster: float

    @property
    def gains(self) -> str:
        return f"{self.smaller:.1f} times fewer bytes on disk, requests answered {self.faster:.1f} times as fast"


def choices(report: dict[str, Any]) -> list[Choice]:
    """Student, exported files and the quantised teacher; none where there is the student alone."""
    teacher = report["teacher"]
    others = [one for one in report.get("others", []) if one["kind"] in WAYS and one["retention"] is not None]
    if not others or report["retention"] is None:
        return []
    kept = {key: report[key] for key in ("retention", "retention_ci95")}
    asked = [{"name": "student", "kind": "student", **report["student"], **kept}, *others]
    return [
        Choice(
            one["name"], one["kind"], one["retention"], tuple(one["retention_ci95"]),
            teacher["size_bytes"] / one["size_bytes"], teacher["latency_ms_p50"] / one["latency_ms_p50"],
        )
        for one in asked
    ]  # fmt: skip


def choices_table(report: dict[str, Any]) -> list[list[str]]:
    """Header and rows, the smallest first; empty where there is nothing to choose between."""
    found = sorted(choices(report), key=lambda one: -one.smaller)
    asked = report.get("retention_asked")
    header = [*CHOICES_HEADER, *([] if asked is None else [f"keeps {asked * 100:g} %"])]
    rows = [
        [
            one.name, WAYS[one.kind], f"{one.retention:.1%}", f"{one.interval[0]:.1%} to {one.interval[1]:.1%}",
            f"{one.smaller:.1f}", f"{one.faster:.1f}",
            *([] if asked is None else [STATES[kept_share(asked, one.interval)]]),
        ]
        for one in found
    ]  # fmt: skip
    return [header, *rows] if rows else []


def choices_verdict(report: dict[str, Any]) -> list[str]:
    """What to take: the smallest model that is shown to keep what was asked for, and the smallest of all."""
    found = choices(report)
    if not found:
        return []
    asked, smallest = report.get("retention_asked"), max(found, key=lambda one: one.smaller)
    least = f"The smallest of all, {smallest.name}, keeps {smallest.retention:.1%}: {smallest.gains}."
    if asked is None:
        return [least]
    enough = [one for one in found if kept_share(asked, one.interval) == "shown"]
    best = max(enough, key=lambda one: one.smaller) if enough else max(found, key=lambda one: one.interval[0])
    says = "is the smallest that is shown to" if enough else "comes nearest, and nothing here is shown to"
    take = (
        f"To keep {asked * 100:g} %, {WAYS[best.kind]}: {best.name} {says} ({best.retention:.1%}, 95 % interval"
        f" {best.interval[0]:.1%} to {best.interval[1]:.1%}); {best.gains}."
    )
    return [take] if best == smallest else [take, least]
