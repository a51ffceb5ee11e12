"""Games of one or two turns for the real rollout and the real trainer: policies that are tables of logits."""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from data.trajectories import Journal, read_trajectories
from mtpo.environment import Reply
from mtpo.tabular import TreeGame
from mtpo.training.online import train_online
from mtpo.training.online_settings import OnlineSettings
from mtpo.training.table import Storage, Table
from mtpo.trajectory import Problem, Segment, StopReason, Trajectory

PROMPT, OBSERVED, FIRST_ACTION = 1, 2, 3
POSITIONS = 16
STORAGE = Storage(Journal, read_trajectories)

torch.set_num_threads(1)


class TableConfig(PretrainedConfig):
    model_type = "table"

    def __init__(self, num_actions: int = 3, **options: Any) -> None:
        super().__init__(**options)
        self.vocab_size = FIRST_ACTION + num_actions
        self.hidden_size = self.max_position_embeddings = POSITIONS
        self.num_hidden_layers = 0
        self.use_cache = True


class Places(nn.Module):
    """The last hidden state is the token's own position, one-hot: what was read before is in how long it was."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.ones(1), persistent=False)  # like a rotary model's frequencies

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        hidden = nn.functional.one_hot(position_ids, POSITIONS).float()
        return BaseModelOutput(last_hidden_state=hidden)  # pyright: ignore[reportArgumentType]


class TableLM(PreTrainedModel):
    """A softmax over the actions for each state; other tokens are never drawn."""

    config_class = TableConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        self.model = Places()
        self.embeddings = nn.Embedding(config.vocab_size, 1).requires_grad_(False)
        self.head = nn.Linear(POSITIONS, config.vocab_size)
        self.post_init()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.head.bias.requires_grad_(False)
        with torch.no_grad():
            self.head.bias[:FIRST_ACTION] = -50.0

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **inputs: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.model(input_ids, **inputs).last_hidden_state))


def place_of(state: int) -> int:
    """Where the last token stands that is read before the turn: state s > 0 shows itself by s tokens."""
    return 0 if state == 0 else 1 + state


def table_policy(pi: Any) -> TableLM:
    """A model that plays pi, (S, A)."""
    pi = np.atleast_2d(pi)
    model = TableLM(TableConfig(pi.shape[1], attn_implementation="eager"))
    with torch.no_grad():
        for state, row in enumerate(pi):
            model.head.weight[FIRST_ACTION:, place_of(state)] = torch.tensor(np.log(row)).float()
    return model.eval()


def policy_of(model: Any, num_states: int = 1) -> np.ndarray:
    """(S, A): what the model plays."""
    logits = model.head.weight.detach().double()[FIRST_ACTION:, [place_of(s) for s in range(num_states)]]
    return logits.softmax(0).T.numpy()


class GameChat:
    """A turn is one token; a state is shown by as many tokens as its number says."""

    bos_id = None
    end_of_turn_id = -1

    def __init__(self, num_actions: int) -> None:
        self.stop_ids = tuple(range(FIRST_ACTION, FIRST_ACTION + num_actions))

    def prompt(self, question: str, *, system: str | None = None) -> Segment:
        return Segment("prompt", (PROMPT,), text=question)

    def action_text(self, ids: Sequence[int]) -> str:
        return str(ids[-1] - FIRST_ACTION)

    def observation(self, text: str, *, after: Sequence[int], role: str = "tool") -> Segment:
        return Segment("observation", (OBSERVED,) * int(text), text=text)


class GameEnvironment:
    """Moves through the states of a game; a trajectory's metadata says which final state it reached."""

    def __init__(self, game: TreeGame) -> None:
        self.game = game

    def begin(self, problem: Problem) -> GameSession:
        return GameSession(self.game)


class GameSession:
    def __init__(self, game: TreeGame) -> None:
        self.game, self.state = game, 0
        self.metadata: dict[str, Any] = {}

    async def take(self, turn: str, *, seed: int, limit: StopReason | None) -> Reply | StopReason:
        (self.state,) = random.Random(seed).choices(
            range(self.game.transitions.shape[2]), self.game.transitions[self.state, int(turn)]
        )
        if self.state >= self.game.num_states:
            self.metadata["final"] = self.state - self.game.num_states
            return StopReason.ANSWERED
        return Reply(str(self.state))

    async def fork(self) -> GameSession:
        raise NotImplementedError

    async def __aenter__(self) -> GameSession:
        return self

    async def __aexit__(self, *exception: object) -> None: ...


class Judged:
    """A judge by the game's own preference."""

    def __init__(self, game: TreeGame) -> None:
        self.counts: Counter[str] = Counter()
        self.game = game

    async def prefer(self, first: Trajectory, second: Trajectory, problem: Problem) -> float | None:
        return float(self.game.preference[first.metadata["final"], second.metadata["final"]])


class FirstActionIsRight(Judged):
    """Also a judge of single trajectories."""

    async def reward(self, trajectory: Trajectory, problem: Problem) -> float | None:
        return float(trajectory.metadata["final"] == 0)


def game_table(game: TreeGame, judge: Any = None, environment: GameEnvironment | None = None) -> Table:
    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[GameEnvironment]:
        yield environment or GameEnvironment(game)

    chat: Any = GameChat(game.mu.shape[1])
    return Table(chat, opened, judge or Judged(game), max_in_flight=512)


def play_game(game: TreeGame, start: Any, settings: OnlineSettings, out: Path, **options: Any) -> np.ndarray:
    """Train from the policy `start` against the reference mu; the policy (S, A) that comes of it."""
    model = table_policy(start)
    train_online(
        model,
        [Problem("game", "your move", "")],
        settings,
        options.pop("table", None) or game_table(game),
        STORAGE,
        out,
        reference_model=options.pop("reference", None) or table_policy(game.mu),
        progress=False,
        **options,
    )
    return policy_of(model, game.num_states)
