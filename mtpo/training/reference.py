"""Log-probs of a frozen reference, computed once and kept on disk by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

from mtpo.batches import Row, SingleCollator, sides
from mtpo.logprobs import action_logps
from mtpo.models import fingerprint, unwrapped

Trajectory = tuple[Sequence[int], Sequence[int]]
"""Ids and completion mask."""


def add_reference_logps(
    rows: Sequence[Row], model: nn.Module, cache: Path, *, batch_size: int, progress: bool
) -> list[Row]:
    """The rows with a `ref_logps` column (of pairs, one a side), also in the row under `mismatched`.

    Each is a tensor with log p of every action token of one trajectory under `model`, in nats and in order: of
    float32, 4 bytes a token; of float64 for a float64 model.
    """
    trajectories = [trajectory for row in rows for trajectory in _trajectories(row)]
    logps = reference_logps(model, trajectories, cache, batch_size=batch_size, progress=progress)

    def scored(row: Row) -> Row:
        columns: Row = {
            f"{side}ref_logps": logps[_key(row[f"{side}input_ids"], row[f"{side}completion_mask"])]
            for side in sides(row)
        }
        if "mismatched" in row:
            columns["mismatched"] = scored(row["mismatched"])
        return row | columns

    return [scored(row) for row in rows]


def reference_logps(
    model: nn.Module, trajectories: Iterable[Trajectory], cache: Path, *, batch_size: int, progress: bool
) -> dict[str, Tensor]:
    """Log-probs of the action tokens of every trajectory, by content key.

    What `cache` already holds for these weights and this autocast is not computed again; batches are written as
    they come, so that an interrupted pass goes on where it stopped. Several processes share the work.
    """
    name = f"{fingerprint(model)[:32]}-{_computed_in(model)}-tokens"
    wanted = {_key(ids, mask): (ids, mask) for ids, mask in trajectories}
    num_tokens = {key: sum(mask) for key, (_, mask) in wanted.items()}
    known = _read_cache(cache, name, num_tokens, _logps_dtype(model))
    state = PartialState()
    missing = sorted((key for key in wanted if key not in known), key=lambda key: (len(wanted[key][0]), key))
    # The first process decides: another may read the cache when that has already begun to fill it.
    missing = broadcast_object_list([missing])[0]
    mine = missing[state.process_index :: state.num_processes]
    cache.mkdir(parents=True, exist_ok=True)
    computed: dict[str, Tensor] = {}
    with (
        (cache / f"{name}-{state.process_index}.jsonl").open("a", encoding="utf-8") as file,
        tqdm(total=len(mine), desc="reference", unit="row", disable=not progress or not mine) as bar,
    ):
        for start in range(0, len(mine), batch_size):
            keys = mine[start : start + batch_size]
            scored = dict(zip(keys, _score(model, [wanted[key] for key in keys]), strict=True))
            computed |= scored
            file.writelines(_line(key, logps) for key, logps in scored.items())
            file.flush()
            bar.update(len(keys))
    for part in gather_object([computed]):
        known |= part
    return known


@torch.no_grad()
def _score(model: nn.Module, trajectories: Sequence[Trajectory]) -> list[Tensor]:
    rows = [{"input_ids": list(ids), "completion_mask": list(mask)} for ids, mask in trajectories]
    device = next(model.parameters()).device
    batch: dict[str, Any] = {name: tensor.to(device) for name, tensor in SingleCollator(0)(rows).items()}
    was_training = model.training
    model.eval()
    logps = action_logps(model, **batch)
    model.train(was_training)
    is_action = batch["completion_mask"].bool()
    parts = logps[is_action].cpu().split(is_action.sum(-1).tolist())
    return [part.clone() for part in parts]  # a view would take the whole batch along to other processes


def _trajectories(row: Row) -> list[Trajectory]:
    own = [(row[f"{side}input_ids"], row[f"{side}completion_mask"]) for side in sides(row)]
    return own + (_trajectories(row["mismatched"]) if "mismatched" in row else [])


def _key(ids: Sequence[int], mask: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps([list(ids), list(mask)]).encode()).hexdigest()[:32]


def _computed_in(model: nn.Module) -> str:
    dtype, device = unwrapped(model).dtype, next(model.parameters()).device.type
    cast = f"-{torch.get_autocast_dtype(device)}" if torch.is_autocast_enabled(device) else ""
    return f"{dtype}{cast}".replace("torch.", "")


def _logps_dtype(model: nn.Module) -> torch.dtype:
    return torch.float64 if unwrapped(model).dtype == torch.float64 else torch.float32


def _line(key: str, logps: Tensor) -> str:
    """One line of the cache: 9 digits tell all float32 values apart, 17 all of float64."""
    digits = 17 if logps.dtype == torch.float64 else 9
    values = ", ".join(f"{value:.{digits}g}" for value in logps.tolist())
    return f'{{"key": "{key}", "logps": [{values}]}}\n'


def _read_cache(
    cache: Path, name: str, num_tokens: Mapping[str, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the cache holds of the keys in `num_tokens`, in as many values as these say."""
    known = {}
    for path in sorted(cache.glob(f"{name}-*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    logps = torch.tensor(entry["logps"], dtype=dtype)
                except (ValueError, KeyError, TypeError):
                    continue  # a line torn by a crash: its trajectory is computed again
                if logps.shape == (num_tokens.get(entry["key"]),):
                    known[entry["key"]] = logps
    return known
