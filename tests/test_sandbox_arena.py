"""That the hostile suite has teeth, and says what it means. Apart from the suite itself: one arena at a time."""

import re
from pathlib import Path

import pytest

from mtpo.errors import InputError
from sandbox.hostile.arena import MARKER
from sandbox.hostile.attacks import Attack, load_attacks
from sandbox.hostile.suite import main, run_attacks

FILE = load_attacks()
NEEDS_A_LAYER = [attack for attack in FILE.attacks if attack.held_by == "layers"]
CATEGORIES = sorted({attack.category for attack in NEEDS_A_LAYER})


@pytest.mark.parametrize("category", CATEGORIES)
async def test_an_attack_of_each_kind_succeeds_without_isolation(category: str) -> None:
    for attack in NEEDS_A_LAYER:
        if attack.category == category:
            outcome, *_ = await run_attacks([attack], prelude=FILE.prelude, isolation="none")
            if f"{attack.shows}: " in outcome.reason:
                return
    pytest.fail(f"no attack on {category} succeeds, even without isolation: they prove nothing")


async def test_what_a_cell_achieves_outside_is_seen() -> None:
    harmful = {
        "print('ESC' + 'APED')": "marker",
        "print(open('$secret_file').read())": "secret",
        "open('$new_file', 'w')": "file",
        "socket.create_connection(('127.0.0.1', $tcp_port))": "connection",
        "os.kill($victim_pid, 9)": "victim",
        "os.kill($neighbour_pid, 9)": "neighbour",
        "open('$pool_dir/left', 'w')": "left",
    }
    attacks = [Attack(kind, "any", "", (code,), kind) for code, kind in harmful.items()]
    attacks.append(Attack("status", "any", "", ("1",), "status", ends=("timeout",)))
    attacks.append(Attack("harmless", "any", "", ("1", "1 / 0"), "marker"))
    *outcomes, end = await run_attacks(attacks, prelude=FILE.prelude, isolation="none")
    assert {outcome.name: outcome.reason.split(":")[0] for outcome in outcomes} == {
        **{attack.name: attack.name for attack in attacks[:-1]},
        "harmless": "",
    }
    assert end.reason == "left: 1 files more"


def test_there_are_a_hundred_attacks_of_twenty_kinds() -> None:
    assert len(FILE.attacks) >= 100
    assert len({attack.category for attack in FILE.attacks}) >= 20


@pytest.mark.parametrize("attack", FILE.attacks, ids=lambda attack: attack.name)
def test_attack_says_how_it_succeeds(attack: Attack) -> None:
    code = "\n".join((*attack.cells, attack.other))
    assert MARKER not in code  # an error message that quotes its line would pass for success
    assert attack.shows != "marker" or "escaped(" in code or "probe(" in code or "'ESC' + 'APED'" in code
    assert attack.shows != "status" or attack.ends
    if attack.shows in ("connection", "victim", "file", "secret") and attack.held_by == "layers":
        assert re.search(r"\$\w+|/proc|note\.txt", code)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attacks: []", "expected a mapping of `prelude` and `attacks`"),
        ("{", "not YAML"),
        ("[]", r"attack 1: expected a mapping, got \[\]"),
        ("{name: a}", r"attack 1 \(a\): category must be one line of text, got None"),
        ("{ATTACK, colour: red}", "unknown key 'colour'"),
        ("{ATTACK, cells: print(1)}", r"cells must be a list of code, got 'print\(1\)'"),
        ("{ATTACK, shows: magic}", "shows must be one of .*, got 'magic'"),
        ("{ATTACK, ends: [late]}", r"ends must be a list of .*, got \['late'\]"),
        ("{ATTACK, held_by: luck}", "held_by must be 'layers' or 'pool', got 'luck'"),
        ("{ATTACK, timeout_s: 0}", "timeout_s must be a number of seconds up to 60, got 0"),
        ("{ATTACK, fork: 2}", "fork must be true or false, got 2"),
        ("{ATTACK, other: 5 $}", "`\\$` stands for a name from outside"),
        ("{ATTACK}, {ATTACK}", "two attacks have the name 'a'"),
    ],
)
def test_broken_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "attacks.yaml"
    whole = "name: a, category: c, tries: t, shows: marker, cells: ['1']"
    for key in re.findall(r"ATTACK, (\w+)", text):
        whole = re.sub(rf"{key}: (\[.*?\]|\w+)(, |$)", "", whole)
    entries = text.replace("ATTACK", whole.rstrip(", "))
    path.write_text(text if text[0] in "a" or text == "{" else f"prelude: ''\nattacks: [{entries}]")
    with pytest.raises(InputError, match=message) as caught:
        load_attacks(path)
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_attacks(tmp_path / "none.yaml")


def test_unknown_category_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--category", "magic"]) == 2
    assert re.match(r"error: --category magic: expected one of \[.*'network'.*\]\n$", capsys.readouterr().err)
