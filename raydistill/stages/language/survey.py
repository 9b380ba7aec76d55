"""The pass over the texts of a language model's run: documents are tokenised and counted, and what is wrong is found.

Of a document memory holds a few numbers; its tokens wait in the system's temporary folder until they are written.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from raydistill.config.run import Config
from raydistill.data.documents import Rules, Tokenised, TokenSpool, read_documents, tokenise_documents
from raydistill.data.sources import Dropped, Fields, Source, find_sources, kind_of
from raydistill.data.splits import ValidationDraw
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models.folders import find_model
from raydistill.stages.progress import Progress

SPLITS = ("train", "validation", "test")
COUNTS = ("documents", "rows", "tokens", "learnt", "long")


@dataclass
class Survey:
    """The pass over a source: every usable document and its numbers, and the dropped ones by reason."""

    documents: TokenSpool = field(default_factory=TokenSpool)
    rows: array[int] = field(default_factory=lambda: array("l"))
    tokens: array[int] = field(default_factory=lambda: array("l"))
    learnt: array[int] = field(default_factory=lambda: array("l"))
    long: array[int] = field(default_factory=lambda: array("l"))
    dropped: Counter[str] = field(default_factory=Counter)
    first_dropped: str = ""

    def add(self, found: Tokenised) -> None:
        self.documents.add(found)
        self.rows.append(len(found.rows))
        self.tokens.append(sum(len(row.tokens_L) for row in found.rows))
        self.learnt.append(sum(row.learnt for row in found.rows))
        self.long.append(found.is_long)

    def counts(self, chosen: np.ndarray) -> dict[str, int]:
        """COUNTS of the chosen documents."""
        of = {name: int(np.array(getattr(self, name), np.int64)[chosen].sum()) for name in COUNTS[1:]}
        return {"documents": int(chosen.sum()), **of}


@dataclass(frozen=True)
class SurveyedTexts:
    """The sources after the pass over them."""

    sources: dict[str, Source]
    found: dict[str, Survey]
    counts: dict[str, dict[str, int]]  # of every split, COUNTS
    vocabulary: int

    @property
    def rows(self) -> dict[str, int]:
        return {split: counts["rows"] for split, counts in self.counts.items()}

    @property
    def labels(self) -> list[str]:
        """None: what a language model predicts are tokens."""
        return []


def fields_of(config: Config) -> Fields:
    """The columns that documents are read from."""
    data = config.data
    if data.messages is not None:
        return Fields((("data.messages", data.messages),), 0, data.delimiter, data.max_row_bytes)
    if data.prompt is not None and data.response is not None:
        columns = (("data.prompt", data.prompt), ("data.response", data.response))
        return Fields(columns, 2, data.delimiter, data.max_row_bytes)
    return Fields((("data.text", data.text),), 1, data.delimiter, data.max_row_bytes, data.txt_documents)


def rules_of(config: Config) -> Rules:
    """How documents become rows, with the teacher's tokenizer."""
    folder = find_model("teacher.model", config.teacher.model, config.teacher.revision)
    tokenizer = load_tokenizer(folder, "teacher.model", pads=False)
    if config.data.messages is not None and tokenizer.chat_template is None:
        raise UserError(
            f"data.messages: {folder}: the tokenizer has no chat template. Save one beside it (chat_template.jinja), or"
            " use data.prompt and data.response"
        )
    splits = config.data.long_documents == "split"
    return Rules(tokenizer, config.data.max_length, splits, config.data.learnt_roles)


def survey_texts(config: Config, progress: Progress) -> SurveyedTexts:
    """Reads and tokenises every document; everything about the sources that can be wrong is found here."""
    rules, fields = rules_of(config), fields_of(config)
    sources = {split: find_split(config, split) for split in own_splits(config)}
    _check_blocks(config, sources)
    found = {
        split: _survey(source, fields, rules, config.data.max_dropped, progress) for split, source in sources.items()
    }
    counts = {split: survey.counts(np.ones(len(survey.rows), bool)) for split, survey in found.items()}
    if "validation" not in sources:
        drawn = drawn_documents(config, found["train"])
        if not drawn.any():
            raise UserError(
                f"data.validation: a share of {config.data.validation} of {len(drawn)} documents draws none."
                " Raise it, or give a validation file"
            )
        counts |= {"train": found["train"].counts(~drawn), "validation": found["train"].counts(drawn)}
    return SurveyedTexts(sources, found, {split: counts[split] for split in SPLITS}, len(rules.tokenizer))


def _check_blocks(config: Config, sources: dict[str, Source]) -> None:
    """Raises UserError where blocks of .txt files are asked for and there are none."""
    kinds = {kind_of(source.setting, path) for source in sources.values() for path in source.files}
    if config.data.txt_documents == "block" and "txt" not in kinds:
        raise UserError(f"data.txt_documents: found block, and the data are {', '.join(sorted(kinds))}. Remove it")


def _survey(source: Source, fields: Fields, rules: Rules, max_dropped: float, progress: Progress) -> Survey:
    found = Survey()
    for one in tokenise_documents(read_documents(source, fields), rules):
        if isinstance(one, Dropped):
            found.dropped[one.reason] += 1
            found.first_dropped = found.first_dropped or f"{source.files[one.file]}: row {one.number}: {one.reason}"
        else:
            found.add(one)
        if (len(found.rows) + found.dropped.total()) % 4096 == 0:
            progress.check()
    found.documents.close()
    dropped, used = found.dropped.total(), len(found.rows)
    if not used:
        reason = f"; {found.first_dropped}" if dropped else ""
        raise UserError(f"{source.setting}: {source.files[0]}: has no usable rows ({dropped} dropped{reason})")
    if dropped > max_dropped * (dropped + used):
        raise UserError(
            f"{source.setting}: {found.first_dropped}; {dropped} of {dropped + used} rows cannot be used."
            " Mend the file, or raise data.max_dropped"
        )
    return found


def drawn_documents(config: Config, train: Survey) -> np.ndarray:
    """Which of train's usable documents are for validation: whole documents, so that none is in both."""
    share, documents = config.data.validation, len(train.rows)
    assert not isinstance(share, str)
    draw = ValidationDraw(Counter({"": documents}), share, config.data.split_seed)
    return np.array([draw.takes("") for _ in range(documents)])


def own_splits(config: Config) -> list[str]:
    """The splits that have sources of their own."""
    return ["train", "test", *(["validation"] if isinstance(config.data.validation, str) else [])]


def find_split(config: Config, split: str) -> Source:
    return find_sources(f"data.{split}", (getattr(config.data, split),))
