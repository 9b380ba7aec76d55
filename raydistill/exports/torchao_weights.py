"""A model with the weights of its linear layers in 8 bits, by the torchao library.

Products are computed in the model's own precision, so that this saves memory and not arithmetic.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raydistill.adapters import is_language_model, linear_layers
from raydistill.errors import UserError
from raydistill.models.loading import load_quantised
from raydistill.students.blocks import is_transposed


def check_torchao() -> None:
    """Raises UserError when the package is not installed."""
    if find_spec("torchao") is None:
        raise UserError(
            "export.formats: torchao needs the package torchao. Install it: pip install 'raydistill[torchao]'"
        )


def check_torchao_model(format_name: str, model: Any) -> None:
    """Raises UserError for a model, which may be without weights, whose layers the library would leave as they are."""
    if any(is_transposed(model.get_submodule(name)) for name in linear_layers(model)):
        raise UserError(
            f"export.formats: {format_name}: the layers of {type(model).__name__} are no linear layers of torch and"
            " stay as they are. Use safetensors-bf16"
        )


def write_torchao(model: Any, folder: Path) -> None:
    """Writes configuration and safetensors of the quantised model, which transformers loads as any other.

    Each row of a weight has its own scale. Raises UserError for a model that the library does not quantise.
    """
    from torchao.quantization import Int8WeightOnlyConfig, PerRow  # pyright: ignore[reportMissingImports]

    check_torchao_model("torchao-int8", model)
    with tempfile.TemporaryDirectory() as whole:
        model.save_pretrained(whole)
        quantised = load_quantised(
            "export.formats: torchao-int8", Path(whole), Int8WeightOnlyConfig(granularity=PerRow()),
            language=is_language_model(model),
        )  # fmt: skip
    quantised.save_pretrained(str(folder))
