"""Training: one trainer, one table of methods.

methods.py    from the name of a method to its rows and its loss
settings.py   every knob
run.py        train(): rows in, a model folder out
trainer.py    the trainer, on transformers.Trainer
adapters.py   LoRA
precision.py  bfloat16, and float32 where it matters
reference.py  log-probs of the reference, cached by content
guards.py     checks that training would be silently wrong
mismatch.py   KTO's mismatched trajectories
value.py      the value network of DRO-V, MTPO and RLHF
turns.py      turns of a batch, and what each was worth
online.py     train_online(): problems and a judge in, a model folder out
online_methods.py, online_settings.py, online_trainer.py   what the online methods have of their own
rounds.py, plays.py   sampling and judging the prompts of the next steps, journaled; the rows that come of it
optim.py      AdamW, Muon, schedules
memory.py     GPU memory that a run needs, told before it starts
metrics.py    what a step reports, and when it warns
card.py       the model card
hub.py        pushing to the Hugging Face hub
callbacks.py  progress bar, metrics files, checkpoints, held-out rows
reporters.py  TensorBoard, trackio, Weights & Biases
"""

from mtpo.training.methods import METHODS
from mtpo.training.run import TrainResult, train
from mtpo.training.settings import TrainingSettings

__all__ = ["METHODS", "TrainResult", "TrainingSettings", "train"]
