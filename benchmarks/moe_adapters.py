"""Speed of PersonaFuse's experts: one training step and one reply, beside one LoRA and PEFT's X-LoRA in one run.

    python benchmarks/moe_adapters.py                                # random weights: hidden size 256, 4 layers
    python benchmarks/moe_adapters.py --model DIR_OR_ID --experts 2 8 32

`top-k` is compared with one LoRA of the rank that a row has active, k·r, through PEFT, and `dense` with one of rank
E·r; both with X-LoRA over the same experts (with its own top-k), trained as we do: experts and gate. A training step
is forward, backward and AdamW over all experts; a reply is greedy, all of one length. The gates are given here; what
the router takes for the batch's queries, with the base LM as its encoder, stands beside it. X-LoRA has its own gate in
its figures: it runs the LM twice, and cannot use the cache. All sides run in turns over the same tokens; seconds are
medians, on a CPU of the process's own CPU time, so that a machine that is busy with other things does not count;
ratios are medians of the turns' own with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from peft import LoraConfig, XLoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap
from torch import Tensor, nn

from persona import lm
from persona.lm import BaseLM, adapters, scratch
from persona.lm.load import resolve
from persona.methods.persona_fuse.config import RouterConfig
from persona.methods.persona_fuse.experts import Experts
from persona.methods.persona_fuse.router import Router
from persona.progress import Bar
from persona.training.lora import LoraSettings

Sides = dict[str, Callable[[], object]]


def from_scratch(folder: Path, hidden: int, layers: int) -> Path:
    tokenizer = scratch.train_tokenizer([f"word{i:05d}" for i in range(2000)], 2000)
    return scratch.make(folder, tokenizer, "llama", hidden=hidden, layers=layers)


def experts_of(base: BaseLM, count: int, rank: int) -> Experts:
    """Experts that change something."""
    experts = Experts.new(base, LoraSettings(r=rank, lora_alpha=rank), 0, count)
    for up in experts.up:
        torch.nn.init.normal_(up, std=0.02)
    return experts


def x_lora(base: BaseLM, experts: Experts, folder: Path, top_k: int | None) -> nn.Module:
    """PEFT's X-LoRA over the same experts, all of it trainable."""
    for number in range(experts.count):
        adapters.save(experts.expert(number), folder / str(number), base.name)
    model = copy.deepcopy(base.model)
    model.config.use_cache = False
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.hidden_size,
        adapters={str(number): str(folder / str(number)) for number in range(experts.count)},
        layerwise_scalings=True,
        use_trainable_adapters=True,
        top_k_lora=top_k,
    )
    return get_peft_model(model, config)


def training(model: nn.Module, parameters: Sequence[nn.Parameter], ids: Tensor, gated=None) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def step() -> None:
        if gated is None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        else:
            with gated():
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def replying(model: nn.Module, ids: Tensor, new: int, gated=None) -> Callable[[], object]:
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)

    def reply() -> None:
        with torch.no_grad():
            if gated is None:
                model.generate(input_ids=ids, attention_mask=mask, **options)
            else:
                with gated():
                    model.generate(input_ids=ids, attention_mask=mask, **options)

    return reply


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def race(sides: Sides, turns: int, advance: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of each side by turn; the order changes from turn to turn, and a first one does not count."""
    spent: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(turns + 1):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            start = clock()
            sides[name]()
            spent[name].append(clock() - start)
        advance()
    return {name: seconds[1:] for name, seconds in spent.items()}


def ratio(over: Sequence[float], under: Sequence[float]) -> str:
    ratios = np.array(over) / np.array(under)
    if len(ratios) < 3:
        return f"{median(ratios):.2f}"
    found = bootstrap((ratios,), np.median, method="percentile", random_state=0).confidence_interval
    return f"{median(ratios):.2f} [{found.low:.2f}, {found.high:.2f}]"


def measure(base: BaseLM, count: int, top_k: int | None, given: argparse.Namespace, folder: Path, advance) -> list:
    """The rows of the table for so many experts: a training step, a reply."""
    experts = experts_of(base, count, given.rank)
    logits = nn.Parameter(torch.randn(given.batch_size, count))  # the gates learn as well
    active = count if top_k is None else top_k
    one = get_peft_model(
        copy.deepcopy(base.model),
        LoraConfig(r=active * given.rank, lora_alpha=active * given.rank, target_modules="all-linear"),
    )
    other = x_lora(base, experts, folder / f"{count}-{top_k}", top_k)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(base.tokenizer), (given.batch_size, given.length), generator=generator).to(base.device)

    def gated():
        gates = logits.softmax(-1)
        if top_k is not None:
            values, which = gates.topk(top_k, dim=-1)
            gates = torch.zeros_like(gates).scatter(-1, which, values / values.sum(-1, keepdim=True))
        return experts.applied(base.model, gates.to(base.device), top_k)

    def trained(model: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    rows = []
    prompt = ids[:, : given.length // 2]
    for what, sides in (
        ("train", {
            "ours": training(base.model, [*experts.parameters(), logits], ids, gated),
            "one": training(one, trained(one), ids),
            "x": training(other, trained(other), ids),
        }),
        ("reply", {
            "ours": replying(base.model, prompt, given.new, gated),
            "one": replying(one, prompt, given.new),
            "x": replying(other, prompt, given.new),
        }),
    ):  # fmt: skip
        spent = race(sides, given.turns, advance)
        kind = "dense" if top_k is None else f"top-{top_k}"
        rows.append([str(count), kind, what, *(f"{median(spent[name]):.3f}" for name in ("ours", "one", "x")),
                     ratio(spent["ours"], spent["one"]), ratio(spent["x"], spent["ours"])])  # fmt: skip
    return rows


def router_seconds(base: BaseLM, given: argparse.Namespace) -> float:
    router = Router(RouterConfig(path=base.name), base, 1, 0).eval()
    tokens = router.tokenize(["word00001 " * (given.length // 2)] * given.batch_size)
    seconds = []
    with torch.no_grad():
        for _ in range(given.turns + 1):
            start = clock()
            router(**tokens)
            seconds.append(clock() - start)
    return median(seconds[1:])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help='base LM: "town", a directory, or a hub id; else random weights')
    parser.add_argument("--scratch", type=int, nargs=2, default=(256, 4), metavar=("HIDDEN", "LAYERS"))
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--gates", nargs="+", choices=("top-k", "dense"), default=["top-k", "dense"])
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row; a prompt has half of them")
    parser.add_argument("--new", type=int, default=24, help="tokens of a reply")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="a smoke test: one turn, few tokens")
    given = parser.parse_args(argv)
    if given.quick:
        given.scratch, given.experts, given.batch_size, given.length, given.new, given.turns = (
            (32, 1),
            [2, 4],
            2,
            8,
            2,
            1,
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    table = Table()
    for column in ("experts", "gate", "step", "ours s", "LoRA s", "X-LoRA s", "ours / LoRA", "X-LoRA / ours"):
        table.add_column(column, justify="left" if column in ("gate", "step") else "right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = resolve(given.model) if given.model else str(from_scratch(folder / "model", *given.scratch))
        base = lm.load(lm.ModelConfig(path=path))
        kinds = [
            (count, k)
            for k in [{"top-k": given.top_k, "dense": None}[name] for name in given.gates]
            for count in given.experts
        ]
        with Bar("turns", 2 * len(kinds) * (given.turns + 1)) as bar:
            for count, k in kinds:
                for row in measure(base, count, k, given, folder, bar.advance):
                    table.add_row(*row)
        parameters = sum(p.numel() for p in base.model.parameters()) / 1e6
        router = router_seconds(base, given)
    where = base.device if base.device.type == "cuda" else f"{base.device}, {torch.get_num_threads()} threads"
    table.caption = (
        f"{parameters:.1f} M parameters, rank {given.rank} each, {given.batch_size} rows of {given.length} tokens, "
        f"replies of {given.new}, {given.turns} turns, router {router:.3f} s, {where}, load {os.getloadavg()[0]:.1f} "
        f"on {os.cpu_count()} cores"
    )
    console.print(table)


if __name__ == "__main__":
    main()
