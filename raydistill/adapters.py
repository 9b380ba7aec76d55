"""LoRA adapters on a student, by the peft library: what they go on, what trains beside them, and their folder.

A linear layer's weight W stays as it is and W + (alpha / rank) B A takes its place, with A and B trained (LoRA, Hu et
al. 2021, arXiv:2106.09685, section 4.1). A classifier's head is new to its task and is trained as a whole; a language
model's, its output layer, comes with its weights and stays frozen like they do. What does not train has no optimiser
state, and no checkpoint holds it: it comes from where the student's first weights come from.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from raydistill.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE = "base"  # the folder, beside an adapter's files, of the model that it goes on
SHOWN = 8  # names in a message


def check_peft() -> None:
    """Raises UserError when the library is not installed."""
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise UserError("student.lora: needs the package peft. Install it: pip install 'raydistill[peft]'")


def linear_layers(model: Any) -> list[str]:
    """The linear layers of a model's layers: all but those of its head."""
    head = head_modules(model)
    return [
        name
        for name, module in model.named_modules()
        if name.startswith(f"{model.base_model_prefix}.")
        and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
        and not any(f"{name}.".startswith(f"{part}.") for part in head)
    ]


def head_modules(model: Any) -> list[str]:
    """What makes logits of the hidden states: all that stands beside the encoder or decoder, and its pooler."""
    encoder = model.base_model_prefix
    beside = [name for name, module in model.named_children() if name != encoder and _has_weights(module)]
    return beside + ([f"{encoder}.pooler"] if getattr(model.base_model, "pooler", None) is not None else [])


def is_language_model(model: Any) -> bool:
    """Whether a model of transformers has an output layer over its vocabulary."""
    return model.get_output_embeddings() is not None


def _has_weights(module: torch.nn.Module) -> bool:
    return any(True for _ in module.parameters())


def target_layers(model: Any, targets: str | Collection[str]) -> list[str]:
    """The linear layers that adapters go on. Raises UserError for a name that none below the head has.

    A name is that of a layer or the end of it: "query" and "attention.self.query" are each layer's query.
    """
    known = linear_layers(model)
    if isinstance(targets, str):
        return known
    found: set[str] = set()
    for target in targets:
        matches = {name for name in known if f".{name}".endswith(f".{target}")}
        if not matches:
            raise UserError(
                f"student.lora.targets: {target!r} is no linear layer of the student below its head. Use all-linear, or"
                f" names such as {', '.join(_examples(known, target))}"
            )
        found |= matches
    return [name for name in known if name in found]


def _examples(known: list[str], target: str) -> list[str]:
    """The ends of layers' names, those that look like the target first."""
    ends = list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", name) for name in known))
    near = difflib.get_close_matches(target, ends + [end.rpartition(".")[2] for end in ends], 2, 0.6)
    return list(dict.fromkeys([*near, *ends]))[:SHOWN]


def trained_modules(model: Any, also_train: Collection[str]) -> list[str]:
    """The modules that train as a whole: a classifier's head and, where asked for, norms and embeddings below it."""
    head = head_modules(model)
    outside = {
        name: module
        for name, module in model.named_modules()
        if not any(f"{name}.".startswith(f"{part}.") for part in head)
    }
    found = [] if is_language_model(model) else list(head)
    if "norms" in also_train:
        found += [name for name, module in outside.items() if "norm" in type(module).__name__.lower()]
    if "embeddings" in also_train:
        found += [name for name, module in outside.items() if isinstance(module, torch.nn.Embedding)]
    return found


def add_adapters(model: Any, settings: Any, *, seed: int) -> Any:
    """The model with adapters by the `student.lora` section, as a PeftModel: all but what trains is frozen.

    The layers are put into the model itself, which `get_base_model()` gives back. A is random by the seed and B is 0,
    so that the model computes at first what it did without adapters. Raises UserError for a target that is not there.
    """
    from peft import LoraConfig, TaskType

    torch.manual_seed(seed)
    targets = target_layers(model, settings.targets)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if is_language_model(model) else TaskType.SEQ_CLS, r=settings.rank,
        lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=targets,
        modules_to_save=trained_modules(model, settings.also_train) or None,
        fan_in_fan_out=type(model.get_submodule(targets[0])).__name__ == "Conv1D",
    )  # fmt: skip
    return _peft_class(model)(model, config)


def _peft_class(model: Any) -> Any:
    """peft's class for models of this kind."""
    from peft import PeftModelForCausalLM, PeftModelForSequenceClassification

    return PeftModelForCausalLM if is_language_model(model) else PeftModelForSequenceClassification


def frozen_parameters(model: torch.nn.Module) -> frozenset[str]:
    """The names of what an adapted model's checkpoints leave out, all names of what has several."""
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if not parameter.requires_grad)


def load_trained(model: torch.nn.Module, weights: dict[str, torch.Tensor], frozen: Collection[str]) -> None:
    """Loads a checkpoint's weights into a model whose frozen parameters are there already."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    left_out = [name for name in missing if not belongs_to(name, frozen)]
    assert not left_out, f"the checkpoint lacks {left_out}"
    assert not unexpected, f"the checkpoint has too much: {unexpected}"


def belongs_to(name: str, parameters: Collection[str]) -> bool:
    """Whether a name in a state is a parameter's, or of what a quantised one keeps beside it ("<name>.absmax")."""
    return name in parameters or any(name[:end] in parameters for end, sign in enumerate(name) if sign == ".")


def merged(adapted: Any) -> Any:
    """The model with its adapters added to the weights, an ordinary Hugging Face model."""
    return adapted.merge_and_unload()


def whole(model: Any) -> Any:
    """The model with any adapters in it added to their layers' weights: a start for adapters of its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    if layers:
        del model.peft_config  # peft's note that there are some
    return model


def save_adapter(adapted: Any, folder: Path, *, base: str) -> None:
    """Writes an adapter's two files, which name the folder of the model that they go on; the same bytes each time."""
    from peft import get_peft_model_state_dict

    config = adapted.peft_config["default"]
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    save_file({name: value.contiguous() for name, value in weights.items()}, str(folder / ADAPTER_WEIGHTS))
    facts = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    facts |= {
        "inference_mode": True, "base_model_name_or_path": base,
        "modules_to_save": sorted(set(config.modules_to_save or ())) or None,
    }  # fmt: skip
    (folder / ADAPTER_CONFIG).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def is_adapter(folder: Path) -> bool:
    """Whether a model's folder holds an adapter, with the model that it goes on in its folder BASE."""
    return (folder / ADAPTER_CONFIG).is_file() and (folder / BASE).is_dir()


def with_saved_adapter(base: Any, folder: Path) -> Any:
    """The model with the adapter in a folder, not merged, as it would be served."""
    loaded = _peft_class(base).from_pretrained(base, str(folder), autocast_adapter_dtype=False, torch_device="cpu")
    return without_spares(loaded.get_base_model())


def without_spares(model: Any) -> Any:
    """The model without the untrained copies that peft keeps of what trained as a whole."""
    for name, module in list(_with_spares(model)):
        model.set_submodule(name, module.modules_to_save["default"])
    return model


def _with_spares(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.utils import ModulesToSaveWrapper

    return ((name, module) for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper))
