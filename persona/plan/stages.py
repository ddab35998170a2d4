"""What methods made of stages would do: texts to generate, labels to ask for, trainings; all of them at most."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from persona import data
from persona.config.schemas import RoleConfig, TrainConfig
from persona.data.constitution import from_people
from persona.data.roles import DEFAULT
from persona.data.situations import POLES, annotated, expert_vector_of
from persona.errors import UserError
from persona.methods.apc.characters import characters
from persona.methods.apc.config import APCConfig
from persona.methods.assistant_axis.config import AssistantAxisConfig
from persona.methods.character.expansion import extra_prompts
from persona.methods.character.introspection import SETS
from persona.methods.character.pipeline import CharacterConfig
from persona.methods.character.prompts import PromptSet
from persona.methods.persona_fuse.config import PersonaFuseConfig
from persona.methods.persona_fuse.synthesis import SAFE, SHOWN, split_of
from persona.methods.persona_fuse.synthesis import shown as query_text
from persona.methods.statements import Constitution, ConstitutionConfig
from persona.methods.steering import SteeringConfig, beginnings

# A judge's verdict in words; a statement, a query or a list of them as a teacher writes it (the methods' own limits).
VERDICT, WRITTEN = 16, 512


BASE, NO_JUDGE = "the base LM", "a judge"


@dataclass(frozen=True)
class Texts:
    """`count` texts of at most `tokens` tokens each, in a stage written by `by` ("the …" is the run's own LM), or
    only read, in one forward, where `read`."""

    stage: str
    what: str
    by: str
    count: int
    tokens: int
    read: bool = False

    @property
    def own(self) -> bool:
        """Whether the GPUs of the run have to do it."""
        return self.by.startswith("the ")


@dataclass(frozen=True)
class Training:
    """A training on `count` samples, each `rows` rows of at most `length` tokens, of which `reply` are learned;
    `batch` samples a forward, for `epochs` (0 and None: as the trainer's config says)."""

    stage: str
    what: str
    count: int
    rows: int
    length: int
    reply: int
    batch: int = 0
    epochs: float | None = None


@dataclass(frozen=True)
class Work:
    """`texts` and `trainings` in the stages' order; `source` says what the counts are from."""

    texts: list[Texts]
    trainings: list[Training]
    source: str


def work(cfg: TrainConfig) -> Work:
    """Of a run of a method that has a plan here. Raises UserError as the readers of their data do."""
    return _plans()[type(cfg.method)](cfg)


def has_plan(cfg: TrainConfig) -> bool:
    return type(cfg.method) in _plans()


def _plans() -> dict[type, Callable[[TrainConfig], Work]]:
    return {
        CharacterConfig: _character,
        APCConfig: _apc,
        AssistantAxisConfig: _assistant_axis,
        PersonaFuseConfig: _persona_fuse,
        SteeringConfig: _steering,
    }


def _player(role: RoleConfig, otherwise: str) -> str:
    named = {"none": otherwise, "local": role.model.path, "endpoint": role.endpoint.model}
    return named.get(role.kind, role.kind) or otherwise


def _judges(cfg: TrainConfig) -> str:
    return ", ".join(_player(role, name) for name, role in cfg.judge.items() if role.kind != "none") or NO_JUDGE


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
    teacher = _player(cfg.teacher, f"{BASE} itself")
    themes = PromptSet.open(method.prompts, method.assistant_name).lines("reflection_prompts")
    see = method.introspect
    reflections, talks = len(themes) * see.reflections, len(SETS) * see.interactions
    longest, reply = method.distill.max_length, method.distill.max_new_tokens
    texts = [
        Texts("expand", "lists of prompts", teacher, short * method.expand.tries, method.expand.max_new_tokens),
        Texts("distill", "answers in the role", teacher, pairs, reply),
        Texts("distill", "answers of its own", BASE, pairs + second, reply),
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
    teacher = _player(cfg.teacher, f"{BASE} itself")
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
            texts.append(Texts("labels", "replies", BASE, 3 * labelled, method.max_new_tokens))
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
        Texts("rollouts", "rollouts", _player(cfg.teacher, BASE), len(asked), method.max_new_tokens),
        Texts("judge", "verdicts", _judges(cfg), judged, VERDICT),
        Texts("extract", "rollouts", BASE, len(asked), length, read=True),
        Texts("project", "rollouts", BASE, len(asked), length, read=True),
    ]
    return Work(texts, [], f"{len(asked):,} rollouts, {len(asked) - judged:,} of them the plain assistant's")


# ---- PersonaFuse ---------------------------------------------------------------------------------------------------


def _persona_fuse(cfg: TrainConfig) -> Work:
    """Of bare queries at most the training split passes the filters, and each calls for five poles at most."""
    method: PersonaFuseConfig = cfg.method
    samples = data.load(cfg.data).train
    texts = []
    if annotated(samples[0]):
        calls = sum(weight > 0 for sample in samples for weight in expert_vector_of(sample))
        patterns = Counter(expert_vector_of(sample) for sample in samples)
        twos = sum(count // 2 for count in patterns.values()) + math.ceil(sum(n % 2 for n in patterns.values()) / 2)
        source = f"{len(samples)} annotated queries that call for {calls} poles"
        rows = len(samples)
    else:
        judges = max(1, sum(role.kind != "none" for role in cfg.judge.values()))
        verdicts = len(samples) * judges
        teacher, judge = _player(cfg.teacher, f"{BASE} itself"), _judges(cfg)
        judge = teacher if judge == NO_JUDGE else judge
        texts = [
            Texts("synthesis", "situations and responses", teacher, len(samples), method.synthesis.max_new_tokens),
            Texts("synthesis", "verdicts on safety", judge, verdicts, SAFE.max_new_tokens),
            Texts("synthesis", "verdicts on traits", judge, verdicts, SHOWN.max_new_tokens),
        ]
        rows = sum(split_of(query_text(sample.messages), cfg.trainer.seed) == "train" for sample in samples)
        calls, twos = rows * len(POLES) // 2, math.ceil(rows / 2)
        source = f"{len(samples)} bare queries, {rows} of them to train on"
    warm, route, joint, reads = method.warmup, method.routing, method.joint, method.router.max_length
    learned = method.max_length // 2
    experts = len(POLES) if warm.together else 1
    rounds = math.ceil(calls / len(POLES)) * (len(POLES) // experts)
    pairs = 2 * (1 + (joint.objective == "dpo"))
    if joint.objective == "dpo" and "joint" not in method.skip:
        texts.append(Texts("joint", "rejected replies", BASE, rows, joint.max_new_tokens))
    trainings = [
        Training("warmup", "rounds", rounds, experts, method.max_length, learned, warm.batch_size, warm.epochs),
        Training("router", "twos of queries", twos, 2, reads, reads, max(1, route.batch_size // 2), route.epochs),
        Training(
            "joint", "twos", twos, pairs, method.max_length, learned, max(1, joint.batch_size // 2), joint.epochs
        ),
    ]
    source += f"; the router over {method.router.path or 'the base LM'}"
    return Work(texts, [one for one in trainings if one.stage not in method.skip], source)


# ---- steering ------------------------------------------------------------------------------------------------------


def _steering(cfg: TrainConfig) -> Work:
    """Every beginning of a reply is read with the constitution and without; words are counted as 1.3 tokens."""
    method: SteeringConfig = cfg.method
    personas = {sample.persona.id: sample.persona for sample in data.load(cfg.data).train if sample.persona}
    if len(personas) != 1:
        raise UserError(f"steering takes one constitution, but the data have {len(personas)} personas to train on")
    (persona,) = personas.values()
    system = Constitution(ConstitutionConfig(method.prompts)).text(persona) or ""
    lines = beginnings(method.prompts)
    words = max(map(len, (line.split() for line in lines)), default=0)
    length = math.ceil(1.3 * (len(system.split()) + words))
    count = len(lines) + 1
    texts = [
        Texts("steering", "beginnings under the constitution", BASE, count, length, read=True),
        Texts("steering", "beginnings without it", BASE, count, math.ceil(1.3 * words) + 1, read=True),
    ]
    return Work(texts, [], f"a constitution of {len(system.split())} words, {count} beginnings of replies")
