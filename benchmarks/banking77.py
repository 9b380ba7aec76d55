"""raydistill beside a plain PyTorch loop on BANKING77.

    python benchmarks/banking77.py quality --data DIR --teacher DIR --out DIR [--only ours|plain]
    python benchmarks/banking77.py speed --out DIR

`quality` runs the pipeline and the plain loop (benchmarks/plain_loop.py) with the same settings and prints accuracies
side by side. `speed` then times, interleaved in one process and as ratios of medians: the teacher pass against the
arrival-order loop, a student step against the plain loop's step, the loader's share of a step, and a distillation step
against a cross-entropy step. DIR of --data holds train.csv and test.csv; --teacher is all-MiniLM-L6-v2's folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import yaml

SETTINGS = {
    "data": {"label": "category", "max_length": 64, "validation": 0.02, "shard_rows": 1024},
    "teacher": {"fine_tune": {"epochs": 4, "learning_rate": 2.0e-4, "choose": "last"}, "codec": "dense-int8"},
    "student": {"init": "config", "hidden_size": 128, "num_layers": 2},
    "train": {"epochs": 20, "learning_rate": 1.0e-3, "choose": "last", "loss": {"temperature": 4.0, "alpha": 0.9}},
}
ONE_LAYER = {
    "student": {"init": "teacher_layers", "layers": [0]},
    "train": {"epochs": 10, "learning_rate": 5.0e-4, "choose": "last", "loss": {"temperature": 4.0, "alpha": 0.9}},
    "evaluate": {"control": False},
}


def write_configs(data: Path, teacher: Path, out: Path, cpus: int | None, seeds: int) -> list[Path]:
    """The runs: the small student, it again with other seeds, and one layer of the teacher, all on one cache."""
    out.mkdir(parents=True, exist_ok=True)
    files = {"train": str(data / "train.csv"), "test": str(data / "test.csv")}
    small = {
        "name": "small",
        "storage": str(out),
        **SETTINGS,
        "data": {**SETTINGS["data"], **files},
        "teacher": {**SETTINGS["teacher"], "model": str(teacher)},
        "cluster": {"cpus": cpus},
    }
    lent = {**small["teacher"], "cache_from": str(out / "small")}
    one_layer = {**small, "name": "one-layer", **ONE_LAYER, "teacher": lent}
    again = [
        {**small, "name": f"small-{seed}", "teacher": lent, "train": {**SETTINGS["train"], "seed": seed}}
        for seed in range(1, seeds)
    ]
    paths = []
    for config in (small, *[{**config, "evaluate": {"control": False}} for config in again], one_layer):
        path = out / f"{config['name']}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        paths.append(path)
    return paths


def quality(data: Path, teacher: Path, out: Path, only: str | None, cpus: int | None, seeds: int) -> None:
    """Runs both sides and prints a JSON line for each model."""
    if only != "plain":
        for path in write_configs(data, teacher, out, cpus, seeds):
            started = time.monotonic()
            subprocess.run([sys.executable, "-m", "raydistill", "run", str(path)], check=True)
            report = json.loads((out / path.stem / "report" / "report.json").read_text())
            keys = ("accuracy", "parameters", "ece", "ece_scaled", "latency_ms_p50", "rows_per_second")
            for name in ("teacher", "student", "control"):
                if report.get(name):
                    line = {"side": "raydistill", "run": path.stem, "model": name, **{k: report[name][k] for k in keys}}
                    print(json.dumps(line), flush=True)
            facts = {
                k: report[k] for k in ("retention", "retention_ci95", "agreement", "gain_over_control", "gap_closed")
            }
            print(json.dumps({"run": path.stem, "seconds": round(time.monotonic() - started), **facts}), flush=True)
    if only != "ours":
        loop = [sys.executable, str(Path(__file__).with_name("plain_loop.py"))]
        files = ["--train", str(data / "train.csv"), "--test", str(data / "test.csv")]
        files += ["--threads", str(cpus)] if cpus else []
        folder = out / "plain"
        tuned = ["--model", str(folder / "teacher")]
        subprocess.run(
            [*loop, "teacher", *files, "--model", str(teacher), "--out", str(folder / "teacher")], check=True
        )
        for seed in range(seeds):
            place = ["--out", str(folder / f"student-{seed}"), "--seed", str(seed)]
            subprocess.run([*loop, "student", *files, *tuned, *place], check=True)
        subprocess.run([*loop, "student", *files, *tuned, "--out", str(folder / "control"), "--hard"], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    compared = commands.add_parser("quality")
    compared.add_argument("--data", type=Path, required=True)
    compared.add_argument("--teacher", type=Path, required=True)
    compared.add_argument("--out", type=Path, required=True)
    compared.add_argument("--only", choices=["ours", "plain"])
    compared.add_argument("--cpus", type=int, help="of each side; all of them when left out")
    compared.add_argument("--seeds", type=int, default=1, help="times the small student is trained on each side")
    timed = commands.add_parser("speed")
    timed.add_argument("--out", type=Path, required=True)
    timed.add_argument("--threads", type=int, default=2)
    timed.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.command == "quality":
        paths = (arguments.data.resolve(), arguments.teacher.resolve(), arguments.out.resolve())
        quality(*paths, arguments.only, arguments.cpus, arguments.seeds)
    else:
        from banking77_speed import speed

        speed(arguments.out.resolve(), arguments.threads, arguments.rounds)


if __name__ == "__main__":
    main()
