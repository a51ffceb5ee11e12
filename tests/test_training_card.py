"""The model card, and pushing it with its model to a hub that is made up here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from huggingface_hub import ModelCard

from mtpo.errors import EnvironmentFault, InputError
from mtpo.models import load_model
from mtpo.training import METHODS, TrainingSettings, hub, train
from mtpo.training.card import SOURCES, RunFacts, model_card
from recipes import train as train_recipe
from tests.tiny_models import tiny_model
from tests.tiny_rows import tiny_labels, tiny_pairs, tiny_singles
from tests.tiny_tokenizers import make_tokenizer


def settings(method: str = "dpo", **options: Any) -> TrainingSettings:
    return TrainingSettings(method=method, learning_rate=4e-7, **options)


def card_of(folder: Path) -> tuple[ModelCard, str]:
    text = (folder / "README.md").read_text()
    return ModelCard(text), text


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    tiny_model("gemma2", std=0.1, vocab_size=600).save_pretrained(folder / "model")
    make_tokenizer("gemma").save_pretrained(folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_pairs(4)))
    return folder


def test_a_command_leaves_a_card_that_states_how_the_model_was_made(start: Path, tmp_path: Path) -> None:
    argv = ["--method", "dpo", "--model", start / "model", "--data", start, "--out", tmp_path / "run"]
    argv += ["--learning_rate", "4e-7", "--beta", "0.3", "--mask", "last_turn", "--batch_size", "4"]
    argv += ["--reference", start / "model"]
    assert train_recipe.main([str(argument) for argument in argv]) == 0
    card, text = card_of(tmp_path / "run/model")
    assert card.data.license == "gemma" and card.data.tags == ["mtpo", "dpo"]  # pyright: ignore
    named = card.data.to_dict()
    assert named["library_name"] == "transformers" and "base_model" not in named  # a folder here
    digest = hashlib.sha256((start / "pairs.jsonl").read_bytes()).hexdigest()
    step = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    for line in (
        "| loss of an example | `-log sigmoid(beta D)` |",
        "| paper | https://arxiv.org/abs/2409.02392, eq. 13, after https://arxiv.org/abs/2305.18290, eq. 7 |",
        "| options | beta = 0.3, label_smoothing = 0.0, nll_coef = 0.0, normalize = False |",
        f"| base model | {start / 'model'} |",
        f"| reference | {start / 'model'} |",
        "| mask | last_turn: the tokens that the model sampled in its last turn are trained |",
        "| layout | padded |",
        "| rows | 4 (pair), 0 dropped as too long |",
        f"| data | `pairs.jsonl`, SHA-256 {digest} |",
        f"| loss | {step['loss']:.4g} |",
        f"| grad_norm | {step['grad_norm']:.4g} |",
        "| learning_rate | 4e-07 |",
        "| batch_size | 4 |",
    ):
        assert line in text.splitlines(), line
    assert "| torch | " in text and "| mtpo commit | " in text
    assert "https://ai.google.dev/gemma/terms" in text
    assert "warmup_steps" not in text  # as by default


def test_an_adapters_card_is_ours_and_names_its_library(start: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    chosen = settings("sft", lora_rank=2, batch_size=4)
    result = train(load_model(start / "model"), tiny_singles(4), chosen, tmp_path, progress=False)
    card, text = card_of(result.model)
    assert card.data.library_name == "peft"  # pyright: ignore
    assert "# Adapter trained by sft" in text and "| lora_rank | 2 |" in text
    assert "| reference | none |" in text


def front_matter(family: str, base_model: str) -> dict[str, Any]:
    text = model_card(settings(), RunFacts(base_model), {}, family=family, is_adapter=False)
    return ModelCard(text).data.to_dict()


def test_the_front_matter_names_what_the_hub_can_find() -> None:
    gemma = front_matter("gemma3_text", "google/gemma-3-4b-it")
    assert gemma["base_model"] == "google/gemma-3-4b-it" and gemma["license"] == "gemma"
    mistral = front_matter("mistral", "./runs/sft/model")
    assert "base_model" not in mistral and "license" not in mistral
    assert "base_model" not in front_matter("mistral", "a/b/c") | front_matter("mistral", "")


OFFLINE = [
    "sft",
    "raft",
    "dpo",
    "cdpo",
    "ipo",
    "slic",
    "exponential",
    "truncated_quadratic",
    "squared",
    "savage",
]
OFFLINE += ["kto", "pmpo", "dro_v"]


@pytest.mark.parametrize("method", OFFLINE)
def test_offline_methods_name_their_equation_and_their_paper(method: str) -> None:
    assert method in METHODS
    text = model_card(settings(method), RunFacts(), {}, family="llama", is_adapter=False)
    assert f"`{SOURCES[method].equation}`" in text and "https://arxiv.org/abs/" in SOURCES[method].paper
    assert ModelCard(text).data.tags == ["mtpo", method]  # pyright: ignore


class FakeApi:
    """Remembers what it is asked; a hub that is full refuses."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    is_full = False

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if self.is_full:
            raise OSError("no space left\nmore lines")
        self.calls.append(("create", {"repo_id": repo_id, **options}))

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> str:
        files = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(("upload", {"repo_id": repo_id, "files": files}))
        return f"https://hub/{repo_id}"


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    api = type("Api", (FakeApi,), {"calls": []})
    monkeypatch.setattr(hub, "HfApi", api)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_token")
    return api


def test_a_trained_model_is_pushed_whole_and_private(fake_hub: type[FakeApi], tmp_path: Path) -> None:
    chosen = settings("kto", batch_size=4, hub_model_id="me/tiny")
    tokenizer = make_tokenizer("gemma")
    model = tiny_model("llama", vocab_size=600)
    train(model, tiny_labels(4), chosen, tmp_path, tokenizer=tokenizer, progress=False)
    (create, how), (upload, what) = fake_hub.calls
    assert (create, how) == ("create", {"repo_id": "me/tiny", "private": True, "exist_ok": True})
    assert upload == "upload" and what["repo_id"] == "me/tiny"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(what["files"])
    assert "training_args.bin" not in what["files"]


def test_a_public_repository_has_to_be_asked_for(fake_hub: type[FakeApi], tmp_path: Path) -> None:
    chosen = settings("sft", batch_size=4, hub_model_id="me/tiny", hub_public=True)
    train(tiny_model("llama"), tiny_singles(4), chosen, tmp_path, progress=False)
    assert fake_hub.calls[0][1]["private"] is False


def test_a_refusing_hub_leaves_the_model_where_it_is(fake_hub: type[FakeApi], tmp_path: Path) -> None:
    fake_hub.is_full = True
    chosen = settings("sft", batch_size=4, hub_model_id="me/tiny")
    with pytest.raises(
        EnvironmentFault, match=r"model is trained, but was not pushed to me/tiny: no space left$"
    ):
        train(tiny_model("llama"), tiny_singles(4), chosen, tmp_path, progress=False)
    assert load_model(tmp_path / "model") is not None


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [(None, "me/tiny", "me/tiny: no token"), ("hf_token", "me/tiny/model", "hub_model_id 'me/tiny/model'")],
)
def test_a_push_that_cannot_work_is_refused_before_training(
    token: str | None, name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: token)
    with pytest.raises(InputError, match=message):
        train(
            tiny_model("llama"), tiny_singles(4), settings("sft", hub_model_id=name), tmp_path, progress=False
        )
    assert not list(tmp_path.iterdir())


def test_hub_public_alone_is_refused() -> None:
    with pytest.raises(InputError, match="hub_public has no effect"):
        settings(hub_public=True)
