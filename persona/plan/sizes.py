"""How much data a run would see: read from the data itself, or from the counts that a paper published."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from persona import data
from persona.config.schemas import TrainConfig
from persona.errors import UserError
from persona.lm.load import resolve
from persona.methods.finetune import FinetuneConfig, profile_pairs
from persona.methods.persona_plug import PersonaPlugConfig


@dataclass(frozen=True)
class DataSize:
    """Samples of one epoch (augmented copies included), tokens of prompt and reply (mean, and longest in a batch),
    items in a history (mean, longest); `source` says where the numbers are from."""

    samples: int
    prompt_mean: float
    prompt_longest: int
    reply_mean: float
    reply_longest: int
    history_mean: float
    history_longest: int
    users: int
    source: str


# PPlug paper, table 6 (LaMP, time-based): train and dev samples, input length, output length and its standard
# deviation, history length and its standard deviation. Labels of tasks 1 to 3 are a few tokens.
PUBLISHED: dict[str, tuple[int, int, float, float, float, float, float]] = {
    "LaMP_1": (6542, 1500, 51.43, 4.0, 0.0, 84.15, 47.54),
    "LaMP_2": (5073, 1410, 92.39, 4.0, 0.0, 86.76, 189.52),
    "LaMP_3": (20000, 2500, 128.18, 2.0, 0.0, 185.40, 129.30),
    "LaMP_4": (12500, 1500, 29.97, 10.07, 3.10, 204.59, 250.75),
    "LaMP_5": (14682, 1500, 162.34, 9.71, 3.21, 87.88, 53.63),
    "LaMP_7": (13437, 1498, 29.72, 16.96, 5.67, 15.71, 14.85),
}
SAMPLED = 256  # samples that are tokenised for the means


def data_size(cfg: TrainConfig) -> DataSize:
    """From the data that `cfg.data` names; for LaMP without a path, from the published counts of `data.task`.

    Raises UserError where neither is given, and as the reader does.
    """
    if cfg.data.name == "lamp" and cfg.data.path is None:
        return _published(cfg)
    people = data.load(cfg.data)
    method = cfg.method
    if isinstance(method, FinetuneConfig) and method.mode == "user_lora":
        triples, users = profile_pairs(people.split(method.split))
        texts = [(request.messages[-1].content, reply) for request, reply, _ in _spread(triples)]
        return _measured(cfg, texts, len(triples), np.zeros(1), len(users))
    lengths = np.array([len(sample.persona.history) if sample.persona else 0 for sample in people.train])
    texts = [("\n".join(m.content for m in s.messages), s.target) for s in _spread(people.train)]
    count = len(lengths)
    if isinstance(method, PersonaPlugConfig):
        lengths = np.minimum(lengths, method.history_limit)
        count = int(np.where(lengths > 2, method.augment_copies + 1, 1).sum())
    people_count = len({sample.persona.id for sample in people.train if sample.persona})
    return _measured(cfg, texts, count, lengths, people_count)


def _spread(samples: Any) -> list[Any]:
    step = max(1, len(samples) // SAMPLED)
    return [samples[i] for i in range(0, len(samples), step)]


def _measured(
    cfg: TrainConfig, texts: list[tuple[str, str]], samples: int, history: np.ndarray, users: int
) -> DataSize:
    if not texts:
        raise UserError("there is nothing to plan for: the training split is empty")
    count, around, how = _counter(cfg)
    prompts = np.minimum([count(prompt) + around for prompt, _ in texts], cfg.method.max_input_length)
    replies = np.array([count(reply) + 1 for _, reply in texts])
    source = f"{cfg.data.name} data as configured; tokens {how} on {len(texts)} samples, prompts without personalizers"
    return DataSize(
        samples,
        float(prompts.mean()),
        int(prompts.max()),
        float(replies.mean()),
        int(replies.max()),
        float(history.mean()),
        int(history.max()),
        users,
        source,
    )


def _counter(cfg: TrainConfig) -> tuple[Callable[[str], int], int, str]:
    """How to count a text, tokens that the chat template puts around a message, and what to say about it."""
    path = resolve(cfg.model.path)
    try:
        # A tokenizer is no weight; still nothing is fetched for a plan.
        tokenizer = AutoTokenizer.from_pretrained(path, revision=cfg.model.revision, local_files_only=True)
    except (OSError, ValueError):
        return lambda text: math.ceil(1.3 * len(text.split())), 0, "taken as 1.3 per word"

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    around = 0
    if tokenizer.chat_template is not None:
        message = {"role": "user", "content": "x"}
        told = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        around = len(tokenizer(told, add_special_tokens=False)["input_ids"]) - count("x")
    return count, around, "counted"


def _published(cfg: TrainConfig) -> DataSize:
    task = data.task(cfg.data.task).name if cfg.data.task else ""
    if task not in PUBLISHED:
        raise UserError(f"a plan for data=lamp needs data.path, or data.task out of {', '.join(PUBLISHED)}")
    train, dev, prompt, reply, reply_sd, history, history_sd = PUBLISHED[task]
    method = cfg.method
    samples, users, longest = train, train, 0
    if isinstance(method, PersonaPlugConfig):
        samples = train * (method.augment_copies + 1)
        longest = min(method.history_limit, math.ceil(history + 3 * history_sd))
    elif method.mode == "user_lora":
        samples, users = round(dev * history), dev
    return DataSize(
        samples,
        min(prompt, method.max_input_length),
        method.max_input_length,
        reply + 1,
        math.ceil(reply + 3 * reply_sd) + 1,
        history,
        longest,
        users,
        f"{task} time-based, PPlug paper table 6 (lengths as published; longest = mean + 3 standard deviations)",
    )
