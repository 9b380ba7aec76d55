"""Where a model's layers keep what can be left out of them: the units of a feed-forward, the heads of an attention.

Both are found by the names of linear layers, never guessed from sizes: a feed-forward may be as wide as the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from raydistill.errors import UserError

# The linear layers that give a feed-forward its units and the one that takes them, named from a layer on. Of these
# entries the first that a layer has in full is its own.
FEED_FORWARDS = (
    (("intermediate.dense",), "output.dense"),  # BERT, RoBERTa, ELECTRA, DeBERTa-v2, MPNet
    (("ffn.lin1",), "ffn.lin2"),  # DistilBERT
    (("mlp.Wi",), "mlp.Wo"),  # ModernBERT: gate and values in one, a half each
    (("mlp.c_fc",), "mlp.c_proj"),  # GPT-2, GPT-Neo
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),  # Llama, Qwen, Mistral, Gemma, EuroBERT, NomicBERT
    (("mlp.gate_up_proj",), "mlp.down_proj"),  # Phi-3, GLM: in one, a half each
    (("mlp.up_proj",), "mlp.down_proj"),  # Arcee, Nemotron
    (("mlp.fc1",), "mlp.fc2"),  # Phi
    (("fc1",), "fc2"),  # OPT
    (("mlp.fc_in",), "mlp.fc_out"),  # GPT-J
    (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),  # GPT-NeoX, Falcon
)
QUERIES, KEYS, VALUES, OUTPUT = "q_proj", "k_proj", "v_proj", "o_proj"
HEAD_NORMS = ("q_norm", "k_norm", "query_layernorm", "key_layernorm")


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward of every layer: paths of its linear layers, and how many units it has.

    A linear layer into the units gives one value for each, or two, in two halves, where a gate stands beside them.
    """

    ups: tuple[str, ...]
    down: str
    units: int

    @property
    def outlet(self) -> Outlet:
        return Outlet(self.down, self.units, 1)


@dataclass(frozen=True)
class Attention:
    """An attention of every layer: the path of its module, and its heads.

    Where heads share keys and values, the first `heads // key_value_heads` of them share the first, and so on.
    """

    path: str
    heads: int
    key_value_heads: int
    head_dim: int

    @property
    def outlet(self) -> Outlet:
        return Outlet(f"{self.path}.{OUTPUT}", self.heads, self.head_dim)


@dataclass(frozen=True)
class Outlet:
    """The linear layer through which units or heads reach the rest: `parts` of them, `width` values each, in order."""

    path: str
    parts: int
    width: int


def layer_stack(model: Any, count: int) -> str:
    """The path of a model's one stack of layers. Raises UserError when there is none or there are several."""
    found = layer_stacks(model, count)
    if len(found) != 1:
        raise UserError(
            f"student.init: teacher_layers: {type(model).__name__} has {len(found)} stacks of {count} layers,"
            " expected one."
            " Use init: config or init: pretrained"
        )
    return found[0]


def layer_stacks(model: Any, count: int) -> list[str]:
    """The paths of a model's stacks of so many layers; of most architectures there is one."""
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]


def layers_of(model: Any) -> Any:
    """The layers of a model, in order. Raises UserError when it has no one stack of them."""
    return model.get_submodule(layer_stack(model, model.config.num_hidden_layers))


def widths(linear: Any) -> tuple[int, int]:
    """How many values a linear layer takes and gives; GPT-2's Conv1D keeps its weight the other way round."""
    given, taken = linear.weight.shape
    return (given, taken) if is_transposed(linear) else (taken, given)


def is_transposed(linear: Any) -> bool:
    """Whether a linear layer's weight is (in, out) and not torch's (out, in)."""
    return type(linear).__name__ == "Conv1D"


def feed_forward(model: Any) -> FeedForward:
    """The feed-forward of a model's layers. Raises UserError when they have none that is known, or differ in it."""
    found = {_feed_forward(layer) for layer in layers_of(model)}
    block = found.pop()
    if block is None or found:
        raise UserError(
            f"student.feed_forward: {type(model).__name__} has no feed-forward that is known, the same in every layer."
            " Leave feed_forward out"
        )
    return block


def _feed_forward(layer: Any) -> FeedForward | None:
    modules = dict(layer.named_modules())
    for ups, down in FEED_FORWARDS:
        if all(_is_linear(modules.get(path)) for path in (*ups, down)):
            units, _ = widths(modules[down])
            fits = all(widths(modules[up])[1] in (units, 2 * units) for up in ups)
            return FeedForward(ups, down, units) if fits else None
    return None


def attention(model: Any) -> Attention:
    """The attention of a model's layers. Raises UserError when they have none whose heads can be told apart.

    Its module has q_proj, k_proj, v_proj and o_proj, with as many values as heads times their width, and beside them
    nothing but norms of queries and keys, one head wide; so Llama, Qwen, Mistral, Gemma, EuroBERT and NomicBERT.
    """
    config = model.config
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    found = {_attention(layer, heads, key_value_heads) for layer in layers_of(model)}
    block = found.pop()
    if block is None or found:
        raise UserError(
            f"student.num_heads: transformers cannot load a {config.model_type} with fewer heads of the same width:"
            " a head is hidden_size / num_heads wide there, or its place is not known."
            " Set student.feed_forward or fewer layers, and leave num_heads out"
        )
    return block


def _attention(layer: Any, heads: int, key_value_heads: int) -> Attention | None:
    names = (QUERIES, KEYS, VALUES, OUTPUT)
    found = [p for p, m in layer.named_modules() if all(_is_linear(getattr(m, name, None)) for name in names)]
    if len(found) != 1:
        return None
    module = layer.get_submodule(found[0])
    head_dim = widths(module.q_proj)[1] // heads
    expected = {QUERIES: heads, KEYS: key_value_heads, VALUES: key_value_heads}
    given = all(widths(getattr(module, name))[1] == count * head_dim for name, count in expected.items())
    others = {n.partition(".")[0]: p.shape for n, p in module.named_parameters() if n.partition(".")[0] not in names}
    if not given or widths(module.o_proj)[0] != heads * head_dim:
        return None
    if any(name not in HEAD_NORMS or shape != (head_dim,) for name, shape in others.items()):
        return None
    return Attention(found[0], heads, key_value_heads, head_dim)


def _is_linear(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear) or (module is not None and is_transposed(module))
