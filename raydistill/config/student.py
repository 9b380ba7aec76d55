"""`student`: the model that learns, and what it is made from."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from raydistill.config.section import Added, Section

LayerChoice = Literal["first", "last", "uniform"]


class Lora(Section):
    """Adapters in the place of training every weight (LoRA, arXiv:2106.09685); the head trains as a whole."""

    rank: int = Field(default=8, ge=1, le=4096, description="of what an adapter adds to a weight")
    alpha: float = Field(default=16.0, gt=0, le=65_536, description="what is added is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of an adapter's input, in training")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="linear layers of the encoder: all, or the ends of their names, such as query"
    )
    also_train: tuple[Literal["norms", "embeddings"], ...] = Field(
        default=(), description="of the encoder, as a whole beside the adapters"
    )
    merge: bool = Field(
        default=True, description="save an ordinary model; false: save an adapter, and its base beside it"
    )
    quantised: Literal["nf4"] | None = Field(
        default=None, description="nf4: frozen weights in 4 bits (QLoRA, arXiv:2305.14314); needs a GPU"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _targets_are_named(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "all-linear":
            raise ValueError(f"targets is all-linear or a list of names; write [{value}]")
        if isinstance(value, list | tuple) and not all(isinstance(v, str) and v for v in value or [""]):
            raise ValueError("a list of targets holds names of layers, at least one; or write all-linear")
        return value


class Student(Section):
    """The small model and where its first weights come from."""

    init: Literal["teacher_layers", "pretrained", "config"] = "teacher_layers"
    layers: LayerChoice | tuple[int, ...] | None = Field(
        default=None,
        description="teacher_layers: which, counted from 0, or num_layers of them by a rule; absent: every other one",
    )
    model: str | None = Field(default=None, description="pretrained: a folder or a hub id")
    revision: str | None = None
    model_type: str = Field(default="bert", description="config: the architecture's name in transformers")
    hidden_size: int | None = Field(default=None, ge=1, le=1 << 16, description="config")
    num_layers: int | None = Field(
        default=None, ge=1, le=1024, description="config; teacher_layers: with layers: first, last or uniform"
    )
    num_heads: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="config, absent: one for every 64 of hidden_size; teacher_layers: the most important ones of every"
        " layer, absent: all",
    )
    feed_forward: int | None = Field(
        default=None,
        ge=1,
        le=1 << 18,
        description="units; config, absent: 4 x hidden_size; teacher_layers: the most important ones of every layer,"
        " absent: all",
    )
    importance: Literal["taylor", "magnitude"] | None = Field(
        default=None,
        description="of heads and units: what rows of train would lose without them, to the first order; or the size of"
        " their weights, which needs no rows; absent: taylor",
    )
    importance_rows: int | None = Field(
        default=None, ge=1, le=1 << 24, description="taylor: how many rows of train are drawn for it; absent: 512"
    )
    dropout: float | None = Field(default=None, ge=0, lt=1, description="absent: the architecture's own")
    trim_vocabulary: bool = Added(
        False, description="keep the tokens that train uses and those that any text needs, and drop the others"
    )
    vocabulary_min_count: int = Added(
        1, ge=1, le=1 << 40, description="trim_vocabulary: how often train must use a token to keep it"
    )
    max_positions: int | None = Added(
        None, ge=2, le=1 << 20, description="tokens that its table of absolute positions is cut to; absent: all it has"
    )
    embedding_size: int | None = Added(
        None, ge=1, le=1 << 16, description="of tables that a projection makes as wide as the layers; absent: as wide"
    )
    tie_embeddings: bool | None = Added(
        None, description="causal_lm, config: the output layer is the embeddings; absent: the architecture's own"
    )
    tokenizer: str | None = Added(
        None, min_length=1, description="config, train.loss.cross_tokenizer: a folder or a hub id of another tokenizer"
    )
    max_length: int | None = Added(
        None, ge=2, le=131_072,
        description="train.loss.cross_tokenizer: tokens of the student's that a row may have; absent: data.max_length",
    )  # fmt: skip
    lora: Lora | None = Added(None, description="adapters are trained; absent: every weight is")

    @model_validator(mode="after")
    def _settings_fit_vocabulary(self) -> Student:
        if self.vocabulary_min_count != 1 and not self.trim_vocabulary:
            raise ValueError("vocabulary_min_count means nothing without trim_vocabulary: true; remove it")
        return self

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_are_a_rule_or_numbers(cls, value: Any) -> Any:
        # Of a union pydantic would name every member.
        if value is None or value in get_args(LayerChoice):
            return value
        if not isinstance(value, list | tuple) or any(type(layer) is not int for layer in value):
            raise ValueError(f"it should be a list of whole numbers, or {', '.join(get_args(LayerChoice))}")
        return value

    @model_validator(mode="after")
    def _settings_fit_init(self) -> Student:
        width = ("num_heads", "feed_forward")
        sizes = ("model_type", "hidden_size")
        chosen = ("layers", "importance", "importance_rows")
        needed = {"pretrained": ("model",), "config": ("hidden_size", "num_layers"), "teacher_layers": ()}[self.init]
        foreign = {
            "pretrained": (*chosen, *sizes, "num_layers", *width, "tokenizer"),
            "config": (*chosen, "model", "revision", "max_positions"),
            "teacher_layers": ("model", "revision", *sizes, "tokenizer", "max_length"),
        }[self.init]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"init: {self.init} needs {name}")
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing with init: {self.init}; remove it")
        if self.hidden_size and self.hidden_size % (self.num_heads or max(1, self.hidden_size // 64)):
            heads = f"num_heads {self.num_heads}" if self.num_heads else "hidden_size // 64 heads; set num_heads"
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of {heads}")
        return self

    @model_validator(mode="after")
    def _layers_are_rising(self) -> Student:
        layers = self.layers
        if isinstance(layers, tuple) and (not layers or list(layers) != sorted(set(layers)) or layers[0] < 0):
            raise ValueError(f"layers must be rising numbers from 0, found {list(layers)}")
        if self.init == "teacher_layers" and isinstance(layers, str) != (self.num_layers is not None):
            raise ValueError(
                f"layers: {layers} needs num_layers, how many of the teacher's"
                if isinstance(layers, str)
                else f"num_layers needs layers: {', '.join(get_args(LayerChoice))}; or list the layers"
            )
        return self

    @model_validator(mode="after")
    def _importance_has_a_use(self) -> Student:
        if self.importance_rows is not None and self.importance == "magnitude":
            raise ValueError("importance_rows means nothing with importance: magnitude; remove it")
        for name in ("importance", "importance_rows"):
            if getattr(self, name) is not None and self.num_heads is None and self.feed_forward is None:
                raise ValueError(f"{name} means nothing without num_heads or feed_forward; remove it")
        return self
