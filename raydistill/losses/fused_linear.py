"""A language model's output layer and its loss in one: logits and their gradient live for a chunk of positions.

The loss of a position needs its logits once, and its gradient with respect to them follows in closed form, so that a
chunk of positions is done with - loss, gradient of the hidden states, share of the head's gradient - before the next
one begins. The backward pass multiplies what was kept by what comes from above. With sparse targets the gradient of a
position's logits is a q + b, q the student's probabilities, a one number and b zero but at the kept tokens and the
label, for every loss of sparse_divergences:

    d loss / d z_j = s_j - q_j S + [j not kept] q_j t / Q,     S = sum_kept s_i + t,

with s_i the slopes by log q_i, t the one by the logarithm of the mass Q of the tail (0 for a sample).

A student with a tokenizer of its own (losses/cross_tokenizer) learns from spans or from ranks. A span needs all of its
positions, so that chunks end between spans.

Shapes: N positions, C positions of a chunk, V vocabulary, D width, K kept tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from raydistill.losses.cross_tokenizer import rank_loss, span_loss, whole_spans
from raydistill.losses.registry import RESPONSE_LOSSES
from raydistill.losses.response import IGNORED_LABEL
from raydistill.losses.sparse_divergences import parameter_of, sparse_terms
from raydistill.losses.token_objective import CrossTeacher, Teacher, TokenObjective
from raydistill.targets import HiddenTargets, RankTargets, SpanTargets, SparseTargets


@dataclass(frozen=True)
class TokenLoss:
    """Sums over the positions that took part, and how many they are: the caller divides once by the global count.

    parts are before weighting and detached: "cross_entropy", and with alpha above 0 the response loss by its name.
    """

    sum: torch.Tensor
    parts: dict[str, torch.Tensor]
    num_tokens: int


def token_loss(
    objective: TokenObjective, hidden_ND: torch.Tensor, head_VD: torch.Tensor, labels_N: torch.Tensor,
    teacher: Teacher | CrossTeacher | None = None, *, mask_N: torch.Tensor | None = None,
    bias_V: torch.Tensor | None = None, softcap: float | None = None, chunk: int = 128,
) -> TokenLoss:  # fmt: skip
    """The objective over the positions whose label is not -100 and whose mask is true; the others' hidden states,
    labels and targets are not looked at and get gradient 0.

    labels_N holds the token that follows each position. softcap c makes c tanh(z / c) of every logit z (Gemma 2,
    arXiv:2408.00118, section 2), which costs one more tensor of a chunk's size. Products are taken in the dtype of the
    hidden states, float16's in float32, which extreme values leave; everything else and all sums in float32 (float64
    for float64). The largest tensor is chunk x V, apart from the head and its gradient. Targets of a student with
    another tokenizer count the positions that took part. Raises ValueError where alpha needs a teacher and there is
    none, and for one that does not determine the loss.
    """
    if objective.has_response:
        if teacher is None:
            raise ValueError(f"alpha {objective.alpha} needs the teacher's targets and the batch carries none")
        objective.check(teacher)
    taking = labels_N != IGNORED_LABEL if mask_N is None else (labels_N != IGNORED_LABEL) & mask_N.bool()
    with_gradient = torch.is_grad_enabled()
    with torch.no_grad():
        done = _Pass(objective, hidden_ND, head_VD, bias_V, softcap, with_gradient=with_gradient)
        positions_N = taking.nonzero()[:, 0]
        for begin, end in _chunks(len(positions_N), chunk, teacher):
            part = teacher.within(begin, end) if isinstance(teacher, SpanTargets | RankTargets) else teacher
            done.add(positions_N[begin:end], labels_N, part)
    total = done.parts["cross_entropy"] * (1 - objective.alpha)
    if objective.has_response:
        total = total + objective.alpha * done.parts[objective.part]
    if any(gradient is not None for gradient in done.gradients):
        total = _FusedGradient.apply(total, hidden_ND, head_VD, bias_V, *done.gradients)
    return TokenLoss(total, done.parts, int(taking.sum()))  # pyright: ignore[reportArgumentType]


def _chunks(positions: int, chunk: int, teacher: Teacher | CrossTeacher | None) -> list[tuple[int, int]]:
    if isinstance(teacher, SpanTargets):
        return whole_spans(positions, chunk, teacher)
    return [(begin, min(begin + chunk, positions)) for begin in range(0, positions, chunk)]


class _Pass:
    """Sums and gradients over the chunks so far."""

    def __init__(
        self, objective: TokenObjective, hidden_ND: torch.Tensor, head_VD: torch.Tensor, bias_V: torch.Tensor | None,
        softcap: float | None, *, with_gradient: bool,
    ) -> None:  # fmt: skip
        self.objective, self.hidden_ND, self.bias_V, self.softcap = objective, hidden_ND, bias_V, softcap
        self.wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        self.product = self.wide if hidden_ND.dtype == torch.float16 else hidden_ND.dtype
        self.head_VD = head_VD.to(self.product)
        names = objective.part_names
        self.parts = {name: torch.zeros((), dtype=self.wide, device=hidden_ND.device) for name in names}
        wanted = [with_gradient and value is not None and value.requires_grad for value in (hidden_ND, head_VD, bias_V)]
        self.gradients = [
            torch.zeros(value.shape, dtype=self.wide, device=value.device) if value is not None and want else None
            for value, want in zip((hidden_ND, head_VD, bias_V), wanted, strict=True)
        ]

    def add(self, positions: torch.Tensor, labels_N: torch.Tensor, teacher: Teacher | CrossTeacher | None) -> None:
        """Positions of the batch by index, a chunk of them; of a cross-tokenizer teacher what is of them."""
        hidden_CD, labels_C = self.hidden_ND[positions].to(self.product), labels_N[positions]
        logits_CV = (hidden_CD @ self.head_VD.T).to(self.wide)
        if self.bias_V is not None:
            logits_CV += self.bias_V.to(self.wide)
        cap_CV = None
        if self.softcap is not None:
            logits_CV.div_(self.softcap).tanh_()
            cap_CV = 1 - logits_CV.square()  # the slope of what is capped by what is not
            logits_CV.mul_(self.softcap)
        slope_CV = None
        if isinstance(teacher, RankTargets):
            slope_CV = self._ranks(logits_CV, teacher)
        elif self.objective.has_response and not isinstance(teacher, SparseTargets | SpanTargets):
            slope_CV = self._whole(logits_CV, labels_C, positions, teacher)
        log_total_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
        self._cross_entropy(logits_CV, labels_C, log_total_C1)
        if self.objective.has_response and isinstance(teacher, SparseTargets):
            gradient_CV = self._sparse(logits_CV, log_total_C1, teacher.select(positions))
        elif self.objective.has_response and isinstance(teacher, SpanTargets):
            gradient_CV = self._spans(logits_CV, log_total_C1, labels_C, teacher)
        else:
            gradient_CV = logits_CV.sub_(log_total_C1).exp_().mul_(1 - self.objective.alpha)
        if any(gradient is not None for gradient in self.gradients):
            gradient_CV = self._less_labels(gradient_CV, labels_C, slope_CV)
            self._back(positions, hidden_CD, gradient_CV if cap_CV is None else gradient_CV.mul_(cap_CV))

    def _cross_entropy(self, logits_CV: torch.Tensor, labels_C: torch.Tensor, log_total_C1: torch.Tensor) -> None:
        smoothing = self.objective.label_smoothing
        aim_C = (1 - smoothing) * logits_CV.gather(1, labels_C[:, None])[:, 0]
        if smoothing:
            aim_C = aim_C + smoothing * logits_CV.mean(dim=-1)
        self.parts["cross_entropy"] += (log_total_C1[:, 0] - aim_C).sum()

    def _whole(
        self, logits_CV: torch.Tensor, labels_C: torch.Tensor, positions: torch.Tensor, teacher: Teacher | None
    ) -> torch.Tensor:
        """The response loss of a teacher of whom every logit is known; its gradient, not yet weighted."""
        assert teacher is not None
        assert not isinstance(teacher, SparseTargets)
        if isinstance(teacher, HiddenTargets):
            teacher_CV = teacher.head.logits(teacher.hidden_ND[positions])
        else:
            teacher_CV = teacher[positions].float()
        objective, leaf_CV = self.objective, logits_CV.detach().requires_grad_()
        with torch.enable_grad():
            loss = RESPONSE_LOSSES[objective.kind](
                teacher_CV, leaf_CV, labels_C, temperature=objective.temperature, parameters=objective.parameters
            )
            (slope_CV,) = torch.autograd.grad(loss, leaf_CV)
        self.parts[objective.part] += loss.detach()
        return slope_CV

    def _sparse(self, logits_CV: torch.Tensor, log_total_C1: torch.Tensor, kept: SparseTargets) -> torch.Tensor:
        """The response loss of sparse targets; a q + b without the labels' share of b, in place of the logits.

        Of a tail the likelihoods within it, q / Q, take the place of q, which keeps what is too small for q.
        """
        objective, ids_CK, used_CK = self.objective, kept.ids_NK, kept.weights_NK > 0
        kept_logprobs_CK = logits_CV.gather(1, ids_CK) - log_total_C1
        log_rest_C1 = None
        if kept.log_tail_N is not None:
            # Added and not set: an unused slot may name any token.
            logits_CV.scatter_add_(1, ids_CK, torch.zeros_like(kept_logprobs_CK).masked_fill(used_CK, float("-inf")))
            tail_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
            log_rest_C1, log_total_C1 = tail_C1 - log_total_C1, tail_C1.masked_fill(tail_C1.isneginf(), 0.0)
        value = parameter_of(objective.kind, objective.parameters)
        log_rest_C = None if log_rest_C1 is None else log_rest_C1[:, 0]
        loss_C, slopes_CK, rest_C = sparse_terms(objective.kind, value, kept, kept_logprobs_CK, log_rest_C)
        self.parts[objective.part] += loss_C.sum()
        own_CK, sum_C1 = objective.alpha * slopes_CK * used_CK, slopes_CK.sum(dim=-1, keepdim=True)
        if log_rest_C1 is None or rest_C is None:
            scale_C1 = 1 - objective.alpha - objective.alpha * sum_C1
        else:
            outer_C1 = 1 - objective.alpha - objective.alpha * (sum_C1 + rest_C[:, None])
            own_CK += outer_C1 * kept_logprobs_CK.exp() * used_CK
            scale_C1 = outer_C1 * log_rest_C1.exp() + objective.alpha * rest_C[:, None]
        return logits_CV.sub_(log_total_C1).exp_().mul_(scale_C1).scatter_add_(1, ids_CK, own_CK)

    def _ranks(self, logits_CV: torch.Tensor, ranks: RankTargets) -> torch.Tensor | None:
        """The response loss of sorted probabilities; its gradient, not yet weighted."""
        if not self.objective.has_response:
            return None
        loss, slope_CV = rank_loss(ranks, logits_CV, temperature=self.objective.temperature)
        self.parts[self.objective.part] += loss
        return slope_CV

    def _spans(
        self, logits_CV: torch.Tensor, log_total_C1: torch.Tensor, labels_C: torch.Tensor, spans: SpanTargets
    ) -> torch.Tensor:
        """The response loss of whole spans; its gradient is that of a cross-entropy whose positions have weights."""
        logprobs_C = (logits_CV.gather(1, labels_C[:, None]) - log_total_C1)[:, 0]
        loss, slopes_C = span_loss(spans, logprobs_C, temperature=self.objective.temperature)
        self.parts[self.objective.part] += loss
        own_C1 = self.objective.alpha * slopes_C[:, None]
        probs_CV = logits_CV.sub_(log_total_C1).exp_()
        return probs_CV.mul_(1 - self.objective.alpha + own_C1).scatter_add_(1, labels_C[:, None], -own_C1)

    def _less_labels(
        self, gradient_CV: torch.Tensor, labels_C: torch.Tensor, slope_CV: torch.Tensor | None
    ) -> torch.Tensor:
        """The whole gradient: the labels' share, and what a teacher with all logits gave."""
        weight, smoothing = 1 - self.objective.alpha, self.objective.label_smoothing
        ones_C1 = torch.ones_like(gradient_CV[:, :1])
        gradient_CV.scatter_add_(1, labels_C[:, None], ones_C1 * (-weight * (1 - smoothing)))
        if smoothing:
            gradient_CV -= weight * smoothing / gradient_CV.shape[1]
        return gradient_CV if slope_CV is None else gradient_CV.add_(slope_CV, alpha=self.objective.alpha)

    def _back(self, positions: torch.Tensor, hidden_CD: torch.Tensor, gradient_CV: torch.Tensor) -> None:
        """Through the output layer."""
        of_hidden, of_head, of_bias = self.gradients
        if of_bias is not None:
            of_bias += gradient_CV.sum(dim=0)
        narrow_CV = gradient_CV.to(self.product)
        if of_hidden is not None:
            of_hidden[positions] = (narrow_CV @ self.head_VD).to(self.wide)
        if of_head is not None and self.product == self.wide:
            of_head.addmm_(narrow_CV.T, hidden_CD)
        elif of_head is not None:
            of_head += narrow_CV.T @ hidden_CD


class _FusedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, *inputs_and_gradients: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(*inputs_and_gradients[3:])
        ctx.dtypes = [None if value is None else value.dtype for value in inputs_and_gradients[:3]]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *outer: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        # Multiplied in full width: float16's loss scale is in what comes from above.
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *(None if g is None else (outer[0] * g).to(dtype) for g, dtype in pairs), None, None, None
