"""Students of one teacher from several codecs, on a plain text: python benchmarks/language.py --text input.txt

The text is cut into documents of whole paragraphs, the last tenth of them in order is test. A teacher is trained on the
others; its students, the same but for the codec that they learn from, are compared in test loss, bytes and KL. By
default the teacher has about 10 million parameters; --small is a few minutes' look at the same table.

--extraction measures instead, without a text, what reducing its logits adds to the teacher's own forward pass with its
output layer: processor seconds, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raydistill.cache.sampling import reduced, sampled_targets, top_targets
from raydistill.config.file import validate
from raydistill.demo_language import write_new_llama
from raydistill.next_token import chunk_of, hidden_states, output_head
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
    parser.add_argument("--text", type=Path)
    parser.add_argument("--extraction", type=int, nargs="*", metavar="VOCABULARY")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-language"))
    parser.add_argument("--codecs", default=",".join(CODECS))
    parser.add_argument("--share", type=float, default=1.0, help="of the text's documents")
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    for vocabulary in arguments.extraction or ():
        print(json.dumps(extraction(vocabulary)), flush=True)
    if arguments.text is None:
        return
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


def extraction(vocabulary: int, rounds: int = 7) -> dict[str, Any]:
    """Processor seconds of a batch of four rows of 256 tokens, by the teacher alone and with each codec's reduction."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, layers, heads = SIZES[False]["teacher"]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=8 * width // 3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=4 / width**0.5)  # peaked, as a trained model's
    inputs = {"input_ids": torch.randint(0, vocabulary, (4, 256))}
    head, rows, positions = output_head(model, vocabulary), torch.arange(1024) // 256, torch.arange(1024) % 256

    def reduce(keep: Callable[..., Any]) -> Callable[[], Any]:
        def call() -> Any:
            hidden_ND = hidden_states(model, inputs).flatten(0, 1)
            chunk = chunk_of(vocabulary)
            return reduced(hidden_ND, head.logits, keep, row_ids_N=rows, positions_N=positions, chunk=chunk)

        return call

    calls: dict[str, Callable[[], Any]] = {
        "alone": lambda: model(**inputs, use_cache=False).logits,
        "sampled": reduce(lambda logits, r, p: sampled_targets(logits, r, p, width=12, seed=0)),
        "topk": reduce(lambda logits, r, p: top_targets(logits, width=12)),
        "hidden": lambda: hidden_states(model, inputs),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, call in calls.items():
                started = time.process_time()
                call()
                seconds[name].append(time.process_time() - started)
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    added = {name: round(middle[name] / middle["alone"] - 1, 3) for name in calls if name != "alone"}
    return {"vocabulary": vocabulary, "seconds_alone": round(middle["alone"], 3), "added": added}


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
