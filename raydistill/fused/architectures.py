"""The encoders that can be stacked, by the names that their parts have in transformers.

BERT, RoBERTa, ELECTRA and DistilBERT compute the same but for names, heads and where there is dropout; XLM-RoBERTa and
CamemBERT are RoBERTa under other names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Layer:
    """The names of a layer's modules; None for a dropout that an architecture does not have."""

    query: str
    key: str
    value: str
    attention_dropout: str
    attention_out: str
    attention_out_dropout: str | None
    attention_norm: str
    up: str
    down: str
    down_dropout: str
    output_norm: str


_OF_BERT = Layer(
    query="attention.self.query", key="attention.self.key", value="attention.self.value",
    attention_dropout="attention.self.dropout", attention_out="attention.output.dense",
    attention_out_dropout="attention.output.dropout", attention_norm="attention.output.LayerNorm",
    up="intermediate.dense", down="output.dense", down_dropout="output.dropout", output_norm="output.LayerNorm",
)  # fmt: skip
_OF_DISTILBERT = Layer(
    query="attention.q_lin", key="attention.k_lin", value="attention.v_lin", attention_dropout="attention.dropout",
    attention_out="attention.out_lin", attention_out_dropout=None, attention_norm="sa_layer_norm",
    up="ffn.lin1", down="ffn.lin2", down_dropout="ffn.dropout", output_norm="output_layer_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """The names of an encoder's modules, and what its classifier does with the first token."""

    base: str
    dense: str
    dropout: str
    output: str
    activation: Callable[[torch.Tensor], torch.Tensor]
    drops_first: bool  # also what goes into the head
    layers: str = "encoder.layer"
    layer: Layer = _OF_BERT
    feed_forward_activation: str = "intermediate.intermediate_act_fn"
    counts_positions: bool = False  # from the padding token's id on, as RoBERTa does

    def layer_names(self, number: int) -> Layer:
        """A layer's modules by their whole names."""
        prefix = f"{self.base}.{self.layers}.{number}."
        return Layer(**{part: name and prefix + name for part, name in vars(self.layer).items()})


_ROBERTA = Architecture(
    base="roberta", dense="classifier.dense", dropout="classifier.dropout", output="classifier.out_proj",
    activation=torch.tanh, drops_first=True, counts_positions=True,
)  # fmt: skip
ARCHITECTURES = {
    "bert": Architecture(
        base="bert", dense="bert.pooler.dense", dropout="dropout", output="classifier", activation=torch.tanh,
        drops_first=False,
    ),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": replace(
        _ROBERTA, base="electra", activation=torch.nn.functional.gelu, counts_positions=False
    ),
    "distilbert": Architecture(
        base="distilbert", dense="pre_classifier", dropout="dropout", output="classifier", activation=torch.relu,
        drops_first=False, layers="transformer.layer", layer=_OF_DISTILBERT, feed_forward_activation="ffn.activation",
    ),
}  # fmt: skip


def tables(architecture: Architecture, model: Any) -> dict[str, str]:
    """The modules before the first layer that this model has, by their parts."""
    base = architecture.base
    names = {
        "word": "embeddings.word_embeddings", "position": "embeddings.position_embeddings",
        "token_type": "embeddings.token_type_embeddings", "norm": "embeddings.LayerNorm",
        "dropout": "embeddings.dropout", "projection": "embeddings_project",
    }  # fmt: skip
    present = {name for name, _ in model.named_modules()}
    return {part: f"{base}.{name}" for part, name in names.items() if f"{base}.{name}" in present}


def sources(architecture: Architecture, model: Any) -> dict[str, tuple[str, ...]]:
    """Every parameter of the stack, and the model's parameters that it holds one after the other."""
    found: dict[str, tuple[str, ...]] = {}
    for part, name in tables(architecture, model).items():
        for kind in {"dropout": (), "norm": ("weight", "bias"), "projection": ("weight", "bias")}.get(
            part, ("weight",)
        ):
            found[f"{part}.{kind}"] = (f"{name}.{kind}",)
    for number in range(model.config.num_hidden_layers):
        names = architecture.layer_names(number)
        parts = {
            "query": (names.query,), "key_value": (names.key, names.value), "attention_out": (names.attention_out,),
            "attention_norm": (names.attention_norm,), "up": (names.up,), "down": (names.down,),
            "output_norm": (names.output_norm,),
        }  # fmt: skip
        for part, modules in parts.items():
            for kind in ("weight", "bias"):
                found[f"{number}.{part}.{kind}"] = tuple(f"{module}.{kind}" for module in modules)
    for part in ("dense", "output"):
        for kind in ("weight", "bias"):
            found[f"{part}.{kind}"] = (f"{getattr(architecture, part)}.{kind}",)
    return found


def why_not_stacked(model: Any) -> str | None:
    """Why models like this one cannot be stacked; None where they can."""
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        return f"models of the type {kind} cannot be stacked, only {', '.join(ARCHITECTURES)}"
    if getattr(model.config, "is_decoder", False):
        return "its attention looks back only"
    held = {name for names in sources(ARCHITECTURES[kind], model).values() for name in names}
    theirs = set(model.state_dict())
    if held != theirs:
        return f"its {kind} has other weights than the usual ones, such as {sorted(held ^ theirs)[0]}"
    if frozen := next((name for name, p in model.named_parameters() if not p.requires_grad), None):
        return f"its {frozen} does not train"
    return None
