"""Small tokenizers with the special tokens, the whitespace habits and the published chat template of a family."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class TinyFamily:
    """What a tokenizer needs to know beside its template."""

    specials: tuple[str, ...]
    eos: str
    bos: str | None = None
    turn_end: str = ""
    """The token that ends a turn; by default the one that ends the sequence."""
    has_metaspace: bool = False
    """Spaces are written as a character of the token, as by sentencepiece; else bytes are the alphabet."""

    @property
    def end_of_turn(self) -> str:
        return self.turn_end or self.eos


_GEMMA = TinyFamily(
    ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
    eos="<eos>",
    bos="<bos>",
    turn_end="<end_of_turn>",
    has_metaspace=True,
)
_LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
_LLAMA3_1 = TinyFamily(_LLAMA3_SPECIALS, eos="<|eot_id|>", bos="<|begin_of_text|>")
_QWEN = TinyFamily(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos="<|im_end|>")
# With the wide bar U+FF5C where others have the ASCII one.
_DEEPSEEK_BOS, _DEEPSEEK_EOS, *_DEEPSEEK_ROLES = (
    f"<\uff5c{name}\uff5c>" for name in ("begin▁of▁sentence", "end▁of▁sentence", "User", "Assistant")
)
TINY_FAMILIES = {
    "gemma": _GEMMA,
    "gemma3": _GEMMA,
    "mistral_v0_1": TinyFamily(("<unk>", "<s>", "</s>"), eos="</s>", bos="<s>", has_metaspace=True),
    "mistral": TinyFamily(
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"), eos="</s>", bos="<s>", has_metaspace=True
    ),
    "llama3": TinyFamily(
        _LLAMA3_SPECIALS, eos="<|end_of_text|>", bos="<|begin_of_text|>", turn_end="<|eot_id|>"
    ),
    "llama3_1": _LLAMA3_1,
    "llama3_2": _LLAMA3_1,
    "qwen2_5": _QWEN,
    "qwen3": _QWEN,
    "phi3": TinyFamily(
        ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        eos="<|endoftext|>",
        turn_end="<|end|>",
    ),
    "deepseek_r1": TinyFamily(
        (_DEEPSEEK_BOS, _DEEPSEEK_EOS, *_DEEPSEEK_ROLES), eos=_DEEPSEEK_EOS, bos=_DEEPSEEK_BOS
    ),
}
FAMILIES = tuple(name for name in TINY_FAMILIES if name not in ("llama3_2", "deepseek_r1"))
"""Those whose template, asked at any time and at any turn, renders the turns before as they were."""

# Behave as the templates of the Mistral-7B-Instruct models without tools. Those of v0.1 and v0.2 differ from that of
# v0.3 in two spaces, and in the user turn that takes the system text: the first one, not the last.
_MISTRAL_TEMPLATE = (
    "{{ bos_token }}"
    "{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in (messages[1:] if system else messages) %}"
    "{% if m['role'] != ('assistant' if loop.index0 % 2 else 'user') %}"
    "{{ raise_exception('only user and assistant roles, which alternate') }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
    "{% else %}{{ 'OPEN ' + (system if PLACE else '') + m['content'] + 'CLOSE' }}{% endif %}{% endfor %}"
)
_TEMPLATES = {
    "mistral_v0_1": _MISTRAL_TEMPLATE.replace("OPEN", " [INST]")
    .replace("CLOSE", " [/INST]")
    .replace("PLACE", "loop.first"),
    "mistral": _MISTRAL_TEMPLATE.replace("OPEN", "[INST]")
    .replace("CLOSE", "[/INST]")
    .replace("PLACE", "loop.last"),
}
_TRL_NAMES = {"deepseek_r1": "deepseek_r1_distill"}


def published_template(family: str) -> str:
    """The family's chat template, as published; TRL ships those of all families here but Mistral."""
    if family in _TEMPLATES:
        return _TEMPLATES[family]
    name = _TRL_NAMES.get(family, family)
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def make_tokenizer(family: str, template: str | None = None) -> Any:
    """A tokenizer of a few hundred ids."""
    tiny = TINY_FAMILIES[family]
    backend = Tokenizer(models.BPE(unk_token="<unk>" if "<unk>" in tiny.specials else None))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if tiny.has_metaspace:
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|\n+|▁?[^\d\n▁]+|▁"), "isolated")
        backend.decoder = decoders.Replace("▁", " ")
        alphabet = sorted({c for text in TEXT for c in text} | {chr(c) for c in range(33, 127)} | {"▁", "\n"})
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in tiny.specials],
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    newlines = (
        ["\n\n here", "\n\n there"] if family.startswith("gemma") else []
    )  # Gemma has single ids for runs of newlines
    backend.train_from_iterator(TEXT * 3 + newlines * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tiny.bos,
        eos_token=tiny.eos,
        chat_template=template or published_template(family),
    )
