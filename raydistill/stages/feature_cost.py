"""What the teacher's features cost from a cache and from a teacher beside the training, and which one to take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from raydistill.config.run import Config
from raydistill.data.shards import STUDENT_SPLITS, read_split
from raydistill.data.sources import Row, read_rows
from raydistill.data.tokens import load_tokenizer, tokenise
from raydistill.losses.cached_features import all_names
from raydistill.models.configuration import Shape, shape_of
from raydistill.record.run import Run
from raydistill.stages.feature_cache import columns_of
from raydistill.stages.features import feature_terms
from raydistill.stages.prepare import Surveyed
from raydistill.stages.prepare import columns_of as text_columns
from raydistill.stages.progress import duration, size
from raydistill.stages.teachers import feature_folder, has_passes
from raydistill.stages.training_stages import training_stages

SAMPLED_ROWS = 1000
# What a network disk gives when it is read in order; a local one gives several times as much.
READ_BYTES_PER_SECOND = 200e6
# 6 layers, 384 wide, float32, two CPU threads, BANKING77 as it comes: 145 rows/s of 16 tokens (docs/log.md).
FORWARD_FLOPS_PER_SECOND = 5e10


@dataclass(frozen=True)
class FeatureCost:
    """Both ways to the same targets. Seconds are of the whole training, forwards on a CPU."""

    rows: int
    cache_bytes: int
    forwards: int
    read_seconds: float
    forward_seconds: float
    logits_stand: bool  # or are made by other teachers than the one that has the features

    @property
    def recommended(self) -> str:
        """The value of train.loss.features_from whose targets come sooner on a CPU."""
        return "cache" if self.read_seconds < self.forward_seconds else "teacher"

    def lines(self) -> list[str]:
        per_row = self.cache_bytes / self.rows
        breakeven = per_row / READ_BYTES_PER_SECOND * 1e6
        made = f"by {self.rows:,} forwards more" if self.logits_stand else "by the forwards that make the logits"
        return [
            f"features from the cache: about {size(self.cache_bytes)}, {size(per_row)} a row, made {made}",
            f"features from the teacher: {self.forwards:,} forwards at most, beside the training",
            f"recommended: train.loss.features_from={self.recommended}: about {duration(self.read_seconds)} of reading"
            f" at {size(READ_BYTES_PER_SECOND)}/s against {duration(self.forward_seconds)} of forwards on two CPU"
            f" threads; on a GPU the teacher, where its forward takes less than {breakeven:,.0f} µs a row",
        ]


def feature_cost(config: Config, run: Run, surveyed: Surveyed | None, folder: Path, rows: int) -> FeatureCost | None:
    """The cost of the config's feature terms over so many rows; None without terms.

    The bytes are estimated from the tokens of the first 1,000 rows.
    """
    stages = [s for s in training_stages("student", config) if s.settings.loss.features and not s.own_teacher]
    if not stages:
        return None
    own = feature_folder(config, folder)
    terms = tuple(term for stage in stages for term in feature_terms(stage.config, folder, stage))
    texts = list(islice(_texts(config, run, surveyed), SAMPLED_ROWS))
    tokens_N = tokenise(load_tokenizer(own, "teacher.model"), texts, config.data.max_length).lengths_N
    epochs = config.train.seeds * sum(stage.settings.epochs for stage in stages)
    return cost_of(
        all_names(terms), shape_of(own), tokens_N, rows=rows, epochs=epochs,
        logits_stand=run.complete("cache") is not None or has_passes(config),
    )  # fmt: skip


def cost_of(
    names: tuple[str, ...], teacher: Shape, tokens_N: npt.NDArray[np.int64], *, rows: int, epochs: int,
    logits_stand: bool,
) -> FeatureCost:  # fmt: skip
    """The cost of these features over rows of which tokens_N are a sample.

    A forward takes two operations for each weight and token; a layer has about 12 W^2 weights.
    """
    sampled = sum(int(column.row_bytes(tokens_N).sum()) for column in columns_of(names, teacher))
    cache_bytes = round(rows * sampled / len(tokens_N))
    flops = 2 * 12 * teacher.width**2 * teacher.layers * float(tokens_N.mean())
    forwards = rows * epochs
    return FeatureCost(
        rows, cache_bytes, forwards, epochs * cache_bytes / READ_BYTES_PER_SECOND,
        forwards * flops / FORWARD_FLOPS_PER_SECOND, logits_stand,
    )  # fmt: skip


def _texts(config: Config, run: Run, surveyed: Surveyed | None) -> Iterator[str]:
    """Train texts in order, from the sources or, without them, from the shards."""
    if surveyed is None:
        shards = run.require("data").shards(*STUDENT_SPLITS)
        yield from (text for shard in read_split(run.home("data"), shards) for text in shard.texts)
        return
    for row in read_rows(surveyed.sources["train"], text_columns(config, "train")):
        if isinstance(row, Row):
            yield row.text
