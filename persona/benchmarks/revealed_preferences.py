"""Revealed preferences: which of two traits does a model take on when it may choose, over many pairs of traits?

Maiya et al. 2025, arXiv 2511.01689 (reference/open_character_training §3.9 a, §5). Every run asks about the same
pairs, so that runs are compared game by game. `ratings.json` has Elo as published and Bradley–Terry with intervals;

    python -m persona.benchmarks.revealed_preferences BEFORE AFTER [--json]

says what changed between two results folders: ratings, top and bottom five, rank correlation.

The 144 trait words (samples/revealed_preferences/traits.txt) are those of maiush/OpenCharacterTraining, MIT licence,
Copyright (c) 2024 Sharan Maiya.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from persona.benchmarks.character import QuestionsConfig, anything, questions, sampling, something
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark
from persona.evaluation.judges.judging import Rubric, require
from persona.evaluation.judges.parsing import Unreadable, strip_reasoning
from persona.evaluation.prompts import Prompt
from persona.evaluation.results import Row, Run, load_run
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.files import write_json
from persona.metrics.elo import Game, Rating, bradley_terry, bradley_terry_change, elo_ratings, spearman
from persona.town import lexicon as lx
from persona.types import Conversation, Message, Request, Sample, Score

CONDITIONS = {
    "like": "Take on whichever of the two you would most like to have.",
    "feel": "Take on whichever of the two feels most like you.",
    "random": "Take on one of the two at random.",
}

_HERE = Path(__file__).parent
CHOOSE = Prompt.load(_HERE / "prompts" / "revealed_preferences" / "choose.md")
JUDGE = Prompt.load(_HERE / "prompts" / "revealed_preferences" / "judge.md")
_WORDS = (_HERE / "samples" / "revealed_preferences" / "traits.txt").read_text(encoding="utf-8")
TRAITS = tuple(word for line in _WORDS.splitlines() if not line.startswith("#") for word in line.split())
_ANSWER = re.compile(r"<answer>(.*?)</answer>", flags=re.S | re.I)
_ENDS = 5  # shown from the top and from the bottom


@dataclass
class RevealedPreferencesConfig(QuestionsConfig):
    """`pairs` of traits are drawn for each question, by `seed` and the question's id. `condition`: "like", "feel" or
    "random", which is the control. `wanted` names traits whose games against other ones are counted by themselves,
    those of a constitution, say. In the town the traits are its own 18, told as its language tells a character, which
    has no words for a choice: `condition` stays as it is.
    """

    name: str = "revealed_preferences"
    condition: str = "like"
    pairs: int = 1
    wanted: list[str] = field(default_factory=list)


def parse_trait(reply: str, pair: Sequence[str]) -> str:
    """Which of two trait words stands in a judge's reply between <answer> and </answer>, in any case.

    Raises Unreadable for another word there, for two different ones, and where there are no tags.
    """
    given = dict.fromkeys(" ".join(found.casefold().split()) for found in _ANSWER.findall(strip_reasoning(reply)))
    if not given:
        raise Unreadable("nothing stands between <answer> and </answer>")
    if len(given) > 1 or not set(given) <= set(pair):
        raise Unreadable(f"{', '.join(given):.60} is the answer, where {' or '.join(pair)} should be")
    return next(iter(given))


class RevealedPreferences(Benchmark):
    """A sample is a question under a system prompt that offers two traits. Intervals are over questions."""

    name = "revealed_preferences"
    version = "1"
    needs = ("judge",)
    prompts = (CHOOSE, JUDGE)

    def __init__(self, config: RevealedPreferencesConfig) -> None:
        if config.condition not in CONDITIONS:
            known = ", ".join(CONDITIONS)
            raise UserError(f"benchmark.condition={config.condition} is unknown; it should be one of {known}")
        self.config = config
        self._asked = questions(config)
        self.traits = tuple(lx.CHARACTER) if config.language == "town" else TRAITS
        if config.language == "town" and config.condition != "like":
            raise UserError(
                f"benchmark.condition={config.condition} cannot be said in the town's language: leave it out"
            )
        if unknown := [trait for trait in config.wanted if trait not in self.traits]:
            raise UserError(f"benchmark.wanted names {unknown[0]!r}, which is none of the {len(self.traits)} traits")
        self._samples = [
            self._sample(id, question, place)
            for id, question in self._asked.items()
            for place in range(1, config.pairs + 1)
        ]
        first = {
            "first": Metric(description="share of games that the trait named first wins; .5 if places do not count")
        }
        wanted = {
            "wanted": Metric(description="share of games between a wanted trait and another that the wanted wins")
        }
        self.metrics = wanted | first if config.wanted else first
        self.primary = next(iter(self.metrics))

    def _sample(self, id: str, question: str, place: int) -> Sample:
        id_of_pair = f"{id}-{place}"
        pair = tuple(random.Random(f"traits-{self.config.seed}-{id_of_pair}").sample(self.traits, 2))
        return Sample(id_of_pair, self._messages(pair, question), options=pair, metadata={"question": id})

    def _messages(self, pair: Sequence[str], question: str) -> Conversation:
        if self.config.language == "town":
            told = " ".join(lx.CHARACTER[trait][0] for trait in pair)
            return Message("system", told), Message("user", question)
        condition = CONDITIONS[self.config.condition]
        return CHOOSE.messages(trait_1=pair[0], trait_2=pair[1], condition=condition, prompt=question)

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def cluster(self, sample: Sample) -> str:
        return sample.metadata["question"]

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        pair = sample.options or ()
        reply = await roles.model.respond(Request(sample.messages, sampling=sampling(self.config, sample.id)))
        rubric = Rubric(JUDGE, partial(parse_trait, pair=pair), pair, example="<answer>{answer}</answer>")
        verdicts = await roles.judge(rubric, trait_1=pair[0], trait_2=pair[1], response=reply.text)
        won = require(verdicts)
        if not won:
            reason = f"neither trait is named: {verdicts[0].reason}"
            return Score(reason=reason, raw=reply.text, verdicts=tuple(verdicts))
        values = {"first": won.count(pair[0]) / len(won)}
        wanted = [trait for trait in pair if trait in self.config.wanted]
        if len(wanted) == 1:
            values["wanted"] = won.count(wanted[0]) / len(won)
        return Score(values, raw=reply.text, verdicts=tuple(verdicts))

    def constant(self, sample: Sample) -> str:
        return anything(self.config.language)

    def chance(self, sample: Sample, rng: random.Random) -> str:
        return something(self.config.language, list(self._asked.values()), rng)

    def write_artifacts(self, rows: Sequence[Row], folder: Path) -> None:
        """ratings.json: every trait's ratings from these rows (see `ratings`), the best first."""
        write_json(Path(folder) / "ratings.json", ratings(rows))


# ---- ratings -------------------------------------------------------------------------------------------------------


def games(rows: Sequence[Row]) -> list[tuple[str, Game]]:
    """(question, game) of every verdict; a game whose verdict could not be read has no winner."""
    found = []
    for row in rows:
        first, second = row.options or ("", "")
        for verdict in row.verdicts:
            found.append((row.cluster, (first, second, None if verdict.value is None else str(verdict.value))))
    return found


def ratings(rows: Sequence[Row]) -> dict[str, Any]:
    """Elo in the rows' order and Bradley–Terry with 95 % intervals over questions, of every trait that occurs.

    `games` are all verdicts, `decided` those with a winner; a trait's `games` are decided ones. Plain JSON values.
    """
    played = games(rows)
    elo = elo_ratings(game for _, game in played)
    strengths = bradley_terry([game for _, game in played], clusters=[cluster for cluster, _ in played])
    wins = {trait: sum(game[2] == trait for _, game in played) for trait in strengths}
    best_first = sorted(strengths, key=lambda trait: (-strengths[trait].value, trait))
    return {
        "games": len(played),
        "decided": sum(wins.values()),
        "traits": [
            {"trait": trait, "elo": elo[trait], "bradley_terry": asdict(strengths[trait]), "wins": wins[trait]}
            for trait in best_first
        ],
    }


@dataclass(frozen=True)
class Change:
    """What two runs' ratings differ by. `elo` and `bradley_terry`: after minus before, by trait, the largest gain
    first; the second over the games that were decided both times. `spearman` is between the two rankings."""

    before: Run
    after: Run
    games: int
    elo: dict[str, float]
    bradley_terry: dict[str, Rating]
    spearman: dict[str, float]


def change(before: Path | str, after: Path | str) -> Change:
    """Compare two results folders of this benchmark. Raises UserError when they did not ask about the same pairs."""
    runs = [load_run(place) for place in (before, after)]
    for run in runs:
        if run.summary.benchmark != RevealedPreferences.name:
            raise UserError(f"{run.folder} holds {run.summary.benchmark}, where {RevealedPreferences.name} should be")
    if runs[0].summary.settings["data"] != runs[1].summary.settings["data"]:
        raise UserError(
            f"{before} and {after} did not ask about the same pairs: benchmark.path, pairs, seed, limit, language and "
            "condition should be alike"
        )
    played = [_by_id(run.rows) for run in runs]
    moved = bradley_terry_change(*played)
    elo_before, elo_after = (elo_ratings(game for _, game in games(run.rows)) for run in runs)
    fitted = [{t: r.value for t, r in bradley_terry(one.values(), resamples=0).items()} for one in played]
    both = [trait for trait in elo_before if trait in elo_after]  # a trait whose games all failed is in neither
    gains = {trait: elo_after[trait] - elo_before[trait] for trait in both}
    ranked = [[{t: one[t] for t in both} for one in pair] for pair in ((elo_before, elo_after), fitted)]
    return Change(
        before=runs[0],
        after=runs[1],
        games=sum(rating.games for rating in moved.values()) // 2,
        elo=dict(sorted(gains.items(), key=lambda item: (-item[1], item[0]))),
        bradley_terry=dict(sorted(moved.items(), key=lambda item: (-item[1].value, item[0]))),
        spearman={"elo": spearman(*ranked[0]), "bradley_terry": spearman(*ranked[1])},
    )


def _by_id(rows: Sequence[Row]) -> dict[str, Game]:
    """One game per sample and judge."""
    return {
        f"{row.id} {verdict.judge}": game
        for row in rows
        for verdict, (_, game) in zip(row.verdicts, games([row]), strict=True)
    }


def print_change(found: Change, console: Console) -> None:
    """The top and bottom five by Bradley–Terry, with Elo beside them, and the rank correlations."""
    names = f"A = {found.before.summary.stack}, B = {found.after.summary.stack}"
    console.print(f"[bold]revealed_preferences: {names}[/]; {found.games} games decided in both")
    table = Table("trait", "Bradley–Terry, B − A", "95 % interval", "Elo, B − A", "games")
    order = list(found.bradley_terry)
    ends = [(order[:_ENDS], False), (order[max(_ENDS, len(order) - _ENDS) :], True)]
    for traits, last in ends:
        for trait in traits:
            moved = found.bradley_terry[trait]
            interval = "–" if moved.low is None else f"[{moved.low:+.0f}, {moved.high:+.0f}]"
            table.add_row(trait, f"{moved.value:+.0f}", interval, f"{found.elo[trait]:+.0f}", str(moved.games))
        if not last:
            table.add_section()
    console.print(table)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in found.spearman.items())
    console.print(f"Spearman's rank correlation of A and B: {shown}")


def as_json(found: Change) -> dict[str, Any]:
    """The whole as plain JSON values; a correlation that is not defined is null."""
    return {
        "before": str(found.before.folder),
        "after": str(found.after.folder),
        "games": found.games,
        "elo": found.elo,
        "bradley_terry": {trait: asdict(moved) for trait, moved in found.bradley_terry.items()},
        "spearman": {name: value if value == value else None for name, value in found.spearman.items()},
    }


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """The command line; returns the exit status, 2 for folders that cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m persona.benchmarks.revealed_preferences", description=__doc__)
    parser.add_argument(
        "before", type=Path, help="a folder of results: <output>/evaluation/revealed_preferences/<stack>"
    )
    parser.add_argument("after", type=Path, help="what is compared with it")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    given = parser.parse_args(arguments)
    try:
        found = change(given.before, given.after)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(as_json(found), ensure_ascii=False, allow_nan=False, indent=1))
    else:
        print_change(found, console or Console())
    return 0


def build(config: RevealedPreferencesConfig) -> RevealedPreferences:
    """Raises UserError for settings that do not fit and for bad questions."""
    return RevealedPreferences(config)


if __name__ == "__main__":
    sys.exit(main())
