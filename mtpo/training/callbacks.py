"""What a training run shows and writes while it goes."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

LOOK = "eval_"
"""How the names of figures begin that come of a look at what is held out."""


class MetricsFile(TrainerCallback):
    """Appends one object a step to a JSONL file, and one for each look at held-out rows to eval.jsonl beside it.

    A resumed run first removes the steps that it takes again.
    """

    def __init__(self, path: Path) -> None:
        self.steps, self.looks = path, path.with_name("eval.jsonl")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        last = state.global_step or -1  # a run from the start takes its look before the first step again
        for path in (self.steps, self.looks):
            if state.is_world_process_zero and path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [f"{line}\n" for line in lines if _step(line) <= last]
                path.write_text("".join(kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for begin, path in (("loss", self.steps), (LOOK, self.looks)):
            if state.is_world_process_zero and any(name.startswith(begin) for name in logs or ()):
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


class ProgressBar(TrainerCallback):
    """Steps, time left and the loss, on stderr."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.description, unit="step"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.bar is not None and logs and "loss" in logs:
            shown = {name: f"{logs[name]:.3g}" for name in ("loss", "accuracy", "margin") if name in logs}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the line, also after a training that did not come to its end."""
        if self.bar is not None:
            self.bar.close()


class Checkpoints(TrainerCallback):
    """Asks for a checkpoint after certain steps."""

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = frozenset(steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_save = state.global_step in self.steps


class HeldOut(TrainerCallback):
    """Asks for a look at the held-out rows after every `every` steps, if given, and after the last."""

    def __init__(self, every: int | None) -> None:
        self.every = every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_evaluate = self.is_due(state)

    def is_due(self, state: TrainerState) -> bool:
        step = state.global_step
        return step in (0, state.max_steps) or (self.every is not None and step % self.every == 0)


def _step(line: str) -> float:
    """The step of a line; -1 for another kind of record, infinity for a line torn by a crash."""
    try:
        return json.loads(line).get("step", -1)
    except ValueError:
        return float("inf")
