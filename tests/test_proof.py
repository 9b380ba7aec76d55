"""What a test set shows of a student: tests and intervals against other people's formulas, and against simulation.

Shapes: N rows, K classes.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, f1_score, precision_score, recall_score, roc_auc_score

from raydistill.report import proof
from raydistill.report.classes import confusions, of_classes, of_sets
from raydistill.report.label_sets import binary_brier, binary_reliability
from raydistill.report.metrics import brier, calibration_bins, compare, mean_gap
from raydistill.report.outside import auroc, max_probability
from raydistill.report.significance import fair_coin, kept_share, mcnemar, smallest_drop


@given(st.integers(0, 400), st.integers(0, 400))
def test_the_p_value_is_the_binomial_tests(heads: int, tails: int):
    expected = binomtest(heads, heads + tails).pvalue if heads + tails else 1.0
    assert fair_coin(heads, tails) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_counts_the_rows_that_one_model_alone_has_right():
    one = np.array([1, 1, 1, 1, 1, 1, 1, 0, 0, 1], bool)
    other = np.array([0, 0, 0, 0, 0, 0, 1, 0, 1, 1], bool)
    found = mcnemar(one, other)
    assert (found["only_one"], found["only_other"]) == (6, 1)
    assert found["p_value"] == pytest.approx((1 + 7) * 2 / 2**7)  # by hand: at most one of seven heads, both tails


def test_many_rows_do_not_overflow():
    assert 0 < fair_coin(50_600, 50_000) < 1
    assert fair_coin(50_600, 50_000) == pytest.approx(binomtest(50_600, 100_600).pvalue, rel=1e-6)
    assert fair_coin(0, 5000) == pytest.approx(0, abs=1e-300)


def test_the_smallest_drop_is_that_of_the_paired_difference():
    one, other = np.array([1] * 90 + [0] * 10, bool), np.array([1] * 84 + [0] * 6 + [1] * 2 + [0] * 8, bool)
    # 6 rows of +1 and 2 of -1 in 100: variance 8/100 - (4/100)^2.
    assert smallest_drop(one, other) == pytest.approx(1.959964 * math.sqrt((0.08 - 0.0016) / 100), rel=1e-6)
    assert smallest_drop(one, one) == 0


@pytest.mark.parametrize(
    ("interval", "state"),
    [((0.99, 1.0), "shown"), ((0.985, 0.995), "not shown"), ((0.97, 0.98), "refuted"), ((0.98, 0.99), "not shown")],
)
def test_a_retention_is_shown_by_all_of_its_interval(interval: tuple[float, float], state: str):
    assert kept_share(0.99, interval) == state


def test_the_bins_of_a_hand_calculation():
    probability = np.array([0.1, 0.2, 0.9, 0.8] + [0.5] * 26)
    held = np.array([False, True, True, False] + [True] * 13 + [False] * 13)
    bins = calibration_bins(probability, held)  # 30 rows: 15 pairs in order of probability
    assert [one.rows for one in bins] == [2] * 15
    assert (bins[0].probability, bins[0].held) == (pytest.approx(0.15), 0.5)
    assert (bins[-1].probability, bins[-1].held) == (pytest.approx(0.85), 0.5)
    pairs = [(0.5, 1.0)] * 6 + [(0.5, 0.5)] + [(0.5, 0.0)] * 6  # stable: the first 13 rows of 0.5 hold
    expected = (0.35 + 0.35 + sum(abs(p - h) for p, h in pairs)) / 15
    assert mean_gap(bins) == pytest.approx(expected)


def draw(rows: int = 400, classes: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 2, (rows, classes))
    return logits, (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)


def test_brier_is_the_squared_distance_from_the_label():
    logits, labels = draw(classes=2)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert brier(logits, labels) == pytest.approx(2 * brier_score_loss(labels, shares[:, 1]))  # both classes count
    sets = np.random.default_rng(1).integers(0, 2, (400, 3)).astype(np.int8)
    three = np.random.default_rng(2).normal(size=(400, 3))
    each = [brier_score_loss(sets[:, k], 1 / (1 + np.exp(-three[:, k]))) for k in range(3)]
    assert binary_brier(three, sets) == pytest.approx(sum(each))
    assert sum(one.rows for one in binary_reliability(three, sets)) == 1200


def test_classes_are_scored_as_scikit_learn_does():
    logits, labels = draw()
    predicted = logits.argmax(axis=1)
    found = of_classes(predicted, labels, 6)  # the last class is nobody's
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        expected = score(labels, predicted, average=None, labels=range(6), zero_division=0)
        assert [one[name] for one in found] == pytest.approx(list(expected))
    sets, three = np.random.default_rng(1).integers(0, 2, (50, 3)), np.random.default_rng(2).normal(size=(50, 3)) > 0
    expected = f1_score(sets, three, average=None, zero_division=0)
    assert [one["f1"] for one in of_sets(three, sets)] == pytest.approx(list(expected))


def test_confusions_are_those_that_differ_most():
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    teacher = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    student = np.array([1, 1, 0, 1, 1, 1, 2, 2, 0, 2])
    found = confusions(labels, teacher, student, ["a", "b", "c"])
    assert found[0] == {"label": "a", "predicted": "b", "rows": 4, "teacher": 1, "student": 3}
    assert found[1] == {"label": "c", "predicted": "a", "rows": 3, "teacher": 0, "student": 1}
    assert len(found) == 2  # b taken for c is as frequent in both


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_auroc_is_scikit_learns_with_ties(inside: list[int], outside: list[int]):
    truth = [1] * len(inside) + [0] * len(outside)
    expected = roc_auc_score(truth, inside + outside)
    assert auroc(np.array(inside, float), np.array(outside, float)) == pytest.approx(expected)


def rows_of(seed: int = 0) -> proof.Rows:
    logits, labels = draw(seed=seed)
    generator = np.random.default_rng(seed + 1)
    others = {name: logits + generator.normal(0, noise, logits.shape) for name, noise in
              (("student", 0.8), ("control", 1.5), ("onnx", 0.01))}  # fmt: skip
    texts = [f"row {number}" for number in range(len(labels))]
    return proof.Rows(texts, labels, [f"class {k}" for k in range(5)], {"teacher": logits, **others})


def test_what_happens_to_the_teachers_mistakes():
    rows = rows_of()
    teacher, student = (rows.logits[name].argmax(1) for name in ("teacher", "student"))
    wrong = teacher != rows.labels
    found = proof.teacher_errors(rows)
    assert found["rows"] == wrong.sum()
    assert found["student"]["copied"] == pytest.approx((student == teacher)[wrong].mean())
    assert found["student"]["mended"] == pytest.approx((student == rows.labels)[wrong].mean())
    assert found["onnx"]["copied"] > found["control"]["copied"]


def test_examples_are_wrong_rows_those_that_the_teacher_has_right_first():
    rows = rows_of()
    found = proof.examples(rows)
    assert 0 < len(found) <= proof.SHOWN_ERRORS
    assert all(one["student"] != one["label"] for one in found)
    right = [one["teacher"] == one["label"] for one in found]
    assert right == sorted(right, reverse=True)
    assert right[0]
    first = [one["probability"] for one, is_right in zip(found, right, strict=True) if is_right]
    assert first == sorted(first, reverse=True)


def test_the_whole_proof_of_classes_and_of_sets():
    rows = rows_of()
    temperatures = dict.fromkeys(rows.logits, 1.5)
    found = proof.proof(rows, temperatures, asked=0.5, resamples=200, seed=0)
    assert found["retention_shown"] == "shown"
    assert set(found["mcnemar"]) == {"teacher", "control"}
    assert set(found["reliability"]) == set(rows.logits)
    assert [one["label"] for one in found["classes"]] == list(rows.names)
    sets = replace(rows, labels=np.random.default_rng(5).integers(0, 2, (400, 5)).astype(np.int8))
    of_sets_found = proof.proof(sets, temperatures, asked=1.0, resamples=200, seed=0)
    assert of_sets_found["confusions"] is None
    assert of_sets_found["classes"][0]["rows"] == (sets.labels[:, 0] == 1).sum()
    assert all(0 <= one["probability"] <= 1 for one in of_sets_found["examples"])


def test_a_set_is_measured_whole_and_by_slice():
    rows = rows_of()
    slices = ["long" if number % 4 else "short" for number in range(400)]
    found = proof.of_set(rows, slices, resamples=100, seed=0)
    assert [(one["value"], one["rows"]) for one in found["slices"]] == [("long", 300), ("short", 100)]
    expected = (rows.logits["student"].argmax(1) == rows.labels)[::4].mean()
    assert found["slices"][1]["models"]["student"]["accuracy"] == pytest.approx(expected)
    parts = sum(one["rows"] * one["models"]["student"]["accuracy"] for one in found["slices"]) / 400
    assert parts == pytest.approx(found["models"]["student"]["accuracy"])


def test_rows_of_another_task_are_told_by_certainty():
    rows = rows_of()
    flat = {name: 0.05 * logits for name, logits in rows.logits.items()}
    found = proof.out_of_domain(rows.logits, flat)
    assert found["models"]["student"]["auroc"] > 0.95
    assert found["models"]["student"]["mean_probability"] == pytest.approx(max_probability(flat["student"]).mean())
    assert proof.out_of_domain(rows.logits, rows.logits)["models"]["teacher"]["auroc"] == pytest.approx(0.5)


@pytest.mark.slow
def test_intervals_hold_the_truth_in_95_of_100_test_sets():
    # Test sets drawn from a population in which the shares are known; three paired outcomes for each row.
    chances = np.array(
        [0.03, 0.02, 0.03, 0.02, 0.03, 0.04, 0.03, 0.80]
    )  # of teacher, student, control right: 000 to 111
    right = np.array([[(cell >> 2) & 1, (cell >> 1) & 1, cell & 1] for cell in range(8)], bool)
    teacher, student, control = chances @ right
    truth = {"retention": student / teacher, "gain": student - control}
    generator, sets, hits = np.random.default_rng(0), 4000, {"retention": 0, "gain": 0}
    for number in range(sets):
        rows = right[generator.choice(8, size=1000, p=chances)]
        found = compare(rows[:, 0], rows[:, 1], rows[:, 2], resamples=1000, seed=number)
        for name, interval in (("retention", found.retention_ci95), ("gain", found.gain_over_control_ci95)):
            assert interval is not None
            hits[name] += interval[0] <= truth[name] <= interval[1]
    # 4,000 sets tell the share to about 0.7 points (two standard errors).
    assert all(0.94 <= count / sets <= 0.96 for count in hits.values()), hits
