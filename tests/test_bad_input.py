"""Bad input through the real command line: exit code 2, one line that names the field or file, nothing written."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydistill import cli
from raydistill.demo import write_new_bert
from raydistill.record.lock import run_lock
from raydistill.record.store import open_store

LABELS = ["billing", "refund", "shipping"]
WORDS = "my card was charged twice for one order and the parcel never came so I want the money back please"
CONFIG = """\
name: first
storage: runs
data:
  train: train.csv
  test: test.csv
  max_length: 16
teacher:
  model: ./model
student:
  layers: [0]
"""


def write_csv(path: Path, rows: int, labels: list[str]) -> None:
    draw = random.Random(path.name)
    lines = [f"{' '.join(draw.choices(WORDS.split(), k=8))},{labels[n % len(labels)]}\n" for n in range(rows)]
    path.write_text("text,label\n" + "".join(lines))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny classifier of the three labels, which it has in another order than the data."""
    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification

    encoder, folder = (tmp_path_factory.mktemp("models") / name for name in ("encoder", "classifier"))
    write_new_bert(encoder, [WORDS] * 2, hidden_size=16, layers=2, heads=2, vocabulary=64, positions=32)
    torch.manual_seed(0)
    names = dict(enumerate(reversed(LABELS)))
    options = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    BertForSequenceClassification.from_pretrained(encoder, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a config that is right, its data and its teacher. Neither Ray nor the network is there."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("bad input must be found before Ray starts")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(classifier, tmp_path / "model")
    write_csv(tmp_path / "train.csv", 60, LABELS)
    write_csv(tmp_path / "test.csv", 30, LABELS)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content; a run's lock names its last owner and is left out."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: path.read_bytes() if path.is_file() else b"" for name, path in found.items() if path.name != ".lock"}


def refused(capsys: pytest.CaptureFixture[str], place: Path, *arguments: str) -> str:
    """The one line with which a command ends, after nothing was written."""
    before = listing(place)
    capsys.readouterr()
    assert cli._main(list(arguments)) == 2
    printed, errors = capsys.readouterr()
    assert listing(place) == before
    assert printed == ""
    assert errors.startswith("error: ")
    assert errors.endswith("\n")
    assert len(errors.splitlines()) == 1, errors
    assert len(errors) < 700
    return errors.removeprefix("error: ").rstrip("\n")


def test_the_config_that_the_cases_start_from_is_right(place: Path, capsys: pytest.CaptureFixture[str]):
    assert cli._main(["plan", "c.yaml"]) == 0
    assert "rows: 54 train, 6 validation, 30 test" in capsys.readouterr().out
    assert not (place / "runs").exists()


def test_help_and_version_say_how_to_begin(capsys: pytest.CaptureFixture[str]):
    assert cli._main([]) == 0
    assert "raydistill plan CONFIG" in capsys.readouterr().out
    assert cli._main(["--version"]) == 0
    assert capsys.readouterr().out == f"raydistill {metadata.version('raydistill')}\n"


# A case: its name, what it changes, and what the message must hold. Overrides are texts, changes of files functions.

Change = str | Callable[[Path], object]


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda place: (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def table(name: str, **columns: object) -> Callable[[Path], object]:
    return lambda place: pq.write_table(pa.table(columns), place / name)


def without(name: str) -> Callable[[Path], object]:
    return lambda place: shutil.rmtree(place / name) if (place / name).is_dir() else (place / name).unlink()


def no_tokenizer(place: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        (place / "model" / name).unlink(missing_ok=True)


def no_padding(place: Path) -> None:
    path = place / "model" / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "pad_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}))


def model_config(**changes: object) -> Callable[[Path], object]:
    """Changes config.json of the model; None removes a name."""

    def change(place: Path) -> None:
        path = place / "model" / "config.json"
        facts = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))

    return change


def only_pickled_weights(place: Path) -> None:
    os.rename(place / "model" / "model.safetensors", place / "model" / "pytorch_model.bin")


def names(*labels: str) -> Callable[[Path], object]:
    return model_config(id2label={str(number): name for number, name in enumerate(labels)})


CONFIG_CASES: list[tuple[str, list[Change], list[str]]] = [
    ("no config", [without("c.yaml")], ["c.yaml: no such file"]),
    ("empty config", [text("c.yaml", "")], ["c.yaml: the file is empty"]),
    ("config in another encoding", [text("c.yaml", "name: é".encode("latin-1"))], ["c.yaml: is not UTF-8 at byte 6"]),
    ("tab", [text("c.yaml", "data:\n\ttrain: a.csv\n")], ["c.yaml:2: not YAML", "no tabs"]),
    ("list", [text("c.yaml", "- name: first\n")], ["c.yaml:1: the file holds [{'name': 'first'}] (list)"]),
    ("unknown setting", ["data.tran=a.csv"], ["command line: data.tran: unknown setting. Did you mean train?"]),
    ("unknown setting in the file", [text("c.yaml", CONFIG + "trian: {}\n")], ["c.yaml:11: trian: unknown setting"]),
    ("unknown setting in line 100", [text("c.yaml", CONFIG + "\n" * 89 + "x: 1\n")], ["c.yaml:100: x: unknown"]),
    ("unknown setting with an end of line", [text("c.yaml", CONFIG + '"a\\nb": 1')], [r"'a\nb': unknown setting"]),
    ("setting twice", [text("c.yaml", CONFIG + "name: b\n")], ["c.yaml:11: name: stands twice"]),
    ("text for a number", ["train.epochs=fast"], ["train.epochs: found 'fast' (text)"]),
    ("list for a number", ["train.epochs=[1]"], ["train.epochs: found [1] (list)"]),
    ("number for text", ["data.text=5"], ["data.text: found 5 (number)"]),
    ("true for a number", ["train.epochs=true"], ["train.epochs: found true"]),
    ("no temperature", ["train.loss.temperature=0"], ["train.loss.temperature: found 0", "greater than 0"]),
    ("temperature below zero", ["train.loss.temperature=-1"], ["train.loss.temperature: found -1"]),
    ("temperature not a number", ["train.loss.temperature=.nan"], ["train.loss.temperature: found nan"]),
    ("endless temperature", ["train.loss.temperature=.inf"], ["train.loss.temperature: found inf"]),
    ("alpha above one", ["train.loss.alpha=1.1"], ["train.loss.alpha: found 1.1"]),
    ("no epochs", ["train.epochs=0"], ["train.epochs: found 0"]),
    ("conflicting fields", ["student.hidden_size=64"], ["student: hidden_size means nothing"]),
    ("python tag", [text("c.yaml", "name: !!python/name:os.system\n")], ["c.yaml:1: the tag", "is not taken"]),
    ("alias bomb", [text("c.yaml", "a: &a [1]\nb: &b [*a, *a]\n")], ["c.yaml:1: anchors and aliases"]),
    ("2 MiB of config", [text("c.yaml", "#" * (2 << 20))], ["c.yaml: the file has more than 1048576 bytes"]),
    ("secret", ["teacher.model=hf_" + "a1B2" * 6], ["teacher.model: looks like a secret"]),
    ("not an override", ["train.epochs"], ["'train.epochs' is not an override"]),
    ("run name with a path", ["name=../evil"], ["name: found '../evil'", "no path"]),
    ("run name that is absolute", ["name=/evil"], ["name: found '/evil'"]),
    ("run name of dots", ["name=.."], ["name: found '..'"]),
    ("long run name", [f"name={'x' * 300}"], ["name: found 'xxx"]),
    ("run name with a smile", ["name=😀"], ["name: found '😀'"]),
    ("reserved run name", ["name=CON"], ["name: found 'CON'"]),
    ("storage is a file", [text("runs", "")], ["storage: ", "runs is a file, not a folder"]),
    ("storage is below a file", [text("f", ""), "storage=f/runs"], ["storage: ", "f is a file, not a folder"]),
    ("storage of an unknown kind", ["storage=nope://a"], ["storage: nope://a"]),
    ("lender is no run", ["teacher.cache_from=model"], ["teacher.cache_from: ", "has no finished data"]),
]  # fmt: skip
DATA_CASES: list[tuple[str, list[Change], list[str]]] = [
    ("no train file", [without("train.csv")], ["data.train: ", "train.csv: no such file"]),
    ("no test file", [without("test.csv")], ["data.test: ", "test.csv: no such file"]),
    ("no validation file", ["data.validation=v.csv"], ["data.validation: ", "v.csv: no such file"]),
    ("glob of nothing", ["data.train='*.tsv'"], ["data.train: ", "*.tsv: no file matches"]),
    ("folder", ["data.train=model"], ["data.train: ", "model: the ending says no known format"]),
    ("folder named like a file", [lambda place: (place / "d.csv").mkdir(), "data.train=d.csv"],
     ["data.train: ", "d.csv: is a folder"]),
    ("fifo", [lambda place: os.mkfifo(place / "f.csv"), "data.train=f.csv"], ["f.csv: is not a plain file"]),
    ("link to itself", [lambda place: os.symlink("l.csv", place / "l.csv"), "data.train=l.csv"], ["l.csv: is not"]),
    ("unknown format", ["data.train=c.yaml"], ["data.train: ", "c.yaml: the ending", "Use .csv, .tsv, .jsonl or"]),
    ("unknown store", ["data.train=nope://a.csv"], ["data.train: nope://a.csv: cannot be listed"]),
    ("no text column", ["data.text=body"], ["train.csv: has no column 'body', it has 'text', 'label'"]),
    ("no label column", ["data.label=intent"], ["train.csv: has no column 'intent'", "data.label"]),
    ("one column for both", ["data.label=text"], ["data: text and label name the same column"]),
    ("other delimiter", ["data.delimiter=;"], ["train.csv: has no column 'text'", "data.delimiter"]),
    ("empty file", [text("train.csv", "")], ["train.csv: begins with no header"]),
    ("header alone", [text("train.csv", "text,label\n")], ["data.train: ", "train.csv: has no usable rows"]),
    ("no test rows", [text("test.csv", "text,label\n")], ["data.test: ", "test.csv: has no usable rows"]),
    ("empty texts alone", [text("train.csv", "text,label\n,a\n ,b\n")],
     ["train.csv: has no usable rows (2 dropped", "empty text"]),
    ("one row", [text("train.csv", "text,label\na,billing\n")], ["train.csv: has one class only ('billing')"]),
    ("one class", [lambda place: write_csv(place / "train.csv", 60, ["refund"])], ["has one class only ('refund')"]),
    ("no validation rows", [lambda place: write_csv(place / "train.csv", 6, LABELS)],
     ["data.validation: a share of 0.1 of 6"]),
    ("label that train has not", [lambda place: write_csv(place / "test.csv", 30, [*LABELS, "fraud"])],
     ["data.test: ", "test.csv: label 'fraud' (7 rows) is not in train"]),
    ("label of validation that train has not",
     [lambda place: write_csv(place / "v.csv", 30, ["refunds"]), "data.validation=v.csv"],
     ["data.validation: ", "v.csv: label 'refunds' (30 rows) is not in train"]),
    ("rows without labels", [text("train.csv", "text,label\n" + "a,refund\nb,\n" * 5)],
     ["train.csv: row 2: null label; 5 of 10 rows"]),
    ("ragged rows", [text("train.csv", "text,label\na,refund\nb\n")], ["row 2: malformed; 1 of 2 rows"]),
    ("open quote", [text("train.csv", 'text,label\na,refund\n"b,refund\nc,refund\n')],
     ["train.csv: row 2: malformed; 2 of 3 rows"]),
    ("long rows", ["data.max_row_bytes=20"], ["train.csv: row 1: over max_row_bytes"]),
    ("other encoding", [text("train.csv", b"text,label\n\xe9,refund\n")], ["train.csv: is not UTF-8"]),
    ("UTF-16", [text("train.csv", "text,label\n".encode("utf-16"))], ["train.csv: is not UTF-8"]),
    ("not gzip", [text("t.csv.gz", "text,label\n"), "data.train=t.csv.gz"], ["t.csv.gz: cannot be read"]),
    ("torn JSON lines", [text("t.jsonl", '{"text": "a", "label": "x"}\n{"te'), "data.train=t.jsonl"],
     ["t.jsonl: row 2: malformed; 1 of 2 rows"]),
    ("JSON array", [text("t.jsonl", '[{"text": "a"}]'), "data.train=t.jsonl"], ["t.jsonl: is a JSON array"]),
    ("JSON NaN", [text("t.jsonl", '{"text": "a", "label": NaN}'), "data.train=t.jsonl"], ["label is not a name"]),
    ("deep JSON", [text("t.jsonl", '{"a":' * 10_000), "data.train=t.jsonl"], ["t.jsonl: has no usable rows"]),
    ("fractions for labels", [table("t.parquet", text=["a"], label=[1.0]), "data.train=t.parquet"],
     ["t.parquet: has no usable rows", "label is not a name"]),
    ("numbers for texts", [table("t.parquet", text=[1], label=["x"]), "data.train=t.parquet"],
     ["t.parquet: column 'text' holds int64"]),
    ("lists for texts", [table("t.parquet", text=[["a"]], label=["x"]), "data.train=t.parquet"],
     ["t.parquet: column 'text' holds list"]),
    ("column twice", [text("train.csv", "text,label,text\na,x,b\n")], ["train.csv: has 2 columns named 'text'"]),
    ("cut Parquet", [table("t.parquet", text=["a"], label=["x"]),
                     lambda place: os.truncate(place / "t.parquet", 200), "data.train=t.parquet"],
     ["t.parquet: cannot be read"]),
    ("empty Parquet", [text("t.parquet", ""), "data.train=t.parquet"], ["t.parquet: cannot be read"]),
    ("not Parquet", [text("t.parquet", "text,label\n" * 9), "data.train=t.parquet"], ["t.parquet: cannot be read"]),
    ("files with other columns",
     [text("t1.csv", "text,label\na,x\n"), text("t2.csv", "body,label\na,x\n"), "data.train=t?.csv"],
     ["t2.csv: has no column 'text', it has 'body', 'label'"]),
    ("hub folder without data", ["data.train=hf:///nowhere"], ["data.train: hf:///nowhere: cannot be loaded"]),
]  # fmt: skip
MODEL_CASES: list[tuple[str, list[Change], list[str]]] = [
    ("no teacher", [without("model")], ["teacher.model: ", "model: no such folder"]),
    ("no hub id", ["teacher.model=not a model"], ["teacher.model: not a model: is no folder here"]),
    ("hub id out of reach", ["teacher.model=owner/model"], ["teacher.model: owner/model: is no folder here"]),
    ("teacher without config.json", [without("model/config.json")], ["teacher.model: ", "has no config.json"]),
    ("config.json cut", [text("model/config.json", '{"a": ')], ["teacher.model: ", "config.json: is not JSON"]),
    ("config.json of another kind", [text("model/config.json", "[1]")], ["teacher.model: "]),
    ("teacher without weights", [without("model/model.safetensors")],
     ["teacher.model: ", "has no safetensors weights"]),
    ("pickled weights alone", [only_pickled_weights], ["teacher.model: ", "has no safetensors weights"]),
    ("weights cut", [lambda place: os.truncate(place / "model/model.safetensors", 2000)],
     ["teacher.model: ", "safetensors"]),
    ("weights are a pointer to large files",
     [text("model/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")],
     ["teacher.model: ", "safetensors"]),
    ("weights with a header of 200 MB",
     [text("model/model.safetensors", (200 << 20).to_bytes(8, "little") + b"{}")],
     ["teacher.model: ", "safetensors"]),
    ("teacher with code of its own", [model_config(auto_map={"AutoModel": "evil.Model"})],
     ["teacher.model: ", "auto_map"]),
    ("no tokenizer", [no_tokenizer], ["teacher.model: ", "tokenizer"]),
    ("tokenizer that does not pad", [no_padding], ["teacher.model: ", "has no padding token"]),
    ("rows longer than the positions", ["data.max_length=33"], ["data.max_length: found 33", "takes at most 32"]),
    ("no label names", [model_config(id2label=None, label2id=None)],
     ["teacher.model: ", "its labels are not the data's"]),
    ("label names of the library", [names("LABEL_0", "LABEL_1", "LABEL_2")],
     ["teacher.model: ", "'LABEL_0', 'LABEL_1' …", "Set teacher.fine_tune"]),
    ("label names in another case", [names("Billing", "refund", "shipping")],
     ["teacher.model: ", "'billing' unknown to it", "'Billing' unknown to the data"]),
    ("more labels than the data", [names(*LABELS, "fraud")], ["the data have 3", "it has 4", "'fraud'", "fine_tune"]),
    ("fewer labels than the data", [names(*LABELS[:2])], ["'shipping' unknown to it", "it has 2"]),
    ("label numbers that are none", [model_config(id2label={"a": "billing"})], ["teacher.model: "]),
    ("layer that the teacher has not", ["student.layers=[0, 2]"], ["student.layers: found 2", "0 to 1"]),
    ("no student", ["student={init: pretrained, model: ./none}"], ["student.model: ", "none: no such folder"]),
    ("student without tokenizer",
     [lambda place: shutil.copytree(place / "model", place / "small"),
      lambda place: [(place / "small" / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
      "student={init: pretrained, model: ./small}"],
     ["student.model: ", "small: ", "tokenizer"]),
    ("architecture that is none", ["student={init: config, hidden_size: 8, num_layers: 1, model_type: brt}"],
     ["student.model_type: ", "'brt'"]),
    ("unknown codec", ["teacher.codec=dense-int9"], ["teacher.codec: found 'dense-int9'"]),
]  # fmt: skip
TUNED = "teacher.fine_tune={}"
TEACHER_CASES: list[tuple[str, list[Change], list[str]]] = [
    ("folds of a teacher that is not trained", ["teacher.cross_fit=5"], ["teacher: cross_fit needs fine_tune"]),
    ("one fold", [TUNED, "teacher.cross_fit=1"], ["teacher.cross_fit: found 1", "greater than or equal to 2"]),
    ("seeds of a teacher that is not trained", ["teacher.fine_tune_seeds=[0, 1]"], ["fine_tune_seeds needs fine_tune"]),
    ("one seed", [TUNED, "teacher.fine_tune_seeds=[3]"], ["must be different seeds, two at least, found [3]"]),
    ("seeds twice", [TUNED, "teacher.fine_tune_seeds=[3, 3]"], ["must be different seeds, two at least, found [3, 3]"]),
    ("a seed below zero", [TUNED, "teacher.fine_tune_seeds=[0, -1]"], ["teacher.fine_tune_seeds.1: found -1"]),
    ("a seed beside seeds", ["teacher.fine_tune={seed: 4}", "teacher.fine_tune_seeds=[0, 1]"],
     ["fine_tune.seed means nothing with fine_tune_seeds"]),
    ("no weight at all", ["teacher.weight=0", "teacher.members=[{model: b, weight: 0}]"], ["all weights are 0"]),
    ("a weight below zero", ["teacher.members=[{model: b, weight: -1}]"], ["teacher.members.0.weight: found -1"]),
    ("a weight of one teacher", ["teacher.weight=2"], ["teacher: weight means nothing without members"]),
    ("a mean of one teacher", ["teacher.combine=probabilities"], ["combine means nothing with one teacher"]),
    ("a mean of what is unknown", ["teacher.combine=votes"], ["teacher.combine: found 'votes'"]),
    ("a teacher twice", ["teacher.members=[{model: ./model}]"], ["members: ./model stands there twice"]),
    ("a member that is not there", ["teacher.members=[{model: ./none}]"],
     ["teacher.members[0].model: ", "none: no such folder"]),
    ("a member with other labels",
     [lambda place: shutil.copytree(place / "model", place / "second"), "teacher.members=[{model: ./second}]",
      lambda place: (place / "second/config.json").write_text(
          (place / "second/config.json").read_text().replace('"refund"', '"fraud"'))],
     ["teacher.members[0].model: ", "'refund' unknown to it"]),
    ("a member that takes shorter rows",
     [lambda place: write_new_bert(place / "short", [WORDS] * 2, hidden_size=16, layers=1, heads=2, vocabulary=64,
                                   positions=8),
      TUNED, "teacher.members=[{model: ./short}]"], ["data.max_length: found 16", "takes at most 8"]),
    ("features of several teachers",
     [TUNED, "teacher.fine_tune_seeds=[0, 1]", "train.loss.features=[{kind: hidden_mse}]"],
     ["train.loss.features: are those of one teacher, and this run has 2. Name it: teacher.features_of=0"]),
    ("features of a teacher that is not there", [TUNED, "teacher.fine_tune_seeds=[0, 1]", "teacher.features_of=2"],
     ["teacher: features_of: found 2, the 2 teachers are 0 to 1"]),
    ("features of one of one teacher", ["teacher.features_of=0"], ["features_of means nothing with one teacher"]),
    ("features of none", [TUNED, "teacher.fine_tune_seeds=[0, 1]", "teacher.features_of=1"],
     ["teacher.features_of: means nothing without train.loss.features"]),
    ("features of a teacher with other tokens",
     [lambda place: write_new_bert(place / "other", [WORDS[::-1]] * 2, hidden_size=16, layers=2, heads=2,
                                   vocabulary=64, positions=32),
      TUNED, "teacher.members=[{model: ./other}]", "teacher.features_of=1",
      "train.loss.features=[{kind: hidden_mse}]"],
     ["train.loss.features: ", "has another tokenizer than the teacher"]),
]  # fmt: skip


def cases() -> Iterator[Any]:
    for name, changes, parts in [*CONFIG_CASES, *DATA_CASES, *MODEL_CASES, *TEACHER_CASES]:
        yield pytest.param(changes, parts, id=name)


@pytest.mark.parametrize(("changes", "parts"), list(cases()))
def test_bad_input(place: Path, capsys: pytest.CaptureFixture[str], changes: list[Change], parts: list[str]):
    for change in changes:
        if not isinstance(change, str):
            change(place)
    message = refused(capsys, place, "run", "c.yaml", *(change for change in changes if isinstance(change, str)))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command 'fly'. See raydistill --help"),
        (["run"], "Missing argument 'CONFIG'. See raydistill --help"),
        (["run", "c.yaml", "--fast"], "No such option: --fast. See raydistill --help"),
        (["run", "c.yaml", "--redo", "cook"],
         "--redo: found 'cook'; it takes one of prepare, teach, tune, train, export, evaluate"),
        (["tune", "c.yaml"], "tune: is missing. Add it, with a space to search and a number of trials"),
        (["prepare", "c.yaml", "--redo", "train"],
         "--redo train: this command does prepare only. Use raydistill run --redo train"),
        (["status", "model"], "model: is not a run's folder (no config.yaml). Give <storage>/<name>"),
        (["verify", "nowhere"], "nowhere: is not a run's folder (no config.yaml). Give <storage>/<name>"),
        (["gc", "c.yaml"], "c.yaml: is not a run's folder (no config.yaml). Give <storage>/<name>"),
        (["demo", "--storage", "c.yaml"], "--storage: c.yaml: is a file, or below one. Give a folder"),
        # rich once printed an emoji for :100: and nothing for [b].
        (["plan", ":100:[b].yaml"], ":100:[b].yaml: no such file. Give the path of a YAML config"),
        (["plan", "a\nb.yaml"], "a b.yaml: no such file. Give the path of a YAML config"),
    ],
)  # fmt: skip
def test_commands_that_are_refused(place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    assert refused(capsys, place, *arguments) == message


@pytest.mark.parametrize("command", ["plan", "prepare", "teach", "train", "evaluate"])
def test_every_command_refuses_bad_settings_and_says_what_is_missing(
    place: Path, capsys: pytest.CaptureFixture[str], command: str
):
    assert "train.epochs: found 0" in refused(capsys, place, command, "c.yaml", "train.epochs=0")
    if command in ("teach", "train", "evaluate"):
        message = refused(capsys, place, command, "c.yaml")
        assert message == f"{place}/runs/first/data: is not complete. Run `raydistill prepare` with its config first"
    else:
        (place / "train.csv").unlink()
        assert "train.csv: no such file" in refused(capsys, place, command, "c.yaml")


# A run that stands there already.


@pytest.fixture
def prepared(place: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Path]:
    assert cli._main(["prepare", "c.yaml"]) == 0
    yield place
    assert cli._main(["verify", "runs/first"]) == 0


@pytest.mark.parametrize("command", ["prepare", "run"])
@pytest.mark.parametrize(
    ("override", "before", "after"),
    [
        ("data.split_seed=7", "0", "7"),
        ("data.validation=0.2", "0.1", "0.2"),
        ("data.shard_rows=10", "4096", "10"),
        ("data.max_row_bytes=999", "1048576", "999"),
    ],
)
def test_a_run_made_with_other_settings(
    prepared: Path, capsys: pytest.CaptureFixture[str], command: str, override: str, before: str, after: str
):
    message = refused(capsys, prepared, command, "c.yaml", override)
    field = override.partition("=")[0]
    assert f"runs/first/data: {field}: was made with {before}, now asked for {after}." in message
    assert "Take another run name, or --redo prepare" in message


@pytest.mark.parametrize("command", ["prepare", "run"])
def test_a_run_made_of_other_rows(prepared: Path, capsys: pytest.CaptureFixture[str], command: str):
    path = prepared / "test.csv"
    path.write_text(path.read_text().replace("parcel", "letter"))
    message = refused(capsys, prepared, command, "c.yaml")
    assert "runs/first/data: sources_sha256.test: was made with" in message


@pytest.mark.parametrize("command", ["prepare", "run", "gc"])
def test_a_run_in_use(prepared: Path, capsys: pytest.CaptureFixture[str], command: str):
    with run_lock(open_store(str(prepared / "runs" / "first"))):
        message = refused(capsys, prepared, command, "runs/first" if command == "gc" else "c.yaml")
    assert f"{prepared}/runs/first: is in use by process {os.getpid()} on " in message
    assert "Wait for it, end it, or take another run name" in message


def test_a_damaged_plan_and_manifest(prepared: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("plan.json", "MANIFEST.json"):
        path = prepared / "runs" / "first" / "data" / name
        content = path.read_bytes()
        path.write_bytes(content.replace(b"first", b"fIrst").replace(b"train", b"tRain", 1))
        assert f"runs/first/data/{name}: is damaged" in refused(capsys, prepared, "run", "c.yaml")
        path.write_bytes(content)


def test_a_run_whose_config_is_damaged(prepared: Path, capsys: pytest.CaptureFixture[str]):
    path = prepared / "runs" / "first" / "config.yaml"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"name:", b"nome:", 1))
    assert "first/config.yaml:1: nome: unknown setting" in refused(capsys, prepared, "status", "runs/first")
    path.write_bytes(content)


def test_labels_in_another_order_and_a_run_that_is_complete_are_fine(
    prepared: Path, capsys: pytest.CaptureFixture[str]
):
    assert json.loads((prepared / "model" / "config.json").read_text())["id2label"]["0"] == "shipping"
    before = listing(prepared)
    names("LABEL_0", "LABEL_1", "LABEL_2")(prepared)
    assert cli._main(["plan", "c.yaml", "teacher.fine_tune={}"]) == 0
    names(*reversed(LABELS))(prepared)
    assert cli._main(["prepare", "c.yaml"]) == 0
    assert cli._main(["plan", "c.yaml"]) == 0
    assert "prepare: complete, 54 train" in capsys.readouterr().out
    assert listing(prepared)["runs/first/data/MANIFEST.json"] == before["runs/first/data/MANIFEST.json"]


@pytest.mark.ray
def test_more_workers_than_the_cluster_has(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.undo()
    monkeypatch.chdir(place)
    message = refused(capsys, place, "run", "c.yaml", "cluster.cpus=1", "train.workers=3")
    assert message == "train.workers: found 3, the cluster has 1 CPUs. Set at most 1"
