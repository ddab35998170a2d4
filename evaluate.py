"""Measure stacks of personalizers: `python evaluate.py benchmark=town personalizers=[outputs/x/personalizer]`.

`baselines` names other stacks to measure beside it on the same samples; `judge`, `reference` and `user_simulator` say
who plays the other roles. Ends in a table and report.html. `benchmark=all` measures on every benchmark there is.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from persona.config import EvaluateConfig, entry, load_config, run_state, save_run_files, start_processes
from persona.errors import UserError

logger = logging.getLogger(__name__)


def evaluate(cfg: EvaluateConfig) -> Path:
    """Run a benchmark under one or several stacks; returns the folder of results. Raises UserError on bad input."""
    from persona.benchmarks import BENCHMARKS, NOT_IN_ALL, OVER_PEOPLE
    from persona.evaluation import report
    from persona.evaluation.judges.gate import warn_unless_passed
    from persona.evaluation.report.table import print_table

    processes = start_processes()
    root = Path(cfg.output) / "evaluation"
    configs = [cfg.benchmark]
    if cfg.benchmark.name == "all":
        changes = {key: value for key, value in vars(cfg.benchmark).items() if key != "name" and value is not None}
        names = [name for name in BENCHMARKS if name not in NOT_IN_ALL]
        configs = [replace(load_config("evaluate", [f"benchmark={name}"]).benchmark, **changes) for name in names]
    folder = root / cfg.benchmark.name if len(configs) == 1 else root
    players = Players(cfg)
    people = players.data(cfg.data) if any(config.name in OVER_PEOPLE for config in configs) else None
    benchmarks = [players.benchmark(config, people) for config in configs]
    if any("judge" in benchmark.needs for benchmark in benchmarks):
        asked = {"endpoint": lambda role: role.endpoint.model, "local": lambda role: role.model.path}
        for line in warn_unless_passed([asked[r.kind](r) for r in cfg.judge.values() if r.kind in asked], "outputs"):
            logger.warning(line)
    stacks, own = players.stacks()
    save_run_files(folder, cfg)
    with run_state(folder):
        for config, benchmark in zip(configs, benchmarks, strict=True):
            for name, stack in stacks.items():
                measure(benchmark, config, players, name, stack, root / benchmark.name / name, processes)
        if processes.is_main_process:
            folders = [root / benchmark.name / name for benchmark in benchmarks for name in stacks]
            print_table(folders, baseline=own)
            report.write_report(folders, folder / "report.html", baseline=own)
    return folder


class Players:
    """Everybody who takes part, loaded once: the base LM or endpoint, its stacks, and the other roles."""

    def __init__(self, cfg: EvaluateConfig) -> None:
        from persona import lm, players
        from persona.evaluation.endpoints.endpoint import Endpoint

        self.cfg = cfg
        self.base = Endpoint(cfg.endpoint) if cfg.endpoint.model else lm.load(cfg.model)
        self.judges = players.judges(cfg.judge)
        self.reference = players.play(cfg.reference, "reference")
        self.user_simulator = players.play(cfg.user_simulator, "user_simulator")

    def data(self, config: Any) -> Any:
        from persona import data

        return data.load(config)

    def benchmark(self, config: Any, people: Any) -> Any:
        """The benchmark, once every role it needs is taken. Raises UserError."""
        from persona import benchmarks

        benchmark = benchmarks.build(config, people)
        taken = {"judge": self.judges, "reference": self.reference, "user_simulator": self.user_simulator}
        for role in benchmark.needs:
            if not taken[role]:
                raise UserError(f"benchmark {benchmark.name} needs a {role}: choose one with {role}=endpoint, say")
        return benchmark

    def model(self, stack: Sequence[Any]) -> Any:
        """The base under a stack."""
        import persona
        from persona.evaluation.endpoints.endpoint import Endpoint
        from persona.players import personalized

        if isinstance(self.base, Endpoint):
            return personalized(self.base, stack, self.cfg.model)
        return persona.load(self.base, stack, self.cfg.model.batch_size)

    def stacks(self) -> tuple[dict[str, Any], str]:
        """Display name → stack of personalizers (or a trivial answer), and the name of the measured one.

        Differences are taken against the measured stack: a baseline marked ▼ is one it beats.
        """
        from persona.evaluation.episodes import Trivial

        cfg = self.cfg
        measured = self.model(cfg.personalizers)
        loaded = list(getattr(measured, "personalizers", ()))
        own = " + ".join(personalizer.method for personalizer in loaded) or "untouched"
        if own in cfg.baselines:
            own = cfg.name
        stacks: dict[str, Any] = dict(cfg.baselines)
        if loaded or [] not in stacks.values():
            if own in stacks:
                raise UserError(f"the baselines already have a stack called {own!r}: give this one another name=…")
            stacks[own] = loaded
        else:  # nothing was named, and a baseline is the untouched LM already
            own = next(name for name, stack in stacks.items() if stack == [])
        if cfg.trivial:
            stacks |= {f"{kind} answer": Trivial(kind) for kind in ("constant", "random")}
        if odd := [name for name in stacks if Path(name).name != name or name in ("", "..")]:
            raise UserError(f"{odd[0]!r} cannot name a folder of results: it should be a name without a slash")
        return stacks, own


def measure(
    benchmark: Any, config: Any, players: Players, name: str, stack: Any, folder: Path, processes: Any
) -> None:
    """One stack on one benchmark, into its own folder."""
    from persona.evaluation import plots, results
    from persona.evaluation.episodes import Cast, Trivial, run_benchmark
    from persona.players import model_settings, role_settings

    cfg = players.cfg
    model: Any = stack if isinstance(stack, Trivial) else players.model(stack)
    local = hasattr(model, "prefixes")
    settings: Mapping[str, Any] = {
        "model": vars(stack) if isinstance(stack, Trivial) else model_settings(players.base),
        "stack": [[p.method, p.config(), p.fingerprint] for p in getattr(model, "personalizers", ())],
        "benchmark": asdict(config),
        "judge": {key: role_settings(role) for key, role in cfg.judge.items()},
        "reference": role_settings(cfg.reference),
        "user_simulator": role_settings(cfg.user_simulator),
    }
    run_benchmark(
        benchmark,
        Cast(model, players.judges, players.user_simulator, players.reference),
        folder,
        stack=name,
        settings=json.loads(json.dumps(settings, default=str)),
        batch_size=cfg.model.batch_size,
        overwrite=cfg.overwrite,
        processes=processes,
    )
    if processes.is_main_process:
        for personalizer in getattr(model, "personalizers", ()):
            if did := personalizer.did():
                logger.warning("%s: %s %s", name, personalizer.method, did)
        if hasattr(benchmark, "write_artifacts"):
            benchmark.write_artifacts(results.read_rows(folder / "samples.jsonl"), folder)
        if local:
            plots.write(model, benchmark.samples(), folder)


if __name__ == "__main__":
    entry(evaluate, "evaluate")
