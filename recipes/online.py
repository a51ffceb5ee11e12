"""Train a policy on trajectories that it samples on the way, against its opponents and by a judge.

    python -m recipes.online --method nash_md --model runs/sft/model --problems gsm8k:train --judge verifier \\
        --learning_rate 4e-7 --out runs/nash

Each round samples the prompts of the next --sync_steps steps with the method's samplers, has the judge compare, and
learns. OUT/rounds/ has every trajectory and preference, OUT/metrics.jsonl one line a step, OUT/model the policy;
OUT/eval.jsonl a line for each look at --eval_problems, and OUT/looks/ what was played there. After a crash,
or when the judge could not be asked and the run was paused, the same command with --resume goes on. Under torchrun or
accelerate (DDP) every process samples its own share of the prompts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from accelerate import PartialState

from data.problems import load_problems
from data.trajectories import Journal, read_trajectories
from mtpo.chat import ChatFormat
from mtpo.cli import run_recipe
from mtpo.errors import InputError
from mtpo.judges import INSTRUCTION, EfficiencyJudge, Judge, LLMJudge, VerifierJudge
from mtpo.models import load_model, load_tokenizer
from mtpo.runs import RunFolder
from mtpo.training.online import train_online
from mtpo.training.online_settings import OnlineSettings
from mtpo.training.table import Storage, Table
from mtpo.vocabularies import require_one_vocabulary
from recipes.engines import EngineOptions
from recipes.generate import OF_THE_OWN_SANDBOX, SamplingOptions, default_of, open_interpreter
from recipes.train import SPEED_ONLY, summary

JudgeName = Literal["verifier", "efficiency", "llm"]
KEY_VARIABLE = "JUDGE_API_KEY"
"""Environment variable with the bearer token of the judge's server, if it wants one."""
UNUSED = ("samples", "branch_turn", "branch_width")
"""Options of sampling that the method decides."""
MAY_CHANGE = SPEED_ONLY | {
    *OF_THE_OWN_SANDBOX,
    "sandbox_url",
    "execution_cache",
    "max_in_flight",
    "judge_urls",
    "max_skipped_steps",
}


@dataclass(frozen=True, kw_only=True)
class Config(SamplingOptions, OnlineSettings):
    """Train a policy on trajectories that it samples on the way, against its opponents and by a judge."""

    model: str = field(metadata={"help": "policy to start from: model name or folder"})
    problems: str = field(metadata={"help": "prompts, as in recipes.generate"})
    out: str = field(metadata={"help": "run folder"})
    judge: str = field(
        default="verifier",
        metadata={
            "help": "verifier (right beats wrong), efficiency (then fewer turns, tokens and errors) or llm"
        },
    )
    judge_urls: list[str] = field(
        default_factory=list, metadata={"help": "with --judge llm: replicas of its server, http://HOST:PORT"}
    )
    judge_model: str | None = field(
        default=None, metadata={"help": "with --judge llm: the name that it is served under"}
    )
    judge_instruction: str | None = field(
        default=None,
        metadata={"help": "with --judge llm: file of its prompt, with {question}, {first} and {second}"},
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
        of_engines = {option.name for option in fields(EngineOptions)}
        for option in fields(SamplingOptions):
            if option.name in of_engines.union(UNUSED) and getattr(self, option.name) != default_of(option):
                raise InputError(
                    f"--{option.name} has no effect: the policies sample in this process, as often as the method says"
                )
        if self.judge not in get_args(JudgeName):
            raise InputError(f"--judge is {self.judge!r}; expected one of {', '.join(get_args(JudgeName))}")
        for name in ("judge_urls", "judge_model", "judge_instruction"):
            if getattr(self, name) and self.judge != "llm":
                raise InputError(f"--{name} has no effect with --judge {self.judge}")
        if self.judge == "llm" and not (self.judge_urls and self.judge_model):
            raise InputError("--judge llm needs --judge_urls and --judge_model")


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, train_policy, "recipes.online", argv)


def train_policy(config: Config) -> str:
    problems = load_problems(config.problems, config.limit, strict=False)
    held_out = () if config.eval_problems is None else load_problems(config.eval_problems, strict=False)
    tokenizer = load_tokenizer(config.model)
    load = partial(load_model, dtype=config.weights_dtype, attention=config.attention)
    model, reference = load(config.model), None
    if config.reference is not None:
        reference, tokenizers = load(config.reference), (tokenizer, load_tokenizer(config.reference))
        models = {"policy": model, "reference": reference}
        require_one_vocabulary(models, tokenizers, purpose=f"--method {config.method}")
    folder = RunFolder.open(config.out, config, resume=config.resume, may_change=frozenset(MAY_CHANGE))
    table = Table(
        ChatFormat.for_tokenizer(tokenizer),
        lambda: open_interpreter(config),
        judge_of(config, folder.path),
        config.decoding,
        config.limits,
        config.system,
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
        InputError: there is no such instruction file, or it lacks a place.
    """
    if config.judge != "llm":
        return VerifierJudge() if config.judge == "verifier" else EfficiencyJudge()
    instruction = INSTRUCTION
    if config.judge_instruction is not None:
        instruction = Path(config.judge_instruction).read_text(encoding="utf-8")
    assert config.judge_model is not None
    return LLMJudge(
        config.judge_urls,
        config.judge_model,
        instruction=instruction,
        cache=out / f"verdicts-{PartialState().process_index}.jsonl",
        api_key=os.environ.get(KEY_VARIABLE),
    )


if __name__ == "__main__":
    raise SystemExit(main())
