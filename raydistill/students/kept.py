"""Which units and heads of its teacher a narrower student keeps, by the `student` section.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from raydistill.data.shards import DataShard
from raydistill.data.tokens import pack_by_length, pad, tokenise
from raydistill.losses.multilabel import binary_cross_entropy_sum
from raydistill.students.blocks import Outlet
from raydistill.students.importance import head_magnitudes, most_important, taylor, unit_magnitudes
from raydistill.students.width import Kept, blocks_to_narrow, narrowed

IMPORTANCE_ROWS = 512
TOKENS_PER_BATCH = 2048

Batches = Iterable[tuple[dict[str, torch.Tensor], torch.Tensor]]
Int64 = npt.NDArray[np.int64]
S = TypeVar("S", bound=Sized)  # a shard


def narrows_by_rows(settings: Any) -> bool:
    """Whether a student is a narrower teacher whose units and heads are chosen by rows of train."""
    return is_narrower(settings) and settings.importance != "magnitude"


def is_narrower(settings: Any) -> bool:
    """Whether the layers of a student made from its teacher's say how many units or heads to keep."""
    return settings.init == "teacher_layers" and (settings.feed_forward, settings.num_heads) != (None, None)


def kept_parts(settings: Any, teacher: Any, batches: Batches, **loss: Any) -> tuple[Kept | None, Kept | None]:
    """The units and the heads that each of the teacher's layers keeps; None for what loses nothing.

    `batches` are read where importance is taylor; their labels are numbers of the teacher's outputs, or negative. Their
    loss is that of a classifier, unless `loss` says otherwise to `taylor`. Runs on a GPU where there is one, and leaves
    the teacher there. Raises UserError for numbers that the teacher does not
    have and blocks that are not known.
    """
    units, heads = blocks_to_narrow(teacher, units=settings.feed_forward, heads=settings.num_heads)
    if settings.importance == "magnitude":
        of_units = unit_magnitudes(teacher, units) if units else None
        of_heads = head_magnitudes(teacher, heads) if heads else None
    else:
        outlets = [block.outlet for block in (units, heads) if block]
        found = iter(_taylor(teacher, batches, outlets, **{"loss_sum": cross_entropy_sum, **loss}))
        of_units = next(found) if units else None
        of_heads = next(found) if heads else None
    groups = heads.key_value_heads if heads and heads.key_value_heads < heads.heads else 1
    return (
        of_units and [most_important(values, settings.feed_forward) for values in of_units],
        of_heads and [most_important(values, settings.num_heads, groups=groups) for values in of_heads],
    )


def _taylor(teacher: Any, batches: Batches, outlets: list[Outlet], **loss: Any) -> list[list[torch.Tensor]]:
    if not outlets:
        return []
    if torch.cuda.is_available():
        teacher.to("cuda")
    return taylor(teacher, batches, outlets, **loss)


def cross_entropy_sum(logits_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Against the rows' labels, (N,) or sets of them (N, K); one that is not known (negative) is the teacher's own."""
    if labels_N.ndim > 1:
        return binary_cross_entropy_sum(logits_NK, torch.where(labels_N < 0, (logits_NK > 0).long(), labels_N))
    targets_N = torch.where(labels_N < 0, logits_NK.argmax(dim=1), labels_N)
    return torch.nn.functional.cross_entropy(logits_NK, targets_N, reduction="sum")


def narrower(student: Any, layers: Sequence[int], units: Kept | None, heads: Kept | None) -> Any:
    """A student of these layers of its teacher with what each of them keeps."""
    of_layers = [kept and [kept[layer] for layer in layers] for kept in (units, heads)]
    return narrowed(student, units=of_layers[0], heads=of_layers[1])


def drawn_of(shards: Callable[[], Iterator[S]], count: int, *, seed: int) -> Iterator[tuple[S, Int64]]:
    """Every shard with the numbers of those of its rows that are among so many, drawn of all by seed; or all."""
    total, first = sum(len(shard) for shard in shards()), 0
    drawn = np.sort(np.random.default_rng(seed).permutation(total)[:count])
    for shard in shards():
        yield shard, drawn[(drawn >= first) & (drawn < first + len(shard))] - first
        first += len(shard)


def drawn_rows(
    rows: Callable[[], Iterator[DataShard]] | None,
    count: int,
    *,
    seed: int,
    tokenizer: Any,
    max_length: int,
    order: list[int],
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """So many rows, drawn by seed, as inputs and labels: shard by shard, in batches by length; or all that there are.

    Drawn, because files are often sorted by label, and the first rows would know few of them. `order` is the teacher's
    output for each of the data's labels; a negative label, of a row without one, stays as it is.
    """
    assert rows is not None
    outputs = torch.tensor(order)
    for shard, here in drawn_of(rows, count, seed=seed):
        tokens = tokenise(tokenizer, [shard.texts[row] for row in here], max_length)
        labels_N = torch.from_numpy(shard.labels_N[here].astype(np.int64))
        for batch in pack_by_length(tokens.lengths_N, TOKENS_PER_BATCH) if len(here) else []:
            of_batch = labels_N[torch.from_numpy(batch)]
            inputs = pad([tokens.row(int(row)) for row in batch], tokenizer.pad_token_id)
            if of_batch.ndim > 1:  # sets of labels: a column for each class
                yield inputs, torch.empty_like(of_batch).index_copy_(1, outputs, of_batch)
            else:
                yield inputs, torch.where(of_batch < 0, of_batch, outputs[of_batch.clamp(min=0)])
