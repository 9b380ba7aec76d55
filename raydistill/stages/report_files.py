"""The files of a report, whatever the task: its facts, the page and the student's model card made of them."""

from __future__ import annotations

import json
from typing import Any

from raydistill.record.commit import MANIFEST, Entry, commit_manifest
from raydistill.record.run import Run
from raydistill.report.card import model_card
from raydistill.report.page import render

FACTS, PAGE, CARD = "report.json", "report.html", "model_card.md"
CARD_OF_STUDENT = "student/README.md"


def commit_report(run: Run, fingerprint: str, report: dict[str, Any]) -> None:
    """Writes the files, then the manifest that names them, then the card beside the student.

    The card that is committed, verified and fingerprinted is the report's. What stands beside the student is a copy for
    those who take that folder elsewhere: no manifest names it, so that the student stays the bytes that were committed
    and a report that is made again with other figures has one to replace. It goes aside with its student.
    """
    files = {FACTS: json.dumps(report, indent=1), PAGE: render(report), CARD: model_card(report)}
    files[FACTS] += "\n"
    for name, text in files.items():
        run.store.write(f"report/{name}", text.encode())
    entries = [Entry(name, run.store.sha256(f"report/{name}"), run.store.size(f"report/{name}")) for name in files]
    commit_manifest(run.store, "report", fingerprint, entries)
    publish_card(run)


def publish_card(run: Run) -> None:
    """Copies the card of a finished report beside the student, unless it stands there."""
    card = f"report/{CARD}"
    if not run.store.exists(card):  # of a report that was made before there were cards
        return
    text = run.store.read(card)
    if not run.store.exists(CARD_OF_STUDENT) or run.store.read(CARD_OF_STUDENT) != text:
        run.store.write(CARD_OF_STUDENT, text)


def standing_report(run: Run) -> dict[str, Any]:
    """The facts of a finished report, whose card stands beside the student again."""
    publish_card(run)
    return json.loads(run.store.read(f"report/{FACTS}"))


def add_to_report(run: Run, name: str, facts: dict[str, Any]) -> None:
    """Adds facts that came after a report was finished, and writes its files again.

    The manifest goes first, so that a stop in between leaves a report that evaluate finishes from its kept logits.
    """
    manifest = run.require("report")
    report = json.loads(run.store.read(f"report/{FACTS}"))
    if report.get(name) == facts:
        return
    run.store.remove(f"report/{MANIFEST}")
    commit_report(run, manifest.fingerprint, {**report, name: facts})
