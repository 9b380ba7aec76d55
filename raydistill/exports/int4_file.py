"""A model whose linear layers have weights of 4 bits, by the torchao library, in a safetensors file of plain numbers.

torchao's 4-bit tensors that transformers can save are packed for accelerators, and those for CPUs are packed for the
processor at hand or take a byte a weight. So the plain numbers are written, two to a byte, and torchao's tensors are
made of them again where the file is loaded (`int4_loading.py`, which goes along as `load.py`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from raydistill.errors import UserError
from raydistill.exports import int4_loading
from raydistill.exports.int4_loading import GROUP, INT4_FILE, load_int4
from raydistill.exports.torchao_weights import check_torchao_model

LOADER = "load.py"
Tensors = dict[str, torch.Tensor]


def check_int4_model(model: Any) -> None:
    """Raises UserError for a model, which may be without weights, none of whose layers can be written in 4 bits."""
    check_torchao_model("torchao-int4", model)
    if not any(_fits(value) for value in _linear_weights(model).values()):
        raise UserError(
            f"export.formats: torchao-int4: no linear layer of {type(model).__name__} has a multiple of {GROUP} inputs."
            " Use torchao-int8"
        )


def _fits(weight_NK: torch.Tensor) -> bool:
    return weight_NK.shape[1] % GROUP == 0


def _tables(model: Any) -> dict[int, torch.Tensor]:
    """The weights, by their id, of embeddings and of the layer over a vocabulary."""
    found = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    output = model.get_output_embeddings()
    return {id(module.weight): module.weight for module in [*found, *([] if output is None else [output])]}


def _linear_weights(model: Any) -> dict[int, torch.Tensor]:
    tables, layers = _tables(model), [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return {id(layer.weight): layer.weight for layer in layers if id(layer.weight) not in tables}


def write_int4(model: Any, folder: Path) -> None:
    """Writes configuration, weights and the program that loads them. Raises what `check_int4_model` does."""
    check_int4_model(model)
    linear, tables = _linear_weights(model), _tables(model)
    held, seen = Tensors(), set[int]()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        weight = value.detach().cpu().contiguous()
        if id(value) in linear and _fits(weight):
            held |= _four_bits(name, weight.float())
        elif id(value) in linear or id(value) in tables:
            held |= _eight_bits(name, weight.float())
        else:
            held[name] = weight
    save_file(held, folder / INT4_FILE, metadata={"format": "pt"})
    model.config.save_pretrained(str(folder))
    if model.can_generate():
        model.generation_config.save_pretrained(str(folder))
    shutil.copyfile(int4_loading.__file__, folder / LOADER)


def _four_bits(name: str, weight_NK: torch.Tensor) -> Tensors:
    from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType  # pyright: ignore[reportMissingImports]

    kind = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
    made = IntxUnpackedToInt8Tensor.from_hp(weight_NK, (1, GROUP), kind, mapping_type=MappingType.ASYMMETRIC)
    columns = (made.qdata + 8).to(torch.uint8)
    return {
        f"{name}.int4": columns[:, 0::2] | columns[:, 1::2] << 4,
        f"{name}.scale": made.scale.to(torch.bfloat16),
        f"{name}.zero": made.zero_point,
    }


def _eight_bits(name: str, weight_NK: torch.Tensor) -> Tensors:
    from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType  # pyright: ignore[reportMissingImports]

    made = IntxUnpackedToInt8Tensor.from_hp(
        weight_NK, (1, weight_NK.shape[1]), torch.int8, mapping_type=MappingType.SYMMETRIC
    )
    return {f"{name}.int8": made.qdata, f"{name}.scale": made.scale.float()}


def read_int4(setting: str, model: Any, folder: Path) -> Any:
    """A model, made from the folder's configuration, with its weights. Raises UserError when they do not fit."""
    try:
        return load_int4(model, folder / INT4_FILE)
    except ValueError as error:
        raise UserError(f"{setting}: {error}") from None
