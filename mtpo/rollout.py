"""The multi-turn loop: a policy and its environment take turns until the trajectory ends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import time
from collections.abc import AsyncGenerator, Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from mtpo.branching import Branching, BranchingTree
from mtpo.chat import ChatFormat
from mtpo.environment import (
    CodeEnvironment,
    Environment,
    EnvironmentSession,
    Interpreter,
    InterpreterSession,
    Reply,
)
from mtpo.errors import EngineError, EnvironmentFault, InputError
from mtpo.trajectory import Execution, Problem, Segment, StopReason, Trajectory

__all__ = [
    "Decoding",
    "Engine",
    "Generation",
    "Interpreter",
    "InterpreterSession",
    "RolloutLimits",
    "Sampling",
    "rollout",
    "turn_seed",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw one turn."""

    max_tokens: int
    stop_ids: tuple[int, ...]
    """Generation ends after the first of these; the stop id itself is part of what was sampled."""
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all tokens."""
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Generation:
    """What an engine sampled for one turn."""

    ids: tuple[int, ...]
    logps: tuple[float, ...] | None
    """log p of each id at temperature 1, before any truncation of the distribution, in nats."""
    finish_reason: Literal["stop", "length"]
    """`stop`: the last id is one of the stop ids. `length`: the tokens, or the context, ran out."""
    is_from_text: bool = False
    """`ids` are a tokenizer's reading of returned text and not what was sampled: nothing to train on."""
    log_normalizers: tuple[float, ...] | None = None
    """log Z at each id, in nats, if a geometric mixture was sampled from: 0 where both of its models agree."""


class Engine(Protocol):
    """Token ids in, sampled token ids out. Cancelling a call frees what it held."""

    @property
    def max_context(self) -> int:
        """The longest prompt plus completion, in tokens."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the weights that are served."""
        ...

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        """Sample one turn after `prompt_ids`.

        Args:
            session: the trajectory that the turn belongs to. Turns of one session share a prefix, so an
                engine may keep its cache, or route them to one server.

        Raises:
            EngineError: nothing could be generated.
            InputError: the prompt leaves no room for a single token.
        """
        ...

    def release(self, session: str) -> None:
        """The session will not come back; forget its cache. Unknown sessions are ignored."""
        ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Decoding:
    """How to draw tokens: the fields of `Sampling` that do not change between turns."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class RolloutLimits:
    """When to stop. The defaults are those of arXiv 2409.02392."""

    max_turns: int = 6
    max_turn_tokens: int = 512
    max_tokens: int | None = None
    """Sampled tokens of the whole trajectory; None leaves it to the turns."""
    tool_timeout_s: float = 5.0
    """Seconds that one code block may run."""
    max_retries: int = 2
    """How often a trajectory that met an environment fault is started again."""
    max_seconds: float | None = None
    """Wall seconds after which a trajectory takes no further turn; None sets no limit."""


async def rollout(
    engine: Engine,
    environment: Environment | Interpreter,
    chat: ChatFormat,
    problems: Iterable[Problem],
    *,
    samples: int = 1,
    first_sample: int = 0,
    decoding: Decoding = Decoding(),
    limits: RolloutLimits = RolloutLimits(),
    seed: int = 0,
    system: str | None = None,
    policy: str = "",
    iteration: int = 0,
    skip: Container[tuple[str, int]] = frozenset(),
    max_in_flight: int = 64,
    branching: Branching | Sequence[Branching] = (),
    is_stopping: Callable[[], bool] = lambda: False,
) -> AsyncGenerator[Trajectory, None]:
    """Sample `samples` trajectories of each problem, yielding each as soon as it is finished.

    Every trajectory is one coroutine, so none waits for another's turn. At most `max_in_flight` are
    under way; one that is finished but not yet taken counts, so a slow consumer slows the rollout down.
    Closing the generator cancels what is in flight.

    Args:
        environment: what the turns act on; an interpreter runs their code, within `limits.tool_timeout_s`.
        first_sample: index of the first sample of each problem.
        skip: (problem id, sample) pairs that are not wanted, for resuming.
        seed: with the problem, sample and turn it fixes every draw.
        system: instructions for the model, in the family's system turn or before the question: `ChatFormat.prompt`.
        branching: each block of `width` samples shares the turns before `turn`, and the environment's state
            then. Several, of increasing turns, make a tree: every continuation of one branches again at the
            next, and a block is the product of the widths. A sample whose beginning ends before its own
            turns parts one branching earlier, at last at the start.
        is_stopping: once it says yes, nothing new is started, and what is in flight is finished.

    Raises:
        InputError: `samples` or `first_sample` is no multiple of the width of `branching`, or its turns do not
            increase.
    """
    tree = BranchingTree((branching,) if isinstance(branching, Branching) else tuple(branching))
    width = tree.width
    if samples % width or first_sample % width:
        raise InputError(
            f"samples ({samples}, from {first_sample}) must be a multiple of the branching width {width}"
        )
    blocks = (
        (problem, wanted)
        for problem in problems
        for root in range(first_sample, first_sample + samples, width)
        if (wanted := [s for s in range(root, root + width) if (problem.id, s) not in skip])
    )
    # The samples of a problem begin one after the other and share its prompt.
    prompt = functools.lru_cache(maxsize=16)(functools.partial(chat.prompt, system=system))
    if not isinstance(environment, Environment):
        environment = CodeEnvironment(environment, limits.tool_timeout_s)
    player = _Player(engine, environment, chat, prompt, decoding, limits, seed, policy, iteration, tree)
    running: set[asyncio.Task[list[Trajectory]]] = set()
    finished: asyncio.Queue[asyncio.Task[list[Trajectory]]] = asyncio.Queue()
    try:
        while True:
            room = max_in_flight // width - len(running)
            for block in itertools.islice(blocks, 0 if is_stopping() else max(room, not running)):
                task = asyncio.create_task(player.play_block(*block))
                task.add_done_callback(finished.put_nowait)
                running.add(task)
            if not running:
                return
            task = await finished.get()
            running.discard(task)
            for trajectory in task.result():
                yield trajectory
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def turn_seed(seed: int, problem_id: str, sample: int, turn: int, *who: str) -> int:
    """A 63-bit seed for one turn: the same in every process, and unlike that of any other turn.

    Args:
        who: whose draws it is for, where that is not the model.
    """
    key = json.dumps([seed, problem_id, sample, turn, *who]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


@dataclass
class _Tape:
    """A trajectory in the making."""

    segments: list[Segment]
    executions: list[Execution] = field(default_factory=list)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    is_from_text: bool = False
    fault: str | None = None
    generate_s: float = 0.0
    execute_s: float = 0.0
    started_at: float = field(default_factory=time.monotonic)

    def copy(self) -> _Tape:
        return replace(self, segments=list(self.segments), executions=list(self.executions))

    @property
    def ids(self) -> list[int]:
        return list(itertools.chain.from_iterable(segment.ids for segment in self.segments))

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def num_turns(self) -> int:
        return sum(s.kind == "action" for s in self.segments)

    @property
    def num_action_tokens(self) -> int:
        return sum(len(s.ids) for s in self.segments if s.kind == "action")

    def is_own(self, own_from: int) -> bool:
        """Whether it got as far as the turn from which on its sample draws for itself."""
        return own_from == 0 or self.num_turns > own_from


@dataclass(frozen=True)
class _Player:
    engine: Engine
    environment: Environment
    chat: ChatFormat
    prompt: Callable[[str], Segment]
    decoding: Decoding
    limits: RolloutLimits
    seed: int
    policy: str
    iteration: int
    tree: BranchingTree

    async def play_block(self, problem: Problem, wanted: Sequence[int]) -> list[Trajectory]:
        """The `wanted` samples of one block, in ascending order."""
        if len(wanted) == 1:
            return [await self.play(problem, wanted[0])]
        found: dict[int, Trajectory] = {}
        await self._grow(self._begin(problem), self.environment.begin(problem), problem, wanted, found)
        # A fault, a want of kernels to fork into, or a beginning that ended too early: from the start, each for
        # itself and with its retries.
        missing = [sample for sample in wanted if sample not in found]
        again = await asyncio.gather(*(self.play(problem, sample) for sample in missing))
        found |= dict(zip(missing, again, strict=True))
        return [found[sample] for sample in wanted]

    async def _grow(
        self,
        tape: _Tape,
        session: EnvironmentSession,
        problem: Problem,
        samples: Sequence[int],
        found: dict[int, Trajectory],
    ) -> None:
        """Go on from a state that the samples share, and from where they part with a copy for each part.

        What is played to its end is put into `found`; a fault of the environment leaves its samples out.
        """
        first, parting = samples[0], self.tree.parting_turn(samples)
        own_from = self.tree.first_own_turns(first)[0]
        copies: list[asyncio.Task[None]] = []
        try:
            with contextlib.suppress(EnvironmentFault):
                async with session:
                    reason = await self._fill(tape, session, problem, first, own_from, until=parting)
                    if reason is not None:
                        if tape.is_own(own_from):
                            found[first] = self._trajectory(tape, problem, first, own_from, reason)
                        return
                    assert parting is not None
                    for _, part in itertools.groupby(samples, lambda s: self.tree.owner(s, parting)):
                        grow = self._grow(tape.copy(), await session.fork(), problem, list(part), found)
                        copies.append(asyncio.create_task(grow))
            await asyncio.gather(*copies)
        except BaseException:
            for task in copies:
                task.cancel()
            await asyncio.gather(*copies, return_exceptions=True)
            raise

    def _begin(self, problem: Problem) -> _Tape:
        return _Tape([self.prompt(problem.question)])

    async def play(self, problem: Problem, sample: int) -> Trajectory:
        """One trajectory from the start, with the draws of others in the turns that it shares with them."""
        for own_from in self.tree.first_own_turns(sample):
            tape, reason = await self._play_with_retries(problem, sample, own_from)
            if tape.fault is not None or tape.is_own(own_from):  # else it is another sample all over again
                return self._trajectory(tape, problem, sample, own_from, reason)
        raise AssertionError("unreachable: from turn 0 on all is its own")

    async def _play_with_retries(
        self, problem: Problem, sample: int, own_from: int
    ) -> tuple[_Tape, StopReason]:
        """Play from the start; again if a fault comes between, and record it when it persists."""
        for retries_left in reversed(range(self.limits.max_retries + 1)):
            tape = self._begin(problem)
            try:
                async with self.environment.begin(problem) as session:
                    reason = await self._fill(tape, session, problem, sample, own_from)
                assert reason is not None
                return tape, reason
            except EnvironmentFault as error:
                logger.warning("%s sample %d: %s (%d retries left)", problem.id, sample, error, retries_left)
                if not retries_left:
                    tape.fault = f"{type(error).__name__}: {error}"
                    return tape, StopReason.ENVIRONMENT_FAULT
        raise AssertionError("unreachable: max_retries is not negative")

    async def _fill(
        self,
        tape: _Tape,
        session: EnvironmentSession,
        problem: Problem,
        sample: int,
        own_from: int,
        until: int | None = None,
    ) -> StopReason | None:
        """Take turns, from where the tape ends.

        Args:
            own_from: the first turn that the sample draws for itself; before it the tree says who draws.

        Returns:
            Why the trajectory ended; None when turn `until` is the next.
        """
        name = f"{problem.id}/{sample}"
        try:
            for turn in range(len(tape.segments) // 2, self.limits.max_turns):
                if turn == until:
                    return None
                if self._is_late(tape):
                    return StopReason.TIME_LIMIT
                owner = sample if turn >= own_from else self.tree.owner(sample, turn)
                seed = turn_seed(self.seed, problem.id, owner, turn)
                reason = await self._act(tape, seed, name)
                if reason is not None:
                    return reason
                seed = turn_seed(self.seed, problem.id, owner, turn, "environment")
                reply = await self._ask(tape, session, seed, is_last=turn + 1 == self.limits.max_turns)
                if not isinstance(reply, Reply):
                    return reply
                if not self._observe(tape, reply):
                    return StopReason.CONTEXT_LIMIT
            raise AssertionError("unreachable: the last turn returns")
        finally:
            tape.metadata = dict(session.metadata)
            self.engine.release(name)

    def _is_late(self, tape: _Tape) -> bool:
        """Whether the wall time is used up; a trajectory always has its first turn."""
        limit, has_acted = self.limits.max_seconds, len(tape.segments) > 1
        return limit is not None and has_acted and time.monotonic() - tape.started_at > limit

    async def _act(self, tape: _Tape, seed: int, session_name: str) -> StopReason | None:
        """Sample one turn; the reason to stop if a limit cut it short."""
        prompt = tape.ids
        budgets = {StopReason.CONTEXT_LIMIT: self.engine.max_context - len(prompt)}
        budgets[StopReason.TOKEN_LIMIT] = self.limits.max_turn_tokens
        if self.limits.max_tokens is not None:
            left = self.limits.max_tokens - tape.num_action_tokens
            budgets[StopReason.TOKEN_LIMIT] = min(self.limits.max_turn_tokens, left)
        limit = min(budgets, key=lambda reason: budgets[reason])
        if budgets[limit] < 1:
            return limit
        sampling = Sampling(
            max_tokens=budgets[limit],
            stop_ids=self.chat.stop_ids,
            temperature=self.decoding.temperature,
            top_p=self.decoding.top_p,
            top_k=self.decoding.top_k,
            min_p=self.decoding.min_p,
            seed=seed,
        )
        started = time.perf_counter()
        turn = await self.engine.generate(prompt, sampling, session=session_name)
        tape.generate_s += time.perf_counter() - started
        if not turn.ids:
            raise EngineError("the engine returned no token")
        tape.is_from_text |= turn.is_from_text
        tape.segments.append(Segment("action", turn.ids, turn.logps, self.chat.action_text(turn.ids)))
        return limit if turn.finish_reason == "length" else None

    async def _ask(
        self, tape: _Tape, session: EnvironmentSession, seed: int, *, is_last: bool
    ) -> Reply | StopReason:
        """What the environment makes of the turn that was just taken; a reply only if the model can read it."""
        late = StopReason.TIME_LIMIT if self._is_late(tape) else None
        limit = StopReason.TURN_LIMIT if is_last else late
        started = time.perf_counter()
        reply = await session.take(tape.segments[-1].text, seed=seed, limit=limit)
        if not isinstance(reply, Reply):
            return reply
        tape.execute_s += time.perf_counter() - started
        return limit or reply

    def _observe(self, tape: _Tape, reply: Reply) -> bool:
        """Append what the model reads next; False if no token would fit after it."""
        if reply.execution is not None:
            tape.executions.append(reply.execution)
        action = tape.segments[-1]
        if len(action.ids) > 1 and action.ids[-1] != self.chat.end_of_turn_id:
            # The end of the sequence was sampled where the dialogue goes on: leave it out of the context.
            logps = action.logps and action.logps[:-1]
            tape.segments[-1] = action = Segment("action", action.ids[:-1], logps, action.text)
        observation = self.chat.observation(reply.text, after=action.ids, role=reply.role)
        if tape.num_tokens + len(observation.ids) >= self.engine.max_context:
            return False
        tape.segments.append(observation)
        return True

    def _trajectory(
        self,
        tape: _Tape,
        problem: Problem,
        sample: int,
        own_from: int,
        reason: StopReason,
    ) -> Trajectory:
        has_branched = own_from > 0 and tape.is_own(own_from)
        segments = tape.segments
        if segments[-1].kind == "observation":  # a fault, or a limit, came before the action that answers it
            segments = segments[:-1]
        return Trajectory(
            problem_id=problem.id,
            sample=sample,
            segments=tuple(segments),
            stop_reason=reason,
            executions=tuple(tape.executions),
            bos_id=self.chat.bos_id,
            policy=self.policy,
            fingerprint=self.engine.fingerprint,
            iteration=self.iteration,
            seed=self.seed,
            generate_s=round(tape.generate_s, 4),
            execute_s=round(tape.execute_s, 4),
            fault=tape.fault,
            is_from_text=tape.is_from_text,
            parent=self.tree.owner(sample, own_from - 1) if has_branched else None,
            branch_turn=own_from if has_branched else None,
            metadata=tape.metadata,
        )
