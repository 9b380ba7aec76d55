"""Puts weights of 4 bits, as `int4.safetensors` holds them, into a model of transformers: needs torch and torchao.

Of a linear layer's weight W (N, K), in groups of 32 columns, the file holds

    W.int4   uint8 (N, K / 2): two columns in a byte, the first in its lower half, each 0 to 15
    W.scale  bfloat16 (N, K / 32)
    W.zero   int8 (N, K / 32); a weight is scale x (int4 - 8 - zero)

and of a table (embeddings, the layer over a vocabulary) and of a layer whose K is no multiple of 32

    W.int8   int8 (N, K)
    W.scale  float32 (N, 1); a weight is scale x int8

All else stands there under its own name as it is. What has 4 bits becomes a tensor of torchao, which keeps a byte for
each weight and computes in float32; what has 8 becomes float32.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

INT4_FILE = "int4.safetensors"
GROUP = 32  # columns that share a scale and a zero


def load_int4(model: Any, path: Path) -> Any:
    """The model, made from its configuration, with the weights in the file, in eval mode.

    Raises ValueError when the file and the model do not have the same weights.
    """
    held = load_file(path)
    four = sorted(name.removesuffix(".int4") for name in held if name.endswith(".int4"))
    eight = sorted(name.removesuffix(".int8") for name in held if name.endswith(".int8"))
    values = {name: held.pop(f"{name}.int8") * held.pop(f"{name}.scale") for name in eight}
    packed = {name: _of_torchao(*(held.pop(f"{name}.{part}") for part in ("int4", "scale", "zero"))) for name in four}
    values |= held
    own = model.state_dict(keep_vars=True)
    _check(own, values | packed, path)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    for name, value in packed.items():
        layer, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(layer), attribute, torch.nn.Parameter(value, requires_grad=False))
    return model.eval()


def _of_torchao(packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor  # pyright: ignore[reportMissingImports]

    kind = torch.int4  # pyright: ignore[reportAttributeAccessIssue]
    columns = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    return IntxUnpackedToInt8Tensor(
        qdata=columns.to(torch.int8) - 8, scale=scale.float(), zero_point=zero, target_dtype=kind,
        block_size=(1, GROUP), dtype=torch.float32, activation_quantization=None,
    )  # fmt: skip


def _check(own: dict[str, torch.Tensor], found: dict[str, torch.Tensor], path: Path) -> None:
    """Weights that the model has twice, tied, stand in the file once."""
    given = {id(own[name]) for name in found if name in own}
    wrong = [name for name, value in found.items() if name not in own or own[name].shape != value.shape]
    if wrong := wrong + [name for name, value in own.items() if id(value) not in given]:
        raise ValueError(f"{path}: {wrong[0]} is not as in the model. Give the configuration beside the file")
