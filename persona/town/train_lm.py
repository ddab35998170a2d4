"""Train the town's language model: `python -m persona.town.train_lm --out outputs/town_lm`.

What batch a step sees depends on (seed, step) alone, so a run killed at any moment goes on from its last checkpoint
with the losses it would have had. `out` holds checkpoint/, metrics.jsonl and model/, a Hugging Face directory of the
weights so far.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import json
import math
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from persona.errors import UserError
from persona.files import atomic_folder, atomic_write
from persona.town import grammar
from persona.town.drills import DRILLS
from persona.town.tokenizer import build_tokenizer, encode
from persona.types import Conversation, Message

# Shares of the grammar's stages 0, 1, 2 by training progress, linear in between: easy documents bring the first
# circuits quickly, the last stage is what the model is for, and no stage ever vanishes.
CURRICULUM = (
    (0.00, (0.80, 0.20, 0.00)),
    (0.08, (0.50, 0.40, 0.10)),
    (0.30, (0.35, 0.35, 0.30)),
    (0.60, (0.15, 0.25, 0.60)),
    (1.00, (0.08, 0.12, 0.80)),
)
# Relative frequencies of the kinds of documents: three in four want something looked up in the context (voices,
# ratings, tags, facts), which is learnt last by far; the assistant's own behaviour is learnt in passing.
KIND_WEIGHTS = {
    "drill_described": 18,
    "drill_items": 14,
    "drill_statements": 11,
    "described": 12,
    "items": 18,
    "statements": 7,
    "constitution": 6,
    "role": 4,
    "tasks": 4,
    "plain": 3,
    "situation": 2,
    "drift": 3,
    "chat": 1,
}
# Tokens that are not the assistant's carry little to learn (latents are drawn afresh): one in ten takes part.
REST_SHARE, REST_WEIGHT = 0.1, 0.3
WARMUP_STEPS = 200
# The learning rate stays flat and falls to zero over this last share, so that a run can be lengthened from a
# checkpoint of its flat part without having annealed in vain.
DECAY_SHARE = 0.45

SampleDocument = Callable[[random.Random, int, str], Sequence[Message]]
MicroBatch = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`documents` per step are forwarded in `groups` of similar length. Sizes are those of the Llama architecture."""

    out: Path
    steps: int = 12_000
    seed: int = 0
    documents: int = 8
    groups: int = 2
    learning_rate: float = 2e-3
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    intermediate: int = 512
    checkpoint_every: int = 500
    log_every: int = 50
    threads: int = 1  # at this size a second thread waits more than it works, above all on a busy machine


def stage_shares(progress: float) -> tuple[float, ...]:
    """Shares of the grammar's stages at `progress` in [0, 1]; they sum to 1."""
    right = min(max(bisect.bisect_right([knot for knot, _ in CURRICULUM], progress), 1), len(CURRICULUM) - 1)
    (start, before), (end, after) = CURRICULUM[right - 1], CURRICULUM[right]
    weight = (progress - start) / (end - start)
    return tuple(a + weight * (b - a) for a, b in zip(before, after, strict=True))


def training_document(rng: random.Random, stage: int, kind: str) -> Conversation:
    """A document of the grammar, or a drill: the same language with many questions to one context."""
    return DRILLS[kind](rng, stage) if kind in DRILLS else grammar.sample_document(rng, stage, kind)


class Batches(Dataset):
    """Item `step` is that step's batch: micro-batches of (ids [b, n], loss weights [b, n]), right-padded."""

    def __init__(self, config: TrainConfig, tokenizer: PreTrainedTokenizerFast, sample: SampleDocument) -> None:
        self.config, self.tokenizer, self.sample = config, tokenizer, sample

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> list[MicroBatch]:
        config = self.config
        rng = random.Random(f"{config.seed}/{step}")
        stages = rng.choices(grammar.STAGES, stage_shares(step / config.steps), k=config.documents)
        kinds = rng.choices(tuple(KIND_WEIGHTS), tuple(KIND_WEIGHTS.values()), k=config.documents)
        rows = []
        for stage, kind in zip(stages, kinds, strict=True):
            ids, own = encode(self.tokenizer, self.sample(rng, stage, kind))
            rows.append((ids, self._weights(own, rng)))
        rows.sort(key=lambda row: len(row[0]))
        size = math.ceil(len(rows) / config.groups)
        return [self._pad(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _weights(self, own: Sequence[bool], rng: random.Random) -> list[float]:
        """A reply's tokens weigh one over the square root of their number: ratings must not drown beside sentences."""
        weights, start = [], 0
        while start < len(own):
            end = start
            while end < len(own) and own[end] == own[start]:
                end += 1
            if own[start]:
                weights += [1 / math.sqrt(end - start)] * (end - start)
            else:
                weights += [REST_WEIGHT if rng.random() < REST_SHARE else 0.0 for _ in range(end - start)]
            start = end
        return weights

    def _pad(self, rows: Sequence[tuple[list[int], list[float]]]) -> MicroBatch:
        longest = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
        return ids, torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows])


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama-architecture model in float32, initialised from the seed."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def loss_sum(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of next-token losses. Logits are made only where the weight is not zero: half of the time saved."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets, weights = ids[:, 1:], weights[:, 1:]
    chosen = weights > 0
    losses = F.cross_entropy(model.lm_head(hidden[chosen]), targets[chosen], reduction="none")
    return (losses * weights[chosen]).sum()


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, flat, linear to zero over the last DECAY_SHARE of the steps."""
    warm = (step + 1) / WARMUP_STEPS
    left = (config.steps - step) / (DECAY_SHARE * config.steps)
    return config.learning_rate * min(1.0, warm, left)


def train(
    config: TrainConfig,
    sample: SampleDocument = training_document,
    words: Sequence[str] | None = None,
    stop_after: int | None = None,
) -> float:
    """Train, or go on from `out`/checkpoint, up to `config.steps`; returns the last logged loss (nats per weight).

    `stop_after` ends the process's work early at that step as a kill would, without a checkpoint. Raises UserError
    when the checkpoint has other shapes, and when the loss is not finite.
    """
    torch.set_num_threads(config.threads)
    logging.disable_progress_bar()
    console = Console()
    checkpoint = config.out / "checkpoint"
    words = grammar.vocabulary() if words is None else words
    previous = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False) if checkpoint.exists() else None
    tokenizer = build_tokenizer(words, previous)
    model = build_model(config, tokenizer)
    optimizers = _optimizers(model, config)
    first = 0
    history: list = []
    if previous is not None:
        first, history = _load_checkpoint(checkpoint, config, model, optimizers)
        console.print(f"going on from step {first} of {checkpoint}")
    history.append({"from_step": first, **_provenance(config)})
    _keep_metrics_before(config.out / "metrics.jsonl", first)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{parameters:,} parameters, vocabulary {len(tokenizer)}, steps {first} to {config.steps}")

    batches = DataLoader(
        Batches(config, tokenizer, sample),
        batch_size=None,
        sampler=range(first, config.steps),
        num_workers=1,
        prefetch_factor=64,
    )
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    model.train()
    mean, tokens, started = float("nan"), 0, time.monotonic()
    window: list[float] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=config.steps, completed=first, loss=mean)
        for step, micro_batches in enumerate(batches, start=first):
            if step == stop_after:
                return mean
            rate = learning_rate(config, step)
            window.append(_update(model, optimizers, micro_batches, rate))
            tokens += sum(ids.numel() for ids, _ in micro_batches)
            progress.update(bar, advance=1, loss=mean)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                mean = sum(window) / len(window)
                if not math.isfinite(mean):
                    raise UserError(f"the loss became {mean} before step {done}: lower --learning-rate")
                seconds = time.monotonic() - started
                left = seconds / (done - first) * (config.steps - done)
                row = {"step": done, "loss": mean, "lr": rate, "tokens_per_second": round(tokens / seconds)}
                _append(config.out / "metrics.jsonl", row)
                window = []
                if not console.is_terminal:
                    pace = f"{(done - first) / seconds:.2f} steps/s, {left / 60:.1f} min left"
                    console.print(
                        f"step {done}/{config.steps}  loss {mean:.4f}  lr {rate:.2e}  {pace}", highlight=False
                    )
            if done % config.checkpoint_every == 0 or done == config.steps:
                _save_checkpoint(checkpoint, done, history, model, optimizers, tokenizer)
                export(config.out / "model", model, tokenizer, {"step": done, "loss": mean, "runs": history})
    return mean


def _optimizers(model: LlamaForCausalLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embeddings and norms.

    In a pilot of 1,200 steps Muon reached AdamW's loss after two thirds of the steps, at a fifth more time each.
    """
    blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    return [
        torch.optim.Muon(blocks, lr=config.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def _update(
    model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer], batch: Sequence[MicroBatch], rate: float
) -> float:
    total = sum(float(weights[:, 1:].sum()) for _, weights in batch)
    loss = 0.0
    for ids, weights in batch:
        part = loss_sum(model, ids, weights) / total
        part.backward()
        loss += part.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss


def _provenance(config: TrainConfig) -> dict[str, object]:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "command": shlex.join(["python", "-m", "persona.town.train_lm", *sys.argv[1:]]),
        "git_sha": git.stdout.strip(),
        "torch": torch.__version__,
        "config": {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()},
    }


def _append(path: Path, row: dict[str, object]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def _keep_metrics_before(path: Path, step: int) -> None:
    """Drop the rows a killed run logged after its last checkpoint: they are about to be written again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text().splitlines() if path.exists() else []
    with atomic_write(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step))


def _save_checkpoint(
    folder: Path,
    step: int,
    history: list[dict[str, object]],
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    moments = {
        f"{number}.{index}.{key}": value
        for number, optimizer in enumerate(optimizers)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        save_file(moments, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, "runs": history}, indent=1))


def _load_checkpoint(
    folder: Path, config: TrainConfig, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer]
) -> tuple[int, list[dict[str, object]]]:
    state = json.loads((folder / "state.json").read_text())
    then = state["runs"][-1]["config"]
    for key in ("hidden", "layers", "heads", "intermediate"):
        if then[key] != getattr(config, key):
            raise UserError(
                f"{folder} was trained with {key}={then[key]}, not {getattr(config, key)}: use another --out"
            )
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    loaded = [optimizer.state_dict() for optimizer in optimizers]
    for name, value in load_file(folder / "optimizer.safetensors").items():
        number, index, key = name.split(".")
        loaded[int(number)]["state"].setdefault(int(index), {})[key] = value
    for optimizer, moments in zip(optimizers, loaded, strict=True):
        optimizer.load_state_dict(moments)
    return state["step"], state["runs"]


def export(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, training: dict[str, object]
) -> None:
    """Write a Hugging Face directory of `model` in bfloat16 with `training` as training.json; whole or not at all."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=64,
        do_sample=False,
    )
    with atomic_folder(folder) as temporary:
        copy.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "training.json").write_text(json.dumps(training, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: one option per field of TrainConfig."""
    parser = argparse.ArgumentParser(prog="python -m persona.town.train_lm", description=__doc__)
    for field in dataclasses.fields(TrainConfig):
        kind = Path if field.name == "out" else type(field.default)
        default = {"required": True} if field.name == "out" else {"default": field.default}
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, **default)
    try:
        train(TrainConfig(**vars(parser.parse_args(arguments))))
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
