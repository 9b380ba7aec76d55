"""What `task: causal_lm` has of its own: its section, its defaults, and the settings of other tasks that it refuses."""

from __future__ import annotations

import copy
from typing import Any, Literal

from pydantic import Field, model_validator

from raydistill.config.cross_tokenizer import check_cross_tokenizer, set_cross_defaults
from raydistill.config.export import CLASS_FORMATS, LANGUAGE_FORMATS
from raydistill.config.loss import WITHOUT_TEMPERATURE
from raydistill.config.section import MAX_SEED, Added, Section

SPARSE = ("sampled", "random", "topk")


class NextTokens(Section):
    """What is kept of the teacher's distribution of the next token, at every position that is learnt from."""

    codec: Literal["sampled", "random", "topk", "hidden", "dense", "none"] = Field(
        default="sampled",
        description="sampled: likely tokens and an unbiased sample of the others; random: RS-KD's draws; topk: likely"
        " tokens alone; hidden: the last hidden state; dense: every logit; none: nothing, the student learns from what"
        " the teacher wrote alone",
    )
    kept: int = Field(
        default=20,
        ge=1,
        le=255,
        description="random, topk: tokens of a position. sampled: the most of them; tokens of at least 1 / kept are"
        " exact, each drawn one counts about so much",
    )
    units: int | None = Field(
        default=None,
        ge=1,
        le=1 << 16,
        description="sampled: in how many parts a position's weights are counted; absent: 64, or the power of two from"
        " 3 x kept on",
    )
    probabilities: bool = Field(
        default=False,
        description="sampled, random: each kept token's probability too, for other losses than forward_kl",
    )
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="sampled, random: of the draws and of rounding")

    text_logprobs: bool = Added(
        False,
        description="the log-probability of the token that stands there too, two bytes, for students with another"
        " tokenizer; absent: with train.loss.cross_tokenizer: spans",
    )

    @model_validator(mode="after")
    def _settings_fit_codec(self) -> NextTokens:
        used = {"sampled": ("kept", "units", "probabilities", "seed"), "random": ("kept", "probabilities", "seed")}
        used |= {"topk": ("kept", "seed"), "hidden": (), "dense": (), "none": ()}
        for name in ("kept", "units", "probabilities", "seed"):
            if getattr(self, name) != type(self).model_fields[name].default and name not in used[self.codec]:
                raise ValueError(f"{name} means nothing with codec: {self.codec}; remove it")
        if self.codec == "none" and self.text_logprobs:
            raise ValueError("text_logprobs means nothing with codec: none, which asks nothing of a teacher; remove it")
        if self.codec == "sampled" and self.kept < 2:
            raise ValueError("kept: a sample keeps at least 2 tokens, found 1; raise it")
        return self


# Where another default fits language models better; by the setting's place.
DEFAULTS: dict[tuple[str, ...], Any] = {
    ("data", "shard_rows"): 512,
    ("teacher", "fine_tune", "metric"): "nll",
    ("train", "metric"): "nll",
    ("train", "loss", "temperature"): 1.0,
    ("tune", "metric"): "nll",
    ("export", "rows"): 256,
    ("export", "min_agreement"): 0.95,
}
OPTIONAL = ("fine_tune", "tune", "export")  # sections that are absent unless they are given
# Settings that are about rows with labels, or that are not built for language models, by their section.
OTHERS: dict[str, tuple[str, ...]] = {
    "data": ("label", "label_separator", "keep_unlabelled", "augment"),
    "teacher": (
        "codec", "features_codec", "calibrate", "cross_fit", "members", "weight", "fine_tune_seeds", "combine",
        "features_of",
    ),
    "teacher.fine_tune": ("group_by_length",),
    "student": (
        "trim_vocabulary", "vocabulary_min_count", "max_positions", "embedding_size",
    ),
    "train": ("group_by_length", "exclude"),
    "train.loss": ("standardise", "hard_targets", "features", "features_from"),
    "export": ("max_accuracy_loss", "calibration_rows"),
    "evaluate": ("latency_rounds", "devices", "price_per_hour", "retention", "models", "sets", "quantise_teacher"),
}  # fmt: skip
# And those that mean nothing without it.
OWN: dict[str, tuple[str, ...]] = {
    "data": (
        "prompt",
        "response",
        "messages",
        "learnt_roles",
        "long_documents",
        "txt_documents",
        "synthesis",
        "answered",
        "unlabelled_share",
        "keep_text",
    ),
    "teacher": ("next_tokens",),
    "student": ("tie_embeddings", "tokenizer", "max_length"),
    "train.loss": ("cross_tokenizer",),
    "export": ("max_perplexity_rise",),
    "evaluate": ("samples", "sample_tokens", "harness"),
}
METRICS = ("nll", "accuracy", "kl", "agreement")


def with_defaults(tree: Any) -> Any:
    """The settings as given, with what `DEFAULTS` says in the place of what a language model's run leaves out."""
    if not isinstance(tree, dict) or tree.get("task") != "causal_lm":
        return tree
    tree = copy.deepcopy(tree)
    train = tree.get("train")
    own = train.get("loss") if isinstance(train, dict) else None
    set_cross_defaults(tree, [*([own] if isinstance(own, dict) else []), *_losses_of_stages(train)])
    for place, value in DEFAULTS.items():
        section: Any = tree
        for name in place[:-1]:
            if name not in OPTIONAL:
                section.setdefault(name, {})
            section = section.get(name)
            if not isinstance(section, dict):
                break
        else:
            if place[-1] != "temperature" or section.get("kind") not in WITHOUT_TEMPERATURE:
                section.setdefault(place[-1], value)
    losses = _losses_of_stages(tree.get("train"))
    for loss in losses:
        if loss.get("kind") not in WITHOUT_TEMPERATURE:
            loss.setdefault("temperature", DEFAULTS["train", "loss", "temperature"])
    for loss in [tree["train"]["loss"], *losses] if _keeps_nothing(tree) else []:
        loss.setdefault("alpha", 0.0)
    return tree


def _keeps_nothing(tree: dict[str, Any]) -> bool:
    """Whether settings as given ask for no logits, and have a place for the share of the teacher's loss."""
    kept = tree["teacher"].get("next_tokens") if isinstance(tree.get("teacher"), dict) else None
    loss = tree["train"].get("loss") if isinstance(tree["train"], dict) else None
    return isinstance(kept, dict) and kept.get("codec") == "none" and isinstance(loss, dict)


def _losses_of_stages(train: Any) -> list[dict[str, Any]]:
    """What stages give as their own loss; what is no section is left for its refusal."""
    stages = train.get("stages") if isinstance(train, dict) else None
    losses = [stage.get("loss") for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    return [loss for loss in losses if isinstance(loss, dict)]


def check_language(config: Any) -> None:
    """Raises ValueError for a setting that task: causal_lm does not know, or that does not fit it."""
    if name := _first_set(config, OTHERS):
        raise ValueError(f"{name} is not known with task: causal_lm; remove it")
    _check_formats(config, LANGUAGE_FORMATS)
    metrics = {"train.metric": config.train.metric}
    if config.teacher.fine_tune is not None:
        metrics["teacher.fine_tune.metric"] = config.teacher.fine_tune.metric
    if config.tune is not None:
        metrics["tune.metric"] = config.tune.metric
    for number, stage in enumerate(config.train.stages or ()):
        place = f"train.stages[{number}]"
        metrics[f"{place}.metric"] = stage.metric or config.train.metric
        name = _set_in(stage, OTHERS["train"]) or (stage.loss and _set_in(stage.loss, OTHERS["train.loss"], "loss."))
        if name:
            raise ValueError(f"{place}.{name} is not known with task: causal_lm; remove it")
    for name, metric in metrics.items():
        if metric not in METRICS:
            raise ValueError(f"{name}: {metric} is of classes; with task: causal_lm use {', '.join(METRICS)}")
    _check_columns(config.data)
    _check_written(config)
    _check_student(config.student)
    check_cross_tokenizer(config)


def check_other_task(config: Any) -> None:
    """Raises ValueError for a setting that means nothing with another task than causal_lm."""
    if name := _first_set(config, OWN):
        raise ValueError(f"{name} means nothing with task: {config.task}; remove it, or set task: causal_lm")
    for number, stage in enumerate(config.train.stages or ()):
        if stage.loss is not None and (name := _set_in(stage.loss, OWN["train.loss"], "loss.")):
            raise ValueError(f"train.stages[{number}].{name} means nothing with task: {config.task}; remove it")
    _check_formats(config, CLASS_FORMATS)


def _check_formats(config: Any, known: tuple[str, ...]) -> None:
    foreign = [name for name in config.export.formats if name not in known] if config.export else []
    if foreign:
        raise ValueError(f"export.formats: found {foreign[0]}, with task: {config.task} use {', '.join(known)}")


def _first_set(config: Any, names: dict[str, tuple[str, ...]]) -> str | None:
    """The first of these settings that has not its default."""
    for section, fields in names.items():
        found: Any = config
        for part in section.split("."):
            found = None if found is None else getattr(found, part)
        if found is not None and (name := _set_in(found, fields, f"{section}.")):
            return name
    return None


def _set_in(section: Any, fields: tuple[str, ...], place: str = "") -> str | None:
    """The first of these fields, of those that a section has, that has not its default."""
    known = type(section).model_fields
    changed = (f for f in fields if f in known and getattr(section, f) != known[f].default)
    return next((place + name for name in changed), None)


def _check_columns(data: Any) -> None:
    """Documents come from one column of texts or chats, or from two of prompts and responses."""
    asks = data.synthesis is not None
    if (data.response is not None and data.prompt is None) or (
        data.response is None and data.prompt is not None and not asks
    ):
        raise ValueError("data.prompt and data.response name two columns of the same rows; give both, or neither")
    if data.prompt is not None and data.prompt == data.response:
        raise ValueError(f"data.prompt and data.response name the same column, {data.prompt!r}; each needs its own")
    if data.prompt is not None and data.messages is not None:
        raise ValueError("data.messages and data.prompt both say what is read; remove one")
    named = "data.messages" if data.messages is not None else "data.prompt and data.response"
    if data.messages is None and data.learnt_roles != type(data).model_fields["learnt_roles"].default:
        raise ValueError("data.learnt_roles means nothing without data.messages; remove it")
    if not data.learnt_roles:
        raise ValueError("data.learnt_roles is an empty list, so that nothing would be learnt; name a role")
    if data.prompt is None and data.messages is None:
        return
    if data.text != type(data).model_fields["text"].default:
        raise ValueError(f"data.text means nothing with {named}; remove it")
    if data.long_documents != type(data).model_fields["long_documents"].default:
        raise ValueError(f"data.long_documents means nothing with {named}, which are always cut; remove it")
    if data.txt_documents != type(data).model_fields["txt_documents"].default:
        raise ValueError(f"data.txt_documents means nothing with {named}, which .txt files do not have; remove it")


def _check_written(config: Any) -> None:
    """What the teacher, or another model, writes, and what is learnt from it."""
    data, kept = config.data, config.teacher.next_tokens
    asks, has_prompts = data.synthesis is not None, data.prompt is not None or data.messages is not None
    for name, is_set in {"synthesis": asks, "answered": bool(data.answered)}.items():
        if is_set and not has_prompts:
            raise ValueError(f"data.{name} is about prompts; name their column in data.prompt, or data.messages")
    if asks and data.messages is not None and "assistant" not in data.learnt_roles:
        raise ValueError(
            "data.learnt_roles: data.synthesis writes messages of the assistant, which is not among them; add it"
        )
    if data.answered and data.messages is None and data.response is None:
        raise ValueError("data.answered has responses; name their column in data.response")
    if data.unlabelled and not asks:
        raise ValueError("data.unlabelled has prompts alone, which nobody answers; set data.synthesis")
    if data.unlabelled_share is not None and not data.unlabelled:
        raise ValueError("data.unlabelled_share means nothing without data.unlabelled; remove it")
    if asks and config.teacher.fine_tune is not None:
        raise ValueError(
            "teacher.fine_tune trains a teacher on prepared rows, and data.synthesis asks it before; fine-tune it in a"
            " run of its own, and give that run's teacher/model as teacher.model"
        )
    if asks and not data.synthesis.test and data.prompt is not None and data.response is None:
        raise ValueError("data.response: test needs responses; name their column, or set data.synthesis.test: true")
    if kept is None or kept.codec != "none":
        return
    if not asks and not data.answered:
        raise ValueError(
            "teacher.next_tokens.codec: none learns from what the teacher wrote, and there is nothing of it; set"
            " data.synthesis or data.answered"
        )
    if any(loss.has_teacher for loss in config.train.losses):
        raise ValueError("train.loss.alpha: teacher.next_tokens.codec: none keeps no logits to learn from; set it to 0")
    for metric in (config.train.metric, *(stage.metric for stage in config.train.stages or ())):
        if metric in ("kl", "agreement"):
            raise ValueError(f"train.metric: {metric} needs logits, which codec: none does not keep; use nll")


def _check_student(student: Any) -> None:
    if student.tie_embeddings is not None and student.init != "config":
        raise ValueError(f"student.tie_embeddings means nothing with init: {student.init}; remove it")
    if student.init == "config" and student.model_type == type(student).model_fields["model_type"].default:
        raise ValueError(
            f"student.model_type: {student.model_type} is no causal language model; use llama, gpt2, qwen2 …"
        )
