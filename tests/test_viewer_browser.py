"""The report in a headless Chromium, from end to end."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest
import pytest_asyncio

from eval.report import write_report
from mtpo.trajectory import Execution, Problem, StopReason
from tests.chromium import EXECUTABLE, Tab, chromium_tab
from tests.tiny_runs import APPLES, PEARS, attempt, write_log, write_pairs, write_run, write_set

pytestmark = [
    pytest.mark.skipif(
        EXECUTABLE is None, reason="no chromium, chromium-browser or google-chrome on the PATH"
    ),
    pytest.mark.slow,
]

EVIL = (
    "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    '<iframe srcdoc="<script>parent.document.title = \'owned\'</script>"></iframe><svg onload="alert(1)">'
    '<a href="javascript:alert(2)">x</a><style>*{display:none}</style>\u2028\u202e ${alert(3)} `'
)
RIGHT = attempt(
    APPLES,
    0,
    "So:\n```python\nprint(2 + 3)  # add\n```",
    Execution("print(2 + 3)", "5", "ok", 0.01),
    "It is \\boxed{5}",
)
FAILED = attempt(
    APPLES, 1, "So:\n```python\nprint(2 + x)\n```",
    Execution("print(2 + x)", "NameError: name 'x' is not defined", "error", 0.01), "It is \\boxed{6}",
)  # fmt: skip
TALK = replace(
    attempt(APPLES, 2, "Count *them*.", Execution("", "I **see**. <b>Why?</b>", "ok", 0.0), "Add."),
    executions=(),
    stop_reason=StopReason.CLOSED,
    metadata={"student": "scripted", "ended_by": "student", "last_words": "Thank you <i>all</i>!"},
)
"""With a student instead of a tool."""
EUROS = attempt(PEARS, 0, "2 · 4 € is \\boxed{8}")


@pytest_asyncio.fixture
async def tab() -> AsyncIterator[Tab]:
    async with chromium_tab() as tab:
        await tab.resize(1280, 860)
        yield tab
        assert tab.complaints == []
        assert [url for url in tab.requests if not url.startswith(("file:", "about:"))] == []


@pytest.fixture
def report(tmp_path: Path) -> str:
    """An address: one run with pairs, trained on, beside another that gets both problems wrong."""
    run = write_run(tmp_path / "run", [RIGHT, FAILED, EUROS])
    write_pairs(run / "labels" / "pairs.jsonl", (RIGHT, FAILED))
    write_log(run / "train")
    other = write_run(tmp_path / "other", [attempt(APPLES, 0, "\\boxed{7}"), attempt(PEARS, 0, "\\boxed{9}")])
    return write_report(run, compare=other).as_uri()


async def lists(tab: Tab, *names: str) -> None:
    """Wait until these are the results in sight: problem and sample."""
    shown = "JSON.stringify([...document.querySelectorAll('.result .name')].map((e) => e.textContent))"
    await tab.until(f"{shown} === {json.dumps(json.dumps(names, separators=(',', ':')))}")


async def detail(tab: Tab) -> str:
    return await tab.evaluate("document.getElementById('detail').innerText")


async def test_a_talk_is_shown_as_prose_with_what_was_said_last(tab: Tab, tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "run", [RIGHT, TALK])).as_uri()
    await tab.open(report + "#trajectories")
    await lists(tab, "toy/0 : 0", "toy/0 : 2")
    await tab.click(".result:nth-of-type(2)")
    await tab.until("document.querySelector('#detail .unread')")
    shown = await detail(tab)
    assert "Thank you <i>all</i>!" in shown and "ended_by" in shown and "closed" in shown
    titles = "[...document.querySelectorAll('#detail .turn h4')].map((e) => e.firstChild.textContent).join()"
    assert await tab.evaluate(titles) == "question,turn 1,reply,turn 2,reply, never read"
    assert await tab.evaluate("document.querySelectorAll('#detail .turns pre').length") == 0


async def test_open_filter_open_a_pair_and_look_at_its_mask(tab: Tab, report: str) -> None:
    await tab.open(report)
    assert "66.7%" in (shown := await tab.evaluate("document.body.innerText")), "2 of 3, over 2 problems"
    assert "Learning curve" not in shown and "Training" in shown

    await tab.click("nav a[href='#trajectories']")
    await lists(tab, "toy/0 : 0", "toy/0 : 1", "toy/1 : 0")  # those of the first run
    await tab.click("[data-filter=wrong]")
    await lists(tab, "toy/0 : 1")
    await tab.click("[data-filter=wrong]")
    await tab.click("[data-filter=error]")
    await lists(tab, "toy/0 : 1")
    await tab.click(".result")
    await tab.until("document.querySelector('#detail pre.failed .raise')")
    assert await tab.evaluate("document.querySelector('pre.code .builtin').textContent") == "print"
    assert "answer 6" in await detail(tab)

    await tab.open(report + "#pairs?at=1")  # an address of another report: there is one pair
    assert "Choose one" in await detail(tab)
    await lists(tab, "toy/0 : 0 over 1")
    await tab.click(".result")
    await tab.until("document.querySelectorAll('.side').length === 2")
    # Both begin with the prompt and "So:\n```python\nprint(2 + ".
    assert "the prompt, and " in (shown := await detail(tab)) and "tokens shared" in shown
    marked = "[...document.querySelectorAll('.side.good .shared')].map((e) => e.textContent).join('')"
    assert await tab.evaluate(marked) == "So:\nprint(2 + "

    await tab.click("[data-view=mask]")
    await tab.until("document.querySelectorAll('.side .tok').length > 0")
    sides = [
        await tab.evaluate(f"[...document.querySelectorAll('.side.{side} .tok.shared')].map((e) => e.textContent)")
        for side in ("good", "bad")
    ]  # fmt: skip
    assert sides[0] == sides[1] and "".join(sides[0]).startswith("So:⏎\n```python⏎\nprint(2")
    same = takewhile(lambda ids: ids[0] == ids[1], zip(RIGHT.input_ids, FAILED.input_ids, strict=False))
    assert f"{len(list(same))} tokens shared" in await detail(tab)
    actions = await tab.evaluate(
        "[...document.querySelectorAll('.side.good .tok.action')].map((e) => e.textContent).join('')"
    )
    assert actions == "So:⏎\n```python⏎\nprint(2 + 3)  # add⏎\n```<|im_end|>It is \\boxed{5}<|im_end|>"


async def test_every_token_says_who_wrote_it_and_how_likely_it_was(tab: Tab, report: str) -> None:
    await tab.open(report + "#trajectories?set=0&q=pears&view=mask")
    await tab.click(".result")
    await tab.until("document.querySelectorAll('.tok.action').length > 3")
    kinds = await tab.evaluate("[...document.querySelectorAll('.tokens .tok')].map((e) => e.classList[1])")
    assert [int(kind == "action") for kind in kinds] == EUROS.completion_mask
    x, y = await tab.evaluate(
        "(() => { const b = document.querySelectorAll('.tokens .tok.action')[2].getClientRects()[0];"
        " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    await tab.point(x, y)
    tip = await tab.until(
        "!document.getElementById('tip').hidden && document.getElementById('tip').textContent"
    )
    assert "log p -0.300, p 74.1 %" in tip, "the third token of a turn has log-prob -0.3"
    assert f"id {EUROS.actions[0].ids[2]}" in tip
    # The euro sign is three tokens of one byte each.
    split = "[...document.querySelectorAll('.tok.action.bytes')].map((e) => e.textContent)"
    assert (await tab.evaluate(split))[-3:] == ["e2", "82", "ac"]
    assert "bytes of €" in await tab.evaluate(
        "[...document.querySelectorAll('.tok.bytes')].at(-1).dataset.tip"
    )
    await tab.press("Escape")


async def test_what_changed_between_two_runs(tab: Tab, report: str) -> None:
    await tab.open(report + "#trajectories")
    await lists(tab, "toy/0 : 0", "toy/0 : 1", "toy/1 : 0")
    await tab.click("[data-filter=worsened]")
    await lists(tab)  # nothing of this run is wrong where the other is right
    await tab.click("[data-filter=worsened]")
    await tab.click("[data-filter=improved]")
    await lists(tab, "toy/0 : 0", "toy/1 : 0")
    await tab.click(".result")
    await tab.until("document.querySelectorAll('.side').length === 2")
    assert await tab.evaluate("[...document.querySelectorAll('.side .verdict code')].map((e) => e.textContent)") == [
        "5", "7"
    ]  # fmt: skip


async def test_the_keyboard_is_enough(tab: Tab, report: str) -> None:
    await tab.open(report)
    await tab.press("/", "/")
    await tab.until("document.activeElement.id === 'search'")
    await tab.type("nameerror")
    await tab.until("document.getElementById('count').textContent === '1 of 5 trajectories'")
    await lists(tab, "toy/0 : 1")  # found in the text of the tool's output
    await tab.press("Escape")
    await tab.press("j", "j")
    await tab.until("document.getElementById('detail').innerText.includes('answer 6')")
    await tab.press("m", "m")
    await tab.until("document.querySelector('.tokens')")
    await tab.press("Escape")
    await tab.until("document.getElementById('detail').innerText.includes('press j')")
    await tab.press("/", "/")
    await tab.until("document.activeElement.id === 'search'")
    await tab.evaluate("document.activeElement.select()")
    await tab.type("toy/0")
    await tab.until("document.getElementById('count').textContent === '2 of 5 trajectories'")
    await tab.press("Escape")
    for key in ("j", "j", "j", "k"):
        await tab.press(key, key)
    await tab.until("document.getElementById('detail').innerText.includes('answer 5')")
    assert (
        await tab.evaluate("document.querySelector('[aria-selected=true] .name').textContent") == "toy/0 : 0"
    )


async def test_model_output_is_never_executed(tab: Tab, tmp_path: Path) -> None:
    problem = Problem(EVIL, EVIL, EVIL, EVIL, EVIL)
    code = f"```python\n{EVIL}\n```"
    bad = attempt(
        problem, 0, code, Execution(EVIL, EVIL, "error", 0.1), f"{EVIL}\\boxed{{{EVIL}}}", policy=EVIL
    )
    good = attempt(problem, 1, EVIL, metadata={EVIL: EVIL})
    run = write_run(tmp_path / "run", [])
    write_set(run / "evil", [problem], [bad, good])
    write_pairs(run / "labels" / "pairs.jsonl", (good, bad))
    page = write_report(run).as_uri()
    for address in (
        "",
        "#trajectories?at=0",
        "#trajectories?at=0&view=mask",
        "#pairs?at=0",
        "#pairs?at=0&view=mask",
    ):
        await tab.open(page + address)
        if address:
            await tab.until("document.querySelector('#detail .turns section')")
        await asyncio.sleep(0.1)  # what an <img> or an <iframe> would do, it does later
        assert (await tab.evaluate("document.title")).startswith("run ")
        assert await tab.evaluate("document.querySelectorAll('img, iframe, a[href^=javascript]').length") == 0
        assert await tab.evaluate("document.querySelectorAll('script:not([type])').length") == 1
        if "mask" not in address and address:
            assert "<script>document.title" in await detail(tab)
    assert (
        await tab.evaluate(
            "(() => { try { document.body.innerHTML = '<b>'; } catch { return 'refused'; } })()"
        )
        == "refused"
    )
    tab.complaints.clear()  # the line above was refused aloud


async def test_no_width_needs_a_horizontal_scrollbar(tab: Tab, report: str) -> None:
    for width in (1280, 760, 400):
        for address in ("#overview", "#trajectories?at=1", "#pairs?at=0", "#pairs?at=0&view=mask"):
            await tab.resize(width, 800, dark=width == 760)
            await tab.open(report + address)
            if address != "#overview":
                await tab.until("document.querySelector('#detail .turns section')")
            assert await tab.evaluate("document.documentElement.scrollWidth") <= width, (width, address)


async def test_ten_thousand_results_are_a_few_elements(tab: Tab, tmp_path: Path) -> None:
    problems = [Problem(f"toy/{n}", f"{n} + 1?", str(n + 1)) for n in range(500)]
    write_set(tmp_path / "run", problems, [attempt(p, 0, f"\\boxed{{{p.answer}}}") for p in problems])
    await tab.open(write_report(tmp_path / "run").as_uri() + "#trajectories")
    assert 5 < await tab.evaluate("document.querySelectorAll('.result').length") < 60
    await tab.evaluate("document.getElementById('list').scrollTop = 1e9")
    await tab.until("[...document.querySelectorAll('.result .name')].at(-1)?.textContent === 'toy/499 : 0'")
    await tab.click("#search")
    await tab.type("toy/250")
    await tab.until("document.getElementById('count').textContent === '1 of 500 trajectories'")
