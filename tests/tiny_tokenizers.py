"""Small tokenizers with the special tokens, the whitespace habits and the published chat template of a family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Natalia sold 48 clips in April.\n\nHow many clips did she sell altogether?",
    "```python\ntotal = 48 + 24\nprint(total)\n```",
    "```output\n72\n```",
    "The answer is $\\boxed{72}$.",
]

SPECIALS = {
    "gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
    "gemma3": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
    "mistral": ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"],
    "llama3": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
    "llama3_1": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
    "qwen2_5": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
}
BOS = {"gemma": "<bos>", "gemma3": "<bos>", "mistral": "<s>", "llama3": "<|begin_of_text|>"}
BOS["llama3_1"] = BOS["llama3"]
EOS = {"gemma": "<eos>", "gemma3": "<eos>", "mistral": "</s>", "llama3": "<|end_of_text|>"}
EOS |= {"llama3_1": "<|eot_id|>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>"}
END_OF_TURN = {"gemma": "<end_of_turn>", "gemma3": "<end_of_turn>", "mistral": "</s>", "llama3": "<|eot_id|>"}
END_OF_TURN |= {"llama3_1": "<|eot_id|>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>"}

# Behaves as the template published with Mistral-7B-Instruct-v0.3 for conversations without tools or system text.
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
FAMILIES = tuple(SPECIALS)


def published_template(family: str) -> str:
    """The family's chat template, as published; TRL ships those of all families here but Mistral."""
    if family == "mistral":
        return MISTRAL_TEMPLATE
    return (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text()


def make_tokenizer(family: str, template: str | None = None) -> Any:
    """A tokenizer of a few hundred ids."""
    like_gemma = family.startswith("gemma")
    backend = Tokenizer(
        models.BPE(unk_token="<unk>" if "<unk>" in SPECIALS[family] else None, byte_fallback=False)
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if like_gemma or family == "mistral":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|\n+|▁?[^\d\n▁]+|▁"), "isolated")
        backend.decoder = decoders.Replace("▁", " ")
        alphabet = sorted({c for text in TEXT for c in text} | {chr(c) for c in range(33, 127)} | {"▁", "\n"})
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIALS[family]],
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    newlines = ["\n\n here", "\n\n there"] if like_gemma else []  # Gemma has single ids for runs of newlines
    backend.train_from_iterator(TEXT * 3 + newlines * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS.get(family),
        eos_token=EOS[family],
        chat_template=template or published_template(family),
    )
