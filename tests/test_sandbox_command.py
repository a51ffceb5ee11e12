"""`python -m sandbox`: exit codes, what is printed, and that a stopped service leaves nothing behind."""

import asyncio
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from mtpo.errors import SandboxError
from mtpo.trajectory import Execution
from sandbox import InterpreterPool, RemoteInterpreter, __main__, doctor
from sandbox.__main__ import main
from sandbox.layers import LAYERS

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "a-token-for-the-tests"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("code", "status", "printed"),
    [
        ("x = 6\nprint('six')\nx * 7", 0, "six\n42\n"),
        ("x = 1\nx / 0", 1, "Line 2: x / 0\nZeroDivisionError: division by zero\n"),
        (
            "import time\ntime.sleep(60)",
            1,
            "Line 2: time.sleep(60)\nKeyboardInterrupt\n[stopped after 0.5 s, the time limit; variables are kept]\n",
        ),
        (
            "import os\nos._exit(3)",
            1,
            "[the interpreter died (exit code 3) and was restarted; all variables are gone]\n",
        ),
    ],
)
def test_run_prints_what_a_model_would_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, status: int, printed: str
) -> None:
    assert main(["run", write(tmp_path / "cell.py", code), "--timeout-s", "0.5"]) == status
    assert capsys.readouterr().out == printed


def test_run_reads_stdin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"6 * 7")))
    assert main(["run", "-"]) == 0
    assert capsys.readouterr().out == "42\n"


def test_attack_has_its_own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[str]] = []
    module = types.ModuleType("sandbox.hostile.suite")
    module.main = lambda argv: heard.append(argv) or 5  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "sandbox.hostile.suite", module)
    assert main(["attack", "--help", "x"]) == 5
    assert heard == [["--help", "x"]]


def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MTPO_SANDBOX_TOKEN", raising=False)
    missing, cell = str(tmp_path / "missing"), write(tmp_path / "cell.py", "1")
    (tmp_path / "latin").write_bytes(b"x = '\xe9'")
    short, empty = write(tmp_path / "short", "abc\n"), write(tmp_path / "empty", "")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for argv, reason in (
            (["run", missing], f"{missing}: No such file or directory"),
            (["run", str(tmp_path)], f"{tmp_path}: Is a directory"),
            (["run", str(tmp_path / "latin")], f"{tmp_path}/latin: not UTF-8: byte 5 is 0xe9"),
            (["run", cell, "--timeout-s", "-1"], "timeout_s must be a positive number of seconds, got -1.0"),
            (["serve", "--port", port], f"--host 127.0.0.1 --port {port}: Address already in use"),
            (["serve", "--port", "0", "--size", "0"], "size must be a positive integer, got 0"),
            (["serve", "--idle-timeout-s", "nan"], "--idle-timeout-s must be a positive number, got nan"),
            (["serve", "--token-file", missing], f"{missing}: No such file or directory"),
            (["serve", "--token-file", short], "at least 16 visible ASCII characters and no space, got 3"),
            (["serve", "--token-file", empty], "at least 16 visible ASCII characters and no space, got 0"),
            (
                ["serve", "--host", "0.0.0.0"],
                "--host 0.0.0.0 can be reached from other machines: give a token",
            ),
            (["serve", "--host", "::"], "--host :: can be reached from other machines: give a token"),
            (["serve", "--host", "example.org"], "--host example.org can be reached from other machines"),
        ):
            assert main(argv) == 2, argv
            said = capsys.readouterr().err
            assert said.startswith("error: ") and reason in said and said.count("\n") == 1


def test_a_fault_of_the_sandbox_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refuse(*_: object) -> Execution:
        raise SandboxError("isolation is not full: seccomp\nis missing")

    monkeypatch.setattr(__main__, "_run_once", refuse)
    assert main(["run", write(tmp_path / "cell.py", "1"), "--isolation", "full"]) == 2
    assert capsys.readouterr().err == "error: isolation is not full: seccomp is missing\n"


class FakePool:
    """Has every layer but those of `missing`, and runs nothing."""

    missing: ClassVar[dict[str, str]] = {}

    def __init__(self, **options: object) -> None:
        assert options["isolation"] == "available"
        self.layers: dict[str, str | None] = {}

    async def __aenter__(self) -> "FakePool":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def session(self) -> "FakePool":
        return self

    async def execute(self, code: str, timeout_s: float) -> None:
        self.layers = {name: self.missing.get(name) for name in LAYERS}


@pytest.mark.parametrize(
    ("missing", "verdict"),
    [
        ({}, "available"),
        ({"cgroup": "nobody delegated it"}, "available"),
        (
            {"cgroup": "nobody delegated it", "seccomp": "old kernel", "landlock": "not in this kernel"},
            "not available: landlock, seccomp missing",
        ),
    ],
)
def test_doctor_shows_every_layer_and_the_verdict(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: dict[str, str],
    verdict: str,
) -> None:
    monkeypatch.setattr(doctor, "InterpreterPool", FakePool)
    monkeypatch.setattr(FakePool, "missing", missing)
    assert main(["doctor"]) == (0 if verdict == "available" else 1)
    lines = capsys.readouterr().out.splitlines()
    for name, layer in LAYERS.items():
        (at,) = [i for i, line in enumerate(lines) if line.split()[0] == name]
        state, stops = re.split(r" {2,}", lines[at])[1:]
        lacking = "optional" if name == "cgroup" else "missing"
        assert (state.strip(), stops) == (lacking if name in missing else "in force", layer.stops)
        if name in missing:
            assert lines[at + 1].split(maxsplit=1) == ["missing:", missing[name]]
            assert lines[at + 2].split(maxsplit=1) == ["mend:", layer.mend]
    assert lines[-1] == f'isolation="full" is {verdict}'


def test_doctor_for_machines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "InterpreterPool", FakePool)
    monkeypatch.setattr(FakePool, "missing", {"view": "no user namespaces"})
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["is_full_available"] is False
    assert {name: layer["missing"] for name, layer in report["layers"].items()} == {
        **dict.fromkeys(LAYERS),
        "view": "no user namespaces",
    }
    assert report["layers"]["cgroup"] == {
        "missing": None,
        "stops": LAYERS["cgroup"].stops,
        "mend": LAYERS["cgroup"].mend,
        "is_optional": True,
    }


def test_doctor_says_of_this_machine_what_a_pool_does_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    async def open_full() -> bool:
        try:
            async with InterpreterPool(size=1, preload=(), isolation="full") as pool:
                return (await pool.session().execute("6 * 7", 20)).text == "42"
        except SandboxError:
            return False

    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert list(report["layers"]) == list(LAYERS)
    assert report["layers"]["rlimits"]["missing"] is None  # every Linux has them
    is_full = asyncio.run(open_full())
    assert (status, report["is_full_available"]) == (0 if is_full else 1, is_full)


@pytest.fixture
def base() -> Iterator[Path]:
    """An empty directory for temporary files, short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as directory:
        yield Path(directory)


def start_service(base: Path, *argv: str, **variables: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "MTPO_SANDBOX_TOKEN"}
    return subprocess.Popen(
        [sys.executable, "-m", "sandbox", "serve", "--port", "0", "--size", "2", *argv],
        env=environment | {"TMPDIR": str(base), **variables},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(pid: int) -> list[int]:
    below = [
        int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()
    ]
    return below + [grandchild for child in below for grandchild in children(child)]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_service_leaves_nothing_behind(base: Path, stop: signal.Signals) -> None:
    async def use(url: str, token: str) -> tuple[str, list[int]]:
        async with RemoteInterpreter(url, token) as remote:
            session = remote.session()
            text = (await session.execute("6 * 7", 20)).text
            processes = children(service.pid)
            service.send_signal(stop)
            remote.open_sessions.clear()  # a client that does not say goodbye
            return text, processes

    service = start_service(base)
    try:
        assert service.stdout is not None and service.stderr is not None
        token = service.stdout.readline().removeprefix("token: ").strip()
        found = re.match(r"serving 2 kernels at (http://127\.0\.0\.1:\d+), ", service.stdout.readline())
        assert found, service.stderr.read()
        text, processes = asyncio.run(use(found[1], token))
        assert text == "42"
        assert service.wait(timeout=20) == 0
        assert (service.stdout.read(), service.stderr.read().count("Traceback")) == ("", 0)
        deadline = time.monotonic() + 5
        while any(map(is_alive, processes)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert processes and not any(map(is_alive, processes))
        assert list(base.iterdir()) == []
    finally:
        service.kill()
        service.communicate()


@pytest.mark.parametrize("is_in_file", [True, False])
def test_a_token_that_was_given_is_taken_and_not_printed(
    base: Path, tmp_path: Path, is_in_file: bool
) -> None:
    async def ask(url: str) -> str:
        async with RemoteInterpreter(url, TOKEN) as remote, remote.session() as session:
            return (await session.execute("6 * 7", 20)).text

    if is_in_file:
        service = start_service(
            base,
            "--token-file",
            write(tmp_path / "token", TOKEN + "\n"),
            MTPO_SANDBOX_TOKEN="another-token-for-the-tests",
        )
    else:
        service = start_service(base, MTPO_SANDBOX_TOKEN=TOKEN)
    try:
        assert service.stdout is not None
        line = service.stdout.readline()
        assert line.startswith("serving 2 kernels at ")
        assert asyncio.run(ask(line.split()[4].rstrip(","))) == "42"
    finally:
        service.terminate()
        rest = "".join(service.communicate(timeout=20))
    assert TOKEN not in line + rest
