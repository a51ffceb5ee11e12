"""A scripted HTTP server on loopback that can die and come back."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]


class FakeServer:
    """Answers what is posted to `path` with what `answer` makes of the request, in a thread a request.

    When it stops, what it is working on gets no answer. Its address stays its own, so that it can come back.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], Answer],
        *,
        path: str = "/v1/completions",
        model: str = "policy",
        **card: Any,
    ) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answer = answer
        self.path = path
        self.card = {"id": model, "max_model_len": 512, **card}
        self._port = 0
        self.start()
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        handler = type("Handler", (_Handler,), {"fake": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", self._port), handler)
        self._http.block_on_close = False
        self.is_up = True
        self._port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.is_up = False
        self._http.shutdown()
        self._http.server_close()

    @property
    def prompts(self) -> list[Any]:
        return [request["prompt"] for request in self.requests]


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._reply(200, {"data": [self.fake.card]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == self.fake.path
        self.fake.requests.append(body)
        status, content = self.fake.answer(body)
        if self.fake.is_up:
            self._reply(status, content)

    def _reply(self, status: int, content: Any) -> None:
        payload = json.dumps(content).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

    def log_message(self, *_: Any) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]
