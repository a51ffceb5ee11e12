"""The student of a dialogue, for the recipes in which a model may teach one: its options, and the talk with it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, fields

from data.topics import lessons
from mtpo.dialogue import CLOSING, Dialogue
from mtpo.errors import InputError
from mtpo.rollout import Decoding
from mtpo.students import PERSONA, EngineStudents, ScriptedStudents
from recipes.engines import EngineOptions, Sampler
from recipes.generate import refuse_idle

SCRIPTED = "scripted"
TEACHER = (
    "You are a teacher. Answer your student's questions one at a time, in one or two sentences each. "
    f"When the student has understood everything, say goodbye and write {CLOSING}"
)
"""What the model is told, by default."""
STUDENT_SERVERS = frozenset({"student_engine", "student_urls"})
"""Options that change no talk."""


@dataclass(frozen=True, kw_only=True)
class StudentOptions:
    """Who is taught."""

    student: str | None = field(
        default=None,
        metadata={
            "help": "whom the model teaches: scripted, which knows the built-in topics, or name or folder of the model "
            "that plays it; by default the model has an interpreter instead"
        },
    )
    student_engine: str = field(default="transformers", metadata={"help": "as --engine, for the student"})
    student_urls: list[str] = field(default_factory=list, metadata={"help": "as --urls, for the student"})
    student_tokenizer: str | None = field(default=None, metadata={"help": "as --tokenizer, for the student"})
    student_tokens: int = field(default=128, metadata={"help": "sampled tokens of one answer of a model"})
    persona: str = field(
        default=PERSONA,
        metadata={"help": "what a model that plays the student is told; {topic} is filled in"},
    )

    def check_student(self) -> None:
        """
        Raises:
            InputError: an option has no effect, or a value is out of range.
        """
        if self.student_tokens < 1:
            raise InputError(f"--student_tokens must be at least 1, got {self.student_tokens}")
        others = [option.name for option in fields(StudentOptions) if option.name != "student"]
        if self.student is None:
            refuse_idle(self, others, "without --student")
        if self.student == SCRIPTED:
            refuse_idle(self, others, "with the scripted student")
        if self.student_engine == "transformers":
            refuse_idle(self, ["student_tokenizer"], "with --student_engine transformers")
        self.of_student  # noqa: B018 - it has checks of its own

    @property
    def of_student(self) -> EngineOptions:
        """Nothing is trained on what the student says, so that its server need not return token ids."""
        return EngineOptions(
            engine=self.student_engine,
            urls=self.student_urls,
            tokenizer=self.student_tokenizer,
            allow_text=self.student_engine == "openai",
        )

    def load_student(self, dtype: str) -> Sampler | None:
        """None for the scripted one."""
        if self.student is None or self.student == SCRIPTED:
            return None
        return Sampler.load(self.student, self.of_student, dtype)

    @contextlib.asynccontextmanager
    async def open_dialogue(
        self, student: Sampler | None, decoding: Decoding, max_in_flight: int
    ) -> AsyncIterator[Dialogue]:
        """Talks with what `load_student` gave; an engine that is started for it lives as long as this."""
        if student is None:
            yield Dialogue(ScriptedStudents(lessons()))
            return
        engine = student.engine(self.of_student, max_in_flight)
        try:
            yield Dialogue(EngineStudents(engine, student.chat, self.persona, decoding, self.student_tokens))
        finally:
            await engine.aclose()
