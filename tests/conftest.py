"""What the tests share: generated tickets, a tiny encoder, a tiny classifier. Nothing here starts Ray."""

import csv
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch or Ray are imported, and handed on to the processes that tests start.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    DS_ACCELERATOR="cpu",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
)

import hypothesis
import pytest
import torch
from small_runs import SmallRuns

from raydistill.demo import write_new_bert
from raydistill.tickets import CATEGORIES, write_tickets

torch.set_num_threads(1)
# The same examples in each run, and no limit of time: the machines that run tests are shared.
hypothesis.settings.register_profile("raydistill", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("raydistill")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole runs on Ray begin: `make test` has two processes, and one of them is busy with these to the end."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


@pytest.fixture(scope="session")
def ticket_csvs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """train.csv (240 rows) and test.csv (80 rows) with the columns text and category."""
    return write_tickets(tmp_path_factory.mktemp("tickets"), train_rows=240, test_rows=80)


@pytest.fixture(scope="session")
def ticket_texts(ticket_csvs: tuple[Path, Path]) -> list[str]:
    with ticket_csvs[0].open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory, ticket_texts: list[str]) -> Path:
    """The folder of a BERT encoder with new weights and its tokenizer: 2 layers, width 16, about 200 tokens."""
    folder = tmp_path_factory.mktemp("models") / "encoder"
    write_new_bert(folder, ticket_texts, hidden_size=16, layers=2, heads=2, vocabulary=200)
    return folder


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    """The folder of a classifier of the five ticket categories, which are in alphabetical order."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    labels = sorted(CATEGORIES)
    torch.manual_seed(1)
    model = BertForSequenceClassification.from_pretrained(
        tiny_encoder,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: number for number, name in enumerate(labels)},
    )
    # Wider than BERT's own start, so that the classes differ clearly.
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    folder = tmp_path_factory.mktemp("models") / "classifier"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRuns]:
    """Small runs of the real stages, and the one that nothing disturbed."""
    made = SmallRuns(tmp_path_factory.mktemp("small"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def language_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRuns]:
    """The same of language models: stories, a Llama of two layers, codec sampled."""
    made = SmallRuns(tmp_path_factory.mktemp("language"), "language")
    yield made
    made.close()
