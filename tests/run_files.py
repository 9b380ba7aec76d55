"""What stands in a run's folder, as the tests read it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from raydistill.record.commit import Manifest, read_manifest
from raydistill.record.store import LocalStore


def manifest(folder: Path, part: str) -> Manifest:
    found = read_manifest(LocalStore(str(folder)), part)
    assert found is not None, f"{folder} has no {part}"
    return found


def facts(folder: Path, part: str = "student") -> dict[str, Any]:
    return manifest(folder, part).facts


def column(folder: Path, split: str, name: str) -> list[Any]:
    """A column of the data shards of a split."""
    entries = manifest(folder, "data").shards(split)
    return [value for e in entries for value in pq.read_table(folder / "data" / e.file)[name].to_pylist()]


def points(folder: Path, group: str, training: str = "train") -> list[dict[str, Any]]:
    """The points of a group in the curves of a training."""
    lines = (folder / training / "metrics.jsonl").read_text().splitlines()
    return [point for point in map(json.loads, lines) if point["group"] == group]


def student_weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "student/model.safetensors")


def checkpoint_weights(folder: Path, step: int) -> dict[str, np.ndarray]:
    return load_file(folder / f"train/checkpoints/step-{step:08d}/model.safetensors")


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether two sets of weights have the same names and the same numbers."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
