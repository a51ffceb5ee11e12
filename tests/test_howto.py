"""The examples of docs/howto.md work as they stand there."""

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

from mtpo.environment import Environment
from mtpo.rollout import RolloutLimits, rollout
from mtpo.trajectory import Problem, StopReason, Trajectory
from tests.scripted import ScriptedEngine, gemma_chat

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "howto.md").read_text()


SHORT = {
    "recipes.dialogue": "--demonstrations 200 --samples 1 --limit 3 --max_turns 2 --max_turn_tokens 24",
    "recipes.online": "--batch_size 3 --epochs 2 --eval_steps 1 --max_turns 2 --max_turn_tokens 24",
}
"""What makes the commands of the page quick."""


def example(defines: str) -> dict[str, Any]:
    """What the page's one block of Python with this definition defines."""
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if defines in b]
    names: dict[str, Any] = {}
    exec(block, names)
    return names


async def played(*turns: str) -> Trajectory:
    guessing: Environment = example("class Guessing:")["Guessing"]()
    chat = gemma_chat()
    problem = Problem("p", "Which number between 1 and 100 do I think of?", "42")
    limits = RolloutLimits(max_turns=3)
    engine = ScriptedEngine(chat, *turns)
    (trajectory,) = [t async for t in rollout(engine, guessing, chat, [problem], samples=1, limits=limits)]
    return trajectory


async def test_the_environment_answers_until_the_guess_is_right() -> None:
    trajectory = await played("50?", "40?", "It is 42.")
    assert trajectory.stop_reason is StopReason.ANSWERED
    assert [s.text for s in trajectory.segments if s.kind == "observation"] == ["lower", "higher"]


async def test_the_environment_says_when_the_turns_ran_out() -> None:
    assert (await played("50?", "40?", "41?")).stop_reason is StopReason.TURN_LIMIT


async def test_the_judge_prefers_the_shorter_of_two() -> None:
    judge = example("judge = CallableJudge")["judge"]
    short, long = await played("42"), await played("50?", "42")
    problem = Problem("p", "?", "42")
    assert await judge.prefer(short, long, problem) == 1
    assert await judge.prefer(long, short, problem) == 0


def test_the_commands_that_train_online_in_a_dialogue_do(tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    (block,) = [block for block in blocks if "--student scripted" in block]
    for line in block.replace("\\\n", " ").replace("runs/", f"{tmp_path}/").splitlines():
        _, _, name, *argv = shlex.split(line)
        assert importlib.import_module(name).main([*argv, *SHORT[name].split()]) == 0
    looks = [json.loads(line) for line in (tmp_path / "taught" / "eval.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, 1, 2]
    assert all(look["eval_num/played"] == 3 for look in looks)
