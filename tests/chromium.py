"""A headless Chromium, driven through its DevTools protocol over a websocket: what a test of a page needs."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tornado.httpclient import AsyncHTTPClient
from tornado.websocket import WebSocketClientConnection, websocket_connect

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip
DEADLINE_S = 120.0
"""Only a page that is broken takes so long, also on a busy machine."""


class Tab:
    """One page. It keeps what goes wrong there, and every address that it asks for."""

    def __init__(self, socket: WebSocketClientConnection) -> None:
        self._socket = socket
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._reader = asyncio.ensure_future(self._read())
        self.complaints: list[str] = []
        """Exceptions, errors on the console, dialogs, and what the security policy refused."""
        self.requests: list[str] = []

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = len(self._answers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.write_message(json.dumps({"id": number, "method": method, "params": parameters}))
        answer = await asyncio.wait_for(self._answers[number], DEADLINE_S)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = await self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"
        return result["result"].get("value")

    async def open(self, url: str) -> None:
        """Load a report and wait until its script has started; a new fragment alone does not load it again."""
        await self.send("Page.navigate", url="about:blank")
        await self.send("Page.navigate", url=url)
        await self.until("document.documentElement?.dataset.ready === 'yes'")

    async def until(self, condition: str) -> Any:
        """Wait until a JavaScript expression is truthy; its value, or true for a node."""
        probe = f"((value) => value instanceof Node || value)({condition})"
        deadline = asyncio.get_running_loop().time() + DEADLINE_S
        while not (value := await self.evaluate(probe)):
            assert asyncio.get_running_loop().time() < deadline, f"never true: {condition}; {self.complaints}"
            await asyncio.sleep(0.02)
        return value

    async def click(self, selector: str) -> None:
        """A real click in the middle of the first element that matches."""
        await self.until(f"document.querySelector({json.dumps(selector)})")
        x, y = await self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'nearest'}); const b = e.getClientRects()[0];"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        await self.point(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def point(self, x: float, y: float) -> None:
        await self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    async def press(self, key: str, text: str | None = None) -> None:
        for kind in ("keyDown", "keyUp"):
            pressed = {"text": text} if text and kind == "keyDown" else {}
            await self.send("Input.dispatchKeyEvent", type=kind, key=key, **pressed)

    async def type(self, text: str) -> None:
        await self.send("Input.insertText", text=text)

    async def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.send("Emulation.setEmulatedMedia", features=[scheme])

    async def screenshot(self, path: Path) -> None:
        result = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(result["data"]))

    async def _read(self) -> None:
        while (message := await self._socket.read_message()) is not None:
            event = json.loads(message)
            if "id" in event:
                self._answers[event["id"]].set_result(event)
                continue
            parameters = event["params"]
            match event["method"]:
                case "Network.requestWillBeSent":
                    self.requests.append(parameters["request"]["url"])
                case "Runtime.exceptionThrown":
                    self.complaints.append(str(parameters["exceptionDetails"]))
                case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "assert"):
                    self.complaints.append(str(parameters["args"]))
                case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                    self.complaints.append(parameters["entry"]["text"])
                case "Page.javascriptDialogOpening":
                    self.complaints.append(f"a dialog: {parameters['message']}")


@asynccontextmanager
async def chromium_tab() -> AsyncIterator[Tab]:
    """A tab of a Chromium of its own, with a profile that is thrown away."""
    assert EXECUTABLE is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [EXECUTABLE, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"HOME": profile},
            start_new_session=True,
        )  # fmt: skip
        try:
            address = await _page_address(Path(profile) / "DevToolsActivePort", process)
            socket = await websocket_connect(address, max_message_size=256 << 20)
            tab = Tab(socket)
            for domain in ("Page", "Runtime", "Network", "Log"):
                await tab.send(f"{domain}.enable")
            yield tab
            socket.close()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


async def _page_address(port_file: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = asyncio.get_running_loop().time() + DEADLINE_S
    while process.poll() is None and asyncio.get_running_loop().time() < deadline:
        with suppress(FileNotFoundError, IndexError, OSError, ValueError):
            port = int(port_file.read_text().splitlines()[0])
            listed = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{port}/json/list")
            pages = [t for t in json.loads(listed.body) if t["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        await asyncio.sleep(0.05)
    raise RuntimeError(f"Chromium did not start: exit status {process.poll()}")
