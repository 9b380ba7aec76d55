"""What one rank of a language model's training learns: the next token of packed rows, from the teacher and the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raydistill.cache.next_tokens import NextTokenCache
from raydistill.data.token_loader import TokenBatch, TokenSplit, check_vocabulary
from raydistill.data.token_order import token_steps
from raydistill.data.tokens import load_tokenizer
from raydistill.losses.fused_linear import Teacher, TokenObjective
from raydistill.models.loading import load_language_model
from raydistill.models.saving import save_language_model
from raydistill.next_token import MEASURES, NextTokenModel, check_parts, model_weights, shared_names
from raydistill.record.commit import read_manifest
from raydistill.record.run import PARTS
from raydistill.record.store import open_store
from raydistill.stages.job import TrainingJob
from raydistill.stages.lesson import Parts, Steps
from raydistill.stages.meter import Meter
from raydistill.stages.ranks import all_reduce, rank_and_world
from raydistill.stages.training_job import student_splits
from raydistill.students.language import build_language_student
from raydistill.targets import HiddenTargets, OutputHead, SparseTargets

VALIDATION_TOKENS = {"cpu": 4096, "cuda": 65_536}


class LanguageLesson:
    """A causal language model: it learns tokens, each from those before it in its row."""

    unit = "tokens"

    def __init__(self, job: TrainingJob, device: torch.device) -> None:
        self._job, self._device = job, device
        store = open_store(job.data_url)
        data = read_manifest(store, "data")
        assert data is not None
        vocabulary = data.facts["vocabulary"]
        self._model, self.tokenizer = build_language_model(job)
        check_vocabulary(data, self._model.get_output_embeddings().weight.shape[0], job.title)
        check_parts(job.title, self._model.eval(), vocabulary)
        if job.settings.gradient_checkpointing:
            self._model.gradient_checkpointing_enable()
        self.model: torch.nn.Module = NextTokenModel(self._model, vocabulary)
        self.frozen = shared_names(self.model)
        self.depths: Mapping[str, int] = {}
        cache = None
        if job.uses_cache:
            folder = PARTS["cache"].folder
            manifest = read_manifest(store, folder)
            assert manifest is not None
            cache = None if job.config.teacher.keeps_no_logits else NextTokenCache.open(store, folder, manifest, data)
        self._head: OutputHead | None = None
        if cache is not None and cache.head is not None:
            head = cache.head
            bias = None if head.bias_V is None else head.bias_V.to(device)
            self._head = replace(head, weight_VD=head.weight_VD.to(device), bias_V=bias)
        self._train, self._validation = (
            TokenSplit(store, splits, data, cache) for splits in (job.splits, ("validation",))
        )
        self.rows = self._train.rows
        self._batch_tokens = job.settings.batch_size * job.config.data.max_length
        self.per_pass = self._train.steps(self._batch_tokens)
        # A control, without what the teacher wrote, takes as many steps as its student.
        counted = job.splits if job.role == "teacher" else student_splits(job.config)
        tokens = sum(found["tokens"] for split, found in data.facts["counts"].items() if split in counted)
        self.per_epoch = token_steps(tokens, self._batch_tokens)

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

    def _on_device(self, teacher: Teacher) -> Teacher:
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
        save_language_model(self._model, self.tokenizer, model_weights(weights), folder)
        return self._model

    def close(self) -> None:
        for split in (self._train, self._validation):
            split.close()


def build_language_model(job: TrainingJob) -> tuple[Any, Any]:
    """The model with its first weights, and its tokenizer; the same on every rank."""
    folder, setting = job.source.folder(), job.source.setting
    if job.role == "teacher":
        return load_language_model(setting, folder), load_tokenizer(folder, setting, pads=False)
    return build_language_student(
        job.config.student, teacher_folder=folder, max_length=job.config.data.max_length, seed=job.settings.seed
    )
