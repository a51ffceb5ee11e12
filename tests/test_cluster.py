"""Rollouts over a Ray cluster of two nodes, one of which is killed in the middle."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from data.trajectories import Journal, read_trajectories
from mtpo.cluster import Crew, connect
from mtpo.engines.cluster import ClusterEngine, EngineActor
from mtpo.errors import EngineError, EnvironmentFault, InputError
from mtpo.rollout import Sampling
from mtpo.trajectory import Trajectory
from recipes import generate
from sandbox.cluster import ClusterInterpreter
from tests.cluster_parts import Echo, make_pool, unusable
from tests.coin import SHORT, write_problems_file

ray = pytest.importorskip("ray", reason="Ray is not installed")

NO_CPU = {"num_cpus": 0}
SAMPLING = Sampling(1, (0,))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A node for the driver, without a CPU, and two with room for an engine and a pool each."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    cluster.add_node(num_cpus=2)
    cluster.add_node(num_cpus=2)
    connect(str(cluster.address))
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def echoes(cluster: Any) -> AsyncIterator[ClusterEngine]:
    engine = ClusterEngine(Echo, 2, NO_CPU)
    yield engine
    await engine.aclose()


@pytest.mark.asyncio(loop_scope="module")
async def test_turns_of_a_session_go_to_one_replica_and_those_of_others_elsewhere(
    echoes: ClusterEngine,
) -> None:
    assert (echoes.max_context, echoes.fingerprint) == (100, "echo")
    assert len({(await echoes.generate([5], SAMPLING, session="a")).ids for _ in range(4)}) == 1
    both = await asyncio.gather(*(echoes.generate([5], SAMPLING, session=str(i)) for i in range(8)))
    assert len({generation.ids for generation in both}) == 2


@pytest.mark.asyncio(loop_scope="module")
async def test_what_a_replica_raises_is_raised_here(echoes: ClusterEngine) -> None:
    with pytest.raises(InputError, match=r"^a prompt of 1$"):
        await echoes.generate([1], SAMPLING)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_cancelled_call_does_not_hold_up_the_next(echoes: ClusterEngine) -> None:
    call = asyncio.create_task(echoes.generate([2], SAMPLING))
    await asyncio.sleep(0.1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await echoes.generate([5], SAMPLING)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_request_that_kills_every_replica_is_given_up_and_they_come_back(
    echoes: ClusterEngine,
) -> None:
    with pytest.raises(EngineError, match="3 replicas were lost over one request"):
        await echoes.generate([0], SAMPLING)
    assert (await echoes.generate([5], SAMPLING)).finish_reason == "stop"


async def test_sessions_keep_their_state_fork_and_are_a_fault_once_their_pool_is_lost(cluster: Any) -> None:
    async with ClusterInterpreter(make_pool, 1, NO_CPU) as interpreter, interpreter.session() as session:
        assert (await session.execute("x = 6", 20)).status == "ok"
        async with await session.fork() as copy:
            assert (await copy.execute("x += 1; x", 20)).text == "7"
        assert (await session.execute("x * 7", 20)).text == "42"
        ray.kill(interpreter.crew.actors[0], no_restart=False)
        with pytest.raises(EnvironmentFault):  # the kill may arrive after the next cell
            while True:
                await session.execute("x", 20)
        async with interpreter.session() as another:
            assert (await another.execute("2 + 2", 20)).text == "4"


def test_actors_that_cannot_start_are_one_line(cluster: Any) -> None:
    with pytest.raises(InputError, match=r"no actor came up on the cluster.*there is no such model"):
        ClusterEngine(unusable, 1, NO_CPU)


def test_a_cluster_without_room_is_one_line(cluster: Any) -> None:
    with pytest.raises(InputError, match="has the cluster room for it"):
        Crew(EngineActor, Echo, 1, {"num_cpus": 1000}, patience_s=0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ray_pools", "2"], "--ray_pools has no effect without --ray"),
        (["--ray", "local", "--ray_engines", "0"], "--ray_engines must be at least 1, got 0"),
        (
            ["--ray", "local", "--ray_engines", "2", "--engine", "openai", "--urls", "http://a"],
            "--ray_engines and --ray_gpus have no effect with --engine openai: it has --urls",
        ),
        (
            ["--ray", "local", "--ray_pools", "2", "--sandbox_url", "http://a"],
            "--ray_pools has no effect with --sandbox_url: the service has its own",
        ),
    ],
)
def test_options_without_an_effect_are_refused(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["--model", "m", "--problems", "p", "--out", "o", *flags]) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


def told(folder: Path) -> dict[tuple[str, int], Any]:
    found = list(read_trajectories(folder / "trajectories"))
    by_key = {
        (t.problem_id, t.sample): (t.input_ids, t.stop_reason, [e.text for e in t.executions], t.fault)
        for t in found
    }
    assert len(by_key) == len(found)
    return by_key


@pytest.mark.slow
def test_a_node_killed_in_the_middle_loses_nothing_and_doubles_nothing(
    cluster: Any, coin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = write_problems_file(tmp_path / "problems.jsonl", "train", 12)
    common = ["--model", str(coin), "--problems", str(problems), "--samples", "2", "--seed", "3", *SHORT]
    common += ["--max_in_flight", "8"]
    assert generate.main([*common, "--out", str(tmp_path / "here")]) == 0

    append, finished = Journal.append, []
    doomed = next(iter(cluster.worker_nodes))

    def append_and_kill(self: Journal, trajectory: Trajectory) -> None:
        append(self, trajectory)
        finished.append(trajectory)
        if len(finished) == 4:
            cluster.remove_node(doomed, allow_graceful=False)

    monkeypatch.setattr(Journal, "append", append_and_kill)
    spread = ["--ray", cluster.address, "--ray_engines", "2", "--ray_pools", "2"]
    assert generate.main([*common, *spread, "--out", str(tmp_path / "spread")]) == 0
    expected = told(tmp_path / "here")
    assert told(tmp_path / "spread") == expected
    assert len(expected) == 24
    assert sum(bool(texts) for _, _, texts, _ in expected.values()) > 4  # interpreters were in it
