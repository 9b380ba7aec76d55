"""What can be checked of a language model's run before a worker starts or a byte is written, and what it will cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.cache.language_codecs import check_temperatures
from raydistill.config.cross_tokenizer import crosses_tokenizers, student_length
from raydistill.config.language import NextTokens
from raydistill.config.loss import LOSS_PARAMETERS, Loss
from raydistill.config.run import Config
from raydistill.config.training import Training
from raydistill.data.cross_loader import check_text_logprobs
from raydistill.data.same_tokens import difference
from raydistill.data.token_bytes import TokenBytes
from raydistill.data.token_order import token_steps
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.losses.cross_tokenizer import check_cross_codec
from raydistill.losses.sparse_divergences import check_sparse_loss
from raydistill.models.configuration import check_length, shape_of
from raydistill.models.folders import find_model, refuse_adapter
from raydistill.models.loading import empty_language_model
from raydistill.record.run import Run
from raydistill.stages.adapted import check_adapters
from raydistill.stages.language.export import check_language_export
from raydistill.stages.language.harness import check_harness
from raydistill.stages.language.objective import token_objective
from raydistill.stages.language.surveyed import SurveyedTexts
from raydistill.stages.language.teach import SPLITS, next_tokens
from raydistill.stages.language.vllm_engine import check_vllm
from raydistill.stages.preflight import check_lender
from raydistill.stages.progress import size
from raydistill.stages.search_cost import SearchCost, search_cost
from raydistill.stages.training_job import student_splits
from raydistill.stages.training_stages import training_stages
from raydistill.stages.unfreezing import check_unfreezing
from raydistill.students.language import language_skeleton, own_tokenizer

# For each of the `kept` tokens at a vocabulary of 128k (docs/log.md), of which `sampled` uses a half; a smaller one
# takes less, and so does a teacher that is sure.
NEXT_TOKEN_BYTES = {"sampled": 1.2, "random": 0.9, "topk": 4.2}


def check_language_models(config: Config, run: Run, labels: list[str]) -> None:
    """Teacher, student and loss against each other and the data. Raises UserError for the first that does not fit."""
    folder = find_model("teacher.model", config.teacher.model, config.teacher.revision)
    refuse_adapter("teacher.model", folder)
    check_length("the teacher", folder, config.data.max_length)
    _check_model("teacher.model", folder, empty_language_model_on_meta("teacher.model", folder))
    check_lender(config, run)
    if config.data.synthesis is not None and config.data.synthesis.engine == "vllm":
        check_vllm()
    if config.evaluate.harness is not None:
        check_harness(config.evaluate.harness)
    if config.student.init == "pretrained":
        _check_pretrained(config, folder)
    if crosses_tokenizers(config):
        _check_own_tokenizer(config, run)
    student = _skeleton(config, folder)
    if config.student.lora:
        check_adapters(config.student.lora, lambda: student)
    check_language_export(config, student, folder)
    check_language_training(config, folder, labels)


def check_language_training(config: Config, teacher_folder: Path, _labels: list[str]) -> None:
    """What the student is trained with, against cache and models. Raises UserError."""
    check_losses(config)
    check_unfreezing(config, lambda: _skeleton(config, teacher_folder))


def _skeleton(config: Config, teacher_folder: Path) -> Any:
    """The student without weights."""
    return language_skeleton(config.student, teacher_folder=teacher_folder, max_length=student_length(config))


def empty_language_model_on_meta(setting: str, folder: Path):
    import torch

    with torch.device("meta"):
        return empty_language_model(setting, folder)


def _check_model(setting: str, folder: Path, model) -> None:
    """A model whose output layer is known and whose vocabulary holds its tokenizer's."""
    tokenizer = load_tokenizer(folder, setting, pads=False)
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"{setting}: {folder}: has no output layer that is known. Choose another architecture")
    if head.weight.shape[0] < len(tokenizer):
        raise UserError(
            f"{setting}: {folder}: has {head.weight.shape[0]} tokens, its tokenizer {len(tokenizer)}."
            " Resize its embeddings, or save the tokenizer that it was trained with"
        )


def _check_pretrained(config: Config, teacher: Path) -> None:
    """The student that the user gave, whose tokens must be the teacher's."""
    assert config.student.model is not None
    folder = find_model("student.model", config.student.model, config.student.revision)
    refuse_adapter("student.model", folder)
    check_length("the student", folder, student_length(config))
    _check_model("student.model", folder, empty_language_model_on_meta("student.model", folder))
    if crosses_tokenizers(config):
        return
    theirs = load_tokenizer(teacher, "teacher.model", pads=False)
    ours = load_tokenizer(folder, "student.model", pads=False)
    if found := difference(theirs, ours, template=config.data.messages is not None):
        raise UserError(
            f"student.model: {folder}: its tokenizer is not the teacher's: {found}. Choose a student with the teacher's"
            " tokenizer, or init: config or teacher_layers, or set train.loss.cross_tokenizer=spans"
        )


def _check_own_tokenizer(config: Config, run: Run) -> None:
    """A student's tokenizer whose tokens can be measured in bytes, and a cache that holds what its loss needs."""
    setting, folder = own_tokenizer(config.student)
    ours = load_tokenizer(folder, setting, pads=False)
    TokenBytes(ours, setting)
    if config.data.messages is not None and ours.chat_template is None:
        raise UserError(
            f"{setting}: {folder}: the tokenizer has no chat template, which data.messages are written by for the"
            " student. Save one beside it (chat_template.jinja)"
        )
    if config.teacher.next_tokens is not None and config.teacher.next_tokens.text_logprobs and run.lender:
        check_text_logprobs(run.require("cache"), run.lender.where("teacher/cache"))


def check_losses(config: Config) -> None:
    """Every stage's loss against what the cache will hold of the teacher."""
    kept = next_tokens(config)
    for stage in training_stages("student", config) if kept.codec != "none" else ():
        _check_loss(kept, stage.settings.loss, stage.loss_section)


def _check_loss(kept: NextTokens, loss: Loss, section: str) -> None:
    if loss.cross_tokenizer is not None:
        try:
            check_cross_codec(loss.cross_tokenizer, kept.codec)
        except ValueError as error:
            raise UserError(f"{section}.cross_tokenizer: {error}") from None
    if loss.cross_tokenizer == "spans":  # whose temperature is of spans, of which the cache has the probability
        return
    parameters = {name: value for name in LOSS_PARAMETERS if (value := getattr(loss, name)) is not None}
    try:
        token_objective(loss)
        check_sparse_loss(kept.codec, kind=loss.kind, parameters=parameters, has_probabilities=kept.probabilities)
    except ValueError as error:
        raise UserError(f"{section}: {error}") from None
    for name in ("temperature", "temperature_end"):
        if (temperature := getattr(loss, name)) is not None and loss.kind != "logit_mse":
            try:
                check_temperatures(kept.codec, temperature)
            except ValueError as error:
                raise UserError(f"{section}.{name}: {error}") from None


@dataclass(frozen=True)
class LanguageCost:
    """What a run will do."""

    counts: dict[str, dict[str, int]]
    codec: str
    cache_bytes: float
    steps: dict[str, int]
    asked: dict[str, int]  # prompts by the split that their answers go to
    answers: int  # to each of them
    answer_tokens: int  # of an answer at most
    own_teachers: int = 0  # stages whose teacher is the student as the one before left it
    search: SearchCost | None = None
    exports: tuple[str, ...] = ()
    crosses: bool = False  # whether the student has a tokenizer of its own

    def lines(self) -> list[str]:
        scored = sum(self.counts[split]["rows"] for split in SPLITS if split in self.counts)
        scored += self.answers * sum(count for split, count in self.asked.items() if split in SPLITS)
        steps = ", ".join(f"{name} {count:,}" for name, count in self.steps.items())
        return [
            "documents: " + ", ".join(f"{found['documents']:,} {split}" for split, found in self.counts.items()),
            "tokens: " + ", ".join(f"{found['tokens']:,} {split}" for split, found in self.counts.items()),
            *self._answer_lines(),
            *(
                ["no logits are kept (codec none)"]
                if self.codec == "none"
                else [
                    f"teacher forwards for the cache: {scored:,} rows, once each",
                    f"cache: about {size(int(self.cache_bytes))} at most by codec {self.codec}",
                ]
            ),
            f"optimiser steps at most: {steps}",
            *(["steps are counted by the teacher's tokens; the student has its own"] if self.crosses else []),
            *(self.search.lines() if self.search else []),
            *self._student_lines(scored),
            *([f"export: {', '.join(self.exports)}, each compared with the student"] if self.exports else []),
        ]

    def _answer_lines(self) -> list[str]:
        if not self.asked:
            return []
        count = sum(self.asked.values())
        return [
            f"answers that the teacher writes: {self.answers * count:,} to {count:,} prompts, of"
            f" {self.answer_tokens:,} tokens at most, which come to those above"
        ]

    def _student_lines(self, scored: int) -> list[str]:
        if not self.own_teachers:
            return []
        rows, kept = self.own_teachers * scored, size(int(self.own_teachers * self.cache_bytes))
        return [f"student forwards as the teacher of later stages: {rows:,} rows at most, {kept} of cache"]


def language_cost(config: Config, run: Run, surveyed: SurveyedTexts | None) -> LanguageCost:
    """The cost of a run over these documents."""
    facts = None if surveyed else run.require("data").facts
    counts = surveyed.counts if surveyed else facts["counts"] if facts else {}
    vocabulary = surveyed.vocabulary if surveyed else facts["vocabulary"] if facts else 0
    asked, settings = (surveyed.asked if surveyed else {}), config.data.synthesis
    answers, longest = (settings.answers, settings.max_new_tokens) if settings else (0, 0)
    kept = next_tokens(config)
    written = answers * sum(count for split, count in asked.items() if split in SPLITS)
    positions = sum(counts[split]["learnt"] for split in SPLITS if split in counts) + written * longest
    each = NEXT_TOKEN_BYTES.get(kept.codec, 0.0) * kept.kept
    if kept.codec in ("hidden", "dense"):
        folder = find_model("teacher.model", config.teacher.model, config.teacher.revision)
        each = 2 * (vocabulary if kept.codec == "dense" else shape_of(folder).width)
    each += 2 * kept.text_logprobs
    own = config.train.seeds * sum(stage.own_teacher for stage in training_stages("student", config))
    exports = config.export.formats if config.export else ()
    learnt = student_splits(config)
    tokens = sum(counts[split]["tokens"] for split in learnt if split in counts)
    tokens += answers * config.data.max_length * sum(asked.get(split, 0) for split in learnt)
    search = None
    if config.tune is not None:
        folder = find_model("teacher.model", config.teacher.model, config.teacher.revision)
        search = search_cost(config, tokens, folder)
    steps = _steps(config, of_teacher=counts["train"]["tokens"], of_student=tokens)
    return LanguageCost(
        counts, kept.codec, positions * each, steps, asked, answers, longest, own, search, exports,
        crosses_tokenizers(config),
    )  # fmt: skip


def _row_length(role: str, config: Config) -> int:
    return config.data.max_length if role == "teacher" else student_length(config)


def _steps(config: Config, *, of_teacher: int, of_student: int) -> dict[str, int]:
    """The optimiser steps of every training, over so many tokens."""
    trainings: dict[str, list[Training]] = {}
    if config.teacher.fine_tune is not None:
        trainings["teacher"] = [config.teacher.fine_tune]
    for role in ("student", "control") if config.evaluate.control else ("student",):
        trainings[role] = [stage.settings for stage in training_stages(role, config)] * config.train.seeds
    tokens = {"teacher": of_teacher, "student": of_student, "control": of_student}
    return {
        name: sum(s.epochs * token_steps(tokens[name], s.batch_size * _row_length(name, config)) for s in settings)
        for name, settings in trainings.items()
    }
