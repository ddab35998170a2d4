"""Train a personalizer: `python train.py experiment=town_persona_plug`, `python train.py method=finetune_lora ...`.

Everything is in configs/; `plan=true` prints what a run would need without loading a weight.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

from persona.config import TrainConfig, entry, save_run_files

logger = logging.getLogger(__name__)
METHODS = {"persona_plug": "persona.methods.persona_plug", "finetune": "persona.methods.finetune"}


def train(cfg: TrainConfig) -> Path | None:
    """Base LM + people → a personalizer directory, `<output>/personalizer` (None for a plan). Raises UserError."""
    if cfg.plan:
        from persona.plan import plan

        plan(cfg).print()
        return None
    import torch
    from accelerate import PartialState

    import persona
    from persona import data, lm

    # Without `cpu` and without a GPU every process that torchrun starts would take itself for the only one.
    PartialState(cpu=cfg.trainer.cpu or not torch.cuda.is_available())
    out = Path(cfg.output)
    save_run_files(out, cfg)
    people = data.load(cfg.data)
    under = persona.load(lm.load(cfg.model), cfg.personalizers, cfg.model.batch_size)
    method = importlib.import_module(METHODS[cfg.method.name])
    folder = method.train(cfg.method, under, people, cfg.trainer, out)
    logger.warning("personalizer written to %s", folder)
    return folder


if __name__ == "__main__":
    entry(train, "train")
