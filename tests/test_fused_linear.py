"""The fused output layer and loss against full logits in float64, written from the formulas and differentiated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raydistill.cache.sampling import drawn_targets, sampled_targets, top_targets
from raydistill.losses.fused_linear import token_loss
from raydistill.losses.sparse_divergences import SPARSE_DIVERGENCES, check_sparse_loss
from raydistill.losses.token_objective import TokenObjective
from raydistill.targets import HiddenTargets, OutputHead, SparseTargets

N, V, D, K = 13, 40, 6, 9
Tensor = torch.Tensor
LABELS = torch.tensor([3, -100, 7, 0, 39, 12, -100, 5, 5, 21, 33, 2, 8])
MASK = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0, 1])
TAKING = (LABELS != -100) & (MASK == 1)

# f(p, q) as the papers write it, and its value where the teacher has nothing.
FORMULAS: dict[str, tuple[Callable[[Tensor, Tensor, float], Tensor], Callable[[float], float]]] = {
    "forward_kl": (lambda p, q, _: p * (p / q).log(), lambda _: 0.0),
    "reverse_kl": (lambda p, q, _: q * (q / p).log(), lambda _: math.inf),
    "jsd": (
        lambda p, q, b: b * p * (p / (b * p + (1 - b) * q)).log() + (1 - b) * q * (q / (b * p + (1 - b) * q)).log(),
        lambda b: (1 - b) * math.log(1 / (1 - b)),
    ),
    "skew_forward_kl": (lambda p, q, a: p * (p / (a * p + (1 - a) * q)).log(), lambda _: 0.0),
    "skew_reverse_kl": (lambda p, q, a: q * (q / ((1 - a) * p + a * q)).log(), lambda a: math.log(1 / a)),
    "total_variation": (lambda p, q, _: (p - q).abs() / 2, lambda _: 0.5),
}
CASES = [
    ("forward_kl", 0.0), ("jsd", 0.5), ("jsd", 0.1), ("skew_forward_kl", 0.1), ("skew_reverse_kl", 0.1),
    ("total_variation", 0.0),
]  # fmt: skip


def named(kind: str, value: float) -> dict[str, float]:
    parameter = SPARSE_DIVERGENCES[kind].parameter
    return {parameter: value} if parameter else {}


def made(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head and bias of the student, and the teacher's logits."""
    random = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,), (N, V))
    hidden, head, bias, teacher = (torch.randn(s, generator=random, dtype=torch.float64) for s in shapes)
    return hidden.to(dtype), head.to(dtype), bias.to(dtype), 2 * teacher


def targets_of(codec: str, logits: Tensor, width: int = K) -> SparseTargets:
    row_ids, positions = torch.zeros(len(logits), dtype=torch.int64), torch.arange(len(logits))
    if codec == "topk":
        return top_targets(logits, width=width)
    if codec == "random":
        return drawn_targets(logits, row_ids, positions, draws=width, seed=0)
    return sampled_targets(logits, row_ids, positions, width=width, seed=0)


def expected_response(kind: str, value: float, teacher: Tensor | SparseTargets, logits: Tensor) -> Tensor:
    """The sum over rows by the definition; of sparse targets the estimate or the merged tail."""
    formula, nothing = FORMULAS[kind]
    q = logits.softmax(dim=1)
    if isinstance(teacher, Tensor):
        return formula(teacher.double().softmax(dim=1), q, value).sum()
    weights = teacher.weights_NK.double()
    if teacher.log_tail_N is None and kind == "forward_kl":  # whose only constant is the teacher's entropy, as stored
        assert teacher.entropy_N is not None
        return -(weights * q.gather(1, teacher.ids_NK).log()).sum() - teacher.entropy_N.double().sum()
    if teacher.log_tail_N is None:
        assert teacher.probs_NK is not None
        used = weights > 0
        kept, p = q.gather(1, teacher.ids_NK)[used], teacher.probs_NK.double()[used]
        change = formula(p, kept, value) - nothing(value) * kept
        return nothing(value) * len(q) + (weights[used] / p * change).sum()
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(q)):
        used = weights[n] > 0
        ids = teacher.ids_NK[n][used]
        rest = torch.ones(V, dtype=torch.bool).index_fill(0, ids, False)
        total = total + formula(weights[n][used], q[n][ids], value).sum()
        if rest.any():
            total = total + formula(teacher.log_tail_N[n].double().exp(), q[n][rest].sum(), value)
    return total


def expected(
    objective: TokenObjective, value: float, inputs: tuple[Tensor, Tensor, Tensor], teacher: Tensor | SparseTargets
) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of hidden states, head and bias, by autograd over whole logits in float64."""
    hidden, head, bias = (t.detach().double().requires_grad_() for t in inputs)
    logits = (hidden @ head.T + bias)[TAKING]
    kept = teacher.select(TAKING) if isinstance(teacher, SparseTargets) else teacher[TAKING]
    response = expected_response(objective.kind, value, kept, logits)
    smooth, logprobs = objective.label_smoothing, logits.log_softmax(dim=1)
    aims = (1 - smooth) * torch.nn.functional.one_hot(LABELS[TAKING], V) + smooth / V
    loss = objective.alpha * response - (1 - objective.alpha) * (aims * logprobs).sum()
    return loss.detach(), list(torch.autograd.grad(loss, (hidden, head, bias)))


def found(
    objective: TokenObjective, inputs: tuple[Tensor, Tensor, Tensor], teacher: object, chunk: int = 4
) -> tuple[Tensor, list[Tensor]]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    loss = token_loss(objective, leaves[0], leaves[1], LABELS, teacher, mask_N=MASK, bias_V=leaves[2], chunk=chunk)
    assert loss.num_tokens == int(TAKING.sum())
    (2 * loss.sum).backward()
    return loss.sum.detach(), [leaf.grad / 2 for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("codec", ["sampled", "random", "topk"])
@pytest.mark.parametrize(("kind", "value"), [*CASES, ("reverse_kl", 0.0)])
def test_sparse_losses_are_their_definition(codec: str, kind: str, value: float):
    if kind == "reverse_kl" and codec != "topk":
        return
    *inputs, teacher = made()
    targets = targets_of(codec, teacher)
    objective = TokenObjective(alpha=0.7, kind=kind, parameters=named(kind, value), label_smoothing=0.1)
    loss, gradients = found(objective, tuple(inputs), targets)
    wanted, wanted_gradients = expected(objective, value, tuple(inputs), targets)
    torch.testing.assert_close(loss, wanted, rtol=2e-6, atol=2e-6)  # targets are float32
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted_gradient, rtol=2e-5, atol=2e-6)
    assert (gradients[0][~TAKING] == 0).all()


@pytest.mark.parametrize("codec", ["sampled", "topk", "dense"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_capped_logits_have_their_loss_and_gradient(codec: str, smoothing: float):
    *inputs, teacher = made()
    targets = teacher if codec == "dense" else targets_of(codec, teacher)
    objective, cap = TokenObjective(alpha=0.7, label_smoothing=smoothing), 1.5
    hidden, head, bias = (t.clone().requires_grad_() for t in inputs)
    capped = cap * torch.tanh((hidden @ head.T + bias)[TAKING] / cap)
    assert (capped.abs() > 0.9 * cap).any()
    kept = targets.select(TAKING) if isinstance(targets, SparseTargets) else targets[TAKING]
    response = expected_response("forward_kl", 0.0, kept, capped)
    aims = (1 - smoothing) * torch.nn.functional.one_hot(LABELS[TAKING], V) + smoothing / V
    wanted = 0.7 * response - 0.3 * (aims * capped.log_softmax(dim=1)).sum()
    wanted_gradients = torch.autograd.grad(wanted, (hidden, head, bias))
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    loss = token_loss(
        objective, leaves[0], leaves[1], LABELS, targets, mask_N=MASK, bias_V=leaves[2], softcap=cap, chunk=4
    )
    loss.sum.backward()
    torch.testing.assert_close(loss.sum, wanted, rtol=2e-6, atol=2e-6)
    for leaf, wanted_gradient in zip(leaves, wanted_gradients, strict=True):
        torch.testing.assert_close(leaf.grad, wanted_gradient, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("codec", ["sampled", "topk", "hidden", "dense"])
@pytest.mark.parametrize(("kind", "value"), [*CASES, ("reverse_kl", 0.0)])
def test_with_the_whole_vocabulary_every_codec_is_the_dense_loss(codec: str, kind: str, value: float):
    if kind == "reverse_kl" and codec == "sampled":
        return
    *inputs, _ = made(torch.float32)
    random = torch.Generator().manual_seed(1)
    states, head = torch.randn(N, 5, generator=random), OutputHead(torch.randn(V, 5, generator=random))
    teacher = head.logits(states)
    whole = {"hidden": HiddenTargets(states, head), "dense": teacher}
    targets = whole[codec] if codec in whole else targets_of(codec, teacher, V)
    objective = TokenObjective(alpha=0.7, kind=kind, parameters=named(kind, value))
    loss, gradients = found(objective, tuple(inputs), targets)
    wanted, wanted_gradients = expected(objective, value, tuple(inputs), teacher)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient.double(), wanted_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_hidden_states_serve_any_temperature(temperature: float):
    *inputs, _ = made(torch.float32)
    random = torch.Generator().manual_seed(1)
    states, head = torch.randn(N, 5, generator=random), OutputHead(torch.randn(V, 5, generator=random), softcap=3.0)
    objective = TokenObjective(alpha=1.0, temperature=temperature)
    loss, gradients = found(objective, tuple(inputs), HiddenTargets(states, head))
    hidden, weight, bias = (t.double().requires_grad_() for t in inputs)
    teacher = 3 * torch.tanh(states.double() @ head.weight_VD.double().T / 3)
    p = (teacher[TAKING] / temperature).softmax(dim=1)
    q = ((hidden @ weight.T + bias)[TAKING] / temperature).softmax(dim=1)
    wanted = temperature**2 * (p * (p / q).log()).sum()
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    for gradient, other in zip(gradients, torch.autograd.grad(wanted, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(gradient.double(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "value"), CASES)
def test_estimates_are_right_in_the_mean(kind: str, value: float):
    """One position, 4,000 seeds: loss and gradient of the logits within 6 standard errors of those of the whole."""
    seeds, vocabulary = 4000, 30
    random = torch.Generator().manual_seed(2)
    teacher, student = (2 * torch.randn(1, vocabulary, generator=random, dtype=torch.float64) for _ in range(2))
    rows, zeros = torch.arange(seeds), torch.zeros(seeds, dtype=torch.int64)
    targets = sampled_targets(teacher.expand(seeds, -1), rows, zeros, width=5, seed=3)
    objective = TokenObjective(alpha=1.0, kind=kind, parameters=named(kind, value))
    hidden = student.expand(seeds, -1).clone().requires_grad_()
    loss = token_loss(objective, hidden, torch.eye(vocabulary, dtype=torch.float64), zeros, targets, chunk=seeds)
    (gradients,) = torch.autograd.grad(loss.sum, hidden)
    leaf = student.clone().requires_grad_()
    wanted = FORMULAS[kind][0](teacher.softmax(dim=1), leaf.softmax(dim=1), value).sum()
    (wanted_gradient,) = torch.autograd.grad(wanted, leaf)
    error = (gradients.mean(dim=0) - wanted_gradient[0]).abs()
    assert (error <= 6 * gradients.std(dim=0) / math.sqrt(seeds) + 1e-6).all()
    assert (gradients.std(dim=0) < 0.5).all()
    each = torch.stack([
        token_loss(objective, hidden[n : n + 1], torch.eye(vocabulary, dtype=torch.float64), zeros[:1],
                   targets.select(torch.tensor([n]))).sum.detach()
        for n in range(400)
    ])  # fmt: skip
    assert abs(loss.sum.item() / seeds - wanted.item()) <= 6 * each.std().item() / math.sqrt(seeds) + 1e-5


@pytest.mark.parametrize("codec", ["sampled", "topk"])
def test_gradients_agree_with_finite_differences(codec: str):
    hidden, head, bias, teacher = (t[:4] if len(t) == N else t for t in made())
    targets, labels = targets_of(codec, teacher), torch.tensor([1, -100, 30, 7])
    for kind in ("forward_kl", "jsd"):
        objective = TokenObjective(alpha=0.6, kind=kind, label_smoothing=0.2)

        def loss(hidden: Tensor, head: Tensor, bias: Tensor, objective: TokenObjective = objective) -> Tensor:
            return token_loss(objective, hidden, head, labels, targets, bias_V=bias, chunk=3).sum

        leaves = tuple(t.clone().requires_grad_() for t in (hidden, head, bias))
        assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("codec", ["sampled", "topk", "dense"])
def test_the_chunk_changes_rounding_alone(codec: str):
    *inputs, teacher = made()
    targets = teacher if codec == "dense" else targets_of(codec, teacher)
    objective, tolerance = TokenObjective(alpha=0.5), 1e-6 if codec == "dense" else 1e-12
    whole, whole_gradients = found(objective, tuple(inputs), targets, chunk=1000)
    for chunk in (1, 3, 5):
        loss, gradients = found(objective, tuple(inputs), targets, chunk=chunk)
        torch.testing.assert_close(loss, whole, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradients, whole_gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codec", ["sampled", "topk", "hidden"])
def test_extreme_hidden_states_of_half_width_stay_finite(dtype: torch.dtype, codec: str):
    hidden, head, _, teacher = made(dtype)
    hidden[0], hidden[2], head[3], head[7] = 6e4, -6e4, 100.0, -100.0
    targets = HiddenTargets(teacher, OutputHead(torch.eye(V, dtype=torch.float64)))
    for kind in ("forward_kl", "jsd", "skew_reverse_kl", "total_variation"):
        given = targets if codec == "hidden" else targets_of(codec, teacher)
        loss, gradients = found(TokenObjective(alpha=0.5, kind=kind), (hidden, head, torch.zeros(V)), given)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradients[0]).all()
    certain = teacher.clone()
    certain[:, 5] = 500.0  # every other probability is 0 in float32
    for kind in ("forward_kl", "jsd", "skew_forward_kl"):
        given = HiddenTargets(certain, targets.head) if codec == "hidden" else targets_of(codec, certain)
        loss, gradients = found(TokenObjective(alpha=0.5, kind=kind), (hidden, head, torch.zeros(V)), given)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradients[0]).all()


def test_half_width_gradients_are_those_of_full_width():
    hidden, head, bias, teacher = made(torch.bfloat16)
    targets = targets_of("sampled", teacher)
    _, gradients = found(TokenObjective(alpha=0.5), (hidden, head, bias), targets)
    _, wanted = expected(TokenObjective(alpha=0.5), 0.0, (hidden, head, bias), targets)
    for gradient, other in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("codec", ["sampled", "topk", "hidden"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(codec: str):
    class Largest(TorchDispatchMode):
        size_bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor):
                    self.size_bytes = max(self.size_bytes, value.untyped_storage().nbytes())
            return out

    positions, vocabulary, width, chunk = 64, 5000, 4, 8
    random = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, width, generator=random, requires_grad=True) for n in (positions, vocabulary))
    states = torch.randn(positions, width, generator=random)
    teacher = OutputHead(torch.randn(vocabulary, width, generator=random))
    targets = HiddenTargets(states, teacher) if codec == "hidden" else targets_of(codec, teacher.logits(states))
    labels = torch.randint(0, vocabulary, (positions,), generator=random)
    with Largest() as seen:
        token_loss(TokenObjective(alpha=0.5), hidden, head, labels, targets, chunk=chunk).sum.backward()
    assert seen.size_bytes == 4 * chunk * vocabulary


def test_validation_makes_no_gradient_and_empty_batches_give_zero():
    hidden, head, _, teacher = made(torch.float32)
    hidden.requires_grad_()
    targets = targets_of("sampled", teacher)
    with torch.no_grad():
        loss = token_loss(TokenObjective(alpha=1.0), hidden, head, LABELS, targets)
    assert not loss.sum.requires_grad
    assert loss.parts.keys() == {"cross_entropy", "kl"}
    none = token_loss(TokenObjective(alpha=1.0), hidden, head, torch.full((N,), -100), targets)
    none.sum.backward()
    assert none.num_tokens == 0
    assert none.sum.item() == 0
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()


def test_equal_sides_cost_nothing():
    *_, teacher = made()
    for codec in ("topk", "dense"):
        targets = teacher if codec == "dense" else targets_of(codec, teacher)
        for kind, value in [*CASES, ("reverse_kl", 0.0)]:
            objective = TokenObjective(alpha=1.0, kind=kind, parameters=named(kind, value))
            loss = token_loss(objective, teacher, torch.eye(V, dtype=torch.float64), LABELS, targets)
            assert abs(loss.sum.item()) < 1e-4


def test_what_targets_do_not_determine_is_refused_with_the_reason():
    hidden, head, _, teacher = made()
    sampled = targets_of("sampled", teacher)
    blind = dataclasses.replace(sampled, probs_NK=None)
    refusals = [
        (TokenObjective(alpha=1.0, kind="reverse_kl"), sampled, "no sample estimates it"),
        (TokenObjective(alpha=1.0, kind="jsd", parameters={"beta": 1.0}), sampled, "jsd with beta 1 weighs"),
        (TokenObjective(alpha=1.0, kind="skew_reverse_kl", parameters={"skew": 0.0}), sampled, "with skew 0 weighs"),
        (TokenObjective(alpha=1.0, kind="jsd"), blind, "has only weights. Score with probabilities"),
        (TokenObjective(alpha=1.0, kind="logit_mse"), targets_of("topk", teacher), "needs every token's logit"),
        (TokenObjective(alpha=1.0, temperature=2.0), sampled, "serve temperature 1 alone, found 2"),
        (TokenObjective(alpha=1.0), None, "needs the teacher's targets"),
    ]
    for objective, targets, message in refusals:
        with pytest.raises(ValueError, match=message):
            token_loss(objective, hidden, head, LABELS, targets)
    for settings, message in (
        ({"kind": "dist"}, "no loss of single positions"), ({"kind": "nothing"}, "kind must be one of"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1"), ({"label_smoothing": 2.0}, "label_smoothing must be"),
        ({"kind": "logit_mse", "temperature": 2.0}, "takes no temperature"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            TokenObjective(**settings)
    check_sparse_loss("hidden", kind="reverse_kl", parameters={})
