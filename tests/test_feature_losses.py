"""The feature losses against float64 loops written from the papers (feature_oracles.py).

Shapes: N rows, L tokens, W the student's width, V the teacher's, A attention heads.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from feature_oracles import (
    attention_oracle,
    finite_difference,
    hidden_cosine_oracle,
    hidden_mse_oracle,
    kl,
    mean_square,
    relation_oracle,
    rkd_angle_oracle,
    rkd_distance_oracle,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.losses import relations
from raydistill.losses.features import (
    attention_kl_sum,
    attention_mse_sum,
    hidden_cosine_sum,
    hidden_mse_sum,
    mean_pool,
)
from raydistill.losses.layer_maps import layer_map
from raydistill.losses.projections import Projections
from raydistill.losses.relations import relation_kl_sum, rkd_angle_sum, rkd_distance_sum

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Oracle = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], float]
BatchLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
BatchOracle = Callable[[torch.Tensor, torch.Tensor], float]


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lengths_mask(lengths: list[int], length: int) -> torch.Tensor:
    """A tokenizer's mask: 1 for the first tokens of each row, 0 for the padding after them."""
    return (torch.arange(length) < torch.tensor(lengths)[:, None]).long()


def scattered_mask(rows: int, length: int, seed: int) -> torch.Tensor:
    """Padding anywhere, and perhaps a row without real tokens."""
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.6


def vectors(rows: int, length: int, width: int, mask: torch.Tensor, seed: int, scale: float = 1.0) -> torch.Tensor:
    return random(rows, length, width, seed=seed, scale=scale)


def maps(rows: int, length: int, heads: int, mask: torch.Tensor, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Attention probabilities over the real keys; 0 at the others, and 0 for a row without any."""
    scores = random(rows, heads, length, length, seed=seed, scale=scale)
    return scores.masked_fill(~mask.bool()[:, None, None, :], -torch.inf).softmax(dim=-1).nan_to_num(0.0)


def of(loss: Callable[..., torch.Tensor], **options: int) -> Loss:
    return lambda teacher, student, mask: loss(teacher, student, mask, **options)


# name: loss, oracle, what makes inputs, the teacher's width or heads, the student's
ROW_LOSSES: dict[str, tuple[Loss, Oracle, Callable[..., torch.Tensor], int, int]] = {
    "hidden_mse": (hidden_mse_sum, hidden_mse_oracle, vectors, 4, 4),
    "hidden_cosine": (hidden_cosine_sum, hidden_cosine_oracle, vectors, 4, 4),
    "attention_mse": (attention_mse_sum, lambda t, s, m: attention_oracle(t, s, m, mean_square), maps, 2, 2),
    "attention_mse_heads_differ": (
        attention_mse_sum, lambda t, s, m: attention_oracle(t, s, m, mean_square), maps, 3, 2,
    ),
    "attention_kl": (attention_kl_sum, lambda t, s, m: attention_oracle(t, s, m, kl), maps, 2, 2),
    "attention_kl_heads_differ": (attention_kl_sum, lambda t, s, m: attention_oracle(t, s, m, kl), maps, 3, 2),
    "relation": (of(relation_kl_sum, relation_heads=1), lambda t, s, m: relation_oracle(t, s, m, 1), vectors, 3, 4),
    "relation_heads": (
        of(relation_kl_sum, relation_heads=3), lambda t, s, m: relation_oracle(t, s, m, 3), vectors, 9, 6,
    ),
}  # fmt: skip
BATCH_LOSSES: dict[str, tuple[BatchLoss, BatchOracle]] = {
    "rkd_distance": (rkd_distance_sum, rkd_distance_oracle),
    "rkd_angle": (rkd_angle_sum, rkd_angle_oracle),
}
EQUAL_WIDTHS = [name for name, (_, _, _, teacher, student) in ROW_LOSSES.items() if teacher == student]
row_losses = pytest.mark.parametrize("name", ROW_LOSSES)
batch_losses = pytest.mark.parametrize("name", BATCH_LOSSES)


def inputs(name: str, mask: torch.Tensor, seed: int = 0, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    _, _, make, teacher, student = ROW_LOSSES[name]
    return make(*mask.shape, teacher, mask, seed, scale), make(*mask.shape, student, mask, seed + 1, scale)


def gradient(loss: Callable[[torch.Tensor], torch.Tensor], student: torch.Tensor) -> torch.Tensor:
    leaf = student.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    return leaf.grad


MASK = lengths_mask([5, 1, 3, 0], 5)  # a full row, a row of one token, padding, a row without tokens


@row_losses
@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.flip(1)], ids=["right", "booleans", "left"])
def test_row_loss_is_the_papers(name: str, mask: torch.Tensor):
    loss, oracle = ROW_LOSSES[name][:2]
    teacher, student = inputs(name, mask)
    assert loss(teacher, student, mask).item() == pytest.approx(oracle(teacher, student, mask), rel=1e-5)


@row_losses
@settings(max_examples=15)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 6), st.floats(0.05, 4.0))
def test_row_loss_is_the_papers_for_any_shape_and_mask(name: str, seed: int, rows: int, length: int, scale: float):
    loss, oracle = ROW_LOSSES[name][:2]
    mask = scattered_mask(rows, length, seed)
    teacher, student = inputs(name, mask, seed, scale)
    expected = oracle(teacher, student, mask)
    assert loss(teacher, student, mask).item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert loss(teacher, student, mask).item() >= -1e-6


@row_losses
def test_row_loss_gradient_is_its_finite_difference(name: str):
    loss, oracle = ROW_LOSSES[name][:2]
    mask = lengths_mask([3, 1, 0], 3)
    teacher, student = inputs(name, mask)
    # Padded places of an attention map hold 0, where a step would leave the probabilities.
    expected = finite_difference(lambda s: oracle(teacher.double(), s, mask), student)
    found = gradient(lambda s: loss(teacher, s, mask), student)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


@row_losses
def test_a_row_loss_reads_and_pulls_no_padding(name: str):
    loss = ROW_LOSSES[name][0]
    teacher, student = inputs(name, MASK)
    before, slope = loss(teacher, student, MASK), gradient(lambda s: loss(teacher, s, MASK), student)
    padding = ~MASK.bool()
    padded = padding[..., None] if student.dim() == 3 else (padding[:, None, :, None] | padding[:, None, None, :])
    for content in (7.0, torch.inf, torch.nan):
        t, s = teacher.masked_fill(padded, content), student.masked_fill(padded, -content)
        assert loss(t, s, MASK).item() == before.item()
        assert torch.equal(gradient(lambda leaf, t=t: loss(t, leaf, MASK), s), slope)
    assert slope.masked_select(padded).eq(0).all()


@row_losses
def test_padding_length_and_other_rows_change_no_rows_loss(name: str):
    loss = ROW_LOSSES[name][0]
    teacher, student = inputs(name, MASK)
    alone: list[float] = []
    for row, length in enumerate(MASK.sum(dim=1).tolist()):
        cut = (slice(row, row + 1), slice(length)) if student.dim() == 3 else (
            slice(row, row + 1), slice(None), slice(length), slice(length),
        )  # fmt: skip
        alone.append(loss(teacher[cut], student[cut], MASK[row : row + 1, :length]).item())
    assert alone[3] == 0
    assert loss(teacher, student, MASK).item() == pytest.approx(sum(alone), rel=1e-5)
    split = [loss(teacher[part], student[part], MASK[part]).item() for part in (slice(0, 1), slice(1, 4))]
    assert sum(split) == pytest.approx(sum(alone), rel=1e-5)
    assert loss(teacher[:0], student[:0], MASK[:0]).item() == 0


@row_losses
def test_gradients_of_parts_are_the_gradient_of_the_whole(name: str):
    loss = ROW_LOSSES[name][0]
    teacher, student = inputs(name, MASK)
    parts = [gradient(lambda s, n=n: loss(teacher[n], s, MASK[n]), student[n]) for n in (slice(0, 3), slice(3, 4))]
    whole = gradient(lambda s: loss(teacher, s, MASK), student)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-7)


@row_losses
def test_the_order_of_rows_changes_nothing(name: str):
    loss = ROW_LOSSES[name][0]
    teacher, student = inputs(name, MASK)
    order = torch.tensor([2, 3, 0, 1])
    moved = loss(teacher[order], student[order], MASK[order]).item()
    assert moved == pytest.approx(loss(teacher, student, MASK).item(), rel=1e-6)


@pytest.mark.parametrize("name", [*EQUAL_WIDTHS, "relation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_inputs_give_exactly_zero(name: str, dtype: torch.dtype):
    teacher = inputs(name, MASK)[0].to(dtype)
    assert ROW_LOSSES[name][0](teacher, teacher.clone(), MASK).item() == 0


@pytest.mark.parametrize("name", [*EQUAL_WIDTHS, "relation"])
def test_the_gradient_at_equal_inputs_pulls_nowhere(name: str):
    teacher = inputs(name, MASK)[0]
    found = gradient(lambda s: ROW_LOSSES[name][0](teacher, s, MASK), teacher)
    if name == "attention_kl":  # by each probability alone it is -p / q = -1; along those that sum to 1 it is flat
        found = found - found.amin(dim=-1, keepdim=True)
        found = found.masked_fill(~(MASK.bool()[:, None, :, None] & MASK.bool()[:, None, None, :]), 0)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-7)


@row_losses
def test_no_gradient_reaches_the_teacher(name: str):
    teacher, student = inputs(name, MASK)
    teacher.requires_grad_()
    assert not ROW_LOSSES[name][0](teacher, student, MASK).requires_grad
    gradient(lambda s: ROW_LOSSES[name][0](teacher, s, MASK), student)
    assert teacher.grad is None


@row_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_row_loss_is_float32_whatever_it_is_given(name: str, dtype: torch.dtype):
    loss, oracle = ROW_LOSSES[name][:2]
    teacher, student = (tensor.to(dtype) for tensor in inputs(name, MASK))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(teacher, student, MASK)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(oracle(teacher.double(), student.double(), MASK), rel=1e-5)
    slope = gradient(lambda s: loss(teacher, s, MASK), student)
    exact = gradient(lambda s: loss(teacher.double(), s, MASK), student.double())
    assert slope.dtype == dtype
    assert torch.equal(slope, exact.to(dtype))


@pytest.mark.parametrize("name", ["hidden_mse", "hidden_cosine", "relation", "relation_heads"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extremes_of_narrow_dtypes_give_no_nan(name: str, dtype: torch.dtype):
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.max, -limits.max, limits.tiny, 0.0, 1.0, limits.smallest_normal], dtype=dtype)
    teacher, student = inputs(name, MASK)
    generator = torch.Generator().manual_seed(3)
    teacher, student = (values[torch.randint(6, x.shape, generator=generator)] for x in (teacher, student))
    loss = ROW_LOSSES[name][0]
    assert not loss(teacher, student, MASK).isnan()
    assert not gradient(lambda s: loss(teacher, s, MASK), student).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_probability_that_underflowed_is_still_pulled_up(dtype: torch.dtype):
    teacher = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]], dtype=dtype)
    student = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]], dtype=dtype)
    mask = torch.ones(1, 2)
    # KL of the first query by hand: 1 * ln(1 / smallest), averaged over two queries.
    smallest = torch.tensor(torch.finfo(dtype).tiny, dtype=torch.float64)
    assert attention_kl_sum(teacher, student, mask).item() == pytest.approx(-smallest.log().item() / 2, rel=1e-6)
    found = gradient(lambda s: attention_kl_sum(teacher, s, mask), student)
    assert found.isfinite().all()
    assert found[0, 0, 0, 0] < -1e3
    assert found[0, 0, 0, 1] == 0


def test_hidden_states_without_a_direction_have_cosine_zero_and_no_gradient():
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    student = torch.tensor([[[0.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    mask = torch.ones(1, 3)
    assert hidden_cosine_sum(teacher, student, mask).item() == 1.0
    assert gradient(lambda s: hidden_cosine_sum(teacher, s, mask), student).eq(0).all()


def test_cosine_depends_on_no_length_and_mse_does():
    teacher, student = inputs("hidden_cosine", MASK)
    near = hidden_cosine_sum(teacher, student, MASK).item()
    assert hidden_cosine_sum(1e20 * teacher, 1e-6 * student, MASK).item() == pytest.approx(near, rel=1e-5)
    assert hidden_cosine_sum(teacher, -teacher, MASK).item() == pytest.approx(2 * 3, rel=1e-6)


def test_the_loss_is_multiplied_by_what_comes_after_it():
    for name in ROW_LOSSES:
        loss, (teacher, student) = ROW_LOSSES[name][0], inputs(name, MASK)
        once = gradient(lambda s, f=loss, t=teacher: f(t, s, MASK), student)
        thrice = gradient(lambda s, f=loss, t=teacher: 3 * f(t, s, MASK), student)
        torch.testing.assert_close(thrice, 3 * once, rtol=1e-6, atol=0)


def test_backward_twice_gives_the_same():
    # The saved tensors are scaled out of place; in place, the second call would have scaled them again.
    for name in ROW_LOSSES:
        teacher, student = inputs(name, MASK)
        student.requires_grad_()
        loss = 3 * ROW_LOSSES[name][0](teacher, student, MASK)
        first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_attention_scores_do_for_the_mean_square_and_infinite_ones_at_padded_keys_count_nothing():
    scores = random(4, 2, 5, 5, seed=1)
    other = random(4, 2, 5, 5, seed=2)
    padded = ~MASK.bool()[:, None, None, :]
    found = attention_mse_sum(scores.masked_fill(padded, -torch.inf), other.masked_fill(padded, -torch.inf), MASK)
    assert found.item() == pytest.approx(attention_oracle(scores, other, MASK, mean_square), rel=1e-5)


@pytest.mark.parametrize(("teacher", "student"), [(16, 24), (24, 16), (16, 16)])
def test_relation_heads_are_taken_in_blocks_without_a_difference(teacher: int, student: int):
    t, s = random(2, 2, teacher, seed=1), random(2, 2, student, seed=2)

    def loss(leaf: torch.Tensor, length: int) -> torch.Tensor:
        padded = (torch.nn.functional.pad(x, (0, 0, 0, length - 2)) for x in (t, leaf))
        return relation_kl_sum(*padded, lengths_mask([2, 2], length), relation_heads=2)

    # Two tokens take both heads at once; with padding to 40 the scores are as large as one head at a time allows.
    assert loss(s, 40).item() == pytest.approx(loss(s, 2).item(), rel=1e-6)
    slopes = [gradient(lambda leaf, length=length: loss(leaf, length), s) for length in (2, 40)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-5, atol=1e-8)


@batch_losses
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_relation_between_rows_is_the_papers(name: str, rows: int):
    loss, oracle = BATCH_LOSSES[name]
    teacher, student = random(rows, 5, seed=1), random(rows, 3, seed=2, scale=4.0)
    assert loss(teacher, student).item() == pytest.approx(oracle(teacher, student), rel=1e-5)


@batch_losses
@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(0, 7), st.integers(1, 6), st.integers(1, 6), st.floats(1e-3, 1e3))
def test_relation_between_rows_is_the_papers_for_any_shape(
    name: str, seed: int, rows: int, teacher_width: int, student_width: int, scale: float
):
    loss, oracle = BATCH_LOSSES[name]
    teacher, student = random(rows, teacher_width, seed=seed), random(rows, student_width, seed=seed + 1, scale=scale)
    if rows > 2:
        student[1] = student[0]  # two examples in one place
    assert loss(teacher, student).item() == pytest.approx(oracle(teacher, student), rel=1e-4, abs=1e-6)


@batch_losses
def test_relation_between_rows_has_the_gradient_of_its_finite_difference(name: str):
    loss, oracle = BATCH_LOSSES[name]
    teacher, student = random(5, 4, seed=1), random(5, 3, seed=2)
    expected = finite_difference(lambda s: oracle(teacher.double(), s), student)
    torch.testing.assert_close(gradient(lambda s: loss(teacher, s), student), expected.float(), rtol=1e-4, atol=1e-5)


@batch_losses
def test_relation_between_rows_knows_no_order_scale_shift_or_rotation(name: str):
    loss = BATCH_LOSSES[name][0]
    teacher, student = random(6, 4, seed=1), random(6, 3, seed=2)
    found = loss(teacher, student).item()
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    rotation = torch.linalg.qr(random(3, 3, seed=4))[0]
    assert loss(teacher[order], student[order]).item() == pytest.approx(found, rel=1e-5)
    assert loss(1e15 * teacher, 7 * (student + 3) @ rotation).item() == pytest.approx(found, rel=1e-4)
    assert loss(teacher, teacher.clone()).item() == 0
    assert loss(teacher, 2 * teacher @ torch.linalg.qr(random(4, 4, seed=5))[0]).item() == pytest.approx(0, abs=1e-9)


@batch_losses
def test_relation_between_rows_at_distance_zero_has_no_nan(name: str):
    loss = BATCH_LOSSES[name][0]
    teacher, student = random(5, 4, seed=1), random(5, 3, seed=2)
    student[2], teacher[1], teacher[3] = student[0], teacher[0], teacher[0]
    assert gradient(lambda s: loss(teacher, s), student).isfinite().all()
    for same in (torch.zeros(5, 3), torch.ones(5, 3)):
        found = gradient(lambda s: loss(teacher, s), same)
        assert found.eq(0).all()
    assert loss(torch.ones(5, 4), student).isfinite()


@pytest.mark.parametrize(
    ("name", "rows"), [("rkd_distance", 0), ("rkd_distance", 1), *[("rkd_angle", n) for n in range(3)]]
)
@pytest.mark.parametrize("content", [1.0, torch.inf, torch.nan])
def test_too_few_partners_give_zero_with_a_gradient(name: str, rows: int, content: float):
    student = torch.full((rows, 3), content).requires_grad_()
    loss = BATCH_LOSSES[name][0](random(rows, 4, seed=1), student)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None
    assert student.grad.eq(0).all()


def test_two_rows_have_one_distance_which_is_its_own_mean():
    student = random(2, 3, seed=2).requires_grad_()
    loss = rkd_distance_sum(random(2, 4, seed=1), student)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros(2, 3), rtol=0, atol=1e-6)


@batch_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_relation_between_rows_is_float32_whatever_it_is_given(name: str, dtype: torch.dtype):
    loss, oracle = BATCH_LOSSES[name]
    teacher, student = random(6, 4, seed=1).to(dtype), random(6, 3, seed=2).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(teacher, student)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(oracle(teacher.double(), student.double()), rel=1e-5)
    limits = torch.finfo(dtype)
    extremes = torch.tensor([[limits.max, 0.0], [-limits.max, limits.tiny], [limits.max, 1.0], [0, 0]], dtype=dtype)
    if dtype != torch.float64:  # beyond float32 it is infinite before anything is computed
        slope = gradient(lambda s: loss(teacher[:4], s), extremes)
        assert slope.dtype == dtype
        assert not slope.isnan().any()
        assert not loss(teacher[:4], extremes).isnan()


@batch_losses
def test_relation_between_rows_leaves_the_teacher_alone(name: str):
    teacher = random(4, 3, seed=1).requires_grad_()
    gradient(lambda s: BATCH_LOSSES[name][0](teacher, s), random(4, 3, seed=2))
    assert teacher.grad is None
    assert not BATCH_LOSSES[name][0](teacher, random(4, 3, seed=2)).requires_grad


def test_angles_are_taken_in_blocks_without_a_difference(monkeypatch: pytest.MonkeyPatch):
    teacher, student = random(7, 4, seed=1), random(7, 3, seed=2)
    found = []
    for tensors in (0.01, 0.5, 6.0):  # all vertices together; two at a time, the last alone; one at a time
        monkeypatch.setattr(relations, "ANGLE_TENSORS", tensors)
        found.append((rkd_angle_sum(teacher, student).item(), gradient(lambda s: rkd_angle_sum(teacher, s), student)))
    for loss, slope in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(slope, found[0][1], rtol=1e-5, atol=1e-7)


def test_angles_of_rows_that_are_close_for_their_length_are_exact():
    # Float32 holds 0.004 between numbers near 50,000: these rows are exact, and products of theirs would not be.
    offset = torch.tensor([50_000.0, -30_000.0, 40_000.0])
    teacher, near = random(5, 3, seed=1), torch.tensor([[0, 0, 0], [4, 0, 1], [0, 3, 2], [1, 5, 0], [2, 2, 7]]) / 128
    expected = rkd_angle_oracle(teacher.double(), near.double())
    assert rkd_angle_sum(teacher, near + offset).item() == pytest.approx(expected, rel=1e-6)
    slopes = [gradient(lambda s: rkd_angle_sum(teacher, s), rows) for rows in (near, near + offset)]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-5)


def test_mean_pool_is_the_mean_of_the_real_tokens():
    hidden = random(4, 5, 3, seed=1)
    dirty = hidden.masked_fill(~MASK.bool()[..., None], torch.nan).requires_grad_()
    pooled = mean_pool(dirty, MASK)
    pooled.sum().backward()
    expected = [
        [sum(hidden[n, t, w].item() for t in range(length)) / max(length, 1) for w in range(3)]
        for n, length in enumerate(MASK.sum(dim=1).tolist())
    ]
    torch.testing.assert_close(pooled.detach(), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert dirty.grad is not None
    assert torch.equal(dirty.grad[..., 0], MASK / MASK.sum(dim=1, keepdim=True).clamp_min(1))


@pytest.mark.parametrize(
    ("loss", "teacher", "student", "mask", "message"),
    [
        (hidden_mse_sum, (2, 3, 4), (2, 3, 5), (2, 3), r"teacher \(2, 3, 4\) and student \(2, 3, 5\).*Project"),
        (hidden_cosine_sum, (2, 3, 4), (2, 4, 4), (2, 3), "expected two equal shapes of 3 dimensions"),
        (hidden_mse_sum, (2, 3, 4), (2, 3, 4), (2, 4), r"token mask \(2, 4\): expected \(2, 3\)"),
        (attention_mse_sum, (2, 2, 3, 3), (2, 2, 4, 4), (2, 3), "expected two equal shapes of 4 dimensions"),
        (attention_kl_sum, (2, 2, 3, 3), (1, 4, 3, 3), (2, 3), "expected two equal shapes of 4 dimensions"),
        (attention_kl_sum, (2, 3, 3), (2, 3, 3), (2, 3), "expected two equal shapes of 4 dimensions"),
        (attention_kl_sum, (2, 2, 3, 4), (2, 2, 3, 4), (2, 3), "expected as many keys as queries"),
        (of(relation_kl_sum, relation_heads=2), (2, 3, 4), (2, 3, 5), (2, 3), r"found 2, .*the student's width 5"),
        (of(relation_kl_sum, relation_heads=3), (2, 3, 4), (2, 3, 6), (2, 3), r"found 3, .*the teacher's width 4"),
        (of(relation_kl_sum, relation_heads=0), (2, 3, 4), (2, 3, 4), (2, 3), "relation_heads: found 0"),
        (of(relation_kl_sum, relation_heads=1), (2, 3, 4), (2, 2, 4), (2, 3), "expected the same rows and tokens"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    loss: Loss, teacher: tuple[int, ...], student: tuple[int, ...], mask: tuple[int, ...], message: str
):
    with pytest.raises(ValueError, match=message):
        loss(torch.zeros(teacher), torch.zeros(student), torch.ones(mask))


@batch_losses
def test_rows_that_differ_are_refused(name: str):
    with pytest.raises(ValueError, match="one vector for each of the same rows"):
        BATCH_LOSSES[name][0](torch.zeros(3, 4), torch.zeros(4, 4))
    with pytest.raises(ValueError, match="one vector for each of the same rows"):
        BATCH_LOSSES[name][0](torch.zeros(3, 2, 4), torch.zeros(3, 2, 4))


@pytest.mark.parametrize(
    ("strategy", "student", "teacher", "expected"),
    [
        # By hand. int(i * 12 / 4) gives 0 3 6 9: never the last layer.
        ("uniform", 4, 12, [0, 4, 7, 11]),
        ("uniform", 5, 12, [0, 3, 6, 8, 11]),
        ("uniform", 6, 12, [0, 2, 4, 7, 9, 11]),
        ("uniform", 2, 12, [0, 11]),
        ("uniform", 3, 12, [0, 6, 11]),
        ("uniform", 1, 12, [11]),
        ("uniform", 12, 12, list(range(12))),
        ("uniform", 3, 2, [0, 1, 1]),
        ("uniform", 1, 1, [0]),
        ("last", 4, 12, [8, 9, 10, 11]),
        ("last", 1, 12, [11]),
        ("skip", 6, 12, [1, 3, 5, 7, 9, 11]),
        ("skip", 4, 12, [2, 5, 8, 11]),
        ("skip", 5, 12, [3, 5, 7, 9, 11]),
        ("skip", 1, 12, [11]),
        ("skip", 12, 12, list(range(12))),
    ],
)
def test_layer_map_by_strategy(strategy: str, student: int, teacher: int, expected: list[int]):
    assert layer_map(strategy, student, teacher) == tuple(enumerate(expected))  # type: ignore[arg-type]


@given(st.integers(1, 60), st.integers(1, 60))
def test_layer_maps_go_up_and_end_at_the_last_layer(student: int, teacher: int):
    for strategy in ("uniform", "last", "skip"):
        if strategy != "uniform" and student > teacher:
            with pytest.raises(ValueError, match=f"{strategy}: the student has {student} layers"):
                layer_map(strategy, student, teacher)
            continue
        pairs = layer_map(strategy, student, teacher)
        theirs = [layer for _, layer in pairs]
        assert [layer for layer, _ in pairs] == list(range(student))
        assert theirs == sorted(theirs)
        assert theirs[-1] == teacher - 1
        assert len(set(theirs)) == student or student > teacher
        if strategy == "uniform" and student > 1:
            assert theirs[0] == 0
            assert all(abs(t - i * (teacher - 1) / (student - 1)) <= 0.5 for i, t in pairs)


def test_explicit_pairs_are_kept_in_their_order():
    assert layer_map([(1, 11), (0, 3), (1, 5)], 2, 12) == ((1, 11), (0, 3), (1, 5))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([(0, 12)], "the teacher has no layer 12, it has 12, counted from 0 to 11"),
        ([(2, 1)], "the student has no layer 2, it has 2, counted from 0 to 1"),
        ([(-1, 1)], "the student has no layer -1"),
        ([(0, 1), (0, 1)], r"the pair \(0, 1\) occurs twice"),
        ([(0, 1, 2)], "expected a pair of whole numbers"),
        ([(0, 1.0)], "expected a pair of whole numbers"),
        ([(True, 1)], "expected a pair of whole numbers"),
        ([], "found no pairs"),
        ("even", "found 'even'. Use uniform, last, skip, final or pairs"),
    ],
)
def test_layer_maps_that_cannot_be_are_refused(pairs: list[tuple[int, int]], message: str):
    with pytest.raises(ValueError, match=message):
        layer_map(pairs, 2, 12)


@pytest.mark.parametrize(("student", "teacher", "owner"), [(0, 3, "student"), (3, 0, "teacher")])
def test_a_model_without_layers_is_refused(student: int, teacher: int, owner: str):
    with pytest.raises(ValueError, match=f"the {owner} has 0 layers"):
        layer_map("uniform", student, teacher)


def test_a_projection_is_learned_where_widths_differ_and_nothing_where_they_do_not():
    projections = Projections([(3, 5), (4, 4)], seed=0)
    student = random(2, 6, 4, seed=1)
    assert projections(1, student) is student
    assert {name: tuple(p.shape) for name, p in projections.named_parameters()} == {
        "maps.0.weight": (5, 3), "maps.0.bias": (5,),
    }  # fmt: skip
    narrow = random(2, 6, 3, seed=1)
    expected = narrow.double() @ projections.get_parameter("maps.0.weight").double().T
    torch.testing.assert_close(projections(0, narrow).double(), expected, rtol=1e-5, atol=1e-6)
    assert projections(0, narrow.half()).dtype == torch.float32


def test_a_loss_through_a_projection_pulls_the_student_and_the_projection_alone():
    projections = Projections([(3, 5)], seed=0)
    student, teacher = random(4, 5, 3, seed=1).requires_grad_(), random(4, 5, 5, seed=2).requires_grad_()
    hidden_mse_sum(teacher, projections(0, student), MASK).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projections.parameters())


def test_projections_depend_on_their_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = Projections([(3, 5), (8, 2)], seed=1, layer_norm=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second, other = Projections([(3, 5), (8, 2)], seed=1, layer_norm=True), Projections([(3, 5)], seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.get_parameter("maps.0.0.weight"), other.get_parameter("maps.0.weight"))


def test_a_projection_keeps_the_size_of_what_goes_in_and_a_layer_norm_sets_it():
    student = random(4, 50, 256, seed=1)
    assert Projections([(256, 512)], seed=0)(0, student).std().item() == pytest.approx(1.0, rel=0.05)
    normed = Projections([(256, 512)], seed=0, layer_norm=True)(0, 9 * student)
    assert normed.std(dim=-1).mean().item() == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("widths", [(0, 3), (3, 0)])
def test_a_projection_without_a_width_is_refused(widths: tuple[int, int]):
    with pytest.raises(ValueError, match="expected positive"):
        Projections([widths], seed=0)
