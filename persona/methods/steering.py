"""Activation steering: a constitution as one direction per layer, added to the residual stream of a frozen LM.

    python train.py data=constitution data.path=me.txt method=steering method.coefficient=0.7

The baseline of Open Character Training (reference/open_character_training.md 3.8): the same beginnings of replies are
read once with the constitution as system prompt and once without; the first principal component of the differences,
layer by layer, is what the constitution does to the LM (repeng's `pca_center`). Nothing is trained. The published
coefficients, 0.7 (Llama 3.1 8B), 4 (Qwen 2.5 7B) and 525 (Gemma 3 4B), are in the units of each LM's residual stream:
another LM needs its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona.data.base import People
from persona.errors import UserError
from persona.files import write_json
from persona.lm import BaseLM
from persona.lm.edits import Edit, edited
from persona.lm.residual import Site, blocks, last_states
from persona.methods.statements import SHIPPED, Constitution, ConstitutionConfig, prompt_file
from persona.personalizer import LanguageModel, Personalizer, save
from persona.training.trainer import TrainerConfig
from persona.types import Message, Persona, Request

LAYERS = (0.125, 0.875)  # of the LM's depth: from the first inclusive to the second exclusive


@dataclass
class SteeringConfig:
    """`coefficient`: how much of the unit directions is added. `prompts`: "english", "town", or a folder with
    constitution.md, steering_question.md (what the user says) and steering_beginnings.txt (one beginning of a reply a
    line; no beginning at all is always one of them)."""

    name: str = "steering"
    coefficient: float = 1.0
    prompts: str = "english"


class Direction(NamedTuple):
    """`vector` [hidden], of length 1; `explained`: its share of the differences' variance, 0 to 1; `agreed`: the share
    of pairs that lie further along it with the constitution than without."""

    vector: np.ndarray
    explained: float
    agreed: float


def direction(told: np.ndarray, untold: np.ndarray) -> Direction:
    """The first principal component of pairs centred each on its own middle; told, untold [pairs, hidden].

    It points to where the majority of told states lies. Raises UserError where no pair differs.
    """
    from sklearn.decomposition import PCA  # takes a second to import

    middle = (told + untold) / 2
    centred = np.concatenate([told - middle, untold - middle]).astype(np.float64)
    if not centred.any():
        raise UserError("the constitution changes nothing in the LM's states: there is no direction to steer along")
    found = PCA(n_components=1, svd_solver="full").fit(centred)
    vector = found.components_[0]
    along, against = (told @ vector > untold @ vector).mean(), (told @ vector < untold @ vector).mean()
    if against > along:
        vector, along = -vector, against
    return Direction(vector.astype(np.float32), float(found.explained_variance_ratio_[0]), float(along))


def steered_layers(count: int) -> range:
    """The layers that are steered in an LM of `count`: int(.125 n) to int(.875 n) - 1. Raises UserError for none."""
    layers = range(*(int(share * count) for share in LAYERS))
    if not layers:
        raise UserError(f"steering changes layers in the middle of an LM, but this one has {count} only")
    return layers


def beginnings(prompts: str) -> list[str]:
    """The different lines of steering_beginnings.txt. Raises UserError when it cannot be read."""
    path = SHIPPED.get(prompts, Path(prompts)) / "steering_beginnings.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, one beginning of a reply a line, could not be read: {error}") from error
    return [line for line in dict.fromkeys(lines) if line.strip()]


def contrast(
    under: LanguageModel, persona: Persona, prompts: str, layers: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """States [beginnings, layers, hidden] with the constitution as system prompt and without it.

    Each is the state at the last token of a beginning of a reply. Raises UserError for a persona without traits.
    """
    system = Constitution(ConstitutionConfig(prompts)).text(persona)
    if not system:
        raise UserError(
            f"{persona.id} has no traits: steering needs a constitution, say data=constitution data.path=…"
        )
    (question,) = prompt_file(prompts, "steering_question").messages()
    user = Message("user", question.content)
    begun = [[], *(under.base.encode_option(line) for line in beginnings(prompts))]
    requests = [Request(messages) for messages in ((Message("system", system), user), (user,)) for _ in begun]
    replies = begun * 2
    states = last_states(
        under.base,
        under.rows(requests, [len(reply) for reply in replies]),
        replies,
        [Site(layer) for layer in layers],
        lambda indices: under.edit([requests[i] for i in indices]),
        under.batch_size,
    ).numpy()
    return states[: len(begun)], states[len(begun) :]


def train(config: SteeringConfig, under: LanguageModel, people: People, trainer: TrainerConfig, out: Path) -> Path:
    """Write the personalizer to `out/personalizer`, and how clear each layer's direction is to `out/steering.json`.

    Raises UserError unless `people` are one persona with traits, and as `contrast` and `direction` do.
    """
    personas = {sample.persona.id: sample.persona for sample in people.train if sample.persona is not None}
    if len(personas) != 1:
        raise UserError(f"steering takes one constitution, but the data have {len(personas)} personas to train on")
    (persona,) = personas.values()
    layers = list(steered_layers(len(blocks(under.base.model))))
    told, untold = contrast(under, persona, config.prompts, layers)
    found = [direction(told[:, i], untold[:, i]) for i in range(len(layers))]
    if PartialState().is_main_process:
        table = [
            {"layer": layer, "explained": d.explained, "agreed": d.agreed}
            for layer, d in zip(layers, found, strict=True)
        ]
        write_json(out / "steering.json", {"pairs": len(told), "layers": table})
    directions = torch.from_numpy(np.stack([d.vector for d in found]))
    steering = Steering(under.base, layers, directions, config.coefficient)
    return save(steering, under.base, out / "personalizer", under.personalizers)


class Steering(Personalizer):
    """`coefficient` times a layer's direction [layers, hidden] at every position of every request."""

    method = "steering"

    def __init__(self, base: BaseLM, layers: Sequence[int], directions: Tensor, coefficient: float) -> None:
        self.base, self.layers, self.directions, self.coefficient = base, list(layers), directions, coefficient

    def modules(self, requests: Sequence[Request]) -> AbstractContextManager[Any]:
        places = zip(self.layers, self.directions, strict=True)
        return edited(self.base.model, [Edit(Site(n), "add", along, self.coefficient) for n, along in places])

    def config(self) -> dict[str, Any]:
        return {"coefficient": self.coefficient, "layers": self.layers}

    def write(self, folder: Path) -> None:
        save_file({"directions": self.directions.contiguous()}, folder / "steering.safetensors")

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> Steering:
        directions = load_file(folder / "steering.safetensors")["directions"]
        return cls(base, config["layers"], directions, config["coefficient"])
