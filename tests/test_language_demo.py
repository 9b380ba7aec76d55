"""The demo of language models: what it writes, and that its stories are consistent."""

import re
from pathlib import Path

import pytest

from raydistill.cli import _main
from raydistill.demo_language import language_demo_config
from raydistill.record.store import sha256_file
from raydistill.stories import NAMES, NUMBERS, stories


def files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def test_the_demo_writes_the_same_input_each_time(tmp_path: Path):
    config = language_demo_config(tmp_path / "one", train=40, test=5)
    assert config.task == "causal_lm"
    assert config.teacher.fine_tune is not None
    written = files(tmp_path / "one")
    language_demo_config(tmp_path / "one", train=40, test=5)
    assert files(tmp_path / "one") == written
    language_demo_config(tmp_path / "two", train=40, test=5)
    assert files(tmp_path / "two") == written


def test_an_unknown_demo_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]):
    assert _main(["demo", "--task", "vision"]) == 2
    assert "--task: found 'vision'; it takes one of classification, causal_lm" in capsys.readouterr().err


def test_stories_are_the_same_each_time():
    first = list(stories(30))
    assert first == list(stories(30))
    assert first[:10] == list(stories(10))
    assert len(set(first)) == 30


def test_what_stories_say_of_counts_and_places_follows_from_what_happened():
    numbers, asked = {word: number for number, word in enumerate(NUMBERS)}, 0
    for story in stories(60):
        counts: dict[str, int] = {}
        places: dict[str, str] = {}
        for name, place, number in re.findall(r"(\w+) is at the (\w+) with a \w+ \w+ and (\w+) ", story)[:2]:
            counts[name], places[name] = numbers[number], place
        for sentence in re.split(r"(?<=[.?]) ", story)[2:]:
            if found := re.match(r"(\w+) goes to the (\w+)\.", sentence):
                places[found[1]] = found[2]
            elif found := re.match(r"There \w+ (?:buys|finds) (\w+) \w+: (\w+) has", sentence):
                counts[found[2]] += numbers[found[1]]
            elif found := re.match(r"(\w+) gives (\w+) \w+ to (\w+)\.", sentence):
                counts[found[1]] -= numbers[found[2]]
                counts[found[3]] += numbers[found[2]]
            elif found := re.match(r"Now (\w+) has (\w+) ", sentence):
                assert counts[found[1]] == numbers[found[2]], story
                asked += 1
            elif found := re.match(r"Where is (\w+)\?", sentence):
                assert f"{found[1]}? {NAMES[found[1]].capitalize()} is at the" in story
    assert asked > 50
