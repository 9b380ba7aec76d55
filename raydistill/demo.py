"""The demo: support tickets, a teacher that starts from a new small BERT, a student more than ten times smaller.

It needs no network and no GPU: tickets and tokenizer are made here.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from raydistill.config.file import validate
from raydistill.config.run import Config
from raydistill.models.loading import quiet_transformers
from raydistill.tickets import write_tickets

VOCABULARY = 1500
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def demo_config(storage: Path, *, train_rows: int = 3000, test_rows: int = 2000) -> Config:
    """Writes the demo's tickets and starting model below `storage`/demo-input; the configuration of its run."""
    folder = storage / "demo-input"
    train, test = write_tickets(folder, train_rows=train_rows, test_rows=test_rows)
    with open(train, newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
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
            "fine_tune": {"epochs": 4, "learning_rate": 5.0e-4, "group_by_length": True},
            "codec": "dense-int8",
        },
        "student": {"init": "config", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "dropout": 0.05},
        # The labels of ambiguous tickets are drawn; the teacher's probabilities alone are the better target. 300
        # validation rows cannot tell epochs apart.
        "train": {
            "epochs": 8,
            "learning_rate": 2.0e-3,
            "choose": "last",
            "group_by_length": True,
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
    """A BERT encoder with new weights and a tokenizer of the texts' words, in Hugging Face form; the same each time."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizer

    quiet_transformers()
    pieces = BertWordPieceTokenizer(vocabulary_of(texts, vocabulary), lowercase=True)
    tokenizer = BertTokenizer(tokenizer_object=pieces._tokenizer)
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden_size, max_position_embeddings=positions,
    )  # fmt: skip
    BertModel(config).save_pretrained(str(folder))


def vocabulary_of(texts: list[str], size: int) -> dict[str, int]:
    """WordPiece tokens of lower-case texts and their ids: every character, then words that stand twice, by frequency.

    tokenizers' own training breaks ties between pieces by chance; this gives the same tokens each time.
    """
    from tokenizers import BertWordPieceTokenizer

    plain = BertWordPieceTokenizer(lowercase=True)
    normalised = (plain.normalizer.normalize_str(text) for text in texts)
    counts = Counter(word for text in normalised for word, _ in plain.pre_tokenizer.pre_tokenize_str(text))
    letters = sorted(set("".join(counts)))
    words = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
    tokens = dict.fromkeys([*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words])
    return {token: number for number, token in enumerate(list(tokens)[:size])}
