"""A model as an ONNX file: in float32, or with weights and activations of matrix products in 8 bits.

The file takes input_ids and attention_mask, int64 (N, T), and gives logits: of a classifier float32 (N, K), of a
language model (N, T, V), all of them computed anew at each call.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raydistill.errors import UserError

ONNX_FILE = "model.onnx"
OPSET = 18
MAX_BYTES = 2_000_000_000  # a protobuf holds 2 GiB, and the graph needs some of it
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INPUTS = ("input_ids", "attention_mask")
# Products with a weight, and the tables of embeddings; what attention multiplies has no weight.
QUANTISED = ["MatMul", "Gemm", "Gather"]
BLOCK = 32  # weights of 4 bits that share a scale and a zero


def check_onnx() -> None:
    """Raises UserError when a package is not installed."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise UserError(f"export.formats: onnx needs {', '.join(missing)}. Install it: pip install 'raydistill[onnx]'")


class _Logits(torch.nn.Module):
    """A model with tensors alone at both ends."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def write_onnx(model: Any, path: Path) -> None:
    """Writes a float32 model, for any number of rows and tokens. Raises UserError for one that is too large, or whose
    code cannot be traced.
    """
    import onnx

    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    size_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size_bytes > MAX_BYTES:
        raise UserError(
            f"export.formats: onnx: the student has {size_bytes / 1e9:.1f} GB of weights and a file holds"
            f" {MAX_BYTES / 1e9:.0f} GB. Use safetensors-bf16"
        )
    ids = torch.zeros((2, 8), dtype=torch.int64)
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with _quiet():
        program = torch.onnx.export(
            _Logits(model.eval()), (ids, torch.ones_like(ids)), dynamo=True, opset_version=OPSET, external_data=False,
            input_names=INPUTS, output_names=["logits"], dynamic_shapes=dict.fromkeys(INPUTS, dynamic), verbose=False,
        )  # fmt: skip
    assert program is not None
    made = program.model_proto
    _without_notes(made)
    onnx.checker.check_model(made)
    onnx.save(made, str(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell of each operator that they do not know on the way to the one that they take."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _without_notes(model: Any) -> None:
    """Removes what the exporter notes of each node: lines and paths of the code that it came from."""
    for holder in (model.graph, *model.functions):
        for part in (holder, *holder.node, *getattr(holder, "value_info", ()), *getattr(holder, "initializer", ())):
            part.ClearField("doc_string")
            part.ClearField("metadata_props")
    for value in (*model.graph.input, *model.graph.output):
        value.ClearField("metadata_props")


def quantise_onnx(
    source: Path, path: Path, *, rows: list[dict[str, npt.NDArray[np.int64]]] | None = None, bits: int = 8
) -> None:
    """Writes the file at `source` with 8-bit products: ranges of activations measured in each call, or on `rows`.

    With `bits` 4 the weights of products have 4 bits, in blocks, and their activations stay float32; tables have 8.

    Weights take 7 of the 8 bits, each column its own scale, because processors without VNNI add two products in 16
    bits: so the file computes the same on all of them. Activations are unsigned: with signed ones onnxruntime has no
    fast product on such CPUs and takes weights back to float in each call.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Rows(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(rows or ())

        def get_next(self) -> Any:
            return next(self._left, None)

    options: dict[str, Any] = {
        "op_types_to_quantize": QUANTISED, "per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8,
        "extra_options": {"MatMulConstBOnly": True},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, _quiet():
        ready = Path(folder) / ONNX_FILE
        # Folds the transposition of each weight, which would hide that it is a constant.
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        if bits == 4:
            eight = Path(folder) / "tables.onnx"
            options["op_types_to_quantize"] = [kind for kind in QUANTISED if kind != "MatMul"]
            quantize_dynamic(str(ready), str(eight), **options)
            _quantise_blocks(eight, path)
        elif rows is None:
            quantize_dynamic(str(ready), str(path), **options)
        else:
            options |= {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8}
            quantize_static(str(ready), str(path), Rows(), **options)


def _quantise_blocks(source: Path, path: Path) -> None:
    """Puts 4-bit weights in the place of what activations are multiplied with."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    asked = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, op_types_to_quantize=("MatMul",))
    made = MatMulNBitsQuantizer(onnx.load(str(source)), algo_config=asked)
    made.process()
    written: Any = made.model  # the library's own class by now
    written.save_model_to_file(str(path), use_external_data_format=False)


class OnnxModel(torch.nn.Module):
    """An ONNX file that is called as a classifier of transformers is; it computes on the CPU.

    It takes as many threads as torch has when it is opened.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        from onnxruntime import InferenceSession
        from onnxruntime.capi.onnxruntime_pybind11_state import SessionOptions

        options = SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    @property
    def device(self) -> torch.device:
        """Where it computes, by the name that transformers' models have for it."""
        return torch.device("cpu")

    def logits(self, input_ids: npt.NDArray[np.int64], attention_mask: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """float32 (N, K)."""
        return np.asarray(self._session.run(["logits"], {"input_ids": input_ids, "attention_mask": attention_mask})[0])

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> SimpleNamespace:
        logits = self.logits(input_ids.cpu().numpy(), attention_mask.cpu().numpy())
        return SimpleNamespace(logits=torch.from_numpy(logits).to(input_ids.device))
