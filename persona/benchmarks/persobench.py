"""PersoBench: does a reply in a conversation take up the persona it is given? (arXiv 2410.03198)

The persona stands in the prompt, the reply comes wrapped in JSON, and nobody judges: overlap with a reference, an NLI
model's view of persona and reply, similarity, diversity, UniEval. An unreadable reply gets every metric's worst value,
as published (persobench note 5), and is counted as `invalid`, apart by reason. Metrics that need a model nobody named
are absent, and one warning says which.
"""

from __future__ import annotations

import asyncio
import csv
import hashlib
import json
import logging
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from persona.benchmarks import FileBenchmarkConfig
from persona.data.rows import first_few
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark
from persona.evaluation.judges.parsing import strip_reasoning
from persona.evaluation.prompts import Prompt
from persona.evaluation.results import Row
from persona.evaluation.roles import Roles
from persona.evaluation.statistics import Metric
from persona.files import atomic_write, inside
from persona.metrics.batcher import Batcher
from persona.metrics.bert_score import BertScore
from persona.metrics.diversity import distinct
from persona.metrics.nli import Entailment, c_score, p_consistency, ue_score
from persona.metrics.overlap import bleu, has_wordnet, meteor, rouge_f
from persona.metrics.similarity import WordVectors, tfidf_overlap, vector_similarity
from persona.metrics.unieval import DIMENSIONS, UniEval, combine, questions
from persona.types import Persona, Request, Sample, Sampling, Score

logger = logging.getLogger(__name__)

SAMPLES = Path(__file__).parent / "samples" / "persobench"
PROMPTS = {
    name: Prompt.load(Path(__file__).parent / "prompts" / "persobench" / f"{name}.md")
    for name in ("vanilla", "cot", "system")
}
MODES = ("vanilla", "cot")
DATASETS = ("FoCus", "IT-ConvAI2", "Blended Skill Talk")  # those of the published headline
COLUMNS = ("personas", "context", "act_response")
_NO_APOSTROPHES = ("FoCus", "IT-ConvAI2")  # whose official files lost them in the references
_MODEL_BATCH = 32


@dataclass
class PersoBenchConfig(FileBenchmarkConfig):
    """`path` is a folder with the official Prompts/<dataset>.csv, or one such file; `dataset` null takes all three.
    `mode` cot lets the model reason first, and doubles `max_new_tokens` as published (110, 220). `closed` asks for,
    and accepts, nothing but JSON. The models are folders or hub ids; what needs one that is null is not measured."""

    name: str = "persobench"
    max_new_tokens: int = 110
    dataset: str | None = None
    mode: str = "vanilla"
    closed: bool = False
    nli_model: str | None = None
    coherence_model: str | None = None
    bertscore_model: str | None = None
    unieval_model: str | None = None
    word_vectors: str | None = None


# ---- reading a reply -----------------------------------------------------------------------------------------------


def _text(value: Any) -> str | None:
    """The `response` of a JSON object as text, None where there is none. Empty text, null and NaN count as none."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    return str(value)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _closed(text: str) -> str | None:
    found = _loads(re.sub(r"```(?:json)?", "", text).strip())
    return _text(found.get("response")) if isinstance(found, dict) else None


def parse_reply(text: str, closed: bool = False) -> str | None:
    """The reply in a model's output by the published rule, None when it counts as a failure (persobench note 3).

    Open models: the first shortest span in braces that is JSON and has the key `response`. Closed ones: the whole
    output, code fences left out, has to be JSON. A value that is no string is written out as Python does; an empty
    one is a failure. A "}" inside the text breaks the rule for open models: `read_reply` mends that.
    """
    if closed:
        return _closed(text)
    for span in re.findall(r"\{.*?\}", text, flags=re.DOTALL):
        found = _loads(span)
        if isinstance(found, dict) and "response" in found:
            return _text(found["response"])
    return None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """All JSON objects in a text, from left to right, those inside of others left out."""
    decoder, place = json.JSONDecoder(), text.find("{")
    while place >= 0:
        try:
            found, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            yield found
        place = text.find("{", end)


def read_reply(text: str, closed: bool = False) -> str | None:
    """The reply in a model's output: as `parse_reply`, with braces inside strings and objects understood, and without
    what a reasoning model thinks aloud. Blank text is a failure, too."""
    text = strip_reasoning(text)
    if closed:
        found = _closed(text)
    else:
        found = next((_text(entry["response"]) for entry in _objects(text) if "response" in entry), None)
    return found if found and found.strip() else None


def truncated(text: str, finish_reason: str = "length") -> bool:
    """Whether an unreadable output was cut: it opened a brace it never closed and stopped at the token limit.

    The published failure ratio does not tell this from an output that is no JSON (persobench note 5, flaw 5).
    """
    return finish_reason == "length" and text.count("{") > text.count("}")


# ---- the official files --------------------------------------------------------------------------------------------

_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", flags=re.DOTALL)
_STATEMENT_END = re.compile(r"(?<=[^\W_][^\W_][.!?])\s*(?=[^\W\d_])")
_LIST_MARK = re.compile(r"^\s*\[(?:User 1|Responder) persona\]:")


def statements(personas: str) -> tuple[str, ...]:
    """The single statements of a `personas` cell: a list's items, or sentences that may follow without a space."""
    marked = _LIST_MARK.match(personas)
    if marked:
        found = [first or second for first, second in _QUOTED.findall(personas[marked.end() :])]
        return tuple(text.replace("\\'", "'").replace('\\"', '"').strip() for text in found)
    return tuple(part.strip() for part in _STATEMENT_END.split(personas.strip()) if part.strip())


def published_persona(personas: str) -> str:
    """The persona as the published metrics read it: marks, brackets and *all* quotes gone, so that "i'm" is "im"."""
    if not _LIST_MARK.match(personas):
        return personas
    return re.sub(r"[\[\]\"']", "", _LIST_MARK.sub("", personas)).strip()


def reference(dataset: str, act_response: str) -> str:
    """The true reply without the mark of its speaker, which two of the data sets have (persobench note 5)."""
    if dataset in _NO_APOSTROPHES and ":" in act_response:
        return act_response.split(":", 1)[1].strip()
    return act_response.strip()


def _files(config: PersoBenchConfig) -> dict[str, Path]:
    """Name of the data set → its file. Raises UserError for those that are missing."""
    place = SAMPLES if config.path is None else Path(config.path)
    if place.is_file():
        return {config.dataset or place.stem: place}
    folders = (place, place / "Prompts", place / "prompts")
    wanted = DATASETS if config.dataset is None else (config.dataset,)
    found: dict[str, Path] = {}
    for name, folder in ((name, folder) for name in wanted for folder in folders):
        if (path := folder / f"{name}.csv").is_file():
            found.setdefault(name, path)
    if missing := [f"{name}.csv" for name in wanted if name not in found]:
        here = sorted({path.name for folder in folders for path in folder.glob("*.csv")})
        held = f"it holds {first_few(here, 8)}" if here else "it holds no CSV file"
        raise UserError(f"persobench: {place} has no {first_few(missing)}; {held}")
    return found


def read_samples(path: Path, dataset: str) -> list[Sample]:
    """The rows of one official file. `messages` are still empty, the file's own texts are in `metadata`.

    Raises UserError for a file without rows or columns, and for a row with an empty cell.
    """
    csv.field_size_limit(1 << 30)
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream)
            columns, rows = reader.fieldnames or [], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"persobench: {path} cannot be read as CSV: {error}") from error
    if missing := [name for name in COLUMNS if name not in columns]:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(columns) or 'none'}")
    if not rows:
        raise UserError(f"{path} has no rows under its header")
    samples = []
    for number, row in enumerate(rows):
        for name in COLUMNS:
            if not (row[name] or "").strip():
                raise UserError(f"{path}, row {number} (counted from 0) has nothing in its column {name}")
        target, told = reference(dataset, row["act_response"]), statements(row["personas"])
        if not target:
            raise UserError(f"{path}, row {number} (counted from 0) has only a speaker's mark in act_response")
        id = "persona-" + hashlib.sha256(row["personas"].encode()).hexdigest()[:12]
        persona = Persona(id, " ".join(told), told)
        metadata = {"dataset": dataset, "personas": row["personas"], "context": row["context"]}
        samples.append(Sample(f"{dataset}-{number:04}", (), target, persona, task=dataset, metadata=metadata))
    return samples


# ---- over several runs ---------------------------------------------------------------------------------------------


def instructability(failures: Mapping[str, float]) -> dict[str, float]:
    """How far below the worst of the compared models each one's failure ratio lies, in 0 .. 1 (persobench note 5).

    It depends on who is compared; 1 for all where nobody failed.
    """
    worst = max(failures.values())
    return {name: (worst - ratio) / worst if worst else 1.0 for name, ratio in failures.items()}


def ranking_score(ue: float, coverage: float, groundedness: float, c: float, failure: float) -> float:
    """Mean of the five parts of PersoBench's ranking, each in 0 .. 1, times 100 (persobench note 5, flaw 4).

    UE is halved, the C score moved from -1 .. 1, and the failure ratio taken from 1: no part depends on other models.
    """
    return 100 * (ue / 2 + coverage + groundedness + (c + 1) / 2 + (1 - failure)) / 5


def published_ranking_score(ue: float, coverage: float, groundedness: float, c: float, instruct: float) -> float:
    """The published ranking: four parts on scales of their own times 100, and Instructability in 0 .. 1, which so has
    no weight (the defect, for reference)."""
    return (100 * (ue + coverage + groundedness + c) + instruct) / 5


# ---- the benchmark -------------------------------------------------------------------------------------------------

_UNIEVAL = tuple(f"unieval_{name}" for name in (*DIMENSIONS, "overall"))
_METRICS = {
    "bleu": Metric(description="sentence BLEU against the true reply"),
    "rouge1": Metric(description="ROUGE-1 F of the package rouge"),
    "rouge2": Metric(description="ROUGE-2 F of the package rouge"),
    "rougeL": Metric(description="ROUGE-L F of the package rouge"),
    "meteor": Metric(description="METEOR against the true reply"),
    "bertscore_precision": Metric(description="BERTScore precision, not rescaled"),
    "bertscore_recall": Metric(description="BERTScore recall, not rescaled"),
    "bertscore_f1": Metric(description="BERTScore F1, not rescaled"),
    "dist1": Metric(description="different words per word of a reply"),
    "dist2": Metric(description="different bigrams per bigram of a reply"),
    "c_score": Metric(description="1 if the persona entails the reply, 0 if it leaves it open, -1 if it contradicts"),
    "p_consistency": Metric(description="share of replies that the persona does not contradict"),
    "ue_score": Metric(description="2 if persona and true reply entail the reply, 1 if only the persona does, else 0"),
    "idf_overlap": Metric(description="TF-IDF cosine of persona and reply"),
    "persona_coverage": Metric(description='cosine of mean word vectors of persona and reply ("persona distance")'),
    **{name: Metric(description="UniEval for dialogue") for name in _UNIEVAL},
    "ranking": Metric(description="mean of UE/2, coverage, groundedness, (C+1)/2 and 1 - invalid, times 100"),
    "invalid": Metric(higher_is_better=False, description="share of unreadable replies (failure ratio)"),
    "truncated": Metric(higher_is_better=False, description="share of replies whose JSON was cut at the token limit"),
    "malformed": Metric(higher_is_better=False, description="share of replies that are unreadable for other reasons"),
}
_WORST = {"c_score": -1.0}  # of an unreadable reply; 0 for all others
_NEEDS = {  # setting → metrics that need it
    "nli_model": ("c_score", "p_consistency"),
    "coherence_model": ("ue_score",),
    "bertscore_model": ("bertscore_precision", "bertscore_recall", "bertscore_f1"),
    "unieval_model": _UNIEVAL,
    "word_vectors": ("persona_coverage",),
}
_SCORERS: dict[str, Any] = {
    "nli_model": Entailment,
    "coherence_model": Entailment,
    "bertscore_model": BertScore,
    "unieval_model": UniEval,
}
_RANKED = ("ue_score", "persona_coverage", "unieval_groundedness", "c_score")


class PersoBench(Benchmark):
    name = "persobench"
    version = "1"

    def __init__(self, config: PersoBenchConfig) -> None:
        if config.mode not in MODES:
            raise UserError(f"benchmark.mode={config.mode} is unknown; it should be {' or '.join(MODES)}")
        self.config, self.published = config, config.compat == "reference"
        self.prompts = (PROMPTS[config.mode], *((PROMPTS["system"],) if config.closed else ()))
        files = [read_samples(path, name) for name, path in _files(config).items()]
        # In turns, so that a limit leaves something of each data set.
        samples = [sample for row in zip_longest(*files) for sample in row if sample is not None]
        self._samples = [self._asked(sample) for sample in samples[: config.limit]]
        self._commonest = Counter(sample.target for sample in self._samples).most_common(1)[0][0]
        self._load()

    def _asked(self, sample: Sample) -> Sample:
        """`sample` with its prompt."""
        slots: dict[str, Any] = {key: sample.metadata[key] for key in ("personas", "context")}
        slots["closed"] = self.config.closed
        if self.config.mode == "cot":
            # The published template shows the two keys without a comma in between, and some models imitate that.
            slots["separator"] = "" if self.published else ","
        system = PROMPTS["system"].messages() if self.config.closed else ()
        messages = (*system, *PROMPTS[self.config.mode].messages(**slots))
        return Sample(sample.id, messages, sample.target, sample.persona, None, sample.task, sample.metadata)

    def _load(self) -> None:
        """The models that are named, each behind a batching front, and the metrics they allow."""
        config = self.config
        self._fronts: dict[str, Batcher] = {}
        for key, kind in _SCORERS.items():
            name = getattr(config, key)
            if key == "coherence_model" and name == config.nli_model and name is not None:
                self._fronts[key] = self._fronts["nli_model"]
            elif name is not None:
                self._fronts[key] = Batcher(kind(name, key), _MODEL_BATCH)
        self._vectors = WordVectors(config.word_vectors) if config.word_vectors else None
        absent = {name for key, names in _NEEDS.items() if getattr(config, key) is None for name in names}
        absent |= set() if has_wordnet() else {"meteor"}
        absent |= {"ranking"} if absent & set(_RANKED) else set()
        self.metrics = {name: metric for name, metric in _METRICS.items() if name not in absent}
        self.primary = next(name for name in ("ranking", "c_score", "idf_overlap") if name in self.metrics)
        unset = [key for key in _NEEDS if getattr(config, key) is None]
        unset += ["NLTK's WordNet data (python -m nltk.downloader wordnet)"] if "meteor" in absent else []
        if unset:
            left_out = ", ".join(name for name in _METRICS if name in absent)
            logger.warning("persobench does not measure %s: there is no %s", left_out, ", ".join(unset))

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def groups(self, sample: Sample) -> Mapping[str, str]:
        return {"dataset": sample.metadata["dataset"]}

    def constant(self, sample: Sample) -> str:
        return json.dumps({"response": self._commonest})

    def chance(self, sample: Sample, rng: random.Random) -> str:
        others = [other.target for other in self._samples if other.id != sample.id] or [sample.target]
        return json.dumps({"response": rng.choice(others)})

    def reply(self, text: str) -> str | None:
        """The reply in a model's output, by the rule that this run goes by."""
        found = (parse_reply if self.published else read_reply)(text, self.config.closed)
        # Published code stops at blank text; half a character (a lone surrogate) is nothing a tokenizer takes.
        return found.encode(errors="replace").decode() if found and found.strip() else None

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        limit = self.config.max_new_tokens * (2 if self.config.mode == "cot" else 1)
        response = await roles.model.respond(Request(sample.messages, sample.persona, Sampling(limit)))
        reply = self.reply(response.text)
        if reply is None:
            values = {name: _WORST.get(name, 0.0) for name in self.metrics}
            cut = truncated(response.text, response.finish_reason)
            return Score(values | self._failed(cut, not cut), raw=response.text)
        values = self.compare(sample, reply) | self._failed(False, False) | await self._ask_models(sample, reply)
        if "ranking" in self.metrics:
            ue, coverage, groundedness, c = (values[name] for name in _RANKED)
            values["ranking"] = ranking_score(ue, coverage, groundedness, c, failure=0.0)
        return Score(values, raw=response.text)

    def _failed(self, cut: bool, malformed: bool) -> dict[str, float]:
        return {"invalid": float(cut or malformed), "truncated": float(cut), "malformed": float(malformed)}

    def persona_text(self, sample: Sample) -> str:
        """What replies are compared with: statements with spaces in between; as published, the cell run together."""
        assert sample.persona is not None
        return published_persona(sample.metadata["personas"]) if self.published else sample.persona.description

    def compare(self, sample: Sample, reply: str) -> dict[str, float]:
        """The metrics of one readable reply that need no model."""
        worded = reply
        if sample.metadata["dataset"] in _NO_APOSTROPHES and not self.published:
            worded = reply.replace("'", "")  # as the references' were: else "I'm" never meets "Im"
        values = {"bleu": bleu(worded, sample.target), **rouge_f(worded, sample.target)}
        if "meteor" in self.metrics:
            values["meteor"] = meteor(worded, sample.target)
        values |= {"dist1": distinct(reply, 1), "dist2": distinct(reply, 2)}
        values["idf_overlap"] = tfidf_overlap(self.persona_text(sample), reply)
        if self._vectors is not None:
            values["persona_coverage"] = vector_similarity(self.persona_text(sample), reply, self._vectors)
        return values

    async def _ask_models(self, sample: Sample, reply: str) -> dict[str, float]:
        """The metrics of one readable reply that models give, all asked at once."""
        persona = self.persona_text(sample)
        asked: dict[str, list[Any]] = {
            "nli_model": [(persona, reply)],
            "coherence_model": [(persona, reply), (sample.target, reply)],
            "bertscore_model": [(reply, sample.target)],
        }
        if self.published:  # one text without segments; the arguments of the first are swapped (note 5, flaw 1)
            asked["nli_model"] = [(f"{reply} {persona}", None)]
            asked["coherence_model"] = [(f"{first} [SEP] {reply}", None) for first in (persona, sample.target)]
        if "unieval_model" in self._fronts:
            dimensions, texts = zip(*questions(reply, sample.metadata["context"], persona), strict=True)
            asked["unieval_model"] = list(texts)
        items = [(key, item) for key in self._fronts for item in asked[key]]
        results = await asyncio.gather(*(self._fronts[key].ask(item) for key, item in items))
        answers: dict[str, list[Any]] = {key: [] for key in self._fronts}
        for (key, _), result in zip(items, results, strict=True):
            answers[key].append(result)

        values: dict[str, float] = {}
        if found := answers.get("nli_model"):
            values |= {"c_score": c_score(found[0]), "p_consistency": p_consistency(found[0])}
        if found := answers.get("coherence_model"):
            values["ue_score"] = ue_score(*found)
        if found := answers.get("bertscore_model"):
            values |= dict(zip(_NEEDS["bertscore_model"], found[0], strict=True))
        if found := answers.get("unieval_model"):
            combined = combine(list(zip(dimensions, found, strict=True)))
            values |= {f"unieval_{name}": value for name, value in combined.items()}
        return values

    def write_artifacts(self, rows: Sequence[Row], folder: Path) -> None:
        """responses_<dataset>.csv in the official form, and metrics.csv as the official tables have it (mean and
        population standard deviation over all rows), beside the mean over readable replies."""
        datasets = sorted({row.groups["dataset"] for row in rows})
        for dataset in datasets:
            mine = [row for row in rows if row.groups["dataset"] == dataset]
            lines = [[self.reply(row.raw) or ""] for row in mine]
            _write_csv(inside(folder, f"responses_{dataset}.csv"), ["gen_response"], lines)
        table = []
        for dataset in datasets:
            scored = [row.values for row in rows if row.groups["dataset"] == dataset and row.values]
            for name in self.metrics:
                numbers = np.array([values[name] for values in scored if name in values])
                readable = np.array([values[name] for values in scored if name in values and not values["invalid"]])
                means = [part.mean() if len(part) else math.nan for part in (numbers, readable)]
                spread = numbers.std() if len(numbers) else math.nan
                shown = [f"{number:.4f}" for number in (means[0], spread, means[1])]
                table.append([dataset, name, len(numbers), *shown[:2], len(readable), shown[2]])
        header = ["dataset", "metric", "n", "mean", "population_std", "n_readable", "mean_readable"]
        _write_csv(folder / "metrics.csv", header, table)


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)


def build(config: PersoBenchConfig) -> PersoBench:
    return PersoBench(config)
