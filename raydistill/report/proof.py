"""From logits and labels to what a report says of quality: figures of each model, comparisons, errors with examples.

Logits are float32 by the name of a model; "teacher" and "student" are always there, "control" may be, and any others.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raydistill.report.classes import confusions
from raydistill.report.measures import Measures, measures_of
from raydistill.report.metrics import Floats, Labels, log_softmax
from raydistill.report.outside import auroc, max_probability
from raydistill.report.significance import kept_share, mcnemar, smallest_drop

OURS = ("teacher", "student", "control")
SHOWN_ERRORS = 40
SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class Rows:
    """The rows of a test set, their labels, and what each model says of them."""

    texts: Sequence[str]
    labels: Labels  # (N,) or, of sets of labels, (N, K)
    names: Sequence[str]  # of the K classes
    logits: dict[str, Floats]

    @property
    def measures(self) -> Measures:
        return measures_of(self.labels)

    def right(self, name: str) -> npt.NDArray[np.bool_]:
        """In which rows a model has all labels right."""
        return self.measures.right(self.logits[name], self.labels)


def figures(rows: Rows, name: str, temperature: float) -> dict[str, float]:
    """What one model reaches, and how near it is to the teacher."""
    measures, own, teacher = rows.measures, rows.logits[name], rows.logits["teacher"]
    return {
        **measures.metrics(own, rows.labels, temperature),
        "agreement": float(measures.same(own, teacher).mean()),
        "kl_to_teacher": measures.kl(teacher, own),
    }


def proof(rows: Rows, temperatures: dict[str, float], *, asked: float, resamples: int, seed: int) -> dict[str, Any]:
    """What is shown of student, teacher and control, and where they differ; `asked` is the retention to be shown."""
    bootstrap = {"resamples": resamples, "seed": seed}
    comparison = rows.measures.compare(rows.labels, {n: v for n, v in rows.logits.items() if n in OURS}, **bootstrap)
    ours = [name for name in OURS if name in rows.logits]
    single = rows.labels.ndim == 1
    return {
        **asdict(comparison),
        "retention_asked": asked,
        "retention_shown": kept_share(asked, comparison.retention_ci95),
        "smallest_drop": smallest_drop(rows.right("teacher"), rows.right("student")),
        "mcnemar": {name: mcnemar(rows.right("student"), rows.right(name)) for name in ours if name != "student"},
        "teacher_errors": teacher_errors(rows),
        "classes": by_class(rows, ours),
        "confusions": confusions(
            rows.labels, rows.logits["teacher"].argmax(axis=1), rows.logits["student"].argmax(axis=1), list(rows.names)
        )
        if single
        else None,
        "reliability": {
            name: {
                "as_it_is": [asdict(one) for one in rows.measures.reliability(logits, rows.labels)],
                "scaled": [asdict(one) for one in rows.measures.reliability(logits / temperatures[name], rows.labels)],
            }
            for name, logits in rows.logits.items()
        },
        "examples": examples(rows),
    }


def retention(rows: Rows, name: str, *, resamples: int, seed: int) -> dict[str, Any]:
    """What another model than the student keeps of the teacher's quality, with its interval."""
    pair = {"teacher": rows.logits["teacher"], "student": rows.logits[name]}
    found = rows.measures.compare(rows.labels, pair, resamples=resamples, seed=seed)
    return {"retention": found.retention, "retention_ci95": found.retention_ci95}


def of_training(rows: Rows, student: str, control: str) -> dict[str, Any]:
    """What one training of the student reached, by the names of its models; None of a control that is not there.

    Accuracy, or micro F1 of sets of labels, agreement, and the retention and gain of those as in `proof`.
    """
    quality = "accuracy" if rows.labels.ndim == 1 else "micro_f1"
    reached = {
        name: rows.measures.metrics(rows.logits[name], rows.labels, 1.0)[quality]
        for name in ("teacher", student, control)
        if name in rows.logits
    }
    beside = reached.get(control)
    return {
        quality: reached[student],
        "agreement": float(rows.measures.same(rows.logits[student], rows.logits["teacher"]).mean()),
        "retention": reached[student] / reached["teacher"] if reached["teacher"] else None,
        "control": beside,
        "gain_over_control": None if beside is None else reached[student] - beside,
    }


def teacher_errors(rows: Rows) -> dict[str, Any]:
    """What each model does in the rows that the teacher has wrong: its same mistake, the right answer, or another."""
    wrong_N = ~rows.right("teacher")
    found: dict[str, Any] = {"rows": int(wrong_N.sum())}
    for name in rows.logits:
        if name != "teacher" and wrong_N.any():
            copied_N = rows.measures.same(rows.logits[name], rows.logits["teacher"])
            found[name] = {
                "copied": float(copied_N[wrong_N].mean()), "mended": float(rows.right(name)[wrong_N].mean()),
            }  # fmt: skip
    return found


def by_class(rows: Rows, models: Sequence[str]) -> list[dict[str, Any]]:
    """Of every class its rows and each model's precision, recall and F1."""
    found = {name: rows.measures.by_class(rows.logits[name], rows.labels) for name in models}
    single = rows.labels.ndim == 1
    counts = np.bincount(rows.labels, minlength=len(rows.names)) if single else (rows.labels == 1).sum(axis=0)
    return [
        {"label": label, "rows": int(counts[k]), **{name: found[name][k] for name in models}}
        for k, label in enumerate(rows.names)
    ]


def examples(rows: Rows) -> list[dict[str, Any]]:
    """Rows that the student has wrong: first those that the teacher has right, the most certain mistakes first."""
    wrong_N, teacher_N = ~rows.right("student"), rows.right("teacher")
    certainty_N = _certainty(rows, "student")
    order = sorted(np.flatnonzero(wrong_N).tolist(), key=lambda row: (not teacher_N[row], -certainty_N[row], row))
    return [
        {
            "text": _cut(rows.texts[row]), "label": _label(rows, row),
            "student": _answer(rows, "student", row), "teacher": _answer(rows, "teacher", row),
            "probability": float(certainty_N[row]),
        }
        for row in order[:SHOWN_ERRORS]
    ]  # fmt: skip


def _certainty(rows: Rows, name: str) -> Floats:
    """The probability that a model gives its own answer; of a set of labels, as the product over classes."""
    logits = rows.logits[name]
    if rows.labels.ndim == 1:
        return np.exp(log_softmax(logits)).max(axis=1)
    return np.exp(-np.logaddexp(0, -np.abs(logits.astype(np.float64))).sum(axis=1))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


def _label(rows: Rows, row: int) -> str:
    if rows.labels.ndim == 1:
        return rows.names[int(rows.labels[row])]
    return _joined(rows.names, rows.labels[row] == 1)


def _answer(rows: Rows, name: str, row: int) -> str:
    logits_K = rows.logits[name][row]
    return rows.names[int(logits_K.argmax())] if rows.labels.ndim == 1 else _joined(rows.names, logits_K > 0)


def _joined(names: Sequence[str], chosen_K: npt.NDArray[np.bool_]) -> str:
    return ", ".join(names[k] for k in np.flatnonzero(chosen_K).tolist()) or "none"


def of_set(rows: Rows, slices: Sequence[str] | None, *, resamples: int, seed: int) -> dict[str, Any]:
    """What models reach on a further set with labels, whole and by slice: accuracy, agreement, retention."""
    found: dict[str, Any] = {"rows": len(rows.texts), "models": _reached(rows, resamples, seed)}
    if slices is not None:
        values, places = np.unique(np.array(slices, object).astype(str), return_inverse=True)
        found["slices"] = [
            {"value": str(value), "rows": int((places == number).sum()),
             "models": _reached(_of_rows(rows, places == number), resamples, seed)}
            for number, value in enumerate(values)
        ]  # fmt: skip
    return found


def _of_rows(rows: Rows, chosen_N: npt.NDArray[np.bool_]) -> Rows:
    texts = [text for text, is_chosen in zip(rows.texts, chosen_N, strict=True) if is_chosen]
    return Rows(texts, rows.labels[chosen_N], rows.names, {n: v[chosen_N] for n, v in rows.logits.items()})


def _reached(rows: Rows, resamples: int, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, logits in rows.logits.items():
        metrics = rows.measures.metrics(logits, rows.labels, 1.0)
        found[name] = {key: metrics[key] for key in ("accuracy", "macro_f1", "micro_f1") if key in metrics}
        found[name]["agreement"] = float(rows.measures.same(logits, rows.logits["teacher"]).mean())
        if name != "teacher":
            found[name] |= retention(rows, name, resamples=resamples, seed=seed)
    return found


def out_of_domain(inside: dict[str, Floats], outside: dict[str, Floats]) -> dict[str, Any]:
    """How well the probability of the likeliest class tells test rows from others, for each model."""
    rows = len(next(iter(outside.values())))
    return {
        "rows": rows, "out_of_domain": True,
        "models": {
            name: {
                "auroc": auroc(max_probability(inside[name]), max_probability(logits)),
                "mean_probability": float(max_probability(logits).mean()),
            }
            for name, logits in outside.items()
        },
    }  # fmt: skip
