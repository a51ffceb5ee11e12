"""The model of the soak, which is asked for sums in steps, and the server that it is behind.

    python -m benchmarks.soak_model TOKENIZER.json PORT

What it writes depends on the prompt and on the seed of the turn alone, so runs can be compared. The server ends
when its stdin does.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tokenizers import Tokenizer

from mtpo.rollout import Generation
from mtpo.trajectory import Problem

NAME = "sums"
MAX_CONTEXT = 4096
END_OF_TURN = "<end_of_turn>"
SQUARE = "(x + it)^2"
SLIP_SHARE = 0.1
"""Of the steps, that the model gets wrong."""
LONGEST_TURN_S = 0.1


def make_problems(num: int, seed: int) -> list[Problem]:
    """One to three steps from a number to another; every other answer takes algebra to compare."""
    rng = random.Random(seed)
    problems: list[Problem] = []
    for index in range(num):
        start = value = rng.randrange(1, 100)
        question = f"Start with {start}."
        for _ in range(rng.randint(1, 3)):
            factor, term = rng.randrange(2, 10), rng.randrange(100)
            value = value * factor + term
            question += f" Then take {factor} times it plus {term}."
        if index % 2:
            problems.append(Problem(f"{NAME}/{index}", f"{question} What is it?", str(value)))
        else:
            problems.append(Problem(f"{NAME}/{index}", f"{question} Expand {SQUARE}.", f"(x + {value})^2"))
    return problems


def next_turn(prompt: str, seed: int) -> str:
    """A cell that goes on from the state that the cells before it left, or the answer from what the last one showed."""
    steps = re.findall(r"take (\d+) times it plus (\d+)\.", prompt)
    outputs = re.findall(r"```output\n(.*?)\n```", prompt, re.DOTALL)
    if not outputs:
        [start] = re.findall(r"Start with (\d+)\.", prompt)
        return f"```python\nvalue = {start}\nprint(value)\n```"
    if len(outputs) <= len(steps):
        factor, term = steps[len(outputs) - 1]
        slip = " + 1" if random.Random(seed).random() < SLIP_SHARE else ""
        return f"```python\nvalue = value * {factor} + {term}{slip}\nprint(value)\n```"
    if not outputs[-1].isdigit():
        return "I do not know."
    value = int(outputs[-1])
    answer = f"x^2 + {2 * value}x + {value**2}" if SQUARE in prompt else str(value)
    return rf"It is $\boxed{{{answer}}}$."


def generate(tokenizer: Tokenizer, prompt_ids: list[int], seed: int) -> Generation:
    """The next turn as ids, with log-probs that tell each id from all others."""
    text = next_turn(tokenizer.decode(prompt_ids, skip_special_tokens=False), seed)
    ids = tuple(tokenizer.encode(text + END_OF_TURN, add_special_tokens=False).ids)
    return Generation(ids, tuple(-1 / (1 + i) for i in ids), "stop")


class Handler(BaseHTTPRequestHandler):
    """`/v1/models` and `/v1/completions`, as vLLM answers them."""

    protocol_version = "HTTP/1.1"  # connections stay open, so that a kill cuts them
    tokenizer: Tokenizer

    def do_GET(self) -> None:
        self._reply({"data": [{"id": NAME, "max_model_len": MAX_CONTEXT}]})

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        if len(body := self.rfile.read(length)) < length:
            raise ConnectionResetError("the client has ended")
        request = json.loads(body)
        time.sleep(
            random.uniform(0.0, LONGEST_TURN_S)
        )  # so that there are always answers for a kill to cut off
        turn = generate(self.tokenizer, request["prompt"], request["seed"])
        choice = {
            "token_ids": turn.ids,
            "logprobs": {"token_logprobs": turn.logps},
            "finish_reason": turn.finish_reason,
        }
        self._reply({"choices": [choice]})

    def _reply(self, content: dict[str, Any]) -> None:
        payload = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None: ...  # pyright: ignore[reportIncompatibleMethodOverride]


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients may be killed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def main() -> None:
    Handler.tokenizer = Tokenizer.from_file(sys.argv[1])
    server = Server(("127.0.0.1", int(sys.argv[2])), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    os._exit(0)  # whatever it is working on


if __name__ == "__main__":
    main()
