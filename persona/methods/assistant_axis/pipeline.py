"""The stages in their order: what each reads, writes and depends on.

rollouts → judge → extract → axis → project → calibrate → cap

stages/rollouts/    rollouts    roles/<role>.jsonl, traits/<trait>.jsonl: who was asked what, and the replies
stages/verdicts/    judge       the same names: how far each reply is in its role
stages/sums/        extract     <role>.safetensors: sums of mean activations by score and half of the questions
stages/axis/        axis        axis.safetensors, vectors.safetensors, axis.json (how sure the direction is)
stages/projections/ project     <role>.safetensors: each rollout's projection onto the axis, [rollouts, layers]
stages/calibration/ calibrate   axis.safetensors with percentiles, calibration.json (where the cap lies, and why)
stages/cap/         cap         what the personalizer is loaded from

The first three and `project` go role by role, and every draw has a name of its own: so any number of processes, and
any number of tasks of an array (`method.part=3/16`), leave the same. A run without a part goes on from their files.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.numpy import load_file, save_file

from persona.data.base import People
from persona.errors import UserError
from persona.evaluation.generation import fingerprint, generate
from persona.evaluation.roles import Cast, Roles, identity
from persona.files import atomic_folder, read_lines, write_json
from persona.lm.residual import mean_norms
from persona.methods.assistant_axis import calibration, judging, report, rollouts
from persona.methods.assistant_axis.config import AssistantAxisConfig
from persona.methods.assistant_axis.extraction import RoleSums, conversations, groups, layers, read, save, save_sums
from persona.methods.assistant_axis.personalizer import FILE, AssistantAxis, band_of, settings_of
from persona.methods.assistant_axis.rollouts import DEFAULT, TRAIT
from persona.methods.assistant_axis.search import choose, nats_per_token, search, take_over
from persona.personalizer import LanguageModel
from persona.training.stages import Stage
from persona.training.trainer import TrainerConfig
from persona.types import Sample

logger = logging.getLogger(__name__)
STAGES = ("rollouts", "judge", "extract", "axis", "project", "calibrate", "cap")
PER_ROLE = ("rollouts", "judge", "extract", "project")
FILES = {"rollouts": "jsonl", "verdicts": "jsonl", "sums": "safetensors", "projections": "safetensors"}
PLAIN = f"roles/{DEFAULT}"
NORMED = 256  # rollouts of the plain assistant that give a layer's mean norm


@dataclass
class Axis:
    """One run: roles, an LM, who plays them (the LM itself, or a server that has it) and a judge."""

    config: AssistantAxisConfig
    people: People
    under: LanguageModel
    teacher: Any  # None: the LM itself
    judges: Sequence[Any]
    trainer: TrainerConfig
    processes: PartialState

    @cached_property
    def places(self) -> dict[str, list[int]]:
        return rollouts.by_role(self.people.train)

    @cached_property
    def names(self) -> list[str]:
        """The roles of this run's part."""
        return rollouts.share(list(self.places), self.config.part)

    def samples(self, name: str) -> list[Sample]:
        return [self.people.train[place] for place in self.places[name]]

    def kind(self, name: str) -> str:
        return self.people.train[self.places[name][0]].metadata["kind"]

    # ---- the stages and what each depends on ---------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        c, part = self.config, self.config.part
        asked = fingerprint([(name, self.samples(name)) for name in self.names])
        player = identity(self.teacher or self.under)
        drawn = {"roles": asked, "player": player, "sampling": self._sampling(), "seed": self.trainer.seed}
        read = {"under": identity(self.under), "read": c.read}
        judged = {"judge": [identity(one) for one in self.judges], "compat": c.compat, "prompts": self._prompts()}

        def stage(name: str, run: Any, reads: Sequence[str], writes: Sequence[str], **settings: Any) -> Stage:
            if part is None:
                return Stage(name, run, reads, writes, settings)
            # One task of an array: its own record, and no file but its own roles'.
            return Stage(part_of(name, part), run, self._own(reads), self._own(writes), settings)

        per_role = [
            stage("rollouts", self.roll_out, (), ("rollouts",), **drawn),
            stage("judge", self.judge, ("rollouts",), ("verdicts",), **judged),
            stage("extract", self.extract, ("rollouts", "verdicts"), ("sums",), **read),
        ]
        projected = stage("project", self.project, ("rollouts", "axis"), ("projections",), **read)
        if part is not None:
            return [*per_role, projected]
        tried = {"calibration": asdict(c.calibration), "layers": self._depth()}
        if c.calibration.widths:
            tried |= {
                **read,
                **judged,
                "sampling": self._sampling(),
                "dev": fingerprint([("dev", list(self.people.dev))]),
            }
        settings = {"min_count": c.min_count, "layer": c.layer, "seed": self.trainer.seed}
        return [
            *per_role,
            Stage("axis", self.make_axis, ("sums", "rollouts"), ("axis",), {**read, **settings}),
            projected,
            Stage("calibrate", self.calibrate, ("axis", "projections"), ("calibration",), tried),
            Stage("cap", self.cap, ("axis", "calibration"), ("cap",), {}),
        ]  # fmt: skip

    def _own(self, paths: Sequence[str]) -> list[str]:
        """Of folders with a file for each role those of this part's roles."""
        own = {path: [f"{path}/{name}.{FILES[path]}" for name in self.names] for path in paths if path in FILES}
        return [file for path in paths for file in own.get(path, [path])]

    def _sampling(self) -> dict[str, Any]:
        c = self.config
        return {"temperature": c.temperature, "top_p": c.top_p, "max_new_tokens": c.max_new_tokens}

    def _prompts(self) -> list[str]:
        return [judging.rubric(kind, "{question}{answer}", self.config.compat).prompt.hash for kind in ("role", TRAIT)]

    def _depth(self) -> int:
        return len(layers(self.under))

    # ---- role by role --------------------------------------------------------------------------------------------

    def roll_out(self, folder: Path) -> None:
        if self.teacher is None:
            rollouts.check_template(self.under.base, [s for name in self.names for s in self.samples(name)])
        player = self.teacher or self.under
        settings = {"player": identity(player), "sampling": self._sampling(), "seed": self.trainer.seed}
        episode = partial(rollouts.roll_out, config=self.config, seed=self.trainer.seed)
        for name in self.names:
            self._generate(
                folder / "rollouts", name, [(s.id, s) for s in self.samples(name)], episode, Cast(player), settings
            )

    def judge(self, folder: Path) -> None:
        """Raises UserError unless there is one judge. Verdicts that cannot be read are listed in the files, counted in
        the log, and asked for again when the stage runs again; their rollouts are in no role's vector."""
        c, judges = self.config, judging.one_judge(self.judges)
        unread = Counter[str]()
        for name in self.names:
            kind, persona = self.kind(name), self.samples(name)[0].persona
            assert persona is not None
            rows = [] if kind == DEFAULT else [row for row in self._rows(folder, name) if "reason" not in row]
            asked = judging.rubric(kind, persona.attributes.get("eval_prompt", ""), c.compat)
            episode = partial(judging.judge, name=persona.id, description=persona.description, asked=asked)
            settings = {"judge": [identity(one) for one in judges], "prompt": asked.prompt.hash}
            cast = Cast(self.under, judges=judges)
            verdicts = self._generate(
                folder / "verdicts", name, [(row["id"], row) for row in rows], episode, cast, settings
            )
            unread[name] = sum("reason" in verdict for verdict in verdicts)
        if unread.total():
            worst = ", ".join(f"{name} {n}" for name, n in unread.most_common(3) if n)
            logger.warning(
                "%d rollouts have no readable verdict and count for no role (most: %s)", unread.total(), worst
            )

    def extract(self, folder: Path) -> None:
        """Sums over rollouts of mean activations, [layers, hidden], by score and half of the questions."""
        for name in self.names:
            verdicts = {row["id"]: row for row in read_lines(folder / "verdicts" / f"{name}.jsonl")}
            scored = [row | {key: verdicts[row["id"]][key] for key in ("score",) if key in verdicts.get(row["id"], ())}
                      for row in self._rows(folder, name)]  # fmt: skip
            counted = groups(self.kind(name), scored)
            rows = [row for row in scored if row["id"] in counted]
            found = read(self.under, rows, [counted[row["id"]] for row in rows], self.config.read)
            if self.processes.is_main_process:
                save_sums(folder / "sums" / f"{name}.safetensors", found, self.under)

    def project(self, folder: Path) -> None:
        """Every rollout's mean activation on the axis, in a second pass, for the first could not know the axis."""
        axis = load_file(folder / "axis" / FILE)["axis"]
        for name in self.names:
            rows = self._rows(folder, name)
            found = read(self.under, rows, [name] * len(rows), self.config.read, axis).projections
            values = np.array([found[place].numpy() for place in sorted(found)], dtype=np.float32).reshape(
                -1, len(axis)
            )
            if self.processes.is_main_process:
                save(folder / "projections" / f"{name}.safetensors", {"projections": values})

    def _generate(self, folder: Path, name: str, items: list, episode: Any, cast: Cast, settings: dict) -> list[dict]:
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = self.under.batch_size
        return generate(items, episode, cast, path, settings=settings, batch_size=size, processes=self.processes,
                        title=f"{folder.name} {name}")  # fmt: skip

    def _rows(self, folder: Path, name: str) -> list[dict[str, Any]]:
        """A role's rollouts that have a reply with any text."""
        return [row for row in read_lines(folder / "rollouts" / f"{name}.jsonl") if row.get("reply", "").strip()]

    # ---- the axis ------------------------------------------------------------------------------------------------

    def make_axis(self, folder: Path) -> None:
        """Raises UserError as `report.make` does."""
        if not self.processes.is_main_process:
            return
        c = self.config
        sums = {name: RoleSums.load(folder / "sums" / f"{name}.safetensors") for name in self.places}
        default = sums.pop(PLAIN)
        if not default.count(0):
            raise UserError(
                f"the plain assistant said nothing: {folder / 'rollouts' / f'{PLAIN}.jsonl'} has no reply with text"
            )
        kinds = {kind: {name.partition("/")[2]: one for name, one in sums.items() if name.startswith(kind)}
                 for kind in ("roles/", "traits/")}  # fmt: skip
        # Published on ordinary chats (lmsys-chat-1m); here on what the plain assistant says.
        said = conversations(self.under, self._rows(folder, PLAIN)[:NORMED])
        norms = np.array(
            mean_norms(self.under.base, said, layers(self.under), self.under.batch_size), dtype=np.float32
        )
        found = report.make(default, kinds["roles/"], kinds["traits/"], norms, c.min_count, c.layer, self.trainer.seed)
        with atomic_folder(folder / "axis") as temporary:
            save_file(
                {"axis": found.axis, "default": found.default, "norms": norms, "pc1": found.pc1}, temporary / FILE
            )
            save_file(found.vectors, temporary / "vectors.safetensors")
            write_json(temporary / "axis.json", found.report)
        if found.short:
            told = ", ".join(f"{name} {n}" for name, n in sorted(found.short.items(), key=lambda one: one[::-1])[:8])
            logger.warning("%d roles and traits have fewer than %d rollouts that count, and no vector (fewest: %s; "
                           "axis.json lists all)", len(found.short), c.min_count, told)  # fmt: skip
        at = found.report["layers"][found.report["layer"]]
        logger.warning("axis, layer %d: cosine to PC1 %.3f, under resampled roles at least %.3f (95 %%)", at["layer"],
                       at["pc1_cosine"], at["resampled_roles"]["low"])  # fmt: skip

    # ---- where the cap lies --------------------------------------------------------------------------------------

    def calibrate(self, folder: Path) -> None:
        c = self.config.calibration
        found = {
            name: load_file(folder / "projections" / f"{name}.safetensors")["projections"] for name in self.places
        }
        every = np.concatenate(list(found.values()))
        percents = [calibration.floors(every, percent / 100, "axis") for percent in range(101)]
        tensors = load_file(folder / "axis" / FILE) | {"percentiles": np.stack(percents).astype(np.float32)}
        band = band_of(c.layers, self._depth())
        chosen = {"layers": f"{band.start}:{band.stop}", "quantile": c.quantile,
                  "quantile_direction": c.quantile_direction, "raised": c.raised,
                  "positions": c.positions}  # fmt: skip
        tried = self._search(folder, tensors) if c.widths else []
        if tried:
            chosen |= {key: choose(tried, c)[key] for key in ("layers", "quantile", "raised")}
        settings = settings_of(chosen)
        if self.processes.is_main_process:
            roles = np.concatenate([found[name] for name in found if name.startswith("roles/") and name != PLAIN])
            cap = AssistantAxis(self.under.base, _tensors(tensors), settings)
            means = {"default": found[PLAIN].mean(0), "roles": roles.mean(0)}
            table: list[dict[str, Any]] = [
                {"layer": at, **{name: float(mean[at]) for name, mean in means.items()}} for at in range(self._depth())
            ]
            for at in cap.layers:
                # Of means over replies; what a run counts is of single tokens.
                floor = cap.floor(at)
                below = {
                    name: float((values[:, at] < floor).mean())
                    for name, values in (("default", found[PLAIN]), ("roles", roles))
                }
                table[at] |= {"floor": floor, "below": below}
            with atomic_folder(folder / "calibration") as temporary:
                save_file(tensors, temporary / FILE)
                write_json(
                    temporary / "calibration.json",
                    {"chosen": chosen, "rollouts": len(every), "layers": table, "tried": tried},
                )

    def _search(self, folder: Path, tensors: dict[str, np.ndarray]) -> list[dict[str, Any]]:
        """Every band and quantile on the dev split. Raises UserError without one."""
        c, judges, seed = self.config, judging.one_judge(self.judges), self.trainer.seed
        if not len(self.people.dev):
            raise UserError(
                "a cap is searched on the dev split, which is empty: hold roles and questions out for it with "
                "data.dev=… data.dev_questions=…"
            )
        if self.teacher is not None:
            raise UserError("a cap is searched with the LM itself, for a server cannot be capped: leave teacher out")
        roles = [sample for sample in self.people.dev if sample.metadata["kind"] != DEFAULT]
        plain = [sample for sample in self.people.dev if sample.metadata["kind"] == DEFAULT]
        work = folder / "work" / "calibrate"

        async def episode(sample: Sample, taken: Roles) -> dict[str, Any]:
            row = {**await rollouts.roll_out(sample, taken, c, seed)}
            if sample.metadata["kind"] == DEFAULT:
                return row
            assert sample.persona is not None
            asked = judging.rubric("role", sample.persona.attributes.get("eval_prompt", ""), c.compat)
            verdict = await judging.judge(row, taken, sample.persona.id, sample.persona.description, asked)
            return {**row, **verdict}

        def rows(samples: list[Sample], model: LanguageModel, name: str) -> list[dict[str, Any]]:
            items, cast = [(s.id, s) for s in samples], Cast(model, judges=judges)
            return generate(items, episode, cast, work / f"{name}.jsonl", settings={}, batch_size=model.batch_size,
                            processes=self.processes)  # fmt: skip

        def measure(model: LanguageModel, name: str) -> tuple[float, float]:
            return take_over([row.get("score") for row in rows(roles, model, name)]), nats_per_token(model, own)

        own = [row for row in rows(plain, self.under, "plain") if row.get("reply", "").strip()]
        untouched = measure(self.under, "untouched")

        def capped(band: calibration.Band, raised: float) -> tuple[float, float]:
            settings = settings_of({"layers": f"{band.start}:{band.stop}", "quantile": band.quantile, "raised": raised,
                                    "quantile_direction": c.calibration.quantile_direction,
                                    "positions": c.calibration.positions})  # fmt: skip
            cap = AssistantAxis(self.under.base, _tensors(tensors), settings)
            return measure(
                LanguageModel(self.under.base, [*self.under.personalizers, cap], self.under.batch_size),
                f"{band.id}-r{raised:g}",
            )

        bands = list(
            calibration.bands(self._depth(), c.calibration.widths, c.calibration.every, c.calibration.quantiles)
        )
        return search(product(bands, c.calibration.raises), capped, untouched)

    def cap(self, folder: Path) -> None:
        if self.processes.is_main_process:
            chosen = json.loads((folder / "calibration" / "calibration.json").read_text())["chosen"]
            with atomic_folder(folder / "cap") as temporary:
                save_file(load_file(folder / "calibration" / FILE), temporary / FILE)
                write_json(temporary / "cap.json", {"mode": "cap", **chosen})


def part_of(stage: str, part: str | None) -> str:
    """What a stage of one task of an array is called: "rollouts-3-of-16"."""
    return stage if part is None else f"{stage}-{part.replace('/', '-of-')}"


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
