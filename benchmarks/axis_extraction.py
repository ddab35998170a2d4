"""Reading means of states for an axis: tokens per second beside the bare forward, and bytes beside a dump of states.

    python benchmarks/axis_extraction.py                         # the town's LM
    python benchmarks/axis_extraction.py --scratch 512 12 4096   # random weights: hidden size, layers, vocabulary

The bare forward is that of the decoder over the same padded batches, without the LM head. Beside it: `passage_means`
at the output of every block; `span_means`, which also renders the conversations and finds and checks their spans; and
the published way (reference/assistant_axis.md 5.7): logits and all states are kept, then averaged. All run in turns on
each batch, and seconds are CPU time on a CPU, so that a busy machine slows all alike; speeds are shares of the bare
forward's with a 95 % bootstrap interval over turns. The means are checked to be the same. Bytes are those of files:
sums, counts and projections of one role by four scores, and the published dump of bfloat16 [layers, hidden].
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from persona import lm
from persona.data.town import TownConfig, load
from persona.errors import UserError
from persona.evaluation.statistics import Estimate, Metric, estimate
from persona.lm import BaseLM, assemble, scratch
from persona.lm.load import resolve
from persona.lm.residual import Site, _passages, blocks, decoder, passage_means, span_means
from persona.lm.sums import rollout_sums
from persona.progress import Bar
from persona.town.sentences import history_prompt
from persona.types import Conversation, Message

SPEED = Metric(aggregate="ratio", columns=("bare", "timed"))


def conversations_of(count: int) -> list[Conversation]:
    """A question behind four to twelve past items, and the resident's reply; every third goes on for a turn."""
    people = load(TownConfig(train=0, dev=0, test=max(8, count)))
    samples = [sample for sample in people.test if sample.task == "town_reply"]
    found = []
    for number in range(count):
        sample, after = (samples[(number + k) % len(samples)] for k in (0, 1))
        asked = history_prompt(list(sample.persona.history)[: 4 + number % 9], sample.messages[0].content)
        more = (after.messages[0], Message("assistant", after.target)) if number % 3 == 0 else ()
        found.append((Message("user", asked), Message("assistant", sample.target), *more))
    return found


def from_scratch(folder: Path, hidden: int, layers: int, vocabulary: int, texts: Sequence[str]) -> Path:
    """A llama of random weights, with a vocabulary filled up to its size."""
    filler = (f"word{i:05d}" for i in range(vocabulary))
    tokenizer = scratch.train_tokenizer([*texts, *filler], vocabulary)
    return scratch.make(folder, tokenizer, "llama", hidden=hidden, layers=layers, heads=hidden // 32)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of the CPU's time on a CPU, else of the clock, the device's work included."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def speeds(rounds: Sequence[Mapping[str, float]], bare: str) -> dict[str, Estimate]:
    """Per line its speed as a share of the bare one's in the same rounds."""
    found = {}
    for name in rounds[0]:
        values = [{"bare": seconds[bare], "timed": seconds[name]} for seconds in rounds]
        share = estimate(values, [str(i) for i in range(len(values))], name, SPEED)
        assert share is not None
        found[name] = share
    return found


# ---- the lines -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def bare_forward(base: BaseLM, rows: Sequence[lm.Row], replies: Sequence[Sequence[int]]) -> None:
    inputs = assemble(base, rows, replies)
    decoder(base.model)(
        inputs_embeds=inputs.embeds, attention_mask=inputs.mask, position_ids=inputs.positions, use_cache=False
    )


@torch.no_grad()
def stored(base: BaseLM, some: Sequence) -> list[Tensor]:
    """[spans, layers, hidden] of each passage: logits, the states of every block kept and stacked, then means."""
    kept: list[Tensor] = []
    handles = [block.register_forward_hook(lambda m, a, out: kept.append(out)) for block in blocks(base.model)]
    try:
        inputs = assemble(base, [one.row for one in some], [one.reply for one in some])
        base.model(
            inputs_embeds=inputs.embeds, attention_mask=inputs.mask, position_ids=inputs.positions, use_cache=False
        )
    finally:
        for handle in handles:
            handle.remove()
    states = torch.stack(kept)  # [layers, B, T, hidden]
    found = []
    for b, one in enumerate(some):
        shift = states.shape[2] - one.row.length - len(one.reply)
        means = [states[:, b, shift + start : shift + stop].mean(1) for start, stop in one.spans]
        found.append(torch.stack(means).float().cpu())
    return found


def race(base: BaseLM, conversations: Sequence[Conversation], size: int, turns: int) -> tuple[dict, float]:
    """Per line its share of the bare forward's speed, and the bare forward's tokens per second (padding excluded)."""
    sites = [Site(layer) for layer in range(len(blocks(base.model)))]
    passages = [passage for messages in conversations for passage in _passages(base, messages, None)]
    order = sorted(range(len(passages)), key=lambda i: passages[i].row.length)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    rounds, tokens = [], 0
    with Bar("batches", turns * len(batches)) as bar:
        for turn in range(turns + 1):
            for number, batch in enumerate(batches):
                some, talk = [passages[i] for i in batch], [conversations[i] for i in batch]
                rows, replies = [one.row for one in some], [one.reply for one in some]
                lines: dict[str, Callable[[], object]] = {
                    "bare forward": lambda rows=rows, replies=replies: bare_forward(base, rows, replies),
                    "passage_means": lambda some=some: dict(passage_means(base, some, sites, None, size)),
                    "span_means, from text": lambda talk=talk: dict(span_means(base, talk, sites, None, size)),
                    "logits and all states kept": lambda some=some: stored(base, some),
                }
                if not turn:  # the first run of each does not count
                    check(lines, size)
                    continue
                names = list(lines)
                start = (turn + number) % len(names)
                taken = {name: seconds(lines[name], base.device) for name in names[start:] + names[:start]}
                rounds.append({name: taken[name] for name in names})
                tokens += sum(one.row.length + len(one.reply) for one in some)
                bar.advance()
    return speeds(rounds, "bare forward"), tokens / sum(taken["bare forward"] for taken in rounds)


def check(lines: Mapping[str, Callable], size: int) -> None:
    """Raises UserError where two ways give other means."""
    lines["bare forward"]()
    ours, whole, theirs = (lines[name]() for name in list(lines)[1:])
    for i, expected in enumerate(theirs):
        scale = float(expected.abs().max())
        if not all(torch.allclose(means[i], expected, atol=1e-4 * scale) for means in (ours, whole)):
            raise UserError(f"the means of conversation {i} differ from those of stored states")


def written(base: BaseLM, conversations: Sequence[Conversation], size: int) -> dict[str, int]:
    """Bytes of both kinds of files."""
    sites = [Site(layer) for layer in range(len(blocks(base.model)))]
    axis = torch.randn(len(sites), base.hidden_size)
    keys = [f"score {i % 4}" for i in range(len(conversations))]
    found = rollout_sums(base, conversations, keys, sites, axis, batch_size=size)
    sums = {key: found.sums[key] for key in sorted(set(keys))}
    projections = torch.stack([found.projections[i] for i in sorted(found.projections)])
    means = span_means(base, conversations, sites, None, size)
    dump = {f"pos_p0_q{i}": turns.mean(0).bfloat16() for i, turns in means}
    with tempfile.TemporaryDirectory() as name:
        files = {"sums and projections": Path(name) / "sums", "dump": Path(name) / "dump"}
        counts = torch.tensor([found.counts[key] for key in sums])
        save_file({**sums, "counts": counts, "projections": projections}, files["sums and projections"])
        save_file(dump, files["dump"])
        return {what: file.stat().st_size for what, file in files.items()}


def share_text(share: Estimate) -> str:
    if share.low is None or share.high is None:
        return f"{share.value:.3f}"
    return f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="town", help='base LM: "town", a directory, or a hub id')
    parser.add_argument("--scratch", type=int, nargs=3, metavar=("HIDDEN", "LAYERS", "VOCABULARY"))
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few conversations, two turns")
    given = parser.parse_args(argv)
    if given.quick:
        given.conversations, given.batch_size, given.turns = 6, 3, 2
    console = Console(width=None if sys.stdout.isatty() else 110)
    table = Table()
    for column, justify in (("reading", "left"), ("tokens/s", "right"), ("of the bare forward's [95 %]", "right")):
        table.add_column(column, justify=justify)
    conversations = conversations_of(given.conversations)
    try:
        with tempfile.TemporaryDirectory() as name:
            texts = [message.content for messages in conversations for message in messages]
            path = from_scratch(Path(name) / "model", *given.scratch, texts) if given.scratch else given.model
            base = lm.load(lm.ModelConfig(path=resolve(str(path))))
            shares, rate = race(base, conversations, given.batch_size, given.turns)
            for what, share in shares.items():
                table.add_row(what, f"{rate * share.value:.0f}", share_text(share))
            sizes = written(base, conversations, given.batch_size)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    parameters = sum(p.numel() for p in base.model.parameters()) / 1e6
    where = base.device if base.device.type == "cuda" else f"{base.device}, {torch.get_num_threads()} threads"
    table.caption = (
        f"{parameters:.1f} M parameters, {len(blocks(base.model))} layers, {given.conversations} conversations in "
        f"batches of {given.batch_size}, {given.turns} turns, {where}, load {os.getloadavg()[0]:.1f} on "
        f"{os.cpu_count()} cores"
    )
    console.print(table)
    streamed, dump = sizes.values()
    console.print(
        f"written for {given.conversations} rollouts: {streamed:,} bytes of sums and projections, {dump:,} bytes of a "
        f"dump ({dump / streamed:.1f} ×)"
    )


if __name__ == "__main__":
    main()
