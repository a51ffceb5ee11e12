"""What hostile code must not achieve; `sandbox/hostile/attacks.yaml` says what it tries."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from mtpo.errors import SandboxError
from sandbox.hostile.arena import MARKER, Arena
from sandbox.hostile.attacks import Attack, load_attacks

ROOT = Path(__file__).resolve().parents[1]
FILE = load_attacks()
IDS = [attack.name for attack in FILE.attacks]
ORDINARY_UID = 65534


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def arena() -> AsyncIterator[Arena]:
    try:
        arena = await Arena(FILE.prelude, isolation="full").__aenter__()
    except SandboxError as error:
        pytest.skip(f"no full isolation here: {error}")
    yield arena
    await arena.__aexit__(None, None, None)
    assert not arena.left


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("attack", FILE.attacks, ids=IDS)
async def test_attack_holds(arena: Arena, attack: Attack) -> None:
    outcome = await arena.run(attack)
    assert outcome.held, f"{attack.tries}: {outcome.reason}"


@pytest.mark.slow
def test_attacks_hold_for_an_ordinary_user() -> None:
    if os.getuid() != 0:
        pytest.skip("the tests run as an ordinary user already")
    user = {"user": ORDINARY_UID, "group": ORDINARY_UID, "extra_groups": [], "cwd": "/", "text": True}
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from sandbox.hostile.suite import main",
    ]
    try:
        subprocess.run(command, **user, capture_output=True, check=True)
    except (PermissionError, subprocess.CalledProcessError):
        pytest.skip(f"user {ORDINARY_UID} cannot read the checkout or its Python ({sys.executable})")
    command[-1] += "; sys.exit(main([]))"
    run = subprocess.run(command, **user, capture_output=True, check=False)
    if run.stderr.startswith("error: "):
        pytest.skip(f"no full isolation for an ordinary user here: {run.stderr.strip()}")
    escaped = [line for line in run.stdout.splitlines() if line.startswith(MARKER)]
    assert (escaped, run.returncode) == ([], 0), run.stderr
