"""`python -m recipes.doctor`: what is missing is named with its mend, and only what is needed makes it fail."""

import importlib.metadata
import json

import pytest
import torch

from recipes import doctor
from recipes.doctor import Finding, main
from sandbox.layers import LAYERS

NOTHING_MISSING = Finding("machine", "processor", "ok", "Linux")


def versions(monkeypatch: pytest.MonkeyPatch, **changed: str | None) -> None:
    """Pretend that packages have other versions, or are not there."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name not in changed:
            return real(name)
        if (found := changed[name]) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def named(findings: list[Finding], name: str) -> Finding:
    (found,) = [finding for finding in findings if finding.name == name]
    return found


def test_this_machine_has_all_that_the_suite_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    printed = capsys.readouterr().out
    findings = [Finding(**finding) for finding in json.loads(printed[: printed.rindex("]") + 1])]
    assert named(findings, "torch").found == torch.__version__
    assert {finding.name for finding in findings if finding.part == "sandbox"} == set(LAYERS)
    assert all(finding.mend for finding in findings if finding.state != "ok")


def test_a_package_that_is_not_there_is_named_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, sympy=None)
    found = named(list(doctor.packages()), "sympy")
    assert (found.state, found.found, found.mend) == ("missing", "not installed", "pip install 'sympy>=1.13'")


def test_a_package_that_is_too_new_is_named_with_what_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, transformers="6.1.0")
    found = named(list(doctor.packages()), "transformers")
    assert found.state == "missing"
    assert found.found.startswith("6.1.0, expected ")
    assert found.mend == "pip install 'transformers<6,>=5.16.1'"


def test_a_build_of_torch_with_a_local_version_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, torch="2.13.0+cpu")
    assert named(list(doctor.packages()), "torch").state == "ok"


def test_an_extra_that_is_not_there_is_optional_and_says_what_for(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, ray=None)
    found = named(list(doctor.extras()), "ray")
    assert (found.part, found.state) == ("extra ray", "optional")
    assert found.mend.startswith("for many machines: pip install 'ray")


def test_only_what_is_needed_makes_it_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_gpu = Finding("machine", "GPU", "optional", "none", "buy one")
    monkeypatch.setattr(doctor, "findings", lambda: [NOTHING_MISSING, without_gpu])
    assert main([]) == 0
    assert "mend: buy one" in capsys.readouterr().out
    without_trl = Finding("packages", "trl", "missing", "not installed", "pip install trl")
    monkeypatch.setattr(doctor, "findings", lambda: [NOTHING_MISSING, without_trl])
    assert main([]) == 1
    printed = capsys.readouterr()
    assert "mend: pip install trl" in printed.out
    assert printed.err == "error: missing: trl; the table says how to mend it\n"
