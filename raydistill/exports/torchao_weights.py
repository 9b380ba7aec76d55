"""A classifier with the weights of its linear layers in 8 bits, by the torchao library.

Products are computed in the model's own precision, so that this saves memory and not arithmetic.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raydistill.errors import UserError
from raydistill.models.loading import load_quantised


def check_torchao() -> None:
    """Raises UserError when the package is not installed."""
    if find_spec("torchao") is None:
        raise UserError(
            "export.formats: torchao needs the package torchao. Install it: pip install 'raydistill[torchao]'"
        )


def write_torchao(model: Any, folder: Path) -> None:
    """Writes configuration and safetensors of the quantised model, which transformers loads as any other.

    Each row of a weight has its own scale. Raises UserError for a model that the library does not quantise.
    """
    from torchao.quantization import Int8WeightOnlyConfig, PerRow  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as whole:
        model.save_pretrained(whole)
        quantised = load_quantised(
            "export.formats: torchao-int8", Path(whole), Int8WeightOnlyConfig(granularity=PerRow())
        )
    quantised.save_pretrained(str(folder))
