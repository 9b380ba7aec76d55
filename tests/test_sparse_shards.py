"""Shards of sparse targets: ids come back as they were, weights as the format says, from any order of rows."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydistill.cache import gap_coding, sparse_shards
from raydistill.cache.alphabet import Alphabet
from raydistill.cache.hidden_shards import HIDDEN, hidden_writer, read_head, read_hidden, write_head
from raydistill.cache.language_codecs import check_temperatures
from raydistill.cache.sampling import drawn_targets, sampled_targets, top_targets
from raydistill.cache.sparse_rows import SparseFormat
from raydistill.cache.sparse_shards import SparseShard, read_sparse, write_sparse
from raydistill.errors import UserError
from raydistill.losses.fused_linear import TokenObjective, token_loss
from raydistill.record.commit import Manifest
from raydistill.record.store import LocalStore
from raydistill.targets import HiddenTargets, OutputHead, SparseTargets

V = 3000
FOLDER, FILE = "teacher/cache", "train-00000.parquet"
TOKENS = np.array([7, 1, 40, 3])
ROW_IDS = np.array([5, 900, 2**41, 17])
FORMS = {
    "sampled": SparseFormat("sampled", 12, seed=5),
    "with probabilities": SparseFormat("sampled", 12, probabilities=True, seed=5),
    "random": SparseFormat("random", 50, 50, seed=5),
    "topk": SparseFormat("topk", 12),
}


def made_targets(codec: str, tokens: int = int(TOKENS.sum()), vocabulary: int = V) -> SparseTargets:
    random = torch.Generator().manual_seed(1)
    zipf = -torch.arange(1.0, vocabulary + 1).log()[torch.randperm(vocabulary, generator=random)]
    logits = zipf + 2.5 * torch.randn(tokens, vocabulary, generator=random)
    row_ids, positions = torch.zeros(tokens, dtype=torch.int64), torch.arange(tokens)
    if codec == "topk":
        return top_targets(logits, width=12)
    if codec == "random":
        return drawn_targets(logits, row_ids, positions, draws=50, seed=2)
    return sampled_targets(logits, row_ids, positions, width=12, seed=2)


def an_alphabet(vocabulary: int = V) -> Alphabet:
    return Alphabet.by_counts(np.random.default_rng(0).integers(0, 50, vocabulary))


def written(store: LocalStore, form: SparseFormat, targets: SparseTargets, alphabet: Alphabet) -> SparseShard:
    entry = write_sparse(
        store, f"{FOLDER}/{FILE}", ROW_IDS, TOKENS, targets, form=form, alphabet=alphabet, fingerprint="f" * 64
    )
    return read_sparse(store, FOLDER, entry, form, alphabet)


def dense(targets: SparseTargets, values: torch.Tensor, vocabulary: int = V) -> torch.Tensor:
    empty = torch.zeros(len(targets.ids_NK), vocabulary, dtype=torch.float64)
    return empty.scatter_add_(1, targets.ids_NK, values.double())


@pytest.mark.parametrize("name", FORMS)
def test_what_was_kept_comes_back(name: str, tmp_path: Path):
    form, targets, alphabet = FORMS[name], made_targets(FORMS[name].codec), an_alphabet()
    shard = written(LocalStore(str(tmp_path)), form, targets, alphabet)
    assert shard.row_ids_R.tolist() == ROW_IDS.tolist()
    assert shard.tokens_R.tolist() == TOKENS.tolist()
    found, given_NV = shard.targets(np.arange(4)), dense(targets, targets.weights_NK)
    found_NV = dense(found, found.weights_NK)
    assert found.entropy_N is not None
    assert targets.entropy_N is not None
    assert (found.entropy_N - targets.entropy_N).abs().max() < 1 / 16
    if form.codec == "random":
        torch.testing.assert_close(found_NV, given_NV, atol=1e-7, rtol=0)
        return
    if form.codec == "topk":
        # A log-probability is rounded by 2^-11 of itself, and once more by their sum.
        bound = given_NV * given_NV.clamp_min(1e-30).log().abs() * 2.0**-11 + given_NV * 2e-3
        assert ((found_NV - given_NV).abs() <= bound).all()
        assert found.log_tail_N is not None
        total = found.weights_NK.double().sum(dim=1) + found.log_tail_N.double().exp()
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-6, rtol=0)
        return
    heads_NV = dense(targets, targets.weights_NK * targets.exact_NK)
    found_heads_NV = dense(found, found.weights_NK * found.exact_NK)
    assert ((found_heads_NV - heads_NV).abs() < 1 / form.units).all()
    assert ((found_heads_NV * form.units).frac() == 0).all()
    torch.testing.assert_close(found_NV.sum(dim=1), torch.ones(51, dtype=torch.float64), atol=1e-6, rtol=0)
    drawn = found_NV - found_heads_NV
    tail_units = form.units * drawn.sum(dim=1)
    assert ((tail_units - form.units * (given_NV - heads_NV).sum(dim=1)).abs() < 1).all()
    kept = drawn[tail_units > 0.5] > 0
    assert torch.equal(kept, (given_NV - heads_NV)[tail_units > 0.5] > 0), "the tail's tokens are those that were drawn"
    if form.probabilities:
        assert targets.probs_NK is not None
        assert found.probs_NK is not None
        known_NV, read_NV = dense(targets, targets.probs_NK), dense(found, found.probs_NK)
        there = read_NV > 0
        assert ((read_NV / known_NV)[there].log().abs() <= known_NV[there].log().abs() * 2.0**-11 + 1e-6).all()


def test_counts_are_right_in_the_mean(tmp_path: Path):
    """One position written 4,000 times under other row ids: a count's error is uniform at most, its deviation half a
    unit. The bound is 6 standard errors of 12 means, passed by chance once in 4e7."""
    form, alphabet = SparseFormat("sampled", 12), an_alphabet()
    several, times = made_targets("sampled"), 4000
    one = several.select(several.exact_NK.sum(dim=1).argmax()[None])
    targets = SparseTargets.joined([one] * times)
    assert one.exact_NK.sum() >= 2
    store = LocalStore(str(tmp_path))
    entry = write_sparse(
        store, f"{FOLDER}/{FILE}", np.arange(times), np.ones(times, np.int64), targets, form=form, alphabet=alphabet,
        fingerprint="f" * 64,
    )  # fmt: skip
    found = read_sparse(store, FOLDER, entry, form, alphabet).targets(np.arange(times))
    mean = dense(found, found.weights_NK).mean(dim=0)
    error = (mean - dense(one, one.weights_NK)[0]).abs().max()
    assert error < 6 * 0.5 / form.units / math.sqrt(times)
    assert found.entropy_N is not None
    assert one.entropy_N is not None
    assert abs(found.entropy_N.double().mean() - one.entropy_N[0]) < 6 * 0.5 / 16 / math.sqrt(times)
    assert len(found.entropy_N.unique()) == 2


def same(first: SparseTargets, second: SparseTargets) -> bool:
    pairs = [(getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(first)]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_read_in_any_order_and_from_any_row_group(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    form, targets, alphabet = FORMS[name], made_targets(FORMS[name].codec), an_alphabet()
    one = written(LocalStore(str(tmp_path / "one")), form, targets, alphabet)
    monkeypatch.setattr(sparse_shards, "GROUP_POSITIONS", 8)
    store = LocalStore(str(tmp_path / "many"))
    many = written(store, form, targets, alphabet)
    assert pq.ParquetFile(store.local(f"{FOLDER}/{FILE}")).num_row_groups == 3
    starts = np.cumsum(TOKENS) - TOKENS
    rows = np.array([3, 0, 2, 3])
    positions = np.concatenate([starts[row] + np.arange(TOKENS[row]) for row in rows])
    expected = one.targets(np.arange(4)).select(torch.from_numpy(positions))
    assert same(one.targets(rows), expected)
    assert same(many.targets(rows), expected)
    assert len(one.targets(np.zeros(0, np.int64)).ids_NK) == 0


def test_the_same_targets_are_the_same_bytes(tmp_path: Path):
    entries = []
    for folder in "ab":
        store = LocalStore(str(tmp_path / folder))
        entries.append(
            write_sparse(
                store,
                FILE,
                ROW_IDS,
                TOKENS,
                made_targets("sampled"),
                form=FORMS["sampled"],
                alphabet=an_alphabet(),
                fingerprint="f" * 64,
            )
        )
    assert entries[0] == entries[1]


def test_a_plain_reader_finds_the_ids(tmp_path: Path):
    """From the module's description alone: classes, gaps, bits and the alphabet, token after token."""
    store, alphabet, targets = LocalStore(str(tmp_path)), an_alphabet(), made_targets("topk")
    written(store, FORMS["topk"], targets, alphabet)
    table = pq.read_table(store.local(f"{FOLDER}/{FILE}")).to_pylist()
    position = 0
    for row in table:
        taken = [0] * 12
        bits = int.from_bytes(row["bits"], "little")
        for kept in row["kept"]:
            rank, ids = 0, []
            for place in range(kept):
                number = row[f"gap_{kept - 1 - place:02d}"][taken[kept - 1 - place]]
                taken[kept - 1 - place] += 1
                if number >= 8:
                    octave, quarter = divmod(number - 8, 4)
                    number = ((4 + quarter) << (octave + 1)) + (bits & ((1 << (octave + 1)) - 1))
                    bits >>= octave + 1
                rank += number
                ids.append(int(alphabet.ids_V[rank]))
            assert sorted(ids) == sorted(targets.ids_NK[position].tolist())
            position += 1
        assert bits == 0
    assert position == TOKENS.sum()


@given(st.lists(st.integers(0, gap_coding.LARGEST), max_size=60), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_numbers_come_back_from_their_class_and_bits(values: list[int], every: int):
    numbers = np.array(values, np.int64)
    classes, extras = gap_coding.split(numbers)
    widths = gap_coding.widths(classes)
    counts = np.array([len(values[start : start + every]) for start in range(0, len(values), every)] or [0])
    starts, words = gap_coding.places(widths, counts)
    packed = gap_coding.pack(extras, widths, starts, int(words[-1]))
    assert (gap_coding.bases(classes) + gap_coding.unpack(packed, widths, starts)).tolist() == values
    assert (starts[np.minimum(np.cumsum(counts) - counts, len(values) - 1)] % 32 == 0).all() if values else True


def test_every_class_of_a_vocabulary_of_a_million():
    vocabulary = 1 << 20
    ids = torch.tensor([[0, 7, 8, vocabulary - 1], [vocabulary - 1, 0, 1, 2]])
    weights = torch.full((2, 4), 0.25)
    targets = SparseTargets(ids, weights, torch.ones(2, 4, dtype=torch.bool), entropy_N=torch.full((2,), math.log(4)))
    alphabet = Alphabet.by_counts(np.zeros(vocabulary, np.int64))
    form = SparseFormat("sampled", 4)
    values = sparse_shards.encode(np.array([0]), np.array([2]), targets, form, alphabet)
    found = sparse_shards.decode({name: values[name][0] for name in form.columns}, np.array([2]), form, alphabet)
    assert found.ids_NK.tolist() == [[0, 7, 8, vocabulary - 1], [0, 1, 2, vocabulary - 1]]
    assert (found.weights_NK == 0.25).all()
    with pytest.raises(ValueError, match="at most 1048576 tokens"):
        Alphabet.by_counts(np.zeros(vocabulary + 1, np.int64))


def test_alphabets_come_back_and_damaged_ones_do_not(tmp_path: Path):
    store, alphabet = LocalStore(str(tmp_path)), Alphabet.by_counts(np.array([3, 9, 9, 0, 4]))
    assert alphabet.ids_V.tolist() == [1, 2, 4, 0, 3]
    assert alphabet.ranks_V.tolist() == [3, 0, 1, 4, 2]
    entry = alphabet.write(store, f"{FOLDER}/alphabet.parquet", "f" * 64)
    assert Alphabet.read(store, FOLDER, entry).ids_V.tolist() == alphabet.ids_V.tolist()
    twice = Alphabet(np.array([1, 1, 0], np.int32), alphabet.ranks_V)
    entry = twice.write(store, f"{FOLDER}/twice.parquet", "f" * 64)
    with pytest.raises(UserError, match="does not hold every id once"):
        Alphabet.read(store, FOLDER, entry)


def test_what_a_shard_cannot_hold_is_refused(tmp_path: Path):
    store, targets = LocalStore(str(tmp_path)), made_targets("sampled")
    with pytest.raises(ValueError, match=r"token id \d+ is not in a vocabulary of 10"):
        written(store, FORMS["sampled"], targets, an_alphabet(10))
    for field in ("weights_NK", "entropy_N"):
        bad = dataclasses.replace(targets, **{field: getattr(targets, field).clone().fill_(math.nan)})
        with pytest.raises(ValueError, match="is not there or not finite"):
            written(store, FORMS["sampled"], bad, an_alphabet())
    with pytest.raises(ValueError, match="keeps 1 to 255 tokens, found 256"):
        SparseFormat("sampled", 256)
    with pytest.raises(ValueError, match="random counts its 50 draws, found 64 units"):
        SparseFormat("random", 50)


def test_another_format_or_alphabet_is_refused_by_name(tmp_path: Path):
    store, alphabet = LocalStore(str(tmp_path)), an_alphabet()
    form = FORMS["sampled"]
    entry = write_sparse(
        store, f"{FOLDER}/{FILE}", ROW_IDS, TOKENS, made_targets("sampled"), form=form, alphabet=alphabet,
        fingerprint="f" * 64,
    )  # fmt: skip
    with pytest.raises(UserError, match="columns are not those of codec topk with 12 tokens"):
        read_sparse(store, FOLDER, entry, FORMS["topk"], alphabet)
    with pytest.raises(UserError, match=r"rank \d+ in an alphabet of 10\. Score again"):
        read_sparse(store, FOLDER, entry, form, an_alphabet(10)).targets(np.arange(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_states_and_the_head_give_the_logits_again(dtype: torch.dtype, tmp_path: Path):
    store, random = LocalStore(str(tmp_path)), torch.Generator().manual_seed(0)
    head = OutputHead(
        torch.randn(50, 6, generator=random).to(dtype), torch.randn(50, generator=random).to(dtype), 0.5, 30.0
    )
    states = [torch.randn(int(tokens), 6, generator=random).bfloat16() for tokens in TOKENS]
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    with hidden_writer(store, f"{FOLDER}/{FILE}", 6) as writer:
        writer.add(ROW_IDS, TOKENS, {HIDDEN: padded})
        entry = writer.commit("f" * 64)
    head_entry = write_head(store, f"{FOLDER}/head.parquet", head, "f" * 64)
    read = read_head(store, FOLDER, head_entry, scale=0.5, softcap=30.0)
    assert torch.equal(read.weight_VD, head.weight_VD)
    order = np.array([2, 0, 3, 1])
    shard = read_hidden(
        store, FOLDER, entry, Manifest("f" * 64, (entry,), {"width": 6}), row_ids_R=ROW_IDS[order],
        tokens_R=TOKENS[order],
    )  # fmt: skip
    for index, row in enumerate(order):
        hidden = torch.from_numpy(shard.row(HIDDEN, index).copy()).view(torch.bfloat16)
        assert torch.equal(hidden, states[row])
        plain = (states[row].double() @ head.weight_VD.double().T + head.bias_V.double()) * 0.5
        expected = 30 * torch.tanh(plain / 30)
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(read.logits(hidden).double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_hidden_states_that_were_kept_give_the_whole_gradient(temperature: float, tmp_path: Path):
    """Of a teacher in float32, whose states are rounded to bfloat16: by the definition, in float64, the gradient of the
    student's output layer is off by less than 1e-3 of its norm."""
    store, random = LocalStore(str(tmp_path)), torch.Generator().manual_seed(3)
    rows, tokens, vocabulary, width = 16, 64, 400, 96
    states_NLD = torch.randn(rows, tokens, width, generator=random)
    head = OutputHead(torch.randn(vocabulary, width, generator=random) * (3 / width**0.5))
    row_ids, counts = np.arange(rows), np.full(rows, tokens)
    with hidden_writer(store, f"{FOLDER}/{FILE}", width) as writer:
        writer.add(row_ids, counts, {HIDDEN: states_NLD})
        entry = writer.commit("f" * 64)
    manifest = Manifest("f" * 64, (entry,), {"width": width})
    shard = read_hidden(store, FOLDER, entry, manifest, row_ids_R=row_ids, tokens_R=counts)
    kept = torch.cat([torch.from_numpy(shard.row(HIDDEN, row).copy()).view(torch.bfloat16) for row in range(rows)])
    hidden = torch.randn(rows * tokens, 8, generator=random)
    weight = torch.randn(vocabulary, 8, generator=random, requires_grad=True)
    objective = TokenObjective(alpha=1.0, temperature=temperature)
    labels = torch.zeros(rows * tokens, dtype=torch.int64)
    token_loss(objective, hidden, weight, labels, HiddenTargets(kept, head)).sum.backward()
    teacher = states_NLD.flatten(0, 1).double() @ head.weight_VD.double().T / temperature
    student = hidden.double() @ weight.detach().double().T / temperature
    whole = temperature * (student.softmax(dim=1) - teacher.softmax(dim=1)).T @ hidden.double()
    assert weight.grad is not None
    assert (weight.grad.double() - whole).norm() <= 1e-3 * whole.norm()


def test_temperatures_that_a_cache_cannot_serve_are_refused_by_name():
    for codec in ("dense", "hidden"):
        check_temperatures(codec, 0.5, 1.0, 4.0)
    for codec in ("sampled", "random", "topk"):
        check_temperatures(codec, 1.0)
        with pytest.raises(ValueError, match=f"temperature 2: a cache of codec {codec} serves temperature 1 alone"):
            check_temperatures(codec, 1.0, 2.0)
