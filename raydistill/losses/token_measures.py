"""What is measured of a language model at single positions: how well it predicts, and how close it is to its teacher.

Shapes: N positions, C positions of a chunk, V vocabulary, D width, K kept tokens.
"""

from collections.abc import Callable, Iterator, Mapping

import torch

from raydistill.losses.sparse_divergences import sparse_terms
from raydistill.losses.token_objective import Teacher
from raydistill.targets import HiddenTargets, SparseTargets

TOP = 5
Measures = Mapping[str, torch.Tensor]


def own_measures(logits_CV: torch.Tensor, labels_C: torch.Tensor) -> dict[str, torch.Tensor]:
    """nll (nats), accuracy (1 where the likeliest token is the label), confidence (its probability), float64 (C,)."""
    logprobs_CV = logits_CV.float().log_softmax(dim=-1)
    top_C, likeliest_C = logprobs_CV.max(dim=-1)
    return {
        "nll": -logprobs_CV.gather(1, labels_C[:, None])[:, 0].double(),
        "accuracy": (likeliest_C == labels_C).double(),
        "confidence": top_C.exp().double(),
    }


def teacher_measures(logits_CV: torch.Tensor, teacher: Teacher) -> dict[str, torch.Tensor]:
    """kl (teacher || student at temperature 1, nats), agreement with the teacher's likeliest token, float64 (C,).

    From a sample of the teacher kl is unbiased, and may be below 0 at a position; its likeliest token is the kept one
    of the largest weight. From a cut kl is a lower bound. Of a whole teacher also `top5`: whether its likeliest token
    is among the student's TOP.
    """
    logprobs_CV = logits_CV.float().log_softmax(dim=-1)
    likeliest_C = logprobs_CV.argmax(dim=-1)
    if isinstance(teacher, SparseTargets):
        kept_CK = logprobs_CV.gather(1, teacher.ids_NK)
        rest_C = None
        if teacher.log_tail_N is not None:
            used_CK = teacher.weights_NK > 0
            masked = logprobs_CV.scatter_add(
                1, teacher.ids_NK, torch.zeros_like(kept_CK).masked_fill(used_CK, float("-inf"))
            )
            rest_C = masked.logsumexp(dim=-1)
        kl_C = sparse_terms("forward_kl", 0.0, teacher, kept_CK, rest_C)[0]
        theirs_C = teacher.ids_NK.gather(1, teacher.weights_NK.argmax(dim=-1, keepdim=True))[:, 0]
        return {"kl": kl_C.double(), "agreement": (likeliest_C == theirs_C).double()}
    teacher_CV = teacher.head.logits(teacher.hidden_ND) if isinstance(teacher, HiddenTargets) else teacher.float()
    theirs_CV = teacher_CV.log_softmax(dim=-1)
    theirs_C1 = theirs_CV.argmax(dim=-1, keepdim=True)
    top_CK = logprobs_CV.topk(min(TOP, logprobs_CV.shape[1]), dim=-1).indices
    return {
        "kl": (theirs_CV.exp() * (theirs_CV - logprobs_CV)).sum(dim=-1).double(),
        "agreement": (likeliest_C == theirs_C1[:, 0]).double(),
        "top5": (top_CK == theirs_C1).any(dim=-1).double(),
    }


def chunks(
    positions: int, to_logits: Callable[[slice], torch.Tensor], chunk: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Every chunk of positions with its logits, so that chunk x vocabulary is the largest tensor."""
    for start in range(0, positions, chunk):
        cut = slice(start, min(start + chunk, positions))
        yield cut, to_logits(cut)


def selected(teacher: Teacher, cut: slice) -> Teacher:
    """The targets of some positions."""
    if isinstance(teacher, SparseTargets):
        return teacher.select(torch.arange(cut.start, cut.stop, device=teacher.ids_NK.device))
    if isinstance(teacher, HiddenTargets):
        return HiddenTargets(teacher.hidden_ND[cut], teacher.head)
    return teacher[cut]
