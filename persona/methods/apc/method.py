"""The method whole: its stages in their order, and what it leaves behind.

python train.py experiment=town_apc            # all stages
python train.py experiment=town_apc stage=labels   # one of them

stages/statements/      <id>.json
stages/queries/         <id>.query_relevant_to_statement.json
stages/labels/          <id>.relevance.json, <id>.nli.v2.json, <id>.natural.json
stages/discriminators/  relevance/, nli/: model folders, each with report.json
stages/pairs/           pairs.jsonl, <id>.rag.dpo.json
stages/dpo/             the adapter in PEFT's format (stages/experience/ with mode "experience")
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState

from persona.data.base import People
from persona.errors import UserError
from persona.evaluation.generation import generate, seed_of
from persona.evaluation.roles import Cast, identity
from persona.files import atomic_folder, read_lines, write_lines
from persona.methods.apc import discriminators, formats, labels, pairs, statements
from persona.methods.apc.characters import Character, characters
from persona.methods.apc.config import APCConfig
from persona.methods.apc.discriminators import Labelled
from persona.methods.statements import Statements, StatementsConfig
from persona.metrics.apc import Discriminators, Probabilities, Question
from persona.personalizer import LanguageModel, Personalizer, save
from persona.training.lora import LoRA, keep
from persona.training.stages import Stage, run_stages
from persona.training.trainer import TrainerConfig
from persona.types import Conversation, Message, Request

logger = logging.getLogger(__name__)
STAGES = ("statements", "queries", "labels", "discriminators", "pairs", "dpo", "experience")
DEV_PAIRS = 0.1  # share of the queries whose pairs (replies) are only measured on


class APC(LoRA):
    """The adapter that prefers faithful replies; for one character, or for all that it was trained with."""

    method = "apc"


def train(
    config: APCConfig,
    under: LanguageModel,
    people: People,
    trainer: TrainerConfig,
    out: Path,
    *,
    teacher: Any = None,
    judges: Sequence[Any] = (),
    stage: str | None = None,
) -> Path:
    """Run the stages (or `stage` alone) below `out/stages`, and write the personalizer to `out/personalizer`.

    Replies are sampled from `under`, and learned there: its prompts stay, its adapters are frozen below the new one.
    `teacher` writes statements and queries (None: the base LM); one judge labels. Returns the personalizer's folder,
    that of the stages where a stage was run alone.
    Raises UserError for data without characters, a stack that acts by anything but prompts and LoRA adapters, no
    judge where one is needed, and whatever a stage raises; a stage that was stopped goes on at the next start.
    """
    run = Run(config, under, characters(people), trainer, teacher, list(judges), PartialState())
    folder = Path(out) / "stages"
    run_stages(run.stages(), folder, only=stage, processes=run.processes)
    if stage is not None:
        return folder
    ends = "experience" if config.mode == "experience" else "dpo"
    return save(APC(under.base, folder / ends), under.base, Path(out) / "personalizer", under.personalizers)


@dataclass(frozen=True)
class Run:
    """One run of the method; each stage is a method that takes the folder of all stages."""

    config: APCConfig
    under: LanguageModel
    characters: Sequence[Character]
    trainer: TrainerConfig
    teacher: Any
    judges: Sequence[Any]
    processes: PartialState

    # ---- the stages and what each depends on ---------------------------------------------------------------------

    def stages(self) -> list[Stage]:
        """Those of this mode, in order; no stage that only one without discriminators of its own would need."""
        config = self.config
        taught, experience = config.queries == "teacher", config.mode == "experience"
        if not taught:
            statements.from_data(self.characters)
        given = [str(Path(model).resolve()) for model in (config.relevance_model, config.nli_model)
                 if model is not None and Path(model).is_dir()]  # fmt: skip
        files = [str(Path(config.files).expanduser().resolve())] if config.files else []
        own = config.reward == "discriminators" and (config.relevance_model is None or config.nli_model is None)
        asked = ["statements", "queries"] if taught else ["statements"]

        who = [[c.id, c.name, describe(c.role), c.persona.description, list(c.persona.statements)]
               for c in self.characters]  # fmt: skip
        common = {"characters": who, "seed": self.trainer.seed}
        helped = {**common, "teacher": identity(self.helper)}
        sampled = {**common, **self._set("queries", "temperature", "max_new_tokens"),
                   "questions": [list(c.questions) for c in self.characters]}  # fmt: skip
        judged = {**sampled, **helped, **self._set("responses", "prompts", "queries_per_statement", "others",
                                                   "other_responses", "natural", "mode"),
                  "held out": [config.discriminator.held_out, config.discriminator.dev],
                  "judge": [identity(judge) for judge in self.judges]}  # fmt: skip
        below_of(self.under)  # a stack that cannot be trained on is named before anything runs
        trained = {"trainer": asdict(self.trainer), "under": identity(self.under)}
        learned = {**trained, **self._set("lora", "max_length")}
        scored = {**sampled, **self._set("reward", "relevance_model", "nli_model", "max_queries", "samples", "told",
                                        "prompts", "gap"), "teacher": identity(self.helper) if config.told else None,
                  "under": identity(self.under),
                  "judge": [identity(j) for j in self.judges] if config.reward == "judge" else []}  # fmt: skip

        made = [Stage("statements", self.make_statements, files, ["statements"], helped)]
        if taught:
            keys = {**helped, **self._set("queries_per_statement")}
            made.append(Stage("queries", self.make_queries, [*files, "statements"], ["queries"], keys))
        if own or experience:
            made.append(Stage("labels", self.make_labels, [*files, *asked], ["labels"], judged))
        if experience:
            keys = {**learned, **common}
            return [*made, Stage("experience", self.train_experience, ["labels"], ["experience"], keys)]
        if own:
            keys = {"trainer": asdict(self.trainer), **self._set("discriminator")}
            made.append(Stage("discriminators", self.train_discriminators, ["labels"], ["discriminators"], keys))
            given.append("discriminators")
        made.append(Stage("pairs", self.make_pairs, [*asked, *given], ["pairs"], scored))
        keys = {**learned, **self._set("objective", "beta", "nll_coef")}
        return [*made, Stage("dpo", self.train_dpo, ["pairs"], ["dpo"], keys)]

    def _set(self, *names: str) -> dict[str, Any]:
        settings = asdict(self.config)
        return {name: settings[name] for name in names}

    @property
    def helper(self) -> Any:
        """Whoever writes: the teacher, or the base LM without anything on top."""
        return self.teacher or self.plain

    @property
    def plain(self) -> LanguageModel:
        return LanguageModel(self.under.base, (), self.under.batch_size)

    def generate(
        self, items: Sequence[tuple[str, Any]], episode: Callable, folder: Path, stage: str, title: str,
        model: Any = None, judges: Sequence[Any] = (), reference: Any = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Rows of `items`, kept in the stage's work folder until it ends; a stage that was stopped goes on there.

        Once all items have been asked nothing is asked again, since what follows in the stage builds on the rows.
        """
        path = folder / "work" / stage / f"{title}.jsonl"
        if not items or path.exists():
            return list(read_lines(path))
        cast = Cast(model or self.helper, tuple(judges), reference=reference)
        return generate(
            items, episode, cast, path, settings={}, batch_size=self.under.batch_size, processes=self.processes,
            title=f"apc, {title}",
        )  # fmt: skip

    def prompter(self) -> Statements:
        """What shows all statements."""
        return Statements(StatementsConfig(ranker="all", prompts=self.config.prompts), self.under.base)

    def write(self, folder: Path, files: Sequence[tuple[Character, str, Sequence[Mapping[str, Any]]]]) -> None:
        if self.processes.is_main_process:
            with atomic_folder(folder) as temporary:
                for character, kind, rows in files:
                    formats.write(temporary, character, kind, rows)

    # ---- statements and queries ----------------------------------------------------------------------------------

    def make_statements(self, folder: Path) -> None:
        rows: dict[str, list[dict[str, str]]] = {}
        items = []
        for character in self.characters:
            own = formats.given(self.config.files, character, formats.STATEMENTS)
            if own is not None:
                rows[character.id] = formats.read(own)
                statements.check_names(tuple(row["statement"] for row in rows[character.id]), character.name, str(own))
            elif character.persona.statements:
                rows[character.id] = statements.told(character)
            else:
                found = enumerate(statements.passages(character))
                items += [(f"{character.id}/{number}", (character, text)) for number, text in found]
        taken = self.generate(items, statements.take, folder, "statements", "statements")
        kept = [row for row in taken if "reason" not in row]
        if nameless := sum(row["nameless"] for row in kept):
            logger.warning("%d statements that did not name their character were left out", nameless)
        of = {character.id: character.name for character in self.characters}
        for row in kept:
            about = {"character": of[row["of"]], "passage": row["passage"]}
            rows.setdefault(row["of"], []).extend({**about, "statement": s} for s in row["statements"])
        for character in self.characters:
            if not rows.get(character.id):
                why = next((row["reason"] for row in taken if "reason" in row), "none of them names the character")
                raise UserError(f"no statement about {character.name} could be taken out of the text: {why}")
        self.write(folder / "statements", [(c, formats.STATEMENTS, rows[c.id]) for c in self.characters])

    def statements_of(self, folder: Path, character: Character) -> list[str]:
        rows = formats.read(folder / "statements" / f"{character.file}{formats.STATEMENTS}")
        return list(dict.fromkeys(row["statement"] for row in rows))

    def make_queries(self, folder: Path) -> None:
        rows: dict[str, list[dict[str, Any]]] = {character.id: [] for character in self.characters}
        items = []
        for character in self.characters:
            own = formats.given(self.config.files, character, formats.QUERIES)
            if own is not None:
                rows[character.id] = formats.read(own)
                continue
            own_statements = enumerate(self.statements_of(folder, character))
            items += [(f"{character.id}/{number}", (character, statement)) for number, statement in own_statements]
        episode = partial(statements.ask, config=self.config, seed=self.trainer.seed)
        asked = self.generate(items, episode, folder, "queries", "queries")
        for row in labels.readable(asked, "with queries"):
            rows[row.pop("of")].append(row)
        self.write(folder / "queries", [(c, formats.QUERIES, rows[c.id]) for c in self.characters])

    def queries_of(self, folder: Path, character: Character) -> dict[str, list[str]]:
        """The queries of each statement; none of their own where queries come from the data."""
        found: dict[str, list[str]] = {statement: [] for statement in self.statements_of(folder, character)}
        if self.config.queries == "teacher":
            for row in formats.read(folder / "queries" / f"{character.file}{formats.QUERIES}"):
                found.setdefault(row["statement"], []).extend(row["queries"])
        return found

    # ---- labels --------------------------------------------------------------------------------------------------

    def make_labels(self, folder: Path) -> None:
        config, seed = self.config, self.trainer.seed
        known = {kind: {c.id: formats.given(config.files, c, kind) for c in self.characters}
                 for kind in (formats.RELEVANCE, formats.NLI)}  # fmt: skip
        queries = {c.id: self.queries_of(folder, c) for c in self.characters}
        judge = self.judges
        if not all(path for paths in known.values() for path in paths.values()):
            judge = labels.one_judge(self.judges)

        items = [item for c in self.characters if not known[formats.RELEVANCE][c.id]
                 for item in labels.relevance_items(c, queries[c.id], config, seed)]  # fmt: skip
        judged = self.generate(items, labels.judge_relevance, folder, "labels", "relevance", judges=judge)
        relevance: dict[str, list[dict[str, Any]]] = {c.id: [] for c in self.characters}
        for row in labels.readable(judged, "of the judge on relevance"):
            relevance[row.pop("of")].append(row)
        for c in self.characters:
            if path := known[formats.RELEVANCE][c.id]:
                relevance[c.id] = formats.read(path)
            else:
                relevance[c.id] += [{"character": c.name, "statement": s, "query": q, "relevant": "yes"}
                                    for s, own in queries[c.id].items() for q in own]  # fmt: skip

        left = [c for c in self.characters if not known[formats.NLI][c.id]]
        own = {c.id: labels.own_queries(c, queries[c.id], relevance[c.id], config) for c in left}
        responses = self.responses(folder, left, own, queries)
        answered = {(row["of"], row["statement"]) for row in responses}
        bare = [labels.Item(c.id, c.name, row["statement"], row["query"]) for c in left for row in relevance[c.id]
                if (c.id, row["statement"]) not in answered]  # fmt: skip
        asked = labels.nli_items(
            responses, list({(b.character, b.statement): b for b in bare}.values()), config.other_responses, seed
        )
        judged = self.generate(asked, labels.judge_nli, folder, "labels", "inference", judges=judge)
        inferred: dict[str, list[dict[str, Any]]] = {c.id: [] for c in self.characters}
        for row in labels.readable(judged, "of the judge on responses"):
            inferred[row.pop("of")].append(row)
        for c in self.characters:
            if path := known[formats.NLI][c.id]:
                inferred[c.id] = formats.read(path)
        natural: dict[str, list[dict[str, Any]]] = {c.id: [] for c in self.characters}
        scored = left if config.mode == "dpo" else []  # experience is uploaded without discriminators
        items = [
            item for c in scored for item in labels.natural_items(c, list(queries[c.id]), responses, config, seed)
        ]
        judged = self.generate(items, labels.judge_natural, folder, "labels", "natural", judges=judge)
        for row in labels.readable(judged, "of the judge on natural rows"):
            natural[row.pop("of")].append(row)
        kinds = ((formats.RELEVANCE, relevance), (formats.NLI, inferred), (formats.NATURAL, natural))
        self.write(folder / "labels", [(c, kind, rows[c.id]) for kind, rows in kinds for c in self.characters])

    def responses(
        self, folder: Path, left: Sequence[Character], own: Mapping[str, list], queries: Mapping[str, Mapping]
    ) -> list[dict[str, Any]]:
        """Three replies to each character's own (statement, query) pairs."""
        items = [item for c in left for item in own[c.id]]
        named = [(name, (name, item)) for name, item in items]
        if self.config.responses == "teacher":
            episode = partial(labels.write_responses, seed=self.trainer.seed)
            made = self.generate(named, episode, folder, "labels", "responses")
            return labels.readable(made, "of the teacher with three responses")
        prompter = self.prompter()
        of = {c.id: c for c in left}

        async def sample(item: tuple[str, labels.Item], roles: Any) -> Mapping[str, Any]:
            character = of[item[1].character]
            own_statements = list(queries[character.id])
            return await labels.sample_responses(
                item, roles, character, own_statements, prompter, self.config, self.trainer.seed
            )

        made = self.generate(named, sample, folder, "labels", "responses", model=self.plain)
        return labels.readable(made, "sampled")

    # ---- discriminators ------------------------------------------------------------------------------------------

    def train_discriminators(self, folder: Path) -> None:
        rows, natural = ({"relevance": list[Labelled](), "nli": list[Labelled]()} for _ in range(2))
        for c in self.characters:
            for row in formats.read(folder / "labels" / f"{c.file}{formats.RELEVANCE}"):
                rows["relevance"].append(discriminators.relevance_row(row, c.id))
            for row in formats.read(folder / "labels" / f"{c.file}{formats.NLI}"):
                rows["nli"].append(discriminators.nli_row(row, c.id))
            for row in formats.read(folder / "labels" / f"{c.file}{formats.NATURAL}"):
                natural["relevance"].append(discriminators.relevance_row(row, c.id))
                natural["nli"].append(discriminators.nli_row(row, c.id))
        work = folder / "work" / "discriminators"
        for task, own in rows.items():
            config, target = self.config.discriminator, folder / "discriminators" / task
            discriminators.train_discriminator(task, own, natural[task], config, self.trainer, work / task, target)

    def scorer(self, folder: Path) -> Discriminators:
        own = folder / "discriminators"
        return Discriminators(
            self.config.relevance_model or str(own / "relevance"), self.config.nli_model or str(own / "nli")
        )

    # ---- pairs ---------------------------------------------------------------------------------------------------

    def make_pairs(self, folder: Path) -> None:
        config, seed = self.config, self.trainer.seed
        told = {}
        items = []
        for c in self.characters:
            known = self.statements_of(folder, c)
            told[c.id] = replace(c, persona=replace(c.persona, statements=tuple(known)))
            queries = pairs.drawn(c, self.queries_of(folder, c), config, seed)
            items += [(f"{c.id}/{number}", (f"{c.id}/{query}", query)) for number, query in enumerate(queries)]
        of = {name: told[name.rpartition("/")[0]] for name, _ in items}
        named = [(name, (name, *item)) for name, item in items]
        prompter, bearing = self.prompter(), self.bearing(folder, named, of) if config.told else {}

        async def sample(item: tuple[str, str, str], roles: Any) -> Mapping[str, Any]:
            known = bearing.get(item[0], ())
            return await pairs.sample_replies(item[1:], roles, of[item[0]], known, prompter, config, seed)

        teacher = self.helper if config.told else None
        rows = self.generate(named, sample, folder, "pairs", "replies", model=self.under, reference=teacher)
        rows = labels.readable(rows, "of the LM")
        questions = [
            Question(told[r["of"]].name, told[r["of"]].persona.statements, r["query"], tuple(r["replies"]))
            for r in rows
        ]
        rows, found = self.score(folder, rows, questions)
        if not self.processes.is_main_process:
            return
        kept = self.prefer(rows, found, told)
        with atomic_folder(folder / "pairs") as temporary:
            write_lines(temporary / "pairs.jsonl", kept)
            for c in self.characters:
                own = [pair for pair in kept if pair["of"] == c.id]
                formats.write(temporary, c, formats.PAIRS, [pairs.published(self.under.base, pair) for pair in own])

    def bearing(self, folder: Path, named: Sequence[tuple], of: Mapping[str, Character]) -> dict[str, list[str]]:
        """Of each query its character's statements that bear on it, by whoever scores replies."""
        if self.config.reward == "judge":

            async def judge(item: tuple[str, str, str], roles: Any) -> Mapping[str, Any]:
                return await pairs.judge_relevance(item[2], roles, of[item[0]])

            one = labels.one_judge(self.judges)
            rows = self.generate(named, judge, folder, "pairs", "relevance", judges=one)
            labels.readable(rows, "of the judge on relevance")
            return {row["id"]: row.get("bearing", []) for row in rows}
        asked = [Question(of[name].name, of[name].persona.statements, item[2], ()) for name, item in named]
        found = self.scorer(folder)(asked)
        return {
            name: [s for s, chance in zip(question.statements, each.relevance, strict=True) if chance > 0.5]
            for (name, _), question, each in zip(named, asked, found, strict=True)
        }

    def score(
        self, folder: Path, rows: list[dict[str, Any]], questions: Sequence[Question]
    ) -> tuple[list[dict[str, Any]], list[Probabilities]]:
        """The rows whose replies have a score, and their probabilities."""
        if self.config.reward == "discriminators":
            return rows, self.scorer(folder)(questions) if self.processes.is_main_process else []
        items = [(f"{row['of']}/{number}", question) for number, (row, question) in
                 enumerate(zip(rows, questions, strict=True))]  # fmt: skip
        judge = labels.one_judge(self.judges)
        verdicts = self.generate(items, pairs.judge_replies, folder, "pairs", "scores", judges=judge)
        labels.readable(verdicts, "of the judge on replies")
        kept, found = [], []
        for row, verdict in zip(rows, verdicts, strict=True):
            if "reason" not in verdict:
                kept.append({**row, "replies": [row["replies"][place] for place in verdict["kept"]]})
                found.append(pairs.probabilities(verdict))
        if silent := sum(len(row["replies"]) for row in rows) - sum(len(row["replies"]) for row in kept):
            logger.warning("%d replies with a verdict that cannot be read are left out", silent)
        return kept, found

    def prefer(
        self, rows: Sequence[Mapping[str, Any]], found: Sequence[Probabilities], told: Mapping[str, Character]
    ) -> list[dict[str, Any]]:
        scores = [probabilities.score().total.tolist() for probabilities in found]
        kept = []
        for preference in pairs.preference_pairs(scores, gap=self.config.gap):
            row, probabilities = rows[preference.query], found[preference.query]
            character = told[row["of"]]
            weights = pairs.statement_weights(probabilities, preference.chosen, preference.rejected)
            kept.append(
                {
                    "of": row["of"],
                    "query": row["query"],
                    "messages": describe(self.prompted(character, row["query"])),
                    "chosen": row["replies"][preference.chosen],
                    "rejected": row["replies"][preference.rejected],
                    "gap": preference.gap,
                    "chosen_weight": weights[0],
                    "rejected_weight": weights[1],
                    "scores": scores[preference.query],
                }
            )
        if not kept:
            raise pairs.none_left(scores, self.config.gap)
        logger.warning("%d of %d queries give a pair whose replies differ by more than %g", len(kept), len(rows),
                       self.config.gap)  # fmt: skip
        return kept

    def prompted(self, character: Character, query: str) -> Conversation:
        """What the LM reads when it is asked: the query behind all that the stack writes in front."""
        requests = [Request(character.ask(query), character.persona, task=character.task)]
        for personalizer in self.under.personalizers:
            requests = personalizer.prompt(requests)
        return requests[0].messages

    # ---- training ------------------------------------------------------------------------------------------------

    def train_dpo(self, folder: Path) -> None:
        from persona.training.preference import Pair, train_preferences

        splits: dict[bool, list[Pair]] = {False: [], True: []}
        total = self.config.objective == "total"
        for row in read_lines(folder / "pairs" / "pairs.jsonl"):
            messages = tuple(Message(**message) for message in row["messages"])
            weights = (1.0, 0.0) if total else (row["chosen_weight"], row["rejected_weight"])
            splits[self.is_dev(row["of"], row["query"])].append(
                Pair(messages, row["chosen"], row["rejected"], *weights)
            )
        if not splits[False]:  # few pairs, and all of them drawn to be measured on only
            splits = {False: splits[True], True: []}
        work = folder / "work" / "dpo"
        train_preferences(
            self.under.base, splits[False], splits[True], beta=self.config.beta, nll_coef=self.config.nll_coef,
            lora=self.config.lora, below=below_of(self.under), max_length=self.config.max_length,
            trainer=self.trainer, out=work,
        )  # fmt: skip
        keep(work, folder / "dpo")

    def train_experience(self, folder: Path) -> None:
        """Supervised training on replies that follow a statement, asked without showing it (reference/apc.md 3.5)."""
        from persona.training.supervised import train_supervised

        conversations: list[Conversation] = []
        for c in self.characters:
            rows = formats.read(folder / "labels" / f"{c.file}{formats.NLI}")
            followed = {(r["query"], r["response"]) for r in rows if r["label"] == formats.ENTAILED}
            conversations += [
                (*self.prompted(c, query), Message("assistant", response)) for query, response in sorted(followed)
            ]
        if not conversations:
            raise UserError("there is no experience to upload: no labelled reply is entailed by a statement")
        work = folder / "work" / "experience"
        train_supervised(
            self.under.base, conversations, lora=self.config.lora, below=below_of(self.under),
            max_length=self.config.max_length, trainer=self.trainer, out=work,
        )  # fmt: skip
        keep(work, folder / "experience")

    def is_dev(self, character: str, query: str) -> bool:
        return seed_of(self.trainer.seed, "dev pairs", character, query) / 2**31 < DEV_PAIRS


def describe(messages: Conversation) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def below_of(under: LanguageModel) -> list[Path]:
    """Folders of the LoRA adapters in a stack. Raises UserError for one that acts by anything else than prompts."""
    found = []
    for personalizer in under.personalizers:
        kind = type(personalizer)
        if isinstance(personalizer, LoRA):
            found.append(Path(personalizer.folder))
        elif kind.modules is not Personalizer.modules or kind.embeddings is not Personalizer.embeddings:
            raise UserError(
                f"method apc trains on top of prompts and LoRA adapters, not on top of {personalizer.method}"
            )
    return found
