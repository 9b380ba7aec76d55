"""The `hidden` codec: each position's last hidden state in bfloat16, and the teacher's output head once for the cache.

From both the teacher's logits are made again where they are needed, so that every temperature and every loss may be
asked of it. A teacher that runs in bfloat16 gives its own logits back; of one in float32 each number of a hidden state
is rounded by 2^-9 of itself at most.

A shard is one of feature_shards with one feature. The head is a Parquet file with one row a token: `weight.DTYPE` and,
where there is one, `bias.DTYPE`, values of so many bytes in that dtype.

Shapes: R rows, V vocabulary, D width of the hidden states.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydistill.cache.codecs import fixed_binary, from_fixed_binary
from raydistill.cache.feature_shards import FeatureColumn, FeatureShard, FeatureWriter, Int64, read_features
from raydistill.errors import UserError
from raydistill.record.commit import Entry, Manifest, commit_shard, open_verified
from raydistill.record.store import Store, naming
from raydistill.targets import OutputHead

HIDDEN = "hidden"
CODEC = "bfloat16"
GROUP_BYTES = 64 << 20
HEAD_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {4: torch.int32, 2: torch.int16}


def hidden_writer(store: Store, name: str, width: int) -> FeatureWriter:
    """Takes batches {HIDDEN: (R, longest row, D)} padded on the right, and commits them as a shard."""
    return FeatureWriter(store, name, [FeatureColumn(HIDDEN, "LW", width)], CODEC)


def read_hidden(
    store: Store, folder: str, entry: Entry, manifest: Manifest, *, row_ids_R: Int64, tokens_R: Int64
) -> FeatureShard:
    """The hidden states of the rows of a data shard: `row(HIDDEN, index)` are bfloat16 bits, (tokens, D), mapped.

    manifest.facts["width"] is D. Raises UserError when the file is not what the manifest says, has other rows, or
    their tokens are not as many.
    """
    facts = {"codec": CODEC, "features": [{"name": HIDDEN, "axes": "LW", "size": manifest.facts["width"]}]}
    as_features = Manifest(manifest.fingerprint, manifest.files, facts)
    return read_features(store, folder, entry, as_features, row_ids_N=row_ids_R, tokens_N=tokens_R, names={HIDDEN})


def write_head(store: Store, name: str, head: OutputHead, fingerprint: str) -> Entry:
    """Commits weight and bias bit by bit; scale and softcap belong to the facts of the cache.

    Raises ValueError for a number that is not finite or another dtype than HEAD_DTYPES.
    """
    parts = {"weight": head.weight_VD, **({} if head.bias_V is None else {"bias": head.bias_V[:, None]})}
    names = {dtype: name for name, dtype in HEAD_DTYPES.items()}
    columns: dict[str, pa.Array] = {}
    for part, values in parts.items():
        if values.dtype not in names:
            raise ValueError(f"the head's {part} is {values.dtype}, expected one of {', '.join(HEAD_DTYPES)}")
        if not torch.isfinite(values).all():
            raise ValueError(f"the head's {part} is not finite. Check the teacher's weights")
        bits = values.detach().cpu().contiguous().view(BITS[values.dtype.itemsize])
        columns[f"{part}.{names[values.dtype]}"] = fixed_binary(bits.numpy())
    fields = [pa.field(column, array.type, nullable=False) for column, array in columns.items()]
    table, staged = pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields)), store.staging(name)
    with naming(staged):
        pq.write_table(
            table, staged, compression="NONE", use_dictionary=False, write_statistics=False, write_page_checksum=True,
            store_schema=False, row_group_size=max(1, GROUP_BYTES * len(table) // max(1, table.nbytes)),
        )  # fmt: skip
    return commit_shard(store, staged, name, rows=len(table), fingerprint=fingerprint)


def read_head(
    store: Store, folder: str, entry: Entry, *, scale: float = 1.0, softcap: float | None = None
) -> OutputHead:
    """The head as it was written. Raises UserError when the file is not what the entry says."""
    with open_verified(store, folder, entry) as source:
        table = pq.ParquetFile(source).read(use_threads=False)
    parts: dict[str, torch.Tensor] = {}
    for column in table.column_names:
        part, _, name = column.partition(".")
        if part not in ("weight", "bias") or name not in HEAD_DTYPES:
            where = store.where(f"{folder}/{entry.file}")
            raise UserError(f"{where}: has column {column!r}, which no head has. Score again with --redo teach")
        array = pa.concat_arrays(table.column(column).chunks)
        bits = from_fixed_binary(array, np.int32 if HEAD_DTYPES[name].itemsize == 4 else np.int16)
        parts[part] = torch.from_numpy(bits.copy()).view(HEAD_DTYPES[name])
    bias = parts.get("bias")
    return OutputHead(parts["weight"], None if bias is None else bias[:, 0], scale, softcap)
