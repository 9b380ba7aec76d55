"""A training step with feature targets from the cache against one with response targets alone.

    python benchmarks/feature_cache.py [--rows 2000 --steps 60 --threads 2 --limit]

Tickets cut to 18 tokens stand for BANKING77's rows, a new BERT of 6 layers of 384 for the teacher; students are two of
its layers and a new one of 2 layers of 128, in batches of 32. The stages' own code makes data, logits and features
and takes the steps, without Ray. Each step, from the rows' numbers to the end of the optimiser's update, is taken in
turn on the same rows by the training without features, by the one that reads them and by the one whose teacher runs
beside it; the table has the ratios of the medians. The ratio holds the losses on the features as well as reading them.
With --limit the script fails where a step from the cache takes more than 1.10 times the step without features.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydistill.config.file import validate
from raydistill.config.run import Config
from raydistill.data.order import epoch_batches
from raydistill.demo import write_new_bert
from raydistill.models.loading import start_classifier
from raydistill.record.commit import commit_manifest
from raydistill.record.run import Run, open_run
from raydistill.stages.cluster import Resources
from raydistill.stages.feature_cache import commit_features, feature_output, features_plan
from raydistill.stages.loop import TrainingRank
from raydistill.stages.prepare import prepare, survey_sources
from raydistill.stages.progress import Progress
from raydistill.stages.scoring import Scorer
from raydistill.stages.teach import SPLITS, cache_plan, teacher_job, teacher_source
from raydistill.stages.training_job import TrainingRequest, training_job, training_plan
from raydistill.tickets import CATEGORIES, write_tickets

MOST = 1.10
BATCH, WARM_UP = 32, 10
STUDENTS: dict[str, dict[str, Any]] = {
    "2 x 384": {"init": "teacher_layers", "layers": [2, 5]},
    "2 x 128": {"init": "config", "hidden_size": 128, "num_layers": 2, "num_heads": 2},
}
# Heads are the teacher's own 12 where both widths allow it.
CASES: dict[str, list[dict[str, Any]]] = {
    "hidden_mse": [{"kind": "hidden_mse"}],
    "hidden_cosine": [{"kind": "hidden_cosine"}],
    "value_relation": [{"kind": "value_relation", "relation_heads": 4}],
    "attention_kl": [{"kind": "attention_kl", "layers": "last"}],
    "rkd": [{"kind": "rkd_distance"}, {"kind": "rkd_angle"}],
    "tinybert": [{"kind": "hidden_mse"}, {"kind": "embeddings_mse"}, {"kind": "attention_mse"}],
}
RESOURCES = Resources(cpus=2, gpus=0, node_cpus=2)


def write_input(folder: Path, rows: int) -> None:
    """Tickets and a classifier of them with new weights."""
    train, _ = write_tickets(folder, train_rows=rows, test_rows=100)
    with train.open(newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    write_new_bert(folder / "bert", texts, hidden_size=384, layers=6, heads=12, vocabulary=8000)
    torch.manual_seed(0)
    start_classifier("teacher", folder / "bert", sorted(CATEGORIES)).save_pretrained(folder / "bert")


def config_of(out: Path, student: dict[str, Any], features: list[dict[str, Any]], source: str) -> Config:
    """A run with this student and these terms; `source` is where their targets come from."""
    loss = {"features": features, "features_from": source} if features else {}
    settings = {
        "name": "bench",
        "storage": str(out),
        "data": {
            "train": str(out / "input/train.csv"), "test": str(out / "input/test.csv"), "label": "category",
            "max_length": 18, "shard_rows": 1024,
        },
        "teacher": {"model": str(out / "input/bert"), "dtype": "float32"},
        # Without dropout, because the losses on attention need it so.
        "student": {**student, "dropout": 0.0},
        "train": {"batch_size": BATCH, "epochs": 1000, "loss": loss, "precision": "fp32"},
    }  # fmt: skip
    return validate(settings, {}, "benchmark")


def every_case() -> list[dict[str, Any]]:
    """What one cache for all cases is made for."""
    return [term for case in CASES.values() for term in case]


def make_caches(config: Config, run: Run) -> float:
    """Data, logits and features of all cases, by the stages' own code; bytes of features a row."""
    quiet = Progress(lambda line: None)
    data = prepare(config, run, survey_sources(config, quiet), quiet)
    plan, folder = cache_plan(config, run, data, RESOURCES), teacher_source(config, run).folder()
    features = features_plan(config, run, data, folder, "float32")
    assert features is not None
    run.begin("cache", plan)
    run.begin("features", features)
    output = feature_output(features, folder)
    job = teacher_job(config, run, data, folder="teacher/cache", fingerprint=plan.fingerprint, dtype="float32")
    scorer = Scorer(replace(job, features=output))
    entries = [entry for split in SPLITS for entry in data.shards(split)]
    made = [scorer.score_shard(entry)[0] for entry in entries]
    facts = {"codec": job.codec, "classes": len(job.labels)}
    commit_manifest(run.store, "teacher/cache", plan.fingerprint, made, facts)
    kept = [output.standing(run.store, entry) for entry in entries if output.wants(entry)]
    return commit_features(run, output, [entry for entry in kept if entry]).facts["bytes_per_row"]


class Stepper:
    """The project's own training worker, one step at a time."""

    def __init__(self, config: Config, run: Run, folder: str) -> None:
        request = TrainingRequest("student", config, run, RESOURCES, teacher_source(config, run))
        job = replace(training_job(request, training_plan(request)), folder=folder)
        self.worker = TrainingRank(job, lambda update: None, lambda: False)

    def seconds(self, places: np.ndarray) -> tuple[float, float]:
        """Of the whole step, and of making its batch."""
        started = time.perf_counter()
        batch = self.worker.train_split.batch(places)
        made = time.perf_counter()
        self.worker._step(len(places), [batch])
        return time.perf_counter() - started, made - started


def bytes_per_row(worker: TrainingRank) -> float:
    """Of the features that this training reads."""
    names = worker.train_split._features.names
    shards = [worker.train_split.shard(number) for number in range(len(worker.train_split.entries))]
    total = sum(
        shard.features.columns[name].row_bytes(shard.features.tokens_N).sum() for shard in shards for name in names
    )
    return float(total) / worker.train_split.rows


def measure(out: Path, run: Run, student: str, case: str, steps: int) -> dict[str, float]:
    """Medians of one student with one case's terms."""
    sizes, scratch = STUDENTS[student], f"scratch-{time.time_ns()}"
    sides = {
        "none": Stepper(config_of(out, sizes, [], "teacher"), run, f"{scratch}/none"),
        "cache": Stepper(config_of(out, sizes, CASES[case], "cache"), run, f"{scratch}/cache"),
        "teacher": Stepper(config_of(out, sizes, CASES[case], "teacher"), run, f"{scratch}/teacher"),
    }
    split = sides["none"].worker.train_split
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    epoch = 0
    while len(seconds["none"]) < steps + WARM_UP:
        for places, _ in epoch_batches(split.shard_rows, seed=0, epoch=epoch, batch_size=BATCH):
            if len(places) == BATCH and len(seconds["none"]) < steps + WARM_UP:
                for name, side in sides.items():
                    seconds[name].append(side.seconds(places))
        epoch += 1
    medians = {
        name: [statistics.median(column) for column in zip(*values[WARM_UP:], strict=True)]
        for name, values in seconds.items()
    }
    found = {
        "ms": medians["none"][0] * 1e3,
        "cache": medians["cache"][0] / medians["none"][0],
        "teacher": medians["teacher"][0] / medians["none"][0],
        "loading": (medians["cache"][1] - medians["none"][1]) / medians["none"][0],
        "bytes": bytes_per_row(sides["cache"].worker),
    }
    for side in sides.values():
        side.worker.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--limit", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    over: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        write_input(out / "input", arguments.rows)
        run = open_run(str(out), "bench")
        whole = make_caches(config_of(out, STUDENTS["2 x 384"], every_case(), "cache"), run)
        print(f"{arguments.rows} rows, {arguments.threads} threads; one cache of all cases: {whole:,.0f} bytes a row")
        print(
            f"{'student':<9}{'features':<16}{'ms without':>11}{'cache':>8}{'teacher':>9}{'loading':>9}{'bytes/row':>11}"
        )
        for student in arguments.students:
            for case in arguments.cases:
                found = measure(out, run, student, case, arguments.steps)
                print(
                    f"{student:<9}{case:<16}{found['ms']:>11.2f}{found['cache']:>8.3f}{found['teacher']:>9.2f}"
                    f"{found['loading']:>9.1%}{found['bytes']:>11,.0f}",
                    flush=True,
                )
                if found["cache"] > MOST:
                    over.append(f"{student} with {case}: {found['cache']:.3f}")
        torch.distributed.destroy_process_group()
    if arguments.limit and over:
        sys.exit(f"over {MOST}: {', '.join(over)}")


if __name__ == "__main__":
    main()
