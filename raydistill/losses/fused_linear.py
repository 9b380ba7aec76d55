"""A language model's output layer and its loss in one: logits and their gradient live for a chunk of positions.

The loss of a position needs its logits once, and its gradient with respect to them follows in closed form, so that a
chunk of positions is done with - loss, gradient of the hidden states, share of the head's gradient - before the next
one begins. The backward pass multiplies what was kept by what comes from above. With sparse targets the gradient of a
position's logits is a q + b, q the student's probabilities, a one number and b zero but at the kept tokens and the
label, for every loss of sparse_divergences:

    d loss / d z_j = s_j - q_j S + [j not kept] q_j t / Q,     S = sum_kept s_i + t,

with s_i the slopes by log q_i, t the one by the logarithm of the mass Q of the tail (0 for a sample).

Shapes: N positions, C positions of a chunk, V vocabulary, D width, K kept tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from raydistill.losses.registry import RESPONSE_LOSSES
from raydistill.losses.response import IGNORED_LABEL, check_label_smoothing, check_temperature
from raydistill.losses.sparse_divergences import check_sparse_loss, parameter_of, sparse_terms
from raydistill.targets import HiddenTargets, SparseTargets

# Sparse, hidden states with a head, or logits (N, V).
Teacher = SparseTargets | HiddenTargets | torch.Tensor


@dataclass(frozen=True)
class TokenObjective:
    """alpha * response loss + (1 - alpha) * cross-entropy with the next token, as losses/objective of classes.

    always_response: the response loss is computed and reported also while alpha is 0, for one that changes.

    Raises ValueError for an unknown kind, a parameter that it does not have or out of bounds, and a loss that is not a
    sum over positions.
    """

    temperature: float = 1.0
    alpha: float = 0.0
    kind: str = "forward_kl"
    parameters: Mapping[str, float] = field(default_factory=dict[str, float])
    label_smoothing: float = 0.0
    always_response: bool = False

    def __post_init__(self) -> None:
        if self.kind not in RESPONSE_LOSSES:
            raise ValueError(f"kind must be one of {', '.join(RESPONSE_LOSSES)}, found {self.kind!r}")
        RESPONSE_LOSSES[self.kind].resolved(self.parameters)
        check_sparse_loss("dense", kind=self.kind, parameters=self.parameters)
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, found {self.alpha}")
        check_temperature(self.temperature)
        check_label_smoothing(self.label_smoothing)
        if not RESPONSE_LOSSES[self.kind].uses_temperature and self.temperature != 1:
            raise ValueError(f"{self.kind} takes no temperature, found {self.temperature}; leave it at 1")

    @property
    def has_response(self) -> bool:
        return self.alpha > 0 or self.always_response

    @property
    def needs_teacher(self) -> bool:
        return self.has_response

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the parts that every call reports, in their order."""
        return ("cross_entropy", *((self.part,) if self.has_response else ()))

    @property
    def part(self) -> str:
        return RESPONSE_LOSSES[self.kind].part or self.kind

    def check(self, teacher: Teacher) -> None:
        """Raises ValueError for targets that do not determine this loss."""
        if isinstance(teacher, SparseTargets):
            codec = "sampled" if teacher.log_tail_N is None else "topk"
            known = teacher.probs_NK is not None
            check_sparse_loss(codec, kind=self.kind, parameters=self.parameters, has_probabilities=known)
            if self.temperature != 1:
                raise ValueError(
                    f"sparse targets serve temperature 1 alone, found {self.temperature}; use codec hidden"
                )


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
    teacher: Teacher | None = None, *, mask_N: torch.Tensor | None = None, bias_V: torch.Tensor | None = None,
    softcap: float | None = None, chunk: int = 128,
) -> TokenLoss:  # fmt: skip
    """The objective over the positions whose label is not -100 and whose mask is true; the others' hidden states,
    labels and targets are not looked at and get gradient 0.

    labels_N holds the token that follows each position. softcap c makes c tanh(z / c) of every logit z (Gemma 2,
    arXiv:2408.00118, section 2), which costs one more tensor of a chunk's size. Products are taken in the dtype of the
    hidden states, float16's in float32, which extreme values leave; everything else and all sums in float32 (float64
    for float64). The largest tensor is chunk x V, apart from the head and its gradient. Raises ValueError where alpha
    needs a teacher and there is none, and for one that does not determine the loss.
    """
    if objective.has_response:
        if teacher is None:
            raise ValueError(f"alpha {objective.alpha} needs the teacher's targets and the batch carries none")
        objective.check(teacher)
    taking = labels_N != IGNORED_LABEL if mask_N is None else (labels_N != IGNORED_LABEL) & mask_N.bool()
    with_gradient = torch.is_grad_enabled()
    with torch.no_grad():
        done = _Pass(objective, hidden_ND, head_VD, bias_V, softcap, with_gradient=with_gradient)
        for positions in taking.nonzero()[:, 0].split(chunk):
            done.add(positions, labels_N, teacher)
    total = done.parts["cross_entropy"] * (1 - objective.alpha)
    if objective.has_response:
        total = total + objective.alpha * done.parts[objective.part]
    if any(gradient is not None for gradient in done.gradients):
        total = _FusedGradient.apply(total, hidden_ND, head_VD, bias_V, *done.gradients)
    return TokenLoss(total, done.parts, int(taking.sum()))  # pyright: ignore[reportArgumentType]


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

    def add(self, positions: torch.Tensor, labels_N: torch.Tensor, teacher: Teacher | None) -> None:
        """Positions of the batch by index, a chunk of them."""
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
        if self.objective.has_response and not isinstance(teacher, SparseTargets):
            slope_CV = self._whole(logits_CV, labels_C, positions, teacher)
        log_total_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
        self._cross_entropy(logits_CV, labels_C, log_total_C1)
        if self.objective.has_response and isinstance(teacher, SparseTargets):
            gradient_CV = self._sparse(logits_CV, log_total_C1, teacher.select(positions))
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
