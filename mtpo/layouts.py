"""How the trajectories of a batch lie in the rows that a model reads.

    padded   a trajectory a row, padded on the right
    packed   trajectories end to end: hardly any padding
    tree     the two trajectories of a pair share their common prefix: prompt and equal turns are read once

A batch always holds its trajectories padded, (N, T), which is how trainer, losses and metrics know them. In another
layout it also holds the R rows of L tokens that the model reads instead, and where in them each token lies:

    row_ids, positions        (R, L); positions begin at 0 in every trajectory, and go on from the shared prefix
    documents                 (R, L); which trajectory or pair a token belongs to, -1 for padding
    branches                  (R, L); 0 for what a pair shares, 1 chosen only, 2 rejected only
    places                    (N, T); index of the token in the flattened rows, 0 for padding

A token sees those of its document that stand at its position or before, in its own branch or in the shared one; a
sliding window counts positions, never columns. So a branch's first token is predicted where the prefix ends, and no
token is copied. Layouts change time and memory, not results.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["padded", "packed", "tree"]


def arranged(
    trajectories: Sequence[Sequence[int]], units: Sequence[tuple[int, ...]], pad_id: int
) -> dict[str, Tensor]:
    """The tensors of a packed or tree batch that a padded one lacks.

    Args:
        trajectories: ids of the N trajectories.
        units: what lies side by side in one piece, by index: one trajectory, or two that share their prefix.
    """
    pieces = [_piece(*(trajectories[n] for n in unit)) for unit in units]
    rows = _fill_rows([len(ids) for ids, _, _ in pieces])
    length = max(sum(len(pieces[unit][0]) for unit in row) for row in rows)
    row_ids = torch.full((len(rows), length), pad_id)
    documents, branches = torch.full_like(row_ids, -1), torch.zeros_like(row_ids)
    positions = torch.zeros_like(row_ids)
    places = torch.zeros(len(trajectories), max(map(len, trajectories)), dtype=torch.int64)
    for row, members in enumerate(rows):
        start = 0
        for unit in members:
            ids, where, branch = pieces[unit]
            end = start + len(ids)
            row_ids[row, start:end] = torch.tensor(ids)
            branches[row, start:end] = torch.tensor(branch)
            documents[row, start:end] = unit
            for n, columns in zip(units[unit], where, strict=True):
                places[n, : len(columns)] = torch.tensor(columns) + row * length + start
                positions[row, start + torch.tensor(columns)] = torch.arange(len(columns))
            start = end
        positions[row, start:] = torch.arange(length - start)  # the padding is a sequence of its own
    return {
        "row_ids": row_ids,
        "positions": positions,
        "documents": documents,
        "branches": branches,
        "places": places,
    }


def _piece(*trajectories: Sequence[int]) -> tuple[list[int], list[list[int]], list[int]]:
    """Ids of trajectories that lie together, the column of each token of each of them, and the branch of each id."""
    first = list(trajectories[0])
    if len(trajectories) == 1:
        return first, [list(range(len(first)))], [0] * len(first)
    second = trajectories[1]
    shared = sum(1 for _ in takewhile(lambda ids: ids[0] == ids[1], zip(first, second, strict=False)))
    rest = list(second[shared:])
    columns = [*range(shared), *range(len(first), len(first) + len(rest))]
    branch = [0] * shared + [1] * (len(first) - shared) + [2] * len(rest)
    return first + rest, [list(range(len(first))), columns], branch


def _fill_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Which pieces share a row: so few rows that the longest piece leaves none empty, the longest placed first."""
    rows: list[list[int]] = [[] for _ in range(max(1, sum(lengths) // max(lengths)))]
    filled = [0] * len(rows)
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        row = filled.index(min(filled))
        rows[row].append(piece)
        filled[row] += lengths[piece]
    return rows
