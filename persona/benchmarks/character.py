"""Does a character show in replies: asked plainly, told to drop the role, and after a turn that somebody else wrote?

Maiya et al. 2025, arXiv 2511.01689 (reference/open_character_training §3.9 b, c). The questions have nothing to do
with the constitution. Instead of a classifier that chooses among the studied characters, judges say of each reply
whether the character shows; the classifier is `persona.benchmarks.character_classifier`, on the replies stored here.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona.benchmarks import BenchmarkConfig
from persona.data.base import SPLITS, People
from persona.data.rows import first_few, read_jsonl
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark
from persona.evaluation.judges.judging import Rubric, require
from persona.evaluation.judges.parsing import parse_yes_no
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.town import lexicon as lx
from persona.town import residents
from persona.types import Message, Persona, Request, Sample, Sampling, Score

log = logging.getLogger(__name__)

LANGUAGES = ("en", "town")
DEFAULT, PREFILL = "default", "prefill"
TOP_P = 0.95  # as published, beside temperature 0.7

_HERE = Path(__file__).parent
_SAMPLE = _HERE / "samples" / "character" / "questions.jsonl"
_WORDINGS = json.loads((_HERE / "prompts" / "character" / "variants.json").read_text(encoding="utf-8"))
# Language -> variant -> how it asks {question}; and the user's second turn after a prefilled first one.
VARIANTS: dict[str, dict[str, str]] = {language: _WORDINGS[language]["variants"] for language in LANGUAGES}
GO_ON: dict[str, str] = {language: _WORDINGS[language]["go on"] for language in LANGUAGES}


def _yes_no(reply: str) -> str:
    return "yes" if parse_yes_no(reply) else "no"


SHOWS = Rubric.load(
    _HERE / "prompts" / "character" / "shows.md", _yes_no, ("yes", "no"), example="<answer>{answer}</answer>"
)


# ---- questions -----------------------------------------------------------------------------------------------------


@dataclass
class QuestionsConfig(BenchmarkConfig):
    """`path`: questions as JSONL, each line with a `question`, a `prompt`, or a `conversation` of which the first turn
    is taken (rows of Pure-Dove or WildChat); null takes the sample that comes with the package. `language=town` asks
    in the town's language, by default its small talk. `without`: a file of the same form, prompts that a character
    was trained on (its stages/prompts.jsonl); a question that stands in one of them is not asked. `limit` draws
    questions by `seed`.
    """

    max_new_tokens: int = 256
    path: str | None = None
    language: str = "en"
    temperature: float = 0.7
    without: str | None = None


def questions(config: QuestionsConfig) -> dict[str, str]:
    """Id → question. Raises UserError for an unknown language and for a bad file, naming its line."""
    if config.language not in LANGUAGES:
        raise UserError(f"benchmark.language={config.language} is unknown; it should be one of {', '.join(LANGUAGES)}")
    if config.path is None and config.language == "town":
        forms = list(enumerate(lx.SMALL_TALK))
        asked = [(f"{form}-{topic}", ask.format(t=topic)) for topic in lx.TOPICS for form, (ask, _) in forms]
    else:
        asked = list(_read(Path(config.path or _SAMPLE)))
    if config.without is not None:
        trained = [text for _, text in _read(Path(config.without))]
        asked = list(_untrained(dict(asked), trained, config.without).items())
    if config.limit is not None and config.limit < len(asked):
        kept = random.Random(f"questions-{config.seed}").sample(range(len(asked)), config.limit)
        asked = [asked[i] for i in sorted(kept)]
    return dict(asked)


def _read(path: Path) -> Iterator[tuple[str, str]]:
    number = 0
    for number, row, _ in read_jsonl(path):
        text = _first(row)
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{path}, line {number} has no question: it should have a text as 'question' or 'prompt', or a "
                f"'conversation' whose first turn is the user's; its fields are {', '.join(row) or '(none)'}"
            )
        yield str(number), text.strip()
    if not number:
        raise UserError(f"{path} holds no questions")


def _first(row: Mapping[str, Any]) -> Any:
    turns = row.get("conversation")
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
        return turns[0].get("input", turns[0].get("content") if turns[0].get("role") == "user" else None)
    return row.get("question", row.get("prompt"))


def characters(people: People, benchmark: str) -> list[Persona]:
    """The different personas with statements, in order. Raises UserError where there is none."""
    known = {
        sample.persona.id: sample.persona
        for split in SPLITS
        for sample in people.split(split)
        if sample.persona is not None and sample.persona.statements
    }
    if not known:
        raise UserError(
            f"benchmark {benchmark} is over characters, and {people.name} has nobody with statements: choose "
            "data=constitution data.path=…, say"
        )
    return list(known.values())


def held_out(asked: Mapping[str, str], people: People) -> dict[str, str]:
    """`asked` without the questions that stand in the people's own samples. Raises UserError when none is left."""
    trained = [m.content for split in SPLITS for sample in people.split(split) for m in sample.messages]
    return _untrained(asked, trained, people.name)


def _untrained(asked: Mapping[str, str], trained: Sequence[str], where: str) -> dict[str, str]:
    kept = {id: text for id, text in asked.items() if not any(text in prompt for prompt in trained)}
    if out := [id for id in asked if id not in kept]:
        log.warning("%d questions are left out, as %s asks them too: %s", len(out), where, first_few(out))
    if not kept:
        raise UserError(f"every question stands in {where} already: benchmark.path=… should name other ones")
    return kept


def sampling(config: QuestionsConfig, id: str) -> Sampling:
    """How a reply is drawn, seeded by `id`: the same in every run, whatever runs beside it."""
    seed = random.Random(f"reply-{config.seed}-{id}").getrandbits(48)
    return Sampling(config.max_new_tokens, config.temperature, TOP_P, seed=seed)


def asked_in(variant: str, wording: str, persona: Persona, id: str, question: str) -> Sample:
    """The question `id` in one variant, put to one character."""
    message = Message("user", wording.replace("{question}", question))
    metadata = {"question": id, "variant": variant}
    return Sample(f"{persona.id}-{id}-{variant}", (message,), persona=persona, metadata=metadata)


def anything(language: str) -> str:
    """What can be said to anybody at any time."""
    return lx.UNKNOWN if language == "town" else "I see. Do go on."


def something(language: str, asked: Sequence[str], rng: random.Random) -> str:
    """A random reply: in the town an answer with a random trait's phrase, else somebody's question."""
    if language == "en":
        return rng.choice(asked)
    form, topic = rng.randrange(len(lx.SMALL_TALK)), rng.choice(lx.TOPICS)
    _, answer = residents.small_talk(form, topic, residents.PLAIN_WORDS)
    _, phrases = lx.CHARACTER[rng.choice(list(lx.CHARACTER))]
    return f"{answer} {rng.choice(phrases)}"


# ---- the benchmark -------------------------------------------------------------------------------------------------


@dataclass
class CharacterConfig(QuestionsConfig):
    """`prefill` adds a variant whose first reply the `reference` role writes, which should be the untouched base LM;
    the measured model is then asked to go on."""

    name: str = "character"
    prefill: bool = False


class Character(Benchmark):
    """A sample is one question in one variant, put to one character. Intervals are over questions.

    The prompt never holds the constitution: a personalizer finds it as statements of the sample's persona.
    """

    name = "character"
    version = "1"
    primary = "shows"
    prompts = (SHOWS.prompt,)

    def __init__(self, config: CharacterConfig, people: People) -> None:
        self.config = config
        self._asked = held_out(questions(config), people)
        variants = dict(VARIANTS[config.language])
        self.needs = ("judge",)
        if config.prefill:
            variants[PREFILL] = "{question}"
            self.needs = ("judge", "reference")
        self._samples = [
            asked_in(variant, wording, persona, id, question)
            for persona in characters(people, self.name)
            for id, question in self._asked.items()
            for variant, wording in variants.items()
        ]
        self.metrics = {
            "shows": Metric(description="share of replies that show the character, over all variants"),
            "default": Metric(description="share where nothing is added to the question"),
            "robustness": Metric(
                description=f"share over the {len(VARIANTS[config.language]) - 1} ways to drop the role"
            ),
        }
        if config.prefill:
            self.metrics[PREFILL] = Metric(description="share after a first reply by the untouched base LM")

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def cluster(self, sample: Sample) -> str:
        return self._asked[sample.metadata["question"]]

    def groups(self, sample: Sample) -> Mapping[str, str]:
        persona = sample.persona
        return {"variant": sample.metadata["variant"], "character": "" if persona is None else persona.id}

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        assert sample.persona is not None
        messages, draw = sample.messages, sampling(self.config, sample.id)
        variant, question = sample.metadata["variant"], self._asked[sample.metadata["question"]]
        if variant == PREFILL:
            assert roles.reference is not None  # one of `needs`
            written = await roles.reference.respond(Request(messages, sampling=draw))
            go_on = GO_ON[self.config.language].replace("{question}", question)
            messages += (Message("assistant", written.text), Message("user", go_on))
        reply = await roles.model.respond(Request(messages, sample.persona, draw))
        verdicts = await roles.judge(
            SHOWS, character="\n".join(sample.persona.statements), question=messages[-1].content, response=reply.text
        )
        transcript = (*messages, Message("assistant", reply.text)) if variant == PREFILL else ()
        said = require(verdicts)
        if not said:
            reason = f"no verdict could be read: {verdicts[0].reason}"
            return Score(reason=reason, raw=reply.text, verdicts=tuple(verdicts), transcript=transcript)
        shows = said.count("yes") / len(said)
        of_variant = variant if variant in (DEFAULT, PREFILL) else "robustness"
        return Score({"shows": shows, of_variant: shows}, "", reply.text, tuple(verdicts), transcript)

    def constant(self, sample: Sample) -> str:
        return anything(self.config.language)

    def chance(self, sample: Sample, rng: random.Random) -> str:
        return something(self.config.language, list(self._asked.values()), rng)


def build(config: CharacterConfig, people: People) -> Character:
    """Raises UserError for people without statements and for bad questions."""
    return Character(config, people)
