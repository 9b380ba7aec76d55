"""Times of raydistill's parts against the plain loop's, interleaved in one process, as ratios of medians.

Needs what `banking77.py quality` left in its folder: the run `small` and the plain loop's teacher.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

STEPS = 60
SHARDS = 3


def speed(out: Path, threads: int, rounds: int) -> None:
    """Prints one JSON line for each comparison."""
    torch.set_num_threads(threads)
    for name, facts in {
        **teacher_pass(out, rounds),
        **teacher_stage(out),
        **student_steps(out, threads),
    }.items():
        print(json.dumps({"comparison": name, "threads": threads, **facts}), flush=True)


def ratio(base: list[float], other: list[float]) -> float:
    """Median over median."""
    return round(statistics.median(base) / statistics.median(other), 3)


def open_small(out: Path):
    """The configuration, run and data manifest of the run `small`."""
    from raydistill.config.file import load_config
    from raydistill.record.run import open_run

    config = load_config(out / "small" / "config.yaml")
    run = open_run(config.storage, config.name)
    return config, run, run.require("data")


def scorer(out: Path, dtype: str):
    """raydistill's scorer of the fine-tuned teacher."""
    from raydistill.stages.scoring import Scorer
    from raydistill.stages.teach import teacher_job

    config, run, data = open_small(out)
    job = teacher_job(config, run, data, folder="bench", fingerprint="bench", dtype=dtype)
    return Scorer(replace(job, output_url=str(out / "scratch")))


def teacher_pass(out: Path, rounds: int) -> dict[str, dict]:
    """Rows per second of the teacher pass against fixed batches of 32 in arrival order, tokenising included."""
    import plain_loop
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from raydistill.data.shards import read_split
    from raydistill.data.tokens import tokenise

    config, run, data = open_small(out)
    texts = [t for shard in read_split(run.store, data.shards("train")[:SHARDS]) for t in shard.texts]
    folder = out / "small" / "teacher" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ours = {dtype: scorer(out, dtype) for dtype in ("float32", "bfloat16")}
    seconds: dict[str, list[float]] = {"plain": [], "float32": [], "bfloat16": []}
    logits = {}
    for _ in range(rounds):
        started = time.perf_counter()
        plain = plain_loop.predict(model, tokenizer, texts, batch_size=32, arrival_order=True).numpy()
        seconds["plain"].append(time.perf_counter() - started)
        for dtype, scores in ours.items():
            started = time.perf_counter()
            logits[dtype] = scores.logits(tokenise(scores._tokenizer, texts, config.data.max_length))
            seconds[dtype].append(time.perf_counter() - started)
    rows = len(texts)
    facts = {f"{n}_rows_per_second": round(rows / statistics.median(s), 1) for n, s in seconds.items()}
    return {
        "teacher pass against arrival order": {
            **facts,
            "float32_speedup": ratio(seconds["plain"], seconds["float32"]),
            "bfloat16_speedup": ratio(seconds["plain"], seconds["bfloat16"]),
            "largest_float32_difference": float(np.abs(logits["float32"] - plain).max()),
            "bfloat16_argmax_agreement": float((logits["bfloat16"].argmax(1) == plain.argmax(1)).mean()),
        }
    }


def teacher_stage(out: Path) -> dict[str, dict]:
    """Ray Data's stage in its steady state against the same packed batches in a bare loop, one actor, one thread.

    Steady state: the time between the first and the last record of the pool, over the rows after the first shard.
    """
    import ray

    from raydistill.data.shards import read_shard
    from raydistill.data.tokens import tokenise
    from raydistill.stages.cluster import Share, connect
    from raydistill.stages.progress import Progress
    from raydistill.stages.scoring import _map_shards
    from raydistill.stages.teach import teacher_job

    config, run, data = open_small(out)
    entries = data.shards("train")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    bare = scorer(out, "bfloat16")
    tokens = [tokenise(bare._tokenizer, read_shard(run.store, e).texts, config.data.max_length) for e in entries]
    connect(config.cluster)
    bare_rates, stage_rates = [], []
    for attempt in range(3):
        started = time.perf_counter()
        for shard in tokens[1:]:
            bare.logits(shard)
        bare_rates.append(sum(e.rows for e in entries[1:]) / (time.perf_counter() - started))
        job = teacher_job(
            config, run, data, folder=f"bench-{attempt}-{time.time():.0f}", fingerprint="bench", dtype="bfloat16"
        )
        job = replace(job, output_url=str(out / "scratch"))
        tasks = [{"job": 0, "file": e.file, "sha256": e.sha256, "size": e.size, "rows": e.rows} for e in entries]
        times = []
        for record in _map_shards((job,), tasks, Share(1, 1, 0), Progress()):
            assert not record["problem"], record["problem"]
            times.append((time.perf_counter(), record["rows"]))
        rows = sum(count for _, count in times[1:])
        stage_rates.append(rows / (times[-1][0] - times[0][0]))
    ray.shutdown()
    torch.set_num_threads(before)
    return {
        "Ray Data stage against a bare loop": {
            "bare_rows_per_second": round(statistics.median(bare_rates), 1),
            "stage_rows_per_second": round(statistics.median(stage_rates), 1),
            "stage_over_bare": ratio(stage_rates, bare_rates),
        }
    }


def student_steps(out: Path, threads: int) -> dict[str, dict]:
    """Seconds of a step: the plain loop's, raydistill's with the cache, and raydistill's with labels alone."""
    import torch.nn.functional as F
    from transformers import BertConfig, BertForSequenceClassification

    from raydistill.losses.objective import Objective
    from raydistill.stages.cluster import Resources
    from raydistill.stages.teachers import teacher_source
    from raydistill.stages.training_job import TrainingRequest, training_job

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29653")
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.distributed.init_process_group("gloo")
    config, run, _ = open_small(out)
    plan = run.plan("student")
    assert plan is not None
    one = Resources(cpus=1, gpus=0, node_cpus=1)
    job = training_job(TrainingRequest("student", config, run, one, teacher_source(config, run)), plan)
    job = replace(job, run_url=str(out / "scratch"), folder=f"step-{time.time():.0f}", product="step-out")
    ours = {
        "kd": Stepper(job),
        "ce": Stepper(replace(job, objective=Objective(), uses_cache=False, folder=job.folder + "-ce")),
    }
    first = ours["kd"].worker
    sizes = first.model.config
    torch.manual_seed(0)
    plain = BertForSequenceClassification(
        BertConfig(
            vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, num_hidden_layers=sizes.num_hidden_layers,
            num_attention_heads=sizes.num_attention_heads, intermediate_size=sizes.intermediate_size,
            num_labels=sizes.num_labels, max_position_embeddings=sizes.max_position_embeddings,
        )
    ).train()  # fmt: skip
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    others = [p for p in plain.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    texts = [t for n in range(len(first.train_split.entries)) for t in _texts(run, first, n)]

    def plain_step(rows: np.ndarray, labels: torch.Tensor, teacher: torch.Tensor) -> None:
        inputs = first.tokenizer(
            [texts[i] for i in rows], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits = plain(**inputs).logits.float()
        kl = F.kl_div(
            F.log_softmax(logits / 4, -1), F.log_softmax(teacher / 4, -1), log_target=True, reduction="batchmean"
        )
        loss = 0.9 * 16 * kl + 0.1 * F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()

    seconds: dict[str, list[float]] = {"plain": [], "kd": [], "ce": [], "loader": [], "by_length": []}
    for _ in range(STEPS):
        places = ours["kd"].next_places()
        starts = np.cumsum([0, *first.train_split.shard_rows])
        rows = np.array([starts[s] + r for s, r in places])
        batch = first.train_split.batch(places)
        assert batch.teacher is not None
        _timed(seconds["plain"], lambda r=rows, b=batch: plain_step(r, b.labels_N, b.teacher.logits_NK))
        _timed(seconds["loader"], lambda p=places: first.train_split.batch(p))
        for name, stepper in ours.items():
            _timed(seconds[name], lambda s=stepper, p=places: s.step(p))
        grouped = ours["kd"].next_places(by_length=True)
        _timed(seconds["by_length"], lambda p=grouped: ours["kd"].step(p))
    kept = {name: values[10:] for name, values in seconds.items()}
    milliseconds = {f"{name}_ms": round(statistics.median(values) * 1e3, 2) for name, values in kept.items()}
    return {
        "student step": {
            **milliseconds,
            "raydistill_over_plain": ratio(kept["kd"], kept["plain"]),
            "distillation_over_cross_entropy": ratio(kept["kd"], kept["ce"]),
            "loader_share_of_step": ratio(kept["loader"], kept["kd"]),
            # Means: steps by length differ from each other as those of mixed rows do not.
            "by_length_over_kd": round(statistics.mean(kept["by_length"]) / statistics.mean(kept["kd"]), 3),
        }
    }


def _texts(run, worker, number: int) -> list[str]:
    from raydistill.data.shards import read_shard

    return read_shard(run.store, worker.train_split.entries[number]).texts


def _timed(seconds: list[float], call: Callable[[], None]) -> None:
    started = time.perf_counter()
    call()
    seconds.append(time.perf_counter() - started)


class Stepper:
    """raydistill's own training worker, one step at a time."""

    def __init__(self, job) -> None:
        from raydistill.stages.loop import TrainingRank

        self.worker = TrainingRank(job, lambda update: None, lambda: False)
        self._orders = {True: iter(()), False: iter(())}

    def next_places(self, by_length: bool = False) -> np.ndarray:
        from raydistill.data.order import epoch_batches

        places = next(self._orders[by_length], None)
        if places is None:
            split = self.worker.train_split
            batches = epoch_batches(
                split.shard_rows, seed=0, epoch=self.worker.state.step // 100, batch_size=32,
                lengths=split._lengths if by_length else None,
            )  # fmt: skip
            self._orders[by_length] = iter([p for p, _ in batches if len(p) == 32])
            places = next(self._orders[by_length])
        return places

    def step(self, places: np.ndarray) -> None:
        self.worker._step(len(places), [self.worker.train_split.batch(places)])
