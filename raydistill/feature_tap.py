"""What a Hugging Face encoder computes on the way, captured by hooks: embeddings, hidden states, attention, q, k and v.

Layers are the transformer's own, counted from 0. Hidden states are what each layer hands to the next, so that layer i's
are `hidden_states[i + 1]` of `output_hidden_states=True`, and the last layer's those after a final norm where there is
one.

Shapes: N rows, L tokens, W width, A attention heads.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from raydistill.targets import Features

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Architecture:
    """Where an encoder keeps what the attention computes. Paths are dotted names of modules.

    `layers` starts at the base model, `attention` at a layer, the others at the attention. `projections` are the linear
    layers of queries, keys and values, or one that gives all three side by side. `dropout` is the module that the
    probabilities go into, for an architecture that does not always give them back.
    """

    layers: str
    attention: str
    projections: tuple[str, ...]
    dropout: str | None = None


_BERT = Architecture("encoder.layer", "attention.self", ("query", "key", "value"))
# By model_type. With rotary positions (ModernBERT) the queries and keys are those before the rotation.
ARCHITECTURES = {
    "bert": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": Architecture("transformer.layer", "attention", ("q_lin", "k_lin", "v_lin")),
    "modernbert": Architecture("layers", "attn", ("Wqkv",)),
    "deberta-v2": Architecture(
        "encoder.layer", "attention.self", ("query_proj", "key_proj", "value_proj"), dropout="dropout"
    ),
}


class FeatureTap:
    """Captures a model's features while it is open; `take()` after each forward hands them over.

        with FeatureTap(student, embeddings=True, hidden=(0, 2), attention=(2,)) as tap:
            logits = student(**batch).logits
            features = tap.take()

    Embeddings and hidden states work for every encoder with one stack of layers, attention and projections for those in
    ARCHITECTURES. Attention probabilities exist only in transformers' "eager" attention: where they are asked for, the
    model is switched to it on entering, which is logged, and back on leaving. Hooks are removed on leaving and nothing
    is kept. The model is the Hugging Face model itself, not DeepSpeed's or DDP's wrapper around it.

    Raises ValueError for a layer that is not there, an architecture without a known place for what is asked for,
    nothing asked for, a model that cannot use eager attention, and, in the forward, attention probabilities after an
    active dropout (they no longer sum to 1) and the inside of a layer with gradient checkpointing.
    """

    def __init__(
        self,
        model: Any,
        *,
        embeddings: bool = False,
        hidden: Iterable[int] = (),
        attention: Iterable[int] = (),
        projections: Iterable[int] = (),
    ) -> None:
        """`hidden`, `attention`, `projections` (queries, keys and values): the layers whose features to capture."""
        self._model, self._base = model, model.base_model
        self._embeddings = embeddings
        self._hidden, self._attention, self._projections = (
            tuple(sorted(set(layers))) for layers in (hidden, attention, projections)
        )
        if not (embeddings or self._hidden or self._attention or self._projections):
            raise ValueError("feature tap: nothing to capture. Name embeddings, hidden, attention or projections")
        self._architecture = ARCHITECTURES.get(model.config.model_type)
        self._layers = self._find_layers()
        for layer in (*self._hidden, *self._attention, *self._projections):
            if not 0 <= layer < len(self._layers):
                raise ValueError(
                    f"feature tap: {type(model).__name__} has no layer {layer}, it has {len(self._layers)}, counted"
                    f" from 0 to {len(self._layers) - 1}"
                )
        self._handles: list[Any] = []
        self._attention_before: str | None = None
        self._partial: Features | None = None
        self._done: Features | None = None

    def __enter__(self) -> FeatureTap:
        if self._handles:
            raise RuntimeError("feature tap: already open")
        try:
            if self._attention:
                self._use_eager_attention()
            self._install()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._partial = self._done = None
        if self._attention_before is not None:
            self._model.set_attn_implementation(self._attention_before)
            self._attention_before = None

    def take(self) -> Features:
        """The features of the one forward since the last call, which are then forgotten here.

        Raises RuntimeError when there was none.
        """
        if self._done is None:
            raise RuntimeError("feature tap: no forward has run inside the tap since the last take()")
        features, self._done = self._done, None
        return features

    def _find_layers(self) -> Any:
        if self._architecture is not None:
            return self._base.get_submodule(self._architecture.layers)
        name, count = self._model.config.model_type, getattr(self._model.config, "num_hidden_layers", 0)
        if self._attention or self._projections:
            raise ValueError(
                f"feature tap: attention and projections of {name!r} are not known. Supported:"
                f" {', '.join(sorted(ARCHITECTURES))}"
            )
        stacks = [m for m in self._base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count > 0]
        if len(stacks) != 1 or getattr(self._model.config, "is_encoder_decoder", False):
            raise ValueError(f"feature tap: {name!r} has no one stack of {count} layers to take hidden states from")
        return stacks[0]

    def _use_eager_attention(self) -> None:
        before = self._model.config._attn_implementation
        if before == "eager":
            return
        self._model.set_attn_implementation("eager")
        if self._model.config._attn_implementation != "eager":
            raise ValueError(
                f"feature tap: attention of {type(self._model).__name__} cannot be switched from {before!r} to 'eager'."
                ' Load it with attn_implementation="eager"'
            )
        logger.info("%s: attention switched from %s to eager while it is tapped", type(self._model).__name__, before)
        self._attention_before = before

    def _install(self) -> None:
        add = self._handles.append
        add(self._base.register_forward_pre_hook(self._begin))
        for layer, module in enumerate(self._layers):
            # A layer's hidden states are the next one's input: DeBERTa-v2 adds a convolution between the first two.
            if layer - 1 in self._hidden or (layer == 0 and self._embeddings):
                add(module.register_forward_pre_hook(self._keep_input(layer - 1), with_kwargs=True))
            if layer in self._attention:
                self._tap_attention(layer, module)
            if layer in self._projections:
                self._tap_projections(layer, module)
        add(self._base.register_forward_hook(self._finish))

    def _begin(self, *_: object) -> None:
        if self._done is not None:
            raise RuntimeError("feature tap: a second forward before take() of the first one's features")
        self._partial = Features()

    def _finish(self, _module: Any, _inputs: Any, output: Any) -> None:
        features = self._now()
        last = len(self._layers) - 1
        if last in self._hidden:
            features.hidden_NLW[last] = output[0]  # the last hidden state, in a tuple and in a ModelOutput alike
        self._partial, self._done = None, features

    def _now(self) -> Features:
        assert self._partial is not None
        return self._partial

    def _keep_input(self, layer: int) -> Callable[..., None]:
        """Keeps the first input of a layer: the hidden states of the one before it, or, at -1, the embeddings."""

        def keep(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden_NLW = inputs[0] if inputs else named["hidden_states"]
            if layer < 0:
                self._now().embeddings_NLW = hidden_NLW
            else:
                self._now().hidden_NLW[layer] = hidden_NLW

        return keep

    def _tap_attention(self, layer: int, module: Any) -> None:
        assert self._architecture is not None
        attention = module.get_submodule(self._architecture.attention)

        def keep(probabilities_NALL: torch.Tensor) -> None:
            self._check_computed_once(module)
            rate = _attention_dropout(attention)
            if attention.training and rate > 0:
                raise ValueError(
                    f"feature tap: attention of {type(self._model).__name__} is captured after a dropout of {rate} and"
                    " no longer sums to 1. Build the model with attention dropout 0, or call eval()"
                )
            self._now().attention_NALL[layer] = probabilities_NALL

        if self._architecture.dropout is not None:
            dropout = attention.get_submodule(self._architecture.dropout)
            self._handles.append(dropout.register_forward_pre_hook(lambda _module, inputs: keep(inputs[0])))
        else:
            self._handles.append(attention.register_forward_hook(lambda _module, _inputs, output: keep(output[1])))

    def _tap_projections(self, layer: int, module: Any) -> None:
        assert self._architecture is not None
        attention, paths = module.get_submodule(self._architecture.attention), self._architecture.projections

        def keep(place: int, output: torch.Tensor) -> None:
            self._check_computed_once(module)
            kinds = (self._now().queries_NLW, self._now().keys_NLW, self._now().values_NLW)
            parts = output.chunk(len(kinds) // len(paths), dim=-1)
            for kind, part in zip(kinds[place:], parts, strict=False):
                kind[layer] = part

        for place, path in enumerate(paths):
            hook = functools.partial(lambda place, _module, _inputs, output: keep(place, output), place)
            self._handles.append(attention.get_submodule(path).register_forward_hook(hook))

    def _check_computed_once(self, layer: Any) -> None:
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            raise ValueError(
                "feature tap: attention and projections inside a layer with gradient checkpointing have no gradient."
                " Turn it off, or distil hidden states alone"
            )


def _attention_dropout(attention: Any) -> float:
    """The rate at which an architecture in the table drops attention probabilities, under either of its two names."""
    dropout = getattr(attention, "dropout", None)
    return float(dropout.p) if isinstance(dropout, torch.nn.Dropout) else float(attention.attention_dropout)
