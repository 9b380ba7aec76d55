"""What one rank of a language model's training learns: the next token of packed rows, from the teacher and the text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from raydistill.adapters import frozen_parameters
from raydistill.cache.next_tokens import NextTokenCache
from raydistill.config.cross_tokenizer import crosses_tokenizers, student_length
from raydistill.data.cross_loader import CrossSplit, CrossTaught
from raydistill.data.shards import STUDENT_SPLITS
from raydistill.data.student_rows import FOLDER as STUDENT_ROWS
from raydistill.data.token_loader import TokenBatch, TokenSplit, check_vocabulary
from raydistill.data.token_order import token_steps
from raydistill.data.token_shards import read_token_shard
from raydistill.depths import parameter_depths
from raydistill.losses.token_objective import CrossTeacher, Teacher, TokenObjective
from raydistill.models.kinds import LANGUAGE_MODEL
from raydistill.models.row_attention import attend_by_rows
from raydistill.models.saving import longest_input, save_model
from raydistill.next_token import MEASURES, MODEL_PREFIX, NextTokenModel, check_parts, model_weights, shared_names
from raydistill.record.commit import Manifest, read_manifest
from raydistill.record.run import PARTS
from raydistill.record.store import Store, open_store
from raydistill.stages.adapted import save_adapted, with_adapters
from raydistill.stages.job import TrainingJob, first_student
from raydistill.stages.lesson import Parts, Steps
from raydistill.stages.meter import Meter
from raydistill.stages.ranks import all_reduce, rank_and_world
from raydistill.stages.training_job import student_splits
from raydistill.students.language import TokenRows, build_language_student
from raydistill.targets import HiddenTargets, RankTargets, SparseTargets

VALIDATION_TOKENS = {"cpu": 4096, "cuda": 65_536}


class LanguageLesson:
    """A causal language model: it learns tokens, each from those before it in its row."""

    unit = "tokens"

    def __init__(self, job: TrainingJob, device: torch.device) -> None:
        self._job, self._device = job, device
        store = open_store(job.data_url)
        data = read_manifest(store, "data")
        assert data is not None
        self._lora = job.config.student.lora if job.role != "teacher" else None
        self._own_rows = _own_rows(job)
        self._vocabulary = (self._own_rows or data).facts["vocabulary"]
        self._model, self.tokenizer = self._built()
        self.model: torch.nn.Module = NextTokenModel(self._model, self._vocabulary)
        self.frozen = shared_names(self.model) | (frozen_parameters(self.model) if self._lora else frozenset())
        depths = parameter_depths(self._model, f"{job.section}.unfreeze") if job.unfreeze else {}
        self.depths: Mapping[str, int] = {MODEL_PREFIX + name: depth for name, depth in depths.items()}
        cache = _open_cache(job, store, data) if job.uses_cache and not job.config.teacher.keeps_no_logits else None
        self._head = cache.head.to(device) if cache is not None and cache.head is not None else None
        self._train, self._validation = self._splits(store, data, cache)
        self.rows = self._train.rows
        length = job.config.data.max_length if self._own_rows is None else student_length(job.config)
        self._batch_tokens = job.settings.batch_size * length
        self.per_pass = self._train.steps(self._batch_tokens)
        # A control, without what the teacher wrote, takes as many steps as its student; a trial has none.
        counted = job.splits if job.role == "teacher" else student_splits(job.config)
        counts = (self._own_rows or data).facts["counts"]
        tokens = sum(found["tokens"] for split, found in counts.items() if split in counted)
        self.per_epoch = token_steps(tokens, self._batch_tokens) if job.rows is None else self.per_pass

    def _splits(self, store: Store, data: Manifest, cache: NextTokenCache | None) -> tuple[TokenSplit, TokenSplit]:
        """What is learnt, and what is validated on: with another tokenizer by its own next tokens alone."""
        job, own = self._job, self._own_rows
        if own is None:
            both = (job.splits, job.rows), (("validation",), None)
            train, validation = (TokenSplit(store, splits, data, cache, rows) for splits, rows in both)
            return train, validation
        rows_store, loss = open_store(job.run_url), job.config.train.loss.cross_tokenizer
        taught = None
        if cache is not None and loss is not None and needs_teacher(job.objective):
            taught = CrossTaught(loss, cache)
        train = CrossSplit(store, rows_store, job.splits, data, own, taught, job.rows)
        return train, CrossSplit(store, rows_store, ("validation",), data, own, None)

    def _built(self) -> tuple[Any, Any]:
        """The model that is trained, with its adapters, and its tokenizer, checked against the rows."""
        job = self._job
        model, tokenizer = build_language_model(job)
        check_vocabulary(self._vocabulary, model.get_output_embeddings().weight.shape[0], job.title)
        if self._device.type == "cpu":
            attend_by_rows(model)
        check_parts(job.title, model.eval(), self._vocabulary)
        if self._lora:
            model = with_adapters(model, self._lora, job.settings.seed, self._device)
        if job.settings.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model, tokenizer

    def steps(self, *, epoch: int, first_step: int, rank: int, world: int) -> Steps:
        settings = self._job.settings
        return self._train.training_steps(
            seed=settings.seed, epoch=epoch, batch_tokens=self._batch_tokens, first_step=first_step, rank=rank,
            world=world, accumulation=settings.accumulation,
        )  # fmt: skip

    def loss(
        self, engine: Any, batch: TokenBatch, objective: TokenObjective, meter: Meter | None
    ) -> tuple[torch.Tensor, Parts]:
        if not batch.rows:
            objective = TokenObjective()  # of no position, so that no teacher is looked at
        teacher = self._on_device(batch.teacher) if batch.teacher is not None and objective.needs_teacher else None
        total, *parts = engine.call(**self._arguments(batch), teacher=teacher, objective=objective)
        return total, dict(zip(objective.part_names, parts, strict=True))

    def _arguments(self, batch: TokenBatch) -> dict[str, Any]:
        return {
            "inputs": {name: value.to(self._device) for name, value in batch.inputs.items()},
            "places_N": batch.places_N.to(self._device),
            "labels_N": batch.labels_N.to(self._device),
        }

    def _on_device(self, teacher: Teacher | CrossTeacher) -> Teacher | CrossTeacher:
        if isinstance(teacher, RankTargets) and isinstance(teacher.teacher, HiddenTargets):
            assert self._head is not None
            moved = teacher.to(self._device)
            assert isinstance(moved.teacher, HiddenTargets)
            return RankTargets(moved.places_M, HiddenTargets(moved.teacher.hidden_ND, self._head))
        if isinstance(teacher, HiddenTargets):
            assert self._head is not None
            return HiddenTargets(teacher.hidden_ND.to(self._device), self._head)
        if isinstance(teacher, SparseTargets):
            return teacher.to(self._device)
        return teacher.to(self._device)

    def validation(self, engine: Any) -> dict[str, float]:
        """nll and accuracy of the next token; with a cache kl to the teacher and agreement with its likeliest token.

        Batches are dealt to the ranks in turn; a rank that runs out repeats its last batch without counting it, because
        under ZeRO-3 every rank takes part in every forward pass.
        """
        rank, world = rank_and_world()
        sums = torch.zeros(len(MEASURES), dtype=torch.float64, device=self._device)
        pending: list[TokenBatch] = []
        with engine.evaluation():
            for batch in self._validation.token_batches(VALIDATION_TOKENS[self._device.type]):
                pending.append(batch)
                if len(pending) == world:
                    sums += self._sums(engine, pending[rank])
                    pending = []
            if pending:
                found = self._sums(engine, pending[min(rank, len(pending) - 1)])
                sums += found if rank < len(pending) else 0
        all_reduce(sums)
        values: dict[str, float] = dict(zip(MEASURES, (sums / self._validation.rows).tolist(), strict=True))
        if not self._validation.has_teacher:
            del values["kl"], values["agreement"]
        return values

    def _sums(self, engine: Any, batch: TokenBatch) -> torch.Tensor:
        teacher = None if batch.teacher is None else self._on_device(batch.teacher)
        return torch.stack(engine.call(**self._arguments(batch), teacher=teacher))

    def publish(self, weights: dict[str, torch.Tensor], folder: Path, *, place: str) -> Any:
        weights, length = model_weights(weights), longest_input(self._model, self.tokenizer)
        if self._lora:
            base = build_language_model(self._job, alone=True)[0]
            return save_adapted(
                base, self.tokenizer, weights, folder, self._lora, self._job.settings.seed, self._device,
                max_length=length, place=place,
            )  # fmt: skip
        save_model(self._model, self.tokenizer, weights, folder, max_length=length)
        return self._model

    def close(self) -> None:
        for split in (self._train, self._validation):
            split.close()


def build_language_model(job: TrainingJob, *, alone: bool = False) -> tuple[Any, Any]:
    """The model with its first weights, and its tokenizer, as `build_model` of a classifier."""
    source = job.begins_with or job.source
    if job.begins_with is not None or job.role == "teacher":
        return LANGUAGE_MODEL.load(source.setting, source.folder())
    build = partial(
        build_language_student, job.config.student, teacher_folder=source.folder(),
        max_length=student_length(job.config), seed=job.settings.seed,
    )  # fmt: skip
    return first_student(job, build, _train_rows, kind=LANGUAGE_MODEL, alone=alone)


def _own_rows(job: TrainingJob) -> Manifest | None:
    """The rows of a student, or its control, with another tokenizer than the teacher's."""
    if job.role == "teacher" or not crosses_tokenizers(job.config):
        return None
    manifest = read_manifest(open_store(job.run_url), STUDENT_ROWS)
    assert manifest is not None
    return manifest


def needs_teacher(objective: object) -> bool:
    return isinstance(objective, TokenObjective) and objective.needs_teacher


def _train_rows(store: Store, data: Manifest) -> TokenRows:
    return lambda: (read_token_shard(store, entry) for entry in data.shards(*STUDENT_SPLITS))


def _open_cache(job: TrainingJob, data_store: Store, data: Manifest) -> NextTokenCache:
    """What this training learns from: the teacher's cache, which stands with the data, or one of its own."""
    store, folder = data_store, PARTS["cache"].folder
    if job.own_cache is not None:
        store, folder = open_store(job.run_url), job.own_cache
    manifest = read_manifest(store, folder)
    assert manifest is not None
    return NextTokenCache.open(store, folder, manifest, data, data_store=data_store)
