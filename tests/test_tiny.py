from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.demonstrations import demonstrations
from recipes.tiny import make_tiny_gemma2, train_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"
HARD_TEXTS = (
    "",
    "  two spaces\n\n\n\ttab and \r\n a return ",
    "Grüße, 数学 ∑ π ≠ 🙂\u200b\x00\x7f",
    "x**2//3 != 0x1F; s = f'{a!r:>10}'",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(m["content"] for _, messages in demonstrations(1500) for m in messages)


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [str(tokenizer.decode([i])) for i in ids]


def test_any_text_is_encoded_without_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = list(HARD_TEXTS)
    if (path := SHARED / "data" / "gsm8k" / "test.jsonl").exists():
        texts += [
            str(value) for line in path.read_text().splitlines()[:300] for value in json.loads(line).values()
        ]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_digits_are_single_tokens_and_words_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokens(tokenizer, "Max has 293 shells.") == ["Max", " has", " ", "2", "9", "3", " shells", "."]
    assert tokens(tokenizer, "Dan = Max // 12\n") == ["Dan", " =", " Max", " //", " ", "1", "2", "\n"]
    for text, num_tokens in (("```python\n", 3), ("```output\n", 3), ("user\n", 2), ("model\n", 2)):
        assert len(tokens(tokenizer, text)) == num_tokens


def test_bos_is_added_only_when_special_tokens_are_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("Max")["input_ids"]
    assert ids == [tokenizer.bos_token_id, *tokenizer("Max", add_special_tokens=False)["input_ids"]]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, 2)


def test_chat_template_renders_turns_as_gemma_does(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": " What is 6 * 7?\n"},
        {"role": "assistant", "content": "```python\nprint(6 * 7)\n```"},
        {"role": "user", "content": "```output\n42\n```"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nWhat is 6 * 7?<end_of_turn>\n"
        "<start_of_turn>model\n```python\nprint(6 * 7)\n```<end_of_turn>\n"
        "<start_of_turn>user\n```output\n42\n```<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["system", "user"], "System role not supported"),
        (["assistant"], "must alternate"),
        (["user", "user"], "must alternate"),
        (["user", "assistant", "tool"], "must alternate"),
    ],
)
def test_chat_template_refuses_the_roles_that_gemma_refuses(
    tokenizer: PreTrainedTokenizerFast, roles: list[str], reason: str
) -> None:
    with pytest.raises(TemplateError, match=reason):
        tokenizer.apply_chat_template([{"role": role, "content": "x"} for role in roles], tokenize=False)


def test_turns_tokenised_one_by_one_have_the_ids_of_the_conversation(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for _, messages in demonstrations(50):
        pieces = ["<bos>"]
        for m in messages:
            fenced = f"```output\n{m['content']}\n```" if m["role"] == "tool" else m["content"]
            role = "model" if m["role"] == "assistant" else "user"
            pieces += [f"<start_of_turn>{role}\n", fenced, "<end_of_turn>\n"]
        one_by_one = [i for p in pieces for i in tokenizer(p, add_special_tokens=False)["input_ids"]]
        assert one_by_one == tokenizer("".join(pieces), add_special_tokens=False)["input_ids"]


def test_a_saved_tokenizer_reads_back_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<start_of_turn>user\nMax has 293 shells."
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert (again.bos_token, again.padding_side) == ("<bos>", "left")


def test_tiny_gemma_has_gemma_2s_shape_in_small(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_gemma2(tokenizer, seed=0)
    embedding = 96 * len(tokenizer)
    attention = 2 * 96 * (4 * 32) + 2 * 96 * (2 * 32)  # q and o, k and v
    layer = attention + 3 * 96 * 192 + 4 * 96  # and the gated MLP, and four norms
    assert sum(p.numel() for p in model.parameters()) == embedding + 2 * layer + 96
    assert model.config.attn_logit_softcapping == 50.0
    assert model.config.final_logit_softcapping == 30.0
    assert model.config._attn_implementation == "eager"
    assert model.config.max_position_embeddings >= 512


def test_embeddings_start_with_unit_variance_after_gemmas_scaling(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = make_tiny_gemma2(tokenizer, seed=0)
    embedded = model.get_input_embeddings()(torch.arange(len(tokenizer)))
    assert embedded.std().item() == pytest.approx(1.0, abs=0.02)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_generation_stops_at_the_end_of_a_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_tiny_gemma2(tokenizer, seed=0)
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == [1, tokenizer.convert_tokens_to_ids("<end_of_turn>")]


def test_the_seed_decides_the_weights_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (make_tiny_gemma2(tokenizer, seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])
