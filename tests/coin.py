"""A tiny Gemma 2 that guesses: it answers 1 or 2, with the tool or without, whatever the question."""

from __future__ import annotations

import json
import random
from pathlib import Path

from mtpo.chat import ChatFormat
from mtpo.training import TrainingSettings, train
from recipes.sft import render_rows
from recipes.tiny import make_tiny_gemma2, train_tokenizer

SHORT = ("--max_turns", "3", "--max_turn_tokens", "40", "--kernels", "4", "--preload", "math")
"""Options of recipes that sample from it: its trajectories are short."""
WHO = ("Max", "Dan", "Tom", "Eva", "Ann", "Leo", "Mia", "Sam")


def write_problems_file(path: Path, split: str, count: int) -> Path:
    """Problems in GSM8K's field names, no question in two splits; the answers are 1 and 2 in turn."""
    rows = [
        {
            "question": f"{split}: does {WHO[i % 8]} say 1 or 2 in round {i}?",
            "answer": f"So it is.\n#### {1 + i % 2}",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_coin_model(folder: Path) -> Path:
    """The folder of the model; takes a few seconds."""
    rng = random.Random(0)
    conversations = []
    for i in range(1200):
        question = {
            "role": "user",
            "content": f"train: does {rng.choice(WHO)} say 1 or 2 in round {rng.randrange(60)}?",
        }
        number = rng.choice("12")
        answer = {"role": "assistant", "content": f"\\boxed{{{number}}}"}
        call = [
            {"role": "assistant", "content": f"```python\nprint({number})\n```"},
            {"role": "tool", "content": number},
        ]
        conversations.append((f"demo/{i}", [question, *(call if i % 2 else []), answer]))
    tokenizer = train_tokenizer(m["content"] for _, messages in conversations for m in messages)
    rows = render_rows(ChatFormat.for_tokenizer(tokenizer), conversations)
    settings = TrainingSettings(
        method="sft", learning_rate=6e-3, optimizer="muon", batch_size=16, warmup_steps=10
    )
    model = make_tiny_gemma2(tokenizer, seed=0)
    return train(model, rows, settings, folder, tokenizer=tokenizer, progress=False).model
