"""The demo of language models: short stories, a teacher that starts from a new small Llama, a student several times
smaller.

It needs no network and no GPU: stories and tokenizer are made here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from raydistill.config.file import validate
from raydistill.config.run import Config
from raydistill.models.loading import quiet_transformers
from raydistill.stories import write_stories

VOCABULARY = 384
BEGIN, END, PADDING = "<s>", "</s>", "<pad>"


def language_demo_config(storage: Path, *, train: int = 1200, test: int = 200) -> Config:
    """Writes the demo's stories and starting model below `storage`/demo-language-input; its run's configuration."""
    folder = storage / "demo-language-input"
    train_file, test_file = write_stories(folder, train=train, test=test)
    # Made once: a run that goes on needs the model it began with.
    if not (folder / "model").exists():
        staged = folder / ".model.tmp"
        texts = [json.loads(line)["text"] for line in train_file.read_text().splitlines()]
        write_new_llama(staged, texts, hidden_size=128, layers=3, heads=4, vocabulary=VOCABULARY, positions=256)
        staged.rename(folder / "model")
    settings = {
        "name": "demo-language",
        "storage": str(storage),
        "task": "causal_lm",
        "data": {"train": str(train_file), "test": str(test_file), "max_length": 256, "shard_rows": 256},
        "teacher": {
            "model": str(folder / "model"),
            "fine_tune": {"epochs": 4, "learning_rate": 3.0e-3, "batch_size": 4, "cpus_per_worker": 1},
        },
        "student": {
            "init": "config", "model_type": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4,
            "feed_forward": 176, "tie_embeddings": True,
        },
        # Products of 64 numbers gain nothing from bfloat16.
        "train": {
            "epochs": 3, "learning_rate": 2.5e-3, "batch_size": 2, "choose": "last", "cpus_per_worker": 1,
            "precision": "fp32", "loss": {"alpha": 0.9},
        },
        "evaluate": {"latency_requests": 64},
    }  # fmt: skip
    return validate(settings, {}, "demo")


def write_new_llama(
    folder: Path, texts: Iterable[str], *, hidden_size: int, layers: int, heads: int, vocabulary: int, positions: int,
    seed: int = 0,
) -> None:  # fmt: skip
    """A Llama with new weights and a byte-level BPE tokenizer trained on these texts, in Hugging Face form."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    quiet_transformers()
    tokenizer = new_tokenizer(texts, vocabulary)
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=8 * hidden_size // 3, max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder))


def new_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer of so many tokens, which can write any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PADDING, BEGIN, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    pieces.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token=BEGIN, eos_token=END, pad_token=PADDING, clean_up_tokenization_spaces=False
    )
