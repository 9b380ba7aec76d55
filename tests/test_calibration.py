"""The fitted temperature against closed forms, a grid and another optimiser.

Shapes: N rows, K classes.
"""

import math

import numpy as np
import pytest
import torch
from loss_oracles import log_softmax

from raydistill.losses.calibration import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE, fit_temperature
from raydistill.losses.response import IGNORED_LABEL


def logits_and_labels(rows: int = 300, classes: int = 5, truth: float = 2.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels drawn from the softmax of logits / truth."""
    generator = torch.Generator().manual_seed(0)
    logits_NK = 4 * torch.randn(rows, classes, generator=generator)
    return logits_NK, torch.multinomial(torch.softmax(logits_NK / truth, dim=1), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("right", [0.55, 0.75, 0.99])
@pytest.mark.parametrize("margin", [0.5, 3.0, 15.0])
def test_two_classes_with_one_margin_have_a_closed_form(right: float, margin: float):
    # The best probability is the share of right rows: sigmoid(margin / T) = right.
    logits_NK = torch.tensor([[margin, 0.0]]).repeat(100, 1)
    labels_N = torch.tensor([0] * round(100 * right) + [1] * round(100 * (1 - right)))
    expected = margin / math.log(right / (1 - right))
    assert fit_temperature(logits_NK, labels_N) == pytest.approx(expected, rel=1e-8)


def test_no_temperature_of_a_grid_is_better():
    logits_NK, labels_N = logits_and_labels()
    rows, labels = logits_NK.double().tolist(), labels_N.tolist()

    def nll(temperature: float) -> float:
        return -sum(log_softmax(row, temperature)[label] for row, label in zip(rows, labels, strict=True))

    found = fit_temperature(logits_NK, labels_N)
    assert found == pytest.approx(2.5, rel=0.2)
    assert all(nll(found) <= nll(found * factor) for factor in (0.1, 0.5, 0.9, 0.999, 1.001, 1.1, 2.0, 10.0))


def test_it_agrees_with_a_bounded_search_over_the_logarithm():
    logits_NK, labels_N = logits_and_labels()
    optimize, logits, labels = pytest.importorskip("scipy.optimize"), logits_NK.double().numpy(), labels_N.numpy()

    def nll(exponent: float) -> float:
        tempered = logits / math.exp(exponent)
        return float((np.logaddexp.reduce(tempered, axis=1) - tempered[np.arange(len(labels)), labels]).mean())

    expected = math.exp(optimize.minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-8}).x)
    assert fit_temperature(logits_NK, labels_N) == pytest.approx(expected, rel=1e-6)
    assert fit_temperature(logits_NK, labels_N.int()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_scaled_logits_have_the_scaled_temperature_and_a_shift_changes_nothing(scale: float):
    logits_NK, labels_N = logits_and_labels()
    found = fit_temperature(logits_NK.double(), labels_N)
    shifted = scale * logits_NK.double() + torch.arange(300.0).unsqueeze(1)
    assert fit_temperature(shifted, labels_N) == pytest.approx(scale * found, rel=1e-7)


def test_rows_without_a_label_do_not_count():
    logits_NK, labels_N = logits_and_labels()
    some = labels_N.clone()
    some[::3] = IGNORED_LABEL
    kept = some != IGNORED_LABEL
    assert fit_temperature(logits_NK, some) == fit_temperature(logits_NK[kept], labels_N[kept])


def test_what_has_no_best_temperature_gets_a_bound():
    certain = torch.tensor([[8.0, 0.0, 0.0], [0.0, 8.0, 0.0]])
    assert fit_temperature(certain, torch.tensor([0, 1])) == pytest.approx(LOWEST_TEMPERATURE)
    assert fit_temperature(certain, torch.tensor([1, 2])) == pytest.approx(HIGHEST_TEMPERATURE)
    assert fit_temperature(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])) == 1.0


def test_the_largest_float16_logits_are_searched_without_nan():
    # Three of four rows are right by 131,008: the best temperature, 119,249, is beyond the bound; by 65.5 it is not.
    logits_NK = torch.tensor([[65504.0, -65504.0]] * 4).half()
    assert fit_temperature(logits_NK, torch.tensor([0, 0, 0, 1])) == pytest.approx(HIGHEST_TEMPERATURE)
    assert fit_temperature(logits_NK / 2000, torch.tensor([0, 0, 0, 1])) == pytest.approx(65.5 / math.log(3), rel=1e-3)


def test_what_cannot_be_fitted_is_refused():
    logits_NK, labels_N = logits_and_labels()
    with pytest.raises(ValueError, match="every row's label is -100"):
        fit_temperature(logits_NK, torch.full((300,), IGNORED_LABEL))
    with pytest.raises(ValueError, match="every row's label is -100"):
        fit_temperature(logits_NK[:0], labels_N[:0])
    with pytest.raises(ValueError, match="300 rows of logits but labels of shape"):
        fit_temperature(logits_NK, labels_N[:5])
    with pytest.raises(ValueError, match="labels must be from 0 to 4"):
        fit_temperature(logits_NK, labels_N + 1)
    with pytest.raises(ValueError, match="logits must be finite"):
        fit_temperature(logits_NK / 0, labels_N)
