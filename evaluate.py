"""Measure stacks of personalizers: `python evaluate.py benchmark=town personalizers=[outputs/x/personalizer]`.

`baselines` names other stacks to measure beside it on the same samples. Ends in a table and report.html.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from persona.config import EvaluateConfig, entry, save_run_files
from persona.errors import UserError


def evaluate(cfg: EvaluateConfig) -> Path:
    """Run a benchmark under one or several stacks; returns the folder of results. Raises UserError on bad input."""
    import torch
    from accelerate import PartialState

    import persona
    from persona import benchmarks, data, lm
    from persona.evaluation import plots, report, results
    from persona.evaluation.episodes import run_benchmark
    from persona.evaluation.table import print_table

    # Before the LM is loaded, as it chooses this process's GPU. Without one, every process that torchrun starts would
    # take itself for the only one unless told that the CPU is meant.
    processes = PartialState(cpu=not torch.cuda.is_available())
    base = lm.load(cfg.model)
    people = data.load(cfg.data)
    benchmark = benchmarks.build(cfg.benchmark, people)
    folder = Path(cfg.output) / "evaluation" / cfg.benchmark.name
    measured = persona.load(base, cfg.personalizers, cfg.model.batch_size)
    own = " + ".join(personalizer.method for personalizer in measured.personalizers) or "untouched"
    if own in cfg.baselines:
        own = cfg.name
    # Differences are taken against the stack that is measured: a baseline marked ▼ is one it beats.
    stacks: dict[str, list[Any]] = dict(cfg.baselines)
    if measured.personalizers or [] not in stacks.values():
        if own in stacks:
            raise UserError(f"the baselines already have a stack called {own!r}: give this one another name=…")
        stacks[own] = list(measured.personalizers)
    else:  # nothing was named, and a baseline is the untouched LM already
        own = next(name for name, stack in stacks.items() if stack == [])
    if odd := [name for name in stacks if Path(name).name != name]:
        raise UserError(f"{odd[0]!r} cannot name a folder of results: it should hold no slash")
    save_run_files(folder, cfg)
    for name, stack in stacks.items():
        model = persona.load(base, stack, cfg.model.batch_size)
        settings = {
            "base": base.identity,
            "dtype": str(base.dtype),
            "stack": [[p.method, p.config(), p.fingerprint] for p in model.personalizers],
            "benchmark": {key: value for key, value in vars(cfg.benchmark).items()},
        }
        run_benchmark(
            benchmark,
            model,
            folder / name,
            stack=name,
            settings=json.loads(json.dumps(settings, default=str)),
            batch_size=cfg.model.batch_size,
            overwrite=cfg.overwrite,
            processes=processes,
        )
        if processes.is_main_process:
            if hasattr(benchmark, "write_artifacts"):
                benchmark.write_artifacts(results.read_rows(folder / name / "samples.jsonl"), folder / name)
            plots.write(model, benchmark.samples(), folder / name)
    if processes.is_main_process:
        folders = [folder / name for name in stacks]
        print_table(folders, baseline=own)
        report.write_report(folders, folder / "report.html", baseline=own)
    return folder


if __name__ == "__main__":
    entry(evaluate, "evaluate")
