"""Settings from YAML and the command line: what is taken, what is refused, and that a refusal tells the way out."""

import re
import textwrap
import types
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from raydistill.config.file import MAX_BYTES, load_config, scalar, to_yaml, validate
from raydistill.config.loss import LOSS_PARAMETERS, WITHOUT_TEMPERATURE, Features, Loss
from raydistill.config.run import Config
from raydistill.config.section import PLAIN_NAME, Added, Section, identity
from raydistill.errors import UserError

BASE = """\
name: first
data:
  train: train.csv
  test: test.csv
teacher:
  model: owner/teacher
"""
SECRETS = {
    "a hub token": "hf_" + "a1B2" * 6,
    "an API key": "sk-" + "a1B2" * 6,
    "a cloud key": "AKIA" + "A1B2" * 4,
    "a forge's token": "ghp_" + "a1B2" * 6,
    "a hexadecimal key": "0123456789" * 4,
    "a password in a URL": "s3://me:word@bucket/runs",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "c.yaml"


def load(file: Path, text: str | bytes = BASE, *overrides: str) -> Config:
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return load_config(file, list(overrides))


def message_of(file: Path, text: str | bytes = BASE, *overrides: str) -> str | None:
    """The one line of the refusal, with the file's path shortened to its name; None when the settings are taken."""
    try:
        load(file, text, *overrides)
    except UserError as error:
        message = str(error)
    else:
        return None
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
    return message.replace(str(file), file.name)


def refusal(file: Path, text: str | bytes = BASE, *overrides: str) -> str:
    message = message_of(file, text, *overrides)
    assert message is not None
    return message


def models_of(annotation: typing.Any) -> list[type[BaseModel]]:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def sections(model: type[BaseModel] = Config, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], typing.Any]]:
    """Every section of the configuration with its path."""
    found: list[tuple[tuple[str, ...], typing.Any]] = [(path, model)]
    for name, field in model.model_fields.items():
        for inner in models_of(field.annotation):
            found += sections(inner, (*path, name))
    return found


# What is taken.


def test_a_short_file_gets_the_defaults(file: Path):
    config = load(file)
    assert (config.name, config.task, config.student.init) == ("first", "classification", "teacher_layers")
    assert (config.train.loss.temperature, config.train.loss.alpha) == (4.0, 0.9)
    assert config.teacher.fine_tune is None


def test_a_stage_may_say_yes_to_what_is_optional():
    # The check that true is no number took `true` for one where a setting may also be absent.
    tree = {
        "name": "a", "data": {"train": "a.csv", "test": "b.csv"}, "teacher": {"model": "t"},
        "train": {"stages": [{"name": "one", "group_by_length": True}]},
    }  # fmt: skip
    found = validate(tree, {}, "test").train.stages
    assert found is not None
    assert found[0].group_by_length is True


def merged(tree: typing.Any, more: typing.Any) -> typing.Any:
    """Sections joined, at every level; anything else replaced."""
    if not isinstance(tree, dict) or not isinstance(more, dict) or "init" in more:  # another student altogether
        return more
    return tree | {name: merged(tree[name], value) if name in tree else value for name, value in more.items()}


def test_the_configs_of_readme_and_guide_are_taken(file: Path):
    """The first and those with a name are whole ones, the others say what to add to the first."""
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *sorted(root.glob("docs/*.md"))]
    texts = "\n".join(page.read_text() for page in pages)
    blocks = [textwrap.dedent(block) for block in re.findall(r"^ *```yaml\n(.*?)^ *```$", texts, re.M | re.S)]
    whole, *additions = map(yaml.safe_load, blocks)
    trees = [whole, *(one if "name" in one else merged(whole, one) for one in additions)]
    configs = [load(file, block) for block in (blocks[0], *map(yaml.safe_dump, trees))]
    assert [config.task for config in configs if config.teacher.fine_tune is None] == ["causal_lm"]
    assert configs[0].student.layers == (1, 3, 5)
    features = [[feature.kind for feature in config.train.loss.features] for config in configs]
    assert ["hidden_mse", "value_relation"] in features


def test_overrides_set_numbers_lists_text_sections_and_nothing(file: Path):
    text = BASE + "train: {patience: 3, loss: {alpha: 0.1}}\n"
    config = load(
        file,
        text,
        "train.loss.alpha=0.5",
        "train.patience=null",
        "student.layers=[0, 2]",
        "teacher.fine_tune={epochs: 2}",
        "data.text=a=b",
        "data.delimiter=;",
        "train.learning_rate=1e-3",
        "evaluate.control=false",
        "name=second",
        "name=third",
    )
    assert config.train.loss.alpha == 0.5
    assert config.train.patience is None
    assert config.student.layers == (0, 2)
    assert config.teacher.fine_tune is not None
    assert config.teacher.fine_tune.epochs == 2
    assert (config.data.text, config.data.delimiter) == ("a=b", ";")
    assert config.train.learning_rate == 0.001
    assert config.evaluate.control is False
    assert config.name == "third"


def test_local_paths_become_absolute_and_hub_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "folder").mkdir()
    text = "name: a\nstorage: ~/runs\ndata: {train: 'x/*.csv', test: s3://b/t.csv, validation: v.csv}\n"
    config = load(tmp_path / "c.yaml", text + "teacher: {model: folder, cache_from: runs/b}\n")
    assert config.storage == "/home/me/runs"
    assert config.data.train == f"{tmp_path}/x/*.csv"
    assert config.data.test == "s3://b/t.csv"
    assert config.data.validation == f"{tmp_path}/v.csv"
    assert config.teacher.model == f"{tmp_path}/folder"
    assert config.teacher.cache_from == f"{tmp_path}/runs/b"
    assert load(tmp_path / "c.yaml").teacher.model == "owner/teacher"
    # A model below the home folder was once looked for in ./~.
    assert load(tmp_path / "c.yaml", BASE, "teacher.model=~/bert").teacher.model == "/home/me/bert"


def test_a_working_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the working folder is gone" in refusal(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), (".5", 0.5), ("-1.", -1.0), ("+3", 3), ("007", 7), ("-12", -12),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None), ("-.inf", float("-inf")),
        # Words and numbers of YAML 1.1 that are plain text in 1.2.
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("1_000", "1_000"), ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"), ("0b1", "0b1"), ("1e", "1e"), ("٣", "٣"), ("nan", "nan"), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object):
    found = scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_quoted_numbers_are_text_and_a_byte_order_mark_and_windows_lines_are_taken(file: Path):
    assert load(file, BASE.replace("first", "'5'")).name == "5"
    assert load(file, "\ufeff" + BASE.replace("\n", "\r\n")) == load(file)


# What is written reads back.

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=150)
WORDS = st.sampled_from(
    ["1e3", ".5e3", "0x1F", "no", "null", "~", "[a]", "'", "#c", "a: b", "- a", "\x85", "\u2028", "é "]
)


@given(
    text=TEXT | WORDS,
    name=st.from_regex(PLAIN_NAME, fullmatch=True),
    rate=st.floats(1e-300, 10),
    share=st.floats(1e-12, 0.49),
    seed=st.integers(0, 2**32 - 1),
    layers=st.sets(st.integers(0, 99), min_size=1, max_size=5),
)
@example(text="1e3", name="1e5", rate=1e-5, share=0.1, seed=0, layers={0})
@settings(max_examples=150)
def test_what_is_written_loads_to_the_same(
    file: Path, text: str, name: str, rate: float, share: float, seed: int, layers: set[int]
):
    # PyYAML alone leaves 1e3 unquoted, as YAML 1.1 has no such number, and it came back as 1000.0.
    assume(
        text != "label" and name.upper() not in ("CON", "PRN", "AUX", "NUL") and not re.fullmatch("[0-9a-f]{40}", name)
    )
    tree = {
        "name": name,
        "data": {"train": f"/a/{text}", "test": "s3://b/t.csv", "text": text, "validation": share, "split_seed": seed},
        "teacher": {"model": "./x", "fine_tune": {}},
        "student": {"layers": sorted(layers)},
        "train": {"learning_rate": rate, "deepspeed": {"zero_stage": 2}},
    }
    config = validate(tree, {}, "test")
    assert load(file, to_yaml(config)) == config


# What is refused, and how it is said.

NO_TAG = "is not taken. Write a plain value, or quote its !"
NO_ANCHOR = "anchors and aliases are not taken. Write the value out, or quote its * or &"
NO_YAML = "Check indentation (no tabs), and quote text that begins with a sign such as * or &"


@pytest.mark.parametrize(
    ("lines", "where", "what"),
    [
        ("trian: {}", "7: trian", "unknown setting. Did you mean train?"),
        ("train: {loss: {temprature: 2}}", "7: train.loss.temprature", "unknown setting. Did you mean temperature?"),
        ("teacher.fine_tune: 1", "7: teacher.fine_tune", "unknown setting. Did you mean teacher?"),
        ("cluster: {zz: 2}", "7: cluster.zz", "unknown setting. Known here: address, cpus."),
        ("train:\n  epochs: fast", "8: train.epochs",
         "found 'fast' (text); it should be a valid integer, unable to parse string as an integer"),
        ("train:\n  epochs: 0", "8: train.epochs", "found 0 (number); it should be greater than or equal to 1"),
        # pydantic takes true for 1.
        ("train: {epochs: true}", "7: train.epochs",
         "found true (true/false); true and false do not fit here; write a number or a word"),
        ("train: {epochs: 1.5}", "7: train.epochs",
         "found 1.5 (number); it should be a valid integer, got a number with a fractional part"),
        ("train:", "7: train", "found nothing; it should be a section of settings"),
        ("evaluate: {control: 2}", "7: evaluate.control", "found 2 (number); it should be true or false"),
        ("name: again", "7: name", "stands twice. Remove one"),
        ("train: {loss: {alpha: 0, alpha: 1}}", "7: train.loss.alpha", "stands twice. Remove one"),
        ("? [a, b]\n: c", "7: the file", "has a list or a section as a name. Write name: value"),
        ("student: &here {}", "7", NO_ANCHOR),
        ("<<: *here", "7", NO_ANCHOR),
        ("storage: !!str 5", "7", f"the tag 'tag:yaml.org,2002:str' {NO_TAG}"),
        ("student: !!python/object/apply:os.system [true]", "7",
         f"the tag 'tag:yaml.org,2002:python/object/apply:os.system' {NO_TAG}"),
        ("train:\n\tepochs: 1", "8",
         f"not YAML: found character '\\t' that cannot start any token at column 1. {NO_YAML}"),
        ("---\na: 1", "7", f"not YAML: but found another document at column 1. {NO_YAML}"),
        # Rules across fields.
        ("train: {deepspeed: {offload_optimizer: true}}", "7: train.deepspeed",
         "offload_optimizer needs zero_stage 1, 2 or 3"),
        ("train: {workers: 4, batch_size: 6, accumulation: 2}", "7: train",
         "batch_size 6 is global and must be at least workers x accumulation = 8"),
        ("student: {init: pretrained}", "7: student", "init: pretrained needs model"),
        ("student: {init: config, hidden_size: 64}", "7: student", "init: config needs num_layers"),
        ("student: {hidden_size: 64}", "7: student", "hidden_size means nothing with init: teacher_layers; remove it"),
        ("student: {model_type: gpt2}", "7: student", "model_type means nothing with init: teacher_layers; remove it"),
        ("student: {layers: uniform}", "7: student", "layers: uniform needs num_layers, how many of the teacher's"),
        ("student: {num_layers: 2}", "7: student",
         "num_layers needs layers: first, last, uniform; or list the layers"),
        ("student: {layers: [0, 1], num_layers: 2}", "7: student",
         "num_layers needs layers: first, last, uniform; or list the layers"),
        ("student: {init: config, hidden_size: 64, num_layers: 1, importance: taylor}", "7: student",
         "importance means nothing with init: config; remove it"),
        ("student: {init: pretrained, model: small, feed_forward: 8}", "7: student",
         "feed_forward means nothing with init: pretrained; remove it"),
        ("student: {importance: magnitude}", "7: student",
         "importance means nothing without num_heads or feed_forward; remove it"),
        ("student: {importance_rows: 9}", "7: student",
         "importance_rows means nothing without num_heads or feed_forward; remove it"),
        ("student: {num_heads: 2, importance: magnitude, importance_rows: 9}", "7: student",
         "importance_rows means nothing with importance: magnitude; remove it"),
        ("student: {layers: [2, 1]}", "7: student", "layers must be rising numbers from 0, found [2, 1]"),
        ("student: {layers: []}", "7: student", "layers must be rising numbers from 0, found []"),
        ("student: {layers: [-1, 0]}", "7: student", "layers must be rising numbers from 0, found [-1, 0]"),
        ("student: {init: config, hidden_size: 100, num_layers: 1, num_heads: 3}", "7: student",
         "hidden_size 100 must be a multiple of num_heads 3"),
        # 200 // 64 = 3 heads: this came to light only when the student was built, after the teacher had run.
        ("student: {init: config, hidden_size: 200, num_layers: 1}", "7: student",
         "hidden_size 200 must be a multiple of hidden_size // 64 heads; set num_heads"),
    ],
)  # fmt: skip
def test_messages_for_lines(file: Path, lines: str, where: str, what: str):
    assert refusal(file, f"{BASE}{lines}\n") == f"c.yaml:{where}: {what}"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("data.str=1", "unknown setting. Did you mean test?"),
        ("train.loss.alpha=1.5", "found 1.5 (number); it should be less than or equal to 1"),
        ("train.loss.temperature=0", "found 0 (number); it should be greater than 0"),
        ("train.loss.temperature=.nan", "found nan (number); it should be a finite number"),
        ("train.clip=.inf", "found inf (number); it should be a finite number"),
        ("train.clip=1e999", "found inf (number); it should be a finite number"),
        ("train.seed=4294967296", "found 4294967296 (number); it should be less than or equal to 4294967295"),
        ("data.validation=0.5", "found 0.5 (number); a share must be above 0 and below 0.5; or give a path"),
        ("data.validation=[1]", "found [1] (list); it should be a finite number or text"),
        ("data.text=5", "found 5 (number); it should be text"),
        ("data.text=", "found nothing; it should be text"),
        ("data.train=''", "found '' (text); it should have at least 1 character"),
        ("train.schedule=cosinus", "found 'cosinus' (text); it should be 'cosine', 'linear' or 'constant'"),
        ("student.layers=3", "found 3 (number); it should be a list of whole numbers, or first, last, uniform"),
        ("student.layers=frist", "found 'frist' (text); it should be a list of whole numbers, or first, last, uniform"),
        ("student.layers=[a]", "found ['a'] (list); it should be a list of whole numbers, or first, last, uniform"),
        ("name=a/b", "found 'a/b' (text); a run name is a plain name of letters, digits, '.', '_' and '-', at most 64,"
         " no path"),
        ("name.first=a", "name is a single value, not a section"),
        ('data.delimiter="\\n"', "found '\\n' (text); a delimiter is neither a quote (\") nor an end of line;"
         " use a sign such as , or ;"),
        ('storage="a\\0b"', "holds a NUL character. Remove it"),
    ],
)  # fmt: skip
def test_messages_for_overrides(file: Path, override: str, what: str):
    assert refusal(file, BASE, override) == f"command line: {override.partition('=')[0]}: {what}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "command line: 'epochs' is not an override. Write section.key=value"),
        ("data..text=a", "command line: 'data..text=a' is not an override. Write section.key=value"),
        ("data.label=text", "c.yaml:2: data: text and label name the same column, 'text'; the label needs its own"),
        ("teacher.fine_tune.metric=kl", "c.yaml:5: teacher.fine_tune: metric kl compares with a teacher and a teacher"
         " has none; use accuracy"),
        ("data.train=*.csv", "command line: data.train:1: not YAML: expected alphabetic or numeric character, but found"
         f" '.' at column 2. {NO_YAML}"),
    ],
)  # fmt: skip
def test_messages_for_other_overrides(file: Path, override: str, message: str):
    assert refusal(file, BASE, override) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml: the file is empty. Write at least name, data and teacher"),
        (" \n\n", "c.yaml: the file is empty. Write at least name, data and teacher"),
        ("# nothing\n", "c.yaml:1: the file holds nothing, expected settings such as `name: first`"),
        ("- a\n- b\n", "c.yaml:1: the file holds ['a', 'b'] (list), expected settings such as `name: first`"),
        ("5\n", "c.yaml:1: the file holds 5 (number), expected settings such as `name: first`"),
        ("name: first\n", "c.yaml:1: data: is missing. Add it"),
        (BASE.replace("  test: test.csv\n", ""), "c.yaml:2: data.test: is missing. Add it"),
        (b"name: \xff\n", "c.yaml: is not UTF-8 at byte 6. Save it as UTF-8"),
        ("x: " + "y" * MAX_BYTES, f"c.yaml: the file has more than {MAX_BYTES} bytes. Give the path of a YAML config"),
        (b"\xff" * (MAX_BYTES + 2), "c.yaml: is not UTF-8 at byte 0. Save it as UTF-8"),
        ("a: " + "[" * 33 + "]" * 33, "c.yaml:1: nested deeper than 32 levels. No setting is that deep"),
        # 10,000 open brackets took PyYAML minutes before the depth was looked at.
        ("[" * 100_000, "c.yaml:1: nested deeper than 32 levels. No setting is that deep"),
        ("a: [" + "b, " * 10_000 + "]", "c.yaml:1: more than 10000 values. No config needs as many"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
         f"c.yaml:1: {NO_ANCHOR}"),
    ],
)  # fmt: skip
def test_messages_for_whole_files(file: Path, text: str | bytes, message: str):
    assert refusal(file, text) == message


def test_messages_for_files_that_are_not_there(tmp_path: Path):
    for path, message in {
        tmp_path / "no.yaml": "no such file. Give the path of a YAML config",
        tmp_path: "is a folder. Give the path of a YAML config in it",
        tmp_path / ("x" * 300): "cannot be read (File name too long). Check its permissions",
    }.items():
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert str(caught.value) == f"{path}: {message}"


def test_an_endless_file_is_not_read_to_its_end():
    with pytest.raises(UserError, match="more than 1048576 bytes"):
        load_config("/dev/zero")


BAD_NAMES = [
    "", ".", "..", ".a", "a.", "-a", "a/b", "/abs", "a\\b", "a b", "a\n", "CON", "nul", "é", "😀", "x" * 65, "x" * 300,
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_run_names_that_are_refused(file: Path, name: str):
    tree = {"name": name, "data": {"train": "a", "test": "b"}, "teacher": {"model": "m"}}
    message = refusal(file, yaml.safe_dump(tree, sort_keys=False))
    assert re.match(r"c\.yaml:1: name: found .*; a run name is a plain name", message)


@pytest.mark.parametrize("name", ["a", "7", "A.b_c-1", "x" * 64, "a-", "constant"])
def test_run_names_that_are_taken(file: Path, name: str):
    assert load(file, BASE.replace("first", f"'{name}'")).name == name


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS.keys())
@pytest.mark.parametrize("where", ["storage={}", "train.epochs={}", "student.layers=[{}]", "teacher.token={}"])
def test_secrets_are_refused_without_being_shown(file: Path, where: str, secret: str):
    message = refusal(file, BASE, where.format(f"'{secret}'"))
    field = where.partition("=")[0]
    assert re.fullmatch(
        rf"command line: {field}(\.0)?: looks like a secret\. Keep it in an environment variable", message
    )


def test_a_revision_and_a_hub_configuration_are_no_secrets(file: Path):
    assert load(file, BASE, f"teacher.revision='{'0123456789' * 4}'").teacher.revision == "0123456789" * 4
    assert load(file, BASE, "data.train=hf://squad:plain_text@train").data.train == "hf://squad:plain_text@train"


def test_half_a_character(file: Path):
    assert "unable to parse raw data as a unicode string" in refusal(file, BASE, 'data.text="\\ud800"')


# A name with one wrong character never passes.

FIELDS = [(path, name) for path, model in sections() for name in model.model_fields]


@st.composite
def typos(draw: st.DrawFn) -> tuple[tuple[str, ...], str, str]:
    path, name = draw(st.sampled_from(FIELDS))
    place = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_-0E "))
    kind = draw(st.sampled_from(["drop", "add", "replace", "double", "swap"]))
    wrong = {
        "drop": name[:place] + name[place + 1 :],
        "add": name[:place] + letter + name[place:],
        "replace": name[:place] + letter + name[place + 1 :],
        "double": name[:place] + name[place] + name[place:],
        "swap": name[:place] + name[place : place + 2][::-1] + name[place + 2 :],
    }[kind]
    known = {other for section, other in FIELDS if section == path}
    assume(wrong.strip() and wrong not in known)
    return path, name, wrong


@given(typos(), st.booleans())
@settings(max_examples=250)
def test_one_wrong_character_in_a_name_is_refused(file: Path, typo: tuple[tuple[str, ...], str, str], replaces: bool):
    path, name, wrong = typo
    tree = yaml.safe_load(BASE)
    place = tree
    for part in path:
        place = place.setdefault(part, {})
    value = place.pop(name, 1) if replaces else 1
    place[wrong] = value
    message = refusal(file, yaml.safe_dump(tree))
    field = ".".join((*path, wrong))
    hint = re.fullmatch(
        rf"c\.yaml:\d+: {re.escape(field)}: unknown setting\. (Did you mean (\w+)\?|Known here: .*)", message
    )
    assert hint
    assert (hint[2] or name) in {other for section, other in FIELDS if section == path}
    assert hint[2] or len(name) < 5


# Whatever the file holds, nothing but a UserError comes out.

PIECES = [
    *BASE.splitlines(keepends=True), *re.findall(r"\w+", BASE), "\n", "  ", "\t", ": ", "- ", "[", "]", "{", "}", ",",
    "&a ", "*a", "!!python/none ", "!x ", "%YAML 1.1\n", "%YAML 99999999999\n", "---\n", "...\n", "? ", "| ", "> ",
    "'", '"', '"\\UFFFFFFFF"', '"\\ud800"', "#", "<<: ", "=", "1e999", "9" * 5000, ".nan", "null", "~", "\0", "\x85",
    "\u2028", "\ufeff", "\ud800", "train:\n  ", "epochs: ", "loss: ", "student: ", "layers: [1, 2]\n", "init: config\n",
]  # fmt: skip
NAMES = [".".join((*path, name)) for path, name in FIELDS]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(max_size=60) | st.binary(max_size=60))
@example(f'{BASE}"a\nb": 1')  # an unknown name with an end of line once made two lines of the message
@example(f"{BASE}storage: {'9' * 5000}")  # more digits than Python turns into a number
@example('a: "\\UFFFFFFFF"')
@example(f"%YAML {'9' * 5000}.1\n---\n{BASE}")
@settings(max_examples=300)
def test_any_file_is_taken_or_refused_in_one_line(file: Path, content: str | bytes):
    message_of(file, content)


@given(st.text(max_size=40) | st.builds("{}={}".format, st.sampled_from(NAMES), st.text(max_size=20)))
@settings(max_examples=200)
def test_any_override_is_taken_or_refused_in_one_line(file: Path, override: str):
    message_of(file, BASE, override)


@given(st.sampled_from(FIELDS), VALUES)
@settings(max_examples=200)
def test_any_value_of_a_setting_is_taken_or_refused_in_one_line(
    file: Path, field: tuple[tuple[str, ...], str], value: object
):
    path, name = field
    tree = yaml.safe_load(BASE)
    place = tree
    for part in path:
        place = place.setdefault(part, {})
    place[name] = value
    message = message_of(file, yaml.safe_dump(tree, allow_unicode=True))
    assert message is None or path == () or path[0] in message


# The definitions themselves.

SPEED = {
    "accumulation", "gradient_checkpointing", "checkpoint_every", "log_every", "workers", "cpus_per_worker",
    "max_failures", "deepspeed", "actors", "cpus_per_actor", "tokens_per_batch", "cluster", "seeds",
}  # fmt: skip


def added(model: type[BaseModel]) -> set[str]:
    """What came after runs were made: at its default it is no part of the identity."""
    return {name for name, field in model.model_fields.items() if (field.json_schema_extra or {}).get("added")}  # type: ignore[union-attr]


def test_what_changes_speed_alone_stays_out_of_the_identity(file: Path):
    config = load(file, BASE, "teacher.fine_tune={}")
    found = identity(config)
    assert set(found) == set(Config.model_fields) - {"cluster"}
    for name, section in {"train": config.train, "teacher": config.teacher, "data": config.data}.items():
        assert set(identity(section)) == set(type(section).model_fields) - SPEED - added(type(section))
        assert set(found[name]) == set(type(section).model_fields) - SPEED - added(type(section))
    assert found["teacher"]["fine_tune"]["epochs"] == 4
    assert "workers" not in found["teacher"]["fine_tune"]
    assert set(identity(config, skip=("name", "storage"))) == set(found) - {"name", "storage"}
    assert identity(load(file, BASE, "student.layers=[0, 1]").student)["layers"] == [0, 1]


def test_the_identity_follows_what_determines_a_result_and_nothing_else(file: Path):
    base = identity(load(file).train)
    for override in ("workers=2", "accumulation=2", "log_every=3", "deepspeed.zero_stage=3", "checkpoint_every=5"):
        assert identity(load(file, BASE, f"train.{override}").train) == base
    for override in ("epochs=3", "batch_size=64", "seed=1", "loss.alpha=0", "precision=bf16", "schedule=linear"):
        assert identity(load(file, BASE, f"train.{override}").train) != base


def test_a_setting_that_came_later_changes_no_fingerprint_until_it_is_used():
    class Before(Section):
        epochs: int = 1

    class Now(Before):
        again: tuple[int, ...] | None = Added(None)

    assert identity(Now()) == identity(Before()) == {"epochs": 1}
    assert identity(Now(again=(2, 3))) == {"epochs": 1, "again": [2, 3]}


def test_settings_cannot_be_changed_and_take_no_unknown_names(file: Path):
    config = load(file)
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3  # type: ignore[misc]
    for _, model in sections():
        assert issubclass(model, Section)
        assert model.model_config["extra"] == "forbid"


def test_every_number_has_bounds_and_every_default_is_within_them():
    for path, model in sections():
        for name, field in model.model_fields.items():
            kinds = typing.get_args(field.annotation) or (field.annotation,)
            if (int in kinds or float in kinds) and name not in ("layers", "validation", "zero_stage"):
                assert field.metadata, f"{'.'.join((*path, name))} has no bounds"


def test_the_losses_of_the_config_are_those_of_the_registry():
    """The config stands above the losses and imports no torch, so it says their names and bounds again."""
    from raydistill.losses.registry import RESPONSE_LOSSES

    single_label = {kind: loss for kind, loss in RESPONSE_LOSSES.items() if not loss.multi_label}
    fields = Loss.model_fields
    assert typing.get_args(fields["kind"].annotation) == tuple(single_label)
    assert tuple(k for k, loss in single_label.items() if not loss.uses_temperature) == WITHOUT_TEMPERATURE
    found = {(kind, name) for kind, loss in single_label.items() for name in loss.parameters}
    assert found == {(kind, name) for name, kinds in LOSS_PARAMETERS.items() for kind in kinds}
    for kind, name in found:
        parameter = single_label[kind].parameters[name]
        bounds = {type(b).__name__: getattr(b, type(b).__name__.lower()) for b in fields[name].metadata}
        assert bounds["Ge"] == parameter.minimum
        assert bounds["Lt" if parameter.open_maximum else "Le"] == parameter.maximum
        assert f"absent: {parameter.default:g}" in str(fields[name].description)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("{beta: 0.5}", "beta means nothing with kind: forward_kl; remove it"),
        ("{kind: dkd, skew: 0.1}", "skew means nothing with kind: dkd; remove it"),
        ("{kind: logit_mse, temperature: 2}", "temperature means nothing with kind: logit_mse; remove it"),
        ("{kind: skew_forward_kl, skew: 1}", "train.loss.skew"),
        ("{kind: logit_mse, temperature_end: 2}", "temperature_end means nothing with kind: logit_mse; remove it"),
        ("{course: cosine}", "course means nothing without temperature_end or alpha_end; remove it"),
        ("{temperature_end: 0}", "train.loss.temperature_end: found 0 (number); it should be greater than 0"),
        ("{alpha_end: 1.5}", "train.loss.alpha_end: found 1.5 (number); it should be less than or equal to 1"),
        ("{alpha_end: 0.5, course: step}", "train.loss.course"),
        ("{kind: revers_kl}", "reverse_kl"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(file: Path, loss: str, message: str):
    file.write_text(f"{BASE}train: {{loss: {loss}}}\n")
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(file)


def test_the_feature_losses_of_the_config_are_those_of_the_objective():
    from raydistill.losses.feature_objective import FEATURE_LOSSES

    assert typing.get_args(Features.model_fields["kind"].annotation) == tuple(FEATURE_LOSSES)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("[{kind: hidden_mse, relation_heads: 2}]", "relation_heads means nothing with kind: hidden_mse; remove it"),
        ("[{kind: embeddings_mse, layers: last}]", "layers means nothing with kind: embeddings_mse; remove it"),
        ("[{kind: hidden_msr}]", "hidden_mse"),
        ("[{kind: hidden_mse, weight: 0}]", "train.loss.features.0.weight"),
        # Before the mend, an unknown name in an entry of a list ended in StopIteration.
        ("[{kind: hidden_mse, wieght: 1}]", "train.loss.features.0.wieght: unknown setting. Did you mean weight?"),
        ("{kind: hidden_mse}", "train.loss.features"),
    ],
)
def test_features_that_cannot_be_are_refused(file: Path, features: str, message: str):
    file.write_text(f"{BASE}train: {{loss: {{features: {features}}}}}\n")
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(file)


def test_features_stand_in_the_identity_as_plain_values(file: Path):
    file.write_text(f"{BASE}train: {{loss: {{features: [{{kind: hidden_mse, layers: [[0, 2], [1, 5]]}}]}}}}\n")
    expected = {"kind": "hidden_mse", "weight": 1.0, "layers": [[0, 2], [1, 5]], "relation_heads": None}
    assert identity(load_config(file).train)["loss"]["features"] == [expected]
