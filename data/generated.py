"""Word problems without end, for runs that must need no download: `generated:train`, `generated:test`.

A problem is a short story about who has how many of something. `story` draws it as data, `Story.question` tells it
in English and `Story.answer` is its arithmetic. Nine kinds; four of them are plain, the other five each invite one
mistake, which `data.demonstrations` makes most of the time.

A problem depends on its split and index alone. The hash of the question text decides to which split a question
belongs, so no text is in two splits. Ranges of `start` and `limit` divide the train split further.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from mtpo.errors import InputError
from mtpo.trajectory import Problem

Split = Literal["train", "dev", "test"]
Operation = Literal[
    "has", "more", "fewer", "times", "reversed_more", "reversed_times", "finds", "gives", "bags", "branch"
]
Asked = Literal["last", "total", "cost", "left_over"]

DEFAULT_LIMITS: dict[Split, int] = {"train": 16_000, "dev": 500, "test": 500}

KIND_WEIGHTS: dict[str, int] = {
    "compare": 13,  # a chain of "more than", "fewer than", "times as many as"
    "event": 13,  # then somebody finds some, or gives some away
    "total": 12,  # how many have they together
    "cost": 12,  # what do they cost together
    "reversed": 10,  # "compared with Tom, that is 12 more": Tom has fewer
    "bags": 10,  # buys 3 bags of 8 each
    "sum": 8,  # two numbers together: looks easy enough for mental arithmetic
    "left_over": 10,  # how many are left when boxes are filled
    "branch": 12,  # how it goes on depends on whether a computed number is even
}
"""Every kind and how often it comes, in percent."""

NUM_RELATIONS = {
    "sum": (0, 0),
    "total": (1, 1),
    "event": (0, 1),
    "bags": (0, 1),
    "left_over": (0, 1),
    "branch": (1, 1),
}
"""Fewest and most "more than" sentences of a kind; one or two in the others."""

NAMES = ("Max", "Dan", "Tom", "Eva", "Ann", "Leo", "Mia", "Sam", "Zoe", "Ben", "Kim", "Amy")
ITEMS = ("shells", "coins", "cards", "books", "stamps", "beads", "apples", "pens")

SENTENCES: dict[Operation, str] = {
    "has": "{name} has {number} {item}.",
    "more": "{name} has {number} more {item} than {other}.",
    "fewer": "{name} has {number} fewer {item} than {other}.",
    "times": "{name} has {number} times as many {item} as {other}.",
    "reversed_more": "Compared with {name}, that is {number} more {item}.",
    "reversed_times": "Compared with {name}, that is {number} times as many {item}.",
    "finds": "Then {name} finds {number} more {item}.",
    "gives": "Then {name} gives away {number} {item}.",
    "bags": "Then {name} buys {number} bags of {size} {item} each.",
    "branch": "If {other} has an even number, {name} has {number} more {item} than {other}, otherwise {number} fewer.",
}
MAX_ANSWER = 99_999


@dataclass(frozen=True, slots=True)
class Step:
    """One sentence of a story: sets the number of `name`, mostly from that of `other`."""

    operation: Operation
    name: str
    number: int
    other: str = ""
    """Whose number it starts from; the same as `name` for events, empty where nobody's is needed."""
    size: int = 0
    """Items in a bag."""

    def sentence(self, item: str) -> str:
        return SENTENCES[self.operation].format(
            name=self.name, number=self.number, item=item, other=self.other, size=self.size
        )

    def value(self, base: int) -> int:
        """The number of `name` when `other` has `base`; -1 if that is not a whole number."""
        match self.operation:
            case "has":
                return self.number
            case "more" | "finds":
                return base + self.number
            case "fewer" | "gives" | "reversed_more":
                return base - self.number
            case "times":
                return base * self.number
            case "reversed_times":
                return -1 if base % self.number else base // self.number
            case "bags":
                return base + self.number * self.size
            case "branch":
                return base - self.number if base % 2 else base + self.number


@dataclass(frozen=True, slots=True)
class Story:
    """A word problem as data."""

    kind: str
    item: str
    steps: tuple[Step, ...]
    asked: Asked = "last"
    number: int = 0
    """The price of one item, or how many fit into a box, where it matters."""

    @property
    def names(self) -> list[str]:
        """Everybody in `steps`, in order of appearance."""
        return list(dict.fromkeys(step.name for step in self.steps))

    @property
    def values(self) -> dict[str, int]:
        """How many each name has after `steps`; negative where the story is impossible."""
        values: dict[str, int] = {}
        for step in self.steps:
            base = values.get(step.other, 0)
            values[step.name] = step.value(base) if base >= 0 else -1
        return values

    @property
    def answer(self) -> int:
        """The right answer; negative where the story is impossible."""
        values = self.values
        if min(values.values()) < 0:
            return -1
        last = values[self.steps[-1].name]
        match self.asked:
            case "last":
                return last
            case "total":
                return sum(values.values())
            case "cost":
                return last * self.number
            case "left_over":
                return last % self.number

    @property
    def question(self) -> str:
        """The problem in English."""
        return " ".join([*(step.sentence(self.item) for step in self.steps), self._ask()])

    def _ask(self) -> str:
        item, last = self.item, self.steps[-1].name
        match self.asked:
            case "last":
                return f"How many {item} does {last} have?"
            case "total":
                return f"How many {item} do {' and '.join(self.names)} have together?"
            case "cost":
                return f"How many dollars do the {item} of {last} cost at {self.number} dollars each?"
            case "left_over":
                return f"How many {item} are left when {last} fills boxes of {self.number} {item}?"


def problems(split: Split, limit: int | None = None, start: int = 0) -> list[Problem]:
    """The problems `start`, `start + 1`, ... of a split, `limit` of them (`DEFAULT_LIMITS` if None).

    Raises:
        InputError: no such split, or a negative number.
    """
    if split not in get_args(Split):
        raise InputError(f"generated:{split}: no such split, expected one of {', '.join(get_args(Split))}")
    limit = DEFAULT_LIMITS[split] if limit is None else limit
    if min(limit, start) < 0:
        raise InputError(f"generated:{split}: limit {limit} and start {start} must not be negative")
    return [problem(split, index) for index in range(start, start + limit)]


def problem(split: Split, index: int) -> Problem:
    """Problem `index` of a split; its subject is the kind."""
    told = story(split, index)
    return Problem(f"generated:{split}/{index}", told.question, str(told.answer), subject=told.kind)


@lru_cache(maxsize=1024)  # a problem and its demonstration are made one after the other
def story(split: Split, index: int) -> Story:
    """The story behind `problem(split, index)`."""
    rng = random.Random(f"generated:{split}/{index}")
    kind = rng.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))[0]
    while True:
        drawn = _draw(kind, rng)
        if _is_sound(drawn) and split_of(drawn.question) == split:
            return drawn


def story_of(told: Problem) -> Story:
    """The story behind a problem that `problem` made.

    Raises:
        InputError: it is not one of these.
    """
    name, _, index = told.id.partition("/")
    for split in get_args(Split):
        if name == f"generated:{split}" and index.isdecimal():
            found = story(split, int(index))
            if (found.question, str(found.answer)) == (told.question, told.answer):
                return found
    raise InputError(
        f"problem {told.id!r} was not made by data.generated, at least not by this version of it"
    )


def split_of(question: str) -> Split:
    """The only split that may hold this question: one text in ten is for dev, one for test."""
    bucket = hashlib.sha256(question.encode()).digest()[0] % 10
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"


def _is_sound(drawn: Story) -> bool:
    """Everybody has at least one, and what is left over is not as many as the full boxes."""
    if min(drawn.values.values()) < 1 or not 1 <= drawn.answer <= MAX_ANSWER:
        return False
    last = drawn.values[drawn.steps[-1].name]
    return drawn.asked != "left_over" or last // drawn.number != last % drawn.number


def _draw(kind: str, rng: random.Random) -> Story:
    """A story of this kind, not always a sound one."""
    item, names = rng.choice(ITEMS), rng.sample(NAMES, 4)
    steps = [Step("has", names[0], rng.randint(20, 299))]
    fewest, most = NUM_RELATIONS.get(kind, (1, 2))
    relations = rng.randint(fewest, most)
    for name in names[1 : 1 + relations]:
        steps.append(_relation(name, steps[-1].name, rng))
    last = steps[-1].name
    match kind:
        case "event":
            steps.append(Step(rng.choice(("finds", "gives")), last, rng.randint(5, 60), last))
        case "bags":
            steps.append(Step("bags", last, rng.randint(2, 9), last, size=rng.randint(3, 9)))
        case "reversed":
            turned = rng.randint(1, relations)
            steps[turned] = _reversed(steps[turned], rng)
        case "sum" | "total":
            if kind == "sum" or rng.random() < 0.5:
                steps.append(Step("has", names[3], rng.randint(20, 299)))
            return Story(kind, item, tuple(steps), "total")
        case "cost":
            return Story(kind, item, tuple(steps), "cost", number=rng.randint(2, 9))
        case "left_over":
            return Story(kind, item, tuple(steps), "left_over", number=rng.randint(3, 9))
        case "branch":
            steps.append(Step("branch", names[3], rng.randint(5, 60), last))
    return Story(kind, item, tuple(steps))


def _relation(name: str, other: str, rng: random.Random) -> Step:
    operation: Operation = rng.choice(("more", "fewer", "times"))
    return Step(operation, name, rng.randint(2, 9) if operation == "times" else rng.randint(5, 60), other)


def _reversed(step: Step, rng: random.Random) -> Step:
    if rng.random() < 0.5:
        return Step("reversed_more", step.name, rng.randint(5, 60), step.other)
    return Step("reversed_times", step.name, rng.randint(2, 9), step.other)
