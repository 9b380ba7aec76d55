"""Size, exactness and reading speed of the dense codecs, on logits made here: python benchmarks/cache.py [--rows N]

The made logits are those of a teacher that was fine-tuned: one class well above the rest, a few rivals, at 77 classes.
With --run DIR the train rows of a finished run's cache are decoded and used instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydistill.cache.shards import read_logits, write_logits
from raydistill.record.commit import Manifest, commit_manifest, read_manifest
from raydistill.record.store import LocalStore
from raydistill.report.metrics import log_softmax, mean_kl


def made_logits(rows: int, classes: int) -> np.ndarray:
    random = np.random.default_rng(0)
    logits = random.normal(0, 1.5, (rows, classes))
    logits[np.arange(rows), random.integers(0, classes, rows)] += random.gamma(4.0, 2.0, rows)
    logits[np.arange(rows), random.integers(0, classes, rows)] += random.gamma(2.0, 2.0, rows)
    return logits.astype(np.float32)


def cached_logits(folder: Path) -> np.ndarray:
    store = LocalStore(str(folder))
    manifest = read_manifest(store, "teacher/cache")
    assert manifest is not None
    shards = [read_logits(store, "teacher/cache", entry, manifest) for entry in manifest.shards("train")]
    return np.concatenate([shard.logits_NK for shard in shards])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--classes", type=int, default=77)
    parser.add_argument("--run", type=Path)
    arguments = parser.parse_args()
    logits = cached_logits(arguments.run) if arguments.run else made_logits(arguments.rows, arguments.classes)
    rows, classes = logits.shape
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        naive = Path(folder) / "naive.parquet"
        pq.write_table(pa.table({"row_id": range(rows), "logits": logits.astype(float).tolist()}), naive)
        naive_seconds = timed(lambda: pq.read_table(naive).to_pylist())
        print(json.dumps({"codec": "list<double>", "bytes_per_row": round(naive.stat().st_size / rows, 2)}))
        for codec in ("dense-float16", "dense-int8"):
            entry = write_logits(
                store, f"{codec}/train-00000.parquet", np.arange(rows), logits, codec=codec, fingerprint="bench"
            )
            manifest = commit_manifest(store, codec, "bench", [entry], {"codec": codec, "classes": classes})
            print(json.dumps(facts(store, codec, manifest, logits, naive_seconds)))


def facts(
    store: LocalStore, codec: str, manifest: Manifest, logits: np.ndarray, naive_seconds: float
) -> dict[str, object]:
    """What the codec costs and what it loses."""
    entry = manifest.files[0]
    read = read_logits(store, codec, entry, manifest).logits_NK
    seconds = timed(lambda: read_logits(store, codec, entry, manifest))
    kl = {t: mean_kl(logits / t, read / t) for t in (1, 2, 3, 4, 5, 6, 7, 8)}
    flips = float((read.argmax(1) != logits.argmax(1)).mean())
    assert np.isfinite(log_softmax(read)).all()
    return {
        "codec": codec,
        "rows": len(logits),
        "classes": logits.shape[1],
        "bytes_per_row": round(entry.size / len(logits), 2),
        "largest_mean_kl_at_T_1_to_8": max(kl.values()),
        "argmax_flips": flips,
        "read_and_verified_rows_per_second": round(len(logits) / seconds),
        "times_faster_than_python_lists": round(naive_seconds / seconds, 1),
    }


def timed(call) -> float:
    """Median seconds of five calls."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
