"""Losses of spans and of ranks against sums written from the papers' formulas in float64, and fused with the head."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.cache.sampling import sampled_targets, top_targets
from raydistill.losses.cross_tokenizer import check_cross_codec, rank_distance, span_terms, whole_spans
from raydistill.losses.fused_linear import TokenLoss, token_loss
from raydistill.losses.token_objective import TokenObjective
from raydistill.targets import HiddenTargets, OutputHead, RankTargets, SpanTargets

N, V, TEACHER_V, D = 17, 30, 44, 6
SPANS = ((0, 1), (1, 4), (5, 6), (6, 11), (13, 15))
Tensor = torch.Tensor


def binary_kl(log_p: float, log_q: float, tau: float) -> float:
    """tau KL of the two answers, from Minixhofer et al.'s definition."""
    x, y = math.exp(log_p / tau), math.exp(log_q / tau)
    return tau * (x * math.log(x / y) + (1 - x) * math.log((1 - x) / (1 - y)))


def made(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head and labels of the student, and the teacher's log-probability of each span."""
    random = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(s, D, generator=random, dtype=torch.float64).to(dtype) for s in (N, V))
    labels = torch.randint(0, V, (N,), generator=random)
    return hidden, head, labels, -10 * torch.rand(len(SPANS), generator=random, dtype=torch.float64)


def span_targets(logprobs: Tensor) -> SpanTargets:
    begins, ends = torch.tensor(SPANS).T
    return SpanTargets(begins, ends, logprobs)


def fused(hidden: Tensor, head: Tensor, labels: Tensor, teacher: SpanTargets | RankTargets, **more: float) -> TokenLoss:
    kind = "spans" if isinstance(teacher, SpanTargets) else "uld"
    settings = {"chunk": 4} | {name: more.pop(name) for name in ("chunk", "softcap") if name in more}
    objective = TokenObjective(cross_tokenizer=kind, **{"alpha": 1.0, **more})  # pyright: ignore[reportArgumentType]
    return token_loss(objective, hidden, head, labels, teacher, **settings)  # pyright: ignore[reportArgumentType]


@settings(max_examples=200, deadline=None)
@given(st.floats(-60, -1e-3), st.floats(-60, -1e-3), st.sampled_from([1.0, 3.0, 100.0]))
def test_a_spans_loss_is_the_papers(log_p: float, log_q: float, tau: float):
    student = torch.tensor([log_q], dtype=torch.float64, requires_grad=True)
    loss, slope = span_terms(torch.tensor([log_p], dtype=torch.float64), student, temperature=tau)
    assert loss.item() == pytest.approx(max(0.0, binary_kl(log_p, log_q, tau)), rel=1e-6, abs=1e-9)
    step = 1e-5 * abs(log_q)
    numeric = (binary_kl(log_p, log_q - step, tau) - binary_kl(log_p, log_q + step, tau)) / (2 * step)
    assert slope.item() == pytest.approx(numeric, rel=1e-3, abs=1e-4)


def test_equal_spans_cost_nothing_and_others_something():
    logprobs = -torch.logspace(-12, 3, 40, dtype=torch.float64)
    loss, slopes = span_terms(logprobs, logprobs, temperature=100.0)
    assert loss.abs().max() < 1e-9
    assert slopes.abs().max() < 1e-9
    assert (span_terms(logprobs, 1.5 * logprobs - 0.1, temperature=100.0)[0] > 0).all()


def test_a_certain_span_gives_finite_numbers():
    certain, never = torch.tensor([0.0, -1e4, 0.0, -1e4]), torch.tensor([-1e4, 0.0, 0.0, -1e4])
    for tau in (1.0, 100.0):
        loss, slopes = span_terms(certain, never, temperature=tau)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(slopes).all()


def test_a_large_temperature_comes_to_its_limit():
    a, b = torch.tensor([0.2, 3.0, 9.0]).double(), torch.tensor([0.4, 1.0, 30.0]).double()
    loss, slopes = span_terms(-a, -b, temperature=1e6)
    torch.testing.assert_close(loss, a * (a / b).log() - a + b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slopes, 1 - a / b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize(("alpha", "tau", "smoothing"), [(1.0, 1.0, 0.0), (0.7, 100.0, 0.0), (0.4, 5.0, 0.1)])
def test_fused_spans_have_the_loss_and_gradient_of_whole_logits(chunk: int, alpha: float, tau: float, smoothing: float):
    hidden, head, labels, logprobs = made()
    hidden.requires_grad_()
    head.requires_grad_()
    found = fused(
        hidden, head, labels, span_targets(logprobs), chunk=chunk, alpha=alpha, temperature=tau,
        label_smoothing=smoothing,
    )  # fmt: skip
    gradients = torch.autograd.grad(found.sum, (hidden, head))
    ours = (hidden @ head.T).log_softmax(dim=-1)
    of_labels = ours[torch.arange(N), labels]
    expected = torch.zeros((), dtype=torch.float64)
    for (begin, end), log_p in zip(SPANS, logprobs, strict=True):
        x, y = (log_p / tau).exp(), (of_labels[begin:end].sum() / tau).exp()
        expected = expected + tau * (x * (x / y).log() + (1 - x) * ((1 - x) / (1 - y)).log())
    cross_entropy = -((1 - smoothing) * of_labels + smoothing * ours.mean(dim=-1)).sum()
    total = alpha * expected + (1 - alpha) * cross_entropy
    torch.testing.assert_close(found.sum, total, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.parts["spans"], expected.detach(), rtol=1e-9, atol=1e-9)
    for one, other in zip(gradients, torch.autograd.grad(total, (hidden, head)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_spans_are_capped_and_biased_as_logits_are():
    hidden, head, labels, logprobs = made()
    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(
        fused(hidden, head, labels, span_targets(logprobs), temperature=10.0, softcap=2.0).sum, hidden
    )
    of_labels = (2 * (hidden @ head.T / 2).tanh()).log_softmax(dim=-1)[torch.arange(N), labels]
    sums = torch.stack([of_labels[begin:end].sum() for begin, end in SPANS])
    x, y = (logprobs / 10).exp(), (sums / 10).exp()
    total = 10 * (x * (x / y).log() + (1 - x) * ((1 - x) / (1 - y)).log()).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(total, hidden)[0], rtol=1e-8, atol=1e-9)


def test_chunks_end_between_spans():
    _, _, _, logprobs = made()
    for chunk in range(1, 20):
        found = whole_spans(N, chunk, span_targets(logprobs))
        assert [begin for begin, _ in found[1:]] == [end for _, end in found[:-1]]
        assert (found[0][0], found[-1][1]) == (0, N)
        cuts = {end for _, end in found}
        assert not any(begin < cut < end for begin, end in SPANS for cut in cuts)
        assert max(end - begin for begin, end in found) <= max(chunk, 5)
    nothing = torch.empty(0, dtype=torch.int64)
    assert whole_spans(0, 4, SpanTargets(nothing, nothing, torch.empty(0))) == []


def test_float32_spans_are_near_float64s():
    hidden, head, labels, logprobs = made()
    exact = fused(hidden, head, labels, span_targets(logprobs), temperature=100.0).sum
    found = fused(hidden.float(), head.float(), labels, span_targets(logprobs.float()), temperature=100.0).sum
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-4)


def by_rank(teacher: Tensor, student: Tensor) -> float:
    """The paper's distance: both lists sorted, the shorter one padded."""
    one, other = (sorted(side.tolist(), reverse=True) for side in (teacher, student))
    length = max(len(one), len(other))
    one, other = (side + [0.0] * (length - len(side)) for side in (one, other))
    return sum(abs(p - q) for p, q in zip(one, other, strict=True))


def rank_logits(vocabulary: int, seed: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(3, vocabulary, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("vocabulary", [TEACHER_V, V, 12])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_whole_teachers_ranks_are_compared_as_the_paper_does(vocabulary: int, temperature: float):
    hidden, head, labels, _ = made()
    teacher, places = rank_logits(vocabulary), torch.tensor([1, 6, 16])
    found = fused(hidden, head, labels, RankTargets(places, teacher), temperature=temperature)
    student = ((hidden @ head.T)[places] / temperature).softmax(dim=-1)
    expected = sum(by_rank(p, q) for p, q in zip((teacher / temperature).softmax(dim=-1), student, strict=True))
    assert found.sum.item() == pytest.approx(expected, rel=1e-5)  # the teacher's are float32
    own_head = OutputHead(torch.eye(vocabulary))
    from_hidden = RankTargets(places, HiddenTargets(teacher.float(), own_head))
    assert fused(hidden, head, labels, from_hidden, temperature=temperature).sum.item() == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("chunk", [2, 100])
def test_the_gradient_of_ranks_is_that_of_the_loss(chunk: int):
    hidden, head, labels, _ = made()
    hidden.requires_grad_()
    targets = RankTargets(torch.tensor([1, 6, 16]), rank_logits(TEACHER_V))
    (gradient,) = torch.autograd.grad(fused(hidden, head, labels, targets, chunk=chunk, alpha=0.6).sum, hidden)

    def value(at: Tensor) -> Tensor:
        return fused(at, head, labels, targets, chunk=chunk, alpha=0.6).sum

    numeric = torch.zeros_like(hidden)
    with torch.no_grad():
        for row in range(N):
            for column in range(D):
                step = torch.zeros_like(hidden)
                step[row, column] = 1e-6
                numeric[row, column] = (value(hidden + step) - value(hidden - step)) / 2e-6
    torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("codec", ["topk", "sampled"])
def test_a_cut_teacher_gives_a_lower_bound_that_kept_tokens_close(codec: str):
    teacher, student = rank_logits(TEACHER_V).float(), rank_logits(V, seed=2)
    exact = sum(by_rank(p, q) for p, q in zip(teacher.softmax(dim=-1), student.softmax(dim=-1), strict=True))
    before = -1.0
    for width in (4, 16, TEACHER_V):
        if codec == "topk":
            kept = top_targets(teacher, width=width)
        else:
            kept = sampled_targets(teacher, torch.zeros(3).long(), torch.arange(3), width=width, seed=0)
        found = fused(student, torch.eye(V).double(), torch.zeros(3).long(), RankTargets(torch.arange(3), kept))
        assert before - 1e-6 <= found.sum.item() <= exact + 1e-5
        before = found.sum.item()
    assert before == pytest.approx(exact, rel=1e-4)


def test_equal_sorted_probabilities_have_no_distance():
    teacher = rank_logits(V).softmax(dim=-1).sort(dim=-1, descending=True).values
    shuffled = rank_logits(V)[:, torch.randperm(V, generator=torch.Generator().manual_seed(3))]
    assert rank_distance(teacher, None, shuffled, temperature=1.0).item() == pytest.approx(0, abs=1e-9)


def test_targets_that_do_not_fit_are_refused_by_name():
    hidden, head, labels, logprobs = made()
    spans, ranks = span_targets(logprobs), RankTargets(torch.tensor([1]), rank_logits(V)[:1])
    for kind, teacher in (("spans", ranks), ("uld", spans), (None, spans)):
        with pytest.raises(ValueError, match="cannot be computed from"):
            token_loss(TokenObjective(alpha=0.5, cross_tokenizer=kind), hidden, head, labels, teacher)
    with pytest.raises(ValueError, match="cross_tokenizer is one of spans, uld with kind forward_kl"):
        TokenObjective(alpha=0.5, cross_tokenizer="spans", kind="jsd")
    with pytest.raises(ValueError, match="cross_tokenizer is one of spans, uld"):
        TokenObjective(alpha=0.5, cross_tokenizer="chunks")
    with pytest.raises(ValueError, match=r"temperature must be above 0"):
        span_terms(logprobs, logprobs, temperature=0.0)
    with pytest.raises(ValueError, match="drawn with replacement, none is known"):
        check_cross_codec("uld", "random")
    for kind in ("spans", "uld"):
        for codec in ("sampled", "topk", "hidden", "dense"):
            check_cross_codec(kind, codec)
    check_cross_codec("spans", "random")
