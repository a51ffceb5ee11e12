"""Two processes, of whole and of sharded models, against one process on the same global batches."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from mtpo.errors import GuardError, InputError
from mtpo.models import fingerprint, load_model, unwrapped, whole
from mtpo.scoring import batch_logps
from mtpo.training import METHODS, TrainingSettings, run, train, trainer
from mtpo.training.guards import EqualGradients
from mtpo.training.online import train_online
from mtpo.training.online_settings import OnlineSettings
from tests.child_processes import launcher_environment, leave_together, start_pair
from tests.tiny_models import Family, tiny_model
from tests.tiny_rows import tiny_labels, tiny_pairs, tiny_singles

pytestmark = pytest.mark.slow

WRAPPERS = ("ddp", "fsdp2")
ROWS = {"single": tiny_singles, "pair": tiny_pairs, "label": tiny_labels}


@dataclass(frozen=True)
class Case:
    """One training run, to be done by one process, by two, and by two with sharded weights."""

    method: str
    family: Family = "gemma2"
    options: tuple[tuple[str, Any], ...] = ()

    def run(self, out: Path, *, resume: bool = False) -> None:
        """Two steps or more: of 4 rows, 2 on each process one after the other, and of 3 rows at last."""
        options = {"learning_rate": 1e-2, "batch_size": 4, "micro_batch_size": 1, "max_grad_norm": 1e9}
        settings = TrainingSettings(method=self.method, **options | dict(self.options))
        model, rows = tiny_model(self.family, std=0.1), ROWS[settings.recipe.rows](7)[:7]
        teacher = tiny_model(self.family, std=0.1, seed=1) if settings.recipe.has_teacher else None
        train(model, rows, settings, out, teacher=teacher, resume=resume, progress=False)


METHOD_CASES = {method: Case(method) for method in METHODS}
METHOD_CASES["gkd"] = Case("gkd", options=(("on_policy", 0.0),))
METHOD_CASES["pmpo_full"] = Case("pmpo", options=(("kl", "full"),))
CASES = METHOD_CASES | {
    "untied": Case("dpo", "llama", (("gradient_checkpointing", True),)),
    "bfloat16": Case("dpo", options=(("dtype", "bfloat16"),)),
    "resumed": Case("dro_v", options=(("epochs", 3), ("num_checkpoints", 1))),
}


class RecordedGradients(EqualGradients):
    """Keeps of the first step how many weights are shards, their fingerprint, and the gradients, put together."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        if state.global_step == 0:
            named = list(kwargs["model"].named_parameters())
            gradients = {name: whole(p.grad).clone() for name, p in named if p.grad is not None}
            shards = sum(isinstance(parameter, DTensor) for _, parameter in named)
            weights = fingerprint(kwargs["model"])
            if state.is_world_process_zero:
                torch.save((shards, len(named), weights, gradients), Path(args.output_dir) / "step.pt")


def _unsynchronised(out: Path) -> str:
    """What a run says whose log-probs come from the model inside DDP."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "batch_logps", lambda model, *a, **k: batch_logps(unwrapped(model), *a, **k))
        with pytest.raises(GuardError) as found:
            CASES["sft"].run(out)
    return str(found.value)


def _worker(rank: int, folder: str) -> None:
    (Path(folder) / f"guard-{rank}").write_text(_unsynchronised(Path(folder) / "unsynchronised"))
    run.EqualGradients = RecordedGradients
    for wrapper in WRAPPERS:
        os.environ |= launcher_environment(wrapper)
        for name, case in CASES.items():
            case.run(Path(folder) / wrapper / name)
        out = Path(folder) / wrapper / "resumed"
        if rank == 0:
            shutil.copytree(out / "model", Path(folder) / wrapper / "straight")
        CASES["resumed"].run(out, resume=True)
    leave_together(folder, rank)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """WRAPPER/CASE holds a run of two processes, one/CASE the same run of one."""
    folder = tmp_path_factory.mktemp("distributed")
    pair = start_pair(_worker, str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "EqualGradients", RecordedGradients)
        for name, case in CASES.items():
            case.run(folder / "one" / name)
    while not pair.join():
        pass
    yield folder


def _steps(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", [*METHOD_CASES, "untied"])
def test_loss_and_gradients_of_two_processes_are_those_of_one(name: str, wrapper: str, folder: Path) -> None:
    """With gradients accumulated, rows of many lengths, and fewer rows on one process at last."""
    shards, count, weights, actual = torch.load(folder / wrapper / name / "step.pt")
    _, _, same_weights, expected = torch.load(folder / "one" / name / "step.pt")
    assert shards == (count if wrapper == "fsdp2" else 0)
    assert weights == same_weights
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert actual.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(actual[key], gradient, rtol=1e-5, atol=1e-6 * largest)
    one, two = _steps(folder / "one" / name), _steps(folder / wrapper / name)
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-6)
    assert len(one) == len(two) == 2
    for ours, theirs in zip(two, one, strict=True):
        ignored = {"tokens_per_s": 0}
        assert ours | ignored == pytest.approx(theirs | ignored, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", [*METHOD_CASES, "untied"])
def test_the_model_that_two_processes_write_is_that_of_one(name: str, wrapper: str, folder: Path) -> None:
    one, two = (load_model(folder / who / name / "model") for who in ("one", wrapper))
    for expected, actual in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_resumed_run_of_two_processes_ends_where_an_uninterrupted_one_does(
    wrapper: str, folder: Path
) -> None:
    """Policy and value network, from the checkpoint in the middle."""
    straight, resumed = (load_model(folder / wrapper / name) for name in ("straight", "resumed/model"))
    for expected, actual in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)
    assert [step["step"] for step in _steps(folder / wrapper / "resumed")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_value_network_of_two_processes_is_that_of_one(wrapper: str, folder: Path) -> None:
    one, two = (
        torch.load(next((folder / who / "resumed").glob("checkpoint-*/value.pt"))) for who in ("one", wrapper)
    )
    assert one["network"].keys() == two["network"].keys()
    for key, expected in one["network"].items():
        torch.testing.assert_close(two["network"][key], expected, rtol=1e-3, atol=1e-4)


def test_gradients_that_are_not_synchronised_stop_every_process(folder: Path) -> None:
    for rank in (0, 1):
        assert "their gradients are not synchronised" in (folder / f"guard-{rank}").read_text()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_autocast_computes_the_same_in_two_processes(wrapper: str, folder: Path) -> None:
    """A policy in bfloat16 throughout, FSDP2's own way, is 1e-2 away, and so from its reference."""
    one, two = _steps(folder / "one" / "bfloat16")[0], _steps(folder / wrapper / "bfloat16")[0]
    for side in ("chosen", "rejected"):
        assert two[f"logps/{side}"] == pytest.approx(one[f"logps/{side}"], rel=1e-5)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


def test_weights_that_should_be_sharded_and_are_whole_stop_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a process that no launcher has started."""
    for name, value in launcher_environment("fsdp2").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(GuardError, match="only 0 of 24 parameters are sharded"):
        CASES["sft"].run(tmp_path)


def test_muon_is_refused_where_matrices_are_cut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="'muon' needs whole matrices"):
        Case("sft", options=(("optimizer", "muon"),)).run(tmp_path)


def test_online_methods_are_refused_where_weights_are_cut(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    settings: Any = OnlineSettings(method="nash_md", learning_rate=1e-3)
    nothing: Any = None
    with pytest.raises(InputError, match="sample from whole weights, which FSDP cuts up"):
        train_online(tiny_model("llama"), [], settings, nothing, nothing, tmp_path)
