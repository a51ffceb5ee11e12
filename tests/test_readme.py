import importlib
import re
import shlex
from pathlib import Path

import pytest

from mtpo.cli import parse_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
CONFIGS = sorted(set((ROOT / "recipes" / "configs").glob("*.yaml")) - {ROOT / "recipes/configs/online.yaml"})


def commands() -> list[tuple[str, str]]:
    """(page, command) for every line of a bash block that starts a recipe or a make target, continued lines joined."""
    found = []
    for page in PAGES:
        for language, block in re.findall(
            r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
        ):
            if language != "bash":
                continue
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ").split(" # ")[0].strip()
                if re.match(r"(\.venv/bin/)?python -m recipes\.|make ", line):
                    found.append((page.name, line))
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_commands_shown_are_commands_that_exist(page: str, command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
        return
    name, argv = words[2], words[3:]
    if "--help" not in argv:
        module = importlib.import_module(name)
        parse_config(
            module.Config, name, [str(ROOT / w) if w.startswith("recipes/configs/") else w for w in argv]
        )


def test_readme_shows_the_two_commands_and_every_recipe() -> None:
    shown = " ".join(command for _, command in commands())
    assert "make quickstart" in shown and "make test" in shown
    for recipe in (ROOT / "recipes").glob("*.py"):
        if "def main(" in recipe.read_text():
            assert f"recipes.{recipe.stem}" in shown


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_is_accepted_by_iterate(path: Path) -> None:
    from recipes.iterate import Config

    config = parse_config(Config, "recipes.iterate", ["--config", str(path), "--out", "somewhere"])
    assert config.model and config.problems and config.test


def test_the_online_config_is_accepted_by_every_online_method() -> None:
    from mtpo.training.online_methods import ONLINE_METHODS
    from recipes.online import Config

    path = str(ROOT / "recipes" / "configs" / "online.yaml")
    for method in ONLINE_METHODS:
        config = parse_config(Config, "recipes.online", ["--config", path, "--method", method, "--out", "o"])
        assert (config.method, config.judge) == (method, "verifier")
