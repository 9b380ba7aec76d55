"""The mean of several teachers against a float64 loop written from its definition.

Shapes: N rows, K classes, M members.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill.losses.ensemble import ensemble_logits

NUMBERS = st.floats(-30, 30, width=32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[list[float]]], list[float]]:
    teachers, rows, classes = (draw(st.integers(1, 4)) for _ in range(3))
    row = st.lists(NUMBERS, min_size=classes, max_size=classes)
    members = [[draw(row) for _ in range(rows)] for _ in range(teachers)]
    weights = draw(st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=teachers, max_size=teachers))
    weights[0] += 1e-3
    return members, weights


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@given(cases())
def test_all_three_means(case: tuple[list[list[list[float]]], list[float]]):
    members, weights = case
    shares = [weight / sum(weights) for weight in weights]
    tensors = [torch.tensor(member) for member in members]

    def mean(values: list[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    for n, rows in enumerate(zip(*members, strict=True)):
        logits = ensemble_logits(tensors, weights, combine="logits")[n]
        expected = [mean(list(values)) for values in zip(*rows, strict=True)]
        assert logits.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
        probabilities = [mean(list(values)) for values in zip(*map(softmax, rows), strict=True)]
        logs = ensemble_logits(tensors, weights, combine="probabilities")[n]
        assert softmax(logs.tolist()) == pytest.approx(probabilities, rel=1e-4, abs=1e-7)
        several = ensemble_logits(tensors, weights, combine="probabilities", multi_label=True)[n]
        chances = [mean([sigmoid(value) for value in values]) for values in zip(*rows, strict=True)]
        assert [sigmoid(value) for value in several.tolist()] == pytest.approx(chances, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_equal_members_are_the_one_of_them_and_a_weight_of_0_is_no_member(combine: str, multi_label: bool):
    generator = torch.Generator().manual_seed(0)
    one, other = 5 * torch.randn(2, 6, 4, generator=generator)
    settings = {"combine": combine, "multi_label": multi_label}
    same = ensemble_logits([one, one, one], [1, 2, 0.5], **settings)  # type: ignore[arg-type]
    alone = ensemble_logits([one, other], [3, 0], **settings)  # type: ignore[arg-type]
    for found in (same, alone):
        assert found.dtype == torch.float32
        if multi_label or combine == "logits":
            torch.testing.assert_close(found, one)
        torch.testing.assert_close(torch.softmax(found, dim=1), torch.softmax(one, dim=1))
    turned = ensemble_logits([other, one], [1, 4], **settings)  # type: ignore[arg-type]
    torch.testing.assert_close(ensemble_logits([one, other], [0.4, 0.1], **settings), turned)  # type: ignore[arg-type]


@pytest.mark.parametrize("multi_label", [False, True])
def test_float16_extremes_stay_finite(multi_label: bool):
    one = torch.tensor([[60000.0, -60000.0, 0.0]]).half()
    for combine in ("logits", "probabilities"):
        found = ensemble_logits([one, -one], [1, 1], combine=combine, multi_label=multi_label)  # type: ignore[arg-type]
        assert found.isfinite().all()
        # Two that are certain of opposites: even odds between what each is certain of.
        assert found[0, 0] == found[0, 1]


@pytest.mark.parametrize(
    ("shapes", "weights", "message"),
    [
        ([(2, 3)], [1, 1], "expected a weight for each of 1 teachers"),
        ([], [], "expected a weight for each of 0 teachers"),
        ([(2, 3), (2, 3)], [0, 0], "not all zero"),
        ([(2, 3), (2, 3)], [2, -1], "must not be negative"),
        ([(2, 3), (2, 4)], [1, 1], "differ in shape"),
    ],
)
def test_what_has_no_mean_is_refused(shapes: list[tuple[int, int]], weights: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        ensemble_logits([torch.zeros(shape) for shape in shapes], weights, combine="logits")
