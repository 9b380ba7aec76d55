"""What a model's configuration says: its task, its labels, the longest input it takes, its shape."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.errors import UserError
from raydistill.models.folders import base_folder

# These count positions from the padding id on.
OFFSET_POSITIONS = (
    "camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
)  # fmt: skip
# What transformers calls the tasks.
PROBLEM_TYPES = {"classification": "single_label_classification", "multi_label": "multi_label_classification"}


def set_task(model: Any, task: str) -> None:
    """Says in a model's configuration that each label is a question of its own, where it is, for those who use it."""
    if task == "multi_label":
        model.config.problem_type = PROBLEM_TYPES[task]


def check_task(setting: str, folder: Path, task: str) -> None:
    """Raises UserError for a model whose logits were made for another task; one that does not say is taken."""
    found = json.loads((folder / "config.json").read_text()).get("problem_type")
    if found not in (None, PROBLEM_TYPES[task]):
        raise UserError(
            f"{setting}: {folder}: its problem_type is {found}, which does not fit task: {task}. Set another task,"
            " another teacher, or teacher.fine_tune"
        )


def model_task(setting: str, folder: Path) -> str:
    """What a model is for: classification, multi_label or causal_lm. Raises UserError for anything else."""
    config = json.loads((base_folder(folder) / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or ["none"])[0]
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal_lm"
    if not name.endswith("ForSequenceClassification"):
        raise UserError(
            f"{setting}: {folder}: its architecture is {name}. Give a classifier or a causal language model"
        )
    return "multi_label" if config.get("problem_type") == PROBLEM_TYPES["multi_label"] else "classification"


def label_names(folder: Path) -> tuple[str, ...]:
    """The names of a classifier's outputs, in their order."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(base_folder(folder)), trust_remote_code=False, local_files_only=True)
    names: dict[Any, str] = config.id2label or {}
    return tuple(names[number] for number in sorted(names))


def label_maps(labels: list[str]) -> tuple[dict[int, str], dict[str, int]]:
    return dict(enumerate(labels)), {name: number for number, name in enumerate(labels)}


def label_order(setting: str, folder: Path, labels: list[str]) -> list[int]:
    """The model's output for each of the data's labels, matched by name.

    Raises UserError, with a name that differs, when the two sets of names are not the same.
    """
    config = json.loads((base_folder(folder) / "config.json").read_text())
    names = {int(number): str(name) for number, name in config.get("id2label", {}).items()}
    if sorted(names.values()) != sorted(labels):
        ours, theirs = sorted(set(labels) - set(names.values())), sorted(set(names.values()) - set(labels))
        raise UserError(
            f"{setting}: {folder}: its labels are not the data's: the data have {len(labels)} ({_some(ours)} unknown"
            f" to it),"
            f" it has {len(names)} ({_some(theirs)} unknown to the data). Set teacher.fine_tune, or rename its id2label"
        )
    return [{name: number for number, name in names.items()}[label] for label in labels]


def _some(names: list[str]) -> str:
    return (", ".join(repr(n) for n in names[:2]) + (" …" if len(names) > 2 else "")) or "none"


def positions(folder: Path) -> int | None:
    """The longest input that a model takes, where its configuration says so."""
    config = json.loads((folder / "config.json").read_text())
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    offset = position_offset(config.get("model_type"), config.get("pad_token_id"))
    return None if longest is None or longest < 0 else longest - offset


def position_offset(model_type: str | None, pad_id: int | None) -> int:
    """Positions that an architecture leaves unused before the first token's."""
    return (pad_id or 0) + 1 if model_type in OFFSET_POSITIONS else 0


def check_length(setting: str, folder: Path, max_length: int) -> None:
    """Raises UserError when rows may be longer than the model takes."""
    longest = positions(folder)
    if longest is not None and max_length > longest:
        raise UserError(f"data.max_length: found {max_length}, {setting} {folder} takes at most {longest}. Lower it")


def end_tokens(folder: Path, tokenizer_end: int | None) -> list[int]:
    """The ids that end what a model writes: its tokenizer's, and those that its configurations name."""
    found = set() if tokenizer_end is None else {tokenizer_end}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).is_file():
            named = json.loads((folder / name).read_text()).get("eos_token_id")
            found |= {named} if isinstance(named, int) else set(named or ())
    return sorted(found)


@dataclass(frozen=True)
class Shape:
    """The sizes of a transformer that its features have."""

    model_type: str
    layers: int
    heads: int
    width: int


def shape_of(folder: Path) -> Shape:
    """The shape of the model in a folder, by its configuration."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    return Shape(config.model_type, config.num_hidden_layers, config.num_attention_heads, config.hidden_size)
