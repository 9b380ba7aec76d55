"""Progressive unfreezing (`train.unfreeze`): which parts of a student train from which step on.

The head trains from the first step; then the layers join, from the last to the first, and the embeddings at the end
(ULMFiT, Howard & Ruder 2018, arXiv:1801.06146, section 3.3). What is new to the student, such as the projections of
its features, trains from the start too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raydistill.config.run import Config
from raydistill.depths import count_depths
from raydistill.errors import UserError
from raydistill.stages.training_stages import training_stages


def check_unfreezing(config: Config, skeleton: Callable[[], Any]) -> None:
    """Raises UserError for a student whose layers are not known, and for more or fewer shares than it has depths.

    `skeleton` makes the student without weights.
    """
    stages = [stage for stage in training_stages("student", config) if stage.settings.unfreeze]
    if not stages:
        return
    student = skeleton()
    for stage in stages:
        setting, asked = f"{stage.section}.unfreeze", stage.settings.unfreeze
        depths = count_depths(student, setting) - 1
        if isinstance(asked, tuple) and len(asked) != depths:
            raise UserError(
                f"{setting}: found {len(asked)} shares, the student has {depths} depths below its head:"
                f" {depths - 1} layers, the last one first, and its embeddings. Give {depths}, or one share for all"
            )


def thaw_steps(unfreeze: float | tuple[float, ...] | None, depths: Mapping[str, int], total: int) -> dict[str, int]:
    """The step, counted from 0 of `total`, from which each parameter of a student trains, by its depth (0: the head).

    One share is the time by which all train, with even distances between; a list has one for each depth from 1 on.
    """
    deepest = max(depths.values())
    if isinstance(unfreeze, tuple):
        shares = unfreeze
    else:
        shares = tuple((unfreeze or 0) * depth / deepest for depth in range(1, deepest + 1))
    steps = [0, *(min(round(share * total), total - 1) for share in shares)]
    return {name: steps[depth] for name, depth in depths.items()}
