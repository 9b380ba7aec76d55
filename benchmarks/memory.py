"""Memory of prepare, teach and train over a generated file: python benchmarks/memory.py --rows 2000000 --out DIR

Writes support tickets, prepares them, scores them with a tiny teacher and trains a tiny student, each for at most
--seconds, while the largest resident size of every process of ours is sampled twice a second. Prints, for each stage,
the peak of the largest process, and the sizes at a quarter, half and the end of the time, to see that it is flat.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from raydistill.demo import write_new_bert
from raydistill.tickets import generate, write_tickets

SIGNALLED = (0, 130, 143)


def write_input(out: Path, rows: int) -> Path:
    """The file, a tiny teacher with the tickets' labels, and the configuration."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    train, test = write_tickets(out / "input", train_rows=rows, test_rows=1000)
    model = out / "input" / "model"
    write_new_bert(model, [t for t, _ in generate(2000)], hidden_size=32, layers=1, heads=2, vocabulary=800)
    labels = ["account", "billing", "refund", "shipping", "technical"]
    torch.manual_seed(0)
    sizes = BertConfig.from_pretrained(model)
    sizes.id2label, sizes.label2id = dict(enumerate(labels)), {n: i for i, n in enumerate(labels)}
    BertForSequenceClassification(sizes).save_pretrained(model)
    AutoTokenizer.from_pretrained(model).save_pretrained(model)
    config = {
        "name": "memory", "storage": str(out / "runs"),
        "data": {"train": str(train), "test": str(test), "label": "category", "max_length": 48, "validation": 0.005},
        "teacher": {"model": str(model), "codec": "dense-int8", "tokens_per_batch": 8192},
        "student": {"init": "config", "hidden_size": 16, "num_layers": 1, "num_heads": 1},
        "train": {"epochs": 1, "batch_size": 512, "log_every": 50},
    }  # fmt: skip
    path = out / "memory.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def watch(command: list[str], seconds: float) -> dict[str, object]:
    """Runs a command for at most that long; resident sizes in MiB of its largest process over time."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started, samples, largest = time.monotonic(), [], {}
    while process.poll() is None:
        for name, size in sizes(process.pid).items():
            largest[name] = max(largest.get(name, 0.0), size)
        samples.append(max(sizes(process.pid).values(), default=0.0))
        if time.monotonic() - started > seconds:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        time.sleep(0.5)
    output = process.stdout.read() if process.stdout else ""
    assert process.returncode in SIGNALLED, output
    at = {f"mib_at_{share:.0%}": round(samples[int((len(samples) - 1) * share)]) for share in (0.25, 0.5, 0.75, 1.0)}
    peak = {name: round(size) for name, size in sorted(largest.items(), key=lambda item: -item[1])[:4]}
    last = [line for line in output.splitlines() if line.strip()][-3:]
    return {"seconds": round(time.monotonic() - started), "peak_mib": peak, **at, "last_lines": last}


def sizes(pid: int) -> dict[str, float]:
    """Resident MiB by process title, shared memory left out; the largest where several have one title."""
    found: dict[str, float] = {}
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return found
    for process in processes:
        try:
            memory, title = process.memory_info(), " ".join(process.cmdline())[:40]
        except psutil.Error:
            continue
        found[title] = max(found.get(title, 0.0), (memory.rss - memory.shared) / 2**20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    config = write_input(arguments.out.resolve(), arguments.rows)
    size = (arguments.out / "input" / "train.csv").stat().st_size
    print(json.dumps({"rows": arguments.rows, "file_mb": round(size / 1e6)}), flush=True)
    raydistill = [sys.executable, "-m", "raydistill"]
    for stage, limit in (("prepare", 3600.0), ("teach", 3600.0), ("train", arguments.seconds)):
        print(json.dumps({"stage": stage, **watch([*raydistill, stage, str(config)], limit)}), flush=True)


if __name__ == "__main__":
    main()
