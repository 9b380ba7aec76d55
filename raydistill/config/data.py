"""`data`: where the rows come from and what becomes of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raydistill.config.section import MAX_SEED, Added, Section


class Augment(Section):
    """More texts made from train's by rules (Tang et al. 2019, arXiv:1903.12136), for the student alone.

    With a model words are replaced by those that it would put there (TinyBERT, arXiv:1909.10351).
    """

    copies: int = Field(default=1, ge=1, le=1000, description="texts made from each row of train")
    mask: float = Field(default=0.1, ge=0, le=1, description="share of words that become the teacher's mask token")
    replace: float = Field(
        default=0.1, ge=0, le=1, description="share of words replaced by one of the same label's texts, or the model's"
    )
    ngram: float = Field(default=0.25, ge=0, le=1, description="share of texts cut to 1 to 5 words in a row")
    keep_labels: bool = Field(default=False, description="the student also learns these texts' original labels")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="of the rules")
    model: str | None = Added(
        None, min_length=1, description="a masked language model, a folder or a hub id; absent: words are of train"
    )
    revision: str | None = Added(None, description="of a hub id")
    candidates: int = Added(15, ge=1, le=1000, description="model: how many words for a place one is drawn from")

    @model_validator(mode="after")
    def _model_replaces_words(self) -> Augment:
        for name in ("revision", "candidates"):
            if self.model is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing without model; remove it")
        if self.model is not None and not self.replace:
            raise ValueError("model means nothing with replace: 0; raise it, or remove the model")
        return self

    @model_validator(mode="after")
    def _rules_do_something(self) -> Augment:
        if not self.mask + self.replace + self.ngram:
            raise ValueError("mask, replace and ngram are all 0, so that every copy would be its row; raise one")
        if self.mask + self.replace > 1:
            raise ValueError(f"mask {self.mask} and replace {self.replace} are shares of the same words; lower one")
        return self


class Synthesis(Section):
    """Responses that the teacher writes to prompts, for its student (Kim and Rush 2016, arXiv:1606.07947)."""

    engine: Literal["transformers", "vllm"] = Field(default="transformers", description="vllm needs the extra vllm")
    rows: Literal["missing", "all"] = Field(
        default="missing", description="which prompts of train: those without a response, or those with one too"
    )
    test: bool = Field(default=False, description="prompts of test without a response are answered too")
    answers: int = Field(default=1, ge=1, le=1000, description="responses to each prompt")
    temperature: float = Field(default=1.0, ge=0, le=100, description="0: always the likeliest token")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="tokens are drawn among the likeliest that have this share together"
    )
    max_new_tokens: int = Field(
        default=256, ge=1, le=131_072, description="of a response; it also ends where its row of max_length is full"
    )
    seed: int = Field(
        default=0, ge=0, le=MAX_SEED, description="of the draws, with the prompt's number and the answer's"
    )
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of the teacher while it writes")
    prompts_per_batch: int = Field(
        default=1, ge=1, le=4096,
        description="transformers: prompts of equal length that are answered at once; with 1 an answer depends on its"
        " prompt alone, with more also on which prompts stand beside it in their shard",
    )  # fmt: skip

    @model_validator(mode="after")
    def _draws_differ(self) -> Synthesis:
        if not self.temperature and self.answers > 1:
            raise ValueError(f"answers: found {self.answers} with temperature 0, so that all are the same; set it to 1")
        if not self.temperature and self.top_p < 1:
            raise ValueError("top_p means nothing with temperature 0; remove it")
        if self.engine == "vllm" and self.prompts_per_batch > 1:
            raise ValueError(
                "prompts_per_batch means nothing with engine: vllm, which makes its own batches; remove it"
            )
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
    unlabelled_share: float | None = Added(
        None, gt=0, lt=1, description="causal_lm: of the student's documents, drawn from unlabelled; absent: all of it"
    )
    answered: tuple[Annotated[str, Field(min_length=1)], ...] = Added(
        (), description="causal_lm: sources of prompts with responses that a model wrote, for the student alone"
    )
    synthesis: Synthesis | None = Added(None, description="causal_lm: prompts that the teacher answers; absent: none")
    keep_unlabelled: bool = Field(
        default=False, description="rows of train with an empty label join the unlabelled ones and are not dropped"
    )
    augment: Augment | None = Field(default=None, description="absent: no texts are made")
    text: str = Field(default="text", min_length=1, description="the column that holds the text")
    label: str = Field(default="label", min_length=1, description="the column that holds the label's name")
    prompt: str | None = Added(None, min_length=1, description="causal_lm: the column of prompts, in the place of text")
    response: str | None = Added(None, min_length=1, description="causal_lm: the column of what answers a prompt")
    messages: str | None = Added(
        None, min_length=1, description="causal_lm: the column of chats, lists of messages with role and content"
    )
    learnt_roles: tuple[Annotated[str, Field(min_length=1)], ...] = Added(
        ("assistant",), description="causal_lm, messages: whose messages are learnt; the others are read"
    )
    long_documents: Literal["split", "cut"] = Added(
        "split", description="causal_lm: what becomes of a text of more than max_length tokens"
    )
    txt_documents: Literal["file", "block"] = Added(
        "file", description="causal_lm, of .txt files: a document is a whole file, or a block between blank lines"
    )
    label_separator: str = Field(
        default="|", min_length=1, max_length=16, description="task multi_label: between the names in a text"
    )
    keep_text: bool = Added(
        False,
        description="causal_lm: each row's text, and where in it tokens end, for students with another tokenizer;"
        " absent: with train.loss.cross_tokenizer",
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

    @field_validator("unlabelled", "answered", mode="before")
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
