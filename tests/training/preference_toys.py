"""Pairs and conversations in the words of the tiny models' tokenizer, of very different lengths."""

from __future__ import annotations

from pathlib import Path

from persona.lm import BaseLM
from persona.training.lora import LoraSettings
from persona.training.preference import Pair, train_preferences
from persona.training.supervised import train_supervised
from persona.training.trainer import TrainerConfig
from persona.types import Message

QUESTIONS = (
    "good morning , how was your day ?",
    "what do you think of the red house by the river ?",
    "write one line",
    "the fox",
)
REPLIES = ("quick and brown", "i like small boats and long walks in the rain", "good", "the dog by the market", "no")
LORA = LoraSettings(r=2, lora_alpha=4)


def user(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def pair(number: int, **weights: float) -> Pair:
    """Of two replies the one that stands earlier in REPLIES is preferred."""
    better = number % 3
    return Pair(user(QUESTIONS[number % 4]), REPLIES[better], REPLIES[better + 1 + number % 2], **weights)


PAIRS = [pair(number) for number in range(12)]
DEV = [pair(number, chosen_weight=0.75, rejected_weight=0.25) for number in range(12, 16)]
TALK = (
    Message("system", "you are ada"),
    Message("user", "good morning"),
    Message("assistant", "how was your day ?"),
    Message("user", "good"),
    Message("assistant", "i like long walks"),
)
TALKS = [TALK, TALK[1:], TALK[:3], (*TALK, Message("user", "the fox"))] * 3


def settings(**changes) -> TrainerConfig:
    options = {"learning_rate": 1e-2, "warmup_ratio": 0.0, "scheduler": "constant", "max_steps": 6, "batch_size": 4}
    options |= {"log_every": 1, "save_every": 100, "eval_every": 6, "wandb": "disabled", "cpu": True}
    return TrainerConfig(**{**options, **changes})


def prefer(base: BaseLM, out: Path, pairs=PAIRS, dev=(), *, max_length=None, lora=LORA, below=(), **changes) -> Path:
    terms = {name: changes.pop(name, value) for name, value in (("beta", 0.1), ("nll_coef", 0.1), ("kl_coef", 0.01))}
    return train_preferences(
        base, pairs, dev, **terms, lora=lora, below=below, max_length=max_length, trainer=settings(**changes), out=out
    )


def supervise(base: BaseLM, out: Path, talks=TALKS, *, max_length=None, lora=LORA, below=(), **changes) -> Path:
    return train_supervised(
        base, talks, lora=lora, below=below, max_length=max_length, trainer=settings(**changes), out=out
    )
