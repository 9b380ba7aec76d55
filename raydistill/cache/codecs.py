"""How a row of teacher logits is kept: fixed-width columns that read without a copy.

Every codec names the temperatures at which what it gives back may be used. The dense codecs keep all classes, so any
temperature may be asked of them; what they lose is rounding.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

FLOAT16_MAX = 65504.0
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Codec:
    """One way to keep logits: `encode` to Arrow columns and `decode` back to float32."""

    name: str
    temperatures: tuple[float, float]
    columns: Callable[[int], list[pa.Field]]
    encode: Callable[[Float32], list[pa.Array]]
    decode: Callable[[dict[str, pa.Array], int], Float32]

    def covers(self, temperature: float) -> bool:
        return self.temperatures[0] <= temperature <= self.temperatures[1]


ANY_TEMPERATURE = (0.0, float("inf"))


def fixed_binary(values: npt.NDArray[np.generic]) -> pa.Array:
    """A (N, bytes) block as fixed-size binary, one value a row, without a copy when it is contiguous."""
    block = np.ascontiguousarray(values)
    width = block.dtype.itemsize * int(np.prod(block.shape[1:], dtype=np.int64))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(block), [None, pa.py_buffer(block)])


def from_fixed_binary(array: pa.Array, dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """The (N, values) view of a fixed-size binary column, without a copy."""
    width = array.type.byte_width
    buffer = array.buffers()[1]
    start = array.offset * width
    flat = np.frombuffer(buffer, dtype=np.uint8, count=len(array) * width, offset=start)
    return flat.view(dtype).reshape(len(array), width // np.dtype(dtype).itemsize)


def _encode_float(dtype: type[np.float16] | type[np.float32]) -> Callable[[Float32], list[pa.Array]]:
    def encode(logits_NK: Float32) -> list[pa.Array]:
        if dtype is np.float16 and len(logits_NK) and np.abs(logits_NK).max() > FLOAT16_MAX:
            raise ValueError(f"a logit of {np.abs(logits_NK).max():.4g} does not fit float16; use codec dense-int8")
        return [fixed_binary(logits_NK.astype(dtype))]

    return encode


def _decode_float(dtype: type[np.float16] | type[np.float32]) -> Callable[[dict[str, pa.Array], int], Float32]:
    def decode(columns: dict[str, pa.Array], classes: int) -> Float32:
        kept = from_fixed_binary(columns["logits"], dtype)
        # torch widens halves seven times as fast as numpy; it wants memory that it could write to.
        return torch.from_numpy(kept.copy()).float().numpy() if dtype is np.float16 else kept.astype(np.float32)

    return decode


def encode_int8(logits_NK: Float32) -> list[pa.Array]:
    """Row by row, logits ~ scale * q + offset with q in -128..127; scale and offset are float16.

    The error is at most half a step, a quarter on average; a step is 1/254 of the row's range. q is taken against the
    rounded scale and offset, so that their rounding only widens the step. The row's largest class stays alone at the
    top, so that the argmax never changes: what rounding puts level with it is kept one step lower.
    """
    low, high = logits_NK.min(axis=1, keepdims=True), logits_NK.max(axis=1, keepdims=True)
    if len(logits_NK) and max(np.abs(low).max(), np.abs(high).max()) > FLOAT16_MAX:
        raise ValueError(
            "a logit does not fit the float16 offset of dense-int8; the teacher's outputs are out of range"
        )
    offset = ((high + low) / 2).astype(np.float16)
    reach = np.maximum(high - offset.astype(np.float32), offset.astype(np.float32) - low) / 127
    scale = np.nextafter(reach.astype(np.float16), np.float16(np.inf))
    q = np.rint((logits_NK - offset.astype(np.float32)) / scale.astype(np.float32)).clip(-127, 127).astype(np.int8)
    _keep_argmax(logits_NK, q)
    return [fixed_binary(q), fixed_binary(scale), fixed_binary(offset)]


def _keep_argmax(logits_NK: Float32, q_NK: npt.NDArray[np.int8]) -> None:
    """Lowers by one step what rounding lifted to the top class's value."""
    rows = np.arange(len(q_NK))
    top = logits_NK.argmax(axis=1)
    tied = q_NK >= q_NK[rows, top][:, None]
    tied[rows, top] = False
    q_NK[tied] = np.repeat(q_NK[rows, top] - 1, tied.sum(axis=1))


def decode_int8(columns: dict[str, pa.Array], classes: int) -> Float32:
    scale = from_fixed_binary(columns["scale"], np.float16).astype(np.float32)
    offset = from_fixed_binary(columns["offset"], np.float16).astype(np.float32)
    logits_NK = from_fixed_binary(columns["logits"], np.int8).astype(np.float32)
    logits_NK *= scale
    logits_NK += offset
    return logits_NK


def _float_columns(width: int) -> Callable[[int], list[pa.Field]]:
    return lambda classes: [pa.field("logits", pa.binary(width * classes), nullable=False)]


def _int8_columns(classes: int) -> list[pa.Field]:
    widths = {"logits": classes, "scale": 2, "offset": 2}
    return [pa.field(name, pa.binary(width), nullable=False) for name, width in widths.items()]


CODECS = {
    codec.name: codec
    for codec in (
        Codec(
            "dense-float32", ANY_TEMPERATURE, _float_columns(4), _encode_float(np.float32), _decode_float(np.float32)
        ),
        Codec(
            "dense-float16", ANY_TEMPERATURE, _float_columns(2), _encode_float(np.float16), _decode_float(np.float16)
        ),
        Codec("dense-int8", ANY_TEMPERATURE, _int8_columns, encode_int8, decode_int8),
    )
}
