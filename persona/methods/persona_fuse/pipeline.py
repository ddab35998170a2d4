"""The stages in their order: what each reads, writes and depends on.

stages/sft.jsonl                      where the data are bare queries: what the stage "synthesis" made of them
stages/warmup/   <pole>/               each expert, in PEFT's format
stages/router/   router.safetensors    encoder (where it is trained), head, expert vectors
                 routing.json          how often it is right, on which experts its gates lie
                 traces.jsonl          the gate of every dev query (of the training queries where there are none)
stages/joint/    experts/<pole>/, router.safetensors, routing.json, traces.jsonl
                 rejected.jsonl        objective dpo: what the LM itself says to each query
each             metrics.jsonl         as logged while training
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import load_file, save_file

from persona.data.base import People
from persona.data.situations import SituationsConfig, load
from persona.errors import UserError
from persona.evaluation.generation import fingerprint, generate, seed_of
from persona.evaluation.roles import Cast, Roles, identity
from persona.files import atomic_folder, write_json, write_lines
from persona.methods.persona_fuse import training
from persona.methods.persona_fuse.config import PersonaFuseConfig
from persona.methods.persona_fuse.data import Row, rows_of, targets_of
from persona.methods.persona_fuse.experts import Experts, read_experts, write_experts
from persona.methods.persona_fuse.mixture import Mixture
from persona.methods.persona_fuse.personalizer import EXPERTS, ROUTER, PersonaFuse, mixture
from persona.methods.persona_fuse.routing import collapse, report, trace
from persona.personalizer import LanguageModel
from persona.training.rows import room
from persona.training.stages import Stage
from persona.training.trainer import TrainerConfig
from persona.types import Sampling

logger = logging.getLogger(__name__)
STAGES = ("synthesis", "warmup", "router", "joint")


@dataclass
class Run:
    """One run of the method; each stage is a method of its name that takes the folder of all stages, but for
    `synthesis`: None where `people` are annotated."""

    config: PersonaFuseConfig
    under: LanguageModel
    people: People
    trainer: TrainerConfig
    processes: PartialState
    synthesis: Stage | None = None

    def __post_init__(self) -> None:
        if odd := [name for name in self.config.skip if name not in STAGES[1:]]:
            raise UserError(
                f"method.skip names {odd[0]}, which is no stage to leave out: there are {', '.join(STAGES[1:])}"
            )

    def stages(self) -> list[Stage]:
        c = self.config
        samples = [("train", one) for one in self.people.train] + [("dev", one) for one in self.people.dev]
        common = {
            "under": identity(self.under),
            "trainer": asdict(self.trainer),
            "data": None if self.synthesis else fingerprint([(f"{split}/{one.id}", one) for split, one in samples]),
            "max_length": c.max_length,
        }
        routed = {**common, "router": asdict(c.router), "tau": c.tau, "similarity": c.similarity}
        data = ["sft.jsonl"] if self.synthesis else []
        before = [name for name in ("warmup", "router") if name not in c.skip]
        made = [
            Stage("warmup", self.warmup, data, ("warmup",),
                  {**common, "lora": asdict(c.lora), "warmup": asdict(c.warmup)}),
            Stage("router", self.router, data, ("router",), {**routed, "routing": asdict(c.routing)}),
            Stage("joint", self.joint, [*data, *before], ("joint",),
                  {**routed, "lora": asdict(c.lora), "joint": asdict(c.joint), "skip": list(c.skip)}),
        ]  # fmt: skip
        made = [stage for stage in made if stage.name not in c.skip]
        return [self.synthesis, *made] if self.synthesis else made

    def rows(self, folder: Path, split: str, out: Path | None = None) -> list[Row]:
        people = load(SituationsConfig(path=str(folder / "sft.jsonl"))) if self.synthesis else self.people
        return rows_of(self.under, people.split(split), self.config.max_length, out)

    # ---- the stages ----------------------------------------------------------------------------------------------

    def warmup(self, folder: Path) -> None:
        work = folder / "work" / "warmup"
        experts = training.warm_up(self.under, self.rows(folder, "train", work), self.config, self.trainer, work)
        self._keep(work, folder / "warmup", experts=experts)

    def router(self, folder: Path) -> None:
        work = folder / "work" / "router"
        made = self._mixture(Experts.new(self.under.base, self.config.lora, self.trainer.seed))  # they play no part
        rows, dev = self.rows(folder, "train", work), self.rows(folder, "dev")
        training.train_router(self.under, made, rows, dev, self.config, self.trainer, work)
        self._keep(work, folder / "router", made, rows=rows, dev=dev)

    def joint(self, folder: Path) -> None:
        work = folder / "work" / "joint"
        made = self.before_joint(folder)
        rows, dev = self.rows(folder, "train", work), self.rows(folder, "dev")
        rejected = self._rejected(rows, work) if self.config.joint.objective == "dpo" else None
        training.train_joint(self.under, made, rows, dev, self.config, self.trainer, work, rejected)
        self._keep(work, folder / "joint", made, made.experts, rows, dev)

    def _rejected(self, rows: Sequence[Row], work: Path) -> dict[str, str]:
        """By row's id what the LM itself says; a row of which it says nothing else, or too much, has none."""
        c, base = self.config.joint, self.under.base

        async def say(row: Row, roles: Roles) -> dict[str, str]:
            seed = seed_of(self.trainer.seed, "rejected", row.id)
            sampling = Sampling(c.max_new_tokens, temperature=c.temperature, seed=seed)
            return {"rejected": (await roles.model.respond(replace(row.request, sampling=sampling))).text}

        found = generate(
            [(row.id, row) for row in rows],
            say,
            Cast(self.under),
            work / "rejected.jsonl",
            settings={"under": identity(self.under), **asdict(c), "seed": self.trainer.seed},
            batch_size=self.under.batch_size,
            processes=self.processes,
        )
        kept = {}
        for row, said in zip(rows, found, strict=True):
            reply = said["rejected"].strip()
            size = len(row.prompt) + len(base.render_reply(row.request.messages, reply))
            if reply and reply != row.target.strip() and size <= room(base, self.config.max_length):
                kept[row.id] = reply
        if len(kept) < len(rows):
            told = "what the LM itself says is empty, the response itself, or too long"
            logger.warning("%d of %d rows have no rejected reply (%s)", len(rows) - len(kept), len(rows), told)
        if not kept:
            raise UserError(f"no row is left to prefer: of all {len(rows)} {told}")
        return kept

    # ---- what stages share ---------------------------------------------------------------------------------------

    def _mixture(self, experts: Experts) -> Mixture:
        return mixture(self.config.router, self.under.base, experts, seed_of(self.trainer.seed, "router"))

    def before_joint(self, folder: Path) -> Mixture:
        """Experts and router as their own stages left them, or as they begin where a stage is left out."""
        base, skip = self.under.base, self.config.skip
        new = "warmup" in skip
        experts = (
            Experts.new(base, self.config.lora, self.trainer.seed) if new else read_experts(folder / "warmup", base)
        )
        made = self._mixture(experts)
        if "router" not in skip:
            made.router.restore(load_file(folder / "router" / ROUTER), folder / "router" / ROUTER)
        return made

    def result(self, folder: Path) -> PersonaFuse:
        """The personalizer that the last stage left."""
        made = self.before_joint(folder)
        if "joint" not in self.config.skip:
            made = self._mixture(read_experts(folder / "joint" / EXPERTS, self.under.base))
            made.router.restore(load_file(folder / "joint" / ROUTER), folder / "joint" / ROUTER)
        return PersonaFuse(self.under.base, made.requires_grad_(False), self.config.fold)

    def _keep(
        self,
        work: Path,
        folder: Path,
        routed: Mixture | None = None,
        experts: Experts | None = None,
        rows: Sequence[Row] = (),
        dev: Sequence[Row] = (),
    ) -> None:
        """Write what a stage made to `folder`, whole. Of several processes the first writes, the others wait."""
        if self.processes.is_main_process:
            with atomic_folder(folder) as temporary:
                if experts is not None:
                    write_experts(experts, temporary / EXPERTS if routed else temporary, self.under.base)
                if routed is not None:
                    save_file(routed.router.state(), temporary / ROUTER)
                    self._measure(routed, {"train": rows, "dev": dev}, temporary)
                for file in (work / name for name in ("metrics.jsonl", "dropped.jsonl", "rejected.jsonl")):
                    if file.is_file():
                        shutil.copyfile(file, temporary / file.name)
        self.processes.wait_for_everyone()

    def _measure(self, made: Mixture, splits: dict[str, Sequence[Row]], folder: Path) -> None:
        fuse, found = PersonaFuse(self.under.base, made), dict[str, Any]()
        for split, rows in splits.items():
            if not rows:
                continue
            traces = []
            for start in range(0, len(rows), 64):
                some = rows[start : start + 64]
                routing = fuse.route([row.request for row in some])
                gates, norms = routing.gates.mean(1).cpu(), routing.norm.mean(1).tolist()
                traces += [trace(*one) for one in zip([row.id for row in some], gates, norms, strict=True)]
            write_lines(folder / "traces.jsonl", traces)  # dev's in place of train's
            targets = targets_of([row.vector for row in rows], made.router.config.null_expert)
            found[split] = report(fuse.gate([row.request for row in rows]), targets, made.names)
            if said := collapse(found[split]):
                logger.warning("%s (%s split)", said, split)
        write_json(folder / "routing.json", found)
