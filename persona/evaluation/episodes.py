"""Benchmarks: a list of samples and one coroutine each, run into a folder of results.

A folder holds results of one setting only, and a killed run goes on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import platform
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from persona.errors import UserError
from persona.evaluation import results
from persona.evaluation.batching import counting_cuts
from persona.evaluation.judges.judging import Unscored as Unscored
from persona.evaluation.prompts import Prompt
from persona.evaluation.results import Row, Summary
from persona.evaluation.roles import Cast as Cast
from persona.evaluation.roles import Parrot, Player, Roles
from persona.evaluation.runner import Processes, part, parts, place, run_episodes, usage, usage_files
from persona.evaluation.statistics import Metric, check_metric
from persona.files import atomic_write, read_meta, write_json
from persona.types import Sample, Score


class Benchmark:
    """A list of samples and one coroutine. Subclass it to inherit the rest.

    `needs` names roles beside the model ("judge", "reference", "user_simulator"). `prompts` are the files its results
    depend on. `primary` is the metric that stands for the benchmark in an overview.
    """

    name: str
    version: str
    metrics: Mapping[str, Metric]
    primary: str = ""
    needs: Sequence[str] = ()
    prompts: Sequence[Prompt] = ()

    def samples(self) -> Sequence[Sample]:
        """All samples, in a fixed order, with unique ids."""
        raise NotImplementedError

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        """Run one sample. A reply that cannot be read is `Score(reason=..., raw=...)` or raises `Unscored`."""
        raise NotImplementedError

    def cluster(self, sample: Sample) -> str:
        """What makes samples dependent: by default the persona they share, else each sample is its own."""
        return sample.id if sample.persona is None else sample.persona.id

    def groups(self, sample: Sample) -> Mapping[str, str]:
        """Breakdowns the sample belongs to, as {"tier": "hard"}: each becomes a table in the report."""
        return {}

    def constant(self, sample: Sample) -> str:
        """The one answer that a model which reads nothing would give: the commonest truth, or commonest place."""
        if sample.options:
            places = Counter(s.options.index(s.target) for s in self.samples() if s.options and s.target in s.options)
            return sample.options[min(places.most_common(1)[0][0] if places else 0, len(sample.options) - 1)]
        return Counter(s.target for s in self.samples()).most_common(1)[0][0]

    def chance(self, sample: Sample, rng: random.Random) -> str:
        """A random answer: one of the options, or another sample's truth."""
        return rng.choice(sample.options or [s.target for s in self.samples()])


@dataclass(frozen=True)
class Trivial:
    """In the model's place: answers without reading. "constant" or "random" (drawn by sample id)."""

    kind: str
    seed: int = 0

    def speaker(self, benchmark: Benchmark, sample: Sample) -> Parrot:
        if self.kind == "constant":
            return Parrot(benchmark.constant(sample))
        return Parrot(benchmark.chance(sample, random.Random(f"{self.seed}-{sample.id}")))


def data_fingerprint(samples: Sequence[Sample]) -> str:
    """16 hex digits over ids, messages, targets, options and personas (of histories: the length), in order."""
    digest = hashlib.sha256()
    for sample in samples:
        persona = None
        if sample.persona is not None:
            known = sample.persona
            persona = [known.id, known.description, known.statements, dict(known.attributes), len(known.history)]
        messages = [[message.role, message.content] for message in sample.messages]
        entry = [sample.id, sample.task, messages, sample.target, sample.options, persona]
        digest.update(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()[:16]


def run_benchmark(
    benchmark: Benchmark,
    model: Player | Trivial | Cast,
    folder: Path | str,
    *,
    stack: str,
    settings: Mapping[str, Any],
    batch_size: int = 32,
    overwrite: bool = False,
    processes: Processes | None = None,
    progress: bool = True,
) -> Summary:
    """Run all samples that `folder` does not hold yet, and write its summary. `model` alone is a cast of one.

    A sample that is unscored as a call to an endpoint failed is run again at every start, until it succeeds.

    `stack` is the display name of what is measured. `settings` (JSON values) is everything that makes numbers
    comparable and that only the caller knows: base model fingerprint, personalizers' manifests, sampling, seed; the
    benchmark, its version and its data are added here. With `processes`, each one takes every n-th sample and writes
    its own part, which rank zero joins. Finished rows end in the samples' order, however they came about.

    Raises UserError when the folder holds results of other settings (naming what differs; `overwrite` deletes them),
    for samples without unique ids, and whatever the model raises. `Unscored` inside an episode is counted.
    """
    folder = Path(folder)
    samples = list(benchmark.samples())
    _check(benchmark, samples)
    cast = model if isinstance(model, Cast) else Cast(model)
    settings = {
        "benchmark": benchmark.name,
        "benchmark_version": benchmark.version,
        "prompts": {prompt.name: prompt.hash for prompt in benchmark.prompts},
        "data": data_fingerprint(samples),
        **json.loads(json.dumps(settings)),
    }
    rank, world = place(processes)
    if not overwrite:
        _check_settings(folder, settings)
    if processes:
        processes.wait_for_everyone()
    if rank == 0:
        _prepare(folder, settings, overwrite)
    if processes:
        processes.wait_for_everyone()

    path = folder / "samples.jsonl"
    done = {id for id, row in _rows(path).items() if not row.failed}
    mine = samples[rank::world]
    trivial = cast.model if isinstance(cast.model, Trivial) else None

    async def episode(sample: Sample, roles: Roles) -> bytes:
        mine = roles if trivial is None else replace(roles, model=trivial.speaker(benchmark, sample))
        score = await _episode(benchmark, sample, mine)
        return Row.of(sample, benchmark.cluster(sample), score, benchmark.groups(sample)).line()

    started = time.monotonic()
    run_episodes(
        [sample for sample in mine if sample.id not in done],
        episode,
        cast if trivial is None else replace(cast, model=Parrot("")),
        path if rank == 0 else part(path, rank),
        who=f"benchmark {benchmark.name}",
        needs=benchmark.needs,
        batch_size=batch_size,
        title=f"{benchmark.name} · {stack}",
        total=len(mine),
        show=progress and rank == 0,
    )
    if processes:
        processes.wait_for_everyone()
    if rank == 0:
        _finish(folder, benchmark, samples, stack, settings, time.monotonic() - started, len(samples) - len(done))
    if processes:
        processes.wait_for_everyone()
    return results.read_summary(folder)


async def _episode(benchmark: Benchmark, sample: Sample, roles: Roles) -> Score:
    with counting_cuts() as cut:
        try:
            score = await benchmark.episode(sample, roles)
        except Unscored as error:
            score = Score(reason=error.reason, raw=error.raw, failed=error.failed)
        except Exception as error:
            error.add_note(f'This happened in benchmark "{benchmark.name}", sample "{sample.id}".')
            raise
    score = replace(score, cut=dict(sorted(cut.items())))
    bad = [name for name, value in score.values.items() if not math.isfinite(value)]
    if bad:
        return replace(score, values={}, reason=f"{bad[0]} is not finite")
    if not score.scored and not score.reason:
        return replace(score, reason="no values and no reason given")
    return score


def _check(benchmark: Benchmark, samples: Sequence[Sample]) -> None:
    if not samples:
        raise UserError(f'Benchmark "{benchmark.name}" has no samples.')
    for name, metric in benchmark.metrics.items():
        check_metric(name, metric)
    if benchmark.primary and benchmark.primary not in benchmark.metrics:
        raise UserError(f'Benchmark "{benchmark.name}" has no metric "{benchmark.primary}", its primary one.')
    seen: set[str] = set()
    for number, sample in enumerate(samples):
        if sample.id in seen:
            raise UserError(f'Benchmark "{benchmark.name}": sample {number} repeats the id "{sample.id}".')
        seen.add(sample.id)


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "meta.json"
    if not path.exists():
        if any(file.exists() for file in parts(folder / "samples.jsonl")):
            raise UserError(f"{folder} holds samples but no meta.json; use another output folder or overwrite=true.")
        return
    before = read_meta(path).get("settings")
    if not isinstance(before, dict):
        raise UserError(f"{path} does not say what its rows are of: restore it, or use overwrite=true.")
    differing = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
    if differing:
        shown = "; ".join(f"{key} was {_short(before.get(key))}, is {_short(settings.get(key))}" for key in differing)
        raise UserError(
            f"{folder} holds results of other settings: {shown}. Use another output folder or overwrite=true."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _prepare(folder: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
    if overwrite and folder.exists():
        rows = folder / "samples.jsonl"
        for path in (folder / "summary.json", *parts(rows), *usage_files(rows), folder / "meta.json"):
            path.unlink(missing_ok=True)
    if not (folder / "meta.json").exists():
        write_json(folder / "meta.json", {"fingerprint": fingerprint(settings), "settings": settings})


def fingerprint(settings: Mapping[str, Any]) -> str:
    """16 hex digits of the settings, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _rows(path: Path) -> dict[str, Row]:
    """By sample. A row of calls that failed stands for it only until there is another one."""
    rows: dict[str, Row] = {}
    for row in (row for file in parts(path) for row in results.read_rows(file)):
        if row.id not in rows or rows[row.id].failed:
            rows[row.id] = row
    return rows


def _finish(
    folder: Path,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    stack: str,
    settings: Mapping[str, Any],
    seconds: float,
    ran: int,
) -> None:
    path = folder / "samples.jsonl"
    rows = _rows(path)
    ordered = [rows[sample.id] for sample in samples]
    with atomic_write(path) as temporary, open(temporary, "wb") as stream:
        for row in ordered:
            stream.write(row.line())
    for file in parts(path)[1:]:
        file.unlink()
    if ran == 0 and (folder / "summary.json").exists():
        environment = results.read_summary(folder).environment
    else:
        environment = _environment() | {"seconds": round(seconds, 3), "samples_per_second": round(ran / seconds, 3)}
        if asked := usage(path):
            environment["usage"] = asked
    summary = results.summarize(
        ordered,
        benchmark=benchmark.name,
        benchmark_version=benchmark.version,
        stack=stack,
        metrics=benchmark.metrics,
        primary=benchmark.primary,
        settings=settings,
        fingerprint=fingerprint(settings),
        environment=environment,
    )
    results.write_summary(folder, summary)


@functools.cache
def _environment() -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}", **versions}
