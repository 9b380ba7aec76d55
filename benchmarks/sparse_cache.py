"""Bytes, speed and gradients of the sparse codecs on logits made here: python benchmarks/sparse_cache.py [--tokens N]

The made teacher is a language model's: Zipf's law over the vocabulary (numbered by chance, so that ids tell nothing),
moved by a hidden state times a head. Bytes are those of the file on disk, all columns counted, row ids, lengths and
entropies too, and the alphabet beside them; "ids" is what the columns of the token ids take, and "raw" what ids of
log2 V bits would. The angle is between the gradient of forward KL with respect to the output head, summed over all
tokens, of what is read back and of the whole distributions, for a student that knows Zipf's law alone. Of `hidden`,
whose states are rounded to bfloat16, it is how far that gradient is off, by its norm, at each of TEMPERATURES.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time

import numpy as np
import pyarrow.parquet as pq
import torch

from raydistill.cache.alphabet import Alphabet
from raydistill.cache.sampling import drawn_targets, sampled_targets, top_targets
from raydistill.cache.sparse_rows import SparseFormat
from raydistill.cache.sparse_shards import read_sparse, write_sparse
from raydistill.record.store import LocalStore
from raydistill.targets import SparseTargets

ORDERS = ("frequency", "ids as numbered")
FORMATS = {
    **{f"sampled, {kept}": SparseFormat("sampled", kept) for kept in (12, 16, 18, 19, 20, 24)},
    "sampled, 18, 12 bits": SparseFormat("sampled", 18, units=4096),
    "random, 50": SparseFormat("random", 50, 50),
    "topk, 12": SparseFormat("topk", 12),
}
CHUNK, PIECE, ROW, WIDTH = 64, 8, 512, 32
TEMPERATURES = (1.0, 2.0, 4.0)


class Teacher:
    """Logits by chunk of positions; the same for the same seed."""

    def __init__(self, tokens: int, vocabulary: int, spread: float) -> None:
        random = torch.Generator().manual_seed(0)
        order = torch.randperm(vocabulary, generator=random)
        self.prior_V = -torch.log(torch.arange(vocabulary) + 2.7)[order]
        self.head_VD = torch.randn(vocabulary, WIDTH, generator=random) * (spread / math.sqrt(WIDTH))
        self.hidden_ND = torch.randn(tokens, WIDTH, generator=random)

    def logits(self, cut: slice) -> torch.Tensor:
        return self.of_hidden(self.hidden_ND[cut])

    def of_hidden(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.prior_V, hidden_ND, self.head_VD.T)


def keep(form: SparseFormat, logits: torch.Tensor, row_ids: torch.Tensor, positions: torch.Tensor) -> SparseTargets:
    if form.codec == "topk":
        return top_targets(logits, width=form.kept)
    if form.codec == "random":
        return drawn_targets(logits, row_ids, positions, draws=form.kept, seed=0)
    return sampled_targets(logits, row_ids, positions, width=form.kept, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--spread", type=float, default=5.0, help="deviation of the logits about Zipf's law")
    parser.add_argument("--codecs", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--orders", nargs="*", default=list(ORDERS), choices=list(ORDERS))
    parser.add_argument("--hidden", action="store_true", help="the gradients of codec hidden, and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.hidden:
        return print(json.dumps(hidden_gradients(Teacher(arguments.tokens, arguments.vocabulary, arguments.spread))))
    forms = {name: FORMATS[name] for name in arguments.codecs}
    teacher = Teacher(arguments.tokens, arguments.vocabulary, arguments.spread)
    row_ids = torch.arange(arguments.tokens) // ROW
    positions = torch.arange(arguments.tokens) % ROW
    kept: dict[str, list[SparseTargets]] = {name: [] for name in forms}
    seconds = dict.fromkeys(forms, 0.0)
    whole_VD = torch.zeros(arguments.vocabulary, WIDTH)
    for start in range(0, arguments.tokens, CHUNK):
        cut = slice(start, start + CHUNK)
        logits = teacher.logits(cut)
        whole_VD.addmm_(logits.softmax(dim=1).T, teacher.hidden_ND[cut])
        for name, form in forms.items():
            started = time.process_time()
            parts = zip(logits.split(PIECE), row_ids[cut].split(PIECE), positions[cut].split(PIECE), strict=True)
            kept[name] += [keep(form, *part) for part in parts]
            seconds[name] += time.process_time() - started
    entropies = torch.cat([part.entropy_N for part in next(iter(kept.values())) if part.entropy_N is not None])
    print(json.dumps({"mean_entropy_nats": round(entropies.mean().item(), 2), **vars(arguments)}), flush=True)
    student_V = teacher.prior_V.softmax(dim=0)
    with tempfile.TemporaryDirectory() as folder:
        for name, form in forms.items():
            targets = SparseTargets.joined(kept[name])
            extraction = {"extracted_tokens_per_second": round(arguments.tokens / seconds[name])}
            for order in arguments.orders:
                alphabet = Alphabet.by_counts((teacher.prior_V.exp() * 1e9).long().numpy() * (order == "frequency"))
                facts = measured(
                    LocalStore(f"{folder}/{name}-{order}"), form, targets, alphabet, teacher, whole_VD, student_V
                )
                print(json.dumps({"codec": name, "alphabet": order, **facts, **extraction}), flush=True)


def hidden_gradients(teacher: Teacher) -> dict[str, float]:
    """By temperature: the norm of the difference of both gradients, over that of the whole one."""
    of_student = {t: (teacher.prior_V / t).softmax(dim=0) for t in TEMPERATURES}
    whole = {t: torch.zeros_like(teacher.head_VD) for t in TEMPERATURES}
    off = {t: torch.zeros_like(teacher.head_VD) for t in TEMPERATURES}
    for start in range(0, len(teacher.hidden_ND), CHUNK):
        hidden_ND = teacher.hidden_ND[start : start + CHUNK]
        logits, kept = teacher.of_hidden(hidden_ND), teacher.of_hidden(hidden_ND.bfloat16().float())
        for t in TEMPERATURES:
            probs = (logits / t).softmax(dim=1)
            off[t].addmm_(((kept / t).softmax(dim=1) - probs).T, hidden_ND)
            whole[t].addmm_((of_student[t] - probs).T, hidden_ND)
    return {f"T = {t:g}": round((off[t].norm() / whole[t].norm()).item(), 6) for t in TEMPERATURES}


def measured(
    store: LocalStore, form: SparseFormat, targets: SparseTargets, alphabet: Alphabet, teacher: Teacher,
    whole_VD: torch.Tensor, student_V: torch.Tensor,
) -> dict[str, float]:  # fmt: skip
    """What a shard of these targets costs, and the gradient that comes out of it."""
    tokens = len(targets.ids_NK)
    rows, lengths = np.arange(tokens // ROW), np.full(tokens // ROW, ROW)
    started = time.perf_counter()
    entry = write_sparse(
        store, "c/train-00000.parquet", rows, lengths, targets, form=form, alphabet=alphabet, fingerprint="bench"
    )
    written = time.perf_counter()
    shard = read_sparse(store, "c", entry, form, alphabet)
    found = shard.targets(rows)
    read = time.perf_counter()
    group = pq.ParquetFile(store.local("c/train-00000.parquet")).metadata.row_group(0)
    sizes = {group.column(n).path_in_schema: group.column(n).total_compressed_size for n in range(group.num_columns)}
    kept = (found.weights_NK > 0).sum().item() / tokens
    gradient_VD = torch.zeros_like(whole_VD)
    for place in range(found.ids_NK.shape[1]):
        gradient_VD.index_add_(0, found.ids_NK[:, place], teacher.hidden_ND * found.weights_NK[:, place : place + 1])
    of_student_VD = student_V[:, None] * teacher.hidden_ND.sum(dim=0)
    ours, theirs = (of_student_VD - gradient_VD).flatten().double(), (of_student_VD - whole_VD).flatten().double()
    angle = torch.rad2deg(torch.acos((ours @ theirs / (ours.norm() * theirs.norm())).clamp(max=1)))
    return {
        "bytes_per_token": round(entry.size / tokens, 2),
        "gap_classes": round(sum(size for column, size in sizes.items() if column.startswith("gap_")) / tokens, 2),
        "bits": round(sizes["bits"] / tokens, 2),
        "weights": round(sum(sizes.get(column, 0) for column in ("weights", "logprobs", "log_tail")) / tokens, 2),
        "kept_tokens": round(kept, 2),
        "raw_id_bytes": round(kept * math.ceil(math.log2(alphabet.size)) / 8, 2),
        "encoded_tokens_per_second": round(tokens / (written - started)),
        "decoded_tokens_per_second": round(tokens / (read - written)),
        "gradient_angle_degrees": round(angle.item(), 2),
        "gradient_norm_ratio": round((ours.norm() / theirs.norm()).item(), 4),
    }


if __name__ == "__main__":
    main()
