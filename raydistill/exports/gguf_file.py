"""A language model as a GGUF file, for llama.cpp, Ollama and vLLM: by the gguf package, for the architectures below.

Matrices are float16, or 8 bits with a scale for every 32 numbers (Q8_0); vectors stay float32. Llama's queries and keys
are turned from halves to pairs, which is how llama.cpp rotates them; Gemma's norms hold 1 + weight. Gemma's scale of
attention has no place in the file: llama.cpp takes the one that Google's models of so many layers have, and the queries
are multiplied by what the student's is besides.
"""

from __future__ import annotations

import copy
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from raydistill.errors import UserError
from raydistill.exports.gguf_tokenizer import GgufTokenizer, gguf_tokenizer

GGUF_FILE = "model.gguf"
# transformers' name of an architecture, and llama.cpp's.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gpt2": "gpt2",
}  # fmt: skip
QUANTISED = {"gguf": "F16", "gguf-q8": "Q8_0"}
LARGEST = 65504.0  # of float16
GEMMA_27B_LAYERS = 46  # by which llama.cpp knows it, and divides by the width over the heads


def check_gguf() -> None:
    """Raises UserError when a package is not installed: gguf writes the file, accelerate is needed to read it."""
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise UserError(f"export.formats: gguf needs {', '.join(missing)}. Install it: pip install 'raydistill[gguf]'")


def check_gguf_model(model: Any, tokenizer: Any) -> None:
    """Raises UserError for a model, which may be without weights, or a tokenizer that a file cannot hold."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"export.formats: gguf: found a student of {config.model_type!r}, which is not known for it. Use"
            f" {', '.join(ARCHITECTURES)}, or leave the format out"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"export.formats: gguf: the student turns its positions by {rope['rope_type']!r}, which is not built."
            " Leave the format out, and serve safetensors"
        )
    gguf_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0])
    _names(model)


def write_gguf(model: Any, tokenizer: Any, path: Path, format_name: str, *, name: str) -> None:
    """Writes weights, sizes and tokenizer. Raises UserError for what the format cannot hold."""
    from gguf import GGUFWriter, LlamaFileType

    check_gguf_model(model, tokenizer)
    config, kind = model.config, ARCHITECTURES[model.config.model_type]
    writer = GGUFWriter(str(path), kind)
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{QUANTISED[format_name]}"])
    _write_sizes(writer, config)
    _write_tokenizer(writer, gguf_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0]))
    for tensor, values in gguf_tensors(model):
        _write_tensor(writer, tensor, values, QUANTISED[format_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_sizes(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    if config.model_type == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        # llama.cpp always caps: where the student does not, so high that no logit is near it.
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping or LARGEST)
        writer.add_final_logit_softcapping(config.final_logit_softcapping or LARGEST)


def context_length(config: Any) -> int:
    """The tokens that it reads: where llama.cpp knows no sliding window, those of one window, which is all the same."""
    window = getattr(config, "sliding_window", None) if config.model_type in ("mistral", "qwen2", "qwen3") else None
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def gguf_config(config: Any) -> Any:
    """The configuration of the model that the file holds."""
    found = copy.deepcopy(config)
    if config.model_type == "gemma2":
        found.query_pre_attn_scalar = _gemma_scalar(config)
    return found


def _gemma_scalar(config: Any) -> int:
    """llama.cpp divides Gemma 2's products of queries and keys by the root of this."""
    if config.num_hidden_layers == GEMMA_27B_LAYERS:
        return config.hidden_size // config.num_attention_heads
    return config.head_dim


def _write_tokenizer(writer: Any, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores)
        writer.add_add_space_prefix(tokenizer.adds_space)
    if tokenizer.merges:
        writer.add_token_merges(tokenizer.merges)
    for kind, number in tokenizer.special.items():
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(tokenizer.adds_begin)
    writer.add_add_eos_token(tokenizer.adds_end)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def gguf_tensors(model: Any) -> list[tuple[str, npt.NDArray[np.float32]]]:
    """Every weight, float32, by the file's name for it and as the file orders it."""
    parameters = dict(model.named_parameters())
    return [
        (held, _turned(name, parameters[name].detach().float().cpu().numpy(), model.config))
        for name, held in _names(model).items()
    ]


def _names(model: Any) -> dict[str, str]:
    """The file's name of every parameter; of an output layer that is the embeddings there is one.

    Raises UserError for a parameter that llama.cpp does not know.
    """
    import gguf

    config, kind = model.config, ARCHITECTURES[model.config.model_type]
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    known, found = gguf.get_tensor_name_map(arch, config.num_hidden_layers), {}
    for name, _ in model.named_parameters():
        held = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if held is None:
            raise UserError(f"export.formats: gguf: {kind} has no place for the student's {name}. Leave the format out")
        found[name] = held
    return found


def _turned(name: str, values: npt.NDArray[np.float32], config: Any) -> npt.NDArray[np.float32]:
    """A weight in the order, and of the size, that llama.cpp has for it."""
    if ARCHITECTURES[config.model_type] == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    if config.model_type == "gemma2" and name.endswith("norm.weight"):
        return values + 1
    if config.model_type == "gemma2" and name.endswith("q_proj.weight"):
        return values * np.float32(math.sqrt(_gemma_scalar(config) / config.query_pre_attn_scalar))
    if config.model_type == "gpt2" and values.ndim == 2 and ".h." in name:
        return np.ascontiguousarray(values.T)  # its layers hold weights as (in, out)
    return values


def _write_tensor(writer: Any, name: str, values: npt.NDArray[np.float32], quantised: str) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

    kind = GGMLQuantizationType[quantised]
    if values.ndim < 2 or name.startswith("position_embd"):
        kind = GGMLQuantizationType.F32
    elif values.shape[-1] % GGML_QUANT_SIZES[kind][0]:
        kind = GGMLQuantizationType.F16  # its rows are no multiple of a block
    if kind == GGMLQuantizationType.F16 and (largest := float(np.abs(values).max())) > LARGEST:
        raise UserError(
            f"export.formats: gguf: {name} has a weight of {largest:.3g}, and float16 goes to {LARGEST:.0f}."
            " Use safetensors-bf16"
        )
    writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)


def tokens_of(path: Path) -> list[str]:
    """The tokens that a file holds, as gguf's reader finds them."""
    from gguf import GGUFReader

    field = GGUFReader(str(path)).fields["tokenizer.ggml.tokens"]
    return [bytes(field.parts[place]).decode("utf-8") for place in field.data]
