"""Hugging Face classifiers on disk: find, check, load and save them.

Weights are read from safetensors alone; repositories with code of their own (`auto_map`) are refused.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from logging import ERROR, LogRecord, getLogger
from pathlib import Path
from typing import Any

import torch

from raydistill.adapters import ADAPTER_CONFIG, BASE, is_adapter, with_saved_adapter
from raydistill.errors import UserError, first_line
from raydistill.record.fingerprint import digest
from raydistill.record.store import open_store, sha256_file

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "spm.model", "tokenizer.model",
)  # fmt: skip
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "chat_template.jinja", *TOKENIZER_FILES]
# These count positions from the padding id on.
OFFSET_POSITIONS = (
    "camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
)  # fmt: skip
# What transformers calls the tasks.
PROBLEM_TYPES = {"classification": "single_label_classification", "multi_label": "multi_label_classification"}
LANGUAGE_MODEL = "a causal language model"
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True)
class ModelSource:
    """Where a model is: a folder or hub id that the user named, or a folder in a run's store. Workers can open it."""

    setting: str
    model: str
    revision: str | None = None
    store_url: str | None = None

    def folder(self) -> Path:
        """The model's folder on this machine, fetched once per process. Raises UserError when it cannot be used."""
        if self.store_url is None:
            return find_model(self.setting, self.model, self.revision)
        return find_model(self.setting, str(self.fetched()))

    def fetched(self) -> Path:
        """The folder of a model in a store."""
        assert self.store_url is not None
        return _fetched(self.store_url, self.model)

    def load(self, dtype: torch.dtype = torch.float32) -> Any:
        """The classifier in eval mode. Raises UserError when it does not load."""
        return load_classifier(self.setting, self.folder(), dtype=dtype)

    def identity(self) -> dict[str, str]:
        """What a fingerprint holds of it."""
        return model_identity(self.folder())

    def parameters(self, model: Any) -> int:
        """How many it has; `model` is what `load` gave."""
        return count_parameters(model)

    def weights(self) -> list[Path]:
        """The files of its weights."""
        return weight_files(self.folder())

    @property
    def cpu_only(self) -> bool:
        """Whether it computes on the CPU, wherever it is asked to."""
        return False


@functools.cache
def _fetched(store_url: str, name: str) -> Path:
    return open_store(store_url).local(name)


def find_model(setting: str, model: str, revision: str | None = None) -> Path:
    """The local folder of a model, fetched from the hub when it is a hub id, and checked to be safe to load.

    Raises UserError when it is not there, has no safetensors weights, or brings code.
    """
    if os.path.isabs(model) or os.path.isdir(model):
        folder = Path(model)
        if not folder.is_dir():
            raise UserError(f"{setting}: {model}: no such folder. Give a model's folder or a hub id")
    else:
        folder = _from_hub(setting, model, revision)
    _check_folder(setting, folder)
    return folder


def _from_hub(setting: str, model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises many kinds, from bad names to network errors
        raise UserError(f"{setting}: {model}: is no folder here and the hub gives none ({first_line(error)})") from None


def _check_folder(setting: str, folder: Path) -> None:
    config = base_folder(folder) / "config.json"
    if not config.is_file():
        raise UserError(f"{setting}: {folder}: has no config.json. Give the folder that save_pretrained wrote")
    try:
        facts = json.loads(config.read_text())
    except ValueError:
        raise UserError(f"{setting}: {config}: is not JSON. Save the model again") from None
    if "auto_map" in facts:
        raise UserError(f"{setting}: {folder}: brings code of its own (auto_map in config.json), which is never run")
    weights = weight_files(folder)
    if not weights:
        raise UserError(f"{setting}: {folder}: has no safetensors weights. Save it with save_pretrained again")
    for path in weights:
        _check_weights(setting, path)


def base_folder(folder: Path) -> Path:
    """The folder with a model's configuration: an adapter's base is in one of its own."""
    return folder / BASE if is_adapter(folder) else folder


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, its base's too where it is an adapter."""
    return sorted({*folder.glob("*.safetensors"), *base_folder(folder).glob("*.safetensors")})


def refuse_adapter(setting: str, folder: Path) -> None:
    """Raises UserError for a folder that holds an adapter where whole weights are needed."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{setting}: {folder}: holds an adapter, not a whole model. Merge it first: train it with"
            " student.lora.merge=true, or with peft's merge_and_unload()"
        )


def _check_weights(setting: str, path: Path) -> None:
    """A safetensors file begins with the length of a JSON header that says where every tensor ends."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise UserError(f"{setting}: {path}: is not a safetensors file. Fetch or save the weights again") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise UserError(f"{setting}: {path}: has {size} bytes, its header says {expected}. Fetch or save it again")


def model_identity(folder: Path) -> dict[str, str]:
    """sha256 of a model's weights, configuration and tokenizer: what a fingerprint holds of it."""
    weights = {
        p.name: _digest_of(p, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.safetensors"))
    }
    return {
        "weights_sha256": digest(weights),
        "config_sha256": sha256_file(folder / "config.json"),
        "tokenizer_sha256": tokenizer_identity(folder),
    }


def tokenizer_identity(folder: Path) -> str:
    """sha256 over a tokenizer's files."""
    return digest({name: sha256_file(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()})


@functools.cache
def _digest_of(path: Path, size: int, time_ns: int) -> str:
    """A file's sha256, computed once in a process while size and time stay what they are."""
    return sha256_file(path)


def load_classifier(setting: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The classifier in a folder, in eval mode; an adapter on its base. Raises UserError when it does not load."""
    from transformers import AutoModelForSequenceClassification

    model = _load(setting, base_folder(folder), AutoModelForSequenceClassification, dtype=dtype)
    if is_adapter(folder):
        model = _loaded(setting, folder, lambda: with_saved_adapter(model, folder))
    return model.eval()


def load_masked_model(setting: str, folder: Path) -> Any:
    """The masked language model in a folder, in float32 and eval mode. Raises UserError for one without its head."""
    from transformers import AutoModelForMaskedLM

    quiet_transformers()
    try:
        model, told = AutoModelForMaskedLM.from_pretrained(
            str(folder), use_safetensors=True, trust_remote_code=False, local_files_only=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # transformers raises many kinds for a broken folder, and for other kinds of models
        raise UserError(
            f"{setting}: {folder}: does not load as a masked language model ({first_line(error)})"
        ) from None
    if told["missing_keys"] or told["mismatched_keys"]:
        name = sorted(map(str, told["missing_keys"] or told["mismatched_keys"]))[0]
        raise UserError(
            f"{setting}: {folder}: has no head for masked words (no {name}). Give the model as it was before it became"
            " a classifier"
        )
    return model.eval()


def empty_classifier(setting: str, folder: Path) -> Any:
    """A classifier with the configuration in a folder and none of its weights. Raises UserError when it makes none."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    quiet_transformers()
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        return AutoModelForSequenceClassification.from_config(config)
    except Exception as error:  # transformers raises many kinds for a broken configuration
        raise UserError(f"{setting}: {folder}: does not load as a classifier ({first_line(error)})") from None


def start_classifier(setting: str, folder: Path, labels: list[str]) -> Any:
    """A pretrained model with a head for these labels, new where none fits. Call torch.manual_seed first."""
    from transformers import AutoModelForSequenceClassification

    id2label, label2id = label_maps(labels)
    return _load(
        setting, folder, AutoModelForSequenceClassification, dtype=torch.float32, num_labels=len(labels),
        id2label=id2label, label2id=label2id, ignore_mismatched_sizes=True,
    )  # fmt: skip


def load_language_model(setting: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model in a folder, in eval mode. Raises UserError for one without its output layer."""
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    model, told = _loaded(
        setting,
        folder,
        lambda: AutoModelForCausalLM.from_pretrained(
            str(folder), use_safetensors=True, trust_remote_code=False, local_files_only=True, dtype=dtype,
            output_loading_info=True,
        ),
        LANGUAGE_MODEL,
    )  # fmt: skip
    if missing := sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]])):
        raise UserError(f"{setting}: {folder}: lacks {missing[0]}. Give a causal language model with its output layer")
    return model.eval()


def empty_language_model(setting: str, folder: Path) -> Any:
    """A language model with the configuration in a folder and none of its weights. Raises UserError for other kinds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make() -> Any:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        return AutoModelForCausalLM.from_config(config)

    quiet_transformers()
    return _loaded(setting, folder, make, LANGUAGE_MODEL)


def load_quantised(setting: str, folder: Path, scheme: Any) -> Any:
    """The classifier in a folder with the weights of its linear layers quantised by a torchao configuration."""
    from transformers import AutoModelForSequenceClassification, TorchAoConfig

    chosen = TorchAoConfig(scheme)
    return _load(
        setting, folder, AutoModelForSequenceClassification, dtype=torch.float32, quantization_config=chosen
    ).eval()


def _load(setting: str, folder: Path, kind: Any, **options: Any) -> Any:
    quiet_transformers()
    return _loaded(
        setting,
        folder,
        lambda: kind.from_pretrained(
            str(folder), use_safetensors=True, trust_remote_code=False, local_files_only=True, **options
        ),
    )


def _loaded(setting: str, folder: Path, load: Callable[[], Any], what: str = "a classifier") -> Any:
    try:
        return load()
    except Exception as error:  # transformers raises many kinds for a broken folder
        raise UserError(f"{setting}: {folder}: does not load as {what} ({first_line(error)})") from None


def _is_error(record: LogRecord) -> bool:
    return record.levelno >= ERROR


def quiet_transformers() -> None:
    """Keeps transformers' own bars and notes off the terminal, where the run's progress stands."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # With accelerate there, transformers imports DeepSpeed for any model, and that tells of each CPU that it is no GPU.
    getLogger("DeepSpeed").addFilter(_is_error)


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


def save_classifier(
    model: Any, tokenizer: Any, weights: dict[str, torch.Tensor], folder: Path, *, max_length: int
) -> None:
    """Writes a model in Hugging Face form: config, safetensors, and a tokenizer that can cut at max_length."""
    quiet_transformers()
    model.save_pretrained(str(folder), state_dict={name: value.contiguous() for name, value in weights.items()})
    save_tokenizer(tokenizer, folder, max_length=max_length)
    share_weights(folder, like=folder / "config.json")


def save_language_model(model: Any, tokenizer: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes a language model as `save_classifier` a classifier; its tokenizer may give it all that it can read."""
    longest = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    save_classifier(model, tokenizer, weights, folder, max_length=longest)


def save_tokenizer(tokenizer: Any, folder: Path, *, max_length: int) -> None:
    """Writes a tokenizer that can cut at max_length."""
    tokenizer.model_max_length = max_length
    if tokenizer.is_fast:  # what this process did with it before must not show in the file
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(str(folder))


def share_weights(folder: Path, *, like: Path) -> None:
    """Lets those who may read another file read the weights, which safetensors makes for the owner alone."""
    for path in folder.glob("*.safetensors"):
        path.chmod(like.stat().st_mode)


def count_parameters(model: Any) -> int:
    """Different parameters; tied ones count once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
