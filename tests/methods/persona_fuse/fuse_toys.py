"""Tiny situations and settings: what the tests of PersonaFuse share."""

from __future__ import annotations

import json
from itertools import product

import torch

from persona.data.base import People
from persona.data.situations import POLES
from persona.lm import BaseLM
from persona.methods.persona_fuse.config import (
    JointConfig,
    PersonaFuseConfig,
    RouterConfig,
    RouterStageConfig,
    WarmupConfig,
)
from persona.methods.persona_fuse.experts import Experts
from persona.methods.persona_fuse.mixture import Mixture
from persona.methods.persona_fuse.personalizer import mixture
from persona.training.lora import LoraSettings
from persona.training.trainer import TrainerConfig
from persona.types import Message, Request, Sample

WORDS = "fox dog house river boats walks rain day market line".split()  # one for each pole
QUERIES = ("the fox", "what do you think of the red house by the river ?", "good morning", "write one short line")


def vector(*poles: str) -> list[float]:
    return [float(pole in poles) for pole in POLES]


def sample(id: str, text: str, reply: str, *poles: str) -> Sample:
    notes = {"expert_vector": json.dumps(vector(*poles)), "traits": "{}", "source": "toy"}
    return Sample(id, (Message("user", text),), reply, metadata=notes)


def toy_people(train: int = 4, dev: int = 1, leave_out: str = "") -> People:
    """Situations with a word for each pole that they call for, and the reply repeats it; neutral ones in between."""

    def some(count: int, split: str) -> tuple[Sample, ...]:
        found = []
        for number, (pole, word) in product(range(count), zip(POLES, WORDS, strict=True)):
            if pole != leave_out:
                found.append(
                    sample(f"{split}/{pole}/{number}", f"the {word} {'of ' * number}?", f"i like {word}", pole)
                )
        found += [sample(f"{split}/neutral/{n}", f"good {'morning ' * (n + 1)}", "good day") for n in range(2 * count)]
        return tuple(found)

    return People("toy", {}, some(train, "train"), some(dev, "dev"))


def config(base: BaseLM, **changes) -> PersonaFuseConfig:
    """Small experts; the encoder is the base LM's own weights."""
    router = RouterConfig(path=base.name, hidden=16, dim=8, **changes.pop("router", {}))
    settings = {
        "lora": LoraSettings(r=2, lora_alpha=4, lora_dropout=0.0),
        "router": router,
        "warmup": WarmupConfig(learning_rate=1e-2, epochs=2, batch_size=2),
        # 24 pairs of rows; on two processes the last batches are of 7 and 3 pairs here, of 4 and none below
        "routing": RouterStageConfig(learning_rate=1e-2, encoder_learning_rate=1e-3, epochs=2, batch_size=28),
        "joint": JointConfig(learning_rate=1e-3, epochs=2, batch_size=20),
    }
    return PersonaFuseConfig(**{**settings, **changes})


def trainer(**changes) -> TrainerConfig:
    settings = {"batch_size": 6, "log_every": 1, "eval_every": 100, "save_every": 100}
    return TrainerConfig(**{**settings, "wandb": "disabled", "cpu": True, **changes})


def trained_looking(base: BaseLM, seed: int = 1, **router) -> Mixture:
    """A mixture of experts that do change something, and a router whose gates are not flat."""
    made = config(base, router=router)
    experts = Experts.new(base, LoraSettings(r=2, lora_alpha=4, target_modules=r".*(proj|dense.*|query.*)"), seed)
    generator = torch.Generator().manual_seed(seed)
    for up in experts.up:
        up.data = torch.randn(up.shape, generator=generator) / 4
    found = mixture(made.router, base, experts, seed)
    if made.router.granularity == "token":
        found.router.token.data = torch.randn(found.router.token.shape, generator=generator)
    return found.requires_grad_(False).eval()


def requests(*texts: str) -> list[Request]:
    return [Request((Message("user", text),)) for text in texts]
