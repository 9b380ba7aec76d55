"""The pass over the texts of a language model's run: documents are tokenised and counted, and what is wrong is found.

Of a document memory holds a few numbers; its tokens wait in the system's temporary folder until they are written.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from raydistill.config.run import Config
from raydistill.data.documents import Asks, read_documents
from raydistill.data.readers import Fields, kind_of
from raydistill.data.sources import Dropped, Source, find_sources
from raydistill.data.splits import ValidationDraw
from raydistill.data.token_bytes import TokenBytes
from raydistill.data.token_rows import Rules, tokenise_documents
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models.folders import find_model
from raydistill.stages.language.surveyed import WRITTEN, Bools, Survey, SurveyedTexts
from raydistill.stages.progress import Progress


def fields_of(config: Config, source: str = "train") -> Fields:
    """The columns that the documents of a source are read from."""
    data = config.data
    if data.messages is not None:
        return Fields((("data.messages", data.messages),), 0, data.delimiter, data.max_row_bytes)
    if data.prompt is None:
        return Fields((("data.text", data.text),), 1, data.delimiter, data.max_row_bytes, data.txt_documents)
    columns = (("data.prompt", data.prompt), ("data.response", data.response))[: 1 if source == WRITTEN else 2]
    named = tuple((setting, name) for setting, name in columns if name is not None)
    optional = (data.response,) if data.response is not None and asks_of(config, source) != "never" else ()
    return Fields(named, len(named), data.delimiter, data.max_row_bytes, optional=optional)


def asks_of(config: Config, source: str) -> Asks:
    """Which prompts of a source the teacher answers."""
    synthesis = config.data.synthesis
    if synthesis is None or source == "answered" or (source == "test" and not synthesis.test):
        return "never"
    return "only" if source == WRITTEN else synthesis.rows if source == "train" else "missing"


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
    measured = TokenBytes(tokenizer, "teacher.model") if config.data.keep_text else None
    return Rules(tokenizer, config.data.max_length, splits, config.data.learnt_roles, measured)


def survey_texts(config: Config, progress: Progress) -> SurveyedTexts:
    """Reads and tokenises every document; everything about the sources that can be wrong is found here."""
    rules = rules_of(config)
    sources = {name: find_split(config, name) for name in own_splits(config)}
    _check_blocks(config, sources)
    found = {name: _survey(config, name, source, rules, progress) for name, source in sources.items()}
    drawn = np.zeros(len(found["train"]), bool)
    if "validation" not in sources:
        drawn = drawn_documents(config, found["train"])
    surveyed = SurveyedTexts(sources, found, drawn, taken_prompts(config, found, drawn), len(rules.tokenizer))
    _check_what_is_learnt(config, surveyed)
    return surveyed


def _check_blocks(config: Config, sources: dict[str, Source]) -> None:
    """Raises UserError where blocks of .txt files are asked for and there are none."""
    kinds = {kind_of(source.setting, path) for source in sources.values() for path in source.files}
    if config.data.txt_documents == "block" and "txt" not in kinds:
        raise UserError(f"data.txt_documents: found block, and the data are {', '.join(sorted(kinds))}. Remove it")


def _check_what_is_learnt(config: Config, surveyed: SurveyedTexts) -> None:
    """Raises UserError where the student, or its control, would have nothing to learn."""
    own, asked = surveyed.own_counts, surveyed.asked
    if config.data.synthesis is not None and not asked:
        raise UserError(
            "data.synthesis: every prompt has its response, so that nothing is written. Remove it, or set"
            " data.synthesis.rows=all"
        )
    written = WRITTEN in own or WRITTEN in asked
    if config.teacher.keeps_no_logits and not written:
        raise UserError(
            "teacher.next_tokens.codec: none learns from what the teacher wrote, and of train it writes nothing. Set"
            " data.synthesis.rows=all, or choose another codec"
        )
    if config.evaluate.control and not own["train"]["documents"]:
        raise UserError(
            "evaluate.control: the control learns without the teacher, and every response of train is the teacher's."
            " Set evaluate.control=false, or give responses"
        )


def _survey(config: Config, name: str, source: Source, rules: Rules, progress: Progress) -> Survey:
    found, documents = Survey(), read_documents(source, fields_of(config, name), asks_of(config, name))
    for one in tokenise_documents(documents, rules):
        if isinstance(one, Dropped):
            found.drop(one.reason, f"{source.files[one.file]}: row {one.number}")
        else:
            found.add(one)
        if (len(found) + found.dropped.total()) % 4096 == 0:
            progress.check()
    found.documents.close()
    check_dropped(found, source.setting, source.files[0], config.data.max_dropped)
    return found


def check_dropped(found: Survey, setting: str, file: str, max_dropped: float) -> None:
    """Raises UserError when none of the documents can be used, or too many cannot."""
    dropped, used = found.dropped.total(), len(found)
    if not used:
        reason = f"; {found.first_dropped}" if dropped else ""
        raise UserError(f"{setting}: {file}: has no usable rows ({dropped} dropped{reason})")
    if dropped > max_dropped * (dropped + used):
        raise UserError(
            f"{setting}: {found.first_dropped}; {dropped} of {dropped + used} rows cannot be used."
            " Mend the file, or raise data.max_dropped"
        )


def drawn_documents(config: Config, train: Survey) -> Bools:
    """Which of train's usable documents are for validation: whole documents, so that none is in both."""
    share = config.data.validation
    assert not isinstance(share, str)
    drawn = _drawn(len(train), share, config.data.split_seed, "")
    if not drawn.any():
        raise UserError(
            f"data.validation: a share of {share} of {len(drawn)} documents draws none. Raise it, or give a validation"
            " file"
        )
    return drawn


def taken_prompts(config: Config, found: dict[str, Survey], drawn: Bools) -> Bools:
    """Which of data.unlabelled's prompts are asked: all, or by seed so many that they are the share that is set."""
    there, share = len(found.get(WRITTEN, ())), config.data.unlabelled_share
    if share is None or not there:
        return np.ones(there, bool)
    others = len(found["train"]) - int(drawn.sum()) + len(found.get("answered", ()))
    wanted = round(others * share / (1 - share))
    if wanted > there:
        raise UserError(
            f"data.unlabelled_share: a share of {share} beside {others} documents is {wanted} prompts, and"
            f" data.unlabelled has {there}. Lower it, or give more"
        )
    return _drawn(there, wanted / there, config.data.split_seed, WRITTEN)


def _drawn(documents: int, share: float, seed: int, what: str) -> Bools:
    draw = ValidationDraw(Counter({what: documents}), share, seed)
    return np.array([draw.takes(what) for _ in range(documents)], bool)


def own_splits(config: Config) -> list[str]:
    """The sources that the config names, most by the split that they make."""
    data = config.data
    more = {"validation": isinstance(data.validation, str), WRITTEN: bool(data.unlabelled), "answered": data.answered}
    return ["train", "test", *(name for name, is_there in more.items() if is_there)]


def find_split(config: Config, name: str) -> Source:
    places = getattr(config.data, name)
    return find_sources(f"data.{name}", places if isinstance(places, tuple) else (places,))
