"""A student whose frozen weights are kept in 4 bits, for adapters on a model that would not fit otherwise.

QLoRA, Dettmers et al. 2023, arXiv:2305.14314, section 3: NormalFloat4 weights with double quantisation, products in
bfloat16. By transformers and bitsandbytes, on a GPU alone.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from typing import Any

import torch

from raydistill.adapters import head_modules
from raydistill.errors import UserError


def check_quantising() -> None:
    """Raises UserError when the library is not installed. Whether workers have a GPU is for the cluster to say."""
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "student.lora.quantised: nf4 needs the package bitsandbytes, and a GPU. Install it:"
            " pip install 'raydistill[qlora]', or remove the setting"
        )


def quantised(model: Any, device: torch.device) -> Any:
    """The model with the linear layers below its head in NF4, on this device; what else it has stays in float32."""
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=head_modules(model),
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="raydistill-") as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(
            folder, quantization_config=how, device_map={"": device}, dtype=torch.float32, local_files_only=True
        )


def dequantised(model: Any) -> Any:
    """The model with the float32 weights that its 4 bits stand for, on the CPU: what adapters are merged into."""
    return model.dequantize(dtype=torch.float32).cpu()
