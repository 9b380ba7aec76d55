"""The teacher cache: what each codec promises, and a shard from the logits to the file and back.

Shapes: N rows, K classes.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from raydistill.cache.codecs import CODECS, FLOAT16_MAX, fixed_binary, from_fixed_binary
from raydistill.cache.shards import LogitShard, read_logits, write_logits
from raydistill.errors import UserError
from raydistill.record.commit import Entry, Manifest
from raydistill.record.store import LocalStore

NAME = "teacher/cache/train-00000.parquet"
FLOAT16_STEP = 2.0**-24  # the smallest positive float16


def round_trip(codec: str, logits_NK: np.ndarray) -> np.ndarray:
    kept = CODECS[codec]
    classes = logits_NK.shape[1]
    names = [field.name for field in kept.columns(classes)]
    return kept.decode(dict(zip(names, kept.encode(logits_NK), strict=True)), classes)


def realistic(rows: int, classes: int = 77, seed: int = 0) -> np.ndarray:
    """Logits as a fine-tuned classifier has them: one class well above the others, its probability 0.9 on average."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1, (rows, classes))
    logits[np.arange(rows), generator.integers(0, classes, rows)] += generator.gamma(8, 1.25, rows)
    return logits.astype(np.float32)


def diffuse(rows: int, classes: int = 77, seed: int = 0) -> np.ndarray:
    """Logits of spread 3 with no class singled out: the top probability is 0.46 on average."""
    return np.random.default_rng(seed).normal(0, 3, (rows, classes)).astype(np.float32)


def mean_kl(teacher_NK: np.ndarray, student_NK: np.ndarray, temperature: float) -> float:
    """Mean KL in nats, float64, with a log-sum-exp of its own."""

    def logprobs(z: np.ndarray) -> np.ndarray:
        z = z.astype(np.float64) / temperature
        top = z.max(axis=1, keepdims=True)
        return z - top - np.log(np.exp(z - top).sum(axis=1, keepdims=True))

    p, q = logprobs(teacher_NK), logprobs(student_NK)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def rows_of(limit: float) -> st.SearchStrategy[np.ndarray]:
    """Up to 6 rows of 2 to 200 classes; hypothesis likes ties, constant rows, zeros and the limits."""
    shapes = st.tuples(st.integers(1, 6), st.integers(2, 200))
    end = float(np.float32(limit))
    return npst.arrays(np.float32, shapes, elements=st.floats(-end, end, width=32))


@pytest.mark.parametrize("codec", CODECS)
def test_each_codec_covers_every_temperature(codec: str):
    assert all(CODECS[codec].covers(temperature) for temperature in (0.01, 1.0, 4.0, 1000.0))


@given(rows_of(FLOAT16_MAX))
def test_float32_is_kept_bit_for_bit(logits_NK: np.ndarray):
    assert round_trip("dense-float32", logits_NK).tobytes() == logits_NK.tobytes()


@given(rows_of(FLOAT16_MAX))
def test_float16_rounds_to_the_nearest(logits_NK: np.ndarray):
    found = round_trip("dense-float16", logits_NK)
    assert found.dtype == np.float32
    # Half a unit in the last of 11 bits; below the normal range half of the smallest step.
    bound = np.maximum(np.abs(logits_NK.astype(np.float64)) * 2**-11, FLOAT16_STEP / 2)
    assert (np.abs(found.astype(np.float64) - logits_NK) <= bound).all()


def int8_step_bound(logits_NK: np.ndarray) -> np.ndarray:
    """The largest step that int8 may take for each row, from its docstring.

    1/254 of the range, widened by the rounding of the offset (float16 holds 11 bits) and of the scale, rounded up.
    """
    low, high = (f(logits_NK.astype(np.float64), axis=1, keepdims=True) for f in (np.min, np.max))
    middle = np.maximum(np.abs(low + high) / 2 * 2**-11, FLOAT16_STEP)
    return ((high - low) / 2 + middle) / 127 * (1 + 2**-9) + 2 * FLOAT16_STEP


@given(
    st.one_of(
        rows_of(FLOAT16_MAX),
        rows_of(30.0),
        rows_of(1e-3),
        rows_of(0.01).map(lambda z: z + np.float32(100)),
        rows_of(8.0).map(np.rint),
    )
)
def test_int8_keeps_the_argmax_and_errs_by_half_a_step(logits_NK: np.ndarray):
    found = round_trip("dense-int8", logits_NK)
    assert found.argmax(axis=1).tolist() == logits_NK.argmax(axis=1).tolist()
    step = int8_step_bound(logits_NK)
    error = np.abs(found.astype(np.float64) - logits_NK)
    rounding = np.abs(logits_NK.astype(np.float64)).max(axis=1, keepdims=True) * 2**-22  # of float32 while decoding
    # A class that rounding put level with the top one is one step lower than its nearest value.
    level = logits_NK.max(axis=1, keepdims=True) - logits_NK <= step
    assert (error <= np.where(level, 1.5, 0.5) * step + rounding).all()


def test_int8_of_a_constant_row_keeps_the_first_class_on_top():
    for value in (0.0, 1.2345, -1.2345, 1000.1, -60000.0):
        logits = np.full((1, 5), value, np.float32)
        found = round_trip("dense-int8", logits)
        assert found.argmax() == 0
        assert np.abs(found - value).max() <= 2 * int8_step_bound(logits).max()


def test_int8_mean_error_is_a_quarter_of_a_step():
    logits = realistic(2000)
    step = np.ptp(logits, axis=1, keepdims=True) / 254
    error = np.abs(round_trip("dense-int8", logits) - logits) / step
    assert error.mean() == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize("codec", ["dense-float16", "dense-int8"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 8.0])
def test_a_classifiers_targets_lose_less_than_1e5_nats(codec: str, temperature: float):
    logits = realistic(2000)
    assert mean_kl(logits, round_trip(codec, logits), temperature) <= 1e-5


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 8.0])
def test_diffuse_targets_lose_what_rounding_must_lose(temperature: float):
    # KL is half the variance of the error under p to second order. That of rounding is step^2 / 12 for each class but
    # the top one, which is the end of the scale and has no error.
    logits = diffuse(2000)
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum(axis=1, keepdims=True)
    step = np.ptp(logits, axis=1).astype(np.float64) / 254 / temperature
    top = p.max(axis=1)
    expected = (step**2 / 24 * ((1 - top) - (p**2).sum(axis=1) + top**2)).mean()
    found = mean_kl(logits, round_trip("dense-int8", logits), temperature)
    assert found == pytest.approx(expected, rel=0.1)
    assert found <= 1e-4


@pytest.mark.parametrize("codec", ["dense-float16", "dense-int8"])
def test_a_logit_that_does_not_fit_is_refused(codec: str):
    fits = np.array([[FLOAT16_MAX, -FLOAT16_MAX]], np.float32)
    assert np.isfinite(round_trip(codec, fits)).all()
    with pytest.raises(ValueError, match="does not fit"):
        round_trip(codec, np.array([[0.0, 65520.0]], np.float32))
    with pytest.raises(ValueError, match="does not fit"):
        round_trip(codec, np.array([[-1e5, 0.0]], np.float32))


def test_a_column_is_read_without_a_copy():
    halves = np.arange(12, dtype=np.float16).reshape(3, 4)
    column = fixed_binary(halves)
    assert np.shares_memory(np.frombuffer(column.buffers()[1], np.float16), halves)
    view = from_fixed_binary(column, np.float16)
    assert np.shares_memory(view, halves)
    assert np.array_equal(from_fixed_binary(column.slice(1, 2), np.float16), halves[1:])


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def write(
    store: LocalStore, logits: np.ndarray, codec: str, name: str = NAME, first_row: int = 0
) -> tuple[Entry, Manifest]:
    row_ids = np.arange(first_row, first_row + len(logits))
    entry = write_logits(store, name, row_ids, logits, codec=codec, fingerprint="f" * 64)
    return entry, Manifest("f" * 64, (entry,), {"codec": codec, "classes": logits.shape[1]})


def read(store: LocalStore, entry: Entry, manifest: Manifest) -> LogitShard:
    return read_logits(store, "teacher/cache", entry, manifest)


@pytest.mark.parametrize("codec", CODECS)
def test_a_shard_reads_back_as_its_codec_promises(store: LocalStore, codec: str):
    logits = realistic(300)
    shard = read(store, *write(store, logits, codec, first_row=5000))
    assert shard.row_ids_N.tolist() == list(range(5000, 5300))
    assert np.array_equal(shard.logits_NK, round_trip(codec, logits))
    assert shard.logits_NK.flags.writeable


@pytest.mark.parametrize(("codec", "limit"), [("dense-int8", 84), ("dense-float16", 158)])
def test_bytes_of_a_row(store: LocalStore, codec: str, limit: int):
    entry, _ = write(store, realistic(10_000), codec)
    assert entry.size == store.size(NAME)
    assert entry.size / 10_000 <= limit


@pytest.mark.parametrize("codec", CODECS)
def test_any_parquet_reader_reads_a_shard(store: LocalStore, codec: str):
    logits = realistic(50)
    write(store, logits, codec)
    table = pq.read_table(store.where(NAME), page_checksum_verification=True)
    assert table.column("row_id").to_pylist() == list(range(50))
    values = b"".join(table.column("logits").to_pylist())
    if codec == "dense-int8":
        scale, offset = (
            np.frombuffer(b"".join(table.column(name).to_pylist()), np.float16).astype(np.float32)[:, None]
            for name in ("scale", "offset")
        )
        decoded = np.frombuffer(values, np.int8).reshape(50, 77) * scale + offset
    else:
        dtype = np.float16 if codec == "dense-float16" else np.float32
        decoded = np.frombuffer(values, dtype).reshape(50, 77)
    np.testing.assert_allclose(decoded, round_trip(codec, logits), rtol=1e-6)


@pytest.mark.parametrize("codec", CODECS)
def test_writing_again_gives_the_same_bytes(store: LocalStore, codec: str):
    logits = realistic(500)
    first = write(store, logits, codec)[0]
    again = write(store, logits, codec, "again/train-00000.parquet")[0]
    assert again == first
    assert store.read(NAME) == store.read("again/train-00000.parquet")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_its_row(store: LocalStore, value: float):
    logits = realistic(8)
    logits[3, 70] = value
    with pytest.raises(ValueError, match="row 103 has a logit that is not finite"):
        write(store, logits, "dense-float32", first_row=100)
    assert store.list() == []


@pytest.mark.parametrize("place", [8, -40, 2000])
def test_a_damaged_shard_is_refused_by_name(store: LocalStore, place: int):
    entry, manifest = write(store, realistic(200), "dense-int8")
    data = bytearray(store.read(NAME))
    data[place] ^= 1
    Path(store.where(NAME)).write_bytes(data)
    with pytest.raises(UserError, match=r"train-00000\.parquet: has sha256 .* expected"):
        read(store, entry, manifest)


def test_a_missing_shard_is_refused_by_name(store: LocalStore):
    entry, manifest = write(store, realistic(20), "dense-int8")
    store.remove(NAME)
    with pytest.raises(UserError, match=r"train-00000\.parquet: .*the file is missing"):
        read(store, entry, manifest)


def test_columns_cannot_hold_a_missing_row(store: LocalStore):
    write(store, realistic(20), "dense-int8")
    schema = pq.read_schema(store.where(NAME))
    assert all(not field.nullable for field in schema)
    assert schema.field("logits").type == pa.binary(77)
