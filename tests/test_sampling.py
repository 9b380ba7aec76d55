"""What is kept of a next-token distribution: against an oracle, in the mean over seeds, and whatever the chunk."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from sparse_oracles import inclusion, needed, softmax, systematic, uniform

from raydistill.cache import sampling
from raydistill.cache.counter_random import DRAWS_STREAM, TAIL_STREAM, uniforms
from raydistill.cache.sampling import drawn_targets, reduced, sampled_targets, top_targets
from raydistill.targets import OutputHead, SparseTargets

V = 700  # more than two blocks of the vocabulary, and no multiple of one


def made_logits(rows: int, vocabulary: int = V, seed: int = 0) -> torch.Tensor:
    """Zipf's law with noise: a few likely tokens and a long tail."""
    random = torch.Generator().manual_seed(seed)
    zipf = -torch.arange(1.0, vocabulary + 1).log()[torch.randperm(vocabulary, generator=random)]
    return zipf + 2 * torch.randn(rows, vocabulary, generator=random)


def keys(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row ids and positions: rows of 5 positions, from a large id on."""
    return 7_000_000_000 + torch.arange(rows) // 5, torch.arange(rows) % 5


def dense(targets: SparseTargets, vocabulary: int = V) -> torch.Tensor:
    empty = torch.zeros(len(targets.ids_NK), vocabulary, dtype=torch.float64)
    return empty.scatter_add_(1, targets.ids_NK, targets.weights_NK.double())


def same(first: SparseTargets, second: SparseTargets) -> bool:
    pairs = [(getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(first)]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


def test_uniforms_are_the_published_hash_of_their_key():
    row_ids, positions = torch.tensor([0, 3, 2**40]), torch.tensor([0, 9, 2**31])
    found = uniforms(12345, row_ids, positions, stream=2, draws=3)
    for n, (row_id, position) in enumerate(zip(row_ids.tolist(), positions.tolist(), strict=True)):
        assert found[n].tolist() == [uniform(12345, row_id, position, 2, draw) for draw in range(3)]


@pytest.mark.parametrize("width", [2, 5, 12, 64])
def test_a_sample_is_the_one_that_the_definition_gives(width: int):
    logits, (row_ids, positions) = made_logits(40), keys(40)
    found = sampled_targets(logits, row_ids, positions, width=width, seed=11)
    for n, row in enumerate(logits.double().numpy()):
        probs = softmax(row).tolist()
        offset = uniform(11, int(row_ids[n]), int(positions[n]), TAIL_STREAM)
        expected = systematic(probs, inclusion(probs, needed(probs, width)), offset)
        used = found.weights_NK[n] > 0
        assert int(used.sum()) == len(expected) == int(used.int().argmin() if not used.all() else width)
        kept = dict(zip(found.ids_NK[n, used].tolist(), found.weights_NK[n, used].tolist(), strict=True))
        assert kept.keys() == expected.keys()
        assert all(math.isclose(kept[token], expected[token], rel_tol=2e-5) for token in kept)
        for place, token in enumerate(found.ids_NK[n, used].tolist()):
            assert found.probs_NK is not None
            assert math.isclose(found.probs_NK[n, place], probs[token], rel_tol=2e-5)
            assert bool(found.exact_NK[n, place]) == math.isclose(expected[token], probs[token], rel_tol=1e-9)


def test_weights_sum_to_one_and_the_head_is_exact():
    logits, (row_ids, positions) = made_logits(300), keys(300)
    found = sampled_targets(logits, row_ids, positions, width=12, seed=0)
    assert (found.weights_NK.double().sum(dim=1) - 1).abs().max() < 12 * 2.0**-25
    probs = logits.double().softmax(dim=1).gather(1, found.ids_NK)
    assert (found.weights_NK / probs)[found.exact_NK].sub(1).abs().max() < 1e-5
    assert found.exact_NK.any(dim=1).float().mean() > 0.5
    used = found.weights_NK > 0
    assert not found.exact_NK[~used].any()
    tail = found.weights_NK.masked_fill(found.exact_NK, math.nan)
    least = found.weights_NK.masked_fill(~found.exact_NK, math.inf).amin(dim=1)
    assert (least >= tail.nan_to_num(0).amax(dim=1) * (1 - 1e-6)).all(), "the threshold parts head and tail"
    entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
    assert found.entropy_N is not None
    assert (found.entropy_N - entropy).abs().max() < 1e-5


def test_a_position_keeps_what_it_needs():
    """The surer the teacher the fewer, never more than there are slots, and two where nearly all is in one token."""
    sure = torch.zeros(4, V)
    sure[torch.arange(4), torch.arange(4)] = torch.tensor([20.0, 9.0, 5.0, 0.0])
    found = sampled_targets(sure, *keys(4), width=12, seed=0)
    assert (found.weights_NK > 0).sum(dim=1).tolist() == [2, 2, 11, 12]
    many = sampled_targets(made_logits(300), *keys(300), width=12, seed=0)
    kept = (many.weights_NK > 0).sum(dim=1)
    assert kept.max() <= 12
    assert kept.min() >= 2
    drawn = many.weights_NK[(many.weights_NK > 0) & ~many.exact_NK]
    assert 0.05 < drawn.median() < 0.12, "about a twelfth each"


@pytest.mark.parametrize("codec", ["sampled", "random"])
def test_the_mean_over_seeds_is_the_distribution(codec: str):
    """20,000 draws a position. A draw's weight of token i has a variance of p_i (w_i - p_i) or p_i (1 - p_i) / draws,
    and five positions of 60 tokens are compared at 5.5 standard errors: 300 normal deviates pass that with probability
    1e-5, once and for all since the seeds are fixed. A sample that took its tail in the wrong proportion fails: a
    relative error of 10 % in a token of probability 0.02 is 9 standard errors."""
    logits, draws = made_logits(5, vocabulary=60, seed=3), 20_000
    probs = logits.double().softmax(dim=1)
    for n in range(5):
        rows, zeros = logits[n].expand(draws, 60), torch.zeros(draws, dtype=torch.int64)
        if codec == "sampled":
            found = sampled_targets(rows, torch.arange(draws), zeros, width=6, seed=1)
            of_row = probs[n].tolist()
            pi = torch.tensor(inclusion(of_row, needed(of_row, 6)), dtype=torch.float64)
            variance = probs[n] ** 2 * (1 / pi - 1)
        else:
            found = drawn_targets(rows, torch.arange(draws), zeros, draws=6, seed=1)
            variance = probs[n] * (1 - probs[n]) / 6
        error = dense(found, 60).mean(dim=0) - probs[n]
        assert (error.abs() <= 5.5 * (variance / draws).sqrt() + 1e-6).all()


def test_draws_with_replacement_are_those_of_the_inverse_distribution():
    logits, (row_ids, positions) = made_logits(30), keys(30)
    found = dense(drawn_targets(logits, row_ids, positions, draws=50, seed=4))
    for n, row in enumerate(logits.double().numpy()):
        ends = np.cumsum(softmax(row))
        shares = [uniform(4, int(row_ids[n]), int(positions[n]), DRAWS_STREAM, draw) for draw in range(50)]
        expected = np.bincount(np.searchsorted(ends, shares, side="right"), minlength=V) / 50
        np.testing.assert_allclose(found[n].numpy(), expected, atol=1e-7)


def test_a_cut_keeps_the_likeliest_and_sums_the_others_themselves():
    logits = made_logits(20).double()
    logits[0, 5] += 40  # a tail of 1e-15 or so, which 1 less the head does not hold in float32
    found = top_targets(logits, width=7)
    logprobs = logits.log_softmax(dim=1)
    top, ids = logprobs.topk(7, dim=1)
    assert torch.equal(found.ids_NK, ids)
    torch.testing.assert_close(found.weights_NK.double().log(), top, atol=1e-5, rtol=1e-5)
    others = logprobs.scatter(1, ids, -math.inf).logsumexp(dim=1)
    assert found.log_tail_N is not None
    torch.testing.assert_close(found.log_tail_N.double(), others, atol=1e-5, rtol=1e-5)
    assert others[0] < -30


class Given:
    """A head that is given logits."""

    def products(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return hidden_ND

    def from_products(self, products_NV: torch.Tensor) -> torch.Tensor:
        return products_NV


@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
def test_workers_batches_chunks_and_pieces_change_nothing(piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling, "PIECE_NUMBERS", piece * V)
    logits, (row_ids, positions) = made_logits(53), keys(53)
    for keep in (
        lambda z, r, p: sampled_targets(z, r, p, width=9, seed=2),
        lambda z, r, p: drawn_targets(z, r, p, draws=9, seed=2),
        lambda z, r, p: top_targets(z, width=9),
    ):
        whole = keep(logits, row_ids, positions)
        for chunk in (1, 7, 53, 1000):
            parts = reduced(logits, Given(), keep, row_ids_N=row_ids, positions_N=positions, chunk=chunk)
            assert same(parts, whole)
        order = torch.randperm(53, generator=torch.Generator().manual_seed(0))
        assert same(keep(logits[order], row_ids[order], positions[order]), whole.select(order))


def test_a_chunk_is_the_largest_tensor():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, torch.Tensor):
                    Largest.numbers = max(Largest.numbers, value.untyped_storage().nbytes() // 4)
            return out

    head, hidden = OutputHead(torch.randn(50_000, 4)), torch.randn(64, 4)
    with Largest():
        reduced(
            hidden, head, lambda z, r, p: sampled_targets(z, r, p, width=8, seed=0),
            row_ids_N=torch.zeros(64, dtype=torch.int64), positions_N=torch.arange(64), chunk=4,
        )  # fmt: skip
    # Padded to whole blocks, a little more than the chunk.
    assert 4 * 50_000 <= Largest.numbers <= 4 * (50_000 + 256)


@pytest.mark.parametrize("vocabulary", [1, 3, 8])
def test_a_vocabulary_that_fits_is_kept_whole(vocabulary: int):
    logits, (row_ids, positions) = made_logits(20, vocabulary), keys(20)
    found = sampled_targets(logits, row_ids, positions, width=8, seed=0)
    assert found.exact_NK.all()
    torch.testing.assert_close(dense(found, vocabulary), logits.double().softmax(dim=1), atol=1e-7, rtol=1e-6)


def test_the_tail_of_a_cut_is_known_where_its_probabilities_leave_float32():
    logits = made_logits(3)
    logits[1, 5] += 130.0
    found = top_targets(logits, width=1)
    others = logits.double().log_softmax(dim=1).scatter(1, found.ids_NK, -math.inf).logsumexp(dim=1)
    assert found.log_tail_N is not None
    assert others[1] < -110
    torch.testing.assert_close(found.log_tail_N.double(), others, atol=1e-4, rtol=1e-6)


def test_certain_and_even_teachers():
    certain = torch.zeros(1, V)
    certain[0, 699] = 400.0  # the others underflow
    even = torch.zeros(1, V, dtype=torch.float16)
    extreme = torch.full((1, V), -65504.0, dtype=torch.float16)
    extreme[0, 3] = 65504.0
    for logits in (certain, even, extreme):
        found = sampled_targets(logits, *keys(1), width=12, seed=0)
        assert torch.isfinite(found.weights_NK).all()
        torch.testing.assert_close(found.weights_NK.sum(), torch.tensor(1.0), atol=1e-6, rtol=0)
        assert found.ids_NK.max() < V
        found = top_targets(logits, width=12)
        assert found.log_tail_N is not None
        total = found.weights_NK.sum() + found.log_tail_N.exp().sum()
        torch.testing.assert_close(total, torch.tensor(1.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("vocabulary", [40, sampling.BLOCK + 1, 3 * sampling.BLOCK - 1])
def test_a_teacher_that_is_certain_in_float32_keeps_tokens_of_its_vocabulary(vocabulary: int):
    """Whichever of the tokens without a probability are kept, they are tokens, and no one twice."""
    logits = torch.zeros(3, vocabulary)
    logits[torch.arange(3), torch.tensor([0, 5, vocabulary - 1])] = 500.0  # exp(-500) is 0 in float32
    row_ids = positions = torch.arange(3)
    for found in (
        sampled_targets(logits, row_ids, positions, width=12, seed=0),
        top_targets(logits, width=12),
        sampled_targets(logits, row_ids, positions, width=vocabulary, seed=0),
    ):
        kept = found.ids_NK.sort(dim=-1).values
        assert kept.min() >= 0
        assert kept.max() < vocabulary
        assert (kept[:, 1:] > kept[:, :-1]).all()
        assert found.ids_NK[:, 0].tolist() == [0, 5, vocabulary - 1]
        assert torch.equal(found.weights_NK, torch.eye(found.ids_NK.shape[1])[:1].expand(3, -1))
    log_tail = top_targets(logits, width=12).log_tail_N
    assert log_tail is not None
    torch.testing.assert_close(log_tail, torch.full((3,), math.log(vocabulary - 12) - 500))


def test_what_cannot_be_kept_is_refused():
    logits = made_logits(2)
    with pytest.raises(ValueError, match="keeps at least 2 tokens, found 1"):
        sampled_targets(logits, *keys(2), width=1, seed=0)
    for broken in (math.nan, math.inf, -math.inf):
        logits[1, 5] = broken
        with pytest.raises(ValueError, match="logit is not finite"):
            top_targets(logits, width=3)
