"""A causal language model in two parts, its decoder and its output head, so that whole logits are never made.

Shapes: N positions that are learnt from, P packs of W tokens, V vocabulary, D width.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from raydistill.data.packing import pack_inputs
from raydistill.errors import UserError
from raydistill.losses.fused_linear import token_loss
from raydistill.losses.token_measures import chunks, own_measures, selected, teacher_measures
from raydistill.losses.token_objective import CrossTeacher, Teacher, TokenObjective
from raydistill.models.row_attention import with_rows
from raydistill.targets import OutputHead, RankTargets, SpanTargets

MODEL_PREFIX = "model."
CHUNK_NUMBERS = 1 << 24  # logits that live at once
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}  # of the largest logit
MEASURES = ("nll", "accuracy", "kl", "agreement")


def chunk_of(vocabulary: int) -> int:
    """How many positions are done with at once."""
    return max(16, CHUNK_NUMBERS // vocabulary)


def decoder_of(model: Any) -> Any:
    """What makes a model's last hidden states."""
    return getattr(model, model.base_model_prefix)


def head_scale(config: Any) -> float:
    """What an architecture multiplies its logits by: Granite divides by a number, Cohere multiplies."""
    return getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)


def output_head(model: Any, vocabulary: int) -> OutputHead:
    """The output head, cut to the tokens that the tokenizer knows: vocabularies are often padded."""
    linear, config = model.get_output_embeddings(), model.config
    bias = getattr(linear, "bias", None)
    return OutputHead(
        linear.weight.detach()[:vocabulary],
        None if bias is None else bias.detach()[:vocabulary],
        head_scale(config),
        getattr(config, "final_logit_softcapping", None),
    )


def hidden_states(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(P, W, D): what the output head is given. Rows are packed, or padded on the right."""
    return decoder_of(model)(**with_rows(model, inputs), use_cache=False).last_hidden_state


@torch.no_grad()
def check_parts(setting: str, model: Any, vocabulary: int) -> None:
    """Raises UserError for an architecture whose logits are not its decoder's times its head, that does not keep packed
    rows apart, or that looks ahead: two short rows in one pack, and the first one cut, must have the logits of each
    alone.
    """
    rows = [torch.arange(length).mul(7).add(length).remainder(vocabulary) for length in (5, 3)]
    rows.append(rows[0][:2])
    device, tolerance = next(model.parameters()).device, TOLERANCES[model.get_output_embeddings().weight.dtype]
    inputs, starts = pack_inputs([row.numpy().astype("int32") for row in rows], [[0, 1, 2]])
    inputs = {name: value.to(device) for name, value in inputs.items()}
    packed_NV = output_head(model, vocabulary).logits(hidden_states(model, inputs)[0])
    alone = [model(input_ids=row[None].to(device), use_cache=False).logits[0].float()[:, :vocabulary] for row in rows]
    alone.append(alone[0][:2])
    starts = [*starts.tolist(), int(starts[2])]
    for start, logits_NV in zip(starts, alone, strict=True):
        found_NV = packed_NV[start : start + len(logits_NV)]
        if (found_NV - logits_NV).abs().max() > tolerance * max(1.0, logits_NV.abs().max().item()):
            raise UserError(
                f"{setting}: {type(model).__name__} attends from one packed row to another, looks ahead, or makes its"
                " logits in a way that is not known. Choose another architecture, such as llama"
            )


class NextTokenModel(torch.nn.Module):
    """A language model in training: batches in, sums over positions out.

    The loss is computed in `forward` itself, within a module that holds the head's weight, so that under ZeRO-3 every
    weight is used while it is gathered.
    """

    def __init__(self, model: Any, vocabulary: int) -> None:
        super().__init__()
        self.model, self.head = model, _Head(model, vocabulary)

    def forward(
        self, inputs: dict[str, torch.Tensor], places_N: torch.Tensor, labels_N: torch.Tensor,
        teacher: Teacher | CrossTeacher | None = None, objective: TokenObjective | None = None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        """With an objective the loss's sum and its parts, one after the other; without one the sums of MEASURES."""
        hidden_PWD = hidden_states(self.model, inputs)
        return self.head(hidden_PWD.flatten(0, 1)[places_N], labels_N, teacher, objective)

    def gradient_checkpointing_enable(self) -> None:
        self.model.gradient_checkpointing_enable()


def shared_names(model: torch.nn.Module) -> frozenset[str]:
    """Further names of parameters that have one already, such as an output layer that is the embeddings."""
    first = {name for name, _ in model.named_parameters()}
    found = model.state_dict(keep_vars=True).items()
    return frozenset(name for name, value in found if isinstance(value, torch.nn.Parameter) and name not in first)


class _Head(torch.nn.Module):
    """The output layer of a model, whose weight it shares, with what is computed of its logits."""

    bias: torch.nn.Parameter | None

    def __init__(self, model: Any, vocabulary: int) -> None:
        super().__init__()
        linear = model.get_output_embeddings()
        self.weight = linear.weight
        self.register_parameter("bias", getattr(linear, "bias", None))
        self._vocabulary, self._scale = vocabulary, head_scale(model.config)
        self._softcap = getattr(model.config, "final_logit_softcapping", None)

    def forward(
        self, hidden_ND: torch.Tensor, labels_N: torch.Tensor, teacher: Teacher | CrossTeacher | None,
        objective: TokenObjective | None,
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        device = hidden_ND.device.type
        if torch.is_autocast_enabled(device):  # a norm's float32 would widen the largest product of all
            hidden_ND = hidden_ND.to(torch.get_autocast_dtype(device))
        hidden_ND = hidden_ND * self._scale if self._scale != 1 else hidden_ND
        weight_VD = self.weight[: self._vocabulary]
        bias_V = None if self.bias is None else self.bias[: self._vocabulary]
        chunk = chunk_of(self._vocabulary)
        with torch.autocast(device, enabled=False):
            if objective is None:
                assert not isinstance(teacher, SpanTargets | RankTargets), "of single positions they say nothing"
                head = OutputHead(weight_VD, bias_V, softcap=self._softcap)
                return self._measures(head, hidden_ND, labels_N, teacher, chunk)
            loss = token_loss(
                objective, hidden_ND, weight_VD, labels_N, teacher, bias_V=bias_V, softcap=self._softcap, chunk=chunk
            )
        return loss.sum, *(loss.parts[name] for name in objective.part_names)

    @staticmethod
    def _measures(
        head: OutputHead, hidden_ND: torch.Tensor, labels_N: torch.Tensor, teacher: Teacher | None, chunk: int
    ) -> tuple[torch.Tensor, ...]:
        sums = {name: torch.zeros((), dtype=torch.float64, device=hidden_ND.device) for name in MEASURES}
        for cut, logits_CV in chunks(len(labels_N), lambda cut: head.logits(hidden_ND[cut]), chunk):
            found = own_measures(logits_CV, labels_N[cut])
            if teacher is not None:
                found |= teacher_measures(logits_CV, selected(teacher, cut))
            for name in MEASURES:
                if name in found:
                    sums[name] += found[name].sum()
        return tuple(sums.values())


def model_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's own weights among those of a NextTokenModel, by the names that the model has for them."""
    return {n.removeprefix(MODEL_PREFIX): v for n, v in weights.items() if n.startswith(MODEL_PREFIX)}


def head_facts(folder: Path) -> dict[str, Any]:
    """What must be known of the model in a folder, beside its head's weight, to make its logits."""
    config = json.loads((folder / "config.json").read_text())
    return {"head_scale": head_scale(SimpleNamespace(**config)), "head_softcap": config.get("final_logit_softcapping")}
