"""Students of one teacher from several codecs, on a text: python benchmarks/language.py --text input.txt --out DIR

The text is cut into documents of whole paragraphs, the last tenth of them in order is test. A teacher of about 10
million parameters is trained on the others. Its students are the same in everything, seed and steps too, but for the
codec that they learn from; the control, the same student once more, learns from the text alone. They are compared in
test loss, bytes and KL, each with the student of the whole logits.

What is finished is a line of DIR/results.jsonl and is not done again; a run that was stopped goes on where it was.
Everything takes one thread. --table prints what is there, --small is a few minutes' look at the same table.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config.file import validate
from raydistill.config.run import Config
from raydistill.data.packing import packed
from raydistill.data.token_order import token_batches
from raydistill.data.token_shards import read_token_shard
from raydistill.data.tokens import pack_by_length
from raydistill.demo_language import write_new_llama
from raydistill.record.commit import read_manifest
from raydistill.record.run import open_run
from raydistill.stages.forward import TOKENS_PER_BATCH
from raydistill.stages.pipeline import run_stages
from raydistill.stages.progress import Progress

# The first one's run trains the teacher; the control stands beside its student, of the same seed and steps as any.
CODECS: dict[str, dict[str, Any]] = {
    "hidden": {"codec": "hidden"},
    "sampled-20": {"codec": "sampled", "kept": 20},
    "topk-3": {"codec": "topk", "kept": 3},  # 13 bytes
    "random-50": {"codec": "random", "kept": 50},  # RS-KD
    "sampled-32": {"codec": "sampled", "kept": 32},
    "dense": {"codec": "dense"},
    "topk-12": {"codec": "topk", "kept": 12},  # 37 bytes
}
FIRST, WHOLE = "hidden", ("dense", "hidden")  # the measure is the first of WHOLE that is there
DOCUMENT = 2000  # characters, about
LENGTH = 256


@dataclass(frozen=True)
class Sizes:
    """Width, layers and heads of the models, and how long they learn."""

    teacher: tuple[int, int, int]
    student: tuple[int, int, int]
    vocabulary: int
    epochs: tuple[int, int]


SIZES = {
    False: Sizes(teacher=(384, 5, 6), student=(128, 4, 4), vocabulary=4096, epochs=(4, 2)),
    True: Sizes(teacher=(128, 3, 4), student=(64, 2, 4), vocabulary=1024, epochs=(3, 3)),
}


def documents(text: str) -> list[str]:
    """Paragraphs put together until they have DOCUMENT characters."""
    found, held = [], ""
    for paragraph in text.split("\n\n"):
        held += paragraph + "\n\n"
        if len(held) >= DOCUMENT:
            found.append(held)
            held = ""
    return [*found, held] if held.strip() else found


def write_input(text: Path, share: float, out: Path, sizes: Sizes) -> None:
    """train.jsonl, test.jsonl and the teacher before its training; what is there is left as it is."""
    if (out / "model").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    found = documents(text.read_text(encoding="utf-8"))
    found = found[: max(20, round(len(found) * share))]
    cut = len(found) * 9 // 10
    for name, part in {"train": found[:cut], "test": found[cut:]}.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    width, layers, heads = sizes.teacher
    write_new_llama(
        out / ".model.tmp", found[:cut], hidden_size=width, layers=layers, heads=heads, vocabulary=sizes.vocabulary,
        positions=LENGTH,
    )  # fmt: skip
    (out / ".model.tmp").rename(out / "model")


def config_of(codec: str, out: Path, sizes: Sizes) -> Config:
    """A run of its own for each codec."""
    width, layers, heads = sizes.student
    teacher: dict[str, Any] = {"model": f"{out}/runs/{FIRST}/teacher/model", "next_tokens": CODECS[codec]}
    if codec == FIRST:
        tuned = {"epochs": sizes.epochs[0], "learning_rate": 1.0e-3, "batch_size": 4, "metric": "nll"}
        teacher |= {"model": f"{out}/model", "fine_tune": {**tuned, "cpus_per_worker": 1}}
    settings = {
        "name": codec,
        "storage": f"{out}/runs",
        "task": "causal_lm",
        "data": {"train": f"{out}/train.jsonl", "test": f"{out}/test.jsonl", "max_length": LENGTH},
        "teacher": teacher,
        "student": {
            "init": "config", "model_type": "llama", "hidden_size": width, "num_layers": layers, "num_heads": heads,
            "tie_embeddings": True,
        },
        "train": {
            "epochs": sizes.epochs[1], "learning_rate": 2.0e-3, "batch_size": 4, "choose": "last",
            "cpus_per_worker": 1, "loss": {"alpha": 1.0},
        },
        "evaluate": {"latency_requests": 16, "samples": 0, "control": codec == FIRST},
        "cluster": {"cpus": 1},
    }  # fmt: skip
    return validate(settings, {}, "benchmarks/language.py")


def measured(codec: str, out: Path, sizes: Sizes) -> dict[str, Any]:
    """The student of a codec, trained and compared with its teacher on test."""
    config = config_of(codec, out, sizes)
    progress = Progress(lambda line: print(f"  {line}", flush=True), every_seconds=30)
    report = run_stages(config, ("prepare", "teach", "train", "evaluate"), progress)
    assert report is not None
    made = open_run(config.storage, config.name).require("student")
    result = {
        "codec": codec,
        "bytes_per_position": report["cache"]["bytes_per_position"],
        "positions": report["cache"]["positions"],
        "steps": made.facts["steps"],
        "test_positions": report["test_positions"],
        "teacher_parameters": report["teacher"]["parameters"],
        "teacher_nll": report["teacher"]["nll"],
        **of_model(report, "student"),
        "retention": report["retention"],
        "retention_ci95": report["retention_ci95"],
    }
    if "control" in report:
        gain = {name: report[name] for name in ("gain_over_control", "gain_over_control_ci95")}
        result["control"] = {**of_model(report, "control"), **gain}
    return result


def of_model(report: dict[str, Any], name: str) -> dict[str, Any]:
    found = report[name]
    return {**{key: found[key] for key in ("nll", "parameters", "agreement")}, "kl": found["kl_to_teacher"]}


def padding(config: Config) -> dict[str, float]:
    """The share of padding among the tokens that models are given: in training's batches, and in the teacher's pass."""
    store = open_run(config.storage, config.name).store
    data = read_manifest(store, "data")
    assert data is not None
    lengths = [read_token_shard(store, entry).lengths_R for entry in data.shards("train")]
    asked = config.train.batch_size * config.data.max_length
    given = {"training": 0, "teacher": 0}
    for places, _ in token_batches(lengths, seed=config.train.seed, epoch=0, batch_tokens=asked):
        rows = [int(lengths[shard][row]) for shard, row in places.tolist()]
        packs = packed(rows)
        given["training"] += len(packs) * max(sum(rows[index] for index in pack) for pack in packs)
    for part in lengths:
        batches = pack_by_length(part, config.teacher.tokens_per_batch or TOKENS_PER_BATCH["cpu"])
        given["teacher"] += sum(len(batch) * int(part[batch].max()) for batch in batches)
    total = sum(int(part.sum()) for part in lengths)
    return {name: 1 - total / tokens for name, tokens in given.items()}


def finished(out: Path) -> dict[str, dict[str, Any]]:
    path = out / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["codec"]: result for result in map(json.loads, lines)}


def table(results: dict[str, dict[str, Any]]) -> None:
    """Every student beside that of the whole logits, and the control."""
    if not results:
        return
    one, whole = next(iter(results.values())), next((name for name in WHOLE if name in results), None)
    print(f"teacher: {one['teacher_parameters']:,} parameters, test NLL {one['teacher_nll']:.4f}, perplexity "
          f"{math.exp(one['teacher_nll']):.2f}; students: {one['parameters']:,}, {one['steps']:,} steps; "
          f"{one['positions']:,} cached and {one['test_positions']:,} test positions\n")  # fmt: skip
    print(f"| codec | bytes a position | test NLL | against {whole} | perplexity | KL | agreement | keeps (95 %) |")
    print("|---|---|---|---|---|---|---|---|")
    for name in (name for name in CODECS if name in results):
        found = results[name]
        low, high = found["retention_ci95"]
        keeps = f"{found['retention']:.1%} ({low:.1%} to {high:.1%})"
        print(row(name, f"{found['bytes_per_position']:,.1f}", found, results.get(whole or ""), keeps))
    if control := next((found["control"] for found in results.values() if "control" in found), None):
        print(row("control", "", control, results.get(whole or ""), ""))
        low, high = control["gain_over_control_ci95"]
        print(f"\n{FIRST}'s student is {control['gain_over_control']:.2f} below the control in perplexity "
              f"({low:.2f} to {high:.2f})")  # fmt: skip


def row(name: str, size: str, found: dict[str, Any], whole: dict[str, Any] | None, keeps: str) -> str:
    against = f"{found['nll'] / whole['nll'] - 1:+.2%}" if whole and found is not whole else ""
    cells = [name, size, f"{found['nll']:.4f}", against, f"{math.exp(found['nll']):.2f}", f"{found['kl']:.4f}",
             f"{found['agreement']:.1%}", keeps]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--codecs", nargs="*", default=list(CODECS), choices=list(CODECS))
    parser.add_argument("--share", type=float, default=1.0, help="of the text's documents")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--table", action="store_true", help="print what is finished, do nothing")
    arguments = parser.parse_args()
    out, sizes = arguments.out.resolve(), SIZES[arguments.small]
    if not arguments.table:
        if arguments.text is None and not (out / "model").exists():
            parser.error("--text is needed for the first start")
        write_input(arguments.text, arguments.share, out, sizes)
        for codec in dict.fromkeys([FIRST, *arguments.codecs]):
            if codec in finished(out):
                continue
            print(codec, flush=True)
            result = measured(codec, out, sizes)
            with open(out / "results.jsonl", "a") as file:
                file.write(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
    table(finished(out))
    print(f"\npadding: {padding(config_of(FIRST, out, sizes))}")


if __name__ == "__main__":
    main()
