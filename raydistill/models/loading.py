"""Loads a model from its folder, or makes one from a configuration, by transformers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from logging import ERROR, LogRecord, getLogger
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from raydistill.adapters import is_adapter, with_saved_adapter
from raydistill.errors import UserError, first_line
from raydistill.models.configuration import label_maps
from raydistill.models.folders import base_folder

LANGUAGE_MODEL = "a causal language model"


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
    """The causal language model in a folder, in eval mode; an adapter on its base.

    Raises UserError for one that does not load, or lacks its output layer.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    base = base_folder(folder)
    model, told = _loaded(
        setting,
        base,
        lambda: AutoModelForCausalLM.from_pretrained(
            str(base), use_safetensors=True, trust_remote_code=False, local_files_only=True, dtype=dtype,
            output_loading_info=True,
        ),
        LANGUAGE_MODEL,
    )  # fmt: skip
    if missing := sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]])):
        raise UserError(f"{setting}: {base}: lacks {missing[0]}. Give a causal language model with its output layer")
    if is_adapter(folder):
        model = _loaded(setting, folder, lambda: with_saved_adapter(model, folder), LANGUAGE_MODEL)
    return model.eval()


def empty_language_model(setting: str, folder: Path) -> Any:
    """A language model with the configuration in a folder and none of its weights. Raises UserError for other kinds."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make() -> Any:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        return AutoModelForCausalLM.from_config(config)

    quiet_transformers()
    return _loaded(setting, folder, make, LANGUAGE_MODEL)


def load_quantised(setting: str, folder: Path, scheme: Any, *, language: bool = False) -> Any:
    """The model in a folder with the weights of its linear layers quantised by a torchao configuration."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TorchAoConfig

    kind = AutoModelForCausalLM if language else AutoModelForSequenceClassification
    return _load(setting, folder, kind, dtype=torch.float32, quantization_config=TorchAoConfig(scheme)).eval()


def load_gguf(setting: str, folder: Path, file: str) -> Any:
    """The language model in a GGUF file, in float32 and eval mode, with the configuration that stands in its folder.

    Llama and Mistral, which are one to the file, are made by the sizes in it. Raises UserError when it does not load.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    def load() -> Any:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        known = {} if config.model_type in ("llama", "mistral") else {"config": config}
        return AutoModelForCausalLM.from_pretrained(
            str(folder), gguf_file=file, local_files_only=True, dtype=torch.float32, **known
        )

    quiet_transformers()
    with contextlib.redirect_stderr(io.StringIO()):  # a bar that transformers has no switch for
        return _loaded(setting, folder, load, LANGUAGE_MODEL).eval()


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


def held_bytes(model: Any) -> int:
    """Of a model's weights and buffers as they are in memory, each once; of quantised ones that of their parts."""
    parts = [part for tensor in (*model.parameters(), *model.buffers()) for part in _parts(tensor)]
    return sum({part.data_ptr(): part.nbytes for part in parts}.values())


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor is made of, by torch's protocol for wrappers, such as torchao's."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def count_parameters(model: Any) -> int:
    """Different parameters; tied ones count once."""
    return sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
