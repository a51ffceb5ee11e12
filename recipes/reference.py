"""Write the page with every option of every recipe, from the dataclasses that the recipes read.

    python -m recipes.reference --out docs/reference.md

Each recipe comes with the commands of its docstring. Options that several recipes share are listed once, under the
group that they come from.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import recipes
from mtpo.cli import run_recipe

HEAD = """# Every option of every recipe

Made by `python -m recipes.reference --out docs/reference.md`; a test keeps it current. Each option is a flag
(`--learning_rate 2e-7`, dashes or underscores) and a key of a `--config FILE.yaml`; flags win over the file, the file
over the defaults. A file may begin with the values of another one, `base: OTHER.yaml` in the same folder or by a path
from there. Lists take several words: `--urls http://a:8000 http://b:8000`.
"""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Write the page with every option of every recipe."""

    out: str = field(default="docs/reference.md", metadata={"help": "Markdown file to write"})


def main(argv: Sequence[str] | None = None) -> int:
    return run_recipe(Config, write_reference, "recipes.reference", argv)


def write_reference(config: Config) -> str:
    page = reference_page()
    Path(config.out).write_text(page, encoding="utf-8")
    return f"{page.count(chr(10) + '| `')} options in {config.out}"


def reference_page() -> str:
    """The whole page as Markdown."""
    modules = list(_recipes())
    groups: dict[type, None] = {}
    parts = [HEAD, "## Recipes\n"]
    for module in modules:
        parts.append(_recipe_section(module))
        groups |= dict.fromkeys(_groups(module.Config))
    parts.append("## Shared options\n")
    parts += [f"### {group.__name__}\n\n{_summary(group)}\n\n{options_table(group)}" for group in groups]
    return "\n".join(parts)


def _recipes() -> Iterator[ModuleType]:
    for info in sorted(pkgutil.iter_modules(recipes.__path__), key=lambda info: info.name):
        module = importlib.import_module(f"recipes.{info.name}")
        if hasattr(module, "main") and dataclasses.is_dataclass(getattr(module, "Config", None)):
            yield module


def _recipe_section(module: ModuleType) -> str:
    name = module.__name__
    shared = ", ".join(f"[{g.__name__}](#{g.__name__.lower()})" for g in _groups(module.Config))
    also = f"\nAnd all of {shared}.\n" if shared else ""
    paragraphs = (module.__doc__ or "").split("\n\n")
    example = next((dedent(text) for text in paragraphs if text.startswith("    python -m ")), "")
    usage = f"```bash\n{example}\n```\n\n" if example else ""
    return f"### {name}\n\n{_summary(module)}\n\n{usage}{options_table(module.Config)}{also}"


def _groups(config: type) -> list[type]:
    """The classes that a config inherits options from, the nearest first."""
    return [base for base in config.__mro__[1:] if dataclasses.is_dataclass(base) and _own_fields(base)]


def _own_fields(group: type) -> list[Field[Any]]:
    own = inspect.get_annotations(group)
    return [f for f in dataclasses.fields(group) if f.name in own]


def _summary(documented: Any) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((documented.__doc__ or "").strip().split("\n\n")[0].split())


def options_table(group: type) -> str:
    hints = typing.get_type_hints(group)
    lines = ["| option | type | default | |", "|---|---|---|---|"]
    for option in _own_fields(group):
        text = option.metadata.get("help", "").replace("|", "\\|")
        lines.append(f"| `{option.name}` | {_type(hints[option.name])} | {_default(option)} | {text} |")
    return "\n".join([*lines, ""])


def _type(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in (types.UnionType, typing.Union):
        return " \\| ".join(_type(part) for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is list:
        return f"{_type(get_args(hint)[0])}, several"
    return hint.__name__


def _default(option: Field[Any]) -> str:
    default = option.default if option.default_factory is MISSING else option.default_factory()
    if default is MISSING:
        return "required"
    if default is None or default == []:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    raise SystemExit(main())
