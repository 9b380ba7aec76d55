"""What a language model is trained with at every position, and what it may learn of its teacher from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from raydistill.losses.cross_tokenizer import CROSS_TOKENIZER
from raydistill.losses.registry import RESPONSE_LOSSES
from raydistill.losses.response import check_label_smoothing, check_temperature
from raydistill.losses.sparse_divergences import check_sparse_loss
from raydistill.targets import HiddenTargets, RankTargets, SpanTargets, SparseTargets

# Sparse, hidden states with a head, or logits (N, V).
Teacher = SparseTargets | HiddenTargets | torch.Tensor
CrossTeacher = SpanTargets | RankTargets  # of a student with another tokenizer


@dataclass(frozen=True)
class TokenObjective:
    """alpha * response loss + (1 - alpha) * cross-entropy with the next token, as losses/objective of classes.

    always_response: the response loss is computed and reported also while alpha is 0, for one that changes.
    cross_tokenizer: the response loss of a student with another tokenizer than its teacher's, in the place of `kind`.

    Raises ValueError for an unknown kind, a parameter that it does not have or out of bounds, and a loss that is not a
    sum over positions.
    """

    temperature: float = 1.0
    alpha: float = 0.0
    kind: str = "forward_kl"
    parameters: Mapping[str, float] = field(default_factory=dict[str, float])
    label_smoothing: float = 0.0
    always_response: bool = False
    cross_tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in RESPONSE_LOSSES:
            raise ValueError(f"kind must be one of {', '.join(RESPONSE_LOSSES)}, found {self.kind!r}")
        RESPONSE_LOSSES[self.kind].resolved(self.parameters)
        check_sparse_loss("dense", kind=self.kind, parameters=self.parameters)
        if self.cross_tokenizer is not None and (
            self.cross_tokenizer not in CROSS_TOKENIZER or self.kind != "forward_kl"
        ):
            raise ValueError(
                f"cross_tokenizer is one of {', '.join(CROSS_TOKENIZER)} with kind forward_kl, found"
                f" {self.cross_tokenizer!r} with {self.kind}"
            )
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
        return self.cross_tokenizer or RESPONSE_LOSSES[self.kind].part or self.kind

    def check(self, teacher: Teacher | CrossTeacher) -> None:
        """Raises ValueError for targets that do not determine this loss."""
        found = "spans" if isinstance(teacher, SpanTargets) else "uld" if isinstance(teacher, RankTargets) else None
        if found != self.cross_tokenizer:
            raise ValueError(f"{self.part} cannot be computed from {type(teacher).__name__}")
        if isinstance(teacher, SparseTargets):
            codec = "sampled" if teacher.log_tail_N is None else "topk"
            known = teacher.probs_NK is not None
            check_sparse_loss(codec, kind=self.kind, parameters=self.parameters, has_probabilities=known)
            if self.temperature != 1:
                raise ValueError(
                    f"sparse targets serve temperature 1 alone, found {self.temperature}; use codec hidden"
                )
