"""Several classifiers of one architecture as one model: each weight is a tensor with a leading member axis.

The members' logits are those that each has alone, from less work: padding is not computed, and of the last layer only
what the classifier reads, the first token of every row.

Shapes: M members, B batches of a step, N rows, S tokens of a batch's rows end to end, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from raydistill.fused.architectures import ARCHITECTURES, sources, tables, why_not_stacked
from raydistill.fused.attention import Attending, attention
from raydistill.fused.draws import Draws
from raydistill.fused.layout import Layout, gather
from raydistill.fused.operations import embedding, linear, norm


class Stack:
    """Models with their own weights and the same form. `parameters` have the members as their first dimension."""

    def __init__(self, models: Iterable[Any], *, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """`models` are read one after the other; dtype is what products are computed in. Raises ValueError."""
        held: list[dict[str, torch.Tensor]] = []
        model: Any = None
        for model in models:
            if reason := why_not_stacked(model):
                raise ValueError(reason)
            self._sources = sources(ARCHITECTURES[model.config.model_type], model)
            weights = dict(model.named_parameters())
            held.append(
                {name: torch.cat([weights[s].detach() for s in parts]) for name, parts in self._sources.items()}
            )
        self._device, self._dtype = device, dtype
        self.parameters = {
            name: torch.stack([h[name] for h in held]).float().to(device).requires_grad_() for name in held[0]
        }
        self._sizes = {s: len(p) for s, p in model.named_parameters()}
        self._form = _Form(model)

    @property
    def members(self) -> int:
        return len(self.parameters["output.weight"])

    def member_weights(self, number: int) -> dict[str, torch.Tensor]:
        """A member's weights by the names of its model, on the CPU."""
        return self.named({name: value[number] for name, value in self.parameters.items()})

    def load(self, number: int, weights: dict[str, torch.Tensor]) -> None:
        """Gives a member these weights, by the names of its model."""
        with torch.no_grad():
            for name, value in self.stacked(weights).items():
                self.parameters[name][number].copy_(value)

    def named(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What one member has for each parameter of the stack, by the names of its model, copied to the CPU."""
        found: dict[str, torch.Tensor] = {}
        for name, value in values.items():
            parts = value.detach().cpu().split([self._sizes[s] for s in self._sources[name]])
            found |= {source: part.clone() for source, part in zip(self._sources[name], parts, strict=True)}
        return found

    def stacked(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inverse of `named`."""
        return {name: torch.cat([values[s] for s in parts]) for name, parts in self._sources.items()}

    def logits(
        self, inputs: Sequence[dict[str, torch.Tensor]], batch_of: Sequence[int], seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """float32 logits of every member for its batch, M x N x K; with `seeds`, of each batch, with dropout.

        `batch_of` names every member's batch. All batches have as many rows.
        """
        form, dtype = self._form, self._dtype
        layout = Layout(list(inputs), form.counted_padding)
        shared = torch.tensor(batch_of if layout.batches > 1 else [0], device=self._device)
        draws = None if seeds is None else Draws(layout, list(seeds), shared, self._device, torch.float32)
        step = _Step(self, layout, shared, draws)
        first_MNI = step.encoded()
        if form.drops_first and draws:
            first_MNI = _times(first_MNI, draws.rows(form.head_dropout, form.width))
        dense_MNI = form.activation(step.linear("dense", first_MNI))
        if draws:
            dense_MNI = _times(dense_MNI, draws.rows(form.head_dropout, form.width))
        logits_MNK = linear(dense_MNI, self.parameters["output.weight"], self.parameters["output.bias"], dtype)
        return layout.restored(logits_MNK.float(), torch.tensor(batch_of, device=self._device))

    def keep(self, numbers: Sequence[int]) -> None:
        """Leaves these members alone, in this order."""
        chosen = torch.tensor(numbers, device=self._device)
        self.parameters = {name: p.detach()[chosen].requires_grad_() for name, p in self.parameters.items()}


class _Form:
    """What a stack needs of its models beside their weights."""

    def __init__(self, model: Any) -> None:
        architecture = ARCHITECTURES[model.config.model_type]
        before = tables(architecture, model)
        find = model.get_submodule
        self.layers = model.config.num_hidden_layers
        self.heads = model.config.num_attention_heads
        self.width = find(architecture.dense).in_features
        word, position = find(before["word"]), find(before["position"])
        self.word_padding, self.position_padding = word.padding_idx, position.padding_idx
        self.counted_padding = position.padding_idx if architecture.counts_positions else None
        self.embedding_width = word.embedding_dim
        self.has_types, self.has_projection = "token_type" in before, "projection" in before
        self.epsilon = find(before["norm"]).eps
        self.embedding_dropout = find(before["dropout"]).p
        names = [architecture.layer_names(number) for number in range(self.layers)]
        self.attention_dropout = [find(n.attention_dropout).p for n in names]
        self.out_dropout = [find(n.attention_out_dropout).p if n.attention_out_dropout else 0.0 for n in names]
        self.down_dropout = [find(n.down_dropout).p for n in names]
        self.layer_epsilon = find(names[0].output_norm).eps
        self.feed_forward = find(f"{architecture.base}.{architecture.layers}.0.{architecture.feed_forward_activation}")
        self.activation, self.drops_first = architecture.activation, architecture.drops_first
        self.head_dropout = find(architecture.dropout).p


class _Step:
    """One forward of a stack."""

    def __init__(self, stack: Stack, layout: Layout, batch_of_M: torch.Tensor, draws: Draws | None) -> None:
        self._parameters, self._form, self._dtype = stack.parameters, stack._form, stack._dtype
        self._layout, self._draws, self._device = layout, draws, stack._device
        heads, members = self._form.heads, stack.members
        self._keys = _on(gather(layout, members, heads, parts=2, first_only=False), self._device)
        self._queries = {
            first: _on(gather(layout, members, heads, parts=1, first_only=first), self._device)
            for first in ({True} if self._form.layers == 1 else {False, True})
        }
        chosen = batch_of_M.cpu()
        self._ids_MS, self._positions_MS = (v[chosen].to(self._device) for v in (layout.ids_BS, layout.positions_BS))
        self._masked = [m[chosen][:, :, None, None].to(self._device) for m in layout.masked_BNL]
        self._firsts_N = layout.starts_N.to(self._device)

    def linear(self, part: str, x_MSI: torch.Tensor) -> torch.Tensor:
        return linear(x_MSI, self._parameters[f"{part}.weight"], self._parameters[f"{part}.bias"], self._dtype)

    def _norm(self, part: str, x_MSI: torch.Tensor, epsilon: float) -> torch.Tensor:
        return norm(x_MSI, self._parameters[f"{part}.weight"], self._parameters[f"{part}.bias"], epsilon)

    def encoded(self) -> torch.Tensor:
        """What the last layer has for the first token of every row, M x N x I."""
        x_MSI = self._embedded()
        for number in range(self._form.layers):
            x_MSI = self._layer(number, x_MSI, last=number == self._form.layers - 1)
        return x_MSI

    def _embedded(self) -> torch.Tensor:
        form, parameters = self._form, self._parameters
        x_MSI = embedding(self._ids_MS, parameters["word.weight"], form.word_padding)
        if form.has_types:
            x_MSI = x_MSI + parameters["token_type.weight"][:, :1]
        x_MSI = x_MSI + embedding(self._positions_MS, parameters["position.weight"], form.position_padding)
        x_MSI = self._norm("norm", x_MSI, form.epsilon)
        if self._draws:
            x_MSI = _times(x_MSI, self._draws.tokens(form.embedding_dropout, form.embedding_width, first_only=False))
        return self.linear("projection", x_MSI) if form.has_projection else x_MSI

    def _layer(self, number: int, x_MSI: torch.Tensor, *, last: bool) -> torch.Tensor:
        form, draws = self._form, self._draws
        asking_MQI = x_MSI[:, self._firsts_N] if last else x_MSI
        dropped = draws.attention(form.attention_dropout[number], form.heads, first_only=last) if draws else None
        if dropped is not None:
            dropped = [d.to(self._dtype) for d in dropped]
        how = Attending(self._queries[last], self._keys, self._masked, dropped, (form.width // form.heads) ** -0.5)
        queries, keys_values = self.linear(f"{number}.query", asking_MQI), self.linear(f"{number}.key_value", x_MSI)
        y_MQI = self.linear(f"{number}.attention_out", attention(queries, keys_values, how, form.heads))
        if draws:
            y_MQI = _times(y_MQI, draws.tokens(form.out_dropout[number], form.width, first_only=last))
        x_MQI = self._norm(f"{number}.attention_norm", y_MQI + asking_MQI, form.layer_epsilon)
        y_MQI = self.linear(f"{number}.down", form.feed_forward(self.linear(f"{number}.up", x_MQI)))
        if draws:
            y_MQI = _times(y_MQI, draws.tokens(form.down_dropout[number], form.width, first_only=last))
        return self._norm(f"{number}.output_norm", y_MQI + x_MQI, form.layer_epsilon)


def _times(x: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
    return x if factors is None else x * factors


def _on(found: Any, device: torch.device) -> Any:
    return found if device.type == "cpu" else type(found)(found.into.to(device), found.back.to(device), found.shapes)
