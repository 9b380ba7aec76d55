"""The proof and the files to deploy on BANKING77: what a small student and its exports keep, weigh and take.

    python benchmarks/proof.py report --data DIR --teacher DIR --out DIR [--from DIR] [--no-control]
    python benchmarks/proof.py rows --data DIR --teacher DIR --out DIR [--rows 100000]

`report` is one run of the narrowest student of benchmarks/methods.py with its exports and the 8-bit teacher, in
DIR/runs; --from is the --out of benchmarks/methods.py, whose finished teacher and student are copied and not trained
again. It prints a JSON line for each model and one for each goal. `rows` scores so many rows (the test's, again and
again) with that student as evaluate does and by a bare loop over the same batches, in turn, and prints the ratio.
Data and teacher are those of benchmarks/banking77.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from methods import base_config, training_config

from raydistill.config.file import validate
from raydistill.config.run import Config
from raydistill.data.shards import ShardWriter, read_split
from raydistill.data.sources import Row
from raydistill.data.tokens import pack_by_length, pad, tokenise
from raydistill.record.commit import commit_manifest, read_manifest
from raydistill.record.run import open_run
from raydistill.record.store import LocalStore
from raydistill.report.page import compared
from raydistill.stages.forward import TOKENS_PER_BATCH
from raydistill.stages.pipeline import run_stages
from raydistill.stages.progress import Progress
from raydistill.stages.scoring import Scorer, ScoringJob
from raydistill.stages.teachers import made_here

STUDENT, METHOD, SEED = "two narrowest layers", "forward KL", 0
SHOWN = (
    "accuracy", "retention", "agreement", "ece_scaled", "size_bytes", "latency_ms_p50", "latency_ms_p99",
    "rows_per_second",
)  # fmt: skip


def proof_config(arguments: argparse.Namespace) -> Config:
    """The student of benchmarks/methods.py, with files to deploy and everything that a report can compare."""
    settings = training_config(STUDENT, METHOD, SEED, arguments).model_dump(mode="json", exclude_unset=True)
    settings["export"] = {"formats": ["onnx", "onnx-int8", "onnx-int8-static", "safetensors-bf16"]}
    settings["evaluate"] = {"quantise_teacher": True, "control": arguments.control, "bootstrap": 10_000}
    return validate(settings, {}, "benchmarks/proof.py")


def copy_finished(source: Path, config: Config, out: Path) -> None:
    """What another benchmark trained, in this one's folders; its own stay as they are."""
    base, run = Path(str(config.teacher.cache_from)), Path(config.storage) / config.name
    for folder in (base, run):
        if not folder.exists():
            shutil.copytree(source / folder.relative_to(out), folder)


def report(arguments: argparse.Namespace) -> None:
    config, say = proof_config(arguments), Progress(lambda line: print(f"  {line}", flush=True), every_seconds=30)
    if arguments.source:
        copy_finished(arguments.source.resolve(), config, arguments.out)
    run_stages(base_config("plain", arguments), ("prepare", "teach"), say)
    started = time.monotonic()
    found = run_stages(config, ("teach", "train", "export", "evaluate"), say)
    assert found is not None
    page = Path(config.storage) / config.name / "report/report.html"
    for one in compared(found):
        kept = {"student": found["retention"], "teacher": 1.0}.get(one["name"], one.get("retention"))
        line = {"model": one["name"], **{key: one.get(key) for key in SHOWN}, "retention": kept}
        print(json.dumps(line), flush=True)
    for name, value in goals(found, page.stat().st_size).items():
        print(json.dumps({"goal": name, "value": value}), flush=True)
    print(json.dumps({"seconds": round(time.monotonic() - started), "page": str(page)}), flush=True)


def goals(found: dict[str, Any], page_bytes: int) -> dict[str, Any]:
    """What is to be reached, and what was."""
    by_name = {one["name"]: one for one in compared(found)}
    teacher, student, int8 = by_name["teacher"], by_name["student"], by_name["onnx-int8"]
    return {
        "int8 keeps of the student's accuracy (0.995)": int8["accuracy"] / student["accuracy"],
        "int8 p50 faster than the teacher's, times (10)": teacher["latency_ms_p50"] / int8["latency_ms_p50"],
        "int8 file smaller than the teacher's, times (25)": teacher["size_bytes"] / int8["size_bytes"],
        "int8 retention (0.98)": int8["retention"],
        "page, bytes (3,000,000)": page_bytes,
    }


def rows(arguments: argparse.Namespace) -> None:
    """Scoring as evaluate does against a bare loop with the same batches."""
    config = proof_config(arguments)
    run = open_run(config.storage, config.name, cache_from=config.teacher.cache_from)
    data = run.require("data")
    texts = [t for shard in read_split(run.home("data"), data.shards("test")) for t in shard.texts]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        writer = ShardWriter(store, "test", first_row_id=0, shard_rows=8192, fingerprint="rows")
        for number in range(arguments.rows):
            writer.add(Row(texts[number % len(texts)], None, 0, number), 0)
        commit_manifest(store, "data", "rows", writer.close())
        manifest = read_manifest(store, "data")
        assert manifest is not None
        ours, bare = [], []
        for number, entry in enumerate(manifest.files):
            job = ScoringJob(
                source=made_here("student", run), labels=tuple(data.facts["labels"]), data_url=folder,
                output_url=folder, folder="logits", fingerprint="rows", codec="dense-float32", dtype="float32",
                max_length=config.data.max_length, tokens_per_batch=None,
            )  # fmt: skip
            scorer = Scorer(job, threads=1) if number == 0 else scorer  # noqa: F821
            for way in (_ours, _bare) if number % 2 else (_bare, _ours):
                (ours if way is _ours else bare).append(way(scorer, store, entry))
    rates = [other / own for own, other in zip(ours, bare, strict=True)]
    print(json.dumps({
        "rows": arguments.rows, "rows_per_second": arguments.rows / sum(ours), "bare": arguments.rows / sum(bare),
        "ratio_of_sums": sum(bare) / sum(ours), "median_ratio": statistics.median(rates),
    }))  # fmt: skip


def _ours(scorer: Scorer, store: LocalStore, entry: Any) -> float:
    """Read, tokenise, score, check, write and commit one shard."""
    started = time.perf_counter()
    scorer.score_shard(entry)
    return time.perf_counter() - started


def _bare(scorer: Scorer, store: LocalStore, entry: Any) -> float:
    """Tokenise and score the same texts."""
    (shard,) = read_split(store, [entry])
    started = time.perf_counter()
    forward = scorer.forward
    tokens = tokenise(forward.tokenizer, shard.texts, 64)
    with torch.inference_mode():
        for batch in pack_by_length(tokens.lengths_N, TOKENS_PER_BATCH["cpu"]):
            inputs = pad([tokens.row(int(i)) for i in batch], forward.tokenizer.pad_token_id)
            forward.model(**inputs).logits.argmax(dim=1)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["report", "rows"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", dest="source", type=Path, help="report: the --out of benchmarks/methods.py")
    parser.add_argument("--no-control", dest="control", action="store_false", help="report: leave the control out")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--cpus", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out, arguments.data, arguments.teacher = (
        arguments.out.resolve(), arguments.data.resolve(), arguments.teacher.resolve(),
    )  # fmt: skip
    {"report": report, "rows": rows}[arguments.command](arguments)


if __name__ == "__main__":
    main()
