"""The pool over HTTP: what the service and its client promise, over real sockets and real kernels."""

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import pytest_asyncio

from mtpo.errors import InputError, SandboxError
from mtpo.rollout import Interpreter
from sandbox import InterpreterPool, Limits, RemoteInterpreter
from sandbox.leases import Leases, NumberedCalls, OutOfTurn

pytest.importorskip("fastapi", reason="needs the extra `serve`")

import sandbox.service
from sandbox import serve
from sandbox.serve import MAX_BODY_BYTES, create_app
from sandbox.service import Service, listen

pytestmark = pytest.mark.asyncio(loop_scope="module")
ROOT = Path(__file__).resolve().parents[1]
TOKEN = "a-token-for-the-tests"
COUNT = "n = globals().get('n', 0) + 1\nn"


@dataclass(frozen=True)
class Running:
    url: str
    leases: Leases


@contextlib.asynccontextmanager
async def running(
    pool: InterpreterPool, port: int = 0, idle_timeout_s: float = 600.0
) -> AsyncIterator[Running]:
    app = create_app(pool, TOKEN, idle_timeout_s=idle_timeout_s)
    server = Service(app)
    with listen("127.0.0.1", port, is_token_given=False) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield Running(url, app.state.leases)
        finally:
            server.should_exit = True
            await serving


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def pool() -> AsyncIterator[InterpreterPool]:
    async with InterpreterPool(size=4, preload=()) as pool:
        yield pool


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def service(pool: InterpreterPool) -> AsyncIterator[Running]:
    async with running(pool) as service:
        yield service


@pytest_asyncio.fixture(loop_scope="module")
async def remote(service: Running) -> AsyncIterator[RemoteInterpreter]:
    async with RemoteInterpreter(service.url, TOKEN) as remote:
        yield remote


@pytest_asyncio.fixture(loop_scope="module")
async def http(service: Running) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that knows nothing but HTTP."""
    async with plain_client(service.url) as client:
        yield client


def plain_client(url: str, token: str = TOKEN) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60, trust_env=False
    )


async def execute(
    http: httpx2.AsyncClient, session: str, number: int, code: str, timeout_s: float = 20
) -> httpx2.Response:
    body = {"cell_number": number, "code": code, "timeout_s": timeout_s}
    return await http.post(f"/sessions/{session}/execute", json=body)


async def new_session(http: httpx2.AsyncClient) -> str:
    return (await http.post("/sessions")).json()["id"]


async def until(is_so: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.01)


class Lossy:
    """The service behind a connection that breaks in place of the next replies; what it hears, it hears."""

    def __init__(self, url: str) -> None:
        self._port = int(url.rpartition(":")[2])
        self._connections: set[asyncio.Task] = set()
        self.num_to_lose = 0

    async def __aenter__(self) -> "Lossy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        service_reader, service_writer = await asyncio.open_connection("127.0.0.1", self._port)

        async def pass_requests() -> None:
            while data := await reader.read(65536):
                service_writer.write(data)

        requests = asyncio.create_task(pass_requests())
        try:
            while data := await service_reader.read(65536):
                if self.num_to_lose:
                    self.num_to_lose -= 1
                    break
                writer.write(data)
        finally:
            requests.cancel()
            writer.close()
            service_writer.close()


async def test_remote_session_keeps_its_state_and_forks(remote: RemoteInterpreter) -> None:
    interpreter: Interpreter = remote
    async with interpreter.session() as session:
        await session.execute("x = [1]")
        twin = await session.fork()
        second = await session.fork()
        await session.execute("x.append(2)")
        await twin.execute("x.append(3)")
        assert [(await s.execute("x")).text for s in (session, twin, second)] == ["[1, 2]", "[1, 3]", "[1]"]
        await twin.close()
        await second.close()


@pytest.mark.parametrize(
    "code", ["print('π')\n6 * 7", "1 / 0", "import time\ntime.sleep(9)", "'\ud800'.isascii()", ""]
)
async def test_remote_execution_is_that_of_the_pool(
    pool: InterpreterPool, remote: RemoteInterpreter, code: str
) -> None:
    async with pool.session() as here, remote.session() as there:
        expected, found = await here.execute(code, 0.3), await there.execute(code, 0.3)
    assert (found.code, found.text, found.status) == (code, expected.text, expected.status)
    assert found.seconds == pytest.approx(expected.seconds, abs=0.3)


async def test_closing_gives_the_kernel_back(pool: InterpreterPool, remote: RemoteInterpreter) -> None:
    for _ in range(2 * pool.size):
        async with remote.session() as session:
            assert (await session.execute("1", 20)).text == "1"


async def test_a_closed_session_runs_nothing_and_closes_again(remote: RemoteInterpreter) -> None:
    async with remote.session() as session:
        await session.execute("1")
    await session.close()
    with pytest.raises(SandboxError, match="the session is closed"):
        await session.execute("1")


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}]
)
async def test_nothing_but_health_and_openapi_goes_without_the_token(service: Running, headers: dict) -> None:
    before = len(service.leases)
    async with httpx2.AsyncClient(base_url=service.url, headers=headers, trust_env=False) as http:
        paths = (await http.get("/openapi.json")).json()["paths"]
        for path, methods in paths.items():
            for method in methods:
                status = (await http.request(method, path.format(session_id="any"), json={})).status_code
                assert status == (200 if path == "/health" else 401), (method, path)
    assert len(service.leases) == before


async def test_a_wrong_token_is_an_input_error(service: Running) -> None:
    async with RemoteInterpreter(service.url, "wrong") as remote:
        with pytest.raises(InputError, match="the bearer token is missing or wrong"):
            await remote.session().execute("1")


async def test_the_openapi_document_names_every_route_and_its_errors(http: httpx2.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    answers = {
        f"{method.upper()} {path}": set(route["responses"])
        for path, methods in document["paths"].items()
        for method, route in methods.items()
    }
    calls = {"202", "401", "404", "409", "413", "422", "503"}
    assert answers == {
        "POST /sessions": {"201", "401", "413", "422"},
        "POST /sessions/{session_id}/execute": {"200", *calls},
        "POST /sessions/{session_id}/fork": {"201", *calls},
        "DELETE /sessions/{session_id}": {"204", "401", "404", "413", "422"},
        "GET /health": {"200", "503"},
    }
    cell = document["components"]["schemas"]["CellRequest"]["properties"]
    assert (cell["code"]["maxLength"], cell["timeout_s"]["maximum"]) == (200_000, 3600)
    assert "seconds" in cell["timeout_s"]["description"]


async def test_health_reports_the_probe_the_layers_and_the_sizes(
    pool: InterpreterPool, service: Running, http: httpx2.AsyncClient
) -> None:
    session = await new_session(http)
    report = (await http.get("/health")).json()
    assert (report["is_healthy"], report["error"], report["size"]) == (True, None, 4)
    assert report["num_sessions"] == len(service.leases) > 0
    assert report["layers"] == pool.layers != {}
    await http.delete(f"/sessions/{session}")


async def test_health_answers_also_while_all_kernels_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PATIENCE_S", 0.1)
    async with (
        InterpreterPool(size=1, preload=()) as pool,
        running(pool) as service,
        plain_client(service.url) as http,
    ):
        async with pool.session() as session:
            await session.execute("1")
            busy = await asyncio.wait_for(http.get("/health"), 5)
            assert (busy.status_code, busy.json()["error"]) == (503, "no answer after 0.1 s")
        monkeypatch.setattr(serve, "PATIENCE_S", 20)
        assert (await http.get("/health")).status_code == 200


async def test_only_its_users_wait_for_the_import_of_the_client() -> None:
    told = "print('httpx2' in sys.modules)"
    code = f"import sys, sandbox; {told}; sandbox.RemoteInterpreter; {told}"
    command = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert (await command.communicate())[0].split() == [b"False", b"True"]


async def test_a_cell_whose_reply_is_lost_runs_once(service: Running) -> None:
    async with (
        Lossy(service.url) as connection,
        RemoteInterpreter(connection.url, TOKEN) as remote,
        remote.session() as session,
    ):
        texts = []
        for num_lost in (2, 1, 1, 3):  # of the first two, one is the reply to the opening of the session
            connection.num_to_lose = num_lost
            texts.append((await session.execute(COUNT)).text)
            assert connection.num_to_lose == 0
    assert texts == ["1", "2", "3", "4"]


async def test_a_fork_whose_reply_is_lost_makes_one_copy(service: Running) -> None:
    async with (
        Lossy(service.url) as connection,
        RemoteInterpreter(connection.url, TOKEN) as remote,
        remote.session() as session,
    ):
        await session.execute("x = 1")
        before = len(service.leases)
        connection.num_to_lose = 1
        async with await session.fork() as twin:
            assert connection.num_to_lose == 0
            assert len(service.leases) == before + 1
            assert (await twin.execute("x")).text == "1"


async def test_sessions_end_with_their_interpreter(service: Running) -> None:
    before = len(service.leases)
    async with RemoteInterpreter(service.url, TOKEN) as remote:
        session = remote.session()
        await session.execute("1")
        assert len(service.leases) == before + 1
    assert len(service.leases) == before
    for late in (session, remote.session()):
        with pytest.raises(SandboxError, match="is closed"):
            await late.execute("1")


async def test_a_cell_number_is_the_next_or_the_last(http: httpx2.AsyncClient) -> None:
    session = await new_session(http)
    assert (await execute(http, session, 1, COUNT)).json()["text"] == "1"
    assert (await execute(http, session, 1, COUNT)).json()["text"] == "1"
    for number, code, reason in (
        (1, "n", "cell_number 1 was already used for another request"),
        (3, "n", "expected cell_number 2, or 1 again, got 3"),
    ):
        refused = await execute(http, session, number, code)
        assert (refused.status_code, refused.json()["detail"]) == (409, reason)
    assert (await execute(http, session, 2, "n")).json()["text"] == "1"
    running = asyncio.create_task(execute(http, session, 3, "import time\ntime.sleep(0.5)"))
    await asyncio.sleep(0.1)
    refused = await execute(http, session, 4, "n")
    assert (refused.status_code, refused.json()["detail"]) == (409, "cell_number 3 has not ended yet")
    assert (await running).status_code == 200
    await http.delete(f"/sessions/{session}")


async def test_a_session_that_is_not_there_is_404_and_says_why(http: httpx2.AsyncClient) -> None:
    never = await execute(http, "made-up", 1, "1")
    assert (never.status_code, never.json()["detail"]) == (404, "there was never such a session here")
    assert (await http.delete("/sessions/made-up")).status_code == 404
    session = await new_session(http)
    assert [(await http.delete(f"/sessions/{session}")).status_code for _ in range(2)] == [204, 204]
    closed = await execute(http, session, 1, "1")
    assert (closed.status_code, closed.json()["detail"]) == (404, "the session was closed")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"timeout_s": 0}, "timeout_s: Input should be greater than 0"),
        ({"timeout_s": 3601}, "timeout_s: Input should be less than or equal to 3600"),
        ({"timeout_s": "nan"}, "timeout_s: Input should be less than or equal to 3600"),
        ({"cell_number": 0}, "cell_number: Input should be greater than or equal to 1"),
        ({"code": "#" * 200_001}, "code: String should have at most 200000 characters"),
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
    ],
)
async def test_a_wrong_value_is_422_in_one_line_and_runs_nothing(
    http: httpx2.AsyncClient, change: dict, reason: str
) -> None:
    session = await new_session(http)
    body = {"cell_number": 1, "code": "1", "timeout_s": 5.0} | change
    refused = await http.post(f"/sessions/{session}/execute", json=body)
    assert (refused.status_code, refused.json()["detail"]) == (422, f"body.{reason}")
    assert (await execute(http, session, 1, "2")).json()["text"] == "2"
    await http.delete(f"/sessions/{session}")


async def test_a_wrong_value_is_an_input_error_and_the_session_goes_on(remote: RemoteInterpreter) -> None:
    async with remote.session() as session:
        with pytest.raises(InputError, match="timeout_s: Input should be greater than 0"):
            await session.execute("1", timeout_s=-1)
        assert (await session.execute("1")).text == "1"


async def test_a_body_beyond_the_bound_is_refused_before_it_is_read(http: httpx2.AsyncClient) -> None:
    refused = await http.post("/sessions/any/execute", content=b" " * (MAX_BODY_BYTES + 1))
    assert refused.status_code == 413


async def test_code_in_the_widest_script_fits(remote: RemoteInterpreter) -> None:
    code = "# " + "\N{GRINNING FACE}" * 199_990 + "\n1"
    async with remote.session() as session:
        assert (await session.execute(code, 20)).text == "1"


async def test_deleting_a_session_stops_its_cell(service: Running, http: httpx2.AsyncClient) -> None:
    session = await new_session(http)
    endless = asyncio.create_task(execute(http, session, 1, "while True: pass", timeout_s=60))
    await until(lambda: any(lease.cells.is_running for lease in service.leases._open.values()))
    await http.delete(f"/sessions/{session}")
    stopped = await asyncio.wait_for(endless, 5)
    assert (stopped.status_code, stopped.json()["detail"]) == (404, "the session was closed")


async def test_a_cancelled_call_ends_the_session(service: Running, remote: RemoteInterpreter) -> None:
    before, session = len(service.leases), remote.session()
    await session.execute("1")
    endless = asyncio.create_task(session.execute("while True: pass", 60))
    await until(lambda: any(lease.cells.is_running for lease in service.leases._open.values()))
    endless.cancel()
    await asyncio.gather(endless, return_exceptions=True)
    with pytest.raises(SandboxError, match="an earlier call got no answer"):
        await session.execute("1")
    await asyncio.wait_for(session.close(), 5)
    assert len(service.leases) == before


async def test_a_long_call_is_asked_for_again(
    http: httpx2.AsyncClient, remote: RemoteInterpreter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "PATIENCE_S", 0.05)
    code = "import time\ntime.sleep(0.5)\n" + COUNT
    session = await new_session(http)
    assert (await execute(http, session, 1, code)).status_code == 202
    async with remote.session() as other:
        assert [(await other.execute(code)).text, (await other.execute("n")).text] == ["1", "1"]
    await http.delete(f"/sessions/{session}")


async def test_a_fault_of_the_sandbox_is_503_with_its_reason() -> None:
    async with (
        InterpreterPool(Limits(startup_timeout_s=0.001), preload=()) as pool,
        running(pool) as service,
        plain_client(service.url) as http,
    ):
        failed = await execute(http, await new_session(http), 1, "1")
        assert failed.status_code == 503
        assert failed.json()["detail"].startswith("no kernel would start in 3 attempts")
        assert int(failed.headers["Retry-After"]) >= 1
        assert (await http.get("/health")).status_code == 503
        async with RemoteInterpreter(service.url, TOKEN) as remote, remote.session() as session:
            for code in ("1", "2"):  # the session goes on, as one of the pool does
                with pytest.raises(SandboxError, match="no kernel would start in 3 attempts"):
                    await session.execute(code)


async def test_fork_in_a_pool_of_one_is_refused_and_the_session_goes_on() -> None:
    async with (
        InterpreterPool(size=1, preload=()) as pool,
        running(pool) as service,
        RemoteInterpreter(service.url, TOKEN) as remote,
        remote.session() as session,
    ):
        await session.execute("x = 1")
        for _ in range(2):
            with pytest.raises(InputError, match="size"):
                await session.fork()
        assert (await session.execute("x")).text == "1"


async def test_requests_wait_for_a_kernel_in_order() -> None:
    order: list[int] = []

    async def run(index: int) -> None:
        async with remote.session() as session:
            await session.execute(str(index), 20)
            order.append(index)

    def num_calls() -> int:
        return sum(lease.cells.is_running for lease in service.leases._open.values())

    async with (
        InterpreterPool(size=1, preload=()) as pool,
        running(pool) as service,
        RemoteInterpreter(service.url, TOKEN) as remote,
    ):
        async with remote.session() as first:
            await first.execute("1")
            waiting = []
            for index in range(5):
                waiting.append(asyncio.create_task(run(index)))
                await until(lambda: num_calls() == len(waiting))
            assert order == []
        await asyncio.wait_for(asyncio.gather(*waiting), 20)
    assert order == [0, 1, 2, 3, 4]


async def test_an_idle_session_expires_and_gives_its_kernel_back() -> None:
    async with InterpreterPool(size=1, preload=()) as pool, running(pool, idle_timeout_s=0.4) as service:
        async with plain_client(service.url) as http:
            session = await new_session(http)
            await execute(http, session, 1, "1")
            waiting = execute(http, await new_session(http), 1, "2")  # for the only kernel
            assert (await asyncio.wait_for(waiting, 10)).json()["text"] == "2"
            gone = await execute(http, session, 2, "1")
            expired = "the session expired after 0.4 s without a request"
            assert (gone.status_code, gone.json()["detail"]) == (404, expired)
        async with RemoteInterpreter(service.url, TOKEN) as remote, remote.session() as late:
            await late.execute("1")
            await until(lambda: len(service.leases) == 0)
            with pytest.raises(SandboxError, match=f"the session is lost: {expired}"):
                await late.execute("2")


async def test_a_running_cell_is_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "PATIENCE_S", 0.05)
    code = "import time\ntime.sleep(1.5)\n'slept'"
    async with (
        InterpreterPool(size=1, preload=()) as pool,
        running(pool, idle_timeout_s=0.4) as service,
        plain_client(service.url) as http,
    ):
        session = await new_session(http)
        assert (await execute(http, session, 1, code)).status_code == 202
        (lease,) = service.leases._open.values()
        await until(lambda: not lease.cells.is_running)
        assert (await execute(http, session, 1, code)).json()["text"] == "'slept'"


async def test_a_service_that_comes_back_in_time_is_waited_for(pool: InterpreterPool) -> None:
    with listen("127.0.0.1", 0, is_token_given=False) as listener:
        port = listener.getsockname()[1]
    async with RemoteInterpreter(f"http://127.0.0.1:{port}", TOKEN, timeout_s=20) as remote:
        session = remote.session()
        early = asyncio.create_task(session.execute("6 * 7"))
        await asyncio.sleep(0.1)
        async with running(pool, port), session:
            assert (await early).text == "42"


async def test_a_service_that_stays_away_is_a_sandbox_error() -> None:
    with listen("127.0.0.1", 0, is_token_given=False) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with RemoteInterpreter(url, TOKEN, timeout_s=0.3) as remote:
        started = time.monotonic()
        with pytest.raises(SandboxError, match=rf"{url} gave no answer for 0.3 s"):
            await remote.session().execute("1")
        assert time.monotonic() - started < 2


async def test_a_restarted_service_has_lost_the_sessions_and_has_its_kernels_back() -> None:
    async with InterpreterPool(size=1, preload=()) as pool:
        async with running(pool) as service:
            remote = RemoteInterpreter(service.url, TOKEN)
            session = remote.session()
            await session.execute("x = 1")
        async with running(pool, int(service.url.rpartition(":")[2])), remote:
            with pytest.raises(SandboxError, match="the session is lost: there was never such a session"):
                await session.execute("x")
            await session.close()
            async with remote.session() as fresh:
                assert (await asyncio.wait_for(fresh.execute("6 * 7"), 20)).text == "42"


async def test_a_service_that_is_told_to_stop_does_not_wait_for_long_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox.service, "STOP_GRACE_S", 1)
    async with InterpreterPool(size=1, preload=()) as pool:
        async with running(pool) as service:
            remote = RemoteInterpreter(service.url, TOKEN)
            endless = asyncio.create_task(remote.session().execute("while True: pass", 3600))
            await until(lambda: any(lease.cells.is_running for lease in service.leases._open.values()))
            stopped_at = time.monotonic()
        assert time.monotonic() - stopped_at < 10
        with pytest.raises(SandboxError, match="the session is lost: the service has stopped"):
            await endless
        assert (await asyncio.wait_for(pool.session().execute("6 * 7"), 20)).text == "42"


async def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_headers() -> None:
    with listen("127.0.0.1", 0, is_token_given=False) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        with client, accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


@pytest.mark.parametrize("url", ["127.0.0.1:8765", "ftp://host", "http://", "not a url"])
async def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="is no URL of a sandbox service"):
        RemoteInterpreter(url, TOKEN)


async def test_a_call_that_did_nothing_gives_its_number_back() -> None:
    async def refuse() -> int:
        raise InputError("no")

    async def answer() -> int:
        return 7

    calls: NumberedCalls[int] = NumberedCalls("number")
    with pytest.raises(InputError):
        await calls.call(1, "a", refuse)
    with pytest.raises(OutOfTurn, match="expected number 1, got 2"):
        calls.call(2, "b", answer)
    assert await calls.call(1, "b", answer) == 7
