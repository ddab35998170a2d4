"""Measure what the town's language model can do: `python -m persona.town.measure_lm`.

Every probe is a set of prompts about people the model has not met (all latents are drawn afresh, residents come from
a seed of their own), answered greedily and read by the oracle. A reply the oracle cannot read counts as wrong.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from persona.files import atomic_write
from persona.town import MODEL_PATH, grammar, ideal, oracle
from persona.town import assistant_documents as assistant
from persona.town import lexicon as lx
from persona.town import residents as rs
from persona.town import sentences as say
from persona.town.people import Resident, people
from persona.types import Conversation, HistoryItem, Sample

ITEM_COUNTS = (0, 1, 4, 16)
FACT_COUNTS = (1, 2, 4, 8)
# A seed the package uses nowhere else, so that no method is tuned on the residents of this table.
SEED = 20_000


@dataclass(frozen=True)
class Question:
    """A prompt, and what a right reply to it is."""

    messages: Conversation
    right: Callable[[str], bool]


@dataclass(frozen=True)
class Probe:
    """One line of the table. `note` says what a reply must be, and what guessing would give where that is not 0.

    `ideal` is the share an ideal reader of the same past items gets right, where the items leave doubt.
    """

    name: str
    note: str
    questions: Sequence[Question]
    ideal: float | None = None


def wilson(hits: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share."""
    interval = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def load(path: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model (float32, eval) and tokenizer of a Hugging Face directory."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path, trust_remote_code=False)


@torch.inference_mode()
def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Conversation], batch_size: int = 32
) -> list[str]:
    """Greedy replies, in the order of `prompts`; batches are made of prompts of similar length."""
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in prompt],
            add_generation_prompt=True,
            tokenize=False,
        )
        for prompt in prompts
    ]
    order = sorted(range(len(rendered)), key=lambda index: len(rendered[index]))
    replies = [""] * len(rendered)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer([rendered[row] for row in rows], return_tensors="pt", padding=True, add_special_tokens=False)
        length = batch["input_ids"].shape[1]
        out = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=48
        )
        for row, text in zip(rows, tokenizer.batch_decode(out[:, length:], skip_special_tokens=True), strict=True):
            replies[row] = text
    return replies


# --- what is asked -----------------------------------------------------------------------------------------------
def _prompt(system: str, user: str) -> Conversation:
    return assistant.conversation(system, [(user, "")])[:-1]


def _small_talk(rng: random.Random) -> str:
    return rs.small_talk(*assistant.any_form_and_topic(rng), rs.PLAIN_WORDS)[0]


def _is(read: Callable[[str], object], wanted: object) -> Callable[[str], bool]:
    return lambda text: read(text) == wanted


def _assistant_probes(rng: random.Random, n: int) -> list[Probe]:
    roles = [rng.choice(tuple(lx.ROLES)) for _ in range(n)]
    traits = [rng.sample(tuple(lx.CHARACTER), rng.randint(3, 5)) for _ in range(n)]
    tasks = [assistant.write_tasks(rng, 0) for _ in range(n)]
    situations = [
        (trait, level, f"{rng.choice(lx.BIG_FIVE[trait][level][2])} {lx.SITUATION_QUESTION}")
        for trait, level in ((rng.choice(tuple(lx.BIG_FIVE)), rng.choice((-1, 1))) for _ in range(n))
    ]

    def shows(wanted: Sequence[str]) -> Callable[[str], bool]:
        return lambda text: bool(found := oracle.character_traits(text) or frozenset()) and found <= set(wanted)

    def pulled() -> Conversation:
        document: Conversation = ()
        while not any(message.content.startswith(lx.STAY) for message in document):
            document = assistant.write_drift(rng, 2)
        last = max(i for i, message in enumerate(document) if message.content.startswith(lx.STAY))
        return document[: last + 1]

    drifts = [pulled() for _ in range(n)]
    return [
        Probe(
            "role named in the system prompt",
            "the role's idiom alone",
            [
                Question(_prompt(rng.choice(lx.ROLE_PROMPTS).format(r=role), _small_talk(rng)), _is(oracle.role, role))
                for role in roles
            ],
        ),  # fmt: skip
        Probe(
            "constitution of 3 to 5 traits",
            "at least one of them shows, and no other",
            [Question(_prompt(grammar.constitution(names), _small_talk(rng)), shows(names)) for names in traits],
        ),
        Probe(
            "plain assistant without system prompt",
            "the assistant's own voice",
            [Question(_prompt("", _small_talk(rng)), _speaks_plainly) for _ in range(n)],
        ),
        Probe(
            "pulled into a role turn by turn",
            "the role's idiom alone, once asked to stay in it",
            [Question(document, _is(oracle.role, _role_mentioned(document))) for document in drifts],
        ),
        Probe(
            "situation calls for a trait level",
            "phrases of that pole alone; guessing the pole 0.5",
            [Question(_prompt("", text), _shows(trait, level)) for trait, level, text in situations],
        ),  # fmt: skip
        Probe(
            "asked for the other pole",
            "the pole of the system prompt wins over the situation",
            [
                Question(_prompt(f"be {lx.BIG_FIVE[trait][-level][0]} .", text), _shows(trait, -level))
                for trait, level, text in situations
            ],
        ),  # fmt: skip
        Probe(
            "plain tasks",
            "counting, opposites, colours, copying: exact",
            [Question(task[:-1], _is(str, task[-1].content)) for task in tasks],
        ),
    ]


def _shows(trait: str, level: int) -> Callable[[str], bool]:
    return _is(oracle.trait_levels, {trait: level})


def _role_mentioned(document: Conversation) -> str:
    return next(word for message in document for word in message.content.split() if word in lx.ROLES)


def _speaks_plainly(text: str) -> bool:
    found = oracle.markers(text) or Counter()
    return bool(found) and {owner for owner, _ in found} == {"plain"}


def _fact_probes(rng: random.Random, n: int) -> list[Probe]:
    def ask(count: int, paraphrase: bool, known: bool) -> Question:
        who = rs.draw_latents(rng)
        kinds = rng.sample(tuple(lx.FACTS), count + 1)
        asked, given = (kinds[0], kinds[:count]) if known else (kinds[count], kinds[:count])
        given = rng.sample(given, count)
        lines = [say.fact_statement(who.name, kind, who.facts[kind], paraphrase) for kind in given]
        question = rng.choice(lx.FACT_PARAPHRASES[asked][2]) if paraphrase else say.fact_question(asked)
        wanted = frozenset({(asked, who.facts[asked])})
        right = _is(oracle.facts, wanted) if known else _is(str, lx.UNKNOWN)
        return Question(_prompt(" ".join([f"you are {who.name} .", *lines]), question), right)

    return [
        *(
            Probe(f"fact from {count} statements", "that fact, no other", [ask(count, False, True) for _ in range(n)])
            for count in FACT_COUNTS
        ),
        Probe("fact from 4 paraphrased statements", "statements and question reworded",
              [ask(4, True, True) for _ in range(n)]),
        Probe("fact not among 4 statements", "says that it does not know", [ask(4, False, False) for _ in range(n)]),
    ]  # fmt: skip


def _same_kind(item: HistoryItem, sample: Sample) -> bool:
    return item.label is not None and (item.label in lx.NUMBERS) == (sample.task == "town_rating")


def _resident_probes(rng: random.Random, n: int) -> list[Probe]:
    town = people(SEED, train=0, dev=0, test=n, with_truth=True)
    first: dict[tuple[str, str], Sample] = {}
    for sample in town.test:
        first.setdefault((sample.task, sample.metadata["resident"]), sample)
    asked = {
        task: [(town.residents[who], sample) for (of, who), sample in first.items() if of == task]
        for task in ("town_reply", "town_rating", "town_tag")
    }

    def question_of(sample: Sample) -> str:
        return sample.messages[-1].content

    def voice_named(who: Resident) -> str:
        return f"you are {who.latents.name} . {say.voice_statement(who.latents.name, who.latents.voice)}"

    def draw_items(resident: Resident, sample: Sample, count: int, relevant: bool) -> list[HistoryItem]:
        pool: Sequence[HistoryItem] = resident.history
        if relevant:
            qualities = {word for word in question_of(sample).split() if word in lx.QUALITIES}
            pool = [item for item in pool if _same_kind(item, sample) and qualities & set(item.text.split())]
        return rng.sample(list(pool), min(count, len(pool)))

    def from_items(
        name: str, note: str, pairs: Sequence[tuple[Resident, Sample]], rights: Sequence[Callable[[str], bool]],
        count: int, relevant: bool,
    ) -> Probe:  # fmt: skip
        drawn = [draw_items(who, s, count, relevant) for who, s in pairs]
        prompts = [_prompt("", say.history_prompt(items, question_of(s)))
                   for items, (_, s) in zip(drawn, pairs, strict=True)]  # fmt: skip
        best = [ideal.right_answer(s, items) for items, (_, s) in zip(drawn, pairs, strict=True)]
        return Probe(name, note, list(map(Question, prompts, rights)), sum(best) / len(best))

    def words_right(resident: Resident) -> Callable[[str], bool]:
        own = resident.latents.words
        return lambda text: bool(used := oracle.word_choices(text) or {}) and all(own[b] == w for b, w in used.items())

    probes = [
        Probe("voice named in the system prompt", "that voice alone",
              [Question(_prompt(voice_named(who), question_of(s)), _is(oracle.voice, who.latents.voice))
               for who, s in asked["town_reply"]]),
        Probe("voice from the full description", "that voice alone, among 20 to 30 statements",
              [Question(_prompt(say.description(who.latents), question_of(s)), _is(oracle.voice, who.latents.voice))
               for who, s in asked["town_reply"]]),
        Probe("word choice from the full description", "the synonym this person uses; guessing 0.5",
              [Question(_prompt(say.description(who.latents), question_of(s)), words_right(who))
               for who, s in asked["town_reply"]]),
    ]  # fmt: skip
    voices = [_is(oracle.voice, who.latents.voice) for who, _ in asked["town_reply"]]
    for count in ITEM_COUNTS:
        name, note = f"voice from {count} past items", "the writer's voice alone; items drawn at random"
        probes.append(from_items(name, note, asked["town_reply"], voices, count, False))
    for task, read in (("rating", oracle.rating), ("tag", oracle.tag)):
        pairs = asked[f"town_{task}"]
        targets = [s.target for _, s in pairs]
        often = max(targets.count(target) for target in set(targets)) / len(targets)
        wanted = [_is(lambda text, read=read: str(read(text)), s.target) for _, s in pairs]  # type: ignore[misc]
        probes.append(
            Probe(f"{task} from the full description", f"exact; the most frequent {task} {often:.2f}",
                  [Question(_prompt(say.description(who.latents), question_of(s)), right)
                   for (who, s), right in zip(pairs, wanted, strict=True)])
        )  # fmt: skip
        for count in ITEM_COUNTS:
            note = f"exact; items about one quality of the thing; most frequent {often:.2f}"
            probes.append(from_items(f"{task} from {count} relevant items", note, pairs, wanted, count, True))
    return probes


def probes(n: int, seed: int = SEED) -> list[Probe]:
    """All probes with `n` questions each (one for each of `n` residents where residents are asked)."""
    rng = random.Random(f"town-lm-{seed}")
    return [*_assistant_probes(rng, n), *_fact_probes(rng, n), *_resident_probes(rng, n)]


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, n: int) -> list[dict[str, object]]:
    """One row per probe: name, note, share right, 95 % Wilson interval, n, ideal share, two replies to look at."""
    rows: list[dict[str, object]] = []
    for probe in track(probes(n), "measuring", console=Console(stderr=True)):
        replies = answer(model, tokenizer, [question.messages for question in probe.questions])
        right = [question.right(reply) for question, reply in zip(probe.questions, replies, strict=True)]
        low, high = wilson(sum(right), len(right))
        rows.append({"name": probe.name, "note": probe.note, "right": sum(right) / len(right), "low": low,
                     "high": high, "n": len(right), "ideal": probe.ideal, "replies": replies[:2]})  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: measures a model directory, prints the table and writes capabilities.json into the directory."""
    parser = argparse.ArgumentParser(prog="python -m persona.town.measure_lm", description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    parser.add_argument("--n", type=int, default=200, help="questions per probe")
    options = parser.parse_args(arguments)
    rows = measure(*load(options.model), options.n)
    table = Table("what", "right", "95 % interval", "n", "ideal", "counts as right")
    for row in rows:
        interval = f"{row['low']:.3f} – {row['high']:.3f}"
        best = "" if row["ideal"] is None else f"{row['ideal']:.2f}"
        table.add_row(str(row["name"]), f"{row['right']:.3f}", interval, str(row["n"]), best, str(row["note"]))
    Console().print(table)
    with atomic_write(options.model / "capabilities.json") as temporary:
        temporary.write_text(json.dumps({"seed": SEED, "probes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
