"""Speed of preference training: our step beside plain TRL's DPOTrainer on the same pairs in one run.

    python benchmarks/dpo_step.py                                   # the town's LM
    python benchmarks/dpo_step.py --scratch 256 4 4096              # random weights: hidden size, layers, vocabulary
    python benchmarks/dpo_step.py --model DIR_OR_ID --batch-size 2

Ours has three loss terms, TRL's one (sigmoid DPO); a step is padding, loss, backward and optimizer. Ours and TRL run
in turns, step by step, over the same batches of the same tokens, each over an adapter of its own on the same base;
seconds are medians over epochs, `times` is the median of the epochs' own ratios, so that a machine that is busy with
other things slows both.
In the first line the reference is live in TRL (a second forward in each step) and counted with us (all its log-probs
are computed and written before the first step); in the second it is known to both. Tokens are checked to be the same
on both sides, and so is the DPO loss of the first batch. Pairs are the town's: a question behind past items, the
resident's reply against another's.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from persona import lm
from persona.data.town import TownConfig, load
from persona.errors import UserError
from persona.lm import BaseLM, scratch
from persona.lm.load import resolve
from persona.progress import Bar
from persona.town.sentences import history_prompt
from persona.training.lora import LoraSettings, adapted
from persona.training.preference import Encoded, Pair, prepare
from persona.training.reference import reference_logps
from persona.training.trainer import TrainerConfig, arguments
from persona.types import Message

BETA = 0.1


def pairs_of(count: int) -> list[Pair]:
    """Prompts of very different lengths: none to twelve past items in front of a question."""
    people = load(TownConfig(train=0, dev=0, test=max(8, count)))
    samples = [sample for sample in people.test if sample.task == "town_reply"]
    samples = [samples[i % len(samples)] for i in range(count)]
    found = []
    for number, sample in enumerate(samples):
        past = list(sample.persona.history)[: number % 13]
        asked = history_prompt(past, sample.messages[0].content) if past else sample.messages[0].content
        other = next(s.target for s in samples[number + 1 :] + samples if s.target != sample.target)
        found.append(Pair((Message("user", asked),), sample.target, other))
    return found


def from_scratch(folder: Path, hidden: int, layers: int, vocabulary: int) -> Path:
    """A llama of random weights over the town's texts, with a vocabulary filled up to its size."""
    texts = [message.content for pair in pairs_of(64) for message in pair.messages]
    filler = (f"word{i:05d}" for i in range(vocabulary))
    tokenizer = scratch.train_tokenizer([*texts, *filler], vocabulary)
    return scratch.make(folder, tokenizer, "llama", hidden=hidden, layers=layers)


# ---- the two sides -------------------------------------------------------------------------------------------------


def steps(trainer: Trainer, batches: Sequence[list[dict]]) -> list[Callable[[], None]]:
    """A step for every batch as the Trainer does it: pad, loss, backward, optimizer."""
    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    torch.manual_seed(1)
    for parameter in weights:  # the same on both sides, and different from the reference
        parameter.data = torch.randn_like(parameter) * 0.1
    optimizer = torch.optim.AdamW(weights, lr=1e-6)
    trainer.optimizer, trainer.current_gradient_accumulation_steps = optimizer, 1

    def step(examples: list[dict]) -> None:
        trainer.training_step(trainer.model, trainer.data_collator(examples))
        optimizer.step()
        optimizer.zero_grad()

    return [partial(step, examples) for examples in batches]


def batched(data: Dataset, size: int) -> list[list[dict]]:
    rows = list(data)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@contextmanager
def ours(base: BaseLM, pairs: Sequence[Pair], lora: LoraSettings, size: int, out: Path) -> Iterator[tuple]:
    """(the steps of an epoch, the same behind the computation of the reference, the trainer)."""
    config = TrainerConfig(batch_size=size, wandb="disabled", cpu=base.device.type == "cpu")
    encoded = Encoded(base, 2**31)
    data = encoded.add(pairs, "train")
    terms = {"beta": BETA, "nll_coef": 0.1, "kl_coef": 0.001}
    number = iter(range(10**6))
    with adapted(base, lora) as peft_model:
        trainer = prepare(base, peft_model, encoded, data, data.select([]), terms, (), config, out / "ours")
        run = steps(trainer, batched(data, size))

        head, forward = base.model.forward, type(base.model).forward

        def reference() -> None:
            base.model.forward = forward.__get__(base.model)  # as it is before there is a trainer
            with peft_model.disable_adapter():
                reference_logps(base, encoded.rows, out / f"again{next(number)}", (), size)
            base.model.forward = head

        yield run, [reference, *run], trainer


def theirs(base: BaseLM, pairs: Sequence[Pair], lora: LoraSettings, size: int, out: Path, known: bool) -> tuple:
    """(the steps of an epoch, the trainer): TRL as it is, on the conversations themselves."""
    config = TrainerConfig(batch_size=size, wandb="disabled", cpu=base.device.type == "cpu")
    data = Dataset.from_list(
        [
            {
                "prompt": [asdict_of(message) for message in pair.messages],
                "chosen": [{"role": "assistant", "content": pair.chosen}],
                "rejected": [{"role": "assistant", "content": pair.rejected}],
            }
            for pair in pairs
        ]
    )
    torch.manual_seed(0)
    trainer = DPOTrainer(
        model=copy.deepcopy(base.model),
        args=arguments(config, out, False, DPOConfig, beta=BETA, max_length=None, precompute_ref_log_probs=known),
        train_dataset=data,
        processing_class=base.tokenizer,
        peft_config=LoraConfig(**asdict(lora)),
    )
    return steps(trainer, batched(trainer.train_dataset, size)), trainer


def asdict_of(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


# ---- the run -------------------------------------------------------------------------------------------------------


def race(what: str, one: list, other: list, turns: int, advance: Callable[[], None]) -> tuple[str, ...]:
    """Cells of the table. The two take turns step by step; a first epoch does not count."""
    seconds: list[tuple[float, float]] = []
    for turn in range(turns + 1):
        spent = [0.0, 0.0]
        for number, pair in enumerate(zip_longest(one, other, fillvalue=lambda: None)):
            for side in ((0, 1), (1, 0))[(turn + number) % 2]:
                start = time.perf_counter()
                pair[side]()
                spent[side] += time.perf_counter() - start
        seconds.append((spent[0], spent[1]))
        advance()
    del seconds[0]
    ratios = sorted(theirs / ours for ours, theirs in seconds)
    ours_s, theirs_s = (f"{median(side):.3f}" for side in zip(*seconds, strict=True))
    return what, ours_s, theirs_s, f"{median(ratios):.2f}", f"{ratios[0]:.2f}-{ratios[-1]:.2f}"


def check(trainer: Trainer, trl: Trainer, size: int) -> None:
    """Raises UserError when the two sides' tokens or the DPO losses of their first batches differ: then two different
    things would be timed."""
    rows = trainer.data_collator.rows
    mine = {(tuple(prompt), tuple(reply)) for prompt, reply in rows}
    keys = ("chosen_ids", "rejected_ids")
    theirs = {(tuple(row["prompt_ids"]), tuple(row[key])) for row in trl.train_dataset for key in keys}
    if theirs != mine:
        raise UserError(f"TRL's tokens differ from ours in {len(theirs ^ mine)} of {len(mine)} rows")
    with torch.no_grad():
        for one in (trainer, trl):
            one.model.train()
            batch = one._prepare_inputs(one.data_collator(batched(one.train_dataset, size)[0]))
            loss = one.compute_loss(one.model, batch)
    dpo, loss = trainer._metrics["train"]["dpo"][-1], loss.item()
    if abs(dpo - loss) > 1e-4 or abs(dpo - math.log(2)) < 1e-5:
        raise UserError(f"the DPO loss of the first batch is {dpo:.5f} with us and {loss:.5f} with TRL")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="town", help='base LM: "town", a directory, or a hub id')
    parser.add_argument("--scratch", type=int, nargs=3, metavar=("HIDDEN", "LAYERS", "VOCABULARY"))
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few pairs, one turn")
    given = parser.parse_args(argv)
    if given.quick:
        given.pairs, given.batch_size, given.turns = 8, 4, 1
    console = Console(width=None if sys.stdout.isatty() else 130)
    table = Table()
    for column, justify in (("an epoch of " + str(given.pairs) + " pairs", "left"), ("s", "right"),
                            ("TRL s", "right"), ("times", "right"), ("range", "right")):  # fmt: skip
        table.add_column(column, justify=justify)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            path = str(from_scratch(folder / "model", *given.scratch)) if given.scratch else resolve(given.model)
            base = lm.load(lm.ModelConfig(path=path))
            parameters = sum(p.numel() for p in base.model.parameters()) / 1e6
            pairs = pairs_of(given.pairs)
            lora = LoraSettings(r=given.rank, lora_alpha=2 * given.rank)
            live, trl = theirs(base, pairs, lora, given.batch_size, folder / "live", known=False)
            known, _ = theirs(base, pairs, lora, given.batch_size, folder / "known", known=True)
            with ours(base, pairs, lora, given.batch_size, folder) as (run, with_reference, trainer):
                check(trainer, trl, given.batch_size)
                with Bar("turns", 2 * given.turns + 2) as bar:
                    for what, one, other in (
                        ("with the reference", with_reference, live),
                        ("reference known to both", run, known),
                    ):
                        table.add_row(*race(what, one, other, given.turns, lambda: bar.advance()))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    where = base.device if base.device.type == "cuda" else f"{base.device}, {torch.get_num_threads()} threads"
    table.caption = (
        f"{parameters:.1f} M parameters, rank {given.rank}, batches of {given.batch_size} pairs, {given.turns} turns, "
        f"{where}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    console.print(table)


if __name__ == "__main__":
    main()
