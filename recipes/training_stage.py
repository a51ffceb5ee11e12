"""The training of one iteration of the loop: recipes.train, in this process or started by a launcher.

A launcher is a command that starts a Python module in as many processes as there are GPUs, `accelerate launch ...` or
`torchrun ...`. What it is given is ITERATION/train.yaml; started by hand with that file, recipes.train does the same.
"""

from __future__ import annotations

import gc
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path

import torch
import yaml

from mtpo.errors import InputError, MtpoError
from mtpo.training import TrainingSettings
from recipes.train import Config, train_policy
from sandbox.confine import die_with

logger = logging.getLogger(__name__)


def training_stage(
    folder: Path, current: str, reference: str, settings: TrainingSettings, attention: str | None
) -> Config:
    """What recipes.train is asked for: from `current` on folder/labels, the checkpoints in folder/train."""
    needs_another = settings.recipe.needs_reference and reference != current
    return Config(
        **{option.name: getattr(settings, option.name) for option in fields(TrainingSettings)},
        attention=attention,
        model=current,
        reference=reference if needs_another else None,
        data=str(folder / "labels"),
        out=str(folder / "train"),
        resume=True,
    )


def launch_command(launcher: str) -> list[str]:
    """The words of a launcher, whose program may stand beside this Python.

    Raises:
        InputError: there is no such program.
    """
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise InputError(f"--launcher {launcher!r}: {error}") from None
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(words[0], path=places) if words else None
    if program is None:
        raise InputError(
            f"--launcher {launcher!r}: no such program; expected accelerate launch ... or torchrun ..."
        )
    return [program, *words[1:]]


def run_stage(stage: Config, launcher: str | None) -> None:
    """Train, or go on with it, unless that is done.

    Raises:
        MtpoError: what the launcher started has failed; its own output says why.
    """
    if (Path(stage.out) / "model").exists():
        return
    if launcher is None:
        train_policy(stage)
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what this process has sampled or compared with is in the way of the others
    file = write_stage(stage)
    command = [*launch_command(launcher), "-m", "recipes.train", "--config", str(file)]
    logger.info("starting %s", shlex.join(command))
    ends_with_us = partial(die_with, os.getpid(), signal.SIGTERM)  # or it would meet a resumed run
    status = subprocess.run(command, check=False, preexec_fn=ends_with_us).returncode
    if status:
        raise MtpoError(
            f"training ended with exit status {status}, see above: {launcher} -m recipes.train --config {file}"
        )


def write_stage(stage: Config) -> Path:
    """Write what differs from the defaults of recipes.train into a file that its --config reads."""
    changed = {}
    for option in fields(stage):
        default = option.default_factory() if option.default_factory is not MISSING else option.default
        if (value := getattr(stage, option.name)) != default:
            changed[option.name] = value
    file = Path(stage.out).parent / "train.yaml"
    file.write_text(yaml.safe_dump(changed, sort_keys=False), encoding="utf-8")
    return file
