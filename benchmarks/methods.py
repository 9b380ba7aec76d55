"""Which distillation methods help which students on BANKING77: accuracy, agreement and seconds, from one cache each.

    python benchmarks/methods.py base  --data DIR --teacher DIR --out DIR
    python benchmarks/methods.py field --data DIR --teacher DIR --out DIR [--only WORD] [--part 0/2]
    python benchmarks/methods.py final --data DIR --teacher DIR --out DIR --student NAME --method NAME [--seeds 5]
    python benchmarks/methods.py table --out DIR

`base` prepares the data, fine-tunes the teachers and writes their caches, once. `field` trains every student by every
method with one seed; `final` one of them with several seeds. Both add a line to results.jsonl for each training and
leave out what stands there, so that they can be stopped and started again, and two processes can share the work
(--part). Validation is a tenth of train and alone decides what is taken to `final`; test is scored for the table.
`table` prints the results as Markdown. Data and teacher are those of benchmarks/banking77.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from methods_field import BASES, METHODS, STUDENTS
from scipy.stats import t

from raydistill.cache.shards import read_logits
from raydistill.config.file import validate
from raydistill.config.run import Config
from raydistill.data.shards import read_split
from raydistill.models.loading import count_parameters
from raydistill.record.commit import read_manifest
from raydistill.record.run import open_run
from raydistill.record.store import LocalStore
from raydistill.report.metrics import compare, mean_kl
from raydistill.stages.pipeline import run_stages
from raydistill.stages.progress import Progress
from raydistill.stages.scoring import Scorer, ScoringJob
from raydistill.stages.teachers import made_here

VALIDATION = 0.1
RESAMPLES = 10_000


def base_config(name: str, arguments: argparse.Namespace) -> Config:
    """The run that makes a cache: data, teacher or teachers, nothing of a student."""
    files = {"train": str(arguments.data / "train.csv"), "test": str(arguments.data / "test.csv")}
    data = {"label": "category", "max_length": 64, "validation": VALIDATION, "shard_rows": 1024, **files}
    settings = {
        "name": name,
        "storage": str(arguments.out / "bases"),
        "data": {**data, **BASES[name].get("data", {})},
        "teacher": {"codec": "dense-int8", **teacher_settings(name, arguments)},
        "cluster": {"cpus": arguments.cpus},
    }
    return validate(settings, {}, "benchmarks/methods.py")


def teacher_settings(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A teacher to fine-tune, or those that other bases have fine-tuned."""
    asked = BASES[name]
    if "of" in asked:
        first, *others = (f"{arguments.out}/bases/{base}/teacher/model" for base in asked["of"])
        return {"model": first, "members": [{"model": model} for model in others]} if others else {"model": first}
    tuned = {"epochs": 4, "learning_rate": 2.0e-4, "choose": "last", **asked.get("fine_tune", {})}
    return {"model": str(arguments.teacher), "fine_tune": tuned, **asked.get("teacher", {})}


def training_config(student: str, method: str, seed: int, arguments: argparse.Namespace) -> Config:
    """One training on the cache that its method asks for."""
    asked, how = STUDENTS[student], METHODS[method]
    base = base_config(how.get("base", "plain"), arguments)
    settings = base.model_dump(mode="json", exclude_unset=True)
    train = {"choose": "last", "cpus_per_worker": 1, "group_by_length": True, "seed": seed}
    train |= {**asked["train"], **how.get("train", {})}
    loss = {"temperature": 4.0, "alpha": 0.9, **how.get("loss", {})}
    settings |= {
        "name": re.sub(r"[^A-Za-z0-9.-]+", "_", f"{student}--{method}--{seed}"),
        "storage": str(arguments.out / "runs"),
        "student": {**asked["student"], **how.get("student", {})},
        "train": {**train, "loss": loss},
    }
    settings["teacher"] = {**settings["teacher"], **how.get("teacher", {}), "cache_from": f"{base.storage}/{base.name}"}
    return validate(settings, {}, "benchmarks/methods.py")


def scored(model: Any, base: Path, split: str, max_length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A model's float32 logits (N, K) and the labels (N) of a split, and the model's parameters."""
    store = LocalStore(str(base))
    data = read_manifest(store, "data")
    assert data is not None
    job = ScoringJob(
        source=model, labels=tuple(data.facts["labels"]), data_url=str(base), output_url=str(base), folder="unused",
        fingerprint="unused", codec="dense-float32", dtype="float32", max_length=max_length, tokens_per_batch=None,
    )  # fmt: skip
    scorer = Scorer(job, threads=1)
    shards = list(read_split(store, data.shards(split)))
    logits = [scorer.logits(scorer.forward.tokens(shard.texts)) for shard in shards]
    return np.concatenate(logits), np.concatenate([s.labels_N for s in shards]), count_parameters(scorer.forward.model)


def teacher_of(base: Path, arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """Logits of the base's teacher on validation and test, scored once and kept."""
    kept = base / "teacher-logits.npz"
    if not kept.exists():
        config = base_config(base.name, arguments)
        source = made_here("teacher", open_run(config.storage, config.name))
        found = {split: scored(source, base, split, config.data.max_length)[0] for split in ("validation", "test")}
        staged = kept.with_name(f".{os.getpid()}.npz")
        np.savez(staged, **found)
        staged.rename(kept)
    with np.load(kept) as arrays:
        return {name: arrays[name] for name in arrays}


def train_one(student: str, method: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains, scores validation and test, and says what came out."""
    config = training_config(student, method, seed, arguments)
    started = time.monotonic()
    run_stages(config, ("teach", "train"), Progress(lambda line: print(f"  {line}", flush=True), every_seconds=30))
    wall = time.monotonic() - started
    run, base = open_run(config.storage, config.name), Path(str(config.teacher.cache_from))
    manifest = run.require("student")
    result: dict[str, Any] = {
        "student": student, "method": method, "seed": seed, "step_seconds": manifest.facts["seconds"],
        "wall_seconds": round(wall, 1), "steps": manifest.facts["steps"],
    }  # fmt: skip
    teacher = teacher_of(arguments.out / "bases" / "plain", arguments)  # the one that would be served
    for split in ("validation", "test"):
        logits, labels, parameters = scored(made_here("student", run), base, split, config.data.max_length)
        right, taught = logits.argmax(1) == labels, teacher[split].argmax(1) == labels
        compared = compare(taught, right, None, resamples=RESAMPLES, seed=0)
        result |= {"parameters": parameters}
        result[split] = {
            "accuracy": float(right.mean()), "teacher": float(taught.mean()), "retention": compared.retention,
            "retention_ci95": compared.retention_ci95, "kl": mean_kl(teacher[split], logits),
            "agreement": float((logits.argmax(1) == teacher[split].argmax(1)).mean()),
        }  # fmt: skip
    return result


def finished(out: Path) -> list[dict[str, Any]]:
    path = out / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train_all(asked: list[tuple[str, str, int]], arguments: argparse.Namespace) -> None:
    """What is asked for and not finished, one after the other."""
    part, parts = map(int, arguments.part.split("/"))
    for student, method, seed in asked[part::parts]:
        if any((r["student"], r["method"], r["seed"]) == (student, method, seed) for r in finished(arguments.out)):
            continue
        print(f"{student}, {method}, seed {seed}", flush=True)
        result = train_one(student, method, seed, arguments)
        with open(arguments.out / "results.jsonl", "a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)


def make_bases(names: list[str], arguments: argparse.Namespace) -> None:
    for name in names:
        print(f"base {name}", flush=True)
        config = base_config(name, arguments)
        run_stages(config, ("prepare", "teach"), Progress(lambda line: print(f"  {line}", flush=True), 30))
        base = Path(config.storage) / name
        if "of" not in BASES[name] and BASES[name].get("one_teacher", True):
            found, store = teacher_of(base, arguments), LocalStore(str(base))
            manifest, data = read_manifest(store, "teacher/cache"), read_manifest(store, "data")
            assert manifest is not None
            assert data is not None
            kept = np.concatenate(
                [read_logits(store, "teacher/cache", e, manifest).logits_NK for e in manifest.shards("validation")]
            )
            labels = np.concatenate([s.labels_N for s in read_split(store, data.shards("test"))])
            agreed = float((kept.argmax(1) == found["validation"].argmax(1)).mean())
            accuracy = float((found["test"].argmax(1) == labels).mean())
            print(json.dumps({"base": name, "teacher_test_accuracy": accuracy, "cache_agrees": agreed}), flush=True)


def table(out: Path) -> None:
    """Every method under every student, the mean over its seeds, best validation accuracy first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in finished(out):
        groups.setdefault((result["student"], result["method"]), []).append(result)
    for student in dict.fromkeys(name for name, _ in groups):
        mine = {method: rows for (name, method), rows in groups.items() if name == student}
        parameters = next(iter(mine.values()))[0]["parameters"]
        print(f"\n{student}: {parameters:,} parameters\n")
        print("| method | seeds | validation | test | deviation | agreement | retention (95 %) | seconds of steps |")
        print("|---|---|---|---|---|---|---|---|")
        for method, rows in sorted(mine.items(), key=lambda item: -mean(item[1], "validation", "accuracy")):
            tests = [row["test"]["accuracy"] for row in rows]
            spread = f"{100 * statistics.stdev(tests):.2f}" if len(tests) > 1 else "–"
            cells = [
                method, len(rows), f"{100 * mean(rows, 'validation', 'accuracy'):.2f} %",
                f"{100 * statistics.mean(tests):.2f} %", spread, f"{100 * mean(rows, 'test', 'agreement'):.2f} %",
                f"{100 * mean(rows, 'test', 'retention'):.2f} %{interval([r['test']['retention'] for r in rows])}",
                f"{statistics.median(row['step_seconds'] for row in rows):.0f}",
            ]  # fmt: skip
            print("| " + " | ".join(map(str, cells)) + " |")


def interval(values: list[float]) -> str:
    """Student's 95 % interval of the mean over seeds; nothing of fewer than three."""
    if len(values) < 3:
        return ""
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f" ({100 * (statistics.mean(values) - half):.2f} to {100 * (statistics.mean(values) + half):.2f})"


def mean(rows: list[dict[str, Any]], split: str, key: str) -> float:
    return statistics.mean(row[split][key] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["base", "field", "final", "table"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="field: students or methods that have this in their name")
    parser.add_argument("--bases", nargs="*", default=list(BASES), choices=list(BASES))
    parser.add_argument("--student", choices=list(STUDENTS))
    parser.add_argument("--method", choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--part", default="0/1", help="this process's share of the work, such as 0/2")
    parser.add_argument("--cpus", type=int, default=1, help="of each process")
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    if arguments.command == "table":
        return table(arguments.out)
    arguments.data, arguments.teacher = arguments.data.resolve(), arguments.teacher.resolve()
    if arguments.command == "base":
        make_bases(arguments.bases, arguments)
    elif arguments.command == "field":
        asked = [(s, m, 0) for s in STUDENTS for m in METHODS if arguments.only in f"{s}--{m}"]
        train_all(asked, arguments)
    else:
        train_all([(arguments.student, arguments.method, seed) for seed in range(arguments.seeds)], arguments)


if __name__ == "__main__":
    main()
