from __future__ import annotations

import contextlib
import io
import random
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest

from data.demonstrations import MISCONCEPTIONS, Message, demonstration, demonstrations
from data.generated import problem
from mtpo.errors import InputError
from mtpo.trajectory import Problem
from sandbox import run_code

TRAPS = ("reversed", "bags", "sum", "left_over", "branch")


@pytest.fixture(scope="module")
def shown() -> list[tuple[Problem, list[Message]]]:
    return list(demonstrations(4000))


def code_of(messages: list[Message]) -> list[str]:
    blocks = [re.fullmatch(r"```python\n(.*)\n```", m["content"], re.DOTALL) for m in messages[1::2]]
    return [block[1] for block in blocks if block]


def answer_of(messages: list[Message]) -> str:
    found = re.fullmatch(r"\\boxed\{(\d+)\}", messages[-1]["content"])
    assert found, messages[-1]
    return found[1]


def interpret(programs: list[str]) -> Iterator[str]:
    """What a plain Python prints for the programs of one session, one after the other."""
    variables: dict[str, object] = {}
    for program in programs:
        out = io.StringIO()
        error = ""
        with contextlib.redirect_stdout(out):
            try:
                exec(program, variables)
            except NameError as raised:
                error = f"NameError: {raised}"
        yield (out.getvalue() + error).removesuffix("\n")


def test_roles_alternate_from_the_question_to_the_answer(shown: list[tuple[Problem, list[Message]]]) -> None:
    for told, messages in shown:
        roles = [m["role"] for m in messages]
        assert roles == ["user", "assistant"] + ["tool", "assistant"] * (len(roles) // 2 - 1)
        assert messages[0]["content"] == told.question
        assert len(code_of(messages)) == roles.count("tool")
        assert answer_of(messages)


def test_tool_output_is_what_python_prints(shown: list[tuple[Problem, list[Message]]]) -> None:
    for _, messages in shown:
        outputs = [m["content"] for m in messages if m["role"] == "tool"]
        for told, really in zip(outputs, interpret(code_of(messages)), strict=True):
            assert told.splitlines()[-1] == really.splitlines()[-1]
            if "Error" not in really:
                assert told == really


@pytest.mark.parametrize("line_number", [1, 2, 3])
def test_error_messages_read_as_in_the_sandbox(
    shown: list[tuple[Problem, list[Message]]], line_number: int
) -> None:
    program, output = next(
        (code_of(messages)[0], messages[2]["content"])
        for _, messages in shown
        if len(messages) > 2 and messages[2]["content"].startswith(f"Line {line_number}: ")
    )
    assert output == run_code(program).text


def test_each_trap_is_fallen_into_by_the_majority_and_avoided_by_a_quarter(
    shown: list[tuple[Problem, list[Message]]],
) -> None:
    is_right = defaultdict(list)
    for told, messages in shown:
        is_right[told.subject].append(answer_of(messages) == told.answer)
    share = {kind: sum(right) / len(right) for kind, right in is_right.items()}
    for kind in TRAPS:
        assert 0.24 < share.pop(kind) < 0.40, kind
    assert min(share.values()) > 0.55  # the plain kinds
    every = [right for kinds in is_right.values() for right in kinds]
    assert 0.40 < sum(every) / len(every) < 0.58


def test_the_easy_sum_is_mostly_answered_without_the_tool(shown: list[tuple[Problem, list[Message]]]) -> None:
    sums = [(told, messages) for told, messages in shown if told.subject == "sum"]
    without_tool = [(told, messages) for told, messages in sums if len(messages) == 2]
    assert len(without_tool) / len(sums) == pytest.approx(MISCONCEPTIONS["sum"], abs=0.08)
    assert all(answer_of(messages) != told.answer for told, messages in without_tool)


def test_a_right_branch_takes_two_programs_that_share_their_variables(
    shown: list[tuple[Problem, list[Message]]],
) -> None:
    right = [
        code_of(messages)
        for told, messages in shown
        if told.subject == "branch" and answer_of(messages) == told.answer and len(messages) == 6
    ]
    assert len(right) > 50
    for first, second in right:
        computed = re.search(r"print\((\w+)\)\nprint\(\1 % 2 == 0\)$", first)
        assert computed and re.search(rf"= {computed[1]} [-+*] \d+\n", second)


def test_a_wrong_branch_mostly_ends_with_the_first_output(
    shown: list[tuple[Problem, list[Message]]],
) -> None:
    finished = [
        (messages[2]["content"].split("\n")[0], answer_of(messages), len(messages))
        for told, messages in shown
        if told.subject == "branch" and len(messages) > 2 and "Error" not in messages[2]["content"]
    ]
    stopped = [first == answer for first, answer, num_messages in finished if num_messages == 4]
    assert len(stopped) / len(finished) == pytest.approx(MISCONCEPTIONS["branch"], abs=0.08)
    assert sum(stopped) / len(stopped) > 0.9  # the others misread it


def test_of_two_printed_numbers_mostly_the_wrong_one_is_read(
    shown: list[tuple[Problem, list[Message]]],
) -> None:
    read = [
        (messages[-2]["content"].split("\n"), answer_of(messages))
        for told, messages in shown
        if told.subject == "left_over" and len(messages) == 4 and "Error" not in messages[2]["content"]
    ]
    right, wrong = (sum(answer == numbers[line] for numbers, answer in read) for line in (0, 1))
    assert wrong / (right + wrong) == pytest.approx(MISCONCEPTIONS["left_over"], abs=0.08)


def test_half_of_the_errors_are_repaired_by_a_whole_program(
    shown: list[tuple[Problem, list[Message]]],
) -> None:
    failed = [messages for _, messages in shown if "Error" in messages[2 % len(messages)]["content"]]
    repaired = [messages for messages in failed if len(messages) > 4]
    assert 0.06 < len(failed) / len(shown) < 0.13
    assert len(repaired) / len(failed) == pytest.approx(0.5, abs=0.08)
    for messages in repaired:
        first, second = code_of(messages)[:2]
        assert set(first.split("\n")) < set(second.split("\n"))


def test_the_same_seed_gives_the_same_demonstrations() -> None:
    assert list(demonstrations(20, start=5)) == list(demonstrations(25))[5:]
    assert list(demonstrations(20, seed=1)) != list(demonstrations(20))


def test_a_foreign_problem_has_no_demonstration() -> None:
    with pytest.raises(InputError, match="gsm8k:test/0"):
        demonstration(Problem("gsm8k:test/0", problem("train", 0).question, "1"), random.Random(0))
