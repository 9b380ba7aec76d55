"""Every setting of a run: its default, its bounds and what it means.

A default lives on its field and nowhere else. A field marked `Speed` changes how fast a result comes and not the
result, so it stays out of every fingerprint (see `identity`).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}[A-Za-z0-9_-]|[A-Za-z0-9]")

Precision = Literal["auto", "bf16", "fp16", "fp32"]
Metric = Literal["accuracy", "macro_f1", "micro_f1", "nll", "kl", "agreement"]
TeacherMetrics = ("kl", "agreement")
LayerChoice = Literal["first", "last", "uniform"]
MAX_SEED = 2**32 - 1  # the largest that numpy, torch and transformers all take


def Speed(default: Any, **bounds: Any) -> Any:
    """A Field that changes speed or robustness only and therefore stays out of fingerprints."""
    return Field(default=default, json_schema_extra={"speed": True}, **bounds)


def Added(default: Any, **bounds: Any) -> Any:
    """A Field that came after runs were made: at its default it stays out of fingerprints, so that they go on."""
    return Field(default=default, json_schema_extra={"added": True}, **bounds)


class Section(BaseModel):
    """One block of settings: closed, frozen, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), strict=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read `epochs: true` as 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false do not fit here; write a number or a word")
        return value


class Augment(Section):
    """More texts made from train's by rules (Tang et al. 2019, arXiv:1903.12136), for the student alone."""

    copies: int = Field(default=1, ge=1, le=1000, description="texts made from each row of train")
    mask: float = Field(default=0.1, ge=0, le=1, description="share of words that become the teacher's mask token")
    replace: float = Field(default=0.1, ge=0, le=1, description="share of words replaced by one of the same label's")
    ngram: float = Field(default=0.25, ge=0, le=1, description="share of texts cut to 1 to 5 words in a row")
    keep_labels: bool = Field(default=False, description="the student also learns these texts' original labels")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="of the rules")

    @model_validator(mode="after")
    def _rules_do_something(self) -> Augment:
        if not self.mask + self.replace + self.ngram:
            raise ValueError("mask, replace and ngram are all 0, so that every copy would be its row; raise one")
        if self.mask + self.replace > 1:
            raise ValueError(f"mask {self.mask} and replace {self.replace} are shares of the same words; lower one")
        return self


class Data(Section):
    """Where rows come from and how they become shards."""

    train: str = Field(min_length=1, description="a file, a glob, s3://…, gs://… or hf://dataset")
    validation: float | str = Field(
        default=0.1, description="a stratified share of train (0 < share < 0.5), or a source"
    )
    test: str = Field(min_length=1, description="read by evaluate alone")
    unlabelled: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="a source, or a list of them, of more texts: the teacher scores them for the student"
    )
    keep_unlabelled: bool = Field(
        default=False, description="rows of train with an empty label join the unlabelled ones and are not dropped"
    )
    augment: Augment | None = Field(default=None, description="absent: no texts are made")
    text: str = Field(default="text", min_length=1, description="the column that holds the text")
    label: str = Field(default="label", min_length=1, description="the column that holds the label's name")
    label_separator: str = Field(
        default="|", min_length=1, max_length=16, description="task multi_label: between the names in a text"
    )
    delimiter: str = Field(default=",", min_length=1, max_length=1, description="of CSV files")
    max_length: int = Field(
        default=128, ge=2, le=131_072, description="tokens a row may have; longer rows are truncated"
    )
    max_row_bytes: int = Field(
        default=1 << 20, ge=1, le=1 << 28, description="rows with a longer text are dropped and counted"
    )
    max_dropped: float = Field(
        default=0.1, ge=0, le=1, description="share of a split's rows that may be dropped before it is an error"
    )
    shard_rows: int = Field(default=4096, ge=1, le=1 << 20, description="rows of every shard but the last of a split")
    split_seed: int = Field(default=0, ge=0, le=MAX_SEED, description="draws the validation rows")

    @field_validator("validation")
    @classmethod
    def _share_is_sensible(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 0 < value < 0.5:
            raise ValueError("a share must be above 0 and below 0.5; or give a path")
        return value

    @field_validator("unlabelled", mode="before")
    @classmethod
    def _one_source_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("delimiter")
    @classmethod
    def _delimiter_delimits(cls, value: str) -> str:
        if value in '"\r\n':
            raise ValueError('a delimiter is neither a quote (") nor an end of line; use a sign such as , or ;')
        return value

    @model_validator(mode="after")
    def _columns_differ(self) -> Data:
        if self.text == self.label:
            raise ValueError(f"text and label name the same column, {self.text!r}; the label needs its own")
        return self


class DeepSpeed(Section):
    """What is handed to DeepSpeed; none of it changes what is computed, only where it is kept."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: bool = Field(default=False, description="keep optimiser state in host memory (zero_stage >= 1)")

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> DeepSpeed:
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        return self


class Training(Section):
    """Settings of one training: of the student, of its control, or of a teacher that is fine-tuned here."""

    epochs: int = Field(default=10, ge=1, le=100_000)
    batch_size: int = Field(
        default=32, ge=1, le=1 << 24, description="global: rows per optimiser step over all workers and micro-batches"
    )
    learning_rate: float = Field(default=5e-4, gt=0, le=10)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the steps with a rising learning rate")
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="of matrices; biases and norms have none")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    precision: Precision = Field(default="auto", description="auto: bf16 where the device gains from it, else fp32")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="of initial weights, dropout and the order of rows")
    metric: Metric = Field(default="accuracy", description="of validation; decides which checkpoint is the best")
    choose: Literal["best", "last"] = Field(
        default="best",
        description="which checkpoint becomes the model; last where validation has too few rows to tell epochs apart",
    )
    validate_every: int | None = Field(
        default=None, ge=1, description="steps between validations; absent: once an epoch"
    )
    patience: int | None = Field(default=None, ge=1, description="validations without improvement before stopping")
    accumulation: int = Speed(1, ge=1, description="micro-batches per optimiser step and worker")
    gradient_checkpointing: bool = Speed(False)
    checkpoint_every: int | None = Speed(None, ge=1, description="steps between checkpoints; absent: at validations")
    log_every: int = Speed(10, ge=1, description="steps between points of the training curves")
    workers: int = Speed(1, ge=1, le=4096)
    cpus_per_worker: int | None = Speed(None, ge=1, description="absent: what the cluster has, shared evenly")
    max_failures: int = Speed(2, ge=0, description="times a lost worker is replaced before the run stops")
    deepspeed: DeepSpeed = Speed(DeepSpeed())

    @model_validator(mode="after")
    def _batch_divides(self) -> Training:
        if self.batch_size < self.workers * self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is global and must be at least workers x accumulation"
                f" = {self.workers * self.accumulation}"
            )
        return self


class FineTune(Training):
    """The teacher's own training, with labels alone."""

    epochs: int = Field(default=4, ge=1, le=100_000)
    learning_rate: float = Field(default=2e-4, gt=0, le=10)

    @model_validator(mode="after")
    def _has_no_teacher(self) -> FineTune:
        if self.metric in TeacherMetrics:
            raise ValueError(f"metric {self.metric} compares with a teacher and a teacher has none; use accuracy")
        return self


class Member(Section):
    """One more teacher of an ensemble."""

    model: str = Field(min_length=1, description="a folder or a hub id; safetensors weights")
    revision: str | None = Field(default=None, description="of a hub id")
    weight: float = Field(default=1.0, ge=0, le=1e6, description="in the mean of all; against the others' weights")


class Teacher(Section):
    """The large model and the cache of its outputs."""

    model: str = Field(min_length=1, description="a folder or a hub id; safetensors weights")
    revision: str | None = Field(default=None, description="of a hub id")
    fine_tune: FineTune | None = Field(default=None, description="absent: the teacher is used as it is")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto", description="of the forward pass")
    codec: Literal["dense-float16", "dense-int8"] = Field(
        default="dense-float16", description="2 or 1 byte per class and row"
    )
    features_codec: Literal["float16", "bfloat16"] = Added(
        "float16", description="of cached features, 2 bytes a number; bfloat16 for a teacher beyond float16's 65504"
    )
    cache_from: str | None = Field(default=None, description="another run's folder, whose data and cache are used")
    calibrate: bool = Field(
        default=False, description="divide its logits by one temperature, fitted on validation, before anyone learns"
    )
    cross_fit: int | None = Field(
        default=None, ge=2, le=100,
        description="with fine_tune: folds of train; so many more teachers are trained, each without one fold, and each"
        " scores the fold that it has not seen",
    )  # fmt: skip
    members: tuple[Member, ...] = Field(default=(), description="further teachers; the targets are the mean of all")
    weight: float = Field(default=1.0, ge=0, le=1e6, description="of model, in the mean with members")
    fine_tune_seeds: tuple[Annotated[int, Field(ge=0, le=MAX_SEED)], ...] | None = Field(
        default=None, description="with fine_tune: each teacher is trained once for each seed; the mean is of all"
    )
    combine: Literal["logits", "probabilities"] = Field(
        default="logits", description="what the mean of several teachers is taken of"
    )
    features_of: int | None = Field(
        default=None, ge=0,
        description="which of several teachers train.loss.features are learned from: 0 is model, then members in order;"
        " with fine_tune_seeds each of them counts once for each seed",
    )  # fmt: skip
    actors: int | None = Speed(None, ge=1, description="absent: as many as the cluster has room for")
    cpus_per_actor: int = Speed(1, ge=1)
    tokens_per_batch: int | None = Speed(None, ge=1, le=1 << 31, description="absent: 512 on CPU, 16384 on GPU")

    @model_validator(mode="after")
    def _teachers_fit(self) -> Teacher:
        for name in ("cross_fit", "fine_tune_seeds"):
            if getattr(self, name) is not None and self.fine_tune is None:
                raise ValueError(f"{name} needs fine_tune: it is about teachers that are trained here")
        seeds = self.fine_tune_seeds
        if seeds is not None and (len(seeds) < 2 or len(set(seeds)) < len(seeds)):
            raise ValueError(f"fine_tune_seeds must be different seeds, two at least, found {list(seeds)}")
        if (
            seeds is not None
            and self.fine_tune is not None
            and self.fine_tune.seed != FineTune.model_fields["seed"].default
        ):
            raise ValueError("fine_tune.seed means nothing with fine_tune_seeds; remove it")
        named = [(self.model, self.revision), *((member.model, member.revision) for member in self.members)]
        if twice := [model for model, revision in named if named.count((model, revision)) > 1]:
            raise ValueError(f"members: {twice[0]} stands there twice; give it a weight, or fine_tune_seeds")
        if not self.weight and not any(member.weight for member in self.members):
            raise ValueError("weight: all weights are 0, so that no teacher is left; give one of them more")
        if self.weight != type(self).model_fields["weight"].default and not self.members:
            raise ValueError("weight means nothing without members; remove it")
        if self.combine != type(self).model_fields["combine"].default and not self.members and seeds is None:
            raise ValueError("combine means nothing with one teacher; remove it, or set members or fine_tune_seeds")
        teachers = (1 + len(self.members)) * len(seeds or (0,))
        if self.features_of is not None and teachers == 1:
            raise ValueError("features_of means nothing with one teacher; remove it")
        if self.features_of is not None and self.features_of >= teachers:
            raise ValueError(f"features_of: found {self.features_of}, the {teachers} teachers are 0 to {teachers - 1}")
        return self


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
            "pretrained": (*chosen, *sizes, "num_layers", *width),
            "config": (*chosen, "model", "revision", "max_positions"),
            "teacher_layers": ("model", "revision", *sizes),
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


# Which kinds of loss take a hyper-parameter; what it is when absent stands in losses/registry.py.
LOSS_PARAMETERS = {
    "beta": ("jsd",),
    "skew": ("skew_forward_kl", "skew_reverse_kl"),
    "target_weight": ("dkd",),
    "non_target_weight": ("dkd",),
    "inter_weight": ("dist",),
    "intra_weight": ("dist",),
}
WITHOUT_TEMPERATURE = ("logit_mse",)
# The kinds that know sets of labels, each class a question of its own, by their names in losses/registry.py.
KINDS_OF_SETS = {"forward_kl": "binary_kl", "reverse_kl": "binary_reverse_kl", "jsd": "binary_jsd"}


class Features(Section):
    """One loss on what the teacher computes on the way; it is added to the rest, times its weight."""

    kind: Literal[
        "hidden_mse", "hidden_cosine", "embeddings_mse", "embeddings_cosine", "attention_mse", "attention_kl",
        "query_relation", "key_relation", "value_relation", "rkd_distance", "rkd_angle",
    ]  # fmt: skip
    weight: float = Field(default=1.0, gt=0, le=1e6)
    layers: Literal["uniform", "last", "skip", "final"] | tuple[tuple[int, int], ...] | None = Field(
        default=None,
        description="pairs [student layer, teacher layer], counted from 0, or a rule; absent: uniform for hidden states"
        " and attention, final (the last layers) for relations and rkd",
    )
    relation_heads: int | None = Field(
        default=None, ge=1, le=1024, description="*_relation: absent: as many as the teacher has attention heads"
    )

    @model_validator(mode="after")
    def _settings_fit_kind(self) -> Features:
        if self.layers is not None and self.kind.startswith("embeddings"):
            raise ValueError(f"layers means nothing with kind: {self.kind}; remove it")
        if self.relation_heads is not None and not self.kind.endswith("relation"):
            raise ValueError(f"relation_heads means nothing with kind: {self.kind}; remove it")
        return self


class Loss(Section):
    """alpha times a loss against the teacher's logits, plus (1 - alpha) cross-entropy with hard targets."""

    kind: Literal[
        "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "logit_mse", "dkd",
        "dist",
    ] = Field(default="forward_kl", description="the loss against the teacher's logits")  # fmt: skip
    temperature: float = Field(default=4.0, gt=0, le=1000, description="of both sides' logits; logit_mse takes none")
    alpha: float = Field(default=0.9, ge=0, le=1, description="share of the teacher; 0 is the control's objective")
    temperature_end: float | None = Added(
        None, gt=0, le=1000, description="of the last step, for a temperature that changes from step to step"
    )
    alpha_end: float | None = Added(None, ge=0, le=1, description="of the last step, likewise")
    course: Literal["linear", "cosine"] | None = Added(
        None, description="from the first step to temperature_end and alpha_end; absent: linear"
    )
    beta: float | None = Field(
        default=None, ge=0, le=1, description="jsd: from forward KL (0) to reverse KL (1); absent: 0.5"
    )
    skew: float | None = Field(
        default=None, ge=0, lt=1, description="skew_*_kl: share of the first side in the mixture; absent: 0.1"
    )
    target_weight: float | None = Field(
        default=None, ge=0, le=1000, description="dkd: of the label's class against the others; absent: 1"
    )
    non_target_weight: float | None = Field(
        default=None, ge=0, le=1000, description="dkd: of the other classes among themselves; absent: 8"
    )
    inter_weight: float | None = Field(
        default=None, ge=0, le=1000, description="dist: of each row's correlation over classes; absent: 2"
    )
    intra_weight: float | None = Field(
        default=None, ge=0, le=1000, description="dist: of each class's correlation over rows; absent: 2"
    )
    standardise: bool = Field(
        default=False, description="both sides' logits to mean 0 and deviation 1 a row before the loss"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="of the cross-entropy, the control's too")
    hard_targets: Literal["labels", "teacher"] = Field(
        default="labels", description="of the cross-entropy: the data's labels, or the teacher's most likely classes"
    )
    features: tuple[Features, ...] = Field(default=(), description="losses on what the teacher computes on the way")
    features_from: Literal["teacher", "cache"] = Added(
        "teacher",
        description="features: from the teacher, which runs beside the training, or from teach, which keeps them",
    )

    @model_validator(mode="after")
    def _settings_fit_kind(self) -> Loss:
        for name, kinds in LOSS_PARAMETERS.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise ValueError(f"{name} means nothing with kind: {self.kind}; remove it")
        if self.kind in WITHOUT_TEMPERATURE and self.temperature != type(self).model_fields["temperature"].default:
            raise ValueError(f"temperature means nothing with kind: {self.kind}; remove it")
        if self.kind in WITHOUT_TEMPERATURE and self.temperature_end is not None:
            raise ValueError(f"temperature_end means nothing with kind: {self.kind}; remove it")
        if self.course is not None and self.temperature_end is None and self.alpha_end is None:
            raise ValueError("course means nothing without temperature_end or alpha_end; remove it")
        if self.features_from == "cache" and not self.features:
            raise ValueError("features_from: cache means nothing without features; remove it")
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether anything is learned from a teacher."""
        return max(self.alpha, self.alpha_end or 0) > 0 or self.hard_targets == "teacher" or bool(self.features)


def _as_in_train(name: str) -> Any:
    """A Field of a stage with the bounds that the setting has in `train`; absent, it is taken from there."""
    bounds = {
        type(b).__name__.lower(): getattr(b, type(b).__name__.lower()) for b in Training.model_fields[name].metadata
    }
    return Field(default=None, description=f"absent: train.{name}", **bounds)


class Stage(Section):
    """One stage of the student's training. What it leaves out is as in `train`; a loss that it gives stands alone."""

    name: str = Field(description="of its folder, train/stages/<number>-<name>")
    teacher: Literal["teacher", "previous"] = Field(
        default="teacher", description="previous: the student as the stage before left it"
    )
    start: Literal["previous", "fresh"] | None = Field(
        default=None, description="from the weights of the stage before (absent: so), or from new first ones"
    )
    epochs: int | None = _as_in_train("epochs")
    batch_size: int | None = _as_in_train("batch_size")
    learning_rate: float | None = _as_in_train("learning_rate")
    schedule: Literal["cosine", "linear", "constant"] | None = _as_in_train("schedule")
    warmup: float | None = _as_in_train("warmup")
    weight_decay: float | None = _as_in_train("weight_decay")
    clip: float | None = _as_in_train("clip")
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="absent: train.seed plus the number of stages before this one"
    )
    metric: Metric | None = _as_in_train("metric")
    choose: Literal["best", "last"] | None = _as_in_train("choose")
    validate_every: int | None = _as_in_train("validate_every")
    patience: int | None = _as_in_train("patience")
    loss: Loss | None = Field(default=None, description="absent: train.loss")

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not RUN_NAME.fullmatch(value):
            raise ValueError("a stage's name is a plain name of letters, digits, '.', '_' and '-', at most 64")
        return value


class Train(Training):
    """The student's training; its control takes the same settings with alpha 0."""

    loss: Loss = Loss()
    stages: tuple[Stage, ...] | None = Added(
        None, description="trainings one after the other; the student is what the last one makes"
    )

    @model_validator(mode="after")
    def _stages_follow(self) -> Train:
        if self.stages is not None and not self.stages:
            raise ValueError("stages is an empty list. Leave it out, or name a stage")
        names = [stage.name for stage in self.stages or ()]
        for number, stage in enumerate(self.stages or ()):
            try:
                if stage.name in names[:number]:
                    raise ValueError(f"stages[{names.index(stage.name)}] has that name too. Give it another")
                self._check_stage(number, stage)
            except ValueError as error:
                problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
                where = f"stages[{number}] ({stage.name})"
                raise ValueError(f"{where}: {problem.removeprefix('Value error, ')}") from None
        return self

    def _check_stage(self, number: int, stage: Stage) -> None:
        settings = self.of_stage(number)
        for setting in ("teacher", "start"):
            if number == 0 and getattr(stage, setting) == "previous":
                raise ValueError(f"{setting}: previous, and no stage comes before. Leave it out")
        if stage.teacher == "previous" and not settings.loss.has_teacher:
            raise ValueError("teacher: previous, and its loss, with alpha 0, takes nothing from a teacher. Raise alpha")
        if stage.teacher == "previous" and settings.loss.features_from == "cache":
            raise ValueError(
                "teacher: previous, and the cache holds the first teacher's features. Set loss.features_from: teacher"
            )
        if number > 0 and stage.start == "fresh" and stage.teacher == "teacher":
            raise ValueError(
                "start: fresh with the teacher leaves nothing of the stages before. Remove them, or set"
                " teacher: previous, or leave start out"
            )

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The loss of every stage; of a training without stages the one that it has."""
        return (self.loss,) if self.stages is None else tuple(stage.loss or self.loss for stage in self.stages)

    @property
    def caches_features(self) -> bool:
        """Whether any stage takes the teacher's features from the cache."""
        return any(loss.features_from == "cache" for loss in self.losses)

    def of_stage(self, number: int) -> Train:
        """The settings of a stage, counted from 0, as of a training without stages. Raises ValidationError."""
        assert self.stages is not None
        names = [name for name in type(self).model_fields if name != "stages"]
        own = {name: value for name in names if (value := getattr(self.stages[number], name, None)) is not None}
        seed = (self.seed + number) % (MAX_SEED + 1)
        return Train.model_validate({name: getattr(self, name) for name in names} | {"seed": seed} | own)


class Evaluate(Section):
    """The proof."""

    control: bool = Field(default=True, description="train and compare the same student without the teacher")
    bootstrap: int = Field(default=2000, ge=100, le=1_000_000, description="resamples behind the 95 % intervals")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="of the resamples")
    latency_requests: int = Field(default=256, ge=16, le=1_000_000, description="single requests timed per model")
    threads: int = Field(default=1, ge=1, le=4096, description="of the timed requests")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of all models that are compared")


class Cluster(Section):
    """Which Ray cluster; under `ray job submit` the job's own cluster is used whatever stands here."""

    address: str = Field(default="local", min_length=1, description="local, or an address that ray.init takes")
    cpus: int | None = Field(
        default=None, ge=1, le=4096, description="of a local cluster; absent: what the process may use"
    )


def _check_loss_of_sets(loss: Loss) -> None:
    if loss.kind not in KINDS_OF_SETS:
        raise ValueError(
            f"train.loss.kind: {loss.kind} compares classes with each other and task: multi_label asks"
            f" for each by itself; use {', '.join(KINDS_OF_SETS)}"
        )
    if loss.standardise:
        raise ValueError("train.loss.standardise moves the logit at which task: multi_label says yes or no; remove it")


class Config(Section):
    """One run."""

    name: str = Field(description="the run's folder below storage")
    storage: str = Field(default="runs", min_length=1, description="a folder, s3://bucket/prefix or another fsspec URL")
    task: Literal["classification", "multi_label"] = Field(
        default="classification", description="multi_label: a row may have several labels or none"
    )
    data: Data
    teacher: Teacher
    student: Student = Student()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    cluster: Annotated[Cluster, Field(json_schema_extra={"speed": True})] = Cluster()

    @model_validator(mode="after")
    def _codec_has_features(self) -> Config:
        codec = type(self.teacher).model_fields["features_codec"].default
        if self.teacher.features_codec != codec and not self.train.caches_features:
            raise ValueError("teacher.features_codec means nothing without train.loss.features_from=cache; remove it")
        return self

    @model_validator(mode="after")
    def _rows_fit_student(self) -> Config:
        positions = self.student.max_positions
        if positions is not None and positions < self.data.max_length:
            raise ValueError(
                f"student.max_positions {positions} is below data.max_length {self.data.max_length}, the tokens that a"
                " row may have; raise the one or lower the other"
            )
        if self.student.vocabulary_min_count > 1 and self.train.loss.features_from == "cache":
            raise ValueError(
                f"student.vocabulary_min_count {self.student.vocabulary_min_count} cuts rows of train into other tokens"
                " than those whose features are in the cache; set it to 1, or train.loss.features_from to teacher"
            )
        return self

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not RUN_NAME.fullmatch(value) or value.upper() in {"CON", "PRN", "AUX", "NUL"}:
            raise ValueError("a run name is a plain name of letters, digits, '.', '_' and '-', at most 64, no path")
        return value

    @model_validator(mode="after")
    def _settings_fit_task(self) -> Config:
        tuning = self.teacher.fine_tune
        metrics = {"train": self.train.metric} | ({"teacher.fine_tune": tuning.metric} if tuning else {})
        metrics |= {f"train.stages[{n}]": stage.metric for n, stage in enumerate(self.train.stages or ())}
        if self.task == "classification":
            for section, metric in metrics.items():
                if metric == "micro_f1":
                    raise ValueError(f"{section}.metric: micro_f1 is accuracy where a row has one label; use accuracy")
            if self.data.label_separator != type(self.data).model_fields["label_separator"].default:
                raise ValueError("data.label_separator means nothing with task: classification; remove it")
            return self
        for loss in self.train.losses:
            _check_loss_of_sets(loss)
        return self

    @model_validator(mode="after")
    def _stages_go_on_from_whole_models(self) -> Config:
        if self.student.lora and not self.student.lora.merge and len(self.train.stages or ()) > 1:
            raise ValueError(
                "train.stages go on from whole models, and student.lora.merge: false saves adapters. Set it to true, or"
                " remove the stages"
            )
        return self

    @model_validator(mode="after")
    def _rows_without_labels_have_a_teacher(self) -> Config:
        data, learns = self.data, any(loss.has_teacher for loss in self.train.losses)
        asked = {
            "unlabelled": data.unlabelled, "keep_unlabelled": data.keep_unlabelled,
            "augment": data.augment and not data.augment.keep_labels,
        }  # fmt: skip
        if (name := next((name for name, value in asked.items() if value), None)) and not learns:
            raise ValueError(
                f"data.{name} asks for rows without labels, of which train.loss.alpha: 0 learns nothing; raise alpha,"
                " or remove the setting"
            )
        return self

    @model_validator(mode="after")
    def _quantised_weights_stay_whole(self) -> Config:
        if self.student.lora and self.student.lora.quantised and self.train.deepspeed.zero_stage == 3:
            raise ValueError(
                "student.lora.quantised: found nf4 with train.deepspeed.zero_stage 3, which cuts weights up; use 2"
            )
        return self


def identity(section: Section, *, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings of a section that determine its result: nested, JSON types.

    Those marked `Speed` stay out, and those marked `Added` while they have their default.
    """
    result: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra, value = field.json_schema_extra, getattr(section, name)
        marks = extra if isinstance(extra, dict) else {}
        if name in skip or marks.get("speed") or (marks.get("added") and value == field.default):
            continue
        result[name] = _plain(value)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return identity(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
