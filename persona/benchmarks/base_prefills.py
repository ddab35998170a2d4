"""Base-model prefills: how does a base LM go on where somebody begins to speak of their purpose or their traits?

Lu et al. 2026, arXiv 2601.10387 (reference/assistant_axis 3.7): a chat model's axis steers its base model, which is
measured as any other stack. Published: 3 beginnings about purpose and 2 about traits, 400 completions of at most 512
tokens for each strength, labelled by Claude Sonnet 4.5 in two passes (a summary, then 8 to 10 classes; of traits the
first three). Beginnings, classes and sampling settings are not published; ours are labelled in one pass, of traits the
first one.

`benchmark.path` is JSONL of one's own beginnings, {"about": "purpose" or "traits", "prefill": …}.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from persona.benchmarks.axis_shared import (
    AxisConfig,
    anything,
    check_language,
    draw,
    limited,
    no_town_roles,
    rows_of,
    something,
    text_of,
)
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark
from persona.evaluation.judges.judging import Rubric, require
from persona.evaluation.judges.parsing import parse_choice
from persona.evaluation.results import Row
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric, estimate
from persona.files import write_json
from persona.town import lexicon as lx
from persona.types import Request, Sample, Score

_HERE = Path(__file__).parent
_SAMPLE = _HERE / "samples" / "base_prefills" / "prefills.jsonl"


def _rubric(about: str, labels: Sequence[str]) -> Rubric:
    path = _HERE / "prompts" / "base_prefills" / f"{about}.md"
    return Rubric.load(path, lambda reply: parse_choice(reply, labels), labels, example="<answer>{answer}</answer>")


# What a beginning is about → how its completion is labelled; "character" is the town's, whose LM tells its traits.
RUBRICS = {
    "purpose": _rubric("purpose", "help care business craft art power faith machine other nonsense".split()),
    "traits": _rubric(
        "traits", "kind diligent clever creative sociable reserved bold spiritual difficult other nonsense".split()
    ),
    "character": _rubric("character", [*lx.CHARACTER, "other", "nonsense"]),
}
# Labels with a metric of their own; classes.json has them all.
SHOWN = {
    "purpose": ("help", "faith", "nonsense"),
    "traits": ("kind", "spiritual", "nonsense"),
    "character": ("caring", "poetic", "nonsense"),
}
_TOWN_PREFILLS = (("character", "i am"),)


@dataclass
class BasePrefillsConfig(AxisConfig):
    """`completions` of each beginning."""

    name: str = "base_prefills"
    completions: int = 80
    max_new_tokens: int = 512


class BasePrefills(Benchmark):
    """A sample is one completion. The beginnings are fixed, so intervals are over completions."""

    name = "base_prefills"
    version = "1"
    needs = ("judge",)

    def __init__(self, config: BasePrefillsConfig) -> None:
        check_language(config)
        no_town_roles(config)
        self.config = config
        in_town = config.path is None and config.language == "town"
        found = _TOWN_PREFILLS if in_town else _read(Path(config.path or _SAMPLE))
        asked = list(dict.fromkeys(about for about, _ in found))
        self.prompts = tuple(RUBRICS[about].prompt for about in asked)
        self.metrics = {
            f"{about} {label}": Metric(
                label != "nonsense", description=f"share of {about} completions labelled {label}"
            )
            for about in asked
            for label in SHOWN[about]
        }
        self.primary = next(iter(self.metrics))
        # The beginning is the whole prompt: a sample has no messages, and its target says how it begins.
        self._samples = limited(
            config,
            [
                Sample(f"{place}-{number}", (), prefill, task=about)
                for number in range(1, config.completions + 1)
                for place, (about, prefill) in enumerate(found, start=1)
            ],
        )

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def groups(self, sample: Sample) -> Mapping[str, str]:
        return {"beginning": sample.target}

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        request = Request((), sampling=draw(self.config, sample.id), prefill=sample.target)
        reply = await roles.model.respond(request)
        text = f"{sample.target.rstrip()} {reply.text.lstrip()}"
        rubric = RUBRICS[sample.task]
        verdicts = tuple(await roles.judge(rubric, response=text))
        said = require(verdicts)
        if not said:
            return Score(reason=f"no verdict could be read: {verdicts[0].reason}", raw=text, verdicts=verdicts)
        values = {f"{sample.task} {label}": said.count(label) / len(said) for label in rubric.answers}
        return Score(values, raw=text, verdicts=verdicts)

    def constant(self, sample: Sample) -> str:
        return anything(self.config.language)

    def chance(self, sample: Sample, rng: random.Random) -> str:
        return something(self.config.language, rng, [s.target for s in self._samples])

    def write_artifacts(self, rows: Sequence[Row], folder: Path) -> None:
        """classes.json: about → the share of every label, with an interval."""
        values, clusters = [row.values for row in rows], [row.cluster for row in rows]
        found = {
            about: {label: estimate(values, clusters, f"{about} {label}", Metric()) for label in rubric.answers}
            for about, rubric in RUBRICS.items()
        }
        content = {
            about: {label: asdict(share) for label, share in shares.items() if share is not None}
            for about, shares in found.items()
        }
        write_json(Path(folder) / "classes.json", {about: shares for about, shares in content.items() if shares})


def _read(path: Path) -> list[tuple[str, str]]:
    found = []
    for _, where, row in rows_of(path, {"row": ("about", "prefill")}):
        if (about := text_of(row, "about", where)) not in ("purpose", "traits"):
            raise UserError(f"{where} is about {about!r:.60}, which should be purpose or traits")
        found.append((about, text_of(row, "prefill", where)))
    return found


def build(config: BasePrefillsConfig) -> BasePrefills:
    """Raises UserError for settings that do not fit and for a bad file."""
    return BasePrefills(config)
