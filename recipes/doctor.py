"""Say what works on this machine, and how to mend what does not.

    python -m recipes.doctor

Looks at the packages, the device, the attention implementations, the engines and the sandbox's layers. Nothing is
downloaded and nothing is changed. The exit status is 0 when everything that is not optional works.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch
from packaging.requirements import Requirement
from transformers import Gemma2Config

from mtpo.cli import run_recipe
from mtpo.errors import EnvironmentFault, InputError, MtpoError
from mtpo.models import attention_refusal
from sandbox.doctor import layer_reports

GIB = 1 << 30
EXTRAS = {
    "vllm": "--engine vllm",
    "peft": "LoRA and models with adapters",
    "ray": "many machines",
    "serve": "python -m sandbox serve",
    "report": "plots of recipes.tabular",
}
"""What the optional dependencies of `pyproject.toml` are for."""
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    part: str
    name: str
    state: Literal["ok", "missing", "optional"]
    """`optional`: it is missing, and most work goes on without."""
    found: str
    mend: str = ""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Say what works on this machine, and how to mend what does not."""

    json: bool = field(default=False, metadata={"help": "print one JSON object instead of a table"})


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, examine, "recipes.doctor", argv)


def examine(config: Config) -> str:
    """
    Raises:
        MtpoError: something is missing without which mtpo does not work.
    """
    found = findings()
    lacking = [finding.name for finding in found if finding.state == "missing"]
    if config.json:
        print(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        print(as_table(found))
    if lacking:
        raise MtpoError(f"missing: {', '.join(lacking)}; the table says how to mend it")
    return f"all {sum(f.state == 'ok' for f in found)} parts that mtpo needs work"


def findings() -> list[Finding]:
    return [*machine(), *packages(), *extras(), *attention(), *asyncio.run(isolation())]


def machine() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    disk = shutil.disk_usage(".").free / GIB
    yield Finding(
        "machine",
        "processor",
        "ok",
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, "
        f"{disk:.0f} GiB of disk free",
    )
    if not torch.cuda.is_available():
        mend = "none needed for the quickstart; a GPU with a CUDA build of torch for models of billions"
        yield Finding("machine", "GPU", "optional", f"torch {torch.__version__} finds none", mend)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bfloat16 = "with" if torch.cuda.is_bf16_supported() else "without"
        found = f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, {bfloat16} bfloat16"
        yield Finding("machine", f"GPU {index}", "ok", found)


def packages() -> Iterator[Finding]:
    """Python and what `pyproject.toml` requires of everybody."""
    about = importlib.metadata.metadata("mtpo")
    yield _version("Python", platform.python_version(), Requirement(f"python{about['Requires-Python']}"))
    for requirement in _requirements():
        if requirement.marker is None:
            yield _package(requirement, "missing")


def extras() -> Iterator[Finding]:
    """The optional dependencies of `pyproject.toml`."""
    for extra, purpose in EXTRAS.items():
        for requirement in _requirements():
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                finding = _package(requirement, "optional")
                wanted = f"for {purpose}: {finding.mend}" if finding.mend else ""
                yield Finding(f"extra {extra}", finding.name, finding.state, finding.found, wanted)


def attention() -> Iterator[Finding]:
    """Which attention implementations of transformers can be loaded here."""
    for implementation in ATTENTION:
        if implementation == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            mend = "pip install flash-attn, where there is a GPU; the others do without"
            yield Finding("attention", implementation, "optional", "flash_attn is not installed", mend)
            continue
        gemma2 = Gemma2Config()
        gemma2._attn_implementation = implementation
        found = "not for Gemma 2, whose soft-cap it drops" if attention_refusal(gemma2) else "every family"
        yield Finding("attention", implementation, "ok", found)


async def isolation() -> list[Finding]:
    """The layers of the sandbox, from a session that was opened here."""
    try:
        reports = await layer_reports()
    except EnvironmentFault as error:
        return [Finding("sandbox", "interpreter", "missing", str(error), "see sandbox/README.md")]
    return [
        Finding(
            "sandbox",
            report.name,
            "ok" if report.missing is None else "optional",
            f"stops {report.stops}" if report.missing is None else report.missing,
            "" if report.missing is None else report.mend,
        )
        for report in reports
    ]


def as_table(found: Sequence[Finding]) -> str:
    """A line a finding under the name of its part; the mend below what is missing."""
    width = max(len(finding.name) for finding in found)
    lines, part = [], ""
    for finding in found:
        if finding.part != part:
            part = finding.part
            lines += ["", part] if lines else [part]
        lines.append(f"  {finding.state:8}  {finding.name:{width}}  {finding.found}")
        if finding.mend:
            lines.append(f"  {'':8}  {'':{width}}  mend: {finding.mend}")
    return "\n".join([*lines, ""])


def _requirements() -> list[Requirement]:
    """
    Raises:
        InputError: mtpo was not installed.
    """
    try:
        return [Requirement(text) for text in importlib.metadata.requires("mtpo") or ()]
    except importlib.metadata.PackageNotFoundError:
        raise InputError("mtpo is not installed in this Python: run make install") from None


def _package(requirement: Requirement, if_missing: Literal["missing", "optional"]) -> Finding:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        wanted = f"{requirement.name}{requirement.specifier}"
        return Finding("packages", requirement.name, if_missing, "not installed", f"pip install '{wanted}'")
    return _version(requirement.name, version, requirement)


def _version(name: str, version: str, wanted: Requirement) -> Finding:
    if wanted.specifier.contains(version, prereleases=True):
        return Finding("packages", name, "ok", version)
    mend = f"pip install '{name}{wanted.specifier}'"
    return Finding("packages", name, "missing", f"{version}, expected {wanted.specifier}", mend)


if __name__ == "__main__":
    raise SystemExit(main())
