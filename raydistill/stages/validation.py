"""A model's metrics on the validation split, computed by all ranks together.

Shapes: N rows, K classes.
"""

from __future__ import annotations

import torch

from raydistill.data.loader import Batch, Split
from raydistill.engine_base import EngineBase
from raydistill.losses.multilabel import binary_cross_entropy_sum, binary_kl_sum
from raydistill.losses.response import cross_entropy_sum, forward_kl_sum
from raydistill.stages.ranks import all_reduce, rank_and_world

VALIDATION_TOKENS = {"cpu": 2048, "cuda": 65_536}
SCALARS = 4


def validation_metrics(engine: EngineBase, split: Split, *, classes: int) -> dict[str, float]:
    """Accuracy, macro F1 and NLL; with a cache also KL to the teacher, at temperature 1, and agreement with it.

    Where rows have sets of labels also micro F1. Accuracy and agreement are then of whole sets, a class is predicted
    where its logit is above 0, and NLL and KL are sums over classes. Batches are dealt to the ranks in turn; a rank
    that runs out repeats its last batch without counting it, because under ZeRO-3 every rank takes part in every
    forward pass.
    """
    rank, world = rank_and_world()
    sums = torch.zeros(SCALARS + 3 * classes, dtype=torch.float64, device=engine.device)
    pending: list[Batch] = []
    sets = False
    with engine.evaluation():
        for batch in split.length_batches(VALIDATION_TOKENS[engine.device.type]):
            sets = batch.labels_N.ndim > 1
            pending.append(batch)
            if len(pending) == world:
                sums += _sums(engine, pending[rank], classes)
                pending = []
        if pending:
            found = _sums(engine, pending[min(rank, len(pending) - 1)], classes)
            sums += found if rank < len(pending) else 0
    all_reduce(sums)
    return metrics_of(sums, split, sets=sets)


def metrics_of(sums: torch.Tensor, split: Split, *, sets: bool) -> dict[str, float]:
    """The metrics of a split from the sums of `batch_sums` over all its batches."""
    nll, kl, agreed, right = (sums[:SCALARS] / split.rows).tolist()
    true, predicted, hits = sums[SCALARS:].reshape(3, -1)
    present = (true + predicted) > 0
    values = {
        "accuracy": right,
        "macro_f1": float((2 * hits / (true + predicted).clamp(min=1))[present].sum()) / max(1, int(present.sum())),
        **({"micro_f1": float(2 * hits.sum() / (true + predicted).sum().clamp(min=1))} if sets else {}),
        "nll": nll,
    }
    return values | ({"kl": kl, "agreement": agreed} if split.has_teacher else {})


def _sums(engine: EngineBase, batch: Batch, classes: int) -> torch.Tensor:
    return batch_sums(engine.logits(batch.inputs), batch, classes)


def batch_sums(logits_NK: torch.Tensor, batch: Batch, classes: int) -> torch.Tensor:
    """NLL, KL at temperature 1, agreements, right rows, then rows by true class, by predicted class, hits by class."""
    device = logits_NK.device
    labels = batch.labels_N.to(device)
    sets = labels.ndim > 1
    predicted = logits_NK > 0 if sets else logits_NK.argmax(dim=-1)
    kl = agreed = torch.zeros((), device=device)
    if batch.teacher is not None:
        teacher_NK = batch.teacher.to(device).logits_NK
        kl = (binary_kl_sum if sets else forward_kl_sum)(teacher_NK, logits_NK, temperature=1.0)
        agreed = _same_rows(predicted, teacher_NK > 0 if sets else teacher_NK.argmax(dim=-1))
    nll = (binary_cross_entropy_sum if sets else cross_entropy_sum)(logits_NK, labels)
    scalars = torch.stack([nll, kl, agreed.float(), _same_rows(predicted, labels).float()])
    if sets:
        counts = [labels.sum(dim=0), predicted.sum(dim=0), (labels * predicted).sum(dim=0)]
    else:
        counts = [torch.bincount(v, minlength=classes) for v in (labels, predicted, labels[predicted == labels])]
    return torch.cat([scalars.double(), *(c.double() for c in counts)])


def _same_rows(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """In how many rows both say the same, of all classes where they have several."""
    same = one == other
    return (same.all(dim=-1) if same.ndim > 1 else same).sum()
