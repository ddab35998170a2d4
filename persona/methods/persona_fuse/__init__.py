"""PersonaFuse: ten pole adapters and a router that reads the situation (arXiv 2509.07370).

    python train.py method=persona_fuse data=situations data.path=sft.jsonl model.path=meta-llama/Llama-3.1-8B-Instruct

The paper's code is not public and its text was not readable to us. From its abstract and secondary sources: a frozen
LM carries ten LoRA experts, one for each pole of the Big Five; a persona encoder (Qwen2.5-0.5B) maps the query to a
persona embedding and a distribution over the experts, whose weighted sum is applied; two losses on the router,
contrastive to the experts a query should activate and consistent between queries that need the same traits; three
stages, warm-up of each expert, router, both together. A reconstruction of ours: everything else, that is the form of
the losses, the null expert, gate KL and load balance, the objective of the third stage (one source hints at
reinforcement learning there), and every number. docs/persona_fuse.md has the list.

Read pipeline.py for the stages in their order; then synthesis, experts, router, mixture, losses, data, training,
personalizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from persona.data.base import People
from persona.data.situations import annotated
from persona.errors import UserError
from persona.methods.persona_fuse.config import PersonaFuseConfig
from persona.methods.persona_fuse.losses import contrastive_loss
from persona.methods.persona_fuse.personalizer import PersonaFuse
from persona.methods.persona_fuse.pipeline import STAGES, Run
from persona.methods.persona_fuse.synthesis import stage as synthesis
from persona.personalizer import LanguageModel, save
from persona.training.stages import run_stages
from persona.training.trainer import TrainerConfig

__all__ = ["STAGES", "PersonaFuse", "PersonaFuseConfig", "contrastive_loss", "train"]


def train(
    config: PersonaFuseConfig,
    under: LanguageModel,
    people: People,
    trainer: TrainerConfig,
    out: Path,
    *,
    teacher: Any = None,
    judges: Sequence[Any] = (),
    stage: str | None = None,
) -> Path:
    """Run the stages in `out/stages`, or `stage` alone, and write the personalizer to `out/personalizer` once all are
    done. Where the data are bare queries, `teacher` (None: the model below) answers them first and `judges` (none: the
    teacher) check the answers. Learning rates, epochs and batch sizes are the stages' own; everything else is the
    trainer's.

    Raises UserError for an empty training split, samples that do not say what they call for, a pole without samples,
    an encoder-decoder base LM, and whatever a stage raises; a stage that was stopped goes on at the next start.
    """
    if not len(people.train):
        raise UserError("there is nothing to train on: the training split is empty")
    first, processes, folder = people.train[0], PartialState(), Path(out) / "stages"
    made = None
    if not first.target and not annotated(first):  # a pool of queries
        who = under if teacher is None else teacher
        made = synthesis(
            people.train, who, judges, config.synthesis, trainer.seed, under.batch_size, processes=processes
        )
    run = Run(config, under, people, trainer, processes, made)
    stages = run.stages()
    run_stages(stages, folder, only=stage, processes=run.processes)
    if stage is not None and stage != stages[-1].name:
        return folder
    return save(run.result(folder), under.base, Path(out) / "personalizer", under.personalizers)
