"""Distillation in the trainer, PMPO's full KL, and the student's own samples."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mtpo.batches import Row, SingleCollator
from mtpo.divergences import Comparison, logps_and_divergences
from mtpo.errors import EngineError, InputError
from mtpo.losses import Divergence
from mtpo.models import load_model
from mtpo.training import TrainingSettings, train
from mtpo.training.distill import OnPolicy, OwnSamples
from mtpo.trajectory import Segment, StopReason, Trajectory
from tests.child_processes import leave_together, start_pair
from tests.tiny_models import tiny_model
from tests.tiny_rows import tiny_labels, tiny_singles

STILL = 1e-30
"""A learning rate that moves nothing."""


def settings(method: str, learning_rate: float = 1e-2, **options: Any) -> TrainingSettings:
    return TrainingSettings(method=method, learning_rate=learning_rate, **{"batch_size": 4, **options})


def a_student() -> PreTrainedModel:
    return tiny_model("gemma2", std=0.1, num_hidden_layers=1, layer_types=["full_attention"])


def a_teacher(**options: Any) -> PreTrainedModel:
    return tiny_model("gemma2", **{"std": 0.2, "seed": 1, "hidden_size": 48, **options})


def steps(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(model: PreTrainedModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def tokens_of(model: Any, other: Any, rows: Sequence[Row]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(p of the other model, q of the model) at each action token, (n, V) a row, from all logits."""
    found = []
    for row in rows:
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["completion_mask"][1:]).bool()
        with torch.no_grad():
            q, p = (m(input_ids=ids).logits[0, :-1].double().softmax(-1)[mask] for m in (model, other))
        found.append((p, q))
    return found


def test_kd_and_gkd_losses_of_the_first_step_by_hand(tmp_path: Path) -> None:
    """Means over all action tokens; micro-batches hold different numbers of them."""
    ours, theirs, rows = a_student(), a_teacher(), tiny_singles(4)
    pairs = tokens_of(ours, theirs, rows)
    num_tokens = sum(len(p) for p, _ in pairs)
    cross_entropy = sum(-(p * q.log()).sum() for p, q in pairs) / num_tokens
    jsd = sum(
        0.3 * (p * (p / (0.3 * p + 0.7 * q)).log()).sum() + 0.7 * (q * (q / (0.3 * p + 0.7 * q)).log()).sum()
        for p, q in pairs
    )
    chosen = {"kd": {}, "gkd": {"jsd_beta": 0.3, "on_policy": 0.0}}
    for (method, options), expected in zip(chosen.items(), (cross_entropy, jsd / num_tokens), strict=True):
        run = settings(method, STILL, micro_batch_size=2, **options)
        result = train(ours, rows, run, tmp_path / method, teacher=theirs, progress=False)
        assert result.metrics["loss"] == pytest.approx(float(expected), rel=1e-4)
        assert result.metrics["action_tokens"] == num_tokens


def test_kd_teaches_the_teachers_distributions(tmp_path: Path) -> None:
    ours, theirs, rows = a_student(), a_teacher(), tiny_singles(4)
    run = settings("kd", divergence="forward_kl", epochs=40, lr_schedule="constant")
    train(ours, rows, run, tmp_path, teacher=theirs, progress=False)
    losses = [step["loss"] for step in steps(tmp_path)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("normalize", [False, True])
def test_full_kl_of_pmpo_by_hand(normalize: bool, tmp_path: Path) -> None:
    """KL(reference || policy) in closed form, in a step that starts away from the reference."""
    policy, reference, rows = a_student(), tiny_model("gemma2", std=0.1, seed=3), tiny_labels(2)
    kl = 0.0
    for p, q in tokens_of(policy, reference, rows):
        kl += float((p * (p / q).log()).sum()) / (len(p) if normalize else 1) / len(rows)
    losses = {}
    for kind in ("k3", "full"):
        run = settings("pmpo", STILL, kl=kind, beta=2.0, normalize=normalize)
        result = train(policy, rows, run, tmp_path / kind, reference_model=reference, progress=False)
        losses[kind] = result.metrics["loss"] - 2.0 * result.metrics["kl"]
        if kind == "full":
            assert result.metrics["kl"] == pytest.approx(kl, rel=1e-4)
        else:
            assert result.metrics["kl"] != pytest.approx(kl, rel=0.01)
    assert losses["full"] == pytest.approx(losses["k3"], rel=1e-4)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_full_kl_is_to_the_policy_as_it_started(lora: bool, tmp_path: Path) -> None:
    """Without a reference of its own: of the whole model a copy, of an adapter the model without it."""
    policy, rows = a_student(), tiny_labels(2)
    before = copy.deepcopy(policy)
    options = {"lora_rank": 4, "merge_adapter": True} if lora else {}
    if lora:
        pytest.importorskip("peft")
    run = settings("pmpo", 3e-2, kl="full", epochs=3, lr_schedule="constant", max_grad_norm=1e9, **options)
    result = train(policy, rows, run, tmp_path, progress=False)
    kls = [step["kl"] for step in steps(tmp_path)]
    assert kls[0] == pytest.approx(0, abs=1e-4) and kls[2] > kls[1] > 1e-3
    again = settings("pmpo", STILL, kl="full")  # one step more, from where that ended
    trained = load_model(result.model)
    expected = train(trained, rows, again, tmp_path / "next", reference_model=before, progress=False)
    found = [float((p * (p / q).log()).sum()) for p, q in tokens_of(load_model(result.model), before, rows)]
    assert expected.metrics["kl"] == pytest.approx(sum(found) / len(found), rel=1e-3)


def scripted(
    asked: list[tuple[int, list[int]]] | None = None,
    on_round: Callable[[PreTrainedModel, int], None] | None = None,
) -> Callable[[PreTrainedModel, int, Sequence[int]], list[Trajectory]]:
    """Samples that are a function of the draw alone: two turns with tool output between them."""

    def sample(model: PreTrainedModel, number: int, draws: Sequence[int]) -> list[Trajectory]:
        if asked is not None:
            asked.append((number, list(draws)))
        if on_round is not None:
            on_round(model, number)
        return [_trajectory(draw) for draw in draws]

    return sample


def _trajectory(draw: int) -> Trajectory:
    rng = random.Random(draw)
    parts = [("prompt", 3), ("action", rng.randint(2, 6)), ("observation", 3), ("action", rng.randint(2, 6))]
    segments = [Segment(kind, tuple(rng.randrange(3, 48) for _ in range(n)), None, "") for kind, n in parts]  # pyright: ignore
    return Trajectory(f"draw/{draw}", 0, tuple(segments), StopReason.ANSWERED)


def test_the_students_samples_take_the_place_of_the_datas(tmp_path: Path) -> None:
    """At share 1 the loss of each step is that of its draws; and rounds of two steps are sampled at once."""
    ours, theirs, asked = a_student(), a_teacher(), []
    run = settings("gkd", STILL, on_policy=1.0, epochs=3, micro_batch_size=2)
    on_policy = OnPolicy(scripted(asked), sync_steps=2)
    train(ours, tiny_singles(4), run, tmp_path, teacher=theirs, on_policy=on_policy, progress=False)
    assert asked == [(0, [*range(8)]), (1, [*range(8, 12)])]
    for number, step in enumerate(steps(tmp_path)):
        drawn = [_trajectory(draw) for draw in range(4 * number, 4 * number + 4)]
        rows = [{"input_ids": t.input_ids, "completion_mask": t.completion_mask} for t in drawn]
        batch = SingleCollator(0)(rows)
        scored = logps_and_divergences(ours, batch, Comparison(theirs, Divergence("jsd")))
        expected = scored.divergences.sum() / batch["completion_mask"].sum()
        assert step["loss"] == pytest.approx(expected.item(), rel=1e-4)
        assert (step["on_policy"], step["staleness"]) == (1.0, number % 2)


def test_held_out_rows_are_not_replaced(tmp_path: Path) -> None:
    ours, theirs, held_out = a_student(), a_teacher(), tiny_singles(2, seed=5)
    pairs = tokens_of(ours, theirs, held_out)
    expected = sum(float((p * (p / q).log()).sum()) for p, q in pairs) / sum(len(p) for p, _ in pairs)
    run = settings("gkd", STILL, on_policy=1.0, divergence="forward_kl", eval_steps=1)
    on_policy = OnPolicy(scripted())
    train(ours, tiny_singles(4), run, tmp_path, teacher=theirs, on_policy=on_policy, eval_rows=held_out,
          progress=False)  # fmt: skip
    (look,) = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert look["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_sampling_sees_the_weights_that_its_round_starts_from(tmp_path: Path) -> None:
    seen: dict[int, torch.Tensor] = {}
    on_policy = OnPolicy(scripted(on_round=lambda model, n: seen.update({n: weights(model).clone()})), 2)
    run = settings("gkd", on_policy=1.0, epochs=4, num_checkpoints=3)
    ours = a_student()
    start = weights(ours)
    result = train(
        ours, tiny_singles(4), run, tmp_path, teacher=a_teacher(), on_policy=on_policy, progress=False
    )
    assert torch.equal(seen[0], start)
    (halfway,) = (path for path in result.checkpoints if path.name == "checkpoint-2")
    assert torch.equal(seen[1], weights(load_model(halfway)))


def test_a_share_of_the_batches_is_the_students(tmp_path: Path) -> None:
    run = settings("gkd", STILL, on_policy=0.3, epochs=40, batch_size=1)
    on_policy = OnPolicy(scripted())
    rows = tiny_singles(4)
    train(a_student(), rows, run, tmp_path, teacher=a_teacher(), on_policy=on_policy, progress=False)
    shares = [step["on_policy"] for step in steps(tmp_path)]
    assert set(shares) == {0.0, 1.0} and 0.2 < sum(shares) / len(shares) < 0.4
    assert all(("staleness" in step) == bool(step["on_policy"]) for step in steps(tmp_path))


def test_processes_share_the_draws() -> None:
    asked: list[tuple[int, list[int]]] = []
    own = [
        OwnSamples(OnPolicy(scripted(asked), 3), 0.6, 0, "action", 7, 4, 1, process, num_processes=2)
        for process in (0, 1)
    ]
    due = [step for step in range(7) if own[0].is_due(step)]
    assert 1 < len(due) < 7
    for step in due:
        for process in (0, 1):
            places = [4 * step + process, 4 * step + 2 + process]
            assert len(own[process].rows(a_student(), step, places)) == 2
    assert sorted(draw for _, draws in asked for draw in draws) == list(range(4 * len(due)))


def test_an_interrupted_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """Interrupted while it samples its third round, which the checkpoint before lies inside of."""
    run = settings("gkd", on_policy=0.7, epochs=8, num_checkpoints=3, micro_batch_size=2)

    def go(out: Path, sample: Any, resume: bool = False) -> PreTrainedModel:
        ours = a_student()
        train(ours, tiny_singles(4), run, out, teacher=a_teacher(), on_policy=OnPolicy(sample, 3), resume=resume,
              progress=False)  # fmt: skip
        return ours

    def fail(model: PreTrainedModel, number: int) -> None:
        if number == 2:
            raise EngineError("the engine died")

    straight = go(tmp_path / "straight", scripted())
    with pytest.raises(EngineError, match="died"):
        go(tmp_path / "cut", scripted(on_round=fail))
    assert [step["step"] for step in steps(tmp_path / "cut")] == [1, 2, 3, 4, 5, 6]
    resumed = go(tmp_path / "cut", scripted(), resume=True)
    torch.testing.assert_close(weights(resumed), weights(straight), rtol=0, atol=0)
    assert [step["loss"] for step in steps(tmp_path / "cut")] == [
        step["loss"] for step in steps(tmp_path / "straight")
    ]


def test_a_sample_without_a_token_stops_the_run(tmp_path: Path) -> None:
    def nothing(model: PreTrainedModel, number: int, draws: Sequence[int]) -> list[Trajectory]:
        prompt = (_trajectory(0).segments[0],)
        return [
            Trajectory("p/1", n, prompt, StopReason.ENVIRONMENT_FAULT, fault="EngineError: gone")
            for n in draws
        ]

    run = settings("gkd", on_policy=1.0)
    with pytest.raises(EngineError, match=r"p/1 sample 0: nothing was sampled \(EngineError: gone\)"):
        train(a_student(), tiny_singles(4), run, tmp_path, teacher=a_teacher(), on_policy=OnPolicy(nothing),
              progress=False)  # fmt: skip


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "no teacher": ({"method": "kd"}, {}, "method 'kd' needs a teacher"),
    "teacher of sft": ({"method": "sft"}, {"teacher": a_teacher}, "teacher has no effect on method 'sft'"),
    "no sampling": (
        {"method": "gkd"},
        {"teacher": a_teacher},
        "on_policy is 0.5, so that the student must sample",
    ),
    "vocabulary": (
        {"method": "kd"},
        {"teacher": lambda: a_teacher(vocab_size=56)},
        "distillation needs one vocabulary, but the student has 48 tokens and the teacher 56",
    ),
    "special ids": (
        {"method": "kd"},
        {"teacher": lambda: a_teacher(eos_token_id=3)},
        "distillation needs one tokenizer, but eos_token_id is 1 to the student and 3 to the teacher",
    ),
}


@pytest.mark.parametrize(("options", "models", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_bad_runs_are_refused(options: Any, models: Any, message: str, tmp_path: Path) -> None:
    made = {name: make() for name, make in models.items()}
    with pytest.raises(InputError, match=message):
        train(a_student(), tiny_singles(2), settings(**options), tmp_path, progress=False, **made)


def test_rows_beyond_the_teachers_context_are_dropped(tmp_path: Path) -> None:
    rows = tiny_singles(8)
    longest = max(len(row["input_ids"]) for row in rows)
    theirs = a_teacher(max_position_embeddings=longest - 1)
    result = train(a_student(), rows, settings("kd", STILL), tmp_path, teacher=theirs, progress=False)
    assert result.num_dropped == sum(len(row["input_ids"]) == longest for row in rows)


BAD_SETTINGS = {
    "jsd_beta has no effect on divergence 'ce'": {"method": "kd", "jsd_beta": 0.5},
    "divergence is 'kl'; expected one of ce, forward_kl": {"method": "gkd", "divergence": "kl"},
    "kl is 'k2'; expected one of k3, full": {"method": "pmpo", "kl": "k2"},
    "kl has no effect on method 'dpo'": {"method": "dpo", "kl": "full"},
    "on_policy has no effect on method 'kd'": {"method": "kd", "on_policy": 0.5},
    "on_policy is 2, expected a number from 0 to 1": {"method": "gkd", "on_policy": 2},
    "divergence_temperature is 0, expected": {"method": "gkd", "divergence_temperature": 0},
}


@pytest.mark.parametrize("message", list(BAD_SETTINGS))
def test_bad_settings_are_refused(message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**BAD_SETTINGS[message])


def _distributed_worker(rank: int, out: str) -> None:
    _train_gkd(out)
    leave_together(out, rank)


def _train_gkd(out: str | Path) -> None:
    run = settings("gkd", on_policy=0.7, epochs=6, max_grad_norm=1e9, micro_batch_size=1)
    on_policy = OnPolicy(scripted(), 2)
    train(a_student(), tiny_singles(4), run, out, teacher=a_teacher(), on_policy=on_policy, progress=False)


def test_two_processes_train_to_the_weights_of_one(tmp_path: Path) -> None:
    """Each samples its own places, and means are over the tokens of both."""
    pair = start_pair(_distributed_worker, str(tmp_path / "two"))
    _train_gkd(tmp_path / "one")
    while not pair.join():
        pass
    one, two = (weights(load_model(tmp_path / name / "model")) for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)
        assert theirs["on_policy"] == ours["on_policy"] and theirs["action_tokens"] == ours["action_tokens"]
