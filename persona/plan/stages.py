"""What methods made of stages would do: texts to generate, labels to ask for, trainings; all of them at most."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from persona import data
from persona.config.schemas import RoleConfig, TrainConfig
from persona.data.constitution import from_people
from persona.data.roles import DEFAULT
from persona.errors import UserError
from persona.methods.apc.characters import characters
from persona.methods.apc.config import APCConfig
from persona.methods.assistant_axis.config import AssistantAxisConfig
from persona.methods.character.expansion import extra_prompts
from persona.methods.character.introspection import SETS
from persona.methods.character.pipeline import CharacterConfig
from persona.methods.character.prompts import PromptSet

# A judge's verdict in words; a statement, a query or a list of them as a teacher writes it (the methods' own limits).
VERDICT, WRITTEN = 16, 512


@dataclass(frozen=True)
class Texts:
    """`count` texts of at most `tokens` tokens each, written by `by` in a stage."""

    stage: str
    what: str
    by: str
    count: int
    tokens: int


@dataclass(frozen=True)
class Training:
    """A training on `count` samples, each `rows` rows of at most `length` tokens, of which `reply` are learned."""

    stage: str
    what: str
    count: int
    rows: int
    length: int
    reply: int


@dataclass(frozen=True)
class Work:
    """`texts` and `trainings` in the stages' order; `source` says what the counts are from."""

    texts: list[Texts]
    trainings: list[Training]
    source: str

    @property
    def heaviest(self) -> Training | None:
        """The training whose batch holds the most tokens: what memory is for. None where nothing is trained."""
        return max(self.trainings, key=lambda training: training.rows * training.length, default=None)


def work(cfg: TrainConfig) -> Work:
    """Of a run of a method that has a plan here. Raises UserError as the readers of their data do."""
    return _plans()[type(cfg.method)](cfg)


def has_plan(cfg: TrainConfig) -> bool:
    return type(cfg.method) in _plans()


def _plans() -> dict[type, Callable[[TrainConfig], Work]]:
    return {CharacterConfig: _character, APCConfig: _apc, AssistantAxisConfig: _assistant_axis}


def _player(role: RoleConfig, otherwise: str) -> str:
    named = {"none": otherwise, "local": role.model.path, "endpoint": role.endpoint.model}
    return named.get(role.kind, role.kind) or otherwise


def _judges(cfg: TrainConfig) -> str:
    return ", ".join(_player(role, name) for name, role in cfg.judge.items() if role.kind != "none") or "a judge"


# ---- Open Character Training ---------------------------------------------------------------------------------------


def _character(cfg: TrainConfig) -> Work:
    method: CharacterConfig = cfg.method
    people = data.load(cfg.data)
    traits = from_people(people).traits
    asked = [len(set(trait.questions + trait.additional)) for trait in traits]
    short = sum(count < method.expand.per_trait for count in asked)
    prompts = sum(max(count, method.expand.per_trait) for count in asked)
    extra = len(extra_prompts(method.extra_prompts)) if method.extra_prompts else 0
    second = (prompts + extra) * method.distill.second_turns
    pairs = (prompts + extra) * method.distill.repeats + second
    teacher = _player(cfg.teacher, "the base LM itself")
    themes = PromptSet.open(method.prompts, method.assistant_name).lines("reflection_prompts")
    see = method.introspect
    reflections, talks = len(themes) * see.reflections, len(SETS) * see.interactions
    longest, reply = method.distill.max_length, method.distill.max_new_tokens
    texts = [
        Texts("expand", "lists of prompts", teacher, short * method.expand.tries, method.expand.max_new_tokens),
        Texts("distill", "answers in the role", teacher, pairs, reply),
        Texts("distill", "answers of its own", "the base LM", pairs + second, reply),
        Texts("introspect", "reflections", "the distilled LM", reflections, see.reflection_tokens),
        Texts("introspect", "turns of interactions", "the distilled LM", talks * see.turns, see.interaction_tokens),
    ]
    trainings = [
        Training("dpo", "pairs", pairs, 2, longest, min(reply, longest - 1)),
        Training("sft", "transcripts", reflections + talks, 1, method.sft_max_length, method.sft_max_length - 1),
    ]
    source = (
        f"{len(traits)} traits with {sum(asked)} questions, {extra} extra prompts, {method.distill.repeats} repeats"
    )
    return Work([part for part in texts if part.count], trainings, source)


# ---- APC -----------------------------------------------------------------------------------------------------------


def _apc(cfg: TrainConfig) -> Work:
    method: APCConfig = cfg.method
    people = characters(data.load(cfg.data))
    prose = [c.name for c in people if not c.persona.statements]
    if prose:
        raise UserError(
            f"how many statements the text about {prose[0]} holds is not known before stage=statements has run: plan "
            "with data.statements=<its folder>, or with a text of Key: value lines"
        )
    teacher = _player(cfg.teacher, "the base LM itself")
    judge = _judges(cfg)
    statements = sum(len(c.persona.statements) for c in people)
    taught = method.queries == "teacher"
    own = method.queries_per_statement
    per_character = [len(c.persona.statements) * own if taught else len(c.questions) for c in people]
    drawn = sum(min(method.max_queries, count) for count in per_character)
    labelled = statements * own
    asked = method.others + (0 if taught else own)
    texts = []
    if taught:
        texts.append(Texts("queries", "lists of queries", teacher, statements, WRITTEN))
    if method.reward == "discriminators" or method.mode == "experience":
        texts.append(Texts("labels", "verdicts on relevance", judge, statements * asked, VERDICT))
        if method.responses == "teacher":
            texts.append(Texts("labels", "triples of replies", teacher, labelled, WRITTEN))
        else:
            texts.append(Texts("labels", "replies", "the base LM", 3 * labelled, method.max_new_tokens))
        count = labelled * (3 + method.other_responses)
        texts.append(Texts("labels", "verdicts on replies", judge, count, VERDICT))
    if method.reward == "discriminators" and method.mode == "dpo":
        unseen = statements * (method.discriminator.held_out + method.discriminator.dev)
        texts.append(Texts("labels", "verdicts to calibrate by", judge, round(unseen * method.natural) * 2, VERDICT))
    source = f"{len(people)} characters with {statements} statements"
    learned = min(method.max_new_tokens, method.max_length - 1)
    if method.reward == "discriminators" and method.mode == "dpo":
        source += f", without the training of two discriminators on {method.discriminator.base}"
    if method.mode == "experience":
        return Work(texts, [Training("experience", "replies", 3 * labelled, 1, method.max_length, learned)], source)
    texts.append(Texts("pairs", "replies", "the LM under its stack", drawn * method.samples, method.max_new_tokens))
    if method.told:
        texts.append(Texts("pairs", "told replies", teacher, drawn * method.told, method.max_new_tokens))
    if method.reward == "judge":
        each = math.ceil(statements / len(people)) * (1 + method.samples + method.told + (method.told > 0))
        texts.append(Texts("pairs", "verdicts", judge, drawn * each, VERDICT))
    return Work(texts, [Training("dpo", "pairs", drawn, 2, method.max_length, learned)], source)


# ---- Assistant Axis ------------------------------------------------------------------------------------------------


def _assistant_axis(cfg: TrainConfig) -> Work:
    """Its reading is a forward over prompt and reply; prompts are counted as 1.3 tokens a word."""
    method: AssistantAxisConfig = cfg.method
    asked = data.load(cfg.data).train
    judged = sum(sample.metadata["kind"] != DEFAULT for sample in asked)
    some = asked[:: max(1, len(asked) // 256)]
    words = [sum(len(message.content.split()) for message in sample.messages) for sample in some]
    length = math.ceil(1.3 * max(words)) + method.max_new_tokens
    texts = [
        Texts("rollouts", "rollouts", _player(cfg.teacher, "the base LM"), len(asked), method.max_new_tokens),
        Texts("judge", "verdicts", _judges(cfg), judged, VERDICT),
        Texts("extract", "rollouts read", "the base LM", len(asked), length),
        Texts("project", "rollouts read", "the base LM", len(asked), length),
    ]
    return Work(texts, [], f"{len(asked):,} rollouts, {len(asked) - judged:,} of them the plain assistant's")
