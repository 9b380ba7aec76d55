"""The objective, forward KL and both cross-entropies against float64 loops written from the papers.

Shapes: N rows, K classes.
"""

import math
import pickle

import loss_oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_oracles import ORACLES, numerical_gradient, standardised

from raydistill.losses.multilabel import binary_cross_entropy_sum, binary_kl_sum
from raydistill.losses.objective import Objective
from raydistill.losses.registry import RESPONSE_LOSSES
from raydistill.losses.response import IGNORED_LABEL, cross_entropy_sum, forward_kl_sum
from raydistill.targets import TeacherTargets

TEMPERATURES = [0.5, 1.0, 2.0, 4.0, 8.0]


def softmax(row: list[float], temperature: float) -> list[float]:
    largest = max(row)
    powers = [math.exp((value - largest) / temperature) for value in row]
    return [power / sum(powers) for power in powers]


def kl_oracle(teacher_NK: torch.Tensor, student_NK: torch.Tensor, temperature: float) -> float:
    """T^2 sum_n sum_k p ln(p / q), the loss of Hinton et al. 2015, section 2, in float64."""
    total = 0.0
    for teacher, student in zip(teacher_NK.tolist(), student_NK.tolist(), strict=True):
        p, q = softmax(teacher, temperature), softmax(student, temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total


def cross_entropy_oracle(student_NK: torch.Tensor, labels: list[int]) -> float:
    rows = zip(student_NK.tolist(), labels, strict=True)
    return sum(-math.log(softmax(row, 1.0)[label]) for row, label in rows if label != IGNORED_LABEL)


def logits(rows: int = 6, classes: int = 7, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_forward_kl_is_the_papers(temperature: float):
    teacher, student = logits(seed=1), logits(seed=2)
    found = forward_kl_sum(teacher, student, temperature=temperature)
    assert found.item() == pytest.approx(kl_oracle(teacher, student, temperature), rel=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_forward_kl_of_equal_inputs_is_zero(temperature: float):
    # A loss that leaves out the teacher's entropy is not zero here, and its curve cannot be read.
    assert forward_kl_sum(logits(), logits(), temperature=temperature).item() == pytest.approx(0.0, abs=1e-6)


@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0.01, 30.0), st.floats(0.01, 30.0), st.floats(0.3, 20.0))
def test_forward_kl_is_never_negative_and_ignores_a_shift(
    seed: int, classes: int, teacher_scale: float, student_scale: float, temperature: float
):
    teacher = logits(classes=classes, seed=seed, scale=teacher_scale)
    student = logits(classes=classes, seed=seed + 1, scale=student_scale)
    found = forward_kl_sum(teacher, student, temperature=temperature).item()
    assert found >= -1e-5 * temperature**2
    shift = torch.arange(6.0)[:, None]
    moved = forward_kl_sum(teacher + shift, student - 2 * shift, temperature=temperature).item()
    assert moved == pytest.approx(found, rel=1e-3, abs=1e-4 * temperature**2)


def test_forward_kl_is_not_symmetric_and_weighs_by_the_teacher():
    teacher, student = torch.tensor([[8.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0]])
    there = forward_kl_sum(teacher, student, temperature=1.0).item()
    back = forward_kl_sum(student, teacher, temperature=1.0).item()
    assert there == pytest.approx(kl_oracle(teacher, student, 1.0), rel=1e-5)
    assert there < 1.1 < 4.0 < back


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_forward_kl_gradient_is_temperature_times_the_difference_of_probabilities(temperature: float):
    # d/dz T^2 KL(p || softmax(z / T)) = T (q - p), from the softmax's derivative.
    teacher, student = logits(seed=1), logits(seed=2).requires_grad_()
    forward_kl_sum(teacher, student, temperature=temperature).backward()
    p, q = (torch.softmax(z.detach().double() / temperature, dim=-1) for z in (teacher, student))
    torch.testing.assert_close(student.grad, (temperature * (q - p)).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_forward_kl_gradient_is_its_finite_difference(temperature: float):
    teacher, student = logits(2, 3, seed=1), logits(2, 3, seed=2).requires_grad_()
    forward_kl_sum(teacher, student, temperature=temperature).backward()
    assert student.grad is not None
    for place in [(0, 0), (0, 2), (1, 1)]:
        step = torch.zeros(2, 3, dtype=torch.float64)
        step[place] = 1e-5
        values = [kl_oracle(teacher.double(), student.detach().double() + d, temperature) for d in (step, -step)]
        assert student.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-5)


def test_squared_temperature_keeps_the_gradients_size():
    teacher, student = logits(64, 10, seed=1, scale=1.0), logits(64, 10, seed=2, scale=1.0)

    def size(temperature: float) -> float:
        leaf = student.clone().requires_grad_()
        forward_kl_sum(teacher, leaf, temperature=temperature).backward()
        assert leaf.grad is not None
        return leaf.grad.norm().item()

    # The limit for high temperatures: (z - v) / K with centred logits (Hinton et al. 2015, section 2.1).
    centred = [z - z.mean(dim=1, keepdim=True) for z in (student, teacher)]
    limit = ((centred[0] - centred[1]) / 10).norm().item()
    assert size(100.0) == pytest.approx(limit, rel=0.02)
    assert size(10.0) == pytest.approx(limit, rel=0.2)


def test_no_gradient_reaches_the_teacher_through_its_targets():
    student = logits(seed=2).requires_grad_()
    loss, parts = Objective(2.0, 0.5)(student, torch.zeros(6, dtype=torch.long), TeacherTargets(logits(seed=1)))
    loss.backward()
    assert student.grad is not None
    assert not any(part.requires_grad for part in parts.values())


def test_cross_entropy_is_the_papers_and_a_label_of_minus_100_adds_nothing():
    labels = [0, 3, IGNORED_LABEL, 6, 1, IGNORED_LABEL]
    student = logits().requires_grad_()
    found = cross_entropy_sum(student, torch.tensor(labels))
    found.backward()
    assert found.item() == pytest.approx(cross_entropy_oracle(student.detach(), labels), rel=1e-5)
    assert student.grad is not None
    assert student.grad.abs().sum(dim=1).eq(0).tolist() == [label == IGNORED_LABEL for label in labels]


def test_cross_entropy_of_ignored_rows_alone_is_zero_and_not_nan():
    assert cross_entropy_sum(logits(2), torch.full((2,), IGNORED_LABEL)).item() == 0


def test_losses_are_sums_over_rows():
    teacher, student, labels = logits(seed=1), logits(seed=2), torch.tensor([0, 1, 2, 3, 4, 5])
    parts = (slice(0, 2), slice(2, 6))
    kl = sum(forward_kl_sum(teacher[part], student[part], temperature=2.0).item() for part in parts)
    assert forward_kl_sum(teacher, student, temperature=2.0).item() == pytest.approx(kl, rel=1e-6)
    cross_entropy = sum(cross_entropy_sum(student[part], labels[part]).item() for part in parts)
    assert cross_entropy_sum(student, labels).item() == pytest.approx(cross_entropy, rel=1e-6)
    assert forward_kl_sum(teacher[:0], student[:0], temperature=2.0).item() == 0


def test_bfloat16_inputs_are_computed_in_float32():
    teacher, student = logits(seed=1).bfloat16(), logits(seed=2).bfloat16()
    kl = forward_kl_sum(teacher, student, temperature=2.0)
    cross_entropy = cross_entropy_sum(student, torch.zeros(6, dtype=torch.long))
    assert kl.dtype == cross_entropy.dtype == torch.float32
    assert kl.item() == pytest.approx(kl_oracle(teacher.double(), student.double(), 2.0), rel=1e-5)
    assert cross_entropy.item() == pytest.approx(cross_entropy_oracle(student.double(), [0] * 6), rel=1e-5)


def test_large_logits_stay_finite():
    teacher, student = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    assert forward_kl_sum(teacher, student, temperature=1.0).item() == pytest.approx(2e4)
    assert cross_entropy_sum(student, torch.tensor([0])).item() == pytest.approx(2e4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float):
    with pytest.raises(ValueError, match="temperature must be positive"):
        forward_kl_sum(logits(), logits(), temperature=temperature)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"teacher \(6, 7\) and student \(6, 1\) differ"):
        forward_kl_sum(logits(), logits(classes=1), temperature=1.0)
    with pytest.raises(ValueError, match="6 rows of logits but labels"):
        cross_entropy_sum(logits(), torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("alpha", [0.3, 0.9, 1.0])
def test_objective_mixes_by_alpha_and_reports_both_parts(alpha: float):
    teacher, student, labels = logits(seed=1), logits(seed=2), [0, 1, 2, 3, 4, 5]
    loss, parts = Objective(3.0, alpha)(student, torch.tensor(labels), TeacherTargets(teacher))
    kl, cross_entropy = kl_oracle(teacher, student, 3.0), cross_entropy_oracle(student, labels)
    assert loss.item() == pytest.approx(alpha * kl + (1 - alpha) * cross_entropy, rel=1e-5)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(
        {"kl": kl, "cross_entropy": cross_entropy}, rel=1e-5
    )


def test_objective_without_alpha_is_cross_entropy_and_needs_no_teacher():
    student, labels = logits(), [0, 1, 2, 3, 4, 5]
    loss, parts = Objective()(student, torch.tensor(labels), None)
    assert not Objective(4.0, 0.0).needs_teacher
    assert loss.item() == pytest.approx(cross_entropy_oracle(student, labels), rel=1e-5)
    assert set(parts) == {"cross_entropy"}


def test_objective_refuses_to_go_without_the_teacher_it_needs():
    assert Objective(4.0, 0.1).needs_teacher
    with pytest.raises(ValueError, match=r"alpha 0\.1 needs the teacher's logits"):
        Objective(4.0, 0.1)(logits(), torch.zeros(6, dtype=torch.long), None)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_cross_entropy_is_the_papers(smoothing: float):
    labels = [0, 3, IGNORED_LABEL, 6, 1, IGNORED_LABEL]
    student = logits().requires_grad_()
    found = cross_entropy_sum(student, torch.tensor(labels), label_smoothing=smoothing)
    found.backward()

    def paper(rows: loss_oracles.Rows) -> float:
        return loss_oracles.cross_entropy(rows, labels, smoothing)

    assert found.item() == pytest.approx(paper(student.detach().double().tolist()), rel=1e-5)
    assert student.grad is not None
    expected = numerical_gradient(paper, student.detach())
    torch.testing.assert_close(student.grad.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_a_label_smoothing_that_is_no_share_is_refused(smoothing: float):
    with pytest.raises(ValueError, match="label_smoothing must be from 0 to 1"):
        cross_entropy_sum(logits(), torch.zeros(6, dtype=torch.long), label_smoothing=smoothing)
    with pytest.raises(ValueError, match="label_smoothing must be from 0 to 1"):
        binary_cross_entropy_sum(logits(), torch.zeros(6, 7), label_smoothing=smoothing)


def some_binary_labels(rows: int = 6, classes: int = 7) -> torch.Tensor:
    """Zeros and ones of which about a third is unknown."""
    drawn = torch.randint(3, (rows, classes), generator=torch.Generator().manual_seed(0)).float()
    return torch.where(drawn == 2, float(IGNORED_LABEL), drawn)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.long, torch.float16])
def test_binary_cross_entropy_is_summed_over_rows_and_known_classes(smoothing: float, dtype: torch.dtype):
    labels, student = some_binary_labels(), logits().requires_grad_()
    found = binary_cross_entropy_sum(student, labels.to(dtype), label_smoothing=smoothing)
    found.backward()

    def paper(rows: loss_oracles.Rows) -> float:
        return loss_oracles.binary_cross_entropy(rows, labels.tolist(), smoothing)

    assert found.item() == pytest.approx(paper(student.detach().double().tolist()), rel=1e-5)
    assert student.grad is not None
    expected = numerical_gradient(paper, student.detach())
    torch.testing.assert_close(student.grad.double(), expected, rtol=1e-4, atol=1e-6)
    assert student.grad[labels == IGNORED_LABEL].eq(0).all()


def test_binary_cross_entropy_keeps_the_small_loss_of_a_right_class():
    # F.binary_cross_entropy_with_logits is off by one percent at -10: it takes a log-sigmoid of -10.00005 from -10.
    for logit, label in ((-10.0, 0.0), (10.0, 1.0), (-30.0, 0.0), (30.0, 1.0)):
        found = binary_cross_entropy_sum(torch.tensor([[logit]]), torch.tensor([[label]])).item()
        assert found == pytest.approx(math.log1p(math.exp(-abs(logit))), rel=1e-5)


def test_binary_cross_entropy_of_the_largest_logits_stays_finite():
    student = torch.tensor([[65504.0, -65504.0, 65504.0, -65504.0]]).half().requires_grad_()
    loss = binary_cross_entropy_sum(student, torch.tensor([[0.0, 0.0, float(IGNORED_LABEL), 1.0]]))
    loss.backward()
    assert loss.item() == 2 * 65504
    assert student.grad is not None
    assert student.grad.tolist() == [[1.0, 0.0, 0.0, -1.0]]


def test_binary_cross_entropy_of_nothing_is_zero():
    assert binary_cross_entropy_sum(logits(), torch.full((6, 7), float(IGNORED_LABEL))).item() == 0
    empty = logits(0).requires_grad_()
    binary_cross_entropy_sum(empty, torch.zeros(0, 7)).backward()
    assert empty.grad is not None
    with pytest.raises(ValueError, match=r"logits \(6, 7\) and labels \(6,\) differ"):
        binary_cross_entropy_sum(logits(), torch.zeros(6))


def test_a_class_of_its_own_is_a_softmax_over_it_and_zero():
    # Ties the sigmoid's losses to the softmax's: sigmoid(z) = softmax(z, 0).
    teacher, student = logits(5, 1, seed=1), logits(5, 1, seed=2)
    both = [torch.cat([z, torch.zeros(5, 1)], dim=1) for z in (teacher, student)]
    kl = forward_kl_sum(*both, temperature=3.0).item()
    assert binary_kl_sum(teacher, student, temperature=3.0).item() == pytest.approx(kl, rel=1e-5)
    labels = torch.tensor([0, 1, 1, 0, 1])
    cross_entropy = cross_entropy_sum(both[1], labels).item()  # class 0 of two is "yes"
    assert binary_cross_entropy_sum(student, 1 - labels[:, None]).item() == pytest.approx(cross_entropy, rel=1e-5)


@pytest.mark.parametrize("kind", list(RESPONSE_LOSSES))
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_objective_of_every_kind_is_its_mixture(kind: str, smoothing: float):
    loss, temperature = RESPONSE_LOSSES[kind], 3.0 if RESPONSE_LOSSES[kind].uses_temperature else 1.0
    teacher, student = logits(seed=1), logits(seed=2)
    labels = some_binary_labels() if loss.multi_label else torch.tensor([0, 3, IGNORED_LABEL, 6, 1, IGNORED_LABEL])
    objective = Objective(temperature, 0.7, kind, label_smoothing=smoothing)
    found, parts = objective(student, labels, TeacherTargets(teacher))
    rows = student.double().tolist()
    hard = loss_oracles.binary_cross_entropy if loss.multi_label else loss_oracles.cross_entropy
    cross_entropy = hard(rows, labels.tolist(), smoothing)
    response = ORACLES[kind](teacher.double().tolist(), rows, labels.tolist(), temperature, loss.resolved({}))
    expected = {"cross_entropy": cross_entropy, ("kl" if kind == "forward_kl" else kind): response}
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(expected, rel=1e-5)
    assert found.item() == pytest.approx(0.7 * response + 0.3 * cross_entropy, rel=1e-5)


def test_objective_hands_its_parameters_to_the_loss():
    teacher, student, labels = logits(seed=1), logits(seed=2), torch.zeros(6, dtype=torch.long)
    teacher_rows, rows = teacher.double().tolist(), student.double().tolist()
    for beta in (0.1, 0.8):
        found, _ = Objective(2.0, 1.0, "jsd", {"beta": beta})(student, labels, TeacherTargets(teacher))
        expected = ORACLES["jsd"](teacher_rows, rows, labels.tolist(), 2.0, {"beta": beta})
        assert found.item() == pytest.approx(expected, rel=1e-5)


def test_objective_standardises_for_the_response_loss_alone():
    teacher, student, labels = logits(seed=1), logits(seed=2), [0, 1, 2, 3, 4, 5]
    objective = Objective(2.0, 0.5, standardise=True)
    _, parts = objective(student, torch.tensor(labels), TeacherTargets(teacher))
    sides = [[standardised(row) for row in z.double().tolist()] for z in (teacher, student)]
    expected = ORACLES["forward_kl"](sides[0], sides[1], labels, 2.0, {})
    assert parts["kl"].item() == pytest.approx(expected, rel=1e-5)
    assert parts["cross_entropy"].item() == pytest.approx(cross_entropy_oracle(student, labels), rel=1e-5)


def test_objective_with_the_teachers_labels_needs_the_teacher_and_no_label():
    teacher, student, none = logits(seed=1), logits(seed=2), torch.full((6,), IGNORED_LABEL)
    best = [max(range(7), key=lambda k, row=row: row[k]) for row in teacher.tolist()]
    objective = Objective(hard_targets="teacher")
    found, _ = objective(student, none, TeacherTargets(teacher))
    assert objective.needs_teacher
    assert found.item() == pytest.approx(cross_entropy_oracle(student, best), rel=1e-5)
    with pytest.raises(ValueError, match="hard_targets teacher needs the teacher's logits"):
        objective(student, none, None)
    several, _ = Objective(kind="binary_kl", hard_targets="teacher")(student, none, TeacherTargets(teacher))
    likely = [[float(value > 0) for value in row] for row in teacher.tolist()]
    expected = loss_oracles.binary_cross_entropy(student.double().tolist(), likely)
    assert several.item() == pytest.approx(expected, rel=1e-5)


def test_objective_of_multi_label_data_without_alpha_is_binary_cross_entropy():
    student, labels = logits(), some_binary_labels()
    found, parts = Objective(kind="binary_kl")(student, labels, None)
    expected = loss_oracles.binary_cross_entropy(student.double().tolist(), labels.tolist())
    assert found.item() == parts["cross_entropy"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "dkd"])
def test_rows_without_a_label_learn_from_the_teacher_alone(kind: str):
    teacher, student = logits(seed=1), logits(seed=2).requires_grad_()
    labels = torch.tensor([0, IGNORED_LABEL, 2, IGNORED_LABEL, 4, 5])
    loss, parts = Objective(2.0, 0.5, kind)(student, labels, TeacherTargets(teacher))
    loss.backward()
    known = (labels != IGNORED_LABEL).nonzero().squeeze()
    _, of_known = Objective(2.0, 0.5, kind)(student.detach()[known], labels[known], TeacherTargets(teacher[known]))
    assert parts["cross_entropy"].item() == pytest.approx(of_known["cross_entropy"].item(), rel=1e-6)
    part = "kl" if kind == "forward_kl" else kind
    assert parts[part] > of_known[part]
    assert student.grad is not None
    assert student.grad.abs().sum(dim=1).gt(0).all()


@pytest.mark.parametrize(("settings", "message"), [
    ({"kind": "forward"}, "kind must be one of forward_kl, reverse_kl, .*, found 'forward'"),
    ({"kind": "jsd", "parameters": {"beta": 1.5}}, r"jsd: beta must be in \[0, 1\], found 1.5"),
    ({"kind": "skew_reverse_kl", "parameters": {"skew": 1.0}}, r"skew must be in \[0, 1\), found 1.0"),
    ({"parameters": {"beta": 0.5}}, "forward_kl: beta is no parameter of this loss, which has none; remove it"),
    ({"alpha": 1.5}, "alpha must be from 0 to 1, found 1.5"),
    ({"alpha": math.nan}, "alpha must be from 0 to 1"),
    ({"label_smoothing": 2.0}, "label_smoothing must be from 0 to 1, found 2.0"),
    ({"kind": "logit_mse", "temperature": 4.0}, "logit_mse takes no temperature, found 4.0; leave it at 1"),
    ({"kind": "binary_kl", "standardise": True}, "standardise moves the logit at which binary_kl says yes"),
    ({"hard_targets": "both"}, "hard_targets must be labels or teacher, found 'both'"),
])  # fmt: skip
def test_objective_refuses_what_it_would_ignore(settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Objective(**settings)  # type: ignore[arg-type]


def test_an_objective_reaches_a_worker_as_it_is():
    objective = Objective(2.0, 0.5, "dkd", {"non_target_weight": 2.0}, standardise=True)
    assert pickle.loads(pickle.dumps(objective)) == objective  # noqa: S301
