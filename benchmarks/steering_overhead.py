"""What edits of states cost: tokens per second of generation with 0, 1 and 8 edited layers, beside other libraries.

    python benchmarks/steering_overhead.py                              # random weights: hidden 512, 12 layers
    python benchmarks/steering_overhead.py --scratch 1024 16 8192
    pip install --no-deps --target extra repeng gguf steering-vectors; PYTHONPATH=extra python benchmarks/…

Every line generates greedily from the same prompts, as many tokens for each, with the same vectors: ours add them, or
hold the projection above a floor and count where it acted; repeng and steering-vectors add them, where they can be
imported. Lines take turns, and seconds are CPU time on a CPU, so that a busy machine slows all alike; speeds are
shares of the unedited LM's with a 95 % bootstrap interval over turns. The libraries' replies are checked to be ours.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from axis_extraction import conversations_of, from_scratch, seconds, share_text, speeds
from rich.console import Console
from rich.table import Table
from torch import Tensor

from persona import lm
from persona.errors import UserError
from persona.lm import BaseLM
from persona.lm.edits import Edit, edited
from persona.lm.residual import Site, blocks, mean_norms
from persona.progress import Bar

Door = Callable[[], AbstractContextManager]


def ours(base: BaseLM, kind: str, vectors: dict[int, Tensor], **settings: float) -> Door:
    return lambda: edited(base.model, [Edit(Site(n), kind, v, **settings) for n, v in vectors.items()])


def repeng(base: BaseLM, vectors: dict[int, Tensor]) -> Door | None:
    """Adds by exchanging blocks; None where it is not installed."""
    if not hasattr(np, "float_"):
        np.float_ = np.float64  # repeng 0.4 names it in an annotation; numpy 2 has it no more
    try:
        from repeng import ControlModel, ControlVector
    except ImportError:
        return None
    control = ControlVector(base.model.config.model_type, {n: v.numpy() for n, v in vectors.items()})

    @contextmanager
    def door():
        wrapped = ControlModel(base.model, list(vectors))
        try:
            wrapped.set_control(control)
            yield
        finally:
            wrapped.unwrap()

    return door


def steering_vectors(base: BaseLM, vectors: dict[int, Tensor]) -> Door | None:
    """Adds by hooks; None where it is not installed."""
    try:
        from steering_vectors import SteeringVector
    except ImportError:
        return None
    steering = SteeringVector({n: v.to(base.device) for n, v in vectors.items()})
    return lambda: steering.apply(base.model)


def race(base: BaseLM, batch: int, prompt: int, new: int, turns: int, layers: int) -> tuple[dict, float, list[str]]:
    """Per line its share of the unedited speed, the unedited LM's tokens per second, and what is not installed."""
    texts = [base.render(messages[:1]) for messages in conversations_of(batch)]
    ids = torch.tensor([(text * (1 + prompt // len(text)))[:prompt] for text in texts], device=base.device)
    mask = torch.ones_like(ids)
    depth = len(blocks(base.model))
    places = [(depth - layers) // 2 + k for k in range(layers)]
    norms = mean_norms(base, [messages[:1] for messages in conversations_of(4)], [Site(n) for n in places])
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randn(base.hidden_size, generator=draw) for _ in places]
    vectors = {n: 3 * norm * v / v.norm() for n, norm, v in zip(places, norms, drawn, strict=True)}
    middle = {places[layers // 2]: vectors[places[layers // 2]]}
    doors: dict[str, Door | None] = {
        "no edit": nullcontext,
        "1 layer, add": ours(base, "add", middle),
        f"{layers} layers, add": ours(base, "add", vectors),
        "1 layer, cap": ours(base, "cap", middle, floor=0.0),
        f"{layers} layers, cap": ours(base, "cap", vectors, floor=0.0),
        f"{layers} layers, add: repeng": repeng(base, vectors),
        f"{layers} layers, add: steering-vectors": steering_vectors(base, vectors),
    }
    missing = [name.split(": ")[1] for name, door in doors.items() if door is None]
    present = {name: door for name, door in doors.items() if door is not None}

    def generate(door: Door) -> Tensor:
        with torch.no_grad(), door():
            return base.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                pad_token_id=base.tokenizer.pad_token_id,
            )  # fmt: skip

    said = {name: generate(door) for name, door in present.items()}  # the first run of each does not count
    for name in present:
        same = (said[name] == said[f"{layers} layers, add"]).float().mean()
        if ": " in name and same < 0.95:
            raise UserError(f"{name}: only {same:.0%} of its tokens are those of our addition")
    if torch.equal(said["no edit"], said[f"{layers} layers, add"]):
        raise UserError("the vectors change nothing that is said: there is nothing to measure")
    rounds, names = [], list(present)
    with Bar("turns", turns) as bar:
        for turn in range(turns):
            start = turn % len(names)
            order = names[start:] + names[:start]
            taken = {name: seconds(lambda door=present[name]: generate(door), base.device) for name in order}
            rounds.append({name: taken[name] for name in names})
            bar.advance()
    rate = turns * batch * new / sum(taken["no edit"] for taken in rounds)
    return speeds(rounds, "no edit"), rate, missing


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base LM: a directory or a hub id, instead of random weights")
    parser.add_argument("--scratch", type=int, nargs=3, metavar=("HIDDEN", "LAYERS", "VOCABULARY"),
                        default=(512, 12, 4096))  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--new", type=int, default=32, help="tokens that are generated")
    parser.add_argument("--layers", type=int, default=8, help="that the third line edits")
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="a smoke test: a tiny LM, two turns")
    given = parser.parse_args(argv)
    if given.quick:
        given.scratch, given.batch_size, given.prompt, given.new, given.turns = (32, 8, 400), 2, 8, 4, 2
    console = Console(width=None if sys.stdout.isatty() else 110)
    table = Table()
    for column, justify in (("generation", "left"), ("tokens/s", "right"), ("of no edit's [95 %]", "right")):
        table.add_column(column, justify=justify)
    try:
        with tempfile.TemporaryDirectory() as name:
            texts = [message.content for messages in conversations_of(32) for message in messages]
            path = given.model or from_scratch(Path(name) / "model", *given.scratch, texts)
            base = lm.load(lm.ModelConfig(path=str(path)))
            depth = len(blocks(base.model))
            if not 1 <= given.layers <= depth:
                raise UserError(f"--layers {given.layers}: the LM has {depth} layers")
            shares, rate, missing = race(
                base, given.batch_size, given.prompt, given.new, given.turns, given.layers
            )  # fmt: skip
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    for what, share in shares.items():
        table.add_row(what, f"{rate * share.value:.1f}", share_text(share))
    parameters = sum(p.numel() for p in base.model.parameters()) / 1e6
    where = base.device if base.device.type == "cuda" else f"{base.device}, {torch.get_num_threads()} threads"
    table.caption = (
        f"{parameters:.1f} M parameters, {depth} layers, {given.batch_size} prompts of {given.prompt} tokens, "
        f"{given.new} new ones, {given.turns} turns, {where}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    console.print(table)
    if missing:
        console.print(f"not installed, so not measured: {', '.join(missing)}")


if __name__ == "__main__":
    main()
