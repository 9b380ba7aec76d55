"""A sample of the teacher's answers for a person to judge, and what that person found.

Nothing of it reads test rows: it looks at what the student learns from, train and texts without labels. `review.csv` is
the person's file; what was drawn stands beside it in `sample.json`, so that a table that was lost can be written again.

Shapes: N rows, K classes.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from raydistill.config.run import Config
from raydistill.data.exclusion import confidence, is_wrong
from raydistill.data.labels import NO_LABEL
from raydistill.data.shards import read_shard
from raydistill.errors import UserError
from raydistill.record.commit import set_aside
from raydistill.record.fingerprint import seal, unseal
from raydistill.record.run import Run
from raydistill.record.store import Store
from raydistill.report.review import MARKS, STRATA, review_page, summary_of
from raydistill.stages.calibration import teacher_temperature
from raydistill.stages.forward import Forward
from raydistill.stages.progress import Progress
from raydistill.stages.report_files import add_to_report
from raydistill.stages.taught_rows import taught_shards
from raydistill.stages.teachers import made_here

FOLDER = "review"
SAMPLE, TABLE, PAGE = f"{FOLDER}/sample.json", f"{FOLDER}/review.csv", f"{FOLDER}/review.html"
SPLITS = ("train", "unlabelled")
SCANNED_ROWS = 20_000  # that the student is asked about, drawn by the seed
COLUMNS: tuple[str, ...] = (
    "row_id", "mark", "note", "stratum", "text", "label", "teacher", "teacher_probability", "student",
    "student_probability",
)  # fmt: skip


@dataclass(frozen=True)
class Scanned:
    """What is known of every row that the student learns from, without its text."""

    places: npt.NDArray[np.int64]  # (N, 2): the shard's number, the row in it
    row_ids_N: npt.NDArray[np.int64]
    confidence_N: npt.NDArray[np.float64]  # of the teacher
    wrong_N: npt.NDArray[np.bool_]  # it contradicts the label
    answers: npt.NDArray[np.integer]  # of the teacher: (N,) or, of sets of labels, (N, K)
    labels: npt.NDArray[np.integer]


def review(config: Config, run: Run, *, rows: int, seed: int, again: bool, progress: Progress) -> dict[str, Any]:
    """Draws the sample where there is none, reads the marks, and writes the page; what they say, into the report too.

    With `again` what stands there is kept aside under a number. Raises UserError without a finished cache, for a sample
    of other rows or another teacher, and for a table that cannot be read.
    """
    if config.task == "causal_lm":
        raise UserError("review: is of answers that are classes, and this run's are texts")
    data, cache = run.require("data"), run.require("cache")
    inputs = {"data": data.fingerprint, "cache": cache.fingerprint}
    if again:
        set_aside(run.store, FOLDER, ".")
    sample = read_sample(run.store)
    if sample is not None and {name: sample["inputs"][name] for name in inputs} != inputs:
        raise UserError(
            f"{run.store.where(FOLDER)}: was drawn from other rows or another teacher's answers. Draw again with"
            " --again; what is marked is kept aside"
        )
    if sample is None:
        student = run.complete("student")
        inputs |= {"student": student.fingerprint if student else None, "rows": rows, "seed": seed}
        sample = {"inputs": inputs, **draw(config, run, rows=rows, seed=seed, progress=progress)}
        run.store.write(SAMPLE, seal(sample))
    if not run.store.exists(TABLE):
        run.store.write(TABLE, _table(sample["rows"]).encode())
    marks = read_marks(run.store, sample)
    summary = summary_of(sample, marks)
    run.store.write(PAGE, review_page(config.name, sample, marks, summary).encode())
    if summary["judged"] and run.complete("report") is not None:
        add_to_report(run, "review", summary)
    return summary


def draw(config: Config, run: Run, *, rows: int, seed: int, progress: Progress) -> dict[str, Any]:
    """The rows of the sample with their texts, and of how many rows each stratum was drawn.

    A quarter of the sample each: `random` rows of all, so that their share of mistakes is the teacher's; of the others
    the teacher's least certain ones, some of those where it contradicts the label, and some of those where the student
    contradicts it (of at most SCANNED_ROWS). Where one of these has too few, more of the least certain ones are taken.
    """
    found, random, quarter = scan(config, run), np.random.default_rng(seed), rows // 4
    total = len(found.row_ids_N)
    chosen: dict[int, str] = {}

    def take(stratum: str, candidates_M: npt.NDArray[np.int64], count: int) -> None:
        left = candidates_M[[place not in chosen for place in candidates_M.tolist()]]
        chosen.update(dict.fromkeys(left[:count].tolist(), stratum))

    take("random", random.permutation(total), quarter)
    of_strata = {"random": total, "unsure": total, "label": int(found.wrong_N.sum())}
    least = np.argsort(found.confidence_N, kind="stable")
    take("unsure", least, quarter)
    take("label", random.permutation(np.flatnonzero(found.wrong_N)), quarter)
    students: dict[int, tuple[Any, float]] = {}
    if run.complete("student") is not None:
        progress.say("review: asking the student")
        scanned = random.permutation(total)[:SCANNED_ROWS]
        students = _students_answers(config, run, found, {*scanned.tolist(), *chosen})
        differs = [int(n) for n in scanned if not np.array_equal(students[int(n)][0], found.answers[n])]
        of_strata["student"] = len(differs)
        take("student", np.array(differs, np.int64), quarter)
    take("unsure", least, rows - len(chosen))
    return {"rows": _rows(config, run, found, chosen, students), "of": of_strata, "scanned": min(total, SCANNED_ROWS)}


def scan(config: Config, run: Run) -> Scanned:
    """What the teacher says of every row that the student learns from, as it learns it. Raises UserError."""
    divisor, parts = teacher_temperature(config, run), []
    for number, (shard, logits_NK) in enumerate(taught_shards(run, SPLITS)):
        logits_NK = logits_NK / divisor
        is_sets = shard.labels_N.ndim > 1
        count = len(shard.row_ids_N)
        parts.append(
            (
                np.stack([np.full(count, number), np.arange(count)], axis=1), shard.row_ids_N,
                confidence(logits_NK, is_sets=is_sets), is_wrong(logits_NK, shard.labels_N),
                (logits_NK > 0).astype(np.int8) if is_sets else logits_NK.argmax(axis=1), shard.labels_N,
            )
        )  # fmt: skip
    return Scanned(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _texts(run: Run, found: Scanned, numbers: set[int]) -> dict[int, str]:
    """The texts of these rows, by their number among the scanned ones."""
    data, by_shard = run.require("data"), dict[int, list[int]]()
    for number in numbers:
        by_shard.setdefault(int(found.places[number, 0]), []).append(number)
    entries, texts = data.shards(*SPLITS), dict[int, str]()
    for place, members in by_shard.items():
        shard = read_shard(run.home("data"), entries[place])
        texts |= {number: shard.texts[int(found.places[number, 1])] for number in members}
    return texts


def _students_answers(config: Config, run: Run, found: Scanned, numbers: set[int]) -> dict[int, tuple[Any, float]]:
    """The student's answer to each of these rows, and the probability that it gives it."""
    texts = _texts(run, found, numbers)
    labels = run.require("data").facts["labels"]
    forward = Forward(made_here("student", run), labels, max_length=config.data.max_length)
    order = sorted(texts)
    logits_NK = forward.logits(forward.tokens([texts[number] for number in order]))
    is_sets = found.answers.ndim > 1
    answers = (logits_NK > 0).astype(np.int8) if is_sets else logits_NK.argmax(axis=1)
    shares = confidence(logits_NK, is_sets=is_sets).tolist()
    return {number: (answers[place], shares[place]) for place, number in enumerate(order)}


def _rows(
    config: Config, run: Run, found: Scanned, chosen: dict[int, str], students: dict[int, tuple[Any, float]]
) -> list[dict[str, Any]]:
    """The rows of the sample, stratum after stratum, as they stand in the table without their marks."""
    names, texts = run.require("data").facts["labels"], _texts(run, found, set(chosen))
    rows = []
    for number, stratum in sorted(chosen.items(), key=lambda item: (list(STRATA).index(item[1]), item[0])):
        answer, share = students.get(number, (None, None))
        rows.append(
            {
                "row_id": int(found.row_ids_N[number]), "stratum": stratum, "text": texts[number],
                "label": _named(found.labels[number], names), "teacher": _named(found.answers[number], names),
                "teacher_probability": round(float(found.confidence_N[number]), 4),
                "student": "" if answer is None else _named(answer, names),
                "student_probability": "" if share is None else round(share, 4),
            }
        )  # fmt: skip
    return rows


def _named(answer: Any, names: list[str]) -> str:
    """A class's name, or the names of a set's classes; of a row without a label nothing."""
    if np.ndim(answer):
        return "|".join(names[k] for k in np.flatnonzero(np.asarray(answer) == 1))
    return "" if int(answer) == NO_LABEL else names[int(answer)]


def _table(rows: list[dict[str, Any]]) -> str:
    """The table for the person: marks and notes are empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def read_sample(store: Store) -> dict[str, Any] | None:
    """What was drawn; None where nothing was. Raises UserError for a damaged file."""
    return unseal(store.read(SAMPLE), store.where(SAMPLE)) if store.exists(SAMPLE) else None


def read_marks(store: Store, sample: dict[str, Any]) -> dict[int, tuple[str, str]]:
    """(mark, note) of the rows that have either, by row id. Raises UserError, with the line, for what is no mark."""
    where = store.where(TABLE)
    try:
        text = store.read(TABLE).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where}: is not UTF-8. Save it as UTF-8") from None
    header = text.partition("\n")[0]
    delimiter = ";" if header.count(";") > header.count(",") else ","  # as some programs for tables save it
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    if missing := [name for name in ("row_id", "mark", "note") if name not in (reader.fieldnames or ())]:
        raise UserError(f"{where}: has no column {missing[0]!r}. Keep the columns that review wrote")
    known, found = {row["row_id"] for row in sample["rows"]}, dict[int, tuple[str, str]]()
    seen = set[int]()
    for line in reader:
        place = f"{where}: line {reader.line_num}"
        number, mark, note = ((line[name] or "").strip() for name in ("row_id", "mark", "note"))
        if not number.isdigit() or int(number) not in known:
            raise UserError(f"{place}: row_id {number!r} is none of the sample. Keep the row_ids that review wrote")
        if int(number) in seen:
            raise UserError(f"{place}: row_id {number} stands twice. Remove one of the lines")
        seen.add(int(number))
        if mark.lower() not in ("", *MARKS):
            raise UserError(f"{place}: mark: found {mark!r}; it is one of {', '.join(MARKS)}, or empty")
        if mark or note:
            found[int(number)] = (mark.lower(), note)
    return found


def has_review(run: Run) -> bool:
    """Whether a sample was drawn here, or in the run that this one takes its data from."""
    return any(store is not None and store.exists(SAMPLE) for store in (run.store, run.lender))


def marked_bad(run: Run) -> frozenset[int]:
    """The ids of the rows that a person marked bad, in this run's review or in that of the run it takes its data from.

    Raises UserError where there is none, or none of these rows.
    """
    if not has_review(run):
        raise UserError(
            f"train.exclude.marked_bad: {run.store.where(FOLDER)}: is not there. Run `raydistill review` with the run,"
            " and mark rows first"
        )
    data, found = run.require("data"), frozenset[int]()
    for store in (run.store, run.lender):
        if store is None or (sample := read_sample(store)) is None:
            continue
        if sample["inputs"]["data"] != data.fingerprint:
            raise UserError(f"train.exclude.marked_bad: {store.where(FOLDER)}: is of other rows. Review this run first")
        found |= {row for row, (mark, _) in read_marks(store, sample).items() if mark == "bad"}
    return found


def reviewed(run: Run) -> dict[str, Any] | None:
    """What a person found so far, for the report; None where no row is marked."""
    sample = read_sample(run.store)
    if sample is None or not run.store.exists(TABLE):
        return None
    summary = summary_of(sample, read_marks(run.store, sample))
    return summary if summary["judged"] else None
