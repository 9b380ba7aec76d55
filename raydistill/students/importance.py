"""How much a teacher's units and heads matter, and which of them a narrower student keeps.

Shapes: N rows, L tokens, P parts (units of a feed-forward, or heads of an attention), W values of a part, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from raydistill.errors import UserError
from raydistill.students.blocks import OUTPUT, VALUES, Attention, FeedForward, Outlet, is_transposed, layers_of

Inputs = dict[str, torch.Tensor]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def logits_of(model: Any, inputs: Inputs) -> torch.Tensor:
    """(N, K)."""
    return model(**inputs).logits


def taylor(
    model: Any,
    batches: Iterable[tuple[Inputs, torch.Tensor]],
    outlets: Sequence[Outlet],
    *,
    loss_sum: Loss,
    outputs: Callable[[Any, Inputs], torch.Tensor] = logits_of,
) -> list[list[torch.Tensor]]:
    """The first-order importance of every part: for each outlet and layer a tensor (P) in float64, of length 1.

    A part's importance is the mean over rows of |dL/dg|, where the gate g = 1 multiplies all that the part gives at the
    row's tokens, padding apart: what the row's loss L would lose, to the first order, without the part. Of heads by
    Michel et al. 2019 (arXiv:1905.10650, section 4.1, with its norm over each layer), of units the same criterion as in
    Molchanov et al. 2019 (arXiv:1906.10771, section 3, on gates) and DynaBERT (arXiv:2004.04037, section 3.1).

    `batches` are inputs with an attention mask (N, L), and targets for `loss_sum`, which takes what `outputs` makes of
    the inputs, by default logits (N, K), and sums over rows. The model is left in eval mode. Raises UserError for
    gradients that are not finite.
    """
    layers, rows = list(layers_of(model.eval())), 0
    sums = [[torch.zeros(outlet.parts, dtype=torch.float64) for _ in layers] for outlet in outlets]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 0  # the gates take all tokens at once; what is computed stays the same
    try:
        for inputs, targets in batches:
            rows += len(targets)
            device = next(model.parameters()).device
            inputs, targets = {name: value.to(device) for name, value in inputs.items()}, targets.to(device)
            with _gated(layers, outlets, inputs["attention_mask"]) as gates, torch.enable_grad():
                loss = loss_sum(outputs(model, inputs), targets)
                gradients = torch.autograd.grad(loss, list(gates.values()))
            for number, gradient_NP in zip(gates, gradients, strict=True):
                outlet, layer = divmod(number, len(layers))
                sums[outlet][layer] += gradient_NP.abs().double().sum(dim=0).cpu()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    assert rows, "no rows to measure importance on"
    if not all(bool(total.isfinite().all()) for layers_sums in sums for total in layers_sums):
        raise UserError(
            "student.importance: taylor: the teacher's gradients are not finite. Use student.importance=magnitude"
        )
    return [[_normalised(total / rows) for total in layers_sums] for layers_sums in sums]


@contextlib.contextmanager
def _gated(
    layers: Sequence[Any], outlets: Sequence[Outlet], mask_NL: torch.Tensor
) -> Iterator[dict[int, torch.Tensor]]:
    """The gates (N, P) of a forward in here, each row's own, by their numbers: outlet times layers plus layer."""
    gates: dict[int, torch.Tensor] = {}
    is_token_NL11 = mask_NL.bool()[:, :, None, None]

    def gated(number: int, outlet: Outlet) -> Callable[..., tuple[torch.Tensor, ...]]:
        def hook(_module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            assert number not in gates, f"{outlet.path} ran twice in one forward"
            values = arguments[0]
            gate_NP = values.new_ones(len(is_token_NL11), outlet.parts).requires_grad_()
            gates[number] = gate_NP
            parts_NLPW = values.reshape(*is_token_NL11.shape[:2], outlet.parts, outlet.width)
            passed = torch.where(is_token_NL11, parts_NLPW * gate_NP[:, None, :, None], parts_NLPW)
            return (passed.reshape(values.shape), *arguments[1:])

        return hook

    handles = [
        layer.get_submodule(outlet.path).register_forward_pre_hook(gated(place * len(layers) + number, outlet))
        for place, outlet in enumerate(outlets)
        for number, layer in enumerate(layers)
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def unit_magnitudes(model: Any, block: FeedForward) -> list[torch.Tensor]:
    """The size of every unit's weights: for each layer a tensor (P) in float64, of length 1.

    The product of the Euclidean norms of what goes into the unit (its row of each linear layer, with its bias; a gate's
    row is one of them) and of what comes out of it (its column). A unit that nothing goes out of has 0. The magnitude
    criterion of Han et al. 2015 (arXiv:1506.02626, section 3) for whole units instead of single weights.
    """
    found = []
    for layer in layers_of(model):
        size_P = _size_out(layer.get_submodule(block.down), block.units)
        for path in block.ups:
            size_P = size_P * _size_in(layer.get_submodule(path), block.units, 1)
        found.append(_normalised(size_P))
    return found


def head_magnitudes(model: Any, block: Attention) -> list[torch.Tensor]:
    """The size of every head's weights, as `unit_magnitudes`: of its values times that of its share of the output.

    Queries and keys decide where a head looks, not how much it gives, and do not count.
    """
    found, group = [], block.heads // block.key_value_heads
    for layer in layers_of(model):
        module = layer.get_submodule(block.path)
        values_P = _size_in(getattr(module, VALUES), block.key_value_heads, block.head_dim).repeat_interleave(group)
        found.append(_normalised(values_P * _size_out(getattr(module, OUTPUT), block.heads)))
    return found


@torch.no_grad()
def _size_in(linear: Any, parts: int, width: int) -> torch.Tensor:
    """The norm (P) of each part's rows and biases; of a layer with two halves the product of both norms."""
    weight = (linear.weight.T if is_transposed(linear) else linear.weight).double()
    rows = weight if linear.bias is None else torch.cat([weight, linear.bias.double()[:, None]], dim=1)
    return rows.reshape(-1, parts, width * rows.shape[1]).norm(dim=2).prod(dim=0)


@torch.no_grad()
def _size_out(linear: Any, parts: int) -> torch.Tensor:
    """The norm (P) of each part's columns."""
    columns = (linear.weight if is_transposed(linear) else linear.weight.T).double()
    return columns.reshape(parts, -1).norm(dim=1)


def _normalised(values_P: torch.Tensor) -> torch.Tensor:
    length = values_P.norm()
    return values_P / length if length > 0 else values_P


def most_important(importance_P: torch.Tensor, count: int, *, groups: int = 1) -> torch.Tensor:
    """The numbers of the `count` most important parts, rising; the same number of each group of parts in a row.

    Of equally important ones the first are kept.
    """
    of_group = importance_P.reshape(groups, -1)
    kept = torch.argsort(of_group, dim=1, descending=True, stable=True)[:, : count // groups]
    return (kept + of_group.shape[1] * torch.arange(groups)[:, None]).flatten().sort().values
