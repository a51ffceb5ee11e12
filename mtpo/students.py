"""Students for `mtpo.dialogue`: a scripted one, whose understanding is known, and any language model."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mtpo.chat import ChatFormat, without_thoughts
from mtpo.dialogue import CLOSING
from mtpo.errors import EngineError, InputError
from mtpo.rollout import Decoding, Engine, Sampling
from mtpo.trajectory import Problem

PERSONA = f"""\
You are a student, and the other one is your teacher. Your interest: {{topic}}
Say in one or two sentences what you do not understand yet, ask one question, and never answer it yourself. \
When you have understood all that you wanted to know, say so and write {CLOSING}"""


@dataclass(frozen=True)
class Topic:
    """What there is to understand, which the teacher is not told."""

    name: str
    questions: Mapping[str, str]
    """For each concept, a word or a few, the question that asks for it without naming it."""


@dataclass
class ScriptedStudent:
    """Understands a concept when the teacher names it, and asks about one that is missing.

    The concept asked for is always understood; another one that is named is with probability `attention`. No message
    teaches more than `pace` concepts. All draws are those of the seeds.
    """

    topic: Topic
    attention: float = 0.5
    pace: int = 2
    understood: list[str] = field(default_factory=list)
    asked: str | None = None
    """The concept of the last question."""

    @property
    def comprehension(self) -> float:
        """The share of the concepts that are understood."""
        return len(self.understood) / len(self.topic.questions)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {"student": "scripted", "comprehension": self.comprehension, "understood": [*self.understood]}

    async def reply(self, message: str, *, seed: int) -> str:
        return self.answer(message, seed)

    def answer(self, message: str, seed: int) -> str:
        """`reply`, without waiting."""
        rng = random.Random(seed)
        learned = self._learn(message, rng)
        missing = self._missing()
        if not missing:
            return f"Now I understand {self.topic.name}. Thank you! {CLOSING}"
        self.asked = rng.choice(missing)
        return f"{'I see.' if learned else 'I do not follow.'} {self.topic.questions[self.asked]}"

    async def hear(self, message: str, *, seed: int) -> None:
        self._learn(message, random.Random(seed))

    def copy(self) -> ScriptedStudent:
        return dataclasses.replace(self, understood=[*self.understood])

    def close(self) -> None: ...

    def _learn(self, message: str, rng: random.Random) -> list[str]:
        """The concepts that this message has taught."""
        missing = sorted(
            self._missing(), key=lambda concept: concept != self.asked
        )  # what was asked comes first
        luck = {concept: rng.random() < self.attention for concept in self.topic.questions}
        heard = [c for c in missing if mentions(message, c) and (luck[c] or c == self.asked)]
        self.understood += heard[: self.pace]
        return heard[: self.pace]

    def _missing(self) -> list[str]:
        return [concept for concept in self.topic.questions if concept not in self.understood]


def mentions(message: str, concept: str) -> bool:
    """Whether the message has these words, in any case, also as a plural."""
    return re.search(rf"\b{re.escape(concept)}s?\b", message, re.IGNORECASE) is not None


@dataclass(frozen=True)
class ScriptedStudents:
    """A scripted student for each problem; for `Dialogue`."""

    topics: Mapping[str, Topic]
    """By problem id."""
    attention: float = 0.5
    pace: int = 2

    def __call__(self, problem: Problem) -> ScriptedStudent:
        if problem.id not in self.topics:
            raise InputError(f"no scripted student has a topic for problem {problem.id!r}")
        return ScriptedStudent(self.topics[problem.id], self.attention, self.pace)


@dataclass(frozen=True)
class EngineStudents:
    """Students played by a language model behind any engine, with a tokenizer of its own; for `Dialogue`."""

    engine: Engine
    chat: ChatFormat
    """Of the student's model."""
    persona: str = PERSONA
    """What the student is told; `{topic}` stands for the problem's subject, or else its question."""
    decoding: Decoding = field(default_factory=Decoding)
    max_tokens: int = 256
    """Sampled tokens of one answer."""
    _numbers: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False)

    def __call__(self, problem: Problem) -> EngineStudent:
        topic = problem.subject or problem.question
        return EngineStudent(self, problem.id, self.persona.replace("{topic}", topic))

    def new_session(self, problem_id: str) -> str:
        return f"student of {problem_id}/{next(self._numbers)}"


@dataclass
class EngineStudent:
    """One talk from the student's side: the teacher is its user, and its own turns are kept as sampled."""

    made_by: EngineStudents
    problem_id: str
    system: str
    ids: list[int] = field(default_factory=list)
    """All that it has read and written."""
    last_turn: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.session = self.made_by.new_session(self.problem_id)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {"student": self.made_by.engine.fingerprint}

    async def reply(self, message: str, *, seed: int) -> str | None:
        engine, chat = self.made_by.engine, self.made_by.chat
        if self.ids:
            prompt = [*self.ids, *chat.observation(message, after=self.last_turn, role="user").ids]
        else:
            prompt = list(chat.prompt(message, system=self.system).ids)
        room = engine.max_context - len(prompt)
        if room < 1:
            return None
        sampling = Sampling(
            max_tokens=min(self.made_by.max_tokens, room),
            stop_ids=chat.stop_ids,
            seed=seed,
            **dataclasses.asdict(self.made_by.decoding),
        )
        turn = await engine.generate(prompt, sampling, session=self.session)
        if not turn.ids:
            raise EngineError("the student's engine returned no token")
        is_ended_otherwise = turn.ids[-1] in chat.stop_ids and turn.ids[-1] != chat.end_of_turn_id
        self.last_turn = turn.ids[:-1] if is_ended_otherwise else turn.ids
        self.ids = [*prompt, *self.last_turn]
        return without_thoughts(chat.action_text(turn.ids)).strip()

    async def hear(self, message: str, *, seed: int) -> None: ...

    def copy(self) -> EngineStudent:
        return dataclasses.replace(self, ids=[*self.ids])

    def close(self) -> None:
        self.made_by.engine.release(self.session)
