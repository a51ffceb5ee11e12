"""From a config dataclass to a command line, and from an error to one line.

A recipe is a frozen dataclass with every knob, and a function that takes it. Values come from the
dataclass's defaults, then from `--config FILE.yaml`, then from the flags, the last one winning. A file may
begin with those of another one, `base: OTHER.yaml`, whose path is taken from its own folder. The field that
the dataclass names in its class variable `FIRST`, if any, may come first, without its flag.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mtpo.errors import InputError, MtpoError
from mtpo.runs import is_main_process

Config = TypeVar("Config")

GRACE_S = 3.0
"""How long a process that is not the first waits before it tells of an error."""


def run_recipe(
    config_class: type[Config],
    recipe: Callable[[Config], str],
    name: str,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line, run the recipe, print the line that it returns; of many processes, the first does.

    Returns:
        The exit status: 0; 1 after an `MtpoError`, an error of the operating system or the end of another process
        of the same run, printed as one line on stderr; 130 after Ctrl-C. argparse itself exits with 2 on flags it
        does not know.
    """
    try:
        line = recipe(parse_config(config_class, name, argv))
    except MtpoError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}")
    except RuntimeError as error:
        if "by peer" not in str(error):  # gloo's "Connection closed by peer" and "reset by peer"
            raise
        return _fail("another process of this run has ended: its own message says why")
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; the same command with --resume goes on from here", file=sys.stderr)
        return 130
    if is_main_process():
        print(line)
    return 0


def parse_config(config_class: type[Config], name: str, argv: Sequence[str] | None = None) -> Config:
    """The config that the command line describes.

    Raises:
        InputError: the YAML file is missing, is no mapping, or has a key that the recipe does not know; or
            the dataclass refuses a value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = getattr(config_class, "FIRST", None)
    if first is not None and argv and not argv[0].startswith("-"):
        argv.insert(0, f"--{first}")
    parser = build_parser(config_class, name)
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    path = only_config.parse_known_args(argv)[0].config
    if path is not None:
        values = _read_yaml(
            Path(path), [a for a in parser._actions if a.dest not in ("help", "config")], name
        )
        parser.set_defaults(**values)
        for action in parser._actions:
            action.required = action.required and action.dest not in values
    namespace = vars(parser.parse_args(argv))
    namespace.pop("config")
    try:
        return config_class(**namespace)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def build_parser(config_class: type[Config], name: str) -> argparse.ArgumentParser:
    """The parser behind `--help`: one flag a field, spelled with dashes or underscores, and `--config`."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        config_class,  # pyright: ignore
        prog=f"python -m {name}",
        description=config_class.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="values for any of these options")
    return parser


def _read_yaml(path: Path, options: Sequence[argparse.Action], name: str) -> dict[str, Any]:
    values = _mapping(path, seen=())
    known = {option.dest: option for option in options}
    for key, value in values.items():
        if key not in known:
            raise InputError(f"--config {path}: {name} has no option {key!r}; it has {sorted(known)}")
        choices = known[key].choices
        if choices is not None and value not in choices:
            raise InputError(f"--config {path}: {key} is {value!r}, expected one of {list(choices)}")
    return values


def _mapping(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The values in a file, over those of its base."""
    chain = "".join(f"{before}: base " for before in seen)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config {chain}{path}: no such file") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config {chain}{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {chain}{path}: expected a mapping of options to values")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or path.parent / base in (*seen, path):
        raise InputError(f"--config {chain}{path}: base is {base!r}, expected another file of options")
    return _mapping(path.parent / base, (*seen, path)) | values


def _fail(message: str) -> int:
    if not is_main_process():
        time.sleep(
            GRACE_S
        )  # what fails everywhere is told by the first process; its launcher then ends this one
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 1
