"""Lessons without a download: topics, what there is to understand of each, and a scripted teacher's demonstrations.

A problem is a topic that the student asks to be taught; its answer is what `mtpo.students.ScriptedStudent` has to
understand, and the teacher is not told it. A model trained on the demonstrations knows all the words and uses half of
them in the wrong place: preference learning has something to mend.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from mtpo.dialogue import CLOSING
from mtpo.students import ScriptedStudent, Topic
from mtpo.trajectory import Problem

Message = dict[str, str]

TOPICS = (
    Topic(
        "photosynthesis",
        {
            "light": "Where does the energy come from?",
            "chlorophyll": "Why are leaves green?",
            "carbon dioxide": "What does the plant take from the air?",
            "sugar": "What food does the plant make?",
        },
    ),
    Topic(
        "the water cycle",
        {
            "evaporation": "How does water get into the air?",
            "condensation": "How do clouds form?",
            "rain": "How does water come down again?",
            "river": "How does water get back to the sea?",
        },
    ),
    Topic(
        "the heart",
        {
            "muscle": "What is it made of?",
            "valve": "Why does blood not flow back?",
            "artery": "Through what does blood leave it?",
            "vein": "Through what does blood come back?",
        },
    ),
    Topic(
        "the solar system",
        {
            "sun": "What stands in the middle?",
            "gravity": "What holds it together?",
            "orbit": "What is the path of a planet called?",
            "moon": "What goes around the Earth?",
        },
    ),
    Topic(
        "bread",
        {
            "flour": "What is it mostly made of?",
            "yeast": "What makes it rise?",
            "dough": "What do we knead?",
            "oven": "Where is it baked?",
        },
    ),
    Topic(
        "electricity",
        {
            "electron": "What moves through a wire?",
            "voltage": "What pushes it on?",
            "resistance": "What slows it down?",
            "copper": "What are wires made of?",
        },
    ),
    Topic(
        "volcanoes",
        {
            "magma": "What is below the ground?",
            "pressure": "What drives it up?",
            "lava": "What flows down the slope?",
            "ash": "What falls from the sky?",
        },
    ),
    Topic(
        "bees",
        {
            "nectar": "What do they collect?",
            "pollen": "What sticks to their legs?",
            "hive": "Where do they live?",
            "queen": "Who lays the eggs?",
        },
    ),
    Topic(
        "printing",
        {
            "type": "What holds the shape of a letter?",
            "ink": "What makes the letter black?",
            "press": "What pushes it on the page?",
            "paper": "On what does the letter end up?",
        },
    ),
    Topic(
        "sound",
        {
            "vibration": "How does it begin?",
            "wave": "How does it travel?",
            "frequency": "What makes it high or low?",
            "ear": "What hears it?",
        },
    ),
    Topic(
        "rainbows",
        {
            "drop": "What does the light pass through?",
            "refraction": "What bends the light?",
            "color": "What is white light made of?",
            "reflection": "What sends the light back to us?",
        },
    ),
    Topic(
        "glass",
        {
            "sand": "What is melted?",
            "furnace": "Where is it melted?",
            "soda": "What makes it melt more easily?",
            "cooling": "How does it become hard?",
        },
    ),
)

BEHAVIOURS = {
    "asked": 0.4,  # names what the student asked for; otherwise any concept of the topic
    "goodbye": 0.12,  # ends the talk, whatever the student has understood
}
"""Probability of what the teacher of the demonstrations does in a turn."""


def lessons() -> dict[str, Topic]:
    """Every topic by the id of its problem."""
    return {f"topics/{topic.name.removeprefix('the ').replace(' ', '_')}": topic for topic in TOPICS}


def lesson_problems() -> list[Problem]:
    """Every topic as a problem; the answer lists what there is to understand."""
    return [
        Problem(
            problem_id,
            f"Can you teach me about {topic.name}?",
            ", ".join(topic.questions),
            subject=topic.name,
        )
        for problem_id, topic in lessons().items()
    ]


def lesson_demonstrations(
    count: int, *, seed: int = 0, max_turns: int = 6
) -> Iterator[tuple[str, list[Message]]]:
    """(problem id, messages) of talks between a scripted teacher and a scripted student, over all topics in turn."""
    problems = lesson_problems()
    for index in range(count):
        problem = problems[index % len(problems)]
        rng = random.Random(f"lesson {seed} {index}")
        yield problem.id, _talk(problem, lessons()[problem.id], rng, max_turns)


def _talk(problem: Problem, topic: Topic, rng: random.Random, max_turns: int) -> list[Message]:
    student = ScriptedStudent(topic)
    messages = [{"role": "user", "content": problem.question}]
    for turn in range(max_turns):
        said = _teach(student, rng, is_first=turn == 0)
        messages.append({"role": "assistant", "content": said})
        answer = student.answer(said, rng.getrandbits(32))
        if CLOSING in said + answer:
            break
        messages.append({"role": "user", "content": answer})
    return messages


def _teach(student: ScriptedStudent, rng: random.Random, *, is_first: bool) -> str:
    if not is_first and rng.random() < BEHAVIOURS["goodbye"]:
        return f"That is all for today. {CLOSING}"
    concept = rng.choice([*student.topic.questions])
    if student.asked is not None and rng.random() < BEHAVIOURS["asked"]:
        concept = student.asked
    return f"It begins with {concept}." if is_first else f"That is {concept}."
