"""A new student from the sizes in the config, whatever names its architecture has for them."""

from __future__ import annotations

from typing import Any

from raydistill.errors import UserError, first_line
from raydistill.models.configuration import label_maps, position_offset

FEED_FORWARD_NAMES = ("intermediate_size", "hidden_dim", "n_inner")
MIN_POSITIONS = 128


def check_architecture(model_type: str, embedding_size: int | None = None) -> None:
    """Raises UserError when transformers has no such architecture, or it has no embeddings of a size of their own."""
    from transformers import AutoConfig

    try:
        known = AutoConfig.for_model(model_type)
    except ValueError:
        raise UserError(
            f"student.model_type: transformers knows no {model_type!r}. Use bert, distilbert, roberta …"
        ) from None
    # DeBERTa-v2 reads the size from its configuration, which has no default for it.
    if embedding_size is not None and model_type != "deberta-v2" and not hasattr(known, "embedding_size"):
        raise UserError(
            f"student.embedding_size: found {embedding_size}, and {model_type!r} has no size of its own for embeddings."
            " Use model_type deberta-v2, electra or albert, or remove it"
        )


def student_from_config(settings: Any, tokenizer: Any, labels: list[str], max_length: int) -> Any:
    """A new student with the sizes in the `student` section. Call torch.manual_seed first.

    Raises UserError when transformers has no such architecture or it does not take these sizes.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    id2label, label2id = label_maps(labels)
    try:
        sizes = sizes_of(settings, AutoConfig.for_model(settings.model_type), tokenizer, max_length)
        config = AutoConfig.for_model(
            settings.model_type, **sizes, pad_token_id=tokenizer.pad_token_id, id2label=id2label, label2id=label2id
        )
        set_dropout(config, settings.dropout)
        return AutoModelForSequenceClassification.from_config(config)
    except (ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"student.model_type: {settings.model_type!r} cannot be built with these sizes ({first_line(error)})."
            " Choose another architecture or other sizes"
        ) from None


def sizes_of(settings: Any, known: Any, tokenizer: Any, max_length: int) -> dict[str, int]:
    """The sizes under the names that an architecture's configuration, `known`, has for them."""
    heads = settings.num_heads or max(1, settings.hidden_size // 64)
    offset = position_offset(settings.model_type, tokenizer.pad_token_id)
    feed_forward = next((name for name in FEED_FORWARD_NAMES if hasattr(known, name)), FEED_FORWARD_NAMES[0])
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.hidden_size,
        "num_hidden_layers": settings.num_layers,
        "num_attention_heads": heads,
        feed_forward: settings.feed_forward or 4 * settings.hidden_size,
        "max_position_embeddings": max(MIN_POSITIONS, max_length + max(2, offset)),
    }
    if unknown := [name for name in sizes if not hasattr(known, name)]:
        raise ValueError(f"it has no {unknown[0]}")
    if settings.embedding_size is not None:
        sizes["embedding_size"] = settings.embedding_size
    # Left at its default, it may be more than there are heads.
    return sizes | ({"num_key_value_heads": heads} if hasattr(known, "num_key_value_heads") else {})


def set_dropout(config: Any, dropout: float | None) -> None:
    """Every dropout of an architecture's configuration, when one is given."""
    for name, value in config.to_dict().items():
        is_dropout = "dropout" in name or name.endswith("pdrop")
        if dropout is not None and is_dropout and (value is None or type(value) in (int, float)):
            setattr(config, name, dropout)
