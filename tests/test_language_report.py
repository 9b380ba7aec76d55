"""Figures of language models against plain formulas."""

import math

import numpy as np
import pytest
import torch

from raydistill.losses.token_measures import own_measures, teacher_measures
from raydistill.report.language import compare_models, language_metrics, reliability


def sums(rows: int = 40, documents: int = 12) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    positions = random.integers(2, 30, rows)
    found = {"positions": positions, "document": np.sort(random.integers(0, documents, rows))}
    hardness = random.normal(0, 0.4, rows)  # of a row, for all models alike: what pairing takes out
    for name, nats in {"teacher": 2.0, "student": 2.2, "control": 2.3}.items():
        found[f"nll_{name}"] = positions * (nats + hardness + random.normal(0, 0.02, rows))
        found[f"accuracy_{name}"] = positions * 0.5
        found[f"confidence_{name}"] = random.uniform(0, 1, int(positions.sum())).astype(np.float32)
        found[f"right_{name}"] = random.uniform(0, 1, int(positions.sum())) < found[f"confidence_{name}"]
    return found


def test_metrics_are_means_over_positions():
    found = sums()
    metrics = language_metrics(found, "student")
    mean = found["nll_student"].sum() / found["positions"].sum()
    assert metrics["nll"] == pytest.approx(mean)
    assert metrics["perplexity"] == pytest.approx(math.exp(mean))
    assert metrics["accuracy"] == pytest.approx(0.5)


def test_reliability_has_the_bins_of_the_calibration_error():
    found = sums()
    bins = reliability(found, "student")
    total = found["positions"].sum()
    assert sum(one["rows"] for one in bins) == total
    assert [one["probability"] for one in bins] == sorted(one["probability"] for one in bins)
    assert sum(one["held"] * one["rows"] for one in bins) == pytest.approx(found["right_student"].sum())
    gap = sum(abs(one["held"] - one["probability"]) * one["rows"] for one in bins) / total
    assert language_metrics(found, "student")["ece"] == pytest.approx(gap)


def test_intervals_draw_whole_documents_for_all_models_together():
    found = sums()
    result = compare_models(found, resamples=2000, seed=1)
    teacher, student, control = (
        math.exp(found[f"nll_{name}"].sum() / found["positions"].sum()) for name in ("teacher", "student", "control")
    )
    assert result["retention"] == pytest.approx(teacher / student)
    assert result["gain_over_control"] == pytest.approx(control - student)
    assert result["gap_closed"] == pytest.approx(math.log(control / student) / math.log(control / teacher))
    # The same by a plain loop over draws of documents.
    random, ids = np.random.default_rng(5), np.unique(found["document"])
    rows_of = {document: np.flatnonzero(found["document"] == document) for document in ids}
    drawn = []
    for _ in range(2000):
        rows = np.concatenate([rows_of[document] for document in random.choice(ids, len(ids))])
        total = found["positions"][rows].sum()
        drawn.append([math.exp(found[f"nll_{name}"][rows].sum() / total) for name in ("teacher", "student", "control")])
    values = np.array(drawn)
    expected = np.percentile(values[:, 0] / values[:, 1], [2.5, 97.5])
    assert result["retention_ci95"] == pytest.approx(expected, abs=0.01)
    gains = np.percentile(values[:, 2] - values[:, 1], [2.5, 97.5])
    assert result["gain_over_control_ci95"] == pytest.approx(gains, abs=0.1)
    assert gains[0] > 0
    # Apart from each other the models' intervals would overlap: what is hard for one is hard for all.
    assert np.percentile(values[:, 1], 97.5) > np.percentile(values[:, 2], 2.5)


def test_calibration_is_over_positions_in_bins_of_equal_mass():
    found = sums()
    found["confidence_student"] = np.repeat([0.2, 0.9], [60, 90]).astype(np.float32)
    found["right_student"] = np.concatenate([np.arange(60) % 5 == 0, np.ones(90, bool)])
    assert language_metrics(found, "student")["ece"] == pytest.approx(0.1 * 90 / 150)
    random = np.random.default_rng(2)
    confidence = random.permutation(np.linspace(0.05, 0.95, 3000)).astype(np.float32)
    right = random.uniform(size=3000) < confidence**2
    found["confidence_student"], found["right_student"] = confidence, right
    order = sorted(range(3000), key=lambda place: confidence[place])
    gaps = [abs(np.mean([confidence[i] - right[i] for i in order[n * 200 : (n + 1) * 200]])) for n in range(15)]
    assert language_metrics(found, "student")["ece"] == pytest.approx(np.mean(gaps), rel=1e-5)


def test_measures_of_positions_by_plain_formulas():
    torch.manual_seed(0)
    ours, theirs, labels = torch.randn(6, 20), torch.randn(6, 20), torch.randint(0, 20, (6,))
    own, beside = own_measures(ours, labels), teacher_measures(ours, theirs)
    for row in range(6):
        p, q = (np.exp(x[row].double().numpy()) / np.exp(x[row].double().numpy()).sum() for x in (theirs, ours))
        assert own["nll"][row].item() == pytest.approx(-math.log(q[labels[row]]), rel=1e-5)
        assert own["confidence"][row].item() == pytest.approx(q.max(), rel=1e-5)
        assert own["accuracy"][row].item() == float(q.argmax() == labels[row])
        assert beside["kl"][row].item() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4)
        assert beside["agreement"][row].item() == float(p.argmax() == q.argmax())
        assert beside["top5"][row].item() == float(p.argmax() in np.argsort(-q)[:5])
