"""How evenly sticky routing loads its servers, with the escape from crowded ones and without: a simulation."""

from __future__ import annotations

import contextlib
import heapq
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mtpo.engines.routing import Router

NUM_SERVERS = 8
NUM_SESSIONS = 512
"""In flight; when one has had all its turns, another takes its place."""
SECONDS = 600.0
AWAY_S = (200.0, 260.0)
"""When half of the servers are away, where they are."""


@dataclass(frozen=True, slots=True)
class Balance:
    """What the simulated requests met."""

    max_over_mean: float
    """Requests in flight on the fullest server, over the mean of all servers; averaged over time."""
    worst: float
    """The same at the moment when it was largest."""
    share_at_home: float
    """Of the later turns of a session, those that went where the turn before went."""


class NeverLeaving(Router):
    """Sticky without an escape."""

    def _choose(self, session: str, usable: Collection[int]) -> int:
        home = self._homes.get(session)
        return home if home is not None and home in usable else super()._choose(session, usable)


def simulate(router: Router, max_turns: int, *, half_is_away: bool = False, seed: int = 0) -> Balance:
    """Sessions of up to `max_turns` turns of about 10 s, with pauses for their tools of about 2 s, both log-normal."""
    rng = random.Random(seed)
    turns: dict[str, int] = {}
    last: dict[str, int] = {}
    numbers = iter(range(10**9))
    num_later = num_stayed = 0
    total = worst = 0.0
    open_requests: dict[str, contextlib.AbstractContextManager[int]] = {}
    events: list[tuple[float, str, bool]] = []

    def begin_session(at: float) -> None:
        name = f"session {next(numbers)}"
        turns[name] = rng.randint(1, max_turns)
        heapq.heappush(events, (at, name, True))

    for _ in range(NUM_SESSIONS):
        begin_session(rng.uniform(0.0, 10.0))
    now = 0.0
    while True:
        at, name, is_start = heapq.heappop(events)
        if at > SECONDS:
            return Balance(total / (SECONDS - 20.0), worst, num_stayed / num_later)
        if at > 20.0:  # after all have begun
            imbalance = max(router.in_flight) * NUM_SERVERS / max(1, sum(router.in_flight))
            total += (at - max(now, 20.0)) * imbalance
            worst = max(worst, imbalance)
        now = at
        if is_start:
            first = NUM_SERVERS // 2 if half_is_away and AWAY_S[0] <= now < AWAY_S[1] else 0
            route = open_requests[name] = router.route(name, range(first, NUM_SERVERS))
            server = route.__enter__()
            num_later += name in last
            num_stayed += last.get(name) == server
            last[name] = server
            heapq.heappush(events, (now + 10.0 * rng.lognormvariate(0.0, 0.8), name, False))
            continue
        open_requests.pop(name).__exit__(None, None, None)
        turns[name] -= 1
        if turns[name]:
            heapq.heappush(events, (now + 2.0 * rng.lognormvariate(0.0, 1.2), name, True))
        else:
            router.release(name)
            begin_session(now)


def report() -> Iterator[str]:
    yield f"sticky routing of {NUM_SESSIONS} sessions to {NUM_SERVERS} servers, simulated"
    for scenario, max_turns, half_is_away in (
        ("1-6 turns", 6, False),
        ("1-60 turns, half of the servers away for a minute", 60, True),
    ):
        for label, router in (("with the escape", Router), ("without", NeverLeaving)):
            found = simulate(router(NUM_SERVERS), max_turns, half_is_away=half_is_away)
            yield (
                f"  {scenario}, {label}: the fullest has {found.max_over_mean:.2f} of the mean, at worst "
                f"{found.worst:.2f}; {found.share_at_home:.1%} of later turns stay"
            )
