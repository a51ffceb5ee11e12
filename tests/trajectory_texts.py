"""Trajectories for those who only read their texts."""

from __future__ import annotations

from mtpo.trajectory import Segment, StopReason, Trajectory


def attempt(*texts: str, stop_reason: StopReason = StopReason.ANSWERED, sample: int = 0) -> Trajectory:
    """Actions and, between them, tool output, beginning with an action; ids are those of the letters."""
    segments = [Segment("prompt", (2,), text="question")]
    for index, text in enumerate(texts):
        ids = tuple(text.encode(errors="replace")) or (1,)
        segments.append(Segment("observation" if index % 2 else "action", ids, text=text))
    fault = "broken" if stop_reason == StopReason.ENVIRONMENT_FAULT else None
    return Trajectory("toy/0", sample, tuple(segments), stop_reason, fault=fault)
