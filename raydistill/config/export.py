"""`export`: the files to deploy."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, field_validator

from raydistill.config.section import Added, Section

Format = Literal[
    "onnx", "onnx-int8", "onnx-int8-static", "onnx-int4", "safetensors-bf16", "torchao-int8", "torchao-int4", "gguf",
    "gguf-q8",
]  # fmt: skip
FORMATS: tuple[str, ...] = get_args(Format)
LANGUAGE_FORMATS = ("gguf", "gguf-q8", "safetensors-bf16", "torchao-int8", "torchao-int4", "onnx")
CLASS_FORMATS = (
    "onnx", "onnx-int8", "onnx-int8-static", "onnx-int4", "safetensors-bf16", "torchao-int8", "torchao-int4",
)  # fmt: skip


class Export(Section):
    """Which files, and what each must keep of the student to be kept itself."""

    formats: tuple[Format, ...] = Field(default=("onnx",), min_length=1, description="each in a folder of its name")
    rows: int = Field(
        default=1024, ge=256, le=1_000_000, description="of test, each file is compared with the student on so many"
    )
    min_agreement: float = Field(
        default=0.98, ge=0, le=1, description="quantised: least share of rows, or tokens, with the student's answer"
    )
    max_accuracy_loss: float = Field(
        default=0.01, ge=0, le=1, description="quantised: most that accuracy may be below the student's, as a share"
    )
    max_perplexity_rise: float = Added(
        0.01,
        ge=0,
        le=1,
        description="quantised, causal_lm: most that perplexity may be above the student's, a share",
    )
    calibration_rows: int = Field(
        default=256, ge=16, le=100_000, description="onnx-int8-static: of train, evenly over it, to fit ranges on"
    )

    @field_validator("formats")
    @classmethod
    def _each_once(cls, formats: tuple[Format, ...]) -> tuple[Format, ...]:
        if twice := next((name for number, name in enumerate(formats) if name in formats[:number]), None):
            raise ValueError(f"{twice} stands twice. Remove one")
        return formats
