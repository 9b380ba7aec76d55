"""A model's metrics on the validation split, computed by all ranks together.

Shapes: N rows, K classes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from raydistill.data.loader import Batch, Split
from raydistill.engine import Engine
from raydistill.losses.response import cross_entropy_sum, forward_kl_sum

VALIDATION_TOKENS = {"cpu": 2048, "cuda": 65_536}


def validation_metrics(engine: Engine, split: Split, *, classes: int) -> dict[str, float]:
    """Accuracy, macro F1 and NLL; with a cache also KL to the teacher, at temperature 1, and agreement with it.

    Batches are dealt to the ranks in turn; a rank that runs out repeats its last batch without counting it, because
    under ZeRO-3 every rank takes part in every forward pass.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    sums = torch.zeros(3 + 3 * classes, dtype=torch.float64, device=engine.device)
    pending: list[Batch] = []
    with engine.evaluation():
        for batch in split.length_batches(VALIDATION_TOKENS[engine.device.type]):
            pending.append(batch)
            if len(pending) == world:
                sums += _sums(engine, pending[rank], classes)
                pending = []
        if pending:
            found = _sums(engine, pending[min(rank, len(pending) - 1)], classes)
            sums += found if rank < len(pending) else 0
    dist.all_reduce(sums)
    nll, kl, agreed = sums[:3].tolist()
    true, predicted, hits = sums[3:].reshape(3, classes)
    present = (true + predicted) > 0
    values = {
        "accuracy": float(hits.sum()) / split.rows,
        "macro_f1": float((2 * hits / (true + predicted).clamp(min=1))[present].mean()),
        "nll": nll / split.rows,
    }
    return values | ({"kl": kl / split.rows, "agreement": agreed / split.rows} if split.has_teacher else {})


def _sums(engine: Engine, batch: Batch, classes: int) -> torch.Tensor:
    """NLL, KL at temperature 1, agreements, then rows by true class, by predicted class, and hits by class."""
    logits_NK = engine.logits(batch.inputs)
    labels_N = batch.labels_N.to(engine.device)
    predicted_N = logits_NK.argmax(dim=-1)
    kl = agreed = torch.zeros((), device=engine.device)
    if batch.teacher is not None:
        teacher_NK = batch.teacher.to(engine.device).logits_NK
        kl = forward_kl_sum(teacher_NK, logits_NK, temperature=1.0)
        agreed = (predicted_N == teacher_NK.argmax(dim=-1)).sum()
    scalars = torch.stack([cross_entropy_sum(logits_NK, labels_N), kl, agreed.float()])
    hits_N = labels_N[predicted_N == labels_N]
    counts = [torch.bincount(values, minlength=classes) for values in (labels_N, predicted_N, hits_N)]
    return torch.cat([scalars.double(), *(c.double() for c in counts)])
