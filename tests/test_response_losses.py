"""Every response loss of the registry against float64 loops written from the papers (loss_oracles.py).

Shapes: N rows, K classes.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracles import ORACLES, Rows, numerical_gradient, softmax, standardised
from torch.profiler import ProfilerActivity, profile

from raydistill.losses.correlation import dist_sum
from raydistill.losses.decoupled import decoupled_kl_sum
from raydistill.losses.gradient import with_gradient
from raydistill.losses.registry import RESPONSE_LOSSES, Parameter
from raydistill.losses.response import (
    IGNORED_LABEL,
    forward_kl_sum,
    generalised_jsd_sum,
    logit_mse_sum,
    reverse_kl_sum,
    skew_forward_kl_sum,
    skew_reverse_kl_sum,
    teacher_labels,
    total_variation_sum,
)
from raydistill.losses.transforms import standardise

# Every kind at its defaults, and further ones where its parameters change what is computed.
CASES: list[tuple[str, dict[str, float]]] = [
    *((kind, {}) for kind in RESPONSE_LOSSES),
    *((kind, {"beta": beta}) for kind in ("jsd", "binary_jsd") for beta in (0.0, 0.02, 0.9, 1.0)),
    *((kind, {"skew": skew}) for kind in ("skew_forward_kl", "skew_reverse_kl") for skew in (0.0, 0.7)),
    ("dkd", {"target_weight": 3.0, "non_target_weight": 0.5}),
    ("dkd", {"target_weight": 0.0}),
    ("dkd", {"non_target_weight": 0.0}),
    ("dist", {"inter_weight": 0.0}),
    ("dist", {"intra_weight": 0.0}),
]
every_case = pytest.mark.parametrize(("kind", "parameters"), CASES)
every_kind = pytest.mark.parametrize("kind", list(RESPONSE_LOSSES))
ONE_LABEL = [kind for kind, loss in RESPONSE_LOSSES.items() if not loss.multi_label]
TEMPERED = [kind for kind, loss in RESPONSE_LOSSES.items() if loss.uses_temperature]


def logits(rows: int = 6, classes: int = 7, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))


def some_labels(rows: int, classes: int, seed: int = 0) -> torch.Tensor:
    """Labels of which about every fourth is missing."""
    labels_N = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(seed))
    labels_N[3::4] = IGNORED_LABEL
    return labels_N


def computed(
    kind: str,
    teacher: torch.Tensor,
    student: torch.Tensor,
    labels: torch.Tensor | None = None,
    temperature: float = 2.0,
    parameters: dict[str, float] | None = None,
) -> torch.Tensor:
    labels = some_labels(*student.shape) if labels is None else labels
    return RESPONSE_LOSSES[kind](teacher, student, labels, temperature=temperature, parameters=parameters or {})


def gradient(kind: str, teacher: torch.Tensor, student: torch.Tensor, **given: object) -> torch.Tensor:
    leaf = student.clone().requires_grad_()
    computed(kind, teacher, leaf, **given).backward()  # type: ignore[arg-type]
    assert leaf.grad is not None
    return leaf.grad


def oracle(
    kind: str, teacher: torch.Tensor, labels: torch.Tensor, temperature: float, parameters: dict[str, float]
) -> Callable[..., float]:
    """The loss from its paper as a function of the student's rows."""
    whole = RESPONSE_LOSSES[kind].resolved(parameters)
    teacher_rows, row_labels = teacher.double().tolist(), labels.tolist()
    return lambda student: ORACLES[kind](teacher_rows, student, row_labels, temperature, whole)


def test_every_kind_has_an_oracle():
    assert set(ORACLES) == set(RESPONSE_LOSSES)


@every_case
@given(
    seed=st.integers(0, 10_000), rows=st.integers(1, 6), classes=st.integers(2, 12),
    scales=st.tuples(st.floats(0.5, 10.0), st.floats(0.5, 10.0)), temperature=st.floats(0.4, 8.0),
)  # fmt: skip
@settings(max_examples=15)
def test_a_loss_is_the_papers(
    kind: str, parameters: dict[str, float],
    seed: int, rows: int, classes: int, scales: tuple[float, float], temperature: float,
):  # fmt: skip
    teacher, student = logits(rows, classes, seed, scales[0]), logits(rows, classes, seed + 1, scales[1])
    labels = some_labels(rows, classes, seed)
    found = computed(kind, teacher, student, labels, temperature, parameters)
    expected = oracle(kind, teacher, labels, temperature, parameters)(student.double().tolist())
    # Float32 carries 6e-8 of a log-probability, and those reach the largest logit over the temperature.
    size = max(1.0, float(torch.stack([teacher, student]).abs().max()) / temperature)
    weight = max([1.0, *RESPONSE_LOSSES[kind].resolved(parameters).values()])
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=2e-7 * rows * classes * weight * size * temperature**2)


@every_case
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 5])
def test_a_gradient_is_the_papers_loss_moved_a_little(
    kind: str, parameters: dict[str, float], temperature: float, classes: int
):
    temperature = temperature if RESPONSE_LOSSES[kind].uses_temperature else 1.0
    teacher, student, labels = logits(5, classes, 1), logits(5, classes, 2), some_labels(5, classes)
    found = gradient(kind, teacher, student, labels=labels, temperature=temperature, parameters=parameters)
    expected = numerical_gradient(oracle(kind, teacher, labels, temperature, parameters), student)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@every_case
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("classes", [2, 7])
def test_equal_sides_have_no_loss_and_no_gradient(
    kind: str, parameters: dict[str, float], temperature: float, classes: int
):
    # torchtune's ForwardKLLoss leaves the teacher's entropy out: equal inputs give 1.357 there.
    teacher = logits(classes=classes)
    assert computed(kind, teacher, teacher, None, temperature, parameters).item() == pytest.approx(0.0, abs=2e-5)
    found = gradient(kind, teacher, teacher, temperature=temperature, parameters=parameters)
    assert found.abs().max() <= 2e-5


@every_case
def test_a_loss_is_never_negative(kind: str, parameters: dict[str, float]):
    # NeMo-RL pins a reverse KL of -490.5; a truncated KL in verl was below zero in most steps.
    for seed in range(20):
        teacher, student = logits(seed=seed), logits(seed=seed + 1, scale=0.3 * (seed + 1))
        assert computed(kind, teacher, student, None, 1.0, parameters) >= 0


@pytest.mark.parametrize("kind", [kind for kind in ONE_LABEL if kind != "logit_mse"])
def test_a_constant_added_to_a_rows_logits_changes_nothing(kind: str):
    teacher, student, shift = logits(seed=1), logits(seed=2), torch.arange(6.0)[:, None]
    found = computed(kind, teacher, student)
    assert computed(kind, teacher + shift, student - 2 * shift).item() == pytest.approx(found.item(), rel=1e-5)


def test_logit_mse_sees_a_constant_that_standardising_removes():
    teacher = logits()
    assert logit_mse_sum(teacher, teacher + 3).item() == pytest.approx(6 * 9, rel=1e-5)
    assert logit_mse_sum(standardise(teacher), standardise(teacher + 3)).item() == pytest.approx(0, abs=1e-10)


@every_case
def test_the_order_of_classes_and_rows_changes_nothing(kind: str, parameters: dict[str, float]):
    teacher, student, labels = logits(seed=1), logits(seed=2), some_labels(6, 7)
    found = computed(kind, teacher, student, labels, 2.0, parameters).item()
    classes, rows = torch.tensor([3, 0, 6, 1, 5, 2, 4]), torch.tensor([4, 0, 5, 2, 1, 3])
    places = torch.argsort(classes)
    moved = torch.where(labels == IGNORED_LABEL, labels, places[labels.clamp(min=0)])
    by_class = computed(kind, teacher[:, classes], student[:, classes], moved, 2.0, parameters).item()
    by_row = computed(kind, teacher[rows], student[rows], labels[rows], 2.0, parameters).item()
    assert (by_class, by_row) == pytest.approx((found, found), rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [case for case in CASES if RESPONSE_LOSSES[case[0]].row_separable or case == ("dist", {"intra_weight": 0.0})],
)
def test_uneven_micro_batches_give_one_batchs_loss_and_gradient(kind: str, parameters: dict[str, float]):
    # Each is a sum over rows, and whoever averages divides once: torchtune's distributed recipe divides twice.
    teacher, student, labels = logits(9, seed=1), logits(9, seed=2), some_labels(9, 7)
    whole = student.clone().requires_grad_()
    (computed(kind, teacher, whole, labels, 2.0, parameters) / 9).backward()
    parts, total = student.clone().requires_grad_(), 0.0
    for part in (slice(0, 1), slice(1, 6), slice(6, 6), slice(6, 9)):
        loss = computed(kind, teacher[part], parts[part], labels[part], 2.0, parameters) / 9
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(computed(kind, teacher, student, labels, 2.0, parameters).item() / 9, rel=1e-5)
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-5, atol=1e-7)


def test_the_intra_class_term_is_of_one_micro_batch():
    # The docstring says so, and the registry does, so that nobody takes accumulation to be exact for this loss.
    teacher, student = logits(8, seed=1), logits(8, seed=2)
    whole = computed("dist", teacher, student)
    parts = sum(computed("dist", teacher[part], student[part]).item() for part in (slice(0, 4), slice(4, 8)))
    assert not RESPONSE_LOSSES["dist"].row_separable
    assert abs(whole.item() - parts) > 0.1


@pytest.mark.parametrize("kind", TEMPERED)
def test_the_power_of_the_temperature_keeps_the_gradients_size(kind: str):
    # Without the power this ratio would be 4 or 16, with one too many 1/4 or 1/16.
    teacher, student = logits(32, 10, 1, 1.0), logits(32, 10, 2, 1.0)
    sizes = [gradient(kind, teacher, student, temperature=temperature).norm().item() for temperature in (40.0, 160.0)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


@pytest.mark.parametrize(
    ("kind", "parameters", "share"),
    [
        ("forward_kl", {}, 1.0),
        ("reverse_kl", {}, 1.0),
        ("jsd", {"beta": 0.2}, 0.2 * 0.8),
        ("skew_forward_kl", {"skew": 0.3}, 0.7**2),
        ("skew_reverse_kl", {"skew": 0.3}, 0.7**2),
    ],
)
def test_at_high_temperatures_a_divergence_is_its_share_of_matched_logits(
    kind: str, parameters: dict[str, float], share: float
):
    # (z - v) / K with centred logits (Hinton et al. 2015, section 2.1), times the share that the docstring names.
    teacher, student = logits(8, 10, 1, 1.0), logits(8, 10, 2, 1.0)
    found = gradient(kind, teacher, student, temperature=500.0, parameters=parameters)
    expected = share * (student - teacher - (student - teacher).mean(dim=1, keepdim=True)) / 10
    # The next term is smaller by the logits over the temperature, 3 / 500; float32 loses T eps = 3e-5.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.abs().max()))


EXTREMES = torch.tensor(
    [
        [65504.0, -65504.0, 0.0, 1.0, -1.0],
        [-65504.0, 65504.0, 0.0, 1.0, -1.0],
        [65504.0, 65504.0, 65504.0, 65504.0, 65504.0],
        [-65504.0, -65504.0, -65504.0, -65504.0, -65504.0],
        [65504.0, 65504.0, -65504.0, -65504.0, -65504.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [6e-8, 0.0, -6e-8, 0.0, 0.0],
    ]
)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_the_largest_float16_logits_give_no_nan(
    kind: str, parameters: dict[str, float], dtype: torch.dtype, temperature: float, shift: int
):
    # mdistiller's DKD takes the log of a probability that has underflowed to 0. Labels fall on the largest, the
    # smallest and no class.
    teacher, student = EXTREMES.to(dtype), EXTREMES.roll(shift, 0).to(dtype)
    labels = torch.tensor([0, 0, 1, 4, IGNORED_LABEL, 3, IGNORED_LABEL])
    loss = computed(kind, teacher, student, labels, temperature, parameters)
    assert loss.isfinite()
    found = gradient(kind, teacher, student, labels=labels, temperature=temperature, parameters=parameters)
    assert found.dtype == dtype
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", ["dkd", "binary_kl", "binary_reverse_kl", "binary_jsd"])
def test_a_certain_rows_rest_is_not_lost(kind: str):
    # With p = 1 - 1e-9 of a class, 1 - p is 0 in float32 (ModelOpt's issue 2459 is this cancellation): what the other
    # classes, or the other outcome, have must come from the logits.
    teacher = torch.tensor([[22.0, 0.0, 1.0, 0.5, -1.0], [0.0, 20.0, -1.0, 0.3, 1.0]])
    student = torch.tensor([[21.0, 1.0, -1.0, 0.5, 0.0], [1.0, 22.0, -1.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1])
    for row in (0, 1):
        # For the sigmoid the certain class alone; its loss is of the size of 1e-10.
        place = (slice(row, row + 1), slice(None) if kind == "dkd" else slice(row, row + 1))
        found = computed(kind, teacher[place], student[place], labels[row : row + 1], 1.0).item()
        expected = oracle(kind, teacher[place], labels[row : row + 1], 1.0, {})(student[place].double().tolist())
        # A logit of 22 is known to 2e-6, its distance of 0.4 from a mixture's to 5e-6, and the loss is of its square.
        assert found == pytest.approx(expected, rel=2e-5, abs=0)


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_computed_in_float32(kind: str, parameters: dict[str, float], dtype: torch.dtype):
    teacher, student = logits(seed=1).to(dtype), logits(seed=2).to(dtype)
    found = computed(kind, teacher, student, None, 2.0, parameters)
    assert found.dtype == torch.float32
    assert found.item() == computed(kind, teacher.float(), student.float(), None, 2.0, parameters).item()
    exact = gradient(kind, teacher.float(), student.float(), parameters=parameters)
    torch.testing.assert_close(gradient(kind, teacher, student, parameters=parameters), exact.to(dtype))


def test_a_loss_scale_reaches_the_gradient_before_float16_does():
    # A gradient of 1e-9 is 0 in float16, and must not be rounded to it before a scale of 2^20 has multiplied it.
    leaf = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    (with_gradient(leaf, torch.tensor(0.0), torch.tensor([[1e-9, -1e-9]])) * 2.0**20).backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist()[0] == pytest.approx([2**20 * 1e-9, -(2**20) * 1e-9], rel=1e-3)


@every_case
@pytest.mark.parametrize("classes", [2, 7])
def test_no_rows_give_zero_and_an_empty_gradient(kind: str, parameters: dict[str, float], classes: int):
    empty = logits(0, classes).requires_grad_()
    loss = computed(kind, logits(0, classes), empty, None, 2.0, parameters)
    loss.backward()
    assert loss.item() == 0
    assert empty.grad is not None
    assert empty.grad.shape == (0, classes)


@every_case
def test_the_teacher_is_a_constant_and_neither_side_is_written_to(kind: str, parameters: dict[str, float]):
    # The losses work in place to save memory; a float32 input needs no conversion and must not be what they write to.
    teacher, student = logits(seed=1).requires_grad_(), logits(seed=2).requires_grad_()
    labels = some_labels(6, 7)
    kept = [x.detach().clone() for x in (teacher, student, labels)]
    computed(kind, teacher, student, labels, 1.0, parameters).backward()
    assert teacher.grad is None
    assert all(torch.equal(now.detach(), before) for now, before in zip((teacher, student, labels), kept, strict=True))


@every_kind
def test_without_a_student_that_learns_there_is_no_graph(kind: str):
    assert not computed(kind, logits(seed=1), logits(seed=2)).requires_grad
    with torch.no_grad():
        assert not computed(kind, logits(seed=1), logits(seed=2).requires_grad_()).requires_grad


@every_case
def test_a_loss_takes_at_most_twice_its_inputs_of_memory(kind: str, parameters: dict[str, float]):
    teacher, student, labels = logits(64, 1000, 1), logits(64, 1000, 2), some_labels(64, 1000)
    leaf = student.clone().requires_grad_()
    leaf.grad = torch.zeros_like(leaf)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        computed(kind, teacher, leaf, labels, 2.0, parameters).backward()
    now, peak = 0, 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()  # type: ignore[attr-defined]
            peak = max(peak, now)
    vectors = 20 * 4 * (64 + 1000)  # what is of the size of the rows or of the classes alone is let go
    assert peak <= 2 * (teacher.nbytes + student.nbytes) + vectors


@pytest.mark.parametrize("kind", TEMPERED)
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(kind: str, temperature: float):
    with pytest.raises(ValueError, match="temperature must be positive"):
        computed(kind, logits(), logits(), temperature=temperature)


@pytest.mark.parametrize("kind", TEMPERED)
def test_a_temperature_is_not_ignored(kind: str):
    # TRL took a temperature that one of its losses never read.
    teacher, student = logits(seed=1), logits(seed=2)
    assert computed(kind, teacher, student, temperature=1.0) != computed(kind, teacher, student, temperature=3.0)


@every_kind
def test_shapes_that_differ_are_refused(kind: str):
    with pytest.raises(ValueError, match=r"teacher \(6, 7\) and student \(6, 1\) differ"):
        computed(kind, logits(), logits(classes=1))


@pytest.mark.parametrize(("kind", "name", "value"), [
    ("jsd", "beta", -0.1), ("jsd", "beta", 1.1), ("jsd", "beta", math.nan), ("binary_jsd", "beta", 2.0),
    ("skew_forward_kl", "skew", 1.0), ("skew_reverse_kl", "skew", 1.0), ("skew_forward_kl", "skew", -0.1),
    ("dkd", "target_weight", -1.0), ("dkd", "non_target_weight", math.nan), ("dist", "inter_weight", -1.0),
])  # fmt: skip
def test_a_parameter_out_of_bounds_is_refused_by_the_registry_and_by_the_loss(kind: str, name: str, value: float):
    # DistillKit wrote `lte` where pydantic wants `le`, and a bound that nobody tried held nothing back.
    loss = RESPONSE_LOSSES[kind]
    with pytest.raises(ValueError, match=f"{name} must be in"):
        computed(kind, logits(), logits(), parameters={name: value})
    labels = (some_labels(6, 7),) if loss.needs_labels else ()
    with pytest.raises(ValueError, match="must"):
        loss.function(logits(), logits(), *labels, temperature=1.0, **{**loss.resolved({}), name: value})


@every_kind
def test_the_registrys_defaults_are_allowed_and_its_bounds_are_the_losss(kind: str):
    loss = RESPONSE_LOSSES[kind]
    assert loss.resolved({}) == {name: parameter.default for name, parameter in loss.parameters.items()}
    for name, parameter in loss.parameters.items():
        assert parameter.allows(parameter.default)
        for value in (parameter.minimum, *(() if parameter.open_maximum else (parameter.maximum,))):
            assert computed(kind, logits(seed=1), logits(seed=2), parameters={name: value}).isfinite()
    with pytest.raises(ValueError, match=r"gamma is no parameter of this loss, which has .*; remove it"):
        loss.resolved({"gamma": 1.0})


def test_an_open_maximum_is_left_out():
    parameter = Parameter(0.1, 0, 1, "a share", open_maximum=True)
    assert (parameter.allows(0), parameter.allows(1), parameter.bounds) == (True, False, "[0, 1)")
    assert not parameter.allows(math.nan)


# ---- What is said of single losses -----------------------------------------------------------------------------


def test_jsd_is_symmetric_at_one_half_and_at_most_ln_2():
    teacher, student = logits(seed=1), logits(seed=2)
    there = generalised_jsd_sum(teacher, student, temperature=1.0, beta=0.5).item()
    assert generalised_jsd_sum(student, teacher, temperature=1.0, beta=0.5).item() == pytest.approx(there, rel=1e-6)
    apart = torch.tensor([[500.0, 0.0]])
    found = generalised_jsd_sum(apart, apart.flip(1), temperature=2.0, beta=0.5).item()
    assert found == pytest.approx(4 * math.log(2), rel=1e-6)


def test_jsd_of_beta_mixes_the_teacher_with_weight_beta():
    # Which side beta weighs is easily swapped: far from the student, m is nearly the teacher for beta near 1.
    teacher, student = torch.tensor([[30.0, 0.0]]), torch.tensor([[0.0, 30.0]])
    found = generalised_jsd_sum(teacher, student, temperature=1.0, beta=0.9).item()
    assert found == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), rel=1e-5)


def test_jsd_over_beta_goes_to_forward_kl_and_over_one_minus_beta_to_reverse_kl():
    teacher, student = logits(seed=1, scale=1.0), logits(seed=2, scale=1.0)
    forward = forward_kl_sum(teacher, student, temperature=1.0).item()
    reverse = reverse_kl_sum(teacher, student, temperature=1.0).item()
    assert generalised_jsd_sum(teacher, student, temperature=1.0, beta=0.0).item() == forward
    assert generalised_jsd_sum(teacher, student, temperature=1.0, beta=1.0).item() == reverse
    low = generalised_jsd_sum(teacher, student, temperature=1.0, beta=0.001).item() / 0.001
    high = generalised_jsd_sum(teacher, student, temperature=1.0, beta=0.999).item() / 0.001
    assert (low, high) == pytest.approx((forward, reverse), rel=0.01)
    assert abs(forward - reverse) > 0.05 * forward


def test_skew_bounds_the_loss_and_its_gradient_where_kl_explodes():
    teacher, student = torch.tensor([[0.0, 300.0]]), torch.tensor([[300.0, 0.0]]).requires_grad_()
    assert forward_kl_sum(teacher, student, temperature=1.0).item() == pytest.approx(300, rel=1e-5)
    for loss in (skew_forward_kl_sum, skew_reverse_kl_sum):
        assert loss(teacher, student, temperature=1.0, skew=0.1).item() == pytest.approx(-math.log(0.1), rel=1e-5)


def test_skew_zero_is_kl():
    teacher, student = logits(seed=1), logits(seed=2)
    for skewed, plain in ((skew_forward_kl_sum, forward_kl_sum), (skew_reverse_kl_sum, reverse_kl_sum)):
        assert skewed(teacher, student, temperature=2.0, skew=0.0) == plain(teacher, student, temperature=2.0)


def test_total_variation_of_sides_without_a_common_class_is_the_temperature():
    apart = torch.tensor([[500.0, 0.0, 0.0]])
    assert total_variation_sum(apart, apart.flip(1), temperature=3.0).item() == pytest.approx(3.0, rel=1e-6)


def test_forward_kl_is_what_f_kl_div_gives_bit_for_bit():
    # A student trained before the loss was written in place must come out the same.
    teacher, student = logits(64, 50, 1), logits(64, 50, 2)
    leaves = [student.clone().requires_grad_() for _ in range(2)]
    ours = forward_kl_sum(teacher, leaves[0], temperature=3.0)
    logprobs = F.log_softmax(leaves[1] / 3.0, dim=-1)
    theirs = F.kl_div(logprobs, F.log_softmax(teacher / 3.0, dim=-1), reduction="sum", log_target=True) * 3.0**2
    for loss in (ours, theirs):
        (loss / 7).backward()
    assert torch.equal(ours, theirs)
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("label", [0, 3, 6])
def test_dkd_takes_kl_apart(label: int):
    # KL = TCKD + (1 - p) NCKD for any class (DKD, equation 5): with these weights the parts are the whole again.
    teacher, student = logits(1, seed=1), logits(1, seed=2)
    p = softmax(teacher[0].double().tolist(), 2.0)[label]
    found = decoupled_kl_sum(
        teacher, student, torch.tensor([label]), temperature=2.0, target_weight=1.0, non_target_weight=1 - p
    )
    kl = ORACLES["forward_kl"](teacher.double().tolist(), student.double().tolist(), [label], 2.0, {})
    assert found.item() == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("label", [0, 1, IGNORED_LABEL])
def test_dkd_of_two_classes_has_no_non_target_part(label: int):
    teacher, student, labels = logits(4, 2, 1), logits(4, 2, 2).requires_grad_(), torch.full((4,), label)
    part = decoupled_kl_sum(teacher, student, labels, temperature=2.0, target_weight=0.0, non_target_weight=8.0)
    part.backward()
    assert part.item() == 0
    assert student.grad is not None
    assert student.grad.eq(0).all()
    whole = decoupled_kl_sum(teacher, student, labels, temperature=2.0, target_weight=1.0, non_target_weight=8.0)
    assert whole.item() == pytest.approx(forward_kl_sum(teacher, student, temperature=2.0).item(), rel=1e-5)


def test_dkd_gives_a_row_without_a_label_the_teachers_class():
    teacher, student = logits(seed=1), logits(seed=2)
    none, best = torch.full((6,), IGNORED_LABEL), teacher_labels(teacher)
    assert best.tolist() == [max(range(7), key=lambda k, row=row: row[k]) for row in teacher.tolist()]
    assert computed("dkd", teacher, student, none) == computed("dkd", teacher, student, best)


def test_dkd_hides_the_label_however_low_the_other_logits_are():
    # mdistiller subtracts 1000 from the label's logit, which then is still the largest of these.
    teacher, student = (
        torch.tensor([[0.0, -3000.0, -3001.0, -3002.5]]),
        torch.tensor([[0.0, -3001.0, -3000.0, -3000.5]]),
    )
    labels = torch.tensor([0])
    found = computed("dkd", teacher, student, labels, 1.0).item()
    assert found == pytest.approx(oracle("dkd", teacher, labels, 1.0, {})(student.double().tolist()), rel=1e-5)
    assert found > 1


def test_dkd_wants_a_label_for_each_row():
    with pytest.raises(ValueError, match="6 rows of logits but labels of shape"):
        computed("dkd", logits(), logits(), torch.zeros(5, dtype=torch.long))


def test_dist_over_its_rows_is_the_papers_loss():
    # Means over rows and over classes, from Pearson's formula by torch.corrcoef.
    teacher, student = logits(9, seed=1), logits(9, seed=2)
    p, q = torch.softmax(teacher.double(), dim=1), torch.softmax(student.double(), dim=1)
    inter = 1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p, q, strict=True)]).mean()
    intra = 1 - torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p.T, q.T, strict=True)]).mean()
    found = dist_sum(teacher, student, temperature=1.0, inter_weight=2.0, intra_weight=3.0) / 9
    assert found.item() == pytest.approx((2 * inter + 3 * intra).item(), rel=1e-5)


def test_dist_of_the_opposite_order_is_two():
    row = torch.tensor([[0.0, math.log(2.0), math.log(3.0)]])  # probabilities 1/6, 2/6, 3/6, mirrored below
    assert dist_sum(row, row.flip(1), temperature=1.0, inter_weight=1.0, intra_weight=0.0).item() == pytest.approx(2.0)


def test_dist_of_a_constant_side_has_a_value_and_no_gradient():
    flat, varied = torch.zeros(3, 5), logits(3, 5)
    weights = {"inter_weight": 1.0, "intra_weight": 1.0}
    for teacher, student, expected in ((flat, varied, 0.0), (varied, flat, 6.0), (flat, flat, 0.0)):
        leaf = student.clone().requires_grad_()
        loss = dist_sum(teacher, leaf, temperature=1.0, **weights)
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert leaf.grad is not None
        assert leaf.grad.eq(0).all()


def test_dist_of_one_row_is_its_inter_class_term():
    teacher, student = logits(1, seed=1), logits(1, seed=2)
    both = dist_sum(teacher, student, temperature=2.0, inter_weight=1.0, intra_weight=5.0)
    assert both == dist_sum(teacher, student, temperature=2.0, inter_weight=1.0, intra_weight=0.0)


# ---- Standardisation -------------------------------------------------------------------------------------------


def test_standardised_logits_are_the_papers():
    found = standardise(logits().half())
    expected = torch.tensor([standardised(row) for row in logits().half().double().tolist()])
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


def test_standardising_ignores_shift_and_scale():
    teacher, student = logits(seed=1), logits(seed=2)
    found = forward_kl_sum(standardise(teacher), standardise(student), temperature=2.0)
    moved = forward_kl_sum(standardise(5 * teacher + 3), standardise(0.2 * student - 7), temperature=2.0)
    assert moved.item() == pytest.approx(found.item(), rel=1e-5)
    assert forward_kl_sum(standardise(teacher), standardise(9 * teacher + 1), temperature=2.0) < 1e-6


def test_standardised_gradient_is_the_papers_loss_moved_a_little():
    teacher, student = logits(3, 4, 1), logits(3, 4, 2)
    leaf = student.clone().requires_grad_()
    forward_kl_sum(standardise(teacher), standardise(leaf), temperature=2.0).backward()
    rows = [standardised(row) for row in teacher.double().tolist()]

    def paper(moved: Rows) -> float:
        return ORACLES["forward_kl"](rows, [standardised(row) for row in moved], [0] * 3, 2.0, {})

    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), numerical_gradient(paper, student), rtol=1e-4, atol=1e-5)


def test_equal_logits_are_standardised_without_nan():
    # The authors' code divides by std + 1e-7, whose derivative at 0 is NaN: what a head that starts at zero gets.
    student = torch.zeros(2, 5, requires_grad=True)
    forward_kl_sum(standardise(logits(2, 5)), standardise(student), temperature=1.0).backward()
    assert standardise(student).eq(0).all()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.ne(0).any()


@pytest.mark.parametrize("kind", ONE_LABEL)
def test_standardised_extremes_give_no_nan(kind: str):
    student = EXTREMES.roll(1, 0).half().requires_grad_()
    loss = computed(kind, standardise(EXTREMES.half()), standardise(student), some_labels(7, 5))
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert not student.grad.isnan().any()
