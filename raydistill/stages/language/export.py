"""Stage export of language models: each file is compared with the student at every learnt token of some rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydistill.config.cross_tokenizer import crosses_tokenizers
from raydistill.config.run import Config
from raydistill.data.student_rows import FOLDER as STUDENT_ROWS
from raydistill.data.token_shards import read_token_shard
from raydistill.data.tokens import load_tokenizer, pack_by_length, pad
from raydistill.exports.folder import ExportSource
from raydistill.exports.language_folder import LanguageExport, check_language_format, write_language_export
from raydistill.exports.serving import commands
from raydistill.losses.token_measures import own_measures, teacher_measures
from raydistill.models.kinds import LANGUAGE_MODEL
from raydistill.next_token import chunk_of
from raydistill.record.commit import Manifest
from raydistill.record.run import Run
from raydistill.stages.export import COMPARED, EXACT, export, in_words
from raydistill.stages.progress import Progress
from raydistill.stages.teachers import made_here
from raydistill.students.language import own_tokenizer

EXACT_AGREEMENT, EXACT_RISE = 0.999, 1e-4  # two tokens may be equally likely to rounding
Row = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]  # its tokens, and the positions that are learnt from


def export_language(config: Config, run: Run, progress: Progress) -> list[Manifest]:
    """Writes every format that the config asks for; their manifests. Raises what `export` raises."""
    return export(config, run, progress, LanguageExam)


def check_language_export(config: Config, student: Any, teacher_folder: Path) -> None:
    """Raises UserError for a format that this student, given without weights, or its tokenizer does not fit."""
    if config.export is None:
        return
    setting, folder = own_tokenizer(config.student) if crosses_tokenizers(config) else ("teacher.model", teacher_folder)
    tokenizer = load_tokenizer(folder, setting, pads=False)
    for format_name in config.export.formats:
        check_language_format(format_name, student, tokenizer)


class LanguageExam:
    """A language model as its files are written and compared, on the CPU."""

    def __init__(self, config: Config, run: Run, _scratch: Path) -> None:
        assert config.export is not None
        self._asked, self._name = config.export, config.name
        source, data = made_here("student", run), run.require("data")
        self._load = lambda: LANGUAGE_MODEL.load(source.setting, source.folder())
        self._student, _ = self._load()
        store, folder = run.home("data"), "data"
        if crosses_tokenizers(config):
            store, folder, data = run.store, STUDENT_ROWS, run.require("student_rows")
        self._vocabulary, rows, splits = data.facts["vocabulary"], [], []
        for split in COMPARED:
            for entry in data.shards(split) if len(rows) < config.export.rows else ():
                shard = read_token_shard(store, entry, folder)
                rows += [(shard.row(number), shard.positions(number)) for number in range(len(shard))]
                splits.append(split)
        self._rows: list[Row] = rows[: config.export.rows]
        self.splits = tuple(dict.fromkeys(splits))

    def write(self, format_name: str, folder: Path) -> None:
        model, tokenizer = self._load()
        write_language_export(model, tokenizer, folder, format_name, name=f"{self._name} student")

    def source(self, format_name: str, folder: Path) -> LanguageExport:
        return LanguageExport(f"export.formats: {format_name}", str(folder))

    def compare(self, written: ExportSource) -> dict[str, Any]:
        """Perplexity of both, KL, and the share of positions with the same likeliest token."""
        made = written.load_language()
        sums: dict[str, float] = {}
        lengths = np.array([len(tokens) for tokens, _ in self._rows])
        positions = sum(len(at) for _, at in self._rows)
        with torch.inference_mode():
            for batch in pack_by_length(lengths, chunk_of(self._vocabulary)):
                for name, value in self._sums(made, [self._rows[int(row)] for row in batch]).items():
                    sums[name] = sums.get(name, 0.0) + value
        means = {name: total / positions for name, total in sums.items()}
        return {
            "rows": len(self._rows), "positions": positions, "agreement": means["agreement"], "kl": means["kl"],
            "perplexity": math.exp(means["nll"]), "student_perplexity": math.exp(means["student_nll"]),
        }  # fmt: skip

    def _sums(self, made: Any, rows: list[Row]) -> dict[str, float]:
        """Over the positions of a batch."""
        inputs = pad([tokens for tokens, _ in rows], 0)
        rows_N = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(at) for _, at in rows]))
        at_N = torch.from_numpy(np.concatenate([at for _, at in rows]))
        labels_N = inputs["input_ids"][rows_N, at_N + 1]
        theirs_NV, ours_NV = (
            model(**inputs).logits[rows_N, at_N, : self._vocabulary].float() for model in (self._student, made)
        )
        ours, theirs = own_measures(ours_NV, labels_N), own_measures(theirs_NV, labels_N)
        found = {"nll": ours["nll"], "student_nll": theirs["nll"], **teacher_measures(ours_NV, theirs_NV)}
        return {name: float(found[name].sum()) for name in ("nll", "student_nll", "kl", "agreement")}

    def problem(self, format_name: str, facts: dict[str, Any]) -> str | None:
        exact, asked = format_name in EXACT, self._asked
        least = EXACT_AGREEMENT if exact else asked.min_agreement
        most = EXACT_RISE if exact else asked.max_perplexity_rise
        # Of numbers that are not finite neither comparison holds.
        if facts["agreement"] >= least and facts["perplexity"] <= (1 + most) * facts["student_perplexity"]:
            return None
        remedy = (
            "Leave the format out, and report the model that it happens with"
            if exact
            else "Set export.min_agreement or export.max_perplexity_rise, or leave the format out"
        )
        return (
            f"{in_words(facts)}; asked are an agreement of {least:.2%} and a perplexity at most {most:.2%} higher."
            f" {remedy}"
        )

    def commands(self, format_name: str, folder: str) -> list[str]:
        return commands(format_name, folder, self._name)
