"""The sandbox on the command line: `python -m sandbox run | doctor | serve | attack`."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from mtpo.errors import InputError, MtpoError, SandboxError
from mtpo.trajectory import Execution
from sandbox import TOKEN_VARIABLE
from sandbox.doctor import as_table, lacking_for_full, layer_reports
from sandbox.layers import Policy
from sandbox.pool import InterpreterPool

ISOLATION = get_args(Policy)
MIN_TOKEN_CHARS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status. `run`: 0, or 1 when the code failed, ran out of time or killed its interpreter.
        `doctor`: 0 when isolation="full" is available, else 1. Any: 2 after bad input or a fault of the
        sandbox, said in one line on stderr, as argparse does; 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if argv[:1] == ["attack"]:  # has options of its own
        from sandbox.hostile.suite import main as attack

        return attack(argv[1:])
    options = build_parser().parse_args(argv)
    try:
        return asyncio.run(options.command(options))
    except MtpoError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sandbox", description="The code interpreter.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        added.set_defaults(command=command)
        return added

    run = add("run", run_file, "Run a file in a fresh session and print what a model would read.")
    run.add_argument("file", metavar="FILE", help="Python source; - reads it from stdin")
    run.add_argument("--timeout-s", type=float, default=5.0, help="wall seconds (default: %(default)s)")

    doctor = add("doctor", examine, "Say which layers of isolation this machine gives, and how to mend it.")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")

    serve = add("serve", serve_pool, "Serve one pool of interpreters over HTTP.")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=int, default=8765, help="0 takes any free one (default: %(default)s)")
    serve.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"holds the token that clients must send (default: ${TOKEN_VARIABLE}, else a random one, printed)",
    )
    serve.add_argument(
        "--size", type=int, default=16, help="kernels alive at the same time (default: %(default)s)"
    )
    serve.add_argument(
        "--idle-timeout-s",
        type=float,
        default=600.0,
        help="seconds without a request after which a session is closed (default: %(default)g)",
    )
    for command in (run, serve):
        command.add_argument(
            "--isolation",
            choices=ISOLATION,
            default="available",
            help="full refuses to start with less (default: %(default)s)",
        )
    commands.add_parser("attack", help="Run hostile code and say what held. See its own --help.")
    return parser


async def run_file(options: argparse.Namespace) -> int:
    execution = await _run_once(_read_source(options.file), options.timeout_s, options.isolation)
    print(execution.text)
    return 0 if execution.status == "ok" else 1


def _read_source(file: str) -> str:
    """
    Raises:
        InputError: there is no such file, or it is not UTF-8 text.
    """
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None


async def _run_once(code: str, timeout_s: float, isolation: Any) -> Execution:
    async with InterpreterPool(size=1, preload=(), isolation=isolation) as pool, pool.session() as session:
        return await session.execute(code, timeout_s)


async def examine(options: argparse.Namespace) -> int:
    rows = await layer_reports()
    is_full = not lacking_for_full(rows)
    if options.json:
        layers = {row.name: {k: v for k, v in asdict(row).items() if k != "name"} for row in rows}
        print(json.dumps({"is_full_available": is_full, "layers": layers}, indent=2))
    else:
        print(as_table(rows))
    return 0 if is_full else 1


async def serve_pool(options: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM."""
    try:
        from sandbox.serve import create_app
        from sandbox.service import Service, listen
    except ModuleNotFoundError as error:
        raise InputError(f"serve needs {error.name}: pip install -e '.[serve]'") from None
    if not 0 < options.idle_timeout_s < math.inf:
        raise InputError(f"--idle-timeout-s must be a positive number, got {options.idle_timeout_s!r}")
    token = _given_token(options.token_file, os.environ)
    with listen(options.host, options.port, is_token_given=token is not None) as listener:
        if token is None:
            token = secrets.token_urlsafe(32)
            print(f"token: {token}")
        async with InterpreterPool(size=options.size, isolation=options.isolation) as pool:
            health = await pool.health()  # a service that cannot run code should say so now
            if not health.is_healthy:
                raise SandboxError(health.error or "the probe cell failed")
            host, port = listener.getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            print(f"serving {options.size} kernels at {url}, described in {url}/openapi.json", flush=True)
            app = create_app(pool, token, idle_timeout_s=options.idle_timeout_s)
            await Service(app).serve(sockets=[listener])
    return 0


def _given_token(file: Path | None, environment: Mapping[str, str]) -> str | None:
    """The token that the user chose, in a file or else in the environment; None if in neither.

    Raises:
        InputError: there is no such file, or what it holds is no token.
    """
    if file is not None:
        token, source = _read_source(str(file)).strip(), str(file)
    elif TOKEN_VARIABLE in environment:
        token, source = environment[TOKEN_VARIABLE], TOKEN_VARIABLE
    else:
        return None
    if len(token) < MIN_TOKEN_CHARS or not all("!" <= character <= "~" for character in token):
        raise InputError(
            f"{source}: a token has at least {MIN_TOKEN_CHARS} visible ASCII characters and no space, "
            f"got {len(token)} characters"
        )
    return token


if __name__ == "__main__":
    raise SystemExit(main())
