"""From files to rows: every format, every rule for single rows, the draw of validation rows, what stands twice."""

import contextlib
import csv
import gzip
import hashlib
import io
import json
import os
import random
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from raydistill.data import duplicates, readers
from raydistill.data.duplicates import SPLITS, TextIndex
from raydistill.data.sources import Columns, Row, find_source, find_sources, read_rows
from raydistill.data.splits import ValidationDraw, survey
from raydistill.errors import UserError

COLUMNS = Columns("text", "label", ",", 1000)
TEXTS = replace(COLUMNS, label=None)
TWO_ROWS = [("a", "x"), ("b", "y")]
UNKNOWN = "the ending says no known format. Use .csv, .tsv, .jsonl or .parquet; .txt for texts of language models"


def read(location: object, columns: Columns = COLUMNS) -> list[tuple[str, str]]:
    """(text, label) of the usable rows and (reason, "dropped") of the others."""
    rows = read_rows(find_source("data.train", str(location)), columns)
    return [(row.text, row.label) if isinstance(row, Row) else (row.reason, "dropped") for row in rows]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(location: object, columns: Columns = COLUMNS) -> str:
    """The message without its setting and path."""
    with pytest.raises(UserError) as caught:
        survey(find_source("data.train", str(location)), columns, max_dropped=0.1)
    message = str(caught.value)
    assert message.startswith(f"data.train: {location}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"data.train: {location}: ")


def table(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# CSV.


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("text,label\na,x\nb,y\n", TWO_ROWS),
        ("label,other,text\nx,1,a\ny,2,b", TWO_ROWS),
        ("\ufefftext,label\r\na,x\r\nb,y\r\n", TWO_ROWS),
        ("text,label\ra,x\rb,y\r", TWO_ROWS),
        (' text ,label\n" a ",x \n\nb,y\n\n', TWO_ROWS),
        ('text,label\n"a, ""b""\r\nc",x\n', [('a, "b"\r\nc', "x")]),
        ("text,label\nl\u2028m\x85n,é\n", [("l\u2028m\x85n", "é")]),
        ("text,label\n=SUM(A1),x\n", [("=SUM(A1)", "x")]),
        ("text,label\na\0b,x\n", [("a\0b", "x")]),
        ("text,label\na,x\nragged\nb,y\n1,2,3\n",
         [("a", "x"), ("malformed", "dropped"), ("b", "y"), ("malformed", "dropped")]),
        ('text,label\n"a" b,x\nb,y\n', [("malformed", "dropped"), ("b", "y")]),
        ("text,label\na,x,\n,x\n", [("malformed", "dropped"), ("empty text", "dropped")]),
        ("text,label\n", []),
    ],
)  # fmt: skip
def test_csv(tmp_path: Path, content: str, rows: list[tuple[str, str]]):
    assert read(written(tmp_path / "a.csv", content)) == rows


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=20))
@example(["\r", '"', ",", "a\nb", '"a', "a,\r\n"])
def test_csv_reads_what_pythons_writer_wrote(tmp_path_factory: pytest.TempPathFactory, texts: list[str]):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([("text", "label"), *((text, "x") for text in texts)])
    path = written(tmp_path_factory.getbasetemp() / "written.csv", file.getvalue())
    assert read(path) == [(text.strip(), "x") if text.strip() else ("empty text", "dropped") for text in texts]


def test_every_line_that_an_open_quote_swallows_is_counted(tmp_path: Path):
    # The reader once counted one row here, so that nearly a whole file could vanish below max_dropped.
    lines = "".join(f"text {n},x\n" for n in range(50))
    path = written(tmp_path / "a.csv", f'text,label\n{lines}"never closed,x\n{lines}')
    assert Counter(label for _, label in read(path)) == {"x": 50, "dropped": 51}
    assert refusal(path) == "row 51: malformed; 51 of 101 rows cannot be used. Mend the file, or raise data.max_dropped"


def test_a_field_beyond_all_bounds_is_dropped_and_the_next_row_is_read(tmp_path: Path):
    path = written(tmp_path / "a.csv", f"text,label\n{'x' * 200_000},x\nb,y\n")
    assert read(path) == [("malformed", "dropped"), ("b", "y")]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_line_without_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str):
    monkeypatch.setattr(readers, "LINE_CHARACTERS", 100)
    header, row = {"csv": ("text,label\n", "b,y\n"), "jsonl": ("", '{"text": "b", "label": "y"}\n')}[ending]
    path = written(tmp_path / f"a.{ending}", f"{header}{row}{'x' * 1000}\n{row}")
    assert read(path) == [("b", "y"), ("malformed", "dropped"), ("b", "y")]
    with readers.open_text(str(path)) as file:
        assert max(len(line) for line in readers.lines_of(file)) == 100


def test_other_delimiters(tmp_path: Path):
    semicolons = written(tmp_path / "a.csv", "text;label\na, b;x\n")
    assert read(semicolons, Columns("text", "label", ";", 1000)) == [("a, b", "x")]
    assert read(written(tmp_path / "a.tsv", "text\tlabel\na, b\tx\n")) == [("a, b", "x")]
    assert (
        refusal(semicolons) == "has no column 'text', it has 'text;label'. Set data.text, data.label or data.delimiter"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "begins with no header. Its first line must be like text,label"),
        ("\n\n", "begins with no header. Its first line must be like text,label"),
        ("txt,label\na,x\n",
         "has no column 'text', it has 'txt', 'label'. Set data.text, data.label or data.delimiter"),
        ("text,label,text\na,x,b\n", "has 2 columns named 'text'. Rename all but one"),
        ('"text,label\na,x\n', "the header is not CSV (unexpected end of data). Check the file"),
        ("x" * 200_000, "the header is not CSV (field larger than field limit (131072)). Check the file"),
        ("text,label\n", "has no usable rows (0 dropped)"),
        (b"text,label\n\xe9,x\n", "is not UTF-8 (invalid continuation byte). Save it as UTF-8"),
        ("text,label\na,x\n".encode("utf-16"), "is not UTF-8 (invalid start byte). Save it as UTF-8"),
    ],
)  # fmt: skip
def test_csv_files_that_are_refused(tmp_path: Path, content: str | bytes, message: str):
    assert refusal(written(tmp_path / "a.csv", content)) == message


# Compressed files, places and kinds.


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_compressed_files(tmp_path: Path, ending: str, codec: str):
    # .zst was once read as if it were plain text.
    content = {"csv": "text,label\na,x\nb,y\n", "jsonl": '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'}[
        ending
    ]
    path = tmp_path / f"a.{ending}.{'gz' if codec == 'gzip' else 'zst'}"
    with pa.CompressedOutputStream(str(path), codec) as file:
        file.write(content.encode())
    assert read(path) == TWO_ROWS


def test_gzip_files_one_after_the_other_in_a_file(tmp_path: Path):
    path = written(tmp_path / "a.csv.gz", gzip.compress(b"text,label\na,x\n") + gzip.compress(b"b,y\n"))
    assert read(path) == TWO_ROWS


def test_damaged_gzip_files(tmp_path: Path):
    whole = gzip.compress(b"text,label\n" + random.Random(0).randbytes(3000).hex().encode())
    flipped = bytearray(whole)
    flipped[60] ^= 255  # zlib's own error is not an OSError and once ended in a traceback
    for name, content in {
        "cut": whole[:200],
        "flipped": bytes(flipped),
        "plain": b"text,label\na,x\n",
        "empty": b"",
    }.items():
        message = refusal(written(tmp_path / f"{name}.csv.gz", content))
        assert message.startswith(("cannot be read (", "begins with no header")), name


def test_globs_give_all_files_in_order_and_name_the_one_that_differs(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    written(tmp_path / "b.csv", "text,label\nb,y\n")
    written(tmp_path / "a.csv", "label,text\nx,a\n")
    written(tmp_path / "sub" / "c.csv", "text,label\nc,z\n")
    assert read(tmp_path / "*.csv") == TWO_ROWS
    assert read(tmp_path / "**" / "*.csv") == [*TWO_ROWS, ("c", "z")]
    found = list(read_rows(find_source("data.train", str(tmp_path / "*.csv")), COLUMNS))
    assert [(row.file, row.number) for row in found] == [(0, 1), (1, 1)]
    written(tmp_path / "b.csv", "words,label\nb,y\n")
    with pytest.raises(
        UserError, match=rf"^data\.train: {tmp_path}/b\.csv: has no column 'text', it has 'words', 'label'\."
    ):
        read(tmp_path / "*.csv")


@pytest.mark.parametrize("folder", ["[x]", "a::b", "a b#?é", "*"])
def test_folders_with_special_names(tmp_path: Path, folder: str):
    # fsspec takes :: for a chain of stores, and a path with brackets was looked for as a pattern alone.
    (tmp_path / folder).mkdir()
    assert read(written(tmp_path / folder / "a.csv", "text,label\na,x\nb,y\n")) == TWO_ROWS


def test_places_without_a_file(tmp_path: Path):
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "fifo.csv")
    os.symlink(tmp_path / "loop.csv", tmp_path / "loop.csv")
    for name, message in {
        "no.csv": "no such file. Check the path",
        "*.jsonl": "no file matches. Check the path",
        "folder.csv": "is a folder; name its files, as in folder/*.csv. Check the path",
        "fifo.csv": "is not a plain file. Check the path",
        "loop.csv": "is not a plain file. Check the path",
        "a.json": UNKNOWN,
        "a": UNKNOWN,
    }.items():
        assert refusal(tmp_path / name) == message
    assert refusal("nope://a/b.csv") == "cannot be listed (Protocol not known: nope)"
    assert refusal("memory://no.csv") == "no file matches. Check the path"


def test_urls(tmp_path: Path):
    written(tmp_path / "a.csv", "text,label\na,x\nb,y\n")
    assert read(f"file://{tmp_path}/a.csv") == TWO_ROWS
    assert read(f"file://{tmp_path}/*.csv") == TWO_ROWS


def test_the_identity_is_the_contents_and_their_order_not_the_paths(tmp_path: Path):
    def identity(folder: str, *contents: str) -> list[str]:
        (tmp_path / folder).mkdir()
        for number, content in enumerate(contents):
            written(tmp_path / folder / f"{number}.csv", content)
        return find_source("data.train", str(tmp_path / folder / "*.csv")).identity()

    first = identity("a", "text,label\na,x\n", "text,label\nb,y\n")
    assert identity("b", "text,label\na,x\n", "text,label\nb,y\n") == first
    assert identity("c", "text,label\nb,y\n", "text,label\na,x\n") == first[::-1] != first
    assert identity("d", "text,label\na,x\n", "text,label\nb,z\n") != first
    assert first[0] == hashlib.sha256(b"text,label\na,x\n").hexdigest()


# JSON lines.


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('{"text": "a", "label": "x"}\n\n{"label": "y", "text": "b", "more": [1]}\n', TWO_ROWS),
        ('\ufeff{"text": "a", "label": "x"}\r\n  \r\n{"text": "b", "label": "y"}', TWO_ROWS),
        ('{"text": "a\\nb", "label": 3}\n', [("a\nb", "3")]),
        ('{"text": "a", "label": -3}\n', [("a", "-3")]),
        ('{"text": "a", "label": "x"}\n{"text": "b", "la', [("a", "x"), ("malformed", "dropped")]),
        ('{"text": "a", "label": "x"}\n' + "[" * 10_000 + "]" * 10_000 + "\n", [("a", "x"), ("malformed", "dropped")]),
        ('{"text": "a", "label": "x"}\n' + '{"a":' * 10_000 + "\n", [("a", "x"), ("malformed", "dropped")]),
        ('{"text": "a", "label": ' + "9" * 5000 + "}\n", [("malformed", "dropped")]),
        ('{"text": "a", "label": "x"}\n{}\n"a"\n5\nnull\n[1]\n',
         [("a", "x"), ("null text", "dropped"), *[("malformed", "dropped")] * 4]),
        ("", []),
    ],
)  # fmt: skip
def test_json_lines(tmp_path: Path, content: str, rows: list[tuple[str, str]]):
    assert read(written(tmp_path / "a.jsonl", content)) == rows
    assert read(written(tmp_path / "a.ndjson", content)) == rows


@pytest.mark.parametrize("content", ['[{"text": "a", "label": "x"}]', '[\n {"text": "a"}\n]', "\n[1]", "[" * 100_000])
def test_a_json_array_is_refused(tmp_path: Path, content: str):
    message = "is a JSON array. Write one object a line (JSON lines)"
    assert refusal(written(tmp_path / "a.jsonl", content)) == message


def test_json_lines_without_a_column(tmp_path: Path):
    path = written(tmp_path / "a.jsonl", '{"text": "a", "intent": "x"}\n')
    assert (
        refusal(path) == "has no column 'label', it has 'text', 'intent'. Set data.text, data.label or data.delimiter"
    )
    assert read(path, Columns("text", "intent", ",", 1000)) == [("a", "x")]
    assert "it has none." in refusal(written(tmp_path / "b.jsonl", "{}\n"))


# The rules for single rows.

VALUES = [
    ("empty text", "", "x"),
    ("empty text", " \n\t ", "x"),
    ("null text", None, "x"),
    ("text is not text", 5, "x"),
    ("text is not text", ["a"], "x"),
    ("text is not text", float("nan"), "x"),
    ("text is not text", "\ud800", "x"),
    ("over max_row_bytes", "é" * 501, "x"),
    ("null label", "a", None),
    ("null label", "a", ""),
    ("null label", "a", "  "),
    ("label is not a name", "a", 1.0),
    ("label is not a name", "a", float("nan")),
    ("label is not a name", "a", 1e999),
    ("label is not a name", "a", True),
    ("label is not a name", "a", ["x"]),
    ("label is not a name", "a", {"x": 1}),
    # A label is printed, and its name stands in the student's config.json.
    ("label is not a name", "a", "\ud800"),
    ("label is not a name", "a", "x\ny"),
    ("label is not a name", "a", "\x1b[31m"),
    ("label is not a name", "a", "x" * 257),
]


@pytest.mark.parametrize(("reason", "text", "label"), VALUES)
def test_rows_that_are_dropped(tmp_path: Path, reason: str, text: object, label: object):
    lines = [{"text": "a", "label": "x"}, {"text": text, "label": label}, {"text": "é" * 500, "label": "x" * 256}]
    path = written(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert read(path) == [("a", "x"), (reason, "dropped"), ("é" * 500, "x" * 256)]


def test_a_survey_counts_every_reason_and_label(tmp_path: Path):
    lines = [{"text": text, "label": label} for _, text, label in VALUES] + [
        {"text": "a", "label": n % 3} for n in range(8)
    ]
    path = written(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    source = find_source("data.train", str(path))
    found = survey(source, COLUMNS, max_dropped=1.0)
    assert found.dropped == Counter(reason for reason, _, _ in VALUES)
    assert found.labels == {"0": 3, "1": 3, "2": 2}
    assert found.rows == 8
    assert found.first_dropped == f"{path}: row 1: empty text"
    with pytest.raises(UserError) as caught:
        survey(source, COLUMNS, max_dropped=0.5)
    assert str(caught.value) == (
        f"data.train: {path}: row 1: empty text; {len(VALUES)} of {len(VALUES) + 8} rows cannot be used."
        " Mend the file, or raise data.max_dropped"
    )


def test_the_share_of_dropped_rows_that_is_still_allowed(tmp_path: Path):
    path = written(tmp_path / "a.csv", "text,label\n" + "a,x\n" * 9 + ",x\n")
    source = find_source("data.train", str(path))
    assert survey(source, COLUMNS, max_dropped=0.1).rows == 9
    with pytest.raises(UserError, match="1 of 10 rows cannot be used"):
        survey(source, COLUMNS, max_dropped=0.0999)


def test_a_file_of_dropped_rows_alone(tmp_path: Path):
    path = written(tmp_path / "a.csv", "text,label\n,x\n,y\n")
    with pytest.raises(UserError) as caught:
        survey(find_source("data.test", str(path)), COLUMNS, max_dropped=1.0)
    assert str(caught.value) == f"data.test: {path}: has no usable rows (2 dropped; {path}: row 1: empty text)"


# Parquet.


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "PARQUET_BATCH_ROWS", 2)
    path = table(tmp_path / "a.parquet", label=["x", "y", None, "x"], text=["a", "b", "c", None], more=[1, 2, 3, 4])
    assert read(path) == [*TWO_ROWS, ("null label", "dropped"), ("null text", "dropped")]
    assert read(table(tmp_path / "b.parquet", text=["a", "b"], label=[7, -1])) == [("a", "7"), ("b", "-1")]
    words = {"text": pa.array(["a", "b"]).dictionary_encode(), "label": pa.array(["x", "y"]).dictionary_encode()}
    assert read(table(tmp_path / "c.parquet", **words)) == TWO_ROWS
    large = {"text": pa.array(["a", "b"], pa.large_string()), "label": pa.array(["x", "y"], pa.string_view())}
    assert read(table(tmp_path / "d.parquet", **large)) == TWO_ROWS
    dotted = table(tmp_path / "e.parquet", **{"a.b": ["a", "b"], "label": ["x", "y"]})
    assert read(dotted, Columns("a.b", "label", ",", 1000)) == TWO_ROWS


@pytest.mark.parametrize("label", [1.0, ["x"], {"a": 1}, b"x", True])
def test_parquet_labels_that_are_no_names(tmp_path: Path, label: object):
    path = table(tmp_path / "a.parquet", text=["a"], label=[label])
    assert read(path) == [("label is not a name", "dropped")]


@pytest.mark.parametrize(
    ("values", "kind"),
    [([1, 2], "int64"), ([["a"], []], "list<element: string>"), ([b"a", b"b"], "binary"), ([None, None], "null"),
     ([{"b": "a"}, None], "struct<b: string>")],
)  # fmt: skip
def test_parquet_columns_that_hold_no_text(tmp_path: Path, values: list[object], kind: str):
    path = table(tmp_path / "a.parquet", text=values, label=["x", "y"])
    assert refusal(path) == f"column 'text' holds {kind}, expected text. Set data.text"


def test_parquet_columns_that_are_missing_or_there_twice(tmp_path: Path):
    path = table(tmp_path / "a.parquet", text=["a"], intent=["x"])
    assert (
        refusal(path) == "has no column 'label', it has 'text', 'intent'. Set data.text, data.label or data.delimiter"
    )
    # Both once ended in a KeyError from Arrow.
    for names in (["text", "text", "label"], ["label", "label", "text"]):
        pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=names), tmp_path / "b.parquet")
        assert refusal(tmp_path / "b.parquet") == f"has 2 columns named '{names[1]}'. Rename all but one"


def test_parquet_files_that_are_none(tmp_path: Path):
    whole = table(tmp_path / "whole.parquet", text=["a"] * 1000, label=["x"] * 1000).read_bytes()
    for name, content in {
        "cut": whole[:-20], "half": whole[: len(whole) // 2], "empty": b"", "text": b"text\n" * 99, "PAR1": b"PAR1" * 3,
    }.items():  # fmt: skip
        assert refusal(written(tmp_path / f"{name}.parquet", content)).startswith("cannot be read ("), name
    empty = table(tmp_path / "none.parquet", text=pa.array([], pa.string()), label=pa.array([], pa.string()))
    assert refusal(empty) == "has no usable rows (0 dropped)"
    latin = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xe9"]).buffers())
    assert refusal(table(tmp_path / "l.parquet", text=latin, label=["x"])).startswith("is not UTF-8 (")


@given(st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=200)
def test_one_damaged_byte_of_parquet_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, place: int, change: int
):
    folder = tmp_path_factory.getbasetemp()
    if not (folder / "whole.parquet").exists():
        table(folder / "whole.parquet", text=[f"text {n}" for n in range(50)], label=["x", "y"] * 25)
    content = bytearray((folder / "whole.parquet").read_bytes())
    content[place % len(content)] ^= change
    with contextlib.suppress(UserError):
        read(written(folder / "flipped.parquet", bytes(content)))


# Hub data sets, from a folder.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def test_hub_data_sets_with_label_names(hub: Path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])})
    for split, rows in {"train": {"text": ["a", "b"], "label": [0, 1]}, "test": {"text": ["c"], "label": [-1]}}.items():
        data = datasets.Dataset.from_dict(rows, features=features)
        pq.write_table(data.data.table, hub / f"{split}.parquet")
    assert read(f"hf://{hub}") == TWO_ROWS
    assert read(f"hf://{hub}@train") == TWO_ROWS
    assert read(f"hf://{hub}@test") == [("c", "-1")]
    first = find_source("data.train", f"hf://{hub}").identity()
    assert first == find_source("data.test", f"hf://{shutil.copytree(hub, hub.parent / 'copy')}@train").identity()
    assert first != find_source("data.test", f"hf://{hub}").identity()


def test_hub_data_sets_without_a_label_column(hub: Path):
    written(hub / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    assert read(f"hf://{hub}", TEXTS) == [("a", None), ("b", None)]


def test_hub_data_sets_that_are_refused(hub: Path):
    assert refusal(f"hf://{hub}").startswith("cannot be loaded (")
    written(hub / "train.jsonl", '{"text": "a", "label": "x"}\n{"text": "b", "la')
    # An error in the middle of a stream once ended in a traceback.
    assert refusal(f"hf://{hub}").startswith("cannot be read (")
    written(hub / "train.jsonl", '{"words": "a", "label": "x"}\n')
    assert refusal(f"hf://{hub}").startswith("has no column 'text', it has 'words', 'label'.")
    assert refusal(f"hf://{hub}@no").startswith("cannot be loaded (")
    assert refusal(f"hf://{hub}:no").startswith("cannot be loaded (")


# Rows without a label.


def test_a_source_without_labels_is_read_by_its_text_alone(tmp_path: Path):
    expected = [("a", None), ("b", None), ("empty text", "dropped")]
    assert read(written(tmp_path / "a.csv", "more,text\n1,a\n2,b\n3,\n"), TEXTS) == expected
    assert read(written(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": "b", "label": 1.5}\n{"text": " "}'), TEXTS) == (
        expected
    )
    assert read(table(tmp_path / "a.parquet", text=["a", "b", ""], label=["x", "y", "z"]), TEXTS) == expected
    assert refusal(written(tmp_path / "b.csv", ""), TEXTS) == "begins with no header. Its first line must be like text"
    assert refusal(written(tmp_path / "c.csv", "text\n"), TEXTS) == "has no usable rows (0 dropped)"
    found = survey(find_source("data.unlabelled", str(tmp_path / "a.csv")), TEXTS, max_dropped=0.5)
    assert (found.rows, found.unlabelled, found.dropped) == (0, 2, {"empty text": 1})


def test_empty_labels_are_kept_when_that_is_asked_for(tmp_path: Path):
    path = written(tmp_path / "a.csv", "text,label\na,x\nb,\nc, \nd,y\n,x\n")
    keeping = replace(COLUMNS, keep_unlabelled=True)
    assert read(path, keeping) == [("a", "x"), ("b", None), ("c", None), ("d", "y"), ("empty text", "dropped")]
    found = survey(find_source("data.train", str(path)), keeping, max_dropped=0.2)
    assert (found.labels, found.unlabelled, sum(found.dropped.values())) == ({"x": 1, "y": 1}, 2, 1)
    with pytest.raises(UserError, match="1 of 5 rows cannot be used"):
        survey(find_source("data.train", str(path)), keeping, max_dropped=0.19)
    alone = written(tmp_path / "b.csv", "text,label\na,\nb,\n")
    assert refusal(alone, keeping) == "has no usable rows (0 dropped, 2 without a label)"


def test_several_places_are_one_source_in_their_order(tmp_path: Path):
    for name in "cab":
        written(tmp_path / f"{name}.csv", f"text\n{name}\n")
    places = tuple(str(tmp_path / name) for name in ("c.csv", "[ab].csv"))
    source = find_sources("data.unlabelled", places)
    assert [(row.text, row.file) for row in read_rows(source, TEXTS) if isinstance(row, Row)] == [
        ("c", 0), ("a", 1), ("b", 2),
    ]  # fmt: skip
    assert source.identity() == [hashlib.sha256(f"text\n{name}\n".encode()).hexdigest() for name in "cab"]
    assert find_sources("data.unlabelled", places[::-1]).identity() != source.identity()


# The draw of validation rows.


def drawn(labels: list[str], share: float, seed: int) -> list[bool]:
    draw = ValidationDraw(Counter(labels), share, seed)
    return [draw.takes(label) for label in labels]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=200), st.floats(0.001, 0.499), st.integers(0, 2**32 - 1))
def test_the_draw_takes_an_exact_share_of_every_label(labels: list[str], share: float, seed: int):
    taken = drawn(labels, share, seed)
    for label, count in Counter(labels).items():
        found = sum(1 for other, take in zip(labels, taken, strict=True) if take and other == label)
        assert found == int(count * share + 0.5)  # rounded half up
        assert abs(found - count * share) <= 0.5
        assert found < count
    assert taken == drawn(labels, share, seed)
    assert ValidationDraw(Counter(labels), share, seed).rows == {
        label: sum(t for t, other in zip(taken, labels, strict=True) if other == label) for label in set(labels)
    }


def test_the_draw_differs_by_seed_and_a_label_s_draw_does_not_depend_on_the_others():
    labels = ["a", "b"] * 500
    assert len({tuple(drawn(labels, 0.1, seed)) for seed in range(10)}) == 10
    alone = drawn(["a"] * 500, 0.1, 3)
    assert [take for take, label in zip(drawn(labels, 0.1, 3), labels, strict=True) if label == "a"] == alone


def test_the_draw_favours_no_place():
    # 2000 draws of 2 from 10: each place is taken 400 times on average, with a standard deviation of 18.
    counts = Counter(place for seed in range(2000) for place, take in enumerate(drawn(["a"] * 10, 0.2, seed)) if take)
    assert all(abs(counts[place] - 400) < 5 * 18 for place in range(10))


# What stands twice.


def naive_report(rows: list[tuple[str, str, int]]) -> dict[str, int]:
    """The counts of TextIndex by comparing texts themselves."""
    by_text: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for text, split, label in rows:
        by_text[" ".join(text.casefold().split())].append((split, label))
    of = {text: Counter(split for split, _ in found) for text, found in by_text.items()}
    labels = [{label for split, label in found if split != "unlabelled"} for found in by_text.values()]
    return {
        "train_rows_repeating_another": sum(max(0, count["train"] - 1) for count in of.values()),
        "texts_with_two_labels": sum(len(found) > 1 for found in labels),
        **{
            f"{name}_rows_also_in_train": sum(count[name] for count in of.values() if count["train"])
            for name in ("validation", "test")
        },
        "unlabelled_rows_repeating_another": sum(
            count["unlabelled"] if count["train"] else max(0, count["unlabelled"] - 1) for count in of.values()
        ),
        **{
            f"unlabelled_rows_also_in_{name}": sum(count["unlabelled"] for count in of.values() if count[name])
            for name in ("validation", "test")
        },
    }


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["a", "A ", "a  b", " A\tB", "ß", "SS", "", "c"]) | st.text(max_size=3),
        st.sampled_from(SPLITS),
        st.integers(0, 3),
    ),
    max_size=40,
)


@pytest.mark.parametrize("buffer_rows", [1, 3, 1 << 16])
@given(rows=ROWS)
def test_repeated_texts_are_counted(buffer_rows: int, rows: list[tuple[str, str, int]]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "BUFFER_ROWS", buffer_rows)
        with TextIndex() as index:
            for text, split, label in rows:
                index.add(text, split, label)
            assert index.report() == naive_report(rows)


def test_many_texts_are_counted_on_disk_and_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(duplicates, "BUFFER_ROWS", 500)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    draw = random.Random(0)
    rows = [(f"text {draw.randrange(4000)}", draw.choice(SPLITS), draw.randrange(2)) for _ in range(10_000)]
    with TextIndex() as index:
        for text, split, label in rows:
            index.add(text, split, label)
        assert len(list(tmp_path.glob("*/*"))) == duplicates.BUCKETS
        found = index.report()
    assert found == naive_report(rows)
    assert min(found.values()) > 0
    assert not list(tmp_path.iterdir())
