"""The demo: support tickets, a teacher that starts from a new small BERT, a student more than ten times smaller.

It needs no network and no GPU: tickets and tokenizer are made here.
"""

from __future__ import annotations

import csv
from pathlib import Path

from raydistill.config.file import validate
from raydistill.config.run import Config
from raydistill.models import quiet_transformers
from raydistill.tickets import write_tickets

VOCABULARY = 1500
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def demo_config(storage: Path, *, train_rows: int = 3000, test_rows: int = 2000) -> Config:
    """Writes the demo's tickets and starting model below `storage`/demo-input; the configuration of its run."""
    folder = storage / "demo-input"
    train, test = write_tickets(folder, train_rows=train_rows, test_rows=test_rows)
    with open(train, newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    # Made once: the tokenizer's training breaks ties by chance, and a run that goes on needs the model it began with.
    if not (folder / "model").exists():
        staged = folder / ".model.tmp"
        write_new_bert(staged, texts, hidden_size=128, layers=3, heads=2, vocabulary=VOCABULARY)
        staged.rename(folder / "model")
    settings = {
        "name": "demo",
        "storage": str(storage),
        "data": {"train": str(train), "test": str(test), "label": "category", "max_length": 64, "shard_rows": 1024},
        "teacher": {
            "model": str(folder / "model"),
            "fine_tune": {"epochs": 4, "learning_rate": 1.0e-3},
            "codec": "dense-int8",
        },
        "student": {"init": "config", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "dropout": 0.05},
        # The labels of ambiguous tickets are drawn; the teacher's probabilities alone are the better target. 300
        # validation rows cannot tell epochs apart.
        "train": {
            "epochs": 8,
            "learning_rate": 4.0e-3,
            "choose": "last",
            "cpus_per_worker": 1,
            "loss": {"temperature": 2.0, "alpha": 1.0},
        },
    }
    return validate(settings, {}, "demo")


def write_new_bert(
    folder: Path,
    texts: list[str],
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    vocabulary: int,
    positions: int = 128,
    seed: int = 0,
) -> None:
    """A BERT encoder with new weights and a WordPiece tokenizer trained on these texts, in Hugging Face form."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizer

    quiet_transformers()
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(
        texts, vocab_size=vocabulary, min_frequency=2, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer = BertTokenizer(tokenizer_object=pieces._tokenizer)
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden_size, max_position_embeddings=positions,
    )  # fmt: skip
    BertModel(config).save_pretrained(str(folder))
