"""Let a model teach a simulated student, and make training pairs of the talks by a judge that compares whole ones.

    python -m recipes.dialogue --out runs/lessons
    python -m recipes.dialogue --model google/gemma-2-2b-it --student Qwen/Qwen2.5-1.5B-Instruct \\
        --topics topics.jsonl --judge llm --judge_urls http://10.0.0.7:8000 --judge_model NAME --out runs/lessons

Without --model a tiny Gemma 2 is first trained on a scripted teacher's lessons, which takes a minute. The scripted
student knows the built-in topics; a student that is a model takes any problems. OUT/dialogues has problems and
journal as recipes.generate leaves them, OUT/labels/pairs.jsonl the rows for recipes.train, and
OUT/labels/grades.jsonl how much each student understood, for recipes.view.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from tqdm import tqdm

from data.labels import LabelCounts, Row
from data.preferences import judged_pairs
from data.problems import load_problems, write_problems
from data.topics import lesson_demonstrations, lesson_problems
from data.trajectories import Journal, read_trajectories
from eval.metrics import bootstrap_interval
from mtpo.chat import ChatFormat
from mtpo.cli import run_recipe
from mtpo.dialogue import prefer_comprehension, transcript
from mtpo.errors import InputError
from mtpo.judges import CallableJudge
from mtpo.rollout import Decoding, RolloutLimits, rollout
from mtpo.runs import RunFolder, write_jsonl
from mtpo.training import train
from mtpo.trajectory import Problem, Trajectory
from recipes.engines import EngineOptions, Sampler
from recipes.generate import refuse_idle
from recipes.judges import COMPARISON, JUDGE_SERVERS, JudgeOptions
from recipes.quickstart import SUPERVISED
from recipes.sft import render_rows
from recipes.students import SCRIPTED, STUDENT_SERVERS, TEACHER, StudentOptions
from recipes.tiny import make_tiny_gemma2, train_tokenizer

SPEED_ONLY = frozenset({"max_in_flight", "engine", "engine_args", "urls"})


@dataclass(frozen=True, kw_only=True)
class Config(StudentOptions, JudgeOptions, EngineOptions):
    """Let a model teach a simulated student, and make training pairs of the talks."""

    out: str = field(metadata={"help": "run folder"})
    model: str | None = field(
        default=None, metadata={"help": "teacher: name or folder; by default a tiny one is trained first"}
    )
    system: str | None = field(
        default=None,
        metadata={"help": 'instructions of the teacher; by default short ones with --model, "" for none'},
    )
    student: str | None = field(
        default=SCRIPTED, metadata={"help": "scripted, or name or folder of the model that plays the student"}
    )
    topics: str | None = field(
        default=None, metadata={"help": "problems, as of recipes.generate; by default the built-in topics"}
    )
    limit: int | None = field(default=None, metadata={"help": "first topics only"})
    samples: int = field(default=8, metadata={"help": "talks per topic"})
    temperature: float = field(default=1.0, metadata={"help": "of teacher and student"})
    top_p: float = field(
        default=1.0, metadata={"help": "keep the most likely tokens of this total probability, of both"}
    )
    max_turns: int = field(default=6, metadata={"help": "turns of the teacher, which end a talk"})
    max_turn_tokens: int = field(default=128, metadata={"help": "sampled tokens of one turn of the teacher"})
    max_in_flight: int = field(default=64, metadata={"help": "talks under way at once"})
    judge: Literal["comprehension", "llm", "none"] = field(
        default="comprehension",
        metadata={
            "help": "by what the scripted student understood in the end, by a language model, or no pairs"
        },
    )
    per_problem: int = field(default=4, metadata={"help": "pairs of a topic"})
    demonstrations: int = field(default=3000, metadata={"help": "lessons that the tiny teacher learns from"})
    dtype: str = field(default="float32", metadata={"help": "float32, or bfloat16 to halve the memory"})
    seed: int = field(default=0, metadata={"help": "fixes every draw"})
    resume: bool = field(default=False, metadata={"help": "go on with an interrupted run"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            *("samples", "max_turns", "max_turn_tokens", "max_in_flight", "per_problem", "demonstrations"),
        ):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit must be at least 1, got {self.limit}")
        if self.temperature < 0:
            raise InputError(f"--temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top_p must be above 0 and at most 1, got {self.top_p}")
        if self.student is None:
            raise InputError("--student is missing: expected scripted, or name or folder of a model")
        self.check_student()
        for names, is_idle, why in (
            (["topics"], self.student == SCRIPTED, "the scripted student"),
            (["per_problem"], self.judge == "none", "--judge none"),
            (["demonstrations"], self.model is not None, "--model"),
        ):
            if is_idle:
                refuse_idle(self, names, f"with {why}")
        if self.judge == "comprehension" and self.student != SCRIPTED:
            raise InputError(
                "only what the scripted student understood is known: choose --judge llm or --judge none"
            )
        self.check_judge(self.judge)

    @property
    def instructions(self) -> str | None:
        """Of the teacher; the tiny one has learned without."""
        return self.system if self.system is not None or self.model is None else TEACHER

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.temperature, self.top_p)


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, dialogue, "recipes.dialogue", argv)


def dialogue(config: Config) -> str:
    problems = (lesson_problems() if config.topics is None else load_problems(config.topics))[: config.limit]
    teacher = Sampler.load(config.model, config, config.dtype) if config.model else None
    student = config.load_student(config.dtype)
    may_change = SPEED_ONLY | STUDENT_SERVERS | JUDGE_SERVERS
    folder = RunFolder.open(config.out, config, resume=config.resume, may_change=may_change)
    if teacher is None:
        teacher = Sampler.load(tiny_teacher(folder.path / "teacher", config), config, config.dtype)
    talks = asyncio.run(talk_into(folder.path / "dialogues", teacher, student, problems, config))
    write_jsonl(folder.path / "labels" / "grades.jsonl", map(grade_row, talks))
    found = summary(talks)
    if config.judge != "none":
        rows, counts, verdicts = asyncio.run(compare(folder.path / "labels", talks, problems, config))
        write_jsonl(folder.path / "labels" / "pairs.jsonl", rows)
        print(counts.table())
        found |= {"pairs": counts.num_rows, "judge": verdicts}
    folder.finish(found)
    return f"{describe(found)}: {folder.path}"


def tiny_teacher(out: Path, config: Config) -> Path:
    """Train a tiny Gemma 2 on the scripted teacher's lessons, unless that is done; the folder of the model."""
    if (out / "model").exists():
        return out / "model"
    shown = list(lesson_demonstrations(config.demonstrations, seed=config.seed, max_turns=config.max_turns))
    tokenizer = train_tokenizer(message["content"] for _, messages in shown for message in messages)
    rows = render_rows(ChatFormat.for_tokenizer(tokenizer), shown)
    settings = replace(SUPERVISED, warmup_steps=20, seed=config.seed)
    return train(make_tiny_gemma2(tokenizer, config.seed), rows, settings, out, tokenizer=tokenizer).model


async def talk_into(
    folder: Path, teacher: Sampler, student: Sampler | None, problems: Sequence[Problem], config: Config
) -> list[Trajectory]:
    """Hold the talks that `folder` lacks; all of them. Without a student there are scripted ones."""
    write_problems(folder / "problems.jsonl", problems)
    with Journal(folder / "trajectories") as journal:
        missing = len(problems) * config.samples - len(journal.done())
        if missing:
            async with contextlib.AsyncExitStack() as engines:
                engine = teacher.engine(config, config.max_in_flight)
                engines.push_async_callback(engine.aclose)
                opened = config.open_dialogue(student, config.decoding, config.max_in_flight)
                talks = rollout(
                    engine,
                    await engines.enter_async_context(opened),
                    teacher.chat,
                    problems,
                    samples=config.samples,
                    decoding=config.decoding,
                    limits=RolloutLimits(config.max_turns, config.max_turn_tokens),
                    seed=config.seed,
                    system=config.instructions,
                    policy=teacher.name,
                    skip=journal.done(),
                    max_in_flight=config.max_in_flight,
                )
                with tqdm(total=missing, desc="talks", unit="talk", delay=2) as progress:
                    async with contextlib.aclosing(talks):
                        async for talk in talks:
                            journal.append(talk)
                            progress.update()
    return list(read_trajectories(folder / "trajectories"))


async def compare(
    folder: Path, talks: Sequence[Trajectory], problems: Sequence[Problem], config: Config
) -> tuple[list[Row], LabelCounts, dict[str, int]]:
    """Pairs of talks, what became of all talks, and what the judge says of its work.

    Raises:
        JudgeUnavailable: the language model cannot be asked; its answers so far are in `folder`, for --resume.
    """
    options = {"per_problem": config.per_problem, "seed": config.seed}
    if config.judge == "comprehension":
        known = CallableJudge(prefer_comprehension)
        return *await judged_pairs(talks, problems, known, **options), dict(known.counts)
    asked = config.llm_judge(COMPARISON, folder / "verdicts.jsonl", transcript)
    async with contextlib.aclosing(asked):
        return *await judged_pairs(talks, problems, asked, **options), dict(asked.counts)


def grade_row(talk: Trajectory) -> dict[str, Any]:
    """A line of `grades.jsonl`: correct if the student understood everything, ungraded if nobody knows."""
    score, understood = talk.metadata.get("comprehension"), talk.metadata.get("understood", ())
    return {
        "problem_id": talk.problem_id,
        "sample": talk.sample,
        "verdict": "ungraded" if score is None else "correct" if score == 1 else "wrong",
        "rule": "comprehension",
        "answer": ", ".join(understood) or None,
        "stop_reason": talk.stop_reason.value,
    }


def summary(talks: Sequence[Trajectory]) -> dict[str, Any]:
    """Figures of all talks but those that a fault of the environment ended."""
    counted = [talk for talk in talks if talk.fault is None]
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for talk in counted:
        if (score := talk.metadata.get("comprehension")) is not None:
            scores[talk.problem_id].append(score)
    found: dict[str, Any] = {
        "talks": len(talks),
        "stop_reasons": dict(Counter(talk.stop_reason.value for talk in talks).most_common()),
        "ended_by": dict(Counter(talk.metadata.get("ended_by", "limit") for talk in counted).most_common()),
        "turns": fmean(talk.num_turns for talk in counted) if counted else None,
    }
    if scores:
        means = [fmean(own) for own in scores.values()]
        every = [score for own in scores.values() for score in own]
        found |= {
            "comprehension": fmean(means),
            "comprehension_ci": list(bootstrap_interval(means)),
            "understood_all": fmean(score == 1 for score in every),
        }
    return found


def describe(found: Mapping[str, Any]) -> str:
    parts = [f"{found['talks']} talks"]
    if "comprehension" in found:
        low, high = found["comprehension_ci"]
        parts.append(f"comprehension {found['comprehension']:.3f} ({low:.3f} to {high:.3f} over topics)")
        parts.append(f"{found['understood_all']:.0%} understood everything")
    if "pairs" in found:
        parts.append(f"{found['pairs']} pairs")
    return ", ".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
