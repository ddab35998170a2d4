"""The stages in their order: what each reads, writes and depends on.

constitution → expand → distill → dpo → introspect → sft → merge

stages/prompts.jsonl       expand      {"id", "prompt", "source"}: all prompts, every trait's first
stages/answers.jsonl       distill     teacher and student on each of them, `repeats` times
stages/pairs.jsonl                     … those that are trained on; dropped.jsonl has the others, with the reason
stages/dpo/                dpo         the distilled model: an adapter in PEFT's format, and how it was trained
stages/speech.jsonl        introspect  what it said about itself and with itself
stages/transcripts.jsonl               … as it is trained on
stages/sft/                sft         a second adapter over the first one
stages/merged/, merge.json merge       one adapter out of both, and how far it is from their sum
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from persona.data.constitution import Constitution
from persona.errors import UserError
from persona.evaluation.generation import generate, seed_of
from persona.evaluation.roles import Cast, Roles, identity
from persona.files import read_lines, sha256, write_json, write_lines
from persona.lm import adapters
from persona.methods.character import distillation, expansion, introspection
from persona.methods.character.distillation import DistillConfig
from persona.methods.character.expansion import ExpandConfig, extra_prompts
from persona.methods.character.introspection import IntrospectConfig
from persona.methods.character.merge import MODES, difference, merge
from persona.methods.character.prompts import PromptSet
from persona.methods.character.sampling import SamplingConfig
from persona.personalizer import LanguageModel
from persona.training.lora import WEIGHTS, LoRA, LoraSettings, keep
from persona.training.stages import Stage
from persona.training.trainer import TrainerConfig
from persona.types import Message

logger = logging.getLogger(__name__)
STAGES = ("expand", "distill", "dpo", "introspect", "sft", "merge")


@dataclass
class CharacterConfig:
    """Published values, except where docs/errata.md says so. `prompts`: the wording, english, town or a folder of
    one's own (prompts.py). `extra_prompts`: a file of prompts that belong to no trait (LIMA's, as published).
    `sft_max_length`: tokens of a transcript, beyond which its turns are left out. `compat: reference` builds the data
    as the published code does, defects and all. `merge`: linear (as published), cat (exact) or svd, with a weight each
    for the adapters of dpo and sft."""

    name: str = "character"
    assistant_name: str = "Sam"
    prompts: str = "english"
    extra_prompts: str | None = None
    compat: str | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    expand: ExpandConfig = field(default_factory=ExpandConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    introspect: IntrospectConfig = field(default_factory=IntrospectConfig)
    beta: float = 0.1
    nll_coef: float = 0.1
    kl_coef: float = 0.001
    sft_max_length: int = 3072
    lora: LoraSettings = field(default_factory=LoraSettings)
    merge: str = "cat"
    dpo_weight: float = 1.0
    sft_weight: float = 0.25


@dataclass
class Character:
    """One run: a constitution, a base LM and its teacher. Each method named after a stage is that stage."""

    config: CharacterConfig
    constitution: Constitution
    under: LanguageModel
    teacher: Any
    trainer: TrainerConfig
    prompts: PromptSet
    processes: PartialState

    def stages(self) -> list[Stage]:
        c, seed = self.config, self.trainer.seed
        traits = asdict(self.constitution)
        base, teacher = identity(self.under), identity(self.teacher)
        drawn = {"sampling": asdict(c.sampling), "seed": seed, "compat": c.compat}
        trained = {"base": base, "lora": asdict(c.lora), "trainer": asdict(self.trainer)}
        loss = {"beta": c.beta, "nll_coef": c.nll_coef, "kl_coef": c.kl_coef}
        merged = {"mode": c.merge, "weights": [c.dpo_weight, c.sft_weight]}
        extra = list(extra_prompts(c.extra_prompts)) if c.extra_prompts else []

        def stage(name: str, reads: tuple[str, ...], writes: tuple[str, ...], **settings: Any) -> Stage:
            return Stage(name, getattr(self, name), reads, writes, settings)

        return [
            stage("expand", (), ("prompts.jsonl",), constitution=traits, teacher=teacher, **drawn,
                  expand=asdict(c.expand), extra=extra, prompts=self.prompts.hash("expand.md")),
            stage("distill", ("prompts.jsonl",), ("answers.jsonl", "pairs.jsonl", "dropped.jsonl"), base=base,
                  constitution=traits, teacher=teacher, **drawn, distill=asdict(c.distill),
                  prompts=self.prompts.hash("teacher.md", "thinking.md")),
            stage("dpo", ("pairs.jsonl",), ("dpo",), **trained, **loss, max_length=c.distill.max_length),
            stage("introspect", ("dpo",), ("speech.jsonl", "transcripts.jsonl"), base=base, constitution=traits,
                  **drawn, introspect=asdict(c.introspect), prompts=self.prompts.hash(*introspection.FILES)),
            stage("sft", ("transcripts.jsonl", "dpo"), ("sft",), **trained, max_length=c.sft_max_length),
            stage("merge", ("dpo", "sft"), ("merged", "merge.json"), **merged),
        ]  # fmt: skip

    # ---- 1: prompts --------------------------------------------------------------------------------------------

    def expand(self, folder: Path) -> None:
        """The questions of every trait and more like them, then the extra prompts; none twice."""
        c, traits = self.config, self.constitution.traits
        rows = self._generate(
            folder / "expand.jsonl",
            [(str(number), trait) for number, trait in enumerate(traits, start=1)],
            lambda trait, roles: expansion.expand(trait, roles, self.prompts, c.expand, c.sampling, self.trainer.seed),
            Cast(self.teacher),
            {"teacher": identity(self.teacher), "prompts": self.prompts.hash("expand.md"), "expand": asdict(c.expand)},
        )
        found: dict[str, dict[str, str]] = {}
        for number, (trait, row) in enumerate(zip(traits, rows, strict=True), start=1):
            texts = row.get("prompts", trait.questions)
            if len(texts) < c.expand.per_trait:
                told = {"asked": row.get("tries", 0), **row.get("refused", {})}
                logger.warning("trait %d has %d prompts of %d (%s)", number, len(texts), c.expand.per_trait, told)
            for text in texts:
                found.setdefault(text, {"prompt": text, "source": f"trait {number}"})
        for text in extra_prompts(c.extra_prompts) if c.extra_prompts else ():
            found.setdefault(text, {"prompt": text, "source": "extra"})
        write_lines(folder / "prompts.jsonl", ({"id": str(n), **row} for n, row in enumerate(found.values(), start=1)))

    # ---- 2: pairs ----------------------------------------------------------------------------------------------

    def distill(self, folder: Path) -> None:
        """Teacher against student on every prompt. Raises UserError when no pair is left to train on."""
        c, traits = self.config, self.constitution.statements
        prompts = list(read_lines(folder / "prompts.jsonl"))
        asked = [(f"{row['id']}/{n}", {"name": f"{row['id']}/{n}", "prompt": row["prompt"]})
                 for n in range(c.distill.repeats) for row in prompts]  # fmt: skip
        for n in range(c.distill.second_turns):
            for row in prompts:
                name = f"{row['id']}/second {n}"
                first = random.Random(seed_of(self.trainer.seed, "first turn", name)).choice(prompts)["prompt"]
                asked.append((name, {"name": name, "prompt": row["prompt"], "first": first}))

        async def answer(item: Mapping[str, str], roles: Roles) -> Mapping[str, Any]:
            given = (self.prompts, traits, c.distill, c.sampling, self.trainer.seed, item["name"])
            return await distillation.distill(item["prompt"], roles, *given, item.get("first"))

        rows = self._generate(
            folder / "answers.jsonl",
            asked,
            answer,
            Cast(self.under, reference=self.teacher),
            {
                "base": identity(self.under),
                "teacher": identity(self.teacher),
                "prompts": self.prompts.hash("teacher.md", "thinking.md"),
                "distill": {"thinking": c.distill.thinking, "max_new_tokens": c.distill.max_new_tokens},
            },
        )
        kept, dropped = [], []
        for row in rows:
            why = row.get("reason") or distillation.refusal(row, self.under.base, c.distill.max_length, c.compat)
            if why:
                dropped.append({**row, "reason": why})
            else:
                kept.append(row)
        report_dropped("pairs", dropped, len(rows))
        if not kept:
            worst = Counter(row["reason"] for row in dropped).most_common(1)[0][0]
            raise UserError(
                f"no pair of answers is left to train on: all {len(rows)} were dropped, most because {worst} "
                f"({folder / 'answers.jsonl'} has them)"
            )
        write_lines(folder / "pairs.jsonl", kept)
        write_lines(folder / "dropped.jsonl", dropped)

    # ---- 3: the distilled model --------------------------------------------------------------------------------

    def dpo(self, folder: Path) -> None:
        from persona.training.preference import Pair, train_preferences  # TRL takes seconds to import

        c, work = self.config, folder / "work" / "dpo"
        pairs = [
            Pair(distillation.conversation(row), row["chosen"], row["rejected"])
            for row in read_lines(folder / "pairs.jsonl")
        ]
        train_preferences(
            self.under.base, pairs, (), beta=c.beta, nll_coef=c.nll_coef, kl_coef=c.kl_coef, lora=c.lora,
            max_length=c.distill.max_length, trainer=self.trainer, out=work,
        )  # fmt: skip
        keep(work, folder / "dpo")

    # ---- 4: what it says about itself --------------------------------------------------------------------------

    def introspect(self, folder: Path) -> None:
        """Reflections and interactions of the distilled model. Raises UserError when nothing can be trained on."""
        c, traits, base = self.config, self.constitution.statements, self.under.base
        distilled = LanguageModel(base, [LoRA(base, folder / "dpo")], self.under.batch_size)
        items = introspection.items(self.prompts, c.introspect, self.trainer.seed)
        rows = self._generate(
            folder / "speech.jsonl",
            [(name, {"name": name, **item}) for name, item in items],
            lambda item, roles: introspection.speak(
                item, roles, self.prompts, traits, c.introspect, c.sampling, self.trainer.seed, c.compat
            ),
            Cast(distilled),
            {
                "base": identity(self.under),
                "dpo": sha256(folder / "dpo" / WEIGHTS),
                "prompts": self.prompts.hash(*introspection.FILES),
                "introspect": asdict(c.introspect),
            },
        )
        kept, dropped = [], []
        for row in rows:
            messages = introspection.transcript(row, self.prompts, base, c.compat)
            if messages:
                kept.append({"id": row["id"], "messages": [asdict(message) for message in messages]})
            else:
                dropped.append({"id": row["id"], "reason": row.get("reason", "the first reply was cut off or empty")})
        report_dropped("transcripts", dropped, len(rows))
        if not kept:
            raise UserError(f"the distilled model said nothing to train on ({folder / 'speech.jsonl'} has all of it)")
        write_lines(folder / "transcripts.jsonl", kept)

    # ---- 5: what it learns from that ---------------------------------------------------------------------------

    def sft(self, folder: Path) -> None:
        from persona.training.supervised import train_supervised  # TRL takes seconds to import

        c, work = self.config, folder / "work" / "sft"
        rows = read_lines(folder / "transcripts.jsonl")
        conversations = [tuple(Message(**message) for message in row["messages"]) for row in rows]
        train_supervised(
            self.under.base, conversations, lora=c.lora, below=(folder / "dpo",), max_length=c.sft_max_length,
            trainer=self.trainer, out=work, last_only=c.compat == "reference",
        )  # fmt: skip
        keep(work, folder / "sft")

    # ---- 6: one adapter ----------------------------------------------------------------------------------------

    def merge(self, folder: Path) -> None:
        c = self.config
        parts, weights = (
            [adapters.load_adapter(folder / part) for part in ("dpo", "sft")],
            (c.dpo_weight, c.sft_weight),
        )
        whole = merge(parts, weights, c.merge)
        if self.processes.is_main_process:
            adapters.save(whole, folder / "merged", self.under.base.name)
            off = {mode: difference(merge(parts, weights, mode), parts, weights) for mode in MODES}
            made = {"mode": c.merge, "weights": list(weights), "difference": off[c.merge], "difference_by_mode": off}
            write_json(folder / "merge.json", made)
            logger.warning("merged (%s): %.2g of the exact sum of changes is off", c.merge, off[c.merge])

    # ---- what stages share -------------------------------------------------------------------------------------

    def _generate(self, path: Path, items: list, episode: Any, cast: Cast, settings: Mapping[str, Any]) -> list[dict]:
        drawn = {"sampling": asdict(self.config.sampling), "seed": self.trainer.seed, "compat": self.config.compat}
        settings = {**settings, **drawn, "traits": list(self.constitution.statements)}
        return generate(
            items, episode, cast, path, settings=settings, batch_size=self.under.batch_size, processes=self.processes
        )


def report_dropped(what: str, dropped: list[dict[str, Any]], of: int) -> None:
    """One line for the log: how many were left out, and why."""
    if dropped:
        reasons = Counter(row["reason"] for row in dropped).most_common()
        told = "; ".join(f"{n} × {reason}" for reason, n in reasons)
        logger.warning("%d of %d %s are left out (%s)", len(dropped), of, what, told)
