import logging
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from mtpo.errors import InputError, SandboxError
from sandbox import InterpreterPool
from sandbox.layers import LAYERS, OPTIONAL, judge, wanted_layers

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("isolation", ["half", ["view", "magic"], "view"])
def test_unknown_policies_are_refused(isolation: str | list[str]) -> None:
    with pytest.raises(InputError, match="isolation must be 'full', 'available', 'none' or names among"):
        InterpreterPool(isolation=isolation)  # pyright: ignore[reportArgumentType]


def test_full_names_what_is_missing_why_and_the_mend() -> None:
    with pytest.raises(SandboxError) as caught:
        judge("full", {"view": "no", "seccomp": "never", "cgroup": "none"})
    assert str(caught.value) == (
        "isolation='full' is not to be had on this machine: "
        f"view: no (mend: {LAYERS['view'].mend}); seccomp: never (mend: {LAYERS['seccomp'].mend})"
    )


def test_available_warns_of_what_is_not_stopped() -> None:
    warning = judge("available", {"landlock": "old kernel"})
    assert warning is not None and "\n" not in warning
    assert warning.startswith(
        f"the sandbox cannot stop code from {LAYERS['landlock'].stops} (landlock: old kernel)"
    )
    assert judge("available", {"cgroup": "none"}) is None
    assert judge("none", {}) is None


def test_named_layers_are_all_needed() -> None:
    assert wanted_layers(["view", "cgroup"]) == {"view", "cgroup"}
    with pytest.raises(SandboxError, match="cgroup: none"):
        judge(["view", "cgroup"], {"cgroup": "none"})


async def test_a_pool_says_which_layers_are_in_force(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        InterpreterPool(isolation=["rlimits", "seccomp"], preload=()) as pool,
        pool.session() as session,
    ):
        await session.execute("1")
        off = {name for name, reason in pool.layers.items() if reason == "switched off"}
        assert off == set(LAYERS) - {"rlimits", "seccomp"}
        assert pool.layers["rlimits"] is pool.layers["seccomp"] is None
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


WITHOUT_NAMESPACES = """
    import asyncio, logging
    logging.basicConfig(format="%(message)s")
    from mtpo.errors import SandboxError
    from sandbox import InterpreterPool

    async def main():
        async with InterpreterPool(preload=()) as pool, pool.session() as session:
            print((await session.execute("open('/etc/hostname')")).text.splitlines()[-1])
            print((await session.execute("import os\\nos.fork()")).text.splitlines()[-1])
            print((await session.execute("x = 1\\nopen('f', 'w').write('1')")).text)
            async with await session.fork() as twin:
                print((await twin.execute("x, open('f').read()")).text)
            print(*sorted(name for name, reason in pool.layers.items() if reason))
        try:
            await InterpreterPool(isolation="full", preload=()).__aenter__()
        except SandboxError as error:
            print(error)

    asyncio.run(main())
"""


def test_a_machine_without_namespaces_still_isolates_and_says_what_it_lacks() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs the command unshare")
    inside = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = [
        "unshare",
        "-U",
        "-r",
        "sh",
        "-c",
        inside,
        "-",
        sys.executable,
        "-c",
        textwrap.dedent(WITHOUT_NAMESPACES),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if done.stderr.startswith(("unshare:", "sh:", "-:")):
        pytest.skip(f"no user namespaces to take away: {done.stderr.strip().splitlines()[-1]}")
    [warning] = [line for line in done.stderr.splitlines() if "the sandbox cannot stop code from" in line]
    assert LAYERS["view"].stops in warning
    denied, forked, written, copied, missing, refusal = done.stdout.splitlines()
    assert denied == "PermissionError: [Errno 13] Permission denied: '/etc/hostname'"
    assert forked == "PermissionError: [Errno 1] Operation not permitted [the sandbox does not allow it]"
    assert (written, copied) == ("1", "(1, '1')")
    assert {"namespaces", "view"} <= set(missing.split())
    assert "namespaces: " in refusal and "view: " in refusal and LAYERS["view"].mend in refusal


async def test_all_layers_are_in_force_where_they_can_be() -> None:
    pool = InterpreterPool(isolation="full", preload=())
    try:
        await pool.__aenter__()
    except SandboxError as error:
        pytest.skip(str(error))
    assert {name for name, reason in pool.layers.items() if reason is None} >= set(LAYERS) - OPTIONAL
    await pool.__aexit__()
