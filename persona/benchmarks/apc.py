"""APC: how faithful are replies to a character's statements? (Peng & Shang, arXiv 2405.07726; reference/apc.md)

    python evaluate.py data=town_characters benchmark=apc judge=oracle baselines=role_play
    python -m persona.benchmarks.apc outputs/x/evaluation/apc [--human human.csv]

Of every reply it is asked, for each statement, whether it bears on the question and what the reply does to it: by two
discriminators (`relevance_model` and `nli_model`), else by judges. In the town the oracle counts beside that how many
statements a reply really satisfies. The second command compares how Δ ranks the stacks of a run, character by
character, with how people do, or in the town the oracle.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from persona.benchmarks import BenchmarkConfig
from persona.data.base import People
from persona.data.rows import first_few
from persona.errors import UserError
from persona.evaluation.comparison import is_trivial
from persona.evaluation.episodes import Benchmark
from persona.evaluation.judges.apc import NLI, RELEVANCE, judged
from persona.evaluation.judges.judging import Unscored
from persona.evaluation.results import find_runs
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.metrics.apc import ApcScore, Discriminators, Probabilities, Question, explain
from persona.metrics.batcher import Batcher
from persona.town import lexicon as lx
from persona.town import oracle, reading
from persona.types import Request, Sample, Sampling, Score, Verdict

NEUTRAL = "I would rather not say."  # true of everybody, entails nothing: what a reply earns that says nothing
_QUESTIONS = 32  # scored together by the discriminators
_LEAST = 0.05  # of a statement's share in Δ that a row keeps
_NAMED = 20  # characters up to which each has a line in the report


@dataclass
class APCBenchmarkConfig(BenchmarkConfig):
    """Over the people of `data` who have statements. `relevance_model` and `nli_model`, folders or hub ids, are the
    discriminators; without them judges are asked. `compat: reference` reads judges as published (docs/errata.md)."""

    name: str = "apc"
    max_new_tokens: int = 256
    split: str = "test"
    relevance_model: str | None = None
    nli_model: str | None = None
    compat: str | None = None


_METRICS = {
    "delta": Metric(description="statements followed where they bear on the question, less those denied elsewhere"),
    "total": Metric(
        description="expected number of statements satisfied (V): followed where relevant, else not denied"
    ),
    "active": Metric(description="statements followed among those that bear on the question"),
    "passive": Metric(higher_is_better=False, description="statements denied among those that do not"),
    "delta_per_statement": Metric(description="Δ divided by the character's number of statements"),
}
_OF_THE_TOWN = {
    "satisfied": Metric(description="statements really satisfied, counted by the town's oracle"),
    "followed": Metric(
        aggregate="ratio", columns=("true_active", "relevant"),
        description="share of the statements that bear on the question which the reply follows (oracle)",
    ),
    "readable": Metric(description="share of replies that are sentences of the town's language"),
}  # fmt: skip


class APC(Benchmark):
    """Raises UserError where nobody of the split has statements, or one discriminator is named without the other."""

    name = "apc"
    version = "1"
    primary = "delta"
    prompts = (RELEVANCE.prompt, NLI.prompt)

    def __init__(self, people: People, config: APCBenchmarkConfig) -> None:
        self.config = config
        self._samples = list(islice(people.split(config.split), config.limit))
        bare = [sample.id for sample in self._samples if sample.persona is None or not sample.persona.statements]
        if bare or not self._samples:
            found = f"{len(bare)} samples of the {config.split} split have no statements ({first_few(bare)})"
            found = found if bare else f"the {config.split} split has no samples"
            raise UserError(
                f"{found}: apc is about people with statements, say data=town_characters, or data=biography with "
                '"Key: value" lines'
            )
        given = {"relevance_model": config.relevance_model, "nli_model": config.nli_model}
        lacking = [name for name, model in given.items() if not model]
        if len(lacking) == 1:
            raise UserError(f"apc needs both discriminators or none, and benchmark.{lacking[0]} has no value")
        self.town = all(_truth(*_of_town(sample), "") is not None for sample in self._samples)
        self.metrics = {**_METRICS, **(_OF_THE_TOWN if self.town else {})}
        self.needs: Sequence[str] = ("judge",)
        self._batcher: Batcher | None = None
        if config.relevance_model and config.nli_model:
            self.needs = ()
            self._batcher = Batcher(Discriminators(config.relevance_model, config.nli_model), _QUESTIONS)

    def samples(self) -> Sequence[Sample]:
        return self._samples

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        assert sample.persona is not None
        sampling = Sampling(self.config.max_new_tokens, seed=self.config.seed)
        reply = (await roles.model.respond(Request(sample.messages, sample.persona, sampling, None, sample.task))).text
        name = sample.persona.attributes.get("name", sample.persona.id)
        question = Question(name, tuple(sample.persona.statements), sample.messages[-1].content, (reply,))
        scores, verdicts, unread = await self._scores(question, roles)
        if not scores:
            return Score(reason=unread[0].reason, raw=reply, verdicts=verdicts)
        score = ApcScore(*np.mean(scores, axis=0).tolist())
        values = {**score._asdict(), "delta_per_statement": score.delta / len(question.statements)}
        if self.town:
            true = _truth(question.query, question.statements, reply)
            assert true is not None
            values |= {"satisfied": true.satisfied, "relevant": true.relevant, "readable": oracle.readable(reply)}
            values |= {"true_active": true.active, "true_passive": true.passive}
        return Score({key: float(value) for key, value in values.items()}, raw=reply, verdicts=verdicts)

    async def _scores(
        self, question: Question, roles: Roles
    ) -> tuple[list[list[float]], tuple[Verdict, ...], list[Unscored]]:
        """The discriminators' score, or those of the judges that could be read; everything said; what could not be
        read."""
        known: list[tuple[str, Probabilities]] = []
        verdicts: list[Verdict] = []
        unread: list[Unscored] = []
        if self._batcher is not None:
            known.append(("discriminators", await self._batcher.ask(question)))
        else:
            asked = await asyncio.gather(*(judged(judge, question, self.config.compat) for judge in roles.judges))
            for (given,) in asked:
                verdicts += given.verdicts
                if isinstance(given.found, Unscored):
                    unread.append(given.found)
                else:
                    known.append((given.verdicts[0].judge, given.found))
        told = (verdict for judge, found in known for verdict in explained(judge, question.statements, found))
        scores = [[float(value[0]) for value in found.score()] for _, found in known]
        return scores, (*verdicts, *told), unread

    def groups(self, sample: Sample) -> Mapping[str, str]:
        groups = {}
        if len({self.cluster(each) for each in self._samples}) <= _NAMED:
            groups["character"] = self.cluster(sample)
        if self.town:
            groups["asked about"] = reading.question(sample.messages[-1].content).kind  # type: ignore[union-attr]
        return groups

    def constant(self, sample: Sample) -> str:
        """A reply that says nothing: Δ is 0 of it by definition."""
        return lx.UNKNOWN if self.town else NEUTRAL

    def chance(self, sample: Sample, rng: random.Random) -> str:
        """The true answer to any question by anybody, or without such answers one statement about anybody."""
        other = rng.choice(self._samples)
        return other.target or rng.choice(other.persona.statements)  # type: ignore[union-attr]


def explained(judge: str, statements: Sequence[str], found: Probabilities) -> list[Verdict]:
    """What statements add to Δ of the one reply, or take from it, as verdicts of a rubric of that name; shares below
    `_LEAST` are left out."""
    parts = explain(statements, found.relevance, found.entailment[0], found.contradiction[0])
    return [
        Verdict(
            judge, "apc, share of a statement", "", round(part.gain, 4),
            raw=f"{part.statement} (relevant {part.relevance:.2f}, entails the reply {part.entailment:.2f}, "
            f"contradicted by it {part.contradiction:.2f})",
        )
        for part in parts if abs(part.gain) >= _LEAST
    ]  # fmt: skip


# ---- the town's truth ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """Of one reply: `relevant` statements, of those `active` ones followed, of the others `passive` ones denied;
    `satisfied` = active + others - passive."""

    relevant: int
    active: int
    passive: int
    satisfied: int


def _of_town(sample: Sample) -> tuple[str, tuple[str, ...]]:
    return sample.messages[-1].content, tuple(sample.persona.statements) if sample.persona else ()


@lru_cache(maxsize=4096)
def _relevant(query: str, statements: tuple[str, ...]) -> tuple[bool | None, ...]:
    return tuple(oracle.relevant(statement, query) for statement in statements)


def _truth(query: str, statements: tuple[str, ...], reply: str) -> Truth | None:
    """The oracle's count. A reply outside the town's language follows and denies nothing. None where the question or
    a statement is outside it."""
    relevant = _relevant(query, statements)
    if None in relevant:
        return None
    labels = [oracle.nli(statement, reply.strip()) for statement in statements]
    active = sum(bool(r) and label == oracle.ENTAILED for r, label in zip(relevant, labels, strict=True))
    passive = sum(not r and label == oracle.CONTRADICTED for r, label in zip(relevant, labels, strict=True))
    count = sum(map(bool, relevant))
    return Truth(count, active, passive, active + len(statements) - count - passive)


# ---- do stacks rank alike? -----------------------------------------------------------------------------------------

Table = Mapping[tuple[str, str], float]  # (stack, character) -> score


def rank_agreement(scores: Table, truth: Table) -> dict[str, tuple[float, int]]:
    """Per character Spearman's correlation over the stacks that both tables have, and their number.

    Ties share their mean rank. nan where a table has one value only, or there are fewer than two stacks.
    """
    from scipy import stats  # here, as every command would wait for it

    found = {}
    for character in dict.fromkeys(character for _, character in scores):
        common = [key for key in scores if key[1] == character and key in truth]
        pairs = [[table[key] for key in common] for table in (scores, truth)]
        ranked = len(common) > 1 and all(len(set(values)) > 1 for values in pairs)
        found[character] = (float(stats.spearmanr(*pairs).statistic) if ranked else float("nan"), len(common))
    return found


def means(folders: Sequence[Path | str], metric: str) -> dict[tuple[str, str], float]:
    """A metric's mean per stack and character in folders of results; constant and random answers are left out.

    Raises UserError where no row has it.
    """
    values: dict[tuple[str, str], list[float]] = {}
    for run in find_runs(folders):
        if run.summary.benchmark == APC.name and not is_trivial(run.summary.stack):
            for row in run.rows:
                if metric in row.values:
                    values.setdefault((run.summary.stack, row.cluster), []).append(row.values[metric])
    if not values:
        raise UserError(f"no result of apc in {', '.join(map(str, folders))} has the metric {metric}")
    return {key: float(np.mean(found)) for key, found in values.items()}


def read_human(path: Path | str) -> dict[tuple[str, str], float]:
    """People's scores: a CSV file with the columns stack, character and score; rows of one pair are averaged.

    Raises UserError with the line for another form.
    """
    scores: dict[tuple[str, str], list[float]] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            columns = set(reader.fieldnames or ())
            if not {"stack", "character", "score"} <= columns:
                raise UserError(
                    f"{path} has the columns {', '.join(sorted(columns))}; it needs stack, character, score"
                )
            for row in reader:
                try:
                    value = float(row["score"])
                except (TypeError, ValueError) as error:
                    raise UserError(f"{path}, line {reader.line_num}: score {row['score']!r} is no number") from error
                scores.setdefault((row["stack"], row["character"]), []).append(value)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the scores {path} could not be read as UTF-8 text: {error}") from error
    return {key: float(np.mean(found)) for key, found in scores.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print Spearman's correlation between Δ and people's scores, or the oracle's count, per character."""
    parser = argparse.ArgumentParser(prog="python -m persona.benchmarks.apc", description=main.__doc__)
    parser.add_argument("folders", nargs="+", help="folders of results, one per stack, or a folder above them")
    parser.add_argument("--human", help="CSV file with the columns stack, character, score; without it the oracle's")
    options = parser.parse_args(argv)
    scores = means(options.folders, "delta")
    truth = read_human(options.human) if options.human else means(options.folders, "satisfied")
    agreement = rank_agreement(scores, truth)
    for character, (rho, count) in agreement.items():
        print(f"{character}: {f'{rho:.4f}' if np.isfinite(rho) else 'undefined, all alike,'} over {count} stacks")
    known = [rho for rho, _ in agreement.values() if np.isfinite(rho)]
    if known:
        print(f"mean of {len(known)} characters: {np.mean(known):.4f}")


def build(config: APCBenchmarkConfig, people: People) -> APC:
    return APC(people, config)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(str(error)) from error
