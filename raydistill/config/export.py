"""`export`: the files to deploy."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, field_validator

from raydistill.config.section import Section

Format = Literal["onnx", "onnx-int8", "onnx-int8-static", "safetensors-bf16", "torchao-int8"]
FORMATS: tuple[str, ...] = get_args(Format)


class Export(Section):
    """Which files, and what each must keep of the student to be kept itself."""

    formats: tuple[Format, ...] = Field(default=("onnx",), min_length=1, description="each in a folder of its name")
    rows: int = Field(
        default=1024, ge=256, le=1_000_000, description="of test, each file is compared with the student on so many"
    )
    min_agreement: float = Field(
        default=0.98, ge=0, le=1, description="quantised: least share of rows with the student's answer"
    )
    max_accuracy_loss: float = Field(
        default=0.01, ge=0, le=1, description="quantised: most that accuracy may be below the student's, as a share"
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
