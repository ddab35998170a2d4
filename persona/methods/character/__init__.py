"""Open Character Training (arXiv 2511.01689): a constitution becomes a character.

    python train.py method=character data=constitution data.path=me.txt model.path=Qwen/Qwen2.5-7B-Instruct

Read pipeline.py for the stages in their order; the stages' files (expansion, distillation, loss, introspection, merge)
follow the paper.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from persona.data.base import People
from persona.data.constitution import from_people
from persona.errors import UserError
from persona.lm import BaseLM
from persona.methods.character.loss import character_loss
from persona.methods.character.merge import merge
from persona.methods.character.pipeline import STAGES, Character, CharacterConfig
from persona.methods.character.prompts import PromptSet
from persona.personalizer import LanguageModel, save
from persona.training.lora import LoRA
from persona.training.stages import run_stages
from persona.training.trainer import TrainerConfig

__all__ = ["STAGES", "CharacterConfig", "CharacterLoRA", "character_loss", "merge", "train"]


class CharacterLoRA(LoRA):
    """A character as one adapter in PEFT's own format: what the method leaves behind.

    `made` is of which constitution, and how the adapters were merged and how far that is from their exact sum; it
    stands in the manifest.
    """

    method = "character"

    def __init__(self, base: BaseLM, folder: Path, made: Mapping[str, Any]):
        super().__init__(base, folder)
        self.made = dict(made)

    def config(self) -> dict[str, Any]:
        return self.made

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> CharacterLoRA:
        return cls(base, folder / "adapter", config)


def train(
    config: CharacterConfig,
    under: LanguageModel,
    people: People,
    trainer: TrainerConfig,
    out: Path,
    *,
    teacher: Any = None,
    judges: Sequence[Any] = (),
    stage: str | None = None,
) -> Path:
    """Run the stages in `out/stages`, or `stage` alone, and write the personalizer to `out/personalizer` once there is
    a merged adapter. `teacher` is a local model or an endpoint, None the base LM itself; nobody judges here.

    Raises UserError for people who are no constitution, personalizers below, and whatever a stage raises.
    """
    if under.personalizers:
        raise UserError("a character is trained on the base LM itself: leave personalizers=[…] out")
    run = Character(
        config,
        from_people(people),
        under,
        under if teacher is None else teacher,
        trainer,
        PromptSet.open(config.prompts, config.assistant_name),
        PartialState(),
    )
    run_stages(run.stages(), out / "stages", only=stage, processes=run.processes)
    if stage not in (None, STAGES[-1]):
        return out / "stages"
    made = {"constitution": run.constitution.name, **json.loads((out / "stages" / "merge.json").read_text())}
    return save(CharacterLoRA(under.base, out / "stages" / "merged", made), under.base, out / "personalizer")
