"""Students of one teacher from several codecs, on a plain text: python benchmarks/language.py --text input.txt

The text is cut into documents of whole paragraphs, the last tenth of them in order is test. A teacher is trained on the
others; its students, the same but for the codec that they learn from, are compared in test loss, bytes and KL. By
default the teacher has about 10 million parameters; --small is a few minutes' look at the same table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from raydistill.config.file import validate
from raydistill.demo_language import write_new_llama
from raydistill.stages.pipeline import run_stages
from raydistill.stages.progress import Progress

CODECS: dict[str, dict[str, Any]] = {
    "sampled": {"codec": "sampled", "kept": 12},
    "topk": {"codec": "topk", "kept": 7},  # of about as many bytes
    "random": {"codec": "random", "kept": 50},
    "hidden": {"codec": "hidden"},
    "dense": {"codec": "dense"},  # full logits, the measure
}
SIZES = {
    False: {"teacher": (384, 6, 6), "student": (128, 4, 4), "vocabulary": 4096, "epochs": (4, 6)},
    True: {"teacher": (128, 4, 4), "student": (64, 2, 4), "vocabulary": 1024, "epochs": (2, 3)},
}
DOCUMENT = 2000  # characters, about


def documents(text: str) -> list[str]:
    """Paragraphs put together until they have DOCUMENT characters."""
    found, held = [], ""
    for paragraph in text.split("\n\n"):
        held += paragraph + "\n\n"
        if len(held) >= DOCUMENT:
            found.append(held)
            held = ""
    return [*found, held] if held.strip() else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-language"))
    parser.add_argument("--codecs", default=",".join(CODECS))
    parser.add_argument("--share", type=float, default=1.0, help="of the text's documents")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    folder, sizes = arguments.folder.resolve(), SIZES[arguments.small]
    folder.mkdir(parents=True, exist_ok=True)
    found = documents(arguments.text.read_text(encoding="utf-8"))
    found = found[: max(20, round(len(found) * arguments.share))]
    cut = len(found) * 9 // 10
    for name, part in {"train": found[:cut], "test": found[cut:]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    if not (folder / "model").exists():
        width, layers, heads = sizes["teacher"]
        write_new_llama(
            folder / "model", found[:cut], hidden_size=width, layers=layers, heads=heads,
            vocabulary=sizes["vocabulary"], positions=256,
        )  # fmt: skip
    for codec in arguments.codecs.split(","):
        print(json.dumps({"codec": codec, **measured(folder, codec, sizes)}), flush=True)


def measured(folder: Path, codec: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """A run of its own for each codec; the teacher, trained by the first one, is the others' as it stands there."""
    width, layers, heads = sizes["student"]
    before = sorted(folder.glob("runs/*/teacher/model/MANIFEST.json"))
    teacher: dict[str, Any] = {
        "model": str(before[0].parent if before else folder / "model"),
        "next_tokens": CODECS[codec],
    }
    if not before:
        teacher["fine_tune"] = {"epochs": sizes["epochs"][0], "learning_rate": 1e-3, "batch_size": 16, "choose": "last"}
    settings = {
        "name": codec,
        "storage": str(folder / "runs"),
        "task": "causal_lm",
        "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "max_length": 256},
        "teacher": teacher,
        "student": {
            "init": "config", "model_type": "llama", "hidden_size": width, "num_layers": layers, "num_heads": heads,
            "tie_embeddings": True,
        },
        "train": {
            "epochs": sizes["epochs"][1], "learning_rate": 2e-3, "batch_size": 8, "choose": "last",
            "loss": {"alpha": 1.0},
        },
        "evaluate": {"latency_requests": 16, "samples": 0, "control": codec == "sampled"},
    }  # fmt: skip
    report = run_stages(validate(settings, {}, "benchmark"), ("prepare", "teach", "train", "evaluate"), Progress(print))
    assert report is not None
    student = report["student"]
    names = ("retention", "retention_ci95", "gain_over_control", "gain_over_control_ci95")
    return {
        "bytes_per_position": round(report["cache"]["bytes_per_position"], 2),
        "nll": round(student["nll"], 5),
        "teacher_nll": round(report["teacher"]["nll"], 5),
        "kl": round(student["kl_to_teacher"], 5),
        "agreement": round(student["agreement"], 4),
        "parameters": [report["teacher"]["parameters"], student["parameters"]],
        **{name: report[name] for name in names},
    }


if __name__ == "__main__":
    main()
