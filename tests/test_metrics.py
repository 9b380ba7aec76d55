"""What the report says of a model, against formulas of their own; and the page that shows it.

Shapes: N rows, K classes.
"""

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydistill.report.choices import choices_table
from raydistill.report.metrics import (
    calibration_error,
    classifier_metrics,
    compare,
    log_softmax,
    macro_f1,
    mean_kl,
    nll,
)
from raydistill.report.page import render, table, verdict


def sample(rows: int = 800, classes: int = 7, seed: int = 0, scale: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels drawn from their own probabilities, so that the logits are calibrated."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, scale, (rows, classes))
    gumbel = generator.gumbel(size=logits.shape)
    return logits.astype(np.float32), (logits + gumbel).argmax(axis=1)


def probabilities(logits: np.ndarray) -> list[list[float]]:
    rows = [[math.exp(value - max(row)) for value in row] for row in logits.astype(np.float64).tolist()]
    return [[value / sum(row) for value in row] for row in rows]


def test_log_softmax_sums_to_one_and_takes_any_size():
    logits = np.array([[1e4, 0.0, -1e4], [3.0, 3.0, 3.0]], np.float32)
    assert np.exp(log_softmax(logits)).sum(axis=1) == pytest.approx([1, 1])
    assert log_softmax(logits)[0].tolist() == [0.0, -1e4, -2e4]


def test_nll_is_the_mean_of_minus_log_p():
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels = sample()
    by_hand = -sum(math.log(p[label]) for p, label in zip(probabilities(logits), labels, strict=True)) / len(labels)
    assert nll(logits, labels) == pytest.approx(by_hand, rel=1e-6)
    assert nll(logits, labels) == pytest.approx(sklearn.log_loss(labels, probabilities(logits)), rel=1e-6)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60))
def test_macro_f1_is_scikit_learns(pairs: list[tuple[int, int]]):
    sklearn = pytest.importorskip("sklearn.metrics")
    predicted, labels = (np.array(values) for values in zip(*pairs, strict=True))
    expected = sklearn.f1_score(labels, predicted, average="macro", zero_division=0)
    assert macro_f1(predicted, labels) == pytest.approx(expected)


def test_mean_kl_is_the_sum_over_classes():
    teacher, student = sample(50, seed=1)[0], sample(50, seed=2)[0]
    rows = zip(probabilities(teacher), probabilities(student), strict=True)
    expected = sum(a * math.log(a / b) for p, q in rows for a, b in zip(p, q, strict=True)) / 50
    assert mean_kl(teacher, student) == pytest.approx(expected, rel=1e-6)
    assert mean_kl(teacher, teacher + 3) == pytest.approx(0, abs=1e-6)


def test_calibration_error_is_that_of_fifteen_bins_of_equal_mass():
    # 75 rows make bins of 5: sort by the top probability, then |mean confidence - accuracy| of each five, on average.
    logits, labels = sample(75, seed=3)
    rows = [(max(p), p.index(max(p)) == label) for p, label in zip(probabilities(logits), labels, strict=True)]
    rows.sort(key=lambda row: row[0])
    bins = [rows[start : start + 5] for start in range(0, 75, 5)]
    gaps = [abs(sum(c for c, _ in b) / 5 - sum(hit for _, hit in b) / 5) for b in bins]
    assert calibration_error(logits, labels) == pytest.approx(sum(gaps) / 15, rel=1e-6)


def test_calibration_error_is_small_for_calibrated_logits_and_large_for_sharpened_ones():
    logits, labels = sample(30_000)
    assert calibration_error(logits, labels) < 0.015
    assert calibration_error(4 * logits, labels) > 0.1
    assert 0 <= calibration_error(logits[:3], labels[:3]) <= 1


def test_a_models_metrics_and_what_its_temperature_changes():
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels = sample()
    found = classifier_metrics(3 * logits, labels, 3.0)
    predicted = logits.argmax(axis=1)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(sklearn.f1_score(labels, predicted, average="macro"))
    assert found["nll"] == pytest.approx(nll(3 * logits, labels))
    assert found["ece"] == pytest.approx(calibration_error(3 * logits, labels))
    assert found["ece_scaled"] == pytest.approx(calibration_error(logits, labels), abs=1e-6)
    assert found["temperature"] == 3.0


def outcomes(rows: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which rows three models have right: they tend to agree."""
    generator = np.random.default_rng(seed)
    ease = generator.random(rows)
    right = [ease + generator.normal(0, 0.1, rows) < share for share in (0.9, 0.86, 0.8)]
    return right[0], right[1], right[2]


def test_comparison_is_of_shares_of_rows():
    teacher = np.array([1, 1, 1, 1, 0, 0, 1, 1, 1, 1], bool)
    student = np.array([1, 1, 1, 1, 1, 0, 1, 1, 0, 0], bool)
    control = np.array([1, 1, 0, 1, 0, 0, 1, 1, 0, 1], bool)
    found = compare(teacher, student, control, resamples=100, seed=0)
    assert found.retention == pytest.approx(7 / 8)
    assert found.gain_over_control == pytest.approx(0.1)
    assert found.gap_closed == pytest.approx(0.1 / 0.2)


def test_intervals_are_those_of_resampling_rows():
    teacher, student, control = outcomes()
    found = compare(teacher, student, control, resamples=20_000, seed=0)
    generator = np.random.default_rng(1)
    drawn = []
    for _ in range(4000):
        rows = generator.integers(0, len(teacher), len(teacher))
        drawn.append((student[rows].mean() / teacher[rows].mean(), student[rows].mean() - control[rows].mean()))
    expected = np.percentile(drawn, [2.5, 97.5], axis=0)
    # An end of such an interval has a standard error of about 0.0006 at 4,000 resamples.
    assert found.retention_ci95 == pytest.approx(expected[:, 0], abs=0.003)
    assert found.gain_over_control_ci95 == pytest.approx(expected[:, 1], abs=0.003)
    assert found.retention_ci95[0] < found.retention < found.retention_ci95[1]


def test_intervals_are_paired():
    # Two models that are right on the same rows differ by nothing in each resample.
    right = outcomes()[0]
    found = compare(right, right, right, resamples=500, seed=0)
    assert found.retention_ci95 == (1.0, 1.0)
    assert found.gain_over_control_ci95 == (0.0, 0.0)


def test_intervals_are_those_of_the_seed():
    first, again, other = (compare(*outcomes(), resamples=500, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.retention_ci95 != other.retention_ci95


def test_without_a_control_there_is_no_gain():
    teacher, student, _ = outcomes()
    found = compare(teacher, student, None, resamples=100, seed=0)
    assert found.retention == pytest.approx(student.mean() / teacher.mean())
    assert (found.gain_over_control, found.gain_over_control_ci95, found.gap_closed) == (None, None, None)


def test_there_is_no_gap_to_close_under_a_teacher_that_is_not_better():
    teacher, student, control = outcomes()
    assert compare(control, student, teacher, resamples=100, seed=0).gap_closed is None
    assert compare(control, student, control, resamples=100, seed=0).gap_closed is None
    worse = compare(teacher, control & student, control, resamples=100, seed=0)
    assert worse.gap_closed is not None
    assert worse.gap_closed < 0


def test_a_teacher_that_is_never_right_leaves_retention_undefined():
    wrong = np.zeros(10, bool)
    assert compare(wrong, ~wrong, None, resamples=100, seed=0).retention is None


EVIL = "<script>alert('x')</script>&\"><img src=x onerror=y>"


def report(**changes: Any) -> dict[str, Any]:
    """A report as evaluate writes it, with what a user chooses set to something evil."""
    model = {
        "accuracy": 0.9, "macro_f1": 0.89, "agreement": 0.95, "nll": 0.4, "ece": 0.03, "ece_scaled": 0.02,
        "parameters": 12_000_000, "size_bytes": 48_000_000, "latency_ms_p50": 8.0, "latency_ms_p90": 9.0,
        "rows_per_second": 1234.5,
    }  # fmt: skip
    lengths = [{"tokens_above": 0, "tokens_to": n, "requests": 9, "latency_ms_p50": n / 4} for n in (8, 32)]
    model |= {"latency_by_length": lengths}
    small = {**model, "parameters": 1_200_000, "size_bytes": 4_800_000, "latency_ms_p50": 2.0}
    bins = [{"probability": 0.5, "held": 0.4, "rows": 10}, {"probability": 0.9, "held": 0.8, "rows": 10}]
    kept = {"retention": 0.975, "retention_ci95": [0.96, 0.98]}
    on_set = {"student": {"accuracy": 0.5, "agreement": 0.6, "retention": 0.7}}
    scores = {"precision": 0.9, "recall": 0.8, "f1": 0.85}
    lower = {name: value - 0.1 for name, value in scores.items()}
    made = {
        "name": EVIL, "task": "classification", "created": "2030-01-01", "labels": [EVIL, "b"], "test_rows": 2000,
        "teacher": model, "student": small, "control": small, "retention": 0.98, "retention_ci95": [0.97, 0.99],
        "gain_over_control": 0.012, "gain_over_control_ci95": [0.004, 0.02], "gap_closed": 0.4,
        "teacher_forwards_per_row": 1.0, "gap_closed_ci95": [0.2, 0.6], "retention_asked": 0.99,
        "retention_shown": "not shown", "smallest_drop": 0.0061,
        "mcnemar": {"teacher": {"only_one": 3, "only_other": 43, "p_value": 0.001}},
        "others": [{"name": "onnx-int8", "kind": "export", **small, **kept}],
        "teacher_errors": {"rows": 200, "student": {"copied": 0.7, "mended": 0.2}},
        "classes": [{"label": EVIL, "rows": 9, "teacher": scores, "student": lower, "control": lower}],
        "confusions": [{"label": EVIL, "predicted": "b", "rows": 9, "teacher": 1, "student": 5}],
        "reliability": {name: {"as_it_is": bins, "scaled": bins} for name in ("teacher", "student", "control")},
        "examples": [{"text": EVIL, "label": "b", "student": EVIL, "teacher": "b", "probability": 0.9}],
        "curves": {"student": [{"step": n, "accuracy": 0.5 + n / 10} for n in range(4)], "control": []},
        "sets": {
            "elsewhere": {
                "rows": 5, "out_of_domain": True,
                "models": {"student": {"auroc": 0.9, "mean_probability": 0.4}},
            },
            "spoken": {
                "rows": 7, "models": on_set,
                "slices": [
                    {"value": EVIL, "rows": 3, "models": {"student": {**on_set["student"], "retention": None}}}
                ],
            },
        },
        "measured": {
            "latency_requests": 1024, "threads": 1, "device": EVIL, "dtype": "float32", "price_per_hour": 0.5,
            "timed_on": "cpu",
        },
        "data_report": [EVIL], "fingerprints": {EVIL: EVIL}, "environment": {"python": EVIL},
        "config": {"name": EVIL, "evaluate": {"bootstrap": 2000}, "data": {"train": "https://example.com/train.csv"}},
    }  # fmt: skip
    return made | changes


def test_page_escapes_what_a_user_chose():
    page = render(report())
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") >= 6


def test_page_loads_nothing():
    page = render(report())
    tags = re.findall(r"<(\w+)([^>]*)>", page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "a"} & {name for name, _ in tags}
    assert not any(re.search(r"\b(src|on\w+)\s*=", rest) for _, rest in tags)
    assert not re.search(r"@import|url\((?!#)", page)
    assert not re.search(r"href=.(?!#)", page)


def test_table_has_a_column_for_each_model():
    header, rows = table(report())
    assert header == ["", "teacher", "student", "control", "onnx-int8"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["accuracy"] == ["90.00%"] * 4
    assert cells["parameters"][0] == "12,000,000"
    assert cells["weights, MB"] == ["48.0", "4.8", "4.8", "4.8"]
    header, rows = table({name: value for name, value in report(others=[]).items() if name != "control"})
    assert header == ["", "teacher", "student"]
    assert all(len(row) == 3 for row in rows)


def test_verdict_says_what_is_shown_and_what_is_not():
    lines = " ".join(verdict(report()))
    assert "keeps 98.0% of the teacher's accuracy (95 % interval 97.0% to 99.0%, 2,000 test rows)" in lines
    assert "10.0 times fewer parameters and answers a single request 4.0 times as fast" in lines
    assert "+1.20 points" in lines
    assert "+0.40 to +2.00: more than chance" in lines
    assert "closes 40% of the gap" in lines
    unsure = verdict(report(gain_over_control_ci95=[-0.001, 0.02], gap_closed=None))
    assert "not shown to be more than chance" in " ".join(unsure)
    assert not any("gap" in line for line in unsure)
    assert not any("gap" in line for line in verdict(report(gap_closed=-0.3)))
    assert len(verdict(report(control=None, gain_over_control=None, gap_closed=None, others=[]))) == 3


def test_verdict_says_whether_the_retention_asked_for_is_proved():
    lines = " ".join(verdict(report()))
    assert "99 % retention: not shown with this test set. Drops in accuracy of 0.61 points or more" in lines
    assert "3 rows are right by the student alone, 43 by the teacher alone (McNemar's exact test: p = 0.001)" in lines
    assert "closes 40% of the gap between control and teacher (95 % interval 20% to 60%)" in lines


def alternative(name: str, kind: str, bytes_on_disk: int, low: float) -> dict[str, Any]:
    return {
        **report()["student"], "name": name, "kind": kind, "size_bytes": bytes_on_disk, "retention": low + 0.01,
        "retention_ci95": [low, low + 0.02],
    }  # fmt: skip


def test_verdict_names_the_smallest_model_that_is_shown_to_keep_what_was_asked_for():
    ways = [
        alternative("onnx-int8", "export", 1_200_000, 0.96),
        alternative("teacher-int8", "quantised teacher", 12_000_000, 0.991),
        alternative("onnx", "export", 4_700_000, 0.992),
    ]
    told = [line for line in verdict(report(others=ways)) if "fewer bytes on disk" in line]
    assert told == [
        "To keep 99 %, distil and export: onnx is the smallest that is shown to (100.2%, 95 % interval 99.2% to"
        " 101.2%); 10.2 times fewer bytes on disk, requests answered 4.0 times as fast.",
        "The smallest of all, onnx-int8, keeps 97.0%: 40.0 times fewer bytes on disk, requests answered 4.0 times as"
        " fast.",
    ]
    only = " ".join(verdict(report(others=ways[:2])))
    assert "To keep 99 %, quantise: teacher-int8 is the smallest that is shown to" in only


def test_verdict_says_where_nothing_is_shown_to_keep_what_was_asked_for():
    ways = [alternative("onnx-int8", "export", 1_200_000, 0.972)]
    told = [line for line in verdict(report(others=ways)) if "fewer bytes on disk" in line]
    assert len(told) == 1
    assert "To keep 99 %, distil and export: onnx-int8 comes nearest, and nothing here is shown to (98.2%" in told[0]
    assert not any("fewer bytes" in line for line in verdict(report(others=[])))


def test_choices_stand_from_the_smallest_with_what_each_is_shown_to_keep():
    ways = [alternative("a", "export", 1_200_000, 0.93), alternative("b", "quantised teacher", 12_000_000, 0.99)]
    header, *rows = choices_table(report(others=[*ways, alternative("c", "student", 1, 0.5) | {"kind": "folder"}]))
    assert header[-1] == "keeps 99 %"
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("a", "distil and export", "no"), ("student", "distil", "not shown"), ("b", "quantise", "shown"),
    ]  # fmt: skip
    assert rows[0][2:-1] == ["94.0%", "93.0% to 95.0%", "40.0", "4.0"]
    assert choices_table(report(others=[])) == []


def test_page_has_every_picture_and_table():
    page = render(report())
    labels = re.findall(r'aria-label="([^"]*)"', page)
    assert len(labels) == 5
    for text in (
        "elsewhere, 5 rows",
        "spoken, 7 rows",
        "0.900",
        "What the student has wrong",
        "at 0.5 an hour",
        "or both",
    ):
        assert text in page
    names = re.findall(r' id="([^"]*)"', page)
    assert len(names) == len(set(names))
