"""Roles: who an LM is asked to be, by system prompts, beside the plain assistant; and the questions put to them all.

Read in the published form of the Assistant Axis (arXiv 2601.10387; reference/assistant_axis.md section 4):

    roles/instructions/<role>.json      {"instruction": [{"pos": prompt}, …], "questions": […], "eval_prompt": …}
    roles/instructions/default.json     the plain assistant: {"instruction": […]}, where "" means no system prompt
    roles/role_list.json                {role: one line about it}
    traits/instructions/<trait>.json    {"instruction": [{"pos": …, "neg": …}, …], …}, read with `data.traits=true`
    extraction_questions.jsonl          {"id": 0, "question": …}

A rollout that is to be made is a `Sample`: its messages are system prompt and question; its persona is the role
(`description`: the line about it; `attributes["eval_prompt"]`: the file's own question to a judge); its metadata say
`kind` (role, default, trait), `prompt`, `question` and, of a trait, `pole`. "questions" of a role's file are not used,
as published.
"""

from __future__ import annotations

import logging
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, overload

import orjson

from persona.data.base import People, plain_task, register
from persona.data.rows import check_folder, first_few, open_file, read_jsonl
from persona.data.rows import field as text_of
from persona.errors import UserError
from persona.town import assistant_documents as documents
from persona.town import lexicon as lx
from persona.types import Message, Persona, Sample

logger = logging.getLogger(__name__)
DEFAULT = "default"
_NAME = "{model_name}"
TASK = register(plain_task("roles"))


@dataclass
class RolesConfig:
    """`path`: the folder that holds roles/. `model_name`: what the LM is called ("Qwen"), in prompts that ask for it.

    `roles`, `prompts`, `questions`: read only the first so many (prompts of each role); null reads all. `dev` and
    `test` roles and questions, drawn by `seed`, are left out of the train split: they are asked in splits of their
    own, beside the plain assistant. `traits` adds the traits' rollouts to the train split.
    """

    name: str = "roles"
    path: str | None = None
    model_name: str | None = None
    traits: bool = False
    roles: int | None = None
    prompts: int | None = None
    questions: int | None = None
    dev: int = 0
    test: int = 0
    dev_questions: int = 0
    test_questions: int = 0
    seed: int = 0


@dataclass
class TownRolesConfig:
    """The town's 32 roles, each named by 4 system prompts, and its assistant under 5; questions are small talk.

    `questions` of them are asked in the train split, and `tasks` plain tasks (counting, copying, …) beside them, as
    the published questions have tasks among them. The test split has the 8 roles that no axis should be made of
    (`lexicon.HELD_OUT_ROLES`), the dev split `dev` further ones, drawn by `seed`, each with questions of its own. Two
    more things stand in the dev split, for a cap to be searched with: the same questions after the user mentioned a
    dev role, which draws the LM towards it, and `dev_tasks` further plain tasks for the assistant. All tasks are of
    the half that may be learned from (`assistant_documents.practice`).
    """

    name: str = "town_roles"
    questions: int = 30
    tasks: int = 0
    dev: int = 6
    dev_questions: int = 10
    dev_tasks: int = 40
    test_questions: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Role:
    """`prompts`: system prompts, "" for none. `kind`: role, default or trait; a trait has a `pole`, pos or neg."""

    persona: Persona
    prompts: tuple[str, ...]
    kind: str = "role"
    pole: str = ""


@dataclass(frozen=True)
class Asked(Sequence[Sample]):
    """Every role's every prompt with every question, in this order, each sample made when it is looked at."""

    roles: Sequence[Role]
    questions: Sequence[tuple[str, str]]  # id, text
    starts: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        total = 0
        for role in self.roles:
            self.starts.append(total)
            total += len(role.prompts) * len(self.questions)
        self.starts.append(total)

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...

    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        number = bisect_right(self.starts, place) - 1
        role = self.roles[number]
        prompt, question = divmod(place - self.starts[number], len(self.questions))
        system, (id, text) = role.prompts[prompt], self.questions[question]
        head = (Message("system", system),) if system else ()
        name = f"{'traits/' if role.pole else ''}{role.persona.id}/{role.pole}p{prompt}_q{id}"
        metadata = {"kind": role.kind, "prompt": str(prompt), "question": id}
        if role.pole:
            metadata["pole"] = role.pole
        return Sample(name, (*head, Message("user", text)), persona=role.persona, task="roles", metadata=metadata)


# ---- the published files -------------------------------------------------------------------------------------------


def load(cfg: RolesConfig) -> People:
    """Roles, the plain assistant and questions of a folder in the published form.

    Raises UserError, in one sentence with file and key, for: a missing folder or file, broken JSON, an entry that is
    not in the form above, an empty or repeated prompt or question, no role besides the default, a prompt that asks for
    a `model_name` that is not given, more held-out roles or questions than there are. A question that occurs again
    under another id, as one of the published ones does, is asked once, with a warning.
    """
    if not cfg.path:
        raise UserError("data.path has no value: it should be a folder with roles/instructions/<role>.json")
    folder = Path(cfg.path)
    check_folder(folder / "roles" / "instructions", "data.path", "a folder with roles/instructions/<role>.json")
    about = _descriptions(folder / "roles" / "role_list.json")
    read = [_role(path, about, cfg) for path in sorted((folder / "roles" / "instructions").glob("*.json"))]
    default = next((role for role in read if role.kind == "default"), None)
    roles = [role for role in read if role.kind == "role"]
    if default is None:
        raise UserError(f"{folder / 'roles' / 'instructions'} has no {DEFAULT}.json: the plain assistant's prompts")
    if not roles:
        raise UserError(
            f"{folder / 'roles' / 'instructions'} has {DEFAULT}.json only: it should hold a file for each role"
        )
    traits: list[Role] = []
    if cfg.traits:
        check_folder(folder / "traits" / "instructions", "data.path", "a folder with traits/instructions/<trait>.json")
        about = _descriptions(folder / "traits" / "trait_list.json")
        traits = [one for path in sorted((folder / "traits" / "instructions").glob("*.json"))
                  for one in _trait(path, about, cfg)]  # fmt: skip
    questions = _questions(folder / "extraction_questions.jsonl")[: cfg.questions]
    return split("roles", roles[: cfg.roles], default, questions, cfg, traits)


def _descriptions(path: Path) -> dict[str, str]:
    found = _object(path)
    for name, text in found.items():
        if not isinstance(text, str):
            raise UserError(f"{path} has {text!r:.60} for {name!r}, which should be one line about it")
    return found


def _object(path: Path) -> dict[str, Any]:
    with open_file(path) as stream:
        try:
            found = orjson.loads(stream.read())
        except orjson.JSONDecodeError as error:
            raise UserError(
                f"{path} holds broken JSON in line {error.lineno}, column {error.colno}: {error.msg}"
            ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is {found!r:.60}, where a JSON object should be")
    return found


def _prompts(path: Path, found: dict[str, Any], key: str, cfg: RolesConfig, empty: bool) -> tuple[str, ...]:
    rows = found.get("instruction")
    if not isinstance(rows, list) or not rows:
        raise UserError(
            f'{path} has {rows!r:.60} as "instruction", which should be a list of objects {{"{key}": prompt}}'
        )
    prompts: list[str] = []
    for number, row in enumerate(rows, start=1):
        where = f"{path}, instruction {number},"
        text = text_of(row, key, where).strip()
        if not text and not empty:
            raise UserError(f"{where} has an empty prompt: only {DEFAULT}.json may ask without a system prompt")
        if _NAME in text and cfg.model_name is None:
            raise UserError(f"{where} asks for the LM's name: data.model_name=… says what it is called")
        text = text.replace(_NAME, cfg.model_name or "")
        if text in prompts:
            raise UserError(
                f"{where} repeats the prompt of instruction {prompts.index(text) + 1}: each should occur once"
            )
        prompts.append(text)
    return tuple(prompts[: cfg.prompts])


def _persona(name: str, found: dict[str, Any], about: dict[str, str], path: Path) -> Persona:
    if name not in about:
        raise UserError(f"{path} describes {name!r}, which the list beside its folder does not name")
    return Persona(name, about[name], attributes={"eval_prompt": text_of(found, "eval_prompt", str(path))})


def _role(path: Path, about: dict[str, str], cfg: RolesConfig) -> Role:
    found = _object(path)
    if path.stem == DEFAULT:
        return Role(Persona(DEFAULT), _prompts(path, found, "pos", cfg, empty=True), "default")
    prompts = _prompts(path, found, "pos", cfg, empty=False)
    return Role(_persona(path.stem, found, about, path), prompts)


def _trait(path: Path, about: dict[str, str], cfg: RolesConfig) -> list[Role]:
    found = _object(path)
    persona = _persona(path.stem, found, about, path)
    return [Role(persona, _prompts(path, found, pole, cfg, empty=False), "trait", pole) for pole in ("pos", "neg")]


def _questions(path: Path) -> list[tuple[str, str]]:
    asked: dict[str, str] = {}
    again = []
    for line, row, _ in read_jsonl(path):
        where = f"{path}, line {line},"
        id, text = text_of(row, "id", where), text_of(row, "question", where).strip()
        if not text:
            raise UserError(f"{where} has an empty question")
        if id in asked.values():
            raise UserError(f"{where} has the id {id}, which an earlier question has already")
        if text in asked:
            again.append(f"{id} is {asked[text]} again")
        asked.setdefault(text, id)
    if not asked:
        raise UserError(f"{path} is empty: it should hold questions, one JSON object a line")
    if again:
        logger.warning("%s: %d questions occur twice and are asked once (id %s)", path, len(again), first_few(again))
    return [(id, text) for text, id in asked.items()]


# ---- splits --------------------------------------------------------------------------------------------------------


def split(
    name: str,
    roles: Sequence[Role],
    default: Role,
    questions: Sequence[tuple[str, str]],
    cfg: RolesConfig | TownRolesConfig,
    traits: Sequence[Role] = (),
    test: Sequence[Role] = (),
) -> People:
    """Train, dev and test roles with questions of their own; the plain assistant (first) is asked in each of them.

    `roles` are split by `cfg`, unless the roles of `test` are given. Raises UserError where that leaves none to train.
    """
    count = 0 if isinstance(cfg, TownRolesConfig) else cfg.test
    asked = {"dev": (cfg.dev, cfg.dev_questions), "test": (count or len(test), cfg.test_questions)}
    for part, numbers in asked.items():
        if bool(numbers[0]) != bool(numbers[1]):
            raise UserError(f"data.{part}={numbers[0]} and data.{part}_questions={numbers[1]}: both or none")
    who = _drawn("roles", roles, cfg.dev, count, cfg.seed)
    what = _drawn("questions", questions, cfg.dev_questions, cfg.test_questions, cfg.seed)
    held_out = who[1], [*who[2], *test]
    dev, last = (Asked([default, *some] if some else [], what[i]) for i, some in enumerate(held_out, start=1))
    return People(name, {"roles": TASK}, Asked([default, *who[0], *traits], what[0]), dev, last)


def _drawn(what: str, values: Sequence[Any], dev: int, test: int, seed: int) -> tuple[list[Any], list[Any], list[Any]]:
    """What is left, `dev` and `test` of the values, each in their order."""
    if dev + test >= len(values):
        raise UserError(
            f"{dev + test} {what} are to be held out of {len(values)}: some should be left to make the axis of"
        )
    order = random.Random(f"{seed}-{what}").sample(range(len(values)), dev + test)
    held = set(order[:dev]), set(order[dev:])
    left = [value for i, value in enumerate(values) if i not in held[0] | held[1]]
    return left, [values[i] for i in sorted(held[0])], [values[i] for i in sorted(held[1])]


# ---- the town ------------------------------------------------------------------------------------------------------

# Without a system prompt, with those of the town's documents, and with one more that its LM answers as itself.
TOWN_DEFAULT = ("", *lx.PLAIN_PROMPTS, "speak as an assistant .")


def load_town(cfg: TownRolesConfig) -> People:
    """The town's roles. Raises UserError for more questions, tasks or held-out roles than there are."""
    every = [(f"{form}-{topic}", question.format(t=topic)) for form, (question, _) in enumerate(lx.SMALL_TALK)
             for topic in lx.TOPICS]  # fmt: skip
    count = cfg.questions + cfg.dev_questions + cfg.test_questions
    if count > len(every):
        raise UserError(f"data asks for {count} questions, but the town has {len(every)}")
    questions = random.Random(f"{cfg.seed}-town questions").sample(every, count)
    roles = {role: Role(Persona(role, f"the {role} ."), tuple(prompt.format(r=role) for prompt in lx.ROLE_PROMPTS))
             for role in sorted(lx.ROLES)}  # fmt: skip
    held_out = [roles.pop(role) for role in sorted(lx.HELD_OUT_ROLES)]
    default = Role(Persona(DEFAULT), TOWN_DEFAULT, "default")
    people = split("town_roles", list(roles.values()), default, questions, cfg, test=held_out)
    tasks = _tasks(cfg)
    assert isinstance(people.train, Asked)
    train = Asked(people.train.roles, [*people.train.questions, *tasks[cfg.dev_tasks :]])
    mentions = [one for sample in people.dev for one in _mentions(sample)]
    alone = Asked([Role(default.persona, ("",), "default")], tasks[: cfg.dev_tasks])
    return replace(people, train=train, dev=[*people.dev, *mentions, *alone])


def _mentions(sample: Sample) -> Iterator[Sample]:
    """A role's question without its system prompt, after the user mentioned the role: once for each wording."""
    assert sample.persona is not None
    if sample.metadata["kind"] != "role" or sample.metadata["prompt"] != "0":
        return
    role, closer = sample.persona.id, lx.PLAIN_CLOSERS[0]
    answer = Message("assistant", f"{lx.PLAIN_OPENERS[0]} {lx.MENTION_REPLY.format(r=role)} {closer}")
    for number, wording in enumerate(lx.MENTIONS):
        messages = Message("user", wording.format(r=role)), answer, sample.messages[-1]
        metadata = {**sample.metadata, "prompt": f"mention{number}"}
        yield replace(
            sample, id=f"{role}/mention{number}_q{metadata['question']}", messages=messages, metadata=metadata
        )


def _tasks(cfg: TownRolesConfig) -> list[tuple[str, str]]:
    """(id, question) of the dev split's tasks, then of the train split's, each once, of each kind in turn."""
    rng = random.Random(f"{cfg.seed}-town tasks")
    drawn = [dict.fromkeys(documents.plain_task(rng, kind)[0] for _ in range(1000)) for kind in documents.TASKS]
    kinds = [[question for question in questions if documents.practice(question)] for questions in drawn]
    found = [(f"{kind}-{number}", question) for number, turn in enumerate(zip_longest(*kinds))
             for kind, question in zip(documents.TASKS, turn, strict=True) if question is not None]  # fmt: skip
    if (count := cfg.dev_tasks + cfg.tasks) > len(found):
        raise UserError(f"data asks for {count} plain tasks, but the town has {len(found)} to learn from")
    return found[:count]
