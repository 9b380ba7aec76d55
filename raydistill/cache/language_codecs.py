"""What each codec of a language model's cache promises, and at which temperatures.

Only what is linear in the teacher's probabilities can be estimated from a sample of them, and a temperature is not
linear: from p alone p^(1/T) / sum p^(1/T) needs every token's probability, also of those that were not kept. So what
was kept at temperature 1 serves temperature 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LanguageCodec:
    """promise: exact (rounding apart), unbiased (right in the mean over seeds) or biased, within the temperatures."""

    name: str
    promise: Literal["exact", "unbiased", "biased"]
    temperatures: tuple[float, float]
    why_not_others: str = ""

    def covers(self, temperature: float) -> bool:
        return self.temperatures[0] <= temperature <= self.temperatures[1]


_ANY, _ONE = (0.0, float("inf")), (1.0, 1.0)
_DRAWN = "its tokens were drawn by their probabilities at temperature 1"

LANGUAGE_CODECS: Mapping[str, LanguageCodec] = {
    codec.name: codec
    for codec in (
        LanguageCodec("dense", "exact", _ANY),
        LanguageCodec("hidden", "exact", _ANY),
        LanguageCodec("sampled", "unbiased", _ONE, _DRAWN),
        LanguageCodec("random", "unbiased", _ONE, _DRAWN),
        LanguageCodec("topk", "biased", _ONE, "the tail's mass is known at temperature 1 alone"),
    )
}


def check_temperatures(codec: str, *temperatures: float) -> None:
    """Raises ValueError, with the reason and the remedy, for a temperature that a cache of this codec cannot serve."""
    kept = LANGUAGE_CODECS[codec]
    for temperature in temperatures:
        if not kept.covers(temperature):
            raise ValueError(
                f"temperature {temperature:g}: a cache of codec {codec} serves temperature 1 alone:"
                f" {kept.why_not_others}. Use temperature 1, or codec hidden, which serves any"
            )
