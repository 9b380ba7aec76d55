"""The demo's tickets: the same for the same seed, varied, and neither trivial nor hopeless to classify."""

import csv
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from raydistill.tickets import CATEGORIES, SHAPES, Ticket, draw_ticket, generate, write_tickets


@pytest.fixture(scope="module")
def tickets() -> list[Ticket]:
    draw = random.Random("tests").random
    return [draw_ticket(draw) for _ in range(4000)]


def read_rows(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_files_have_the_columns_and_rows_asked_for(tmp_path: Path):
    train_path, test_path = write_tickets(tmp_path / "data", train_rows=30, test_rows=20)
    assert (train_path.name, test_path.name) == ("train.csv", "test.csv")
    for path, rows in ((train_path, 30), (test_path, 20)):
        assert b"\r" not in path.read_bytes()
        header, *body = read_rows(path)
        assert header == ["text", "category"]
        assert len(body) == rows
        assert all(text and category in CATEGORIES for text, category in body)


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tmp_path: Path):
    files = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        paths = write_tickets(tmp_path / name, train_rows=200, test_rows=100, seed=seed)
        files[name] = [path.read_bytes() for path in paths]
    assert files["a"] == files["b"]
    assert files["a"][0] != files["c"][0]
    assert files["a"][1] != files["c"][1]


@pytest.mark.parametrize("counts", [{"train_rows": 0}, {"test_rows": -1}])
def test_refuses_a_row_count_below_one(tmp_path: Path, counts: dict[str, int]):
    with pytest.raises(ValueError, match="at least 1"):
        write_tickets(tmp_path, **counts)
    assert not list(tmp_path.iterdir())


def test_generate_is_lazy_and_a_short_run_starts_a_long_one():
    assert list(generate(5, seed=3)) == list(islice(generate(10**9, seed=3), 5))


def test_hash_seed_does_not_matter():
    # A set among the tables would be ordered by the hash seed, which differs from process to process.
    program = "from raydistill.tickets import generate; print(ascii(list(generate(300))))"
    outputs = {
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True).stdout
        for environment in ({**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": h} for h in "12")
    }
    assert outputs == {ascii(list(generate(300))).encode() + os.linesep.encode()}


def test_train_and_test_rarely_share_a_text(tmp_path: Path):
    train_path, test_path = write_tickets(tmp_path)
    train_texts = {text for text, _ in read_rows(train_path)[1:]}
    test_texts = [text for text, _ in read_rows(test_path)[1:]]
    assert sum(text in train_texts for text in test_texts) <= 10


def test_texts_are_unique_and_five_to_sixty_words_long(tickets: list[Ticket]):
    assert len({ticket.text for ticket in tickets}) >= 0.97 * len(tickets)
    lengths = [len(ticket.text.split()) for ticket in tickets]
    assert min(lengths) >= 5
    assert max(lengths) <= 60
    assert max(lengths) > 4 * min(lengths)


def test_grammar_is_written_out(tickets: list[Ticket]):
    for ticket in tickets:
        assert not set("{}|#") & set(ticket.text), ticket.text
        assert "  " not in ticket.text


def test_categories_are_mildly_unbalanced(tickets: list[Ticket]):
    counts = Counter(ticket.category for ticket in tickets)
    assert set(counts) == set(CATEGORIES)
    assert 1.1 < max(counts.values()) / min(counts.values()) < 2


def test_tables_of_shares_sum_to_one():
    assert sum(CATEGORIES.values()) == pytest.approx(1)
    assert sum(SHAPES.values()) == pytest.approx(1)


def test_mixed_tickets_take_the_main_category_seven_times_in_ten(tickets: list[Ticket]):
    mixed = [ticket for ticket in tickets if ticket.shape == "mixed"]
    assert len(mixed) > 300
    assert all(ticket.category in (ticket.main, ticket.side) and ticket.main != ticket.side for ticket in mixed)
    share = sum(ticket.category == ticket.main for ticket in mixed) / len(mixed)
    assert share == pytest.approx(0.7, abs=4 * (0.7 * 0.3 / len(mixed)) ** 0.5)


def test_best_possible_accuracy_is_between_90_and_95_percent(tickets: list[Ticket]):
    best = sum(max(ticket.main_share, 1 - ticket.main_share) for ticket in tickets) / len(tickets)
    assert 0.90 <= best <= 0.95


def test_bag_of_words_is_well_above_chance_and_well_below_the_best(tickets: list[Ticket]):
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts = [ticket.text for ticket in tickets]
    categories = [ticket.category for ticket in tickets]
    model = make_pipeline(TfidfVectorizer(), LogisticRegression(max_iter=1000)).fit(texts[:3000], categories[:3000])
    assert 0.75 < model.score(texts[3000:], categories[3000:]) < 0.90


def test_the_demo_has_the_same_input_in_each_folder(tmp_path: Path):
    # The tokenizer came out differently each time, so that one demo's student had 9 points less than another's.
    from raydistill.demo import demo_config

    def input_files(storage: Path) -> dict[str, bytes]:
        demo_config(storage, train_rows=200, test_rows=20)
        return {str(p.relative_to(storage)): p.read_bytes() for p in storage.rglob("*") if p.is_file()}

    first = input_files(tmp_path / "a")
    assert {"demo-input/model/tokenizer.json", "demo-input/model/model.safetensors"} < set(first)
    assert input_files(tmp_path / "b") == first
    assert input_files(tmp_path / "a") == first


def test_the_demos_tokenizer_knows_letters_then_words_that_stand_twice_by_frequency():
    from raydistill.demo import SPECIAL, vocabulary_of

    tokens = vocabulary_of(["Bad cab, bad", "cab bad ace"], 100)
    assert list(tokens) == [*SPECIAL, *",abcde", *(f"##{c}" for c in ",abcde"), "bad", "cab"]
    assert list(tokens.values()) == list(range(len(tokens)))
    assert list(vocabulary_of(["Bad cab, bad", "cab bad ace"], 18)) == list(tokens)[:18]
