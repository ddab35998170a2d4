"""PersonaEval: who of four or five candidates is speaking? A judge that cannot tell should not judge role play.

The model answers each row's own prompt with a probability per candidate (personaeval §3). Ties are split evenly: every
metric is its expected value when tied candidates are ordered at random. `compat` reproduces the published metrics.
"""

from __future__ import annotations

import csv
import json
import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import json_repair
import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from scipy.special import softmax

from persona.benchmarks import FileBenchmarkConfig
from persona.data.rows import first_few
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark, Unscored
from persona.evaluation.judges.parsing import Unreadable, strip_reasoning
from persona.evaluation.prompts import Prompt
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import AGGREGATES, Metric
from persona.types import Message, Request, Sample, Sampling, Score

TRACKS = ("Literary", "Drama", "Expertise")
SAMPLES = Path(__file__).parent / "samples" / "personaeval"
LIKELIHOOD = Prompt.load(Path(__file__).parent / "prompts" / "personaeval" / "likelihood.md")

_SLACK, _OFFICIAL_SLACK = 0.05, 1e-5  # how far from 1 probabilities may sum
_OFFICIAL_OPTIONS = 4  # as many are in the published result files, also where there are five
_QUOTES = re.compile("[\"'`*_“”„‟‘’‚‛«»‹›「」『』《》〈〉＂＇]")

METRICS = {
    "top1": Metric(description="share of rows whose true speaker is the likeliest candidate; ties split evenly"),
    "top1_macro": Metric(
        aggregate="ratio",
        columns=("weighted_top1", "weight"),
        description="top1 with the same weight for each track, whatever its size (a row: 1 / rows of its track)",
    ),
    "top2": Metric(description="share of rows whose true speaker is among the two likeliest; ties split evenly"),
    "mean_rank": Metric(
        higher_is_better=False, columns=("rank",), description="place of the true speaker, 1 is the likeliest"
    ),
    "brier": Metric(higher_is_better=False, description="squared error of the probabilities, summed over candidates"),
    "brier_per_option": Metric(
        higher_is_better=False,
        aggregate="ratio",
        columns=("brier", "options"),
        description="squared error, averaged over all candidates of all rows (the published definition)",
    ),
    "ece": Metric(
        higher_is_better=False,
        aggregate="ece",
        columns=("confidence", "top1"),
        description="expected calibration error of the likeliest candidate's probability, 20 bins",
    ),
    "renormalised": Metric(
        higher_is_better=False, description="share of replies whose probabilities did not sum to 1, by less than .05"
    ),
}


# ---- probabilities and what they are worth -------------------------------------------------------------------------


def check_probabilities(given: Mapping[str, float], compat: str | None = None) -> tuple[dict[str, float], bool]:
    """`given` as probabilities that sum to 1, and whether they had to be renormalised (personaeval defect 3).

    Raises Unreadable for a number outside 0 to 1, or a sum that is .05 or more from 1. compat="reference": a sum more
    than 1e-5 from 1 is refused, and nothing is renormalised.
    """
    for option, value in given.items():
        if not 0 <= value <= 1:  # also refuses nan
            raise Unreadable(f"the probability of {option!r} is {value:g}, which is not from 0 to 1")
    total = math.fsum(given.values())
    away = abs(total - 1)
    if (compat is None and away >= _SLACK - 1e-9) or (compat is not None and away > _OFFICIAL_SLACK):
        raise Unreadable(f"the probabilities sum to {total:g}")
    if compat is not None or away <= 1e-9:
        return dict(given), False
    return {option: value / total for option, value in given.items()}, True


def row_values(probabilities: Mapping[str, float], true: str, compat: str | None = None) -> dict[str, float]:
    """What one row contributes to METRICS: top1, top2, rank, brier (summed), options (how many), confidence.

    With `ahead` candidates above the true one and `tied` at its value (itself included), its place is ahead + 1 to
    ahead + tied with equal chances. Raises KeyError when `true` is no candidate.

    compat="reference": only the first four candidates count; the first of tied ones is the answer, while in ranks the
    last of them comes first; a true speaker who is not among the four is wrong and has no rank.
    """
    if compat is not None:
        return _official_values(list(probabilities)[:_OFFICIAL_OPTIONS], probabilities, true)
    mine, all_values = probabilities[true], list(probabilities.values())
    ahead, tied = sum(value > mine for value in all_values), sum(value == mine for value in all_values)
    return {
        "top1": min(max((1 - ahead) / tied, 0.0), 1.0),
        "top2": min(max((2 - ahead) / tied, 0.0), 1.0),
        "rank": ahead + (tied + 1) / 2,
        "brier": sum((value - (option == true)) ** 2 for option, value in probabilities.items()),
        "options": float(len(probabilities)),
        "confidence": max(all_values),
    }


def _official_values(options: list[str], probabilities: Mapping[str, float], true: str) -> dict[str, float]:
    values = np.array([probabilities[option] for option in options])
    best_first = [options[i] for i in np.argsort(values, kind="stable")[::-1]]
    found = {
        "top1": float(options[int(values.argmax())] == true),
        "top2": float(true in best_first[:2]),
        "brier": float(sum((probabilities[option] - (option == true)) ** 2 for option in options)),
        "options": float(len(options)),
        "confidence": float(values.max()),
    }
    return found | ({"rank": best_first.index(true) + 1.0} if true in options else {})


def score(rows: Iterable[tuple[Mapping[str, float] | None, str]], compat: str | None = None) -> dict[str, float]:
    """Scores of rows ({option: probability}, true option); a row's options are the keys, in order.

    Probabilities that are None, or that `check_probabilities` refuses, are an error: the row counts in `n`,
    `error_rate` and, as wrong, in `accuracy`, and in nothing else. Returns n, error_rate, accuracy (right rows of all
    rows), and over rows without error: top1, top2, mean_rank, brier, brier_per_option, ece, renormalised (nan where no
    row is left). Raises UserError for no rows, and for a true option that is none of a row's.

    compat="reference": as `row_values` and `check_probabilities`; brier is then brier_per_option, f1 is added, and
    accuracy, which was written at answering time, knows all options.
    """
    if compat not in (None, "reference"):
        raise UserError(f"compat {compat!r} is not known for PersonaEval; it should be null or reference")
    n, right, values = 0, 0.0, []
    for n, (given, true) in enumerate(rows, start=1):  # noqa: B007
        try:
            if given is None:
                raise Unreadable("no probabilities")
            probabilities, renormalised = check_probabilities(given, compat)
        except Unreadable:
            continue
        if true not in probabilities:
            raise UserError(f"row {n}: the true option {true!r} is none of {first_few(list(given), 5)}")
        values.append(row_values(probabilities, true, compat) | {"renormalised": float(renormalised)})
        right += values[-1]["top1"] if compat is None else max(probabilities, key=probabilities.__getitem__) == true
    if n == 0:
        raise UserError("there is nothing to score for PersonaEval: no rows")
    found = {name: _total(name, values) for name in METRICS if name != "top1_macro"}
    if compat is not None:
        found["brier"] = found["brier_per_option"]
        found["f1"] = 2 * found["top1"] / (1 + found["top1"])  # binary F1 against an all-ones truth: nothing new
    return {"n": n, "error_rate": (n - len(values)) / n, "accuracy": right / n} | found


def _total(name: str, values: Sequence[Mapping[str, float]]) -> float:
    metric = METRICS[name]
    having = [row for row in values if all(column in row for column in metric.reads(name))]
    if not having:
        return math.nan
    columns = [np.array([row[column] for row in having]) for column in metric.reads(name)]
    aggregate = AGGREGATES[metric.aggregate]
    return float(aggregate.finish(aggregate.rows(columns, metric).sum(axis=0)))


# ---- replies -------------------------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """A candidate's name without what replies change: case, width, white space, quotes and emphasis."""
    return " ".join(_QUOTES.sub("", unicodedata.normalize("NFKC", name)).casefold().split())


def parse_reply(text: str, options: Sequence[str], compat: str | None = None) -> tuple[dict[str, float], bool]:
    """The probability of each of `options` in a reply, and whether they had to be renormalised.

    The JSON object is looked for in the last fenced block, else in the whole text (the last object of several), and
    repaired. Names are compared by `plain_name` (compat="reference": exactly). Raises Unreadable when there is no
    object, an option has no probability or two, a value is no number, and as `check_probabilities`.
    """
    text = strip_reasoning(text)
    blocks = re.findall(r"```[^\S\n]*\w*(.*?)```", text, flags=re.DOTALL)
    found = json_repair.loads(blocks[-1] if blocks else text)
    objects = [entry for entry in (found if isinstance(found, list) else [found]) if isinstance(entry, dict)]
    if not objects:
        raise Unreadable("the reply holds no JSON object")
    return check_probabilities({option: _value_of(option, objects[-1], options, compat) for option in options}, compat)


def _value_of(option: str, given: Mapping[str, Any], options: Sequence[str], compat: str | None) -> float:
    keys = [option] if option in given else []
    if not keys and compat is None:
        mine = plain_name(option)
        # A key that is another option to the letter is that option's, however much alike the two are.
        keys = [key for key in given if plain_name(key) == mine and key not in options]
        if sum(plain_name(other) == mine for other in options) > 1:
            keys = []
    if len(keys) != 1:
        raise Unreadable(f"{option!r} has {'no probability' if not keys else 'several probabilities'}")
    value = given[keys[0]]
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise Unreadable(f"the probability of {option!r} is {value!r:.40}, which is no number") from None


# ---- files ---------------------------------------------------------------------------------------------------------


def official_file(place: str, name: str) -> Path:
    """The file `name` in the folder `place`, or else of the hub's data set `place` ("owner/name").

    Raises UserError when there is no such file, folder or data set.
    """
    folder = Path(place).expanduser()
    if folder.is_dir():
        if not (folder / name).is_file():
            held = first_few(sorted(path.name for path in folder.iterdir()), 6) or "nothing"
            raise UserError(f"{place} has no {name}; it holds {held}")
        return folder / name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", place) or folder.exists() or place.startswith("."):
        raise UserError(f"benchmark.path={place} is no file or folder")
    try:
        return Path(hf_hub_download(place, name, repo_type="dataset"))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{place} is no folder here, and the hub gave no {name} of that data set: {reason}") from error


def read_track(path: Path) -> list[Sample]:
    """The rows of a track's CSV as samples `<track>-<row>` (rows counted from 1); the track is the file's name.

    Raises UserError naming file and row for a missing column, an empty prompt, fewer than two options, options that
    are the same, and a true answer (`gt`) that is none of them.
    """
    track = path.stem
    csv.field_size_limit(1 << 30)  # a prompt may be longer than the module's default of 128 KiB
    wanted = ["prompt", *(f"option{i}" for i in range(1, 6 if track == "Expertise" else 5)), "gt"]
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            columns = list(reader.fieldnames or ())
            if missing := [name for name in wanted if name not in columns]:
                raise UserError(
                    f"{path} has no column {', '.join(missing)}; its columns are {', '.join(columns) or '(none)'}"
                )
            names = [name for name in columns if re.fullmatch(r"option\d+", name)]
            samples = [_sample(row, names, path, number) for number, row in enumerate(reader, start=1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} could not be read as CSV in UTF-8: {error}") from error
    if not samples:
        raise UserError(f"{path} holds no rows")
    return samples


def _sample(row: Mapping[str, str | None], names: Sequence[str], path: Path, number: int) -> Sample:
    where = f"{path}, row {number}"
    if None in row or None in row.values():
        raise UserError(f"{where} has not as many fields as the file has columns")
    options = tuple(text for name in names if (text := str(row[name])).strip())
    prompt, true = str(row["prompt"]), str(row["gt"])
    if not prompt.strip():
        raise UserError(f"{where} has an empty prompt")
    if len(options) < 2 or len(set(options)) < len(options):
        shown = ", ".join(options) or "(none)"
        raise UserError(f"{where} has the options {shown}; there should be several, all different")
    if true not in options:
        alike = [option for option in options if plain_name(option) == plain_name(true)]
        if len(alike) != 1:
            raise UserError(f"{where} has gt {true!r}, which should be one of its options: {', '.join(options)}")
        true = alike[0]
    return Sample(f"{path.stem}-{number}", (Message("user", prompt),), true, None, options, path.stem)


# ---- the benchmark -------------------------------------------------------------------------------------------------


@dataclass
class PersonaEvalConfig(FileBenchmarkConfig):
    """`path`: a folder with Literary.csv, Drama.csv and Expertise.csv, one of these files, or the hub's data set
    lingfengzhou/PersonaEval; of a folder or data set, `tracks` are read.

    `mode`: "text" reads the probabilities that the model writes, "likelihood" takes the softmax of its log p of each
    candidate's name. `limit` takes as many rows of each track as it can, drawn by `seed`.
    """

    name: str = "personaeval"
    max_new_tokens: int = 1024
    tracks: list[str] = field(default_factory=lambda: list(TRACKS))
    mode: str = "text"


class PersonaEval(Benchmark):
    """Role identification with probabilities, over the tracks of a folder."""

    name = "personaeval"
    version = "1"
    metrics = METRICS
    primary = "top1"
    prompts = (LIKELIHOOD,)

    def __init__(self, config: PersonaEvalConfig) -> None:
        if config.mode not in ("text", "likelihood"):
            raise UserError(f"benchmark.mode={config.mode} is unknown; it should be text or likelihood")
        if config.compat not in (None, "reference"):
            raise UserError(f"benchmark.compat={config.compat} is unknown; it should be null or reference")
        if unknown := [track for track in config.tracks if track not in TRACKS] or not config.tracks:
            raise UserError(f"benchmark.tracks={unknown if config.tracks else '[]'}; there are {', '.join(TRACKS)}")
        self.config = config
        place = config.path or str(SAMPLES)
        one = Path(place).expanduser()
        names = [f"{track}.csv" for track in dict.fromkeys(config.tracks)]
        files = [one] if one.is_file() else [official_file(place, name) for name in names]
        self._samples = limited([read_track(path) for path in files], config.limit, config.seed)
        self._sizes = Counter(sample.task for sample in self._samples)
        places = Counter((sample.options or ()).index(sample.target) for sample in self._samples)
        self._place = places.most_common(1)[0][0] if places else 0

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def cluster(self, sample: Sample) -> str:
        """Rows of one true speaker are of one work. Experts speak to the same five levels, which tie nothing."""
        return sample.id if sample.task == "Expertise" else f"{sample.task}-{sample.target}"

    def groups(self, sample: Sample) -> Mapping[str, str]:
        return {"track": sample.task}

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        options = sample.options or ()
        if self.config.mode == "likelihood":
            request = Request(LIKELIHOOD.messages(prompt=sample.messages[0].content), options=options)
            logps = await roles.model.choose(request)
            chosen = dict(zip(options, softmax(np.array(logps, dtype=np.float64)).tolist(), strict=True))
            return Score(self._values(sample, chosen, False), raw=max(chosen, key=chosen.__getitem__))
        reply = (await roles.model.respond(Request(sample.messages, None, Sampling(self.config.max_new_tokens)))).text
        try:
            return Score(self._values(sample, *parse_reply(reply, options, self.config.compat)), raw=reply)
        except Unreadable as error:
            raise Unscored(str(error), raw=reply) from None

    def _values(self, sample: Sample, probabilities: Mapping[str, float], renormalised: bool) -> dict[str, float]:
        values = row_values(probabilities, sample.target, self.config.compat)
        weight = 1 / self._sizes[sample.task]
        values |= {"renormalised": float(renormalised), "weight": weight, "weighted_top1": weight * values["top1"]}
        return values | {f"prob{i}": value for i, value in enumerate(probabilities.values(), start=1)}

    def constant(self, sample: Sample) -> str:
        """All on the place where the true speaker stands most often."""
        options = sample.options or ()
        return self._answer(options, options[min(self._place, len(options) - 1)])

    def chance(self, sample: Sample, rng: random.Random) -> str:
        """All on one candidate."""
        return self._answer(sample.options or (), rng.choice(sample.options or ()))

    def _answer(self, options: Sequence[str], chosen: str) -> str:
        if self.config.mode == "likelihood":
            return chosen
        return json.dumps({option: float(option == chosen) for option in options}, ensure_ascii=False)


def limited(parts: Sequence[Sequence[Sample]], limit: int | None, seed: int) -> list[Sample]:
    """At most `limit` samples, as equally many of each part as there are, drawn by `seed`, in the parts' order."""
    left = sum(len(part) for part in parts) if limit is None else limit
    kept: set[str] = set()
    for number, part in enumerate(sorted(parts, key=len)):  # what a short part does not take is left for the others
        share = min(len(part), -(-left // (len(parts) - number)))
        drawn = random.Random(f"{seed}-{part[0].task}").sample(range(len(part)), share)
        kept |= {part[i].id for i in drawn}
        left -= share
    return [sample for part in parts for sample in part if sample.id in kept]


def build(config: PersonaEvalConfig, people: None = None) -> PersonaEval:
    """The benchmark of a config. Raises UserError for files that are missing or malformed."""
    return PersonaEval(config)
