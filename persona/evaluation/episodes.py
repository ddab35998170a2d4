"""The runner: many episodes open at once, what they wait for answered in full batches, every finished one on disk.

A benchmark writes its episode as if it had the model to itself; here the requests of all open episodes meet and are
answered together, whoever they are for. A folder holds results of one setting only, and a killed run goes on.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import math
import platform
import random
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from persona.errors import UserError
from persona.evaluation import results
from persona.evaluation.batching import AsyncModel, LanguageModel
from persona.evaluation.judges.judging import Judge, ModelJudge
from persona.evaluation.judges.judging import Unscored as Unscored
from persona.evaluation.prompts import Prompt
from persona.evaluation.results import Row, RowWriter, Summary
from persona.evaluation.roles import Parrot, Roles, Speaker
from persona.evaluation.statistics import Metric, check_metric
from persona.files import atomic_write
from persona.types import Sample, Score

_OPEN_BATCHES = 8  # batches' worth of open episodes: enough to sort by length, few enough to finish steadily
_REPORT_SECONDS = 30.0


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


class Processes(Protocol):
    """Several processes sharing one run; accelerate's PartialState is one."""

    process_index: int
    num_processes: int

    def wait_for_everyone(self) -> None: ...


@dataclass(frozen=True)
class Trivial:
    """In the model's place: answers without reading. "constant" or "random" (drawn by sample id)."""

    kind: str
    seed: int = 0

    def speaker(self, benchmark: Benchmark, sample: Sample) -> Parrot:
        if self.kind == "constant":
            return Parrot(benchmark.constant(sample))
        return Parrot(benchmark.chance(sample, random.Random(f"{self.seed}-{sample.id}")))


Player = LanguageModel | Speaker  # a local model in batches, or an endpoint


@dataclass(frozen=True)
class Cast:
    """Who plays which role in a run. A judge may also be a Judge of its own kind (a rule, the town's oracle)."""

    model: Player | Trivial
    judges: Sequence[Player | Judge] = ()
    user_simulator: Player | None = None
    reference: Player | None = None

    def players(self) -> dict[str, Any]:
        """Everybody by role, numbered where a role is taken by several."""
        judges = {f"judge {number}": judge for number, judge in enumerate(self.judges, start=1)}
        everybody: dict[str, Any] = {"model": self.model, **judges}
        everybody |= {"user_simulator": self.user_simulator, "reference": self.reference}
        return {role: player for role, player in everybody.items() if player is not None}

    def usage(self) -> dict[str, Any]:
        """Requests, tokens and cost of each role that counts them (endpoints)."""
        return {role: dict(player.usage) for role, player in self.players().items() if hasattr(player, "usage")}


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
    rank, world = (processes.process_index, processes.num_processes) if processes else (0, 1)
    if not overwrite:
        _check_settings(folder, settings)
    if processes:
        processes.wait_for_everyone()
    if rank == 0:
        _prepare(folder, settings, overwrite)
    if processes:
        processes.wait_for_everyone()

    done = {row.id for path in _parts(folder) for row in results.read_rows(path)}
    left = [sample for sample in samples[rank::world] if sample.id not in done]
    started, before = time.monotonic(), cast.usage()
    writer = RowWriter(folder / ("samples.jsonl" if rank == 0 else f"samples.part{rank}.jsonl"))
    try:
        shown = progress and rank == 0 and bool(left)
        with _Bar(f"{benchmark.name} · {stack}", len(samples[rank::world]), len(left), shown) as bar:
            _run_loop(_run_all(benchmark, cast, left, batch_size, writer, bar))
        writer.sync()
    finally:
        writer.close()
    if processes:
        processes.wait_for_everyone()
    if rank == 0:
        # Endpoints live on from run to run and count on.
        usage = {
            role: {key: round(value - before[role].get(key, 0), 9) for key, value in now.items()}
            for role, now in cast.usage().items()
        }
        spent = {"usage": usage} if usage else {}
        _finish(
            folder, benchmark, samples, stack, settings, time.monotonic() - started, len(samples) - len(done), spent
        )
    if processes:
        processes.wait_for_everyone()
    return results.read_summary(folder)


async def _run_all(
    benchmark: Benchmark, cast: Cast, left: Sequence[Sample], batch_size: int, writer: RowWriter, bar: _Bar
) -> None:
    queue = iter(left)
    fronts: dict[int, AsyncModel] = {}

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="model") as executor:

        def speaker(player: Any, name: str) -> Any:
            if player is None or inspect.iscoroutinefunction(player.respond):
                return player
            return fronts.setdefault(id(player), AsyncModel(player, batch_size, executor, name))

        def judge(player: Any, number: int) -> Judge:
            return player if hasattr(player, "ask") else ModelJudge(speaker(player, f"judge {number}"))

        trivial = cast.model if isinstance(cast.model, Trivial) else None
        roles = Roles(
            model=Parrot("") if isinstance(cast.model, Trivial) else speaker(cast.model, "model"),
            judges=[judge(player, number) for number, player in enumerate(cast.judges, start=1)],
            user_simulator=speaker(cast.user_simulator, "user_simulator"),
            reference=speaker(cast.reference, "reference"),
        )
        roles.check(benchmark.name, benchmark.needs)
        for player in cast.players().values():
            if left and hasattr(player, "check"):
                await player.check()  # an endpoint that does not answer is known before the first sample

        async def worker() -> None:
            for sample in queue:
                mine = roles if trivial is None else replace(roles, model=trivial.speaker(benchmark, sample))
                score = await _episode(benchmark, sample, mine)
                writer.write(Row.of(sample, benchmark.cluster(sample), score, benchmark.groups(sample)))
                bar.advance()

        servers = [asyncio.create_task(front.serve(writer.sync)) for front in fronts.values()]
        workers = [asyncio.create_task(worker()) for _ in range(min(len(left), batch_size * _OPEN_BATCHES))]
        try:
            # Whichever fails first ends the run: a model (a server never returns) or an episode.
            pending: set[asyncio.Task] = set(workers)
            while pending:
                ended, _ = await asyncio.wait({*servers, *pending}, return_when=asyncio.FIRST_COMPLETED)
                for task in (*servers, *workers):
                    if task in ended:
                        task.result()
                pending -= ended
        finally:
            for task in (*servers, *workers):
                task.cancel()
            await asyncio.gather(*servers, *workers, return_exceptions=True)


async def _episode(benchmark: Benchmark, sample: Sample, roles: Roles) -> Score:
    try:
        score = await benchmark.episode(sample, roles)
    except Unscored as error:
        return Score(reason=error.reason, raw=error.raw)
    except Exception as error:
        error.add_note(f'This happened in benchmark "{benchmark.name}", sample "{sample.id}".')
        raise
    bad = [name for name, value in score.values.items() if not math.isfinite(value)]
    if bad:
        return replace(score, values={}, reason=f"{bad[0]} is not finite")
    if not score.scored and not score.reason:
        return replace(score, reason="no values and no reason given")
    return score


def _run_loop(main: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(main)
        return
    # A notebook has a running loop in this thread, and loops do not nest: take another thread.
    failure: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(main)
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


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


def _parts(folder: Path) -> list[Path]:
    return [folder / "samples.jsonl", *sorted(folder.glob("samples.part*.jsonl"))]


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "meta.json"
    if not path.exists():
        if any(part.exists() for part in _parts(folder)):
            raise UserError(f"{folder} holds samples but no meta.json; use another output folder or overwrite=true.")
        return
    before = json.loads(path.read_text(encoding="utf-8"))["settings"]
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
        for path in (folder / "summary.json", *_parts(folder), folder / "meta.json"):
            path.unlink(missing_ok=True)
    if not (folder / "meta.json").exists():
        results.write_json(folder / "meta.json", {"fingerprint": fingerprint(settings), "settings": settings})


def fingerprint(settings: Mapping[str, Any]) -> str:
    """16 hex digits of the settings, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _finish(
    folder: Path,
    benchmark: Benchmark,
    samples: Sequence[Sample],
    stack: str,
    settings: Mapping[str, Any],
    seconds: float,
    ran: int,
    spent: Mapping[str, Any],
) -> None:
    rows = {row.id: row for path in _parts(folder) for row in results.read_rows(path)}
    ordered = [rows[sample.id] for sample in samples]
    with atomic_write(folder / "samples.jsonl") as temporary, open(temporary, "wb") as stream:
        for row in ordered:
            stream.write(row.line())
    for part in _parts(folder)[1:]:
        part.unlink()
    if ran == 0 and (folder / "summary.json").exists():
        environment = results.read_summary(folder).environment
    else:
        environment = _environment() | {"seconds": round(seconds, 3), "samples_per_second": round(ran / seconds, 3)}
        environment |= spent
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


def _environment() -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}", **versions}


class _Bar:
    """Progress with rate and time left: a bar on a terminal, a line now and then in a log file."""

    def __init__(self, title: str, total: int, left: int, shown: bool) -> None:
        self._title, self._total, self._left, self._done = title, total, left, 0
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._shown, self._started = shown, time.monotonic()
        self._spoke = self._started
        if shown and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task(title, total=total, completed=total - left, rate="")

    def __enter__(self) -> _Bar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        self._done += 1
        now = time.monotonic()
        rate = self._done / max(now - self._started, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, advance=1, rate=f"{rate:.1f}/s")
        elif self._shown and (now - self._spoke > _REPORT_SECONDS or self._done == self._left):
            self._spoke = now
            minutes = (self._left - self._done) / rate / 60
            done = self._total - self._left + self._done
            self._console.print(f"{self._title}: {done}/{self._total}, {rate:.1f}/s, {minutes:.1f} min left")
