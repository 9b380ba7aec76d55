"""The model card of a student, in Hugging Face's form, from the facts of its report alone.

The front matter is what the hub reads (model card metadata: license, base_model, datasets, metrics, model-index).
"""

from __future__ import annotations

from typing import Any

import yaml

from raydistill.report.language_page import language_table, language_verdict
from raydistill.report.page import table, verdict

PIPELINES = {
    "classification": "text-classification", "multi_label": "text-classification", "causal_lm": "text-generation",
}  # fmt: skip
# What the hub calls each measure, and where it stands in a report.
METRICS = {
    "classification": {"accuracy": "accuracy", "macro_f1": "f1"},
    "multi_label": {"micro_f1": "f1", "accuracy": "accuracy"},
    "causal_lm": {"perplexity": "perplexity"},
}
NAMES = {
    "accuracy": "Accuracy", "macro_f1": "Macro F1", "micro_f1": "Micro F1", "perplexity": "Perplexity a token",
}  # fmt: skip


def model_card(report: dict[str, Any]) -> str:
    """The card as Markdown: front matter, what the student is, its figures, its limits, its use and its making."""
    sections = [
        f"# {report['name']}",
        _what(report),
        "## What it keeps",
        "\n".join(f"- {line}" for line in _verdict(report)),
        _figures(report),
        "## Limits",
        "\n".join(f"- {line}" for line in _limits(report)),
        "## How to use it",
        _use(report),
        "## How it was made",
        _made(report),
    ]
    return f"---\n{_front_matter(report)}---\n\n" + "\n\n".join(sections) + "\n"


def _front_matter(report: dict[str, Any]) -> str:
    task, card = report["task"], report["config"]["evaluate"]["card"] or {}
    pipeline, measures = PIPELINES[task], METRICS[task]
    datasets = list(card.get("datasets") or report.get("hub_datasets") or [])
    found: dict[str, Any] = {"license": card.get("license") or "unknown", "library_name": "transformers"}
    found |= {"pipeline_tag": pipeline}
    found |= {"language": list(card["language"])} if card.get("language") else {}
    found |= {"base_model": report["base_models"]} if report.get("base_models") else {}
    found |= {"datasets": datasets} if datasets else {}
    found["metrics"] = list(dict.fromkeys(measures.values()))
    found["tags"] = ["raydistill", "knowledge-distillation", *(["multi-label"] if task == "multi_label" else [])]
    results = [
        {"type": kind, "name": NAMES[name], "value": round(report["student"][name], 4)}
        for name, kind in measures.items()
    ]
    dataset = {"name": f"{report['name']}, test", "type": datasets[0] if datasets else report["name"], "split": "test"}
    found["model-index"] = [
        {"name": report["name"], "results": [{"task": {"type": pipeline}, "dataset": dataset, "metrics": results}]}
    ]
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120)


def _what(report: dict[str, Any]) -> str:
    parameters, teacher = report["student"]["parameters"], report["teacher"]["parameters"]
    kind = {
        "classification": "A text classifier", "multi_label": "A classifier of texts that may have several labels",
        "causal_lm": "A language model",
    }[report["task"]]  # fmt: skip
    line = (
        f"{kind} of {parameters:,} parameters, distilled by raydistill from a teacher of {teacher:,}"
        f" ({_named(report)})."
    )
    if report.get("labels"):
        shown = ", ".join(f"`{label}`" for label in report["labels"][:20])
        more = f" and {len(report['labels']) - 20} more" if len(report["labels"]) > 20 else ""
        line += f" It knows {len(report['labels'])} labels: {shown}{more}."
    return line


def _named(report: dict[str, Any]) -> str:
    """The teacher's name: of a folder its last part, because a path says nothing elsewhere."""
    model = report["config"]["teacher"]["model"]
    name = model if model in (report.get("base_models") or ()) else model.rstrip("/").rpartition("/")[2]
    return f"`{name}`" + (", fine-tuned for the task" if report["config"]["teacher"]["fine_tune"] else "")


def _verdict(report: dict[str, Any]) -> list[str]:
    return language_verdict(report) if report["task"] == "causal_lm" else verdict(report)


def _figures(report: dict[str, Any]) -> str:
    header, rows = language_table(report) if report["task"] == "causal_lm" else table(report)
    lines = [header, ["---"] * len(header), *rows]
    measured = report["measured"]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines) + (
        f"\n\nOn {report['test_rows']:,} test rows that no choice looked at; times in {measured['threads']}"
        f" thread{'s' if measured['threads'] > 1 else ''} on {measured['device']}, {measured['dtype']}."
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _limits(report: dict[str, Any]) -> list[str]:
    length = report["config"]["data"]["max_length"]
    lines = [
        f"It was measured on texts like those of the test set; what it does with others is not known"
        f"{' but for the further sets of the report' if report.get('sets') else ''}.",
        f"It reads {length} tokens of a text"
        + (", and writes what follows." if report["task"] == "causal_lm" else "; what comes after them is cut."),
        "It learned from its teacher's answers and has its mistakes and biases"
        + (
            f": of the rows that the teacher has wrong it gives the same wrong answer in"
            f" {report['teacher_errors']['student']['copied']:.0%}."
            if report.get("teacher_errors", {}).get("student")
            else "."
        ),
    ]
    if report["task"] != "causal_lm":
        lines.append(
            f"Its probabilities are off by {report['student']['ece']:.1%} on average (expected calibration error)"
            f"; divided by a temperature of {report['student']['temperature']:.2f} its logits are off by"
            f" {report['student']['ece_scaled']:.1%}."
        )
        worst = sorted((one for one in report["classes"] if one["rows"]), key=lambda one: one["student"]["f1"])[:3]
        named = ", ".join(f"`{one['label']}` ({one['student']['f1']:.0%})" for one in worst)
        lines.append(f"The labels with its lowest F1: {named}.")
    return lines


def _use(report: dict[str, Any]) -> str:
    if report["config"]["student"]["lora"] and not report["config"]["student"]["lora"]["merge"]:
        kind = "SequenceClassification"
        code = (
            f"from peft import AutoPeftModelFor{kind}\n\n"
            f'model = AutoPeftModelFor{kind}.from_pretrained("path/to/this/folder")'
        )
    elif report["task"] == "causal_lm":
        code = (
            'from transformers import pipeline\n\npipeline("text-generation", model="path/to/this/folder")'
            '("Once upon a time")'
        )
    else:
        every = ", top_k=None" if report["task"] == "multi_label" else ""
        code = (
            "from transformers import pipeline\n\n"
            f'pipeline("text-classification", model="path/to/this/folder"{every})("a text")'
        )
    return f"```python\n{code}\n```\n\n```console\nraydistill predict path/to/this/folder texts.txt\n```"


def _made(report: dict[str, Any]) -> str:
    loss, versions = report["config"]["train"]["loss"], report["environment"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("raydistill", "transformers", "torch"))
    lines = [
        f"Trained with `{loss['kind']}` at temperature {loss['temperature']:g}, weight {loss['alpha']:g}, from the"
        f" cached outputs of its teacher, {report['teacher_forwards_per_row']:g} forward passes of it for each row.",
        f"Made {report['created']} with {shown}.",
        *report["data_report"],
        "Fingerprints: " + ", ".join(f"{name} `{value[:12]}`" for name, value in report["fingerprints"].items()) + ".",
        "The run's `config.yaml` makes it again: `raydistill run config.yaml`.",
    ]
    return "\n".join(f"- {line}" for line in lines)
