"""What the tests of a Ray cluster run in its actors; imports nothing heavy, because every actor imports it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

from mtpo.errors import InputError
from mtpo.rollout import Generation, Sampling
from sandbox import InterpreterPool


class Echo:
    """An engine that samples the number of its process; it dies of the prompt [0], refuses [1], never ends [2]."""

    max_context, fingerprint = 100, "echo"

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, session: str = ""
    ) -> Generation:
        if prompt_ids == [0]:
            os._exit(1)
        if prompt_ids == [1]:
            raise InputError("a prompt of 1")
        if prompt_ids == [2]:
            await asyncio.Event().wait()
        return Generation((os.getpid(),), None, "stop")

    def release(self, session: str) -> None: ...

    async def aclose(self) -> None: ...


def make_pool() -> InterpreterPool:
    return InterpreterPool(size=4, preload=("math",), isolation="available")


def unusable() -> Any:
    raise InputError("there is no such model")
