"""One trajectory as lines for a terminal, its mask in colour; no byte of it is an escape sequence of the model's."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence

from eval.predictions import outcome
from eval.report.tokens import Piece
from mtpo.grader import Grade
from mtpo.trajectory import Problem, Segment, Trajectory

STYLES = {"prompt": ("2", "2"), "action": ("36", "96"), "observation": ("33", "33")}
"""SGR codes of each kind; those of an action take turns, so that its tokens can be told apart."""
UNLIKELY = -2.302585
"""Log-prob of 10 %: sampled tokens below it are underlined."""


def printable(text: str) -> str:
    """The text with everything that a terminal would act upon, or not show, in the notation of Python.

    Newlines and tabs stay; escape sequences, other control characters, and format characters such as those that
    reorder text become visible.
    """
    return "".join(
        char
        if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text
    )


def trajectory_lines(
    trajectory: Trajectory,
    problem: Problem,
    grade: Grade,
    pieces: Mapping[int, Piece] | None = None,
    *,
    color: bool,
) -> Iterator[str]:
    """The trajectory from top to bottom.

    Args:
        pieces: what each id looks like; without them a segment is shown by its text, and not token by token.
        color: whether escape sequences of our own may be used; the headings say everything without them.
    """
    yield f"{printable(trajectory.problem_id)} : {trajectory.sample}"
    answer = "no answer" if grade.answer is None else f"answer {printable(grade.answer)}"
    yield f"{outcome(trajectory, grade)}: {answer}, gold {printable(problem.answer)} ({printable(grade.rule)})"
    yield (
        f"stopped: {trajectory.stop_reason.value}; {trajectory.num_turns} turns, "
        f"{trajectory.num_action_tokens} of {len(trajectory.input_ids)} tokens with mask 1; "
        f"policy {printable(trajectory.policy) or 'unknown'}, iteration {trajectory.iteration}"
    )
    if trajectory.fault is not None:
        yield f"fault: {printable(trajectory.fault)}"
    for number, segment in enumerate(trajectory.segments):
        yield ""
        yield _heading(segment, number, trajectory)
        yield _body(segment, pieces, color)
    if (last_words := trajectory.metadata.get("last_words")) is not None:  # of somebody who ended the talk
        yield f"\n--- never read ---\n{printable(str(last_words))}"
    if color:
        kinds = "  ".join(_paint(kind, STYLES[kind][0], True) for kind in STYLES)
        yield f"\n{kinds}  {_paint('underlined: sampled with p < 10 %', '4', True)}"


def _heading(segment: Segment, number: int, trajectory: Trajectory) -> str:
    is_action = segment.kind == "action"
    parts = [f"{segment.kind}, turn {(number + 1) // 2}" if is_action else segment.kind]
    parts += [f"{len(segment.ids)} tokens", f"mask {int(is_action)}"]
    if segment.logps is not None:
        parts.append(f"sum of log p {sum(segment.logps):.2f}")
    if segment.kind == "observation" and number // 2 <= len(trajectory.executions):
        execution = trajectory.executions[number // 2 - 1]
        parts += [execution.status, f"{execution.seconds:.3g} s"]
    return f"--- {', '.join(parts)} ---"


def _body(segment: Segment, pieces: Mapping[int, Piece] | None, color: bool) -> str:
    if pieces is None:
        return _paint(printable(segment.text), STYLES[segment.kind][0], color)
    logps: Sequence[float | None] = segment.logps or [None] * len(segment.ids)
    shown = []
    for place, (token_id, logp) in enumerate(zip(segment.ids, logps, strict=True)):
        piece = pieces[token_id]
        text = piece if isinstance(piece, str) else "".join(f"<{byte:02x}>" for byte in piece)
        style = STYLES[segment.kind][place % 2] + (";4" if logp is not None and logp < UNLIKELY else "")
        shown.append(_paint(printable(text), style, color))
    return "".join(shown)


def _paint(text: str, style: str, color: bool) -> str:
    """Line by line, so that a pager that cuts at a newline keeps the colours."""
    if not color:
        return text
    return "\n".join(f"\x1b[{style}m{line}\x1b[0m" if line else "" for line in text.split("\n"))
