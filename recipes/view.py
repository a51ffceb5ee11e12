"""Write the report of a run, and serve it to a browser on this machine.

    python -m recipes.view runs/quickstart
    python -m recipes.view runs/eval-dpo --compare runs/eval-sft

The report is one file that any browser opens without this command: RUN/report.html. The server answers on 127.0.0.1
only, with that file and nothing else, until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

from eval.report import write_report
from mtpo.cli import run_recipe
from mtpo.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write the report of a run, and serve it to a browser on this machine."""

    FIRST: ClassVar = "run"
    run: str = field(metadata={"help": "folder of any recipe; may come first, without --run"})
    compare: str | None = field(default=None, metadata={"help": "another run, for what changed"})
    limit: int = field(default=10_000, metadata={"help": "trajectories to put into the report, about"})
    tokenizer: str | None = field(default=None, metadata={"help": "name or folder; the run's by default"})
    port: int = field(default=0, metadata={"help": "port on 127.0.0.1; 0 takes a free one"})
    no_browser: bool = field(default=False, metadata={"help": "only print the address"})

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise InputError(f"--port must be between 0 and 65535, got {self.port}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, view, "recipes.view", argv)


def view(config: Config) -> str:
    report = write_report(config.run, compare=config.compare, tokenizer=config.tokenizer, limit=config.limit)
    with report_server(report, config.port) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        print(f"{report} at {url}, until Ctrl-C", flush=True)
        if not config.no_browser:
            webbrowser.open(url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    return f"stopped; the report stays in {report}"


def report_server(report: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of one file on loopback.

    It answers only requests that name it by a loopback address: a web page that has its own name resolve to
    127.0.0.1 must not get to read the report.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in ("127.0.0.1", "localhost"):
                self.send_error(403, "only for 127.0.0.1")
            elif self.path != "/":
                self.send_error(404)
            else:
                self._send(report.read_bytes())

        def _send(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def log_request(self, code: object = "-", size: object = "-") -> None:
            """Nobody reads a log of their own requests."""

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    raise SystemExit(main())
