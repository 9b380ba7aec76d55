"""Tiny classifiers of several architectures, and a batch for them.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from typing import Any

import torch

from raydistill.adapters import add_adapters
from raydistill.config.student import Lora
from raydistill.tickets import CATEGORIES

LABELS = sorted(CATEGORIES)
SMALL = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 40, "num_labels": 5, "pad_token_id": 1,
}  # fmt: skip
ENCODERS = {
    "bert": {},
    "roberta": {},
    "distilbert": {"hidden_dim": 32},
    "electra": {"embedding_size": 16},
    "deberta-v2": {},
    "gpt2": {"n_inner": 32, "bos_token_id": 2, "eos_token_id": 2},
}


def tiny(architecture: str, **changes: Any) -> Any:
    """A classifier of 4 layers with weights of size 0.3, so that no layer is near the identity."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **(SMALL | ENCODERS.get(architecture, {}) | changes))
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def with_trained_adapters(model: Any, **settings: Any) -> Any:
    """The model as a PeftModel whose trained parameters have moved."""
    adapted = add_adapters(model, Lora(**settings), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.requires_grad)
    return adapted


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 64, (6, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([[9], [3], [5], [9], [1], [7]])).long()
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits
