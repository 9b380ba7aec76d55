"""What reducing a language model's logits adds to its own forward: python benchmarks/extraction.py [--sizes 10M 110M]

The forward alone is the model's with its output layer, as transformers computes it, over four rows of 256 tokens. With
a codec it is what teach does: the decoder, then logits chunk by chunk, what the codec keeps of them, and at the end the
shard's columns packed, compressed and committed. `hidden` makes no logits. Seconds are the processor's, of one thread;
the calls take turns, so that other work on the machine meets all of them, and their medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raydistill.cache.alphabet import Alphabet
from raydistill.cache.hidden_shards import HIDDEN, hidden_writer
from raydistill.cache.sampling import reduced, sampled_targets, top_targets
from raydistill.cache.sparse_rows import SparseFormat
from raydistill.cache.sparse_shards import write_sparse
from raydistill.models.loading import count_parameters
from raydistill.next_token import chunk_of, hidden_states, output_head
from raydistill.record.store import LocalStore
from raydistill.stages.cluster import KEPT_MEMORY
from raydistill.stages.forward import DTYPES
from raydistill.targets import SparseTargets

SIZES = {"10M": (384, 6, 6), "110M": (768, 12, 12), "1B": (2048, 16, 32)}  # width, layers, heads
ROWS, LENGTH, KEPT = 4, 256, 20
Calls = dict[str, Callable[[], object]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["10M", "110M"], choices=list(SIZES))
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[32_000, 128_256])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if not os.environ.keys() >= KEPT_MEMORY.keys():  # as workers are started
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEPT_MEMORY)
    torch.set_num_threads(1)
    for size in arguments.sizes:
        for vocabulary in arguments.vocabularies:
            for dtype in arguments.dtypes:
                model = made_model(size, vocabulary).to(DTYPES[dtype])
                with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
                    seconds = in_turn(calls_of(model, vocabulary, LocalStore(folder)), arguments.rounds)
                alone = seconds.pop("alone")
                added = {name: round(taken / alone - 1, 3) for name, taken in seconds.items()}
                print(
                    json.dumps(
                        {
                            "teacher": size, "parameters": count_parameters(model), "vocabulary": vocabulary,
                            "dtype": dtype, "ms_a_token_alone": round(1e3 * alone / (ROWS * LENGTH), 4), "added": added,
                        }
                    ),
                    flush=True,
                )  # fmt: skip


def made_model(size: str, vocabulary: int) -> LlamaForCausalLM:
    width, layers, heads = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=8 * width // 3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=4 / width**0.5)  # peaked, as a trained model's
    return model


def calls_of(model: LlamaForCausalLM, vocabulary: int, store: LocalStore) -> Calls:
    """The forward alone, and with each codec."""
    inputs = {"input_ids": torch.randint(0, vocabulary, (ROWS, LENGTH))}
    head, alphabet = output_head(model, vocabulary), Alphabet.by_counts(np.zeros(vocabulary, np.int64))
    row_ids_R, tokens_R = np.arange(ROWS), np.full(ROWS, LENGTH)
    row_ids_N, positions_N = torch.arange(ROWS * LENGTH) // LENGTH, torch.arange(ROWS * LENGTH) % LENGTH

    def sparse(form: SparseFormat, keep: Callable[..., SparseTargets]) -> Callable[[], object]:
        def call() -> object:
            hidden_ND = hidden_states(model, inputs).flatten(0, 1)
            targets = reduced(
                hidden_ND, head, keep, row_ids_N=row_ids_N, positions_N=positions_N, chunk=chunk_of(vocabulary)
            )
            return write_sparse(
                store, f"{form.codec}.parquet", row_ids_R, tokens_R, targets, form=form, alphabet=alphabet,
                fingerprint="benchmark",
            )  # fmt: skip

        return call

    def hidden() -> object:
        with hidden_writer(store, "hidden.parquet", head.weight_VD.shape[1]) as writer:
            writer.add(row_ids_R, tokens_R, {HIDDEN: hidden_states(model, inputs).float()})
            return writer.commit("benchmark")

    return {
        "alone": lambda: model(**inputs, use_cache=False).logits,
        "sampled": sparse(
            SparseFormat("sampled", KEPT), lambda z, r, p: sampled_targets(z, r, p, width=KEPT, seed=0)
        ),
        "topk": sparse(SparseFormat("topk", KEPT), lambda z, r, p: top_targets(z, width=KEPT)),
        "hidden": hidden,
    }  # fmt: skip


def in_turn(calls: Calls, rounds: int) -> dict[str, float]:
    """Each call's median processor seconds; a first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.process_time()
            call()
            if number:
                seconds[name].append(time.process_time() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


if __name__ == "__main__":
    main()
