"""`OpenAIEngine` against a fake server on loopback, and against the real one of vLLM (`make test-vllm`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from mtpo.engines.openai import OpenAIEngine
from mtpo.engines.transformers import TransformersEngine
from mtpo.errors import EngineError, InputError
from mtpo.models import load_model
from mtpo.rollout import Generation, Sampling
from sandbox.processes import descendants
from tests.engine_conformance import (
    GREEDY,
    PROMPTS,
    Promise,
    Subject,
    complete,
    every_promise,
    stress_model,
)
from tests.fake_server import Answer, FakeServer
from tests.tiny_tokenizers import make_tokenizer

STOPPED = Generation((7, 8, 1), (-0.5, -0.25, -0.125), "stop")
SAMPLING = Sampling(16, (1,))
START_S = 600.0
"""For what must happen at some time: a server of vLLM may take minutes to start."""


def completion(found: Generation, body: dict[str, Any], **changes: Any) -> Answer:
    """A generation as vLLM sends it."""
    choice = {
        "index": 0,
        "text": "",
        "finish_reason": found.finish_reason,
        "token_ids": list(found.ids),
        "prompt_token_ids": body["prompt"],
        "logprobs": {"token_logprobs": found.logps},
    }
    return 200, {"choices": [choice | changes]}


def stopped(body: dict[str, Any]) -> Answer:
    return completion(STOPPED, body)


@contextlib.contextmanager
def fakes(*answers: Callable[[dict[str, Any]], Answer], **card: Any) -> Iterator[list[FakeServer]]:
    servers = [FakeServer(answer, **card) for answer in answers]
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


def engine_for(*servers: FakeServer, **options: Any) -> OpenAIEngine:
    return OpenAIEngine([s.url for s in servers], "policy", **{"patience_s": 60.0, **options})


# -- the whole protocol, with a model behind it --------------------------------------------------------------


@pytest.fixture(scope="module")
def model_server() -> Iterator[tuple[FakeServer, Any]]:
    """A server with a model, which honours every field that the client sends."""
    model = stress_model()
    engine = TransformersEngine(model)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def answer(body: dict[str, Any]) -> Answer:
        assert body["ignore_eos"] and body["return_token_ids"] and body["logprobs"] == 0
        sampling = Sampling(
            max_tokens=body["max_tokens"],
            stop_ids=tuple(body["stop_token_ids"]),
            temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=max(body["top_k"], 0),
            min_p=body["min_p"],
            seed=body["seed"],
        )
        found = asyncio.run_coroutine_threadsafe(engine.generate(body["prompt"], sampling), loop).result()
        return completion(found, body)

    with fakes(answer) as [server]:
        yield server, model
    asyncio.run_coroutine_threadsafe(engine.aclose(), loop).result()
    loop.call_soon_threadsafe(loop.stop)


@every_promise
async def test_client_keeps_an_engines_promises(
    promise: Promise, model_server: tuple[FakeServer, Any]
) -> None:
    server, model = model_server
    engine = engine_for(server)
    await promise(Subject(engine, model))
    await engine.aclose()


# -- servers that fail ---------------------------------------------------------------------------------------


async def test_a_replica_that_dies_loses_nothing_and_is_used_again_when_it_is_back() -> None:
    def slow(body: dict[str, Any]) -> Answer:
        time.sleep(0.05)
        return stopped(body)

    with fakes(slow, slow) as [first, second]:
        engine = engine_for(first, second)
        calls = [
            asyncio.create_task(engine.generate([2, 5, i], SAMPLING, session=f"{i}")) for i in range(3, 33)
        ]
        await asyncio.sleep(0.02)
        first.stop()
        assert [g.ids for g in await asyncio.gather(*calls)] == [STOPPED.ids] * 30
        assert engine._servers.usable == {1}
        later = await complete(engine, [[2, 5, i] for i in range(40, 50)], SAMPLING, "later")
        assert len(later) == 10 and all([2, 5, i] in second.prompts for i in range(40, 50))
        num_before = len(first.requests)
        first.start()
        await eventually(lambda: len(engine._servers.usable) == 2)
        await complete(engine, PROMPTS, SAMPLING, "last")
        assert len(first.requests) > num_before
        await engine.aclose()


async def test_an_attempt_that_takes_too_long_is_made_elsewhere() -> None:
    waiting = threading.Event()

    def stuck(body: dict[str, Any]) -> Answer:
        waiting.wait(START_S)
        return stopped(body)

    with fakes(stuck, stopped) as [first, second]:
        engine = engine_for(first, second, timeout_s=1.0)
        assert (await engine.generate([2, 5], SAMPLING, session="a")).ids == STOPPED.ids
        assert [2, 5] in first.prompts and [2, 5] in second.prompts
        waiting.set()
        await engine.aclose()


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_server_that_fails_now_and_then_is_asked_again(status: int) -> None:
    answers = iter([status, status, 200])

    def flaky(body: dict[str, Any]) -> Answer:
        return stopped(body) if next(answers) == 200 else (status, {"error": {"message": "overloaded"}})

    with fakes(flaky) as [server]:
        engine = engine_for(server)
        assert (await engine.generate([2, 5], SAMPLING)).ids == STOPPED.ids
        assert len(server.requests) == 3
        await engine.aclose()


async def test_a_request_that_one_replica_cannot_answer_is_asked_of_the_other_at_once() -> None:
    with fakes(lambda _: (500, {}), stopped) as [first, second]:
        engine = engine_for(first, second)
        for i in range(4):
            assert (await engine.generate([2, 5], SAMPLING, session=f"{i}")).ids == STOPPED.ids
        assert len(second.requests) == 4
        await engine.aclose()


async def test_patience_ends_with_the_last_reason() -> None:
    with fakes(lambda _: (500, {"error": {"message": "CUDA error:\nout of memory"}})) as [server]:
        engine = engine_for(server, patience_s=0.3)
        with pytest.raises(
            EngineError, match=r"no server gave an answer for 0\.3 s: .* CUDA error: out of memory"
        ):
            await engine.generate([2, 5], SAMPLING)
        await engine.aclose()


async def test_servers_that_stay_away_are_a_fault_of_the_environment() -> None:
    with fakes(stopped) as [server]:
        engine = engine_for(server, patience_s=0.3)
        server.stop()
        with pytest.raises(EngineError, match=r"for 0.3 s: http://127\.0\.0\.1:\d+: .*connection"):
            await engine.generate([2, 5], SAMPLING)
        server.start()
        await engine.aclose()


async def test_a_replica_that_starts_late_joins() -> None:
    with fakes(stopped, stopped) as [first, second]:
        first.stop()
        engine = engine_for(first, second)
        await engine.generate([2, 5], SAMPLING)
        first.start()
        await eventually(lambda: len(engine._servers.usable) == 2)
        await engine.generate([2, 5], SAMPLING)
        assert len(first.requests) == 1
        await engine.aclose()


# -- servers that are not what they should be ----------------------------------------------------------------


async def test_turns_of_a_session_go_to_one_replica() -> None:
    with fakes(stopped, stopped, stopped) as servers:
        engine = engine_for(*servers)
        for turn in range(3):
            await complete(engine, [[2, 5, i, turn] for i in range(9)], SAMPLING)
        homes = [{tuple(p[:3]) for p in s.prompts} for s in servers]
        assert sorted(map(len, homes)) == [3, 3, 3] and len(set.union(*homes)) == 9
        await engine.aclose()


async def test_a_server_without_token_ids_is_refused() -> None:
    with fakes(lambda body: completion(STOPPED, body, token_ids=None)) as [server]:
        engine = engine_for(server)
        with pytest.raises(InputError, match=r"returns no token ids .* make nothing to train on"):
            await engine.generate([2, 5], SAMPLING)
        await engine.aclose()


@pytest.mark.parametrize("takes_ids", [True, False])
async def test_text_is_read_by_the_tokenizer_and_marked(takes_ids: bool) -> None:
    tokenizer = make_tokenizer("gemma")
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    reply = "print(total)"

    def text_only(body: dict[str, Any]) -> Answer:
        assert body["stop"] == ["<end_of_turn>", "<eos>"]
        if not takes_ids and not isinstance(body["prompt"], str):
            return 422, {"error": {"message": "prompt must be a string"}}
        return 200, {"choices": [{"text": reply, "finish_reason": "stop"}]}

    prompt = [
        tokenizer.bos_token_id,
        *tokenizer("<start_of_turn>user\n48", add_special_tokens=False)["input_ids"],
    ]
    with fakes(text_only) as [server]:
        engine = engine_for(server, text_tokenizer=tokenizer)
        for _ in range(2):
            found = await engine.generate(prompt, Sampling(16, (end, tokenizer.eos_token_id)))
            written = tuple(tokenizer(reply, add_special_tokens=False)["input_ids"])
            assert found == Generation((*written, end), None, "stop", is_from_text=True)
        text = "<start_of_turn>user\n48"  # without the BOS, which a server puts there itself
        assert server.prompts == ([prompt, prompt] if takes_ids else [prompt, text, text])
        await engine.aclose()


async def test_an_exact_answer_is_not_marked_because_text_would_be_allowed() -> None:
    with fakes(stopped) as [server]:
        engine = engine_for(server, text_tokenizer=make_tokenizer("gemma"))
        assert await engine.generate([2, 5], SAMPLING) == STOPPED
        await engine.aclose()


@pytest.mark.parametrize(
    ("answer", "error", "complaint"),
    [
        (lambda b: (400, {"error": {"message": "bad\nseed"}}), InputError, "refuses: bad seed"),
        (lambda b: (404, {"detail": "gone"}), InputError, "refuses: .*gone"),
        (
            lambda b: completion(STOPPED, b, prompt_token_ids=[2, 2, 5]),
            InputError,
            "changed the prompt of 2 ids to 3",
        ),
        (lambda b: completion(Generation((), (), "stop"), b), EngineError, "returned no token"),
        (
            lambda b: completion(STOPPED, b, logprobs={"token_logprobs": [None] * 3}),
            EngineError,
            "3 of 3 log-probs",
        ),
        (lambda b: (200, ["hello"]), EngineError, "gave no completion"),
    ],
)
async def test_a_wrong_answer_is_named(answer: Any, error: type[Exception], complaint: str) -> None:
    with fakes(answer) as [server]:
        engine = engine_for(server)
        with pytest.raises(error, match=complaint) as raised:
            await engine.generate([2, 5], SAMPLING)
        assert "\n" not in str(raised.value)
        await engine.aclose()


def test_servers_that_cannot_be_meant_are_refused_when_the_engine_is_made() -> None:
    with pytest.raises(InputError, match=r"'10\.0\.0\.7:8000' is no URL of a server"):
        OpenAIEngine(["10.0.0.7:8000"], "policy")
    with pytest.raises(InputError, match="at least one server"):
        OpenAIEngine([], "policy")
    with fakes(stopped) as [server], pytest.raises(InputError, match="serves policy, not other"):
        OpenAIEngine([server.url], "other")
    with fakes(stopped, max_model_len=None) as [server]:
        with pytest.raises(InputError, match="give max_context"):
            OpenAIEngine([server.url], "policy")
        engine = OpenAIEngine([server.url + "/v1/"], "policy", max_context=99, patience_s=0.2)
        assert engine.max_context == 99
    server = FakeServer(stopped)
    server.stop()
    with pytest.raises(InputError, match=r"no server answers for 0\.2 s"):
        OpenAIEngine([server.url], "policy", patience_s=0.2)


# -- the real server of vLLM ---------------------------------------------------------------------------------


class VLLMServer:
    """vLLM's own server of one model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{self.port}.log"
        self.start()

    def start(self) -> None:
        options = f"""--model {self.folder} --served-model-name policy --host 127.0.0.1 --port {self.port}
            --dtype float32 --enforce-eager --max-num-seqs 64 --gpu-memory-utilization 0.2 --block-size 32
            --prefix-cache-retention-interval 32 --generation-config vllm"""
        if not torch.cuda.is_available():
            options += " --no-enable-chunked-prefill"  # as in CPU_ARGS
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options.split()],
                env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ},
                stdout=log,
                stderr=log,
            )

    def metric(self, name: str) -> float:
        lines = httpx2.get(f"{self.url}/metrics", trust_env=False, timeout=60).text.splitlines()
        [*values] = (float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{"))
        assert values, f"vLLM has no metric {name}"
        return sum(values)

    def kill(self) -> None:
        """Also the processes that compute for it. They stay in the group of the test, so they end with it."""
        workers = descendants(self.process.pid)
        self.process.kill()
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def vllm_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[VLLMServer]]:
    """Two replicas."""
    pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
    folder = tmp_path_factory.mktemp("served")
    stress_model().save_pretrained(folder)
    make_tokenizer("gemma").save_pretrained(folder)  # the server wants one, though only ids are sent
    started = time.monotonic()
    servers = [VLLMServer(folder), VLLMServer(folder)]
    try:
        for server in servers:
            replicas([server])
        print(f"two servers of vLLM answer after {time.monotonic() - started:.0f} s")
        yield servers
    finally:
        for server in servers:
            if server.process.poll() is not None:
                print(f"{server.url} died:\n{server.log.read_text()[-4000:]}")
            server.kill()


def replicas(servers: list[VLLMServer]) -> OpenAIEngine:
    return OpenAIEngine([s.url for s in servers], "policy", patience_s=START_S)


@pytest.mark.vllm
@every_promise
async def test_vllm_servers_keep_an_engines_promises(
    promise: Promise, vllm_servers: list[VLLMServer]
) -> None:
    engine = replicas(vllm_servers)
    assert engine.max_context == 512
    await promise(Subject(engine, load_model(vllm_servers[0].folder)))
    await engine.aclose()


@pytest.mark.vllm
async def test_a_cancelled_call_is_aborted_on_the_server(vllm_servers: list[VLLMServer]) -> None:
    server = vllm_servers[0]
    engine = replicas([server])
    calls = [asyncio.create_task(engine.generate(PROMPTS[0], Sampling(500, ()))) for _ in range(8)]
    await eventually(lambda: server.metric("num_requests_running") == 8)
    num_finished = server.metric("request_success_total")
    for call in calls:
        call.cancel()
    await eventually(lambda: server.metric("num_requests_running") == 0)
    assert server.metric("request_success_total") == num_finished
    await engine.aclose()


@pytest.mark.vllm
async def test_a_killed_vllm_server_loses_nothing_and_is_used_again_when_it_is_back(
    vllm_servers: list[VLLMServer],
) -> None:
    engine, killed = replicas(vllm_servers), vllm_servers[0]
    prompts = [[*PROMPTS[i % 3], 5 + i] for i in range(30)]
    undisturbed = await complete(engine, prompts, Sampling(400, (), seed=4))
    calls = asyncio.create_task(complete(engine, prompts, Sampling(400, (), seed=4), "again"))
    await eventually(lambda: all(server.metric("num_requests_running") for server in vllm_servers))
    killed.kill()
    assert not calls.done()
    assert [g.ids for g in await calls] == [g.ids for g in undisturbed]
    assert engine._servers.usable == {1}
    killed.start()
    await eventually(lambda: len(engine._servers.usable) == 2)
    await complete(engine, prompts, GREEDY, "last")
    assert killed.metric("request_success_total") == 15
    await engine.aclose()


async def eventually(condition: Callable[[], bool], timeout_s: float = START_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.01)
