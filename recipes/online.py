"""Train a policy on trajectories that it samples on the way, against its opponents and by a judge.

    python -m recipes.online --method nash_md --model runs/sft/model --problems gsm8k:train --judge verifier \\
        --learning_rate 4e-7 --out runs/nash
    python -m recipes.online --method mtpo --model runs/lessons/teacher/model --system "" --student scripted \\
        --problems runs/lessons/dialogues/problems.jsonl --judge comprehension --learning_rate 1e-4 --out runs/talks

Each round samples the prompts of the next --sync_steps steps with the method's samplers, has the judge compare, and
learns. OUT/rounds/ has every trajectory and preference, OUT/metrics.jsonl one line a step, OUT/model the policy;
OUT/eval.jsonl a line for each look at --eval_problems, and OUT/looks/ what was played there. After a crash,
or when the judge could not be asked and the run was paused, the same command with --resume goes on. Under torchrun or
accelerate (DDP) every process samples its own share of the prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from accelerate import PartialState

from data.problems import load_problems
from data.trajectories import Journal, read_trajectories
from mtpo.chat import ChatFormat
from mtpo.cli import run_recipe
from mtpo.dialogue import prefer_comprehension, transcript
from mtpo.environment import Environment, Interpreter
from mtpo.errors import InputError
from mtpo.judges import INSTRUCTION, CallableJudge, EfficiencyJudge, Judge, VerifierJudge
from mtpo.models import load_model, load_tokenizer
from mtpo.runs import RunFolder
from mtpo.training.online import train_online
from mtpo.training.online_settings import OnlineSettings
from mtpo.training.table import Storage, Table
from mtpo.vocabularies import require_one_vocabulary
from recipes.engines import EngineOptions
from recipes.generate import OF_THE_OWN_SANDBOX, SamplingOptions, open_interpreter, refuse_idle
from recipes.judges import COMPARISON, JUDGE_SERVERS, JudgeOptions
from recipes.students import SCRIPTED, STUDENT_SERVERS, TEACHER, StudentOptions
from recipes.train import SPEED_ONLY, summary

JudgeName = Literal["verifier", "efficiency", "comprehension", "llm"]
UNUSED = ("samples", "branch_turn", "branch_width")
"""Options of sampling that the method decides."""
OF_ANY_SANDBOX = (*OF_THE_OWN_SANDBOX, "sandbox_url", "execution_cache")
MAY_CHANGE = (
    SPEED_ONLY | STUDENT_SERVERS | JUDGE_SERVERS | {*OF_ANY_SANDBOX, "max_in_flight", "max_skipped_steps"}
)


@dataclass(frozen=True, kw_only=True)
class Config(StudentOptions, JudgeOptions, SamplingOptions, OnlineSettings):
    """Train a policy on trajectories that it samples on the way, against its opponents and by a judge."""

    model: str = field(metadata={"help": "policy to start from: model name or folder"})
    problems: str = field(metadata={"help": "prompts, as in recipes.generate"})
    out: str = field(metadata={"help": "run folder"})
    judge: str = field(
        default="verifier",
        metadata={
            "help": "verifier (right beats wrong), efficiency (then fewer turns, tokens and errors), llm, or with "
            "--student scripted comprehension (by what it understood)"
        },
    )
    limit: int | None = field(default=None, metadata={"help": "first problems only"})
    eval_problems: str | None = field(
        default=None,
        metadata={
            "help": "held-out prompts, as --problems: how the policy does there against its reference and the policy "
            "of the look before goes to OUT/eval.jsonl"
        },
    )
    reference: str | None = field(
        default=None, metadata={"help": "reference policy; by default --model as it starts"}
    )
    attention: str | None = field(default=None, metadata={"help": "attention; by default an exact one"})
    resume: bool = field(default=False, metadata={"help": "go on with an interrupted run"})

    def __post_init__(self) -> None:
        SamplingOptions.__post_init__(self)
        OnlineSettings.__post_init__(self)
        unused = [*UNUSED, *(option.name for option in fields(EngineOptions))]
        refuse_idle(self, unused, "here: the policies sample in this process, as often as the method says")
        if self.judge not in get_args(JudgeName):
            raise InputError(f"--judge is {self.judge!r}; expected one of {', '.join(get_args(JudgeName))}")
        self.check_judge(self.judge)
        self.check_student()
        if self.student is not None:
            refuse_idle(self, [*OF_ANY_SANDBOX, "tool_timeout_s"], "with --student: nobody runs code")
            if self.judge in ("verifier", "efficiency"):
                raise InputError(
                    f"--judge {self.judge} grades answers, which a dialogue has none of: take comprehension or llm"
                )
        if self.judge == "comprehension" and self.student != SCRIPTED:
            raise InputError("--judge comprehension needs --student scripted: of others it is not known")


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, train_policy, "recipes.online", argv)


def train_policy(config: Config) -> str:
    problems = load_problems(config.problems, config.limit, strict=False)
    student = config.load_student(config.weights_dtype)
    held_out = () if config.eval_problems is None else load_problems(config.eval_problems, strict=False)
    tokenizer = load_tokenizer(config.model)
    load = partial(load_model, dtype=config.weights_dtype, attention=config.attention)
    model, reference = load(config.model), None
    if config.reference is not None:
        reference, tokenizers = load(config.reference), (tokenizer, load_tokenizer(config.reference))
        models = {"policy": model, "reference": reference}
        require_one_vocabulary(models, tokenizers, purpose=f"--method {config.method}")
    folder = RunFolder.open(config.out, config, resume=config.resume, may_change=frozenset(MAY_CHANGE))

    def environment() -> AbstractAsyncContextManager[Environment | Interpreter]:
        if config.student is None:
            return open_interpreter(config)
        return config.open_dialogue(student, config.decoding, config.max_in_flight)

    table = Table(
        ChatFormat.for_tokenizer(tokenizer),
        environment,
        judge_of(config, folder.path),
        config.decoding,
        config.limits,
        TEACHER if config.system is None and config.student is not None else config.system,
        config.max_in_flight,
    )
    result = train_online(
        model,
        problems,
        config,
        table,
        Storage(Journal, read_trajectories),
        folder.path,
        eval_problems=held_out,
        reference_model=reference,
        tokenizer=tokenizer,
        resume=config.resume,
    )
    folder.finish(summary(result))
    return (
        f"{result.num_steps} steps of {config.method} on {result.num_rows} prompts; model in {result.model}"
    )


def judge_of(config: Config, out: Path) -> Judge:
    """
    Raises:
        InputError: the instruction of a language model lacks a place, or a URL is none.
    """
    if config.judge == "comprehension":
        return CallableJudge(prefer_comprehension)
    if config.judge != "llm":
        return VerifierJudge() if config.judge == "verifier" else EfficiencyJudge()
    cache = out / f"verdicts-{PartialState().process_index}.jsonl"
    if config.student is None:
        return config.llm_judge(INSTRUCTION, cache)
    return config.llm_judge(COMPARISON, cache, transcript)


if __name__ == "__main__":
    raise SystemExit(main())
