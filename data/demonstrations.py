"""Demonstrations of using Python on generated problems, by a demonstrator who is wrong on purpose.

A model trained on them learns the tool and the mistakes alike. Greedy decoding follows the majority, so a mistake
that is made more than half of the time (`MISCONCEPTIONS`) is a failure that supervised training cannot remove
and that sampling still avoids: preference learning has something to mend.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator

from data.generated import Split, Step, Story, problem, story_of
from mtpo.trajectory import Problem

Message = dict[str, str]

MISCONCEPTIONS: dict[str, float] = {
    # most of the time: the greedy policy makes these
    "reversed_more": 0.60,  # adds, because the sentence says "more"
    "reversed_times": 0.60,  # multiplies, because the sentence says "times"
    "bags": 0.60,  # adds the bags and their size instead of multiplying
    "sum": 0.60,  # answers at once, without the tool, with one of the two numbers
    "left_over": 0.55,  # prints what is left and the full boxes, answers with the boxes
    "branch": 0.55,  # answers with the first output instead of going on from it
    # now and then: these show when sampling
    "total": 0.20,  # prints the last number only
    "fewer": 0.08,  # adds
    "cost": 0.08,  # adds the price
    "wrong_branch": 0.05,  # goes on with the other branch
}
"""Probability of each mistake, given a problem or a sentence that invites it."""

BEHAVIOURS: dict[str, float] = {
    "no_tool": 0.08,  # answers at once, with a number from the question
    "forgotten_line": 0.12,  # leaves out a line of the program, mostly a NameError
    "repair": 0.50,  # after an error: writes the whole program; gives up with a number from the question otherwise
    "misread": 0.06,  # one digit of the output is copied wrongly
}
"""Probability of what happens on any problem: the first two each, the others where they can happen."""

LINES: dict[str, str] = {
    "has": "{name} = {number}",
    "more": "{name} = {other} + {number}",
    "fewer": "{name} = {other} - {number}",
    "times": "{name} = {other} * {number}",
    "reversed_more": "{name} = {other} - {number}",
    "reversed_times": "{name} = {other} // {number}",
    "finds": "{name} = {name} + {number}",
    "gives": "{name} = {name} - {number}",
    "bags": "{name} = {name} + {number} * {size}",
}
WRONG_LINES: dict[str, str] = {
    "fewer": "{name} = {other} + {number}",
    "reversed_more": "{name} = {other} + {number}",
    "reversed_times": "{name} = {other} * {number}",
    "bags": "{name} = {name} + {number} + {size}",
}


def demonstrations(
    limit: int, *, start: int = 0, split: Split = "train", seed: int = 0
) -> Iterator[tuple[Problem, list[Message]]]:
    """One demonstration for each of `limit` problems from index `start` on; the same for the same arguments."""
    for index in range(start, start + limit):
        shown = problem(split, index)
        yield shown, demonstration(shown, random.Random(f"demonstration {seed} {shown.id}"))


def demonstration(shown: Problem, rng: random.Random) -> list[Message]:
    """One attempt at a generated problem: a user, assistant, tool, ..., assistant conversation.

    Tool messages hold exactly what the interpreter answers to the code before them, without the fence.

    Raises:
        InputError: the problem is not one of `data.generated`.
    """
    told = story_of(shown)
    attempt = _Attempt(shown.question)
    if rng.random() < (MISCONCEPTIONS["sum"] if told.kind == "sum" else BEHAVIOURS["no_tool"]):
        return attempt.answer(_guess(told, rng))
    program = _program(told, rng)
    first = program
    if rng.random() < BEHAVIOURS["forgotten_line"]:
        first = program.copy()
        del first[rng.randrange(sum(" = " in line for line in program))]
    output = attempt.run(first)
    if "Error" in output:
        if rng.random() >= BEHAVIOURS["repair"]:
            return attempt.answer(_guess(told, rng))
        output = attempt.run(program)
    if told.kind == "branch" and rng.random() >= MISCONCEPTIONS["branch"]:
        output = attempt.run(_second_program(told.steps[-1], output, rng))
    return attempt.answer(_read(told, output, rng))


class _Attempt:
    """The conversation so far, and the variables that the programs have left behind."""

    def __init__(self, question: str) -> None:
        self._messages: list[Message] = [{"role": "user", "content": question}]
        self._variables: dict[str, int] = {}

    def run(self, program: list[str]) -> str:
        """Write the program, let it run, and return what the interpreter answers."""
        code = "\n".join(program)
        output = _execute(code, self._variables)
        self._messages.append({"role": "assistant", "content": f"```python\n{code}\n```"})
        self._messages.append({"role": "tool", "content": output})
        return output

    def answer(self, number: int) -> list[Message]:
        """Write the answer and return the whole conversation."""
        self._messages.append({"role": "assistant", "content": f"\\boxed{{{number}}}"})
        return self._messages


def _execute(code: str, variables: dict[str, int]) -> str:
    """What the interpreter prints for one of our own programs; `variables` are changed by it."""
    printed: list[str] = []
    try:
        exec(code, {"__builtins__": {}, "print": lambda value: printed.append(str(value))}, variables)
    except NameError as error:
        line = traceback.extract_tb(error.__traceback__)[-1].lineno or 1
        printed.append(name_error_text(line, code.splitlines()[line - 1], str(error)))
    return "\n".join(printed)


def name_error_text(line_number: int, line: str, message: str) -> str:
    """The interpreter's report of a NameError in line `line_number` (from 1) of a cell."""
    return f"Line {line_number}: {line}\nNameError: {message}"


def _program(told: Story, rng: random.Random) -> list[str]:
    """The lines of the first program, with the demonstrator's misconceptions about single sentences."""
    if told.kind == "branch":
        computed = told.steps[-1].other
        return [
            *(_line(step, rng) for step in told.steps[:-1]),
            f"print({computed})",
            f"print({computed} % 2 == 0)",
        ]
    return [*(_line(step, rng) for step in told.steps), *_print_lines(told, rng)]


def _line(step: Step, rng: random.Random) -> str:
    is_wrong = rng.random() < MISCONCEPTIONS.get(step.operation, 0.0)
    lines = WRONG_LINES if is_wrong else LINES
    return lines[step.operation].format(name=step.name, other=step.other, number=step.number, size=step.size)


def _print_lines(told: Story, rng: random.Random) -> list[str]:
    last = told.steps[-1].name
    if told.asked == "left_over":
        return [f"print({last} % {told.number})", f"print({last} // {told.number})"]
    is_wrong = rng.random() < MISCONCEPTIONS.get(told.kind, 0.0)
    if told.asked == "cost":
        return [f"print({last} {'+' if is_wrong else '*'} {told.number})"]
    if told.asked == "total" and not (is_wrong and told.kind == "total"):
        return [f"print({' + '.join(told.names)})"]
    return [f"print({last})"]


def _second_program(branch: Step, output: str, rng: random.Random) -> list[str]:
    """The program that goes on from the output of the first one: a number, and whether it is even."""
    is_odd = output.endswith("False") != (rng.random() < MISCONCEPTIONS["wrong_branch"])
    line = f"{branch.name} = {branch.other} {'-' if is_odd else '+'} {branch.number}"
    return [line, f"print({branch.name})"]


def _read(told: Story, output: str, rng: random.Random) -> int:
    """The number that the demonstrator takes from the output."""
    reads_last = told.kind == "left_over" and rng.random() < MISCONCEPTIONS["left_over"]
    number = int(output.splitlines()[-1 if reads_last else 0])
    return _slip(number, rng) if rng.random() < BEHAVIOURS["misread"] else number


def _guess(told: Story, rng: random.Random) -> int:
    """A number from the question, where that is not the answer."""
    numbers = [step.number for step in told.steps if step.number != told.answer]
    return rng.choice(numbers or [told.answer + 1])


def _slip(number: int, rng: random.Random) -> int:
    """The number with one digit changed: as many digits, never the same number."""
    digits = list(str(abs(number)))
    place = rng.randrange(len(digits))
    choices = "123456789" if place == 0 else "0123456789"
    digits[place] = rng.choice([digit for digit in choices if digit != digits[place]])
    return int("".join(digits)) * (-1 if number < 0 else 1)
