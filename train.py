"""Train a personalizer: `python train.py experiment=town_persona_plug`, `python train.py method=finetune_lora ...`.

Everything is in configs/; `plan=true` prints what a run would need without loading a weight.
"""

from __future__ import annotations

import importlib
import logging
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from persona.config import TrainConfig, entry, run_state, save_run_files, start_processes
from persona.errors import UserError

logger = logging.getLogger(__name__)
METHODS = {
    "persona_fuse": "persona.methods.persona_fuse",
    "persona_plug": "persona.methods.persona_plug",
    "finetune": "persona.methods.finetune",
    "steering": "persona.methods.steering",
    "apc": "persona.methods.apc",
    "assistant_axis": "persona.methods.assistant_axis",
    "character": "persona.methods.character",
}


def train(cfg: TrainConfig) -> Path | None:
    """Base LM + people → a personalizer directory, `<output>/personalizer` (None for a plan). Raises UserError."""
    if cfg.plan:
        from persona.plan import plan

        plan(cfg).print()
        return None
    import persona
    from persona import data, lm

    start_processes(cfg.trainer.cpu)
    method = importlib.import_module(METHODS[cfg.method.name])
    stages = getattr(method, "STAGES", ())
    if cfg.stage is not None and cfg.stage not in stages:
        near = get_close_matches(cfg.stage, stages, n=1, cutoff=0.0)
        hint = f"; did you mean {near[0]}? It has {', '.join(stages)}" if near else "; it has no stages"
        raise UserError(f"stage={cfg.stage} is no stage of {cfg.method.name}{hint}")
    out = Path(cfg.output)
    save_run_files(out, cfg)
    with run_state(out):
        people = data.load(cfg.data)
        under = persona.load(lm.load(cfg.model), cfg.personalizers, cfg.model.batch_size)
        helped: dict[str, Any] = {}
        if stages:
            from persona import players

            helped = {"teacher": players.play(cfg.teacher, "teacher"), "judges": players.judges(cfg.judge)}
            helped["stage"] = cfg.stage
        folder = method.train(cfg.method, under, people, cfg.trainer, out, **helped)
    logger.warning("%s written to %s", "personalizer" if cfg.stage is None else f"stage {cfg.stage}", folder)
    return folder


if __name__ == "__main__":
    entry(train, "train")
