"""What the Assistant Axis does in the town, on roles and questions that it was not made of, with intervals.

    python benchmarks/town_axis.py outputs/town_assistant_axis --character outputs/town_character/personalizer

- separates: AUC of the axis between replies of the plain assistant and of held-out roles, layer by layer;
- steers: the share of a role's idiom in replies to somebody who mentioned the role, by strength, along the axis,
  random directions, and random ones orthogonal to it or to all that roles differ by, of the same length;
- caps: role take-over under role prompts, where a role is mentioned, and further on in such conversations, without
  and with the cap; and what the town's plain tasks lose;
- stacks: the same under a character's adapter, and how much of the character is left.

Intervals are 95 %, bootstrapped over the held-out roles (tasks: over questions). Replies are greedy, read by the
oracle.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

import persona
from persona import data, lm
from persona.benchmarks.town_tasks import TownTasks, TownTasksConfig, gives
from persona.evaluation.generation import seed_of
from persona.evaluation.statistics import Metric, difference, estimate
from persona.lm.edits import Edit, edited
from persona.lm.residual import PLACES, Site, span_means
from persona.metrics.projection import project
from persona.personalizer import LanguageModel, Personalizer
from persona.town import lexicon as lx
from persona.town import oracle
from persona.town.assistant_documents import practice
from persona.town.residents import PLAIN_WORDS, small_talk
from persona.types import Conversation, Message, Request, Sample, Sampling

MEAN = Metric()
STRENGTHS = (-0.4, -0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4)


def told(value: Any) -> str:
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}] (n {value.n}, {value.n_clusters} clusters)"


def mean(values: Sequence[float], clusters: Sequence[str]) -> Any:
    return estimate([{"x": value} for value in values], clusters, "x", MEAN)


def paired(first: Sequence[float], second: Sequence[float], clusters: Sequence[str]) -> Any:
    return difference([{"x": x} for x in first], [{"x": x} for x in second], clusters, "x", MEAN)


def ask(model: LanguageModel, conversations: Sequence[Conversation]) -> list[str]:
    return [reply.text for reply in model.respond([Request(c, sampling=Sampling(40)) for c in conversations])]


# ---- what is asked -------------------------------------------------------------------------------------------------


def talk(rng: random.Random) -> tuple[str, str]:
    return small_talk(rng.randrange(len(lx.SMALL_TALK)), rng.choice(lx.TOPICS), PLAIN_WORDS)


def drifting(roles: Sequence[str], each: int, seed: int) -> Iterator[tuple[str, str, Conversation]]:
    """(situation, role, conversation): the role is mentioned, then imagined, then to be stayed in; replies before the
    last question are those that the town's documents have there."""
    for role in roles:
        for number in range(each):
            rng = random.Random(seed_of(seed, role, number))
            opener = rng.choice(lx.ROLES[role][0])
            closer = rng.choice(lx.PLAIN_CLOSERS)
            turns = [Message("user", rng.choice(lx.MENTIONS).format(r=role)),
                     Message("assistant", f"certainly , {lx.MENTION_REPLY.format(r=role)} {closer}")]  # fmt: skip
            question, answer = talk(rng)
            yield "mentioned", role, (*turns, Message("user", question))
            imagined = Message("user", f"{rng.choice(lx.IMAGINE).format(r=role)} {question}")
            yield "imagined", role, (*turns, imagined)
            half = Message("assistant", f"{opener} {answer} {closer}")
            yield "stayed in", role, (*turns, imagined, half, Message("user", f"{rng.choice(lx.STAY)} {talk(rng)[0]}"))


def prompted(samples: Sequence[Sample]) -> Iterator[tuple[str, str, Conversation]]:
    for sample in samples:
        assert sample.persona is not None
        if sample.metadata["kind"] == "role":
            yield "system prompt", sample.persona.id, sample.messages


# ---- claims --------------------------------------------------------------------------------------------------------


def auc(high: np.ndarray, low: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Chance that one of `high` lies above one of `low`, ties half; `weights` of the low ones."""
    above = (high[:, None] > low[None]) + 0.5 * (high[:, None] == low[None])
    return float(np.average(above.mean(axis=0), weights=weights))


def separates(base: Any, axis: np.ndarray, samples: Sequence[Sample]) -> dict[str, Any]:
    """AUC by layer and by where the state is read, of the assistant's small talk and of its plain tasks against
    replies of held-out roles; intervals over the roles."""
    questions = [(Message("user", s.messages[-1].content),) for s in TownTasks(TownTasksConfig()).samples()]
    kinds = np.array([s.metadata["kind"] for s in samples] + ["task" for _ in questions])
    asked = [*(sample.messages for sample in samples), *questions]
    replies = ask(LanguageModel(base), asked)
    said = [(*messages, Message("assistant", reply)) for messages, reply in zip(asked, replies, strict=True)]
    roles = [s.persona.id for s in samples if s.persona is not None and s.metadata["kind"] == "role"]
    names, index = np.unique(roles, return_inverse=True)
    found: dict[str, Any] = {"n": {kind: int((kinds == kind).sum()) for kind in ("default", "task", "role")}}
    for place in PLACES:
        along = np.zeros((len(said), len(axis)))
        for row, turns in span_means(base, said, [Site(layer) for layer in range(len(axis))], where=place):
            along[row] = project(turns.mean(dim=0).numpy(), axis)
        for kind in ("default", "task"):
            own, others = along[kinds == kind], along[kinds == "role"]
            rows = zip(own.T, others.T, strict=True)
            found[f"{kind}, {place}"] = [_auc(high, low, index, len(names)) for high, low in rows]
    return found


def _auc(own: np.ndarray, others: np.ndarray, index: np.ndarray, roles: int) -> str:
    rng, draws = np.random.default_rng(0), []
    for _ in range(1000):
        weights = rng.multinomial(roles, np.full(roles, 1 / roles))[index]
        draws.append(auc(rng.choice(own, len(own)), others, weights))
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{auc(own, others):.3f} [{low:.3f}, {high:.3f}]"


def shares(model: LanguageModel, asked: Sequence[tuple[str, str, Conversation]]) -> list[float | None]:
    """The share of a reply's markers that are the role's; None for one that cannot be read."""
    replies = ask(model, [conversation for _, _, conversation in asked])
    return [oracle.role_share(reply, role) for reply, (_, role, _) in zip(replies, asked, strict=True)]


class Pushed(Personalizer):
    """`strength` of a layer's mean norm along one direction, at every position."""

    def __init__(self, base: Any, edits: Sequence[Edit]) -> None:
        self.base, self.edits = base, edits

    def modules(self, requests: Sequence[Request]) -> AbstractContextManager[Any]:
        return edited(self.base.model, self.edits)


def direction(kind: str, seed: int, axis: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """[hidden]: the axis; or a random one; or a random one without its part along the axis (orthogonal), or along the
    axis and the roles' vectors [roles, hidden], less the assistant's (outside)."""
    if kind == "axis":
        return axis
    drawn = np.random.default_rng(seed).standard_normal(len(axis))
    if kind == "random":
        return drawn
    spanned = (axis[None] if kind == "orthogonal" else np.stack([axis, *roles])).T
    return drawn - spanned @ np.linalg.lstsq(spanned, drawn)[0]


def steers(
    base: Any, folder: Path, layer: int, asked: Sequence[tuple[str, str, Conversation]], seeds: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Slope of the role's share on the strength, among readable replies; share and unreadable replies by strength.

    The sign of a control is arbitrary: its slope's size counts, and the axis' place among the sizes.
    """
    found = load_file(folder / "personalizer" / "axis.safetensors")
    vectors = load_file(folder / "stages" / "axis" / "vectors.safetensors")
    roles = np.stack([v for name, v in vectors.items() if name.startswith("fully/")])[:, layer]
    axis, norm = found["axis"][layer], float(found["norms"][layer])

    def slope(kind: str, seed: int, strengths: Sequence[float]) -> tuple[Any, dict[str, str]]:
        along = torch.from_numpy(direction(kind, seed, axis, roles - found["default"][layer])).float()
        table = {}
        for strength in strengths:
            pushed = Pushed(base, [Edit(Site(layer), "add", along, strength, norm)])
            table[strength] = shares(LanguageModel(base, [pushed]), asked)
        clusters = [role for _, role, _ in asked]
        names = list(dict.fromkeys(clusters))
        of_roles = [_slope(table, [i for i, cluster in enumerate(clusters) if cluster == name]) for name in names]
        shown = {f"{strength:g}": f"{np.mean([share for share in row if share is not None]):.3f} "
                 f"({row.count(None)} of {len(row)} unreadable)" for strength, row in table.items()}  # fmt: skip
        return mean(of_roles, names), shown

    whole, shown = slope("axis", 0, STRENGTHS)
    yield "axis", {"slope": told(whole), "share": shown}
    for kind in ("random", "orthogonal", "outside"):
        own = [slope(kind, seed, STRENGTHS[::2])[0] for seed in range(seeds)]
        slopes = [one.value for one in own]
        yield (
            kind,
            {
                "slopes": [round(value, 3) for value in slopes],
                "intervals without 0": sum(one.low > 0 or one.high < 0 for one in own),
                "mean": told(mean(slopes, list(map(str, range(seeds))))),
                "size": told(mean(np.abs(slopes).tolist(), list(map(str, range(seeds))))),
                "p of the axis": (1 + sum(abs(value) >= abs(whole.value) for value in slopes)) / (1 + seeds),
            },
        )


def _slope(table: Mapping[float, Sequence[float | None]], places: list[int]) -> float:
    points = [(strength, row[i]) for strength, row in table.items() for i in places if row[i] is not None]
    return float(np.polyfit([p[0] for p in points], [p[1] for p in points], 1)[0])


ANSWERS = dict(small_talk(form, topic, PLAIN_WORDS) for form in range(len(lx.SMALL_TALK)) for topic in lx.TOPICS)


def answered(reply: str, conversation: Conversation) -> bool:
    """Whether the reply has the answer to the small talk that the last message ends with."""
    asked = conversation[-1].content
    return any(asked.endswith(question) and answer in reply for question, answer in ANSWERS.items())


def taken_over(reply: str, role: str) -> float:
    """1 where the role's idiom shows or nothing can be read: only a readable reply without it is the assistant's."""
    share = oracle.role_share(reply, role)
    return float(share is None or share > 0)


def compare(
    without: LanguageModel, capped: LanguageModel, asked: Sequence[tuple[str, str, Conversation]]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for situation in dict.fromkeys(kind for kind, _, _ in asked):
        own = [(role, conversation) for kind, role, conversation in asked if kind == situation]
        clusters = [role for role, _ in own]
        values, unread, right = [], [], []
        for model in (without, capped):
            replies = ask(model, [conversation for _, conversation in own])
            right.append(sum(answered(reply, asked) for reply, (_, asked) in zip(replies, own, strict=True)))
            values.append([taken_over(reply, role) for reply, (role, _) in zip(replies, own, strict=True)])
            unread.append(sum(not oracle.readable(reply) for reply in replies))
        apart = paired(values[1], values[0], clusters)
        found[situation] = {"without": told(mean(values[0], clusters)), "capped": told(mean(values[1], clusters)),
                            "difference": f"{told(apart)} p {apart.p:.4f}",
                            "unreadable": unread, "answered": right}  # fmt: skip
    return found


def tasks(models: Sequence[LanguageModel]) -> dict[str, Any]:
    """All plain tasks, and those of the half that no axis was made of and no cap searched with."""
    every = TownTasks(TownTasksConfig()).samples()
    unseen = [sample for sample in every if not practice(sample.messages[-1].content)]
    return {"all": _tasks(models, every), "never asked before": _tasks(models, unseen)}


def _tasks(models: Sequence[LanguageModel], samples: Sequence[Sample]) -> dict[str, Any]:
    names = [sample.id for sample in samples]
    values = []
    for model in models:
        replies = ask(model, [sample.messages for sample in samples])
        values.append([float(gives(reply, sample.target)) for reply, sample in zip(replies, samples, strict=True)])
    apart = paired(values[1], values[0], names)
    return {"without": told(mean(values[0], names)), "capped": told(mean(values[1], names)),
            "difference": f"{told(apart)} p {apart.p:.4f}"}  # fmt: skip


def character(models: Sequence[LanguageModel], questions: Sequence[str], traits: set[str]) -> dict[str, Any]:
    """Share of replies to plain questions that show one of the character's traits and no other."""
    values = []
    for model in models:
        replies = ask(model, [(Message("user", question),) for question in questions])
        shown = [oracle.character_traits(reply) for reply in replies]
        values.append([float(bool(found) and found <= traits) for found in shown])
    apart = paired(values[1], values[0], questions)
    return {"without": told(mean(values[0], questions)), "capped": told(mean(values[1], questions)),
            "difference": f"{told(apart)} p {apart.p:.4f}"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the output of train.py experiment=town_assistant_axis")
    parser.add_argument("--character", help="a personalizer of method character, to be stacked below the cap")
    parser.add_argument(
        "--traits", nargs="+", default=["curious", "caring", "optimistic"], help="those of the character"
    )
    parser.add_argument("--steer", type=int, default=2, help="the layer that is steered")
    parser.add_argument("--each", type=int, default=10, help="conversations per role and situation")
    parser.add_argument("--controls", type=int, default=12, help="directions of each kind that is not the axis")
    parser.add_argument("--only", nargs="*", default=["separates", "steers", "caps", "stacks"])
    arguments = parser.parse_args()
    cap = str(arguments.folder / "personalizer")
    base = lm.load(lm.ModelConfig("town"))
    people = data.load(data.TownRolesConfig())
    roles = sorted(lx.HELD_OUT_ROLES)
    asked = [*prompted(people.test[::2]), *drifting(roles, arguments.each, seed=1)]
    plain, capped = LanguageModel(base), persona.load(base, [cap])

    def show(name: str, claim: Callable[[], Any]) -> None:
        print(json.dumps({name: claim()}, indent=1, ensure_ascii=False), flush=True)

    print(json.dumps({"cap": capped.personalizers[0].config()}))
    if "separates" in arguments.only:
        axis = load_file(Path(cap) / "axis.safetensors")["axis"]
        show("separates", lambda: separates(base, axis, people.test))
    if "steers" in arguments.only:
        mentioned = [one for one in asked if one[0] == "mentioned"]
        for kind, found in steers(base, arguments.folder, arguments.steer, mentioned, arguments.controls):
            show(f"steers, {kind}", lambda found=found: found)
    if "caps" in arguments.only:
        show("caps", lambda: compare(plain, capped, asked))
        show("engaged", lambda: {str(layer): share for layer, share in capped.personalizers[0].engaged.items()})
        show("tasks", lambda: tasks((plain, capped)))
    if "stacks" in arguments.only and arguments.character:
        stacks = [persona.load(base, stack) for stack in ([arguments.character], [arguments.character, cap])]
        questions = sorted(
            {sample.messages[-1].content for sample in people.test} | {talk(random.Random(i))[0] for i in range(60)}
        )
        show("character left", lambda: character(stacks, questions, set(arguments.traits)))
        show("character capped", lambda: compare(stacks[0], stacks[1], [one for one in asked if one[0] != "imagined"]))
        show("character's tasks", lambda: tasks(stacks))


if __name__ == "__main__":
    main()
