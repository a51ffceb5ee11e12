"""The scripted model of `tests.crash_driver`, in a process that can be killed. Prints its port; ends with its stdin.

A request is the JSON list [session, turn] on a line, the answer a JSON text on a line.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys


def replies(session: str) -> list[str]:
    """What the model writes in a session: cells that need the state of earlier ones, and mostly an answer."""
    rng = random.Random(session)
    total = rng.randrange(100)
    cells = [f"total = {total}\nprint(total)"]
    for _ in range(rng.randrange(4)):
        factor, term = rng.randrange(2, 10), rng.randrange(100)
        total = total * factor + term
        cells.append(f"total = total * {factor} + {term}\nprint(total)")
    match rng.randrange(10):
        case 0:
            cells.append("print(total / 0)")
        case 1:
            cells.append("import os\nos._exit(total % 100)")  # a death by the code's own hand is no fault
    answer = "I do not know." if rng.randrange(10) == 0 else f"It is $\\boxed{{{total}}}$."
    return [*(f"```python\n{cell}\n```" for cell in cells), answer]


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    line = await reader.readline()
    if not line:  # the driver was killed before it had asked
        return writer.close()
    session, turn = json.loads(line)
    await asyncio.sleep(random.uniform(0.0, 0.02))  # so that there are always answers for a kill to cut off
    writer.write(json.dumps(replies(session)[turn]).encode() + b"\n")
    writer.close()


async def main() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
