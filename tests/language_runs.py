"""Tiny language models and their runs without Ray: stories, a tokenizer, a teacher of two layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from raydistill.data.token_shards import read_token_shard
from raydistill.demo_language import new_tokenizer
from raydistill.record.commit import read_manifest
from raydistill.record.store import LocalStore
from raydistill.stories import stories

SIZES = {
    "llama": {"num_key_value_heads": 1, "intermediate_size": 32},
    "qwen2": {"num_key_value_heads": 1, "intermediate_size": 32},
    "qwen3": {"num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 8},
    "mistral": {"num_key_value_heads": 1, "intermediate_size": 32},
    "gemma": {"num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 8},
    "gpt2": {"n_inner": 32},
    "gemma2": {"num_key_value_heads": 1, "intermediate_size": 32, "head_dim": 8, "sliding_window": 4},
    "granite": {"num_key_value_heads": 1, "intermediate_size": 32, "logits_scaling": 3.0},
}


def texts(count: int = 60, seed: int = 0) -> list[str]:
    return list(stories(count, seed=seed))


def tokenizer(vocabulary: int = 300) -> Any:
    return new_tokenizer(texts(), vocabulary)


def unigram_tokenizer(vocabulary: int = 120) -> Any:
    """A tokenizer as SentencePiece makes them: a Unigram model, a sign before each word, characters that it lacks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    pieces.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tiny_language_model(architecture: str = "llama", *, vocabulary: int = 64, seed: int = 0, **changes: Any) -> Any:
    """A causal model of 2 layers and width 16 with weights of size 0.3, so that its attention matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocabulary, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    config = AutoConfig.for_model(architecture, **(sizes | SIZES[architecture] | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def write_model(folder: Path, made: Any, **changes: Any) -> Path:
    """A model with the tokenizer, in Hugging Face form."""
    tiny_language_model(vocabulary=len(made), **changes).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def mean_nll(folder: Path, model: Any, split: str) -> tuple[float, int]:
    """Of every token of a split of texts, given those before it in its row, one row at a time; and how many."""
    store, total, count = LocalStore(str(folder)), 0.0, 0
    data = read_manifest(store, "data")
    assert data is not None
    for entry in data.shards(split):
        shard = read_token_shard(store, entry)
        for number in range(len(shard)):
            ids = torch.from_numpy(shard.row(number)).long()[None]
            with torch.no_grad():
                total += model.eval()(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count, count


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
