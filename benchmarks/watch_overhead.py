"""What measuring a training costs: seconds per step with everything of persona/training/watch.py and without.

    python benchmarks/watch_overhead.py                                # the town's LM, 8 rows a step
    python benchmarks/watch_overhead.py --batch-size 1 --length 16     # steps so short that it shows most
    python benchmarks/watch_overhead.py --scratch 32 1 300 --batch-size 1 --length 4 --turns 302   # hardly any step

One training of equal steps, in turns of `--log-every`: transformers' Trainer alone, and with measured windows that end
in a row of metrics.jsonl. Beside it what one beat of the heartbeat's thread takes, of which there is one in 15 s.
Seconds are CPU time on a CPU, so that a busy machine slows both alike; the overhead is the ratio of sums over turns
minus one, with a 95 % bootstrap interval over pairs of turns.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from axis_extraction import SPEED, conversations_of, from_scratch
from rich.console import Console
from transformers import ProgressCallback, Trainer
from transformers.trainer_callback import PrinterCallback

from persona import heartbeat, lm
from persona.evaluation.statistics import estimate
from persona.training.rows import padded
from persona.training.trainer import TrainerConfig, arguments
from persona.training.watch import Metrics, Watched


class Switched(Watched, Trainer):
    """Measures in every second turn; in the others it is transformers' Trainer."""

    on = True

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        pass


def switched(name: str) -> Any:
    measured, plain = getattr(Watched, name), getattr(Trainer, name)
    return lambda self, *args, **kwargs: (measured if self.on else plain)(self, *args, **kwargs)


for method in ("get_batch_samples", "compute_loss_context_manager", "training_step"):
    setattr(Switched, method, switched(method))


class Turns(Metrics):
    """Ends a turn at every log: seconds of the measured ones and of the others."""

    def __init__(self, trainer: Any, config: TrainerConfig, out: Path) -> None:
        super().__init__(trainer, config, out)
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.since = 0.0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.on:
            super().on_step_end(*args, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.trainer.on:
            super().on_log(args, state, control, logs=logs, **kwargs)
        if args.device.type != "cpu":
            torch.cuda.synchronize(args.device)
        now = time.process_time() if args.device.type == "cpu" else time.perf_counter()
        if self.since and "loss" in logs:
            self.seconds[self.trainer.on].append(now - self.since)
        self.since, self.trainer.on, self.trainer._window = now, not self.trainer.on, None


def beat_seconds(out: Path) -> float:
    """CPU time of one beat."""
    with heartbeat.beating(out):
        heart = heartbeat._Heart(out, 0, 1)
        since = time.process_time()
        for _ in range(200):
            heart.beat()
        return (time.process_time() - since) / 200


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=int, nargs=3, metavar=("HIDDEN", "LAYERS", "VOCABULARY"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--turns", type=int, default=60)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = "town"
        if options.scratch:
            texts = [message.content for talk in conversations_of(256) for message in talk]
            path = str(from_scratch(Path(folder) / "lm", *options.scratch, texts))
        base = lm.load(lm.ModelConfig(path=path))
        half = options.length // 2
        row = (tuple(range(10, 10 + half)), tuple(range(10, 10 + half)))
        config = TrainerConfig(
            batch_size=options.batch_size, max_steps=options.turns * options.log_every, log_every=options.log_every,
            save_every=10**6, wandb="disabled", cpu=base.device.type == "cpu",
        )  # fmt: skip
        trainer = Switched(
            model=base.model.requires_grad_(True),
            args=arguments(config, Path(folder), False),
            train_dataset=[row] * (options.batch_size * 1000),  # type: ignore[arg-type]
            data_collator=partial(padded, pad=base.tokenizer.pad_token_id),
        )
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        turns = Turns(trainer, config, Path(folder))
        trainer.add_callback(turns)
        trainer.train()
        beat = beat_seconds(Path(folder))
    pairs = list(zip(turns.seconds[True], turns.seconds[False], strict=False))
    rows = [{"bare": measured, "timed": bare} for measured, bare in pairs]
    ratio = estimate(rows, [str(i) for i in range(len(rows))], "overhead", SPEED)
    assert ratio is not None and ratio.low is not None and ratio.high is not None
    low, value, high = (100 * (share - 1) for share in (ratio.low, ratio.value, ratio.high))
    measured, bare = (1000 * sum(side) / len(pairs) / options.log_every for side in zip(*pairs, strict=True))
    Console(width=119).print(
        f"{bare:.2f} ms a step bare, {measured:.2f} ms measured: {measured - bare:+.2f} ms, "
        f"{value:+.2f} % [{low:+.2f}, {high:+.2f}] "
        f"({len(pairs)} pairs of {options.log_every} steps, batch {options.batch_size} x {options.length})\n"
        f"a beat takes {1000 * beat:.2f} ms: {100 * beat / heartbeat.INTERVAL:.4f} % of the time between two",
        highlight=False,
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
