"""Training rows as conversations, in the form that TRL's own trainers and others take.

    {"prompt": [message], "chosen": [message, ...], "rejected": [message, ...]}     a pair
    {"prompt": [message], "completion": [message, ...], "label": true}             a label; without it, a demonstration

Messages are {"role", "content"}, tool output in the role and fence that the model's family has for it, beside the
row's problem and samples; a system text stands in front of the question. What is lost is who wrote a token, and
which ids were sampled: TRL's DPO and KTO trainers tokenise the text again and count everything after the prompt, tool
output and turn headers too. `mtpo.integrations.trl` takes the rows as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from mtpo.batches import Row, row_name, sides
from mtpo.chat import ChatFormat, Message
from mtpo.errors import InputError
from mtpo.trajectory import Trajectory

Key = tuple[str, tuple[int, ...]]
"""A problem's id and the ids of one of its trajectories."""


def conversation_rows(
    rows: Sequence[Row], trajectories: Iterable[Trajectory], chat: ChatFormat
) -> Iterator[dict[str, Any]]:
    """The rows as text, in their order.

    Args:
        trajectories: those that the rows were made of, and any others.
        chat: of the model that sampled them.

    Raises:
        InputError: the trajectory of a row is not among them.
    """
    wanted = {_key(row, side) for row in rows for side in sides(row)}
    found: dict[Key, list[Message]] = {}
    for trajectory in trajectories:
        key = trajectory.problem_id, tuple(trajectory.input_ids)
        if key in wanted:
            found[key] = messages_of(trajectory, chat)
    for row in rows:
        columns = {name: value for name, value in row.items() if not name.endswith(("input_ids", "_mask"))}
        for side in sides(row):
            if (messages := found.get(_key(row, side))) is None:
                raise InputError(
                    f"{row_name(row)}: its {side.strip('_') or 'trajectory'} is not among the trajectories: "
                    "expected those that the rows were made of"
                )
            columns |= {"prompt": messages[:1], side.strip("_") or "completion": messages[1:]}
        yield columns


def messages_of(trajectory: Trajectory, chat: ChatFormat) -> list[Message]:
    """The conversation as the model's template is given it."""
    messages: list[Message] = [{"role": "user", "content": trajectory.segments[0].text}]
    for before, segment in pairwise(trajectory.segments):
        if segment.kind == "action":
            messages.append({"role": "assistant", "content": segment.text})
        elif chat.observation(segment.text, after=before.ids, role="user").ids == segment.ids:
            messages.append({"role": "user", "content": segment.text})  # somebody said it
        else:
            messages.append(chat.tool_message(segment.text))
    return messages


def _key(row: Row, side: str) -> Key:
    return row["problem_id"], tuple(row[f"{side}input_ids"])
