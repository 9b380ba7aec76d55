"""Short stories for the demo of language models, written by a seeded grammar that keeps account of what happened.

People go from place to place, buy, find and give things away. Some sentences follow from what stands far before them:
how many things someone has now, where someone is, what colour a thing had. A model that reads well knows them, one that
counts words can only guess.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NAMES = {
    "Mira": "she", "Tom": "he", "Anna": "she", "Karl": "he", "Lena": "she", "Otto": "he", "Rosa": "she", "Finn": "he",
    "Ida": "she", "Paul": "he", "Nora": "she", "Emil": "he",
}  # fmt: skip
PLACES = ("market", "harbour", "mill", "garden", "school", "bakery", "station", "forest")
COUNTED = ("apple", "coin", "button", "shell", "nail", "candle")
OWNED = ("kite", "hat", "boat", "lamp", "drum", "scarf")
COLOURS = ("red", "blue", "green", "yellow", "white", "black")
WEATHER = ("It rains all day.", "The sun is warm.", "There is fog over the fields.", "A cold wind blows.")
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@dataclass
class Person:
    """Someone in a story and what is true of them so far."""

    name: str
    place: str
    thing: str
    colour: str
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def pronoun(self) -> str:
        return NAMES[self.name]


def counted(number: int, kind: str) -> str:
    """Three apples."""
    return f"{NUMBERS[number]} {kind}{'' if number == 1 else 's'}"


class Story:
    """One story, sentence by sentence."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        draw = self._random
        places, things = draw.sample(PLACES, 2), draw.sample(OWNED, 2)
        self._people = [
            Person(name, place, thing, draw.choice(COLOURS))
            for name, place, thing in zip(draw.sample(sorted(NAMES), 2), places, things, strict=True)
        ]
        self._kind = draw.choice(COUNTED)

    def text(self, sentences: int) -> str:
        told = [self._introduced(person) for person in self._people]
        events = (self._goes, self._gets, self._gives, self._weather, self._where, self._how_many, self._colour)
        for _ in range(sentences):
            told.append(self._random.choices(events, (3, 3, 3, 1, 2, 3, 2))[0]())
        return " ".join(told)

    def _one(self) -> Person:
        return self._random.choice(self._people)

    def _introduced(self, person: Person) -> str:
        number = self._random.randint(1, 5)
        person.counts[self._kind] = number
        return (
            f"{person.name} is at the {person.place} with a {person.colour} {person.thing} and"
            f" {counted(number, self._kind)}."
        )

    def _goes(self) -> str:
        person = self._one()
        person.place = self._random.choice([place for place in PLACES if place != person.place])
        return f"{person.name} goes to the {person.place}."

    def _gets(self) -> str:
        person, number = self._one(), self._random.randint(1, 3)
        if person.counts[self._kind] + number >= len(NUMBERS):
            return self._how_many_of(person)
        person.counts[self._kind] += number
        verb = "buys" if person.place in ("market", "bakery", "station") else "finds"
        return f"There {person.pronoun} {verb} {counted(number, self._kind)}: {person.name} has more now."

    def _gives(self) -> str:
        giver, taker = self._random.sample(self._people, 2)
        most = min(giver.counts[self._kind], len(NUMBERS) - 1 - taker.counts[self._kind])
        if most < 1:
            return self._how_many_of(giver)
        number = self._random.randint(1, most)
        giver.counts[self._kind] -= number
        taker.counts[self._kind] += number
        return f"{giver.name} gives {counted(number, self._kind)} to {taker.name}."

    def _weather(self) -> str:
        return self._random.choice(WEATHER)

    def _where(self) -> str:
        person = self._one()
        return f"Where is {person.name}? {person.pronoun.capitalize()} is at the {person.place}."

    def _how_many(self) -> str:
        return self._how_many_of(self._one())

    def _how_many_of(self, person: Person) -> str:
        return f"Now {person.name} has {counted(person.counts[self._kind], self._kind)}."

    def _colour(self) -> str:
        person = self._one()
        return f"The {person.thing} of {person.name} is {person.colour}."


def stories(count: int, *, seed: int = 0) -> Iterator[str]:
    """So many stories, the same for the same seed, each a function of its number."""
    for number in range(count):
        yield Story(f"{seed}:{number}").text(4 + random.Random(f"{seed}:{number}:length").randrange(12))


def write_stories(folder: Path, *, train: int, test: int, seed: int = 0) -> tuple[Path, Path]:
    """train.jsonl and test.jsonl with the column text; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    found = list(stories(train + test, seed=seed))
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, texts in zip(paths, (found[:train], found[train:]), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths
