"""A Gemma 2 of 0.2 million parameters and its tokenizer, made from scratch: the embedded default's model.

Both behave like the published ones where this project can see it: Gemma's control tokens and chat template, BOS
added on request, digits as single tokens, any text encoded without loss, soft-caps and alternating attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

VOCAB_SIZE = 768
"""At most; 256 of them are bytes, so that no text is unknown."""

MAX_POSITIONS = 1024

WORDS = r" ?[A-Za-z]+|\n|\d| ?[^\sA-Za-z0-9]+|\s"
"""No token crosses these borders. A digit, and a newline, is always a token of its own: numbers can be copied digit
by digit, and text tokenised turn by turn has the ids of the whole conversation."""

TEMPLATE_WORDS = "user\nmodel\n```output\n```python\n"

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- raise_exception('System role not supported') -}}
    {%- elif message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {{- '<start_of_turn>' ~ ('model' if message.role == 'assistant' else 'user') ~ '\\n' -}}
    {{- message.content | trim ~ '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which the usual words of `texts` are single tokens.

    Args:
        texts: contents of messages; at least a thousand, so that their words outweigh the template's.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, EOS, BOS, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_template_words(texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        bos_token=BOS,
        additional_special_tokens=[START_OF_TURN, END_OF_TURN],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def make_tiny_gemma2(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, num_heads: int = 4
) -> Gemma2ForCausalLM:
    """A Gemma 2 with random weights drawn from `seed`; torch's own random state is left as it was.

    Args:
        num_heads: even; the width is 24 for each, 96 by default.
    """
    pad_id, eos_id, bos_id, end_of_turn_id = (
        tokenizer.get_vocab()[token] for token in (PAD, EOS, BOS, END_OF_TURN)
    )
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=24 * num_heads,
        intermediate_size=48 * num_heads,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        head_dim=32,  # the smallest that vLLM attends with on a CPU
        query_pre_attn_scalar=32,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=pad_id,
        eos_token_id=eos_id,
        bos_token_id=bos_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # other attention implementations drop the soft-cap, or refuse
        model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
        # Unit variance after Gemma's factor of sqrt(hidden_size): with the usual 0.02, tokens would start out
        # five times weaker than the normalised output of the first layer, and be learned later.
        nn.init.normal_(model.model.embed_tokens.weight, std=config.hidden_size**-0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=bos_id, eos_token_id=[eos_id, end_of_turn_id], pad_token_id=pad_id
    )
    return model


def _with_template_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, and as often the words that the chat format puts around them, so that these are tokens too."""
    for text in texts:
        yield text
        yield TEMPLATE_WORDS
