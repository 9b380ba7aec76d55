"""What a model says of texts: labels with their probabilities, or a text that goes on.

Shapes: N texts, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydistill.data.chats import prompt_of
from raydistill.data.tokens import load_tokenizer
from raydistill.errors import UserError
from raydistill.models.writing import completions
from raydistill.serving.served import Served
from raydistill.stages.forward import Forward
from raydistill.stages.language.answering import Decoder

DIGITS = 6  # of a probability as it is written
MAX_TOKENS = 128


@dataclass(frozen=True)
class Asked:
    """How much of an answer is wanted, and how it is found."""

    top: int = 0  # classes to list, the likeliest first
    all_classes: bool = False  # every class's probability
    threshold: float | None = None  # multi_label: a label from this probability on; absent: above one half
    max_tokens: int | None = None  # causal_lm: to write; absent: MAX_TOKENS
    chat: bool = False  # causal_lm: the text is a user's message, put into the tokenizer's chat template


AS_IT_IS = Asked()


def check_asked(served: Served, asked: Asked) -> None:
    """Raises UserError for a setting that means nothing with the model's task, or is out of its bounds."""
    of_task = {
        "--top": ("classification, multi_label", asked.top > 0),
        "--all": ("classification, multi_label", asked.all_classes),
        "--threshold": ("multi_label", asked.threshold is not None),
        "--max-tokens": ("causal_lm", asked.max_tokens is not None),
        "--chat": ("causal_lm", asked.chat),
    }
    for option, (tasks, is_given) in of_task.items():
        if is_given and served.task not in tasks.split(", "):
            raise UserError(f"{option}: is for {tasks}, and the model is for {served.task}. Leave it out")
    if served.task == "causal_lm" and (asked.max_tokens or MAX_TOKENS) >= served.max_length:
        raise UserError(
            f"--max-tokens: found {asked.max_tokens or MAX_TOKENS}, and the model reads and writes"
            f" {served.max_length} tokens in all. Lower it"
        )


def open_model(served: Served, asked: Asked) -> ClassAnswers | TextAnswers:
    """The loaded model, which answers texts with records. Raises UserError when it does not load."""
    check_asked(served, asked)
    return TextAnswers(served, asked) if served.task == "causal_lm" else ClassAnswers(served, asked)


class ClassAnswers:
    """A classifier's answers as records: what `evaluate` counts as its answer, by the same forward."""

    def __init__(self, served: Served, asked: Asked) -> None:
        self._served, self._asked = served, asked
        self._forward = Forward(served.source, served.labels, max_length=served.max_length)

    def __call__(self, texts: Sequence[str], asked: Sequence[Asked] | None = None) -> list[dict[str, Any]]:
        """For each text {"label", "probability"}, or where a row may have several labels {"labels": [of these]}.

        "top" has the likeliest classes and "all" every class by its name, where they are asked for: of all texts alike
        or, with `asked`, of each.
        """
        if not texts:
            return []
        shares_NK = self._probabilities(self._forward.logits(self._forward.tokens(texts)))
        each = asked or [self._asked] * len(texts)
        return [self._record(shares_K, wanted) for shares_K, wanted in zip(shares_NK, each, strict=True)]

    def _probabilities(self, logits_NK: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        logits = torch.from_numpy(logits_NK).double()
        return (logits.sigmoid() if self._served.task == "multi_label" else logits.softmax(dim=-1)).numpy()

    def _record(self, shares_K: npt.NDArray[np.float64], asked: Asked) -> dict[str, Any]:
        order = np.argsort(-shares_K, kind="stable")
        named = [{"label": self._served.labels[k], "probability": round(float(shares_K[k]), DIGITS)} for k in order]
        if self._served.task == "multi_label":
            found: dict[str, Any] = {"labels": named[: _chosen(shares_K, asked.threshold)]}
        else:
            found = dict(named[0])
        if asked.top:
            found["top"] = named[: asked.top]
        if asked.all_classes:
            shares = zip(self._served.labels, shares_K.tolist(), strict=True)
            found["all"] = {name: round(share, DIGITS) for name, share in shares}
        return found


def _chosen(shares_K: npt.NDArray[np.float64], threshold: float | None) -> int:
    """How many classes, the likeliest first, are labels of a row."""
    return int((shares_K > 0.5).sum() if threshold is None else (shares_K >= threshold).sum())


class TextAnswers:
    """A language model's likeliest continuations as records."""

    def __init__(self, served: Served, asked: Asked) -> None:
        self._asked, self._setting = asked, served.source.setting
        self._new_tokens = asked.max_tokens or MAX_TOKENS
        self._room = served.max_length - self._new_tokens
        folder = served.source.folder()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = served.source.load_language().to(device)
        self._tokenizer = load_tokenizer(folder, self._setting, pads=False)
        self._decoder = Decoder(served.source)
        if asked.chat and self._tokenizer.chat_template is None:
            raise UserError(f"--chat: {folder}: its tokenizer has no chat template. Leave it out")

    def __call__(self, texts: Sequence[str], asked: Sequence[Asked] | None = None) -> list[dict[str, Any]]:
        """For each text {"completion"}, with "cut": true where only its end was read."""
        prompts = [self._tokens(text) for text in texts]
        made = completions(
            self._model, [p[-self._room :] for p in prompts], self._new_tokens, ends=self._decoder.ends,
            vocabulary=self._decoder.vocabulary,
        )  # fmt: skip
        return [
            {"completion": self._decoder.written(prompt, tokens).answer.text}
            | ({"cut": True} if len(prompt) > self._room else {})
            for prompt, tokens in zip(prompts, made, strict=True)
        ]

    def _tokens(self, text: str) -> list[int]:
        if not self._asked.chat:
            return self._tokenizer(text)["input_ids"]
        return self._tokenizer(prompt_of(self._tokenizer, text), add_special_tokens=False)["input_ids"]
