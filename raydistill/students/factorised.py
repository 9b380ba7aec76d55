"""Embeddings as the product of a narrow table and a projection (ALBERT, arXiv:1909.11942, section 3.1).

DeBERTa-v2's configuration has an `embedding_size`: tables of that width, and a projection to the hidden width before
the first norm. Without relative attention its encoder computes what those of BERT, RoBERTa, DistilBERT and ELECTRA do,
and with their head's activation its head what theirs do. So a student of one of these is written as a DeBERTa-v2 with
the same weights, and its embeddings are factorised there; it loads without this package.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch

from raydistill.errors import UserError
from raydistill.models.configuration import position_offset
from raydistill.students.sizes import FEED_FORWARD_NAMES

SETTING = "student.embedding_size"
TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
ROWS_AT_ONCE = 1 << 14  # in float64


@dataclass(frozen=True)
class Form:
    """How an architecture's weights are named, as (pattern, DeBERTa-v2's name), and what its head computes.

    `activation`, `dropout`, `attention_dropout` and `head_dropout` are the configuration's names for them.
    `drops_input` says whether the head has a dropout before its first layer too.
    """

    names: tuple[tuple[str, str], ...]
    head_activation: str
    drops_input: bool
    activation: str = "hidden_act"
    dropout: str = "hidden_dropout_prob"
    attention_dropout: str = "attention_probs_dropout_prob"
    head_dropout: str = "classifier_dropout"


_ATTENTION = (r"\.attention\.self\.(query|key|value)\.", r".attention.self.\1_proj.")
_TWO_LAYERS = ((r"^classifier\.dense\.", "pooler.dense."), (r"^classifier\.out_proj\.", "classifier."))
_ROBERTA = Form(((r"^roberta\.", "deberta."), _ATTENTION, *_TWO_LAYERS), "tanh", drops_input=True)
FORMS = {
    "bert": Form(
        ((r"^bert\.pooler\.", "pooler."), (r"^bert\.", "deberta."), _ATTENTION), "tanh", drops_input=False
    ),
    "camembert": _ROBERTA,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": Form(((r"^electra\.", "deberta."), _ATTENTION, *_TWO_LAYERS), "gelu", drops_input=True),
    "distilbert": Form(
        (
            (r"^distilbert\.transformer\.", "deberta.encoder."),
            (r"^distilbert\.", "deberta."),
            (r"\.attention\.([qkv])_lin\.", r".attention.self.\1_proj."),
            (r"\.self\.q_proj\.", ".self.query_proj."),
            (r"\.self\.k_proj\.", ".self.key_proj."),
            (r"\.self\.v_proj\.", ".self.value_proj."),
            (r"\.attention\.out_lin\.", ".attention.output.dense."),
            (r"\.sa_layer_norm\.", ".attention.output.LayerNorm."),
            (r"\.ffn\.lin1\.", ".intermediate.dense."),
            (r"\.ffn\.lin2\.", ".output.dense."),
            (r"\.output_layer_norm\.", ".output.LayerNorm."),
            (r"^pre_classifier\.", "pooler.dense."),
        ),
        "relu", drops_input=False, activation="activation", dropout="dropout",
        attention_dropout="attention_dropout", head_dropout="seq_classif_dropout",
    ),
}  # fmt: skip


def factorised(model: Any, size: int) -> Any:
    """The classifier as a DeBERTa-v2 with embeddings of this size; with that of the hidden width the same function.

    Raises UserError for an architecture that cannot be written so, and for a size above the hidden width.
    """
    from transformers import DebertaV2ForSequenceClassification

    width = model.config.hidden_size
    if size > width:
        raise UserError(f"{SETTING}: found {size}, the student's width is {width}. Set it below that")
    config, weights = _widened(model) if model.config.model_type == "deberta-v2" else _as_deberta(model)
    config.embedding_size = size
    if size < width:
        tables = {name: weights[key] for name in TABLES if (key := _key(name)) in weights}
        basis_WE = _basis(tables, size)
        # Their means are taken away here too: the directions may hold a part of theirs where the tables' rank is low.
        weights |= {_key(name): _centred(table_VW) @ basis_WE for name, table_VW in tables.items()}
        weights[_key("embed_proj")] = basis_WE
    try:
        made = DebertaV2ForSequenceClassification(config)
        made.load_state_dict(weights)
    except (ValueError, RuntimeError, AssertionError):
        raise _refusal(model) from None
    return made


def _key(name: str) -> str:
    return f"deberta.embeddings.{name}.weight"


def _refusal(model: Any) -> UserError:
    known = ", ".join(sorted((*FORMS, "deberta-v2")))
    return UserError(
        f"{SETTING}: the embeddings of this {type(model).__name__} cannot be factorised. Those of {known} can, unless"
        " they are of another size already. Remove embedding_size"
    )


def _basis(tables: dict[str, torch.Tensor], size: int) -> torch.Tensor:
    """The orthonormal directions W x E that keep most of the sums of a token's and a position's embedding.

    They are the first right singular vectors of the matrix with the sum of every token at every position in a row,
    without each row's mean, which the norm behind takes away: of all projections to E dimensions the one with the
    smallest error in the Frobenius norm (Eckart and Young 1936). Its W x W second moment follows from the two tables'.
    """
    words_VW = tables["word_embeddings"]
    positions_PW = tables.get("position_embeddings", torch.zeros_like(words_VW[:1]))
    types_TW = tables.get("token_type_embeddings", torch.zeros_like(words_VW[:1]))
    words_WW, word_W = _moments(words_VW, types_TW[0])  # a single text is of the first type
    positions_WW, position_W = _moments(positions_PW, torch.zeros_like(types_TW[0]))
    cross_WW = torch.outer(word_W, position_W)
    basis_WE = torch.linalg.eigh(words_WW + positions_WW + cross_WW + cross_WW.T).eigenvectors[:, -size:].flip(1)
    signs_E = basis_WE.gather(0, basis_WE.abs().argmax(dim=0)[None]).sign()  # else they are the library's choice
    return (basis_WE * signs_E).float()


def _moments(table_VW: torch.Tensor, shift_W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of x xT and of x, in float64, over the rows of a table, shifted and less their own mean."""
    width = table_VW.shape[1]
    second_WW, first_W = torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    for rows_NW in table_VW.split(ROWS_AT_ONCE):
        rows_NW = _centred(rows_NW.double() + shift_W.double())
        second_WW += rows_NW.T @ rows_NW
        first_W += rows_NW.sum(dim=0)
    return second_WW / len(table_VW), first_W / len(table_VW)


def _centred(rows_NW: torch.Tensor) -> torch.Tensor:
    return rows_NW - rows_NW.mean(dim=1, keepdim=True)


def _widened(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """A DeBERTa-v2's configuration and weights, its tables as wide as its layers."""
    weights = dict(model.state_dict())
    projection_WE = weights.pop(_key("embed_proj"), None)
    if projection_WE is not None:
        weights |= {_key(n): weights[_key(n)] @ projection_WE.T for n in TABLES if _key(n) in weights}
    return copy.deepcopy(model.config), weights


def _as_deberta(model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The configuration and weights of the same classifier as a DeBERTa-v2."""
    from transformers import DebertaV2Config

    old = model.config
    form = FORMS.get(old.model_type)
    if form is None or getattr(old, "position_embedding_type", None) not in (None, "absolute"):
        raise _refusal(model)
    weights = {_renamed(name, form): value for name, value in model.state_dict().items()}
    offset = position_offset(old.model_type, old.pad_token_id)
    weights[_key("position_embeddings")] = weights[_key("position_embeddings")][offset:]
    dropout = getattr(old, form.dropout)
    head_dropout = getattr(old, form.head_dropout)
    head_dropout = dropout if head_dropout is None else head_dropout
    ids = {name: value for name, value in old.to_dict().items() if name.endswith("_token_id")}
    config = DebertaV2Config(
        **ids, vocab_size=old.vocab_size, hidden_size=old.hidden_size, num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads, hidden_act=getattr(old, form.activation),
        intermediate_size=next(value for name in FEED_FORWARD_NAMES if (value := getattr(old, name, None))),
        max_position_embeddings=len(weights[_key("position_embeddings")]), relative_attention=False,
        type_vocab_size=getattr(old, "type_vocab_size", 0), layer_norm_eps=getattr(old, "layer_norm_eps", 1e-12),
        initializer_range=old.initializer_range, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=getattr(old, form.attention_dropout), pooler_hidden_act=form.head_activation,
        pooler_dropout=head_dropout if form.drops_input else 0.0, problem_type=old.problem_type,
        id2label=old.id2label, label2id=old.label2id,
    )  # fmt: skip
    config.cls_dropout = head_dropout
    return config, weights


def _renamed(name: str, form: Form) -> str:
    for pattern, replacement in form.names:
        name = re.sub(pattern, replacement, name)
    return name
