"""The judge behind an endpoint, against a scripted server on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtpo.errors import InputError, JudgeUnavailable
from mtpo.judges import INSTRUCTION, LLMJudge
from mtpo.judges.answer_log import AnswerLog
from mtpo.trajectory import Problem, StopReason, Trajectory
from tests.fake_server import Answer, FakeServer
from tests.trajectory_texts import attempt

PROBLEM = Problem("toy/0", "What is 3 + 4?", "7")
GOOD, BAD = attempt("A good answer."), attempt("A bad answer.")
ROOT = Path(__file__).resolve().parents[1]


def says(text: str) -> Answer:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def prompt_of(body: dict[str, Any]) -> str:
    [message] = body["messages"]
    return message["content"]


def fair(body: dict[str, Any]) -> Answer:
    """Prefers whatever is good, wherever it stands."""
    prompt = prompt_of(body)
    first, second = prompt.index("A good answer."), prompt.index("A bad answer.")
    return says(f"I compared both.\nBetter: {1 if first < second else 2}")


@contextlib.contextmanager
def served(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[FakeServer]:
    server = FakeServer(answer, path="/v1/chat/completions")
    try:
        yield server
    finally:
        server.stop()


@contextlib.asynccontextmanager
async def asking(server: FakeServer, **options: Any):
    judge = LLMJudge(server.url, "judge", **{"patience_s": 60.0, **options})
    try:
        yield judge
    finally:
        await judge.aclose()


def numbered(number: int) -> Trajectory:
    return attempt(f"A bad answer. Number {number}.")


# -- what is asked, and how it is read -----------------------------------------------------------------------


async def test_both_orders_are_asked_and_averaged() -> None:
    with served(fair) as server:
        async with asking(server) as judge:
            assert await judge.prefer(GOOD, BAD, PROBLEM) == 1.0
            assert await judge.prefer(BAD, GOOD, PROBLEM) == 0.0
        places = [prompt_of(r).index("A good") < prompt_of(r).index("A bad") for r in server.requests]
        assert sorted(places) == [False, True]
        [one, other] = [
            INSTRUCTION.format(question=PROBLEM.question, first=a, second=b)
            for a, b in (("A good answer.", "A bad answer."), ("A bad answer.", "A good answer."))
        ]
        assert {prompt_of(r) for r in server.requests} == {one, other}


@pytest.mark.parametrize(
    ("answer", "preference"), [("Better: 1", 0.5), ("Better: 2", 0.5), ("better: **tie**", 0.5)]
)
async def test_a_love_of_one_place_is_no_preference(answer: str, preference: float) -> None:
    with served(lambda _: says(answer)) as server:
        async with asking(server) as judge:
            assert await judge.prefer(GOOD, BAD, PROBLEM) == preference


async def test_a_tie_in_one_order_alone_is_worth_a_quarter() -> None:
    def hesitant(body: dict[str, Any]) -> Answer:
        prompt = prompt_of(body)
        return says("Better: 1" if prompt.index("A good") < prompt.index("A bad") else "Better: tie")

    with served(hesitant) as server:
        async with asking(server) as judge:
            assert await judge.prefer(GOOD, BAD, PROBLEM) == 0.75
            assert await judge.prefer(BAD, GOOD, PROBLEM) == 0.25


async def test_the_judge_reads_tool_output_and_places_in_a_text_stay_text() -> None:
    tricky = attempt("```python\nprint({second})\n```", "{first}", "So {question}: \\boxed{7}")
    with served(lambda _: says("Better: tie")) as server:
        async with asking(server) as judge:
            await judge.prefer(tricky, BAD, PROBLEM)
        text = "```python\nprint({second})\n```\n```output\n{first}\n```\nSo {question}: \\boxed{7}"
        assert all(text in prompt_of(r) and prompt_of(r).count("A bad answer.") == 1 for r in server.requests)


async def test_text_that_is_no_unicode_can_be_asked_about() -> None:
    with served(lambda _: says("Better: tie")) as server:
        async with asking(server) as judge:
            assert await judge.prefer(attempt("half \ud83d a pair"), BAD, PROBLEM) == 0.5
        assert all("half ? a pair" in prompt_of(r) for r in server.requests)


async def test_instruction_pattern_and_options_are_the_users() -> None:
    with served(lambda _: says("Verdict = 2")) as server:
        async with asking(
            server,
            instruction="{question} A={first} B={second}",
            verdict=r"^Verdict = (\d)$",
            options={"temperature": 0.5, "max_tokens": None, "top_p": 0.9},
        ) as judge:
            assert await judge.prefer(GOOD, BAD, PROBLEM) == 0.5
        body = server.requests[0]
        assert (body["model"], body["temperature"], body["top_p"]) == ("judge", 0.5, 0.9)
        assert "max_tokens" not in body
        assert {prompt_of(r) for r in server.requests} == {
            f"{PROBLEM.question} A={a} B={b}"
            for a, b in (("A good answer.", "A bad answer."), ("A bad answer.", "A good answer."))
        }


@pytest.mark.parametrize(
    "nonsense", ["", "Both are fine.", "Better: 3", "Better: 1\nBetter: 2", "Is 1 better: 1 or 2?"]
)
async def test_an_answer_without_a_verdict_is_asked_again_counted_and_never_guessed(nonsense: str) -> None:
    with served(lambda _: says(nonsense)) as server:
        async with asking(server, max_asks=3) as judge:
            assert await judge.prefer(GOOD, BAD, PROBLEM) is None
            assert judge.counts == {"requests": 6, "answers without a verdict": 6, "unlabelled": 1}
        assert len({json.dumps(r) for r in server.requests}) == 6  # another seed each time


async def test_a_pair_with_a_verdict_in_one_order_alone_has_no_label() -> None:
    def half(body: dict[str, Any]) -> Answer:
        prompt = prompt_of(body)
        return fair(body) if prompt.index("A good") < prompt.index("A bad") else says("Hm.")

    with served(half) as server:
        async with asking(server, max_asks=1) as judge:
            assert await judge.prefer(GOOD, BAD, PROBLEM) is None
            assert await judge.prefer(BAD, GOOD, PROBLEM) is None


async def test_equal_texts_tie_unasked() -> None:
    with served(fair) as server:
        async with asking(server) as judge:
            assert await judge.prefer(GOOD, attempt("A good answer.", sample=1), PROBLEM) == 0.5
            assert not server.requests


async def test_a_pair_with_a_fault_is_not_shown() -> None:
    with served(fair) as server:
        async with asking(server) as judge:
            fault = attempt("A bad answer.", stop_reason=StopReason.ENVIRONMENT_FAULT)
            assert await judge.prefer(GOOD, fault, PROBLEM) is None
            assert judge.counts == {"environment fault": 1} and not server.requests


# -- servers that fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        (500, {"error": {"message": "overloaded"}}),
        (429, {}),
        (200, {"detail": "nonsense"}),
        (200, "text"),
        (200, {"choices": []}),
    ],
)
async def test_a_server_that_fails_now_and_then_is_asked_again(failure: Answer) -> None:
    calls: list[dict[str, Any]] = []

    def flaky(body: dict[str, Any]) -> Answer:
        calls.append(body)
        return failure if len(calls) % 3 else fair(body)

    with served(flaky) as server:
        async with asking(server, max_in_flight=1) as judge:
            assert await judge.prefer(GOOD, BAD, PROBLEM) == 1.0
    assert len(calls) == 6


async def test_an_answer_that_takes_too_long_is_asked_for_again() -> None:
    waiting, is_first = threading.Event(), iter([True])

    def slow(body: dict[str, Any]) -> Answer:
        if next(is_first, False):
            waiting.wait(600)
        return fair(body)

    with served(slow) as server:
        async with asking(server, timeout_s=1.0) as judge:
            assert await judge.prefer(GOOD, BAD, PROBLEM) == 1.0
        assert len(server.requests) >= 3
        waiting.set()


async def test_a_judge_that_dies_mid_run_pauses_it_and_the_resumed_run_asks_only_what_is_missing(
    tmp_path: Path,
) -> None:
    cache, pairs = tmp_path / "judge" / "answers.jsonl", [numbered(i) for i in range(6)]
    with served(fair) as server:
        async with asking(server, cache=cache, patience_s=0.3) as judge:
            before = [await judge.prefer(GOOD, other, PROBLEM) for other in pairs[:3]]
            server.stop()
            with pytest.raises(
                JudgeUnavailable, match=r"the judge judge cannot be asked: no server .* 0\.3 s"
            ):
                await judge.prefer(GOOD, pairs[3], PROBLEM)
            assert await judge.prefer(GOOD, pairs[0], PROBLEM) == 1.0  # what is known is still known
            server.start()
            resumed = LLMJudge(server.url, "judge", cache=cache)
            after = [await resumed.prefer(GOOD, other, PROBLEM) for other in pairs]
            await resumed.aclose()
    assert (before, after) == ([1.0] * 3, [1.0] * 6)
    assert resumed.counts == {"answers from the cache": 6, "requests": 6, "judged": 6}


async def test_the_same_judge_goes_on_when_its_server_is_back() -> None:
    with served(fair) as server:
        async with asking(server) as judge:
            server.stop()
            waiting = asyncio.create_task(judge.prefer(GOOD, BAD, PROBLEM))
            await asyncio.sleep(0.2)
            server.start()
            assert await waiting == 1.0


async def test_nonsense_for_pair_after_pair_pauses_the_run() -> None:
    def nonsense(body: dict[str, Any]) -> Answer:
        return says("I am a teapot.")

    with served(nonsense) as server:
        async with asking(server, max_asks=1, max_unlabelled=3) as judge:

            async def prefer(number: int, answer: Callable[[dict[str, Any]], Answer]) -> float | None:
                server.answer = answer
                return await judge.prefer(GOOD, numbered(number), PROBLEM)

            answers = [nonsense, nonsense, fair, nonsense, nonsense]  # never three in a row
            found = [await prefer(number, answer) for number, answer in enumerate(answers)]
            assert found == [None, None, 1.0, None, None]
            with pytest.raises(JudgeUnavailable, match="gave no verdict on 3 pairs in a row"):
                await prefer(5, nonsense)
            assert await prefer(5, nonsense) is None  # the count began anew
            assert await prefer(5, fair) == 1.0


async def test_one_request_that_is_refused_costs_its_pair_alone_but_a_wrong_key_ends_the_run() -> None:
    def picky(body: dict[str, Any]) -> Answer:
        too_long = "Number 1." in prompt_of(body)
        return (400, {"error": {"message": "maximum context length"}}) if too_long else fair(body)

    with served(picky) as server:
        async with asking(server) as judge:
            assert [await judge.prefer(GOOD, numbered(i), PROBLEM) for i in range(3)] == [1.0, None, 1.0]
            assert judge.counts["refused requests"] == 2
            server.answer = lambda _: (401, {"error": {"message": "invalid key"}})
            with pytest.raises(InputError, match="refuses with 401: invalid key"):
                await judge.prefer(GOOD, numbered(7), PROBLEM)


# -- the cache -----------------------------------------------------------------------------------------------


async def test_nothing_is_asked_twice_and_another_instruction_is_another_question(tmp_path: Path) -> None:
    cache = tmp_path / "answers.jsonl"
    with served(fair) as server:
        for options, num_requests in (({}, 2), ({}, 2), ({"instruction": "!" + INSTRUCTION}, 4), ({}, 4)):
            async with asking(server, cache=cache, **options) as judge:
                assert await judge.prefer(GOOD, BAD, PROBLEM) == 1.0
                assert await judge.prefer(BAD, GOOD, PROBLEM) == 0.0
            assert len(server.requests) == num_requests


async def test_the_cache_survives_kill_9(tmp_path: Path) -> None:
    """The process dies with the third pair in flight; what it was told until then is in the file."""
    cache, dying = tmp_path / "answers.jsonl", []

    def deadly(body: dict[str, Any]) -> Answer:
        if "Number 2." in prompt_of(body):
            os.kill(dying[0].pid, signal.SIGKILL)
        return fair(body)

    code = """
import asyncio, sys
from mtpo.judges import LLMJudge
from tests.test_llm_judge import GOOD, PROBLEM, numbered
async def main():
    judge = LLMJudge(sys.argv[1], "judge", cache=sys.argv[2])
    for number in range(100):
        assert await judge.prefer(GOOD, numbered(number), PROBLEM) == 1.0
sys.stdin.readline()
asyncio.run(main())
"""
    with served(deadly) as server:
        process = subprocess.Popen(
            [sys.executable, "-c", code, server.url, str(cache)], stdin=subprocess.PIPE, cwd=ROOT
        )
        dying.append(process)
        process.communicate(b"\n", timeout=300)
        assert process.returncode == -signal.SIGKILL
        assert len(AnswerLog(cache)) == 4
        server.answer = fair
        async with asking(server, cache=cache) as judge:
            assert [await judge.prefer(GOOD, numbered(i), PROBLEM) for i in range(3)] == [1.0] * 3
        assert judge.counts["answers from the cache"] == 4


def test_a_torn_last_line_is_cut_off_and_answers_go_on_after_it(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path)
    for name in ("one", "two", "three"):
        log.add(name, f"Better: {name}\n")
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        num_whole = whole[:cut].count(b"\n")
        torn = AnswerLog(path)
        assert len(torn) == num_whole
        torn.add("new", "1")
        again = AnswerLog(path)
        assert (len(again), again.get("new")) == (num_whole + 1, "1")


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"key": "a"}', ""])
def test_a_line_that_is_no_answer_is_refused_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(f'{{"key": "a", "answer": "b"}}\n{line}\n')
    with pytest.raises(InputError, match=r"answers\.jsonl, line 2: expected a judge's answer"):
        AnswerLog(path)


# -- bad input -----------------------------------------------------------------------------------------------


def test_bad_settings_are_refused_in_one_line() -> None:
    url = "http://127.0.0.1:1"
    bad: list[tuple[dict[str, Any], str]] = [
        ({"instruction": "Compare {first} with {second}."}, r"must hold \{question\} once, but holds it 0"),
        ({"instruction": "{question}{first}{first}{second}"}, r"\{first\} once, but holds it 2 times"),
        ({"verdict": "("}, "the judge's verdict pattern '\\('"),
        ({"verdict": "Better"}, "must have one group"),
        ({"max_asks": 0}, "max_asks must be at least 1, got 0"),
        ({"max_unlabelled": 0}, "max_unlabelled must be at least 1, got 0"),
    ]
    for options, reason in bad:
        with pytest.raises(InputError, match=reason):
            LLMJudge(url, "judge", **options)
    with pytest.raises(InputError, match="is no URL of a server"):
        LLMJudge("localhost", "judge")
