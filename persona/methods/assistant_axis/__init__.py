"""The Assistant Axis (Lu et al., arXiv 2601.10387): how much a chat LM is its assistant, and a cap that keeps it so.

    python train.py experiment=town_assistant_axis
    python evaluate.py personalizers=[outputs/town_assistant_axis/personalizer] benchmark=town_tasks

Read on as the paper does; pipeline.py has the stages in their order:

rollouts.py     roles and the plain assistant are asked the same questions
judging.py      is a reply in its role?
extraction.py   mean activations, summed by role and score as they come
axis.py         vectors of roles, the axis of every layer, persona space, and how sure the direction is
report.py       all of that in one file of numbers
calibration.py  where a cap lies: floors from projections of rollouts, bands of layers, the Pareto front
interchange.py  published files and other programs' files, read and written
search.py       which of them: what each prevents and costs on held-out roles
personalizer.py a cap, or a push along the axis, that stacks
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import Tensor

from persona.data.base import People
from persona.errors import UserError
from persona.lm.edits import add, cap
from persona.methods.assistant_axis.axis import compute_axis
from persona.methods.assistant_axis.config import AssistantAxisConfig
from persona.methods.assistant_axis.personalizer import AssistantAxis
from persona.methods.assistant_axis.pipeline import PER_ROLE, STAGES, Axis, part_of
from persona.metrics.projection import project
from persona.personalizer import LanguageModel, save
from persona.training.stages import run_stages
from persona.training.trainer import TrainerConfig

__all__ = ["STAGES", "AssistantAxis", "AssistantAxisConfig", "cap", "compute_axis", "project", "steer", "train"]


def train(
    config: AssistantAxisConfig,
    under: LanguageModel,
    people: People,
    trainer: TrainerConfig,
    out: Path,
    *,
    teacher: Any = None,
    judges: Sequence[Any] = (),
    stage: str | None = None,
) -> Path:
    """Run the stages in `out/stages`, or `stage` alone, and write the cap to `out/personalizer`.

    `teacher` is a server that runs the same LM and makes the rollouts; None: the LM itself. What it says is read from
    `under`, whose stack stays below the cap. With `config.part` only that part's roles go through their stages.
    Raises UserError for data that are not roles, an encoder-decoder LM, a stage without parts, and whatever a stage
    raises.
    """
    if under.base.is_encoder_decoder:
        raise UserError(f"the Assistant Axis is that of a chat LM, but {under.base.name} is an encoder-decoder LM")
    if config.part is not None and stage not in (None, *PER_ROLE):
        raise UserError(
            f"stage={stage} looks at all roles at once: leave method.part out ({', '.join(PER_ROLE)} have parts)"
        )
    out = Path(out)
    run = Axis(config, people, under, teacher, judges, trainer, PartialState())
    stages = run.stages()
    if config.part is not None:
        # Projecting waits for the axis, which waits for all parts. One stage alone may be cut into other parts.
        stages = stages[:-1] if stage is None else [one for one in stages if one.name == part_of(stage, config.part)]
    only = stage if config.part is None else None
    run_stages(stages, out / "stages", only=only, processes=run.processes)
    if config.part is not None or stage not in (None, STAGES[-1]):
        return out / "stages"
    folder = out / "stages" / "cap"
    made = AssistantAxis.load(folder, json.loads((folder / "cap.json").read_text()), under.base)
    return save(made, under.base, out / "personalizer", under.personalizers)


def steer(hidden: Tensor, axis: Tensor, alpha: float, mean_norm: float) -> Tensor:
    """hidden [..., H] + alpha · mean_norm · axis / |axis| [H]: the paper's steering (reference/assistant_axis 3.5).

    `mean_norm` is the mean norm of the layer's states on ordinary text, so that `alpha` means the same in every model;
    below zero it leads away from the assistant. The state keeps its dtype.
    """
    return add(hidden, axis, alpha, mean_norm)
