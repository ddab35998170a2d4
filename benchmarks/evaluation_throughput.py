"""Evaluation speed: multiple choice, generation, shared beginnings and 64 users, each beside its baseline in one run.

    python benchmarks/evaluation_throughput.py                    # the town's LM, some minutes
    python benchmarks/evaluation_throughput.py --model DIR_OR_ID --contexts 2048 --batch-size 16

Every line runs ours and its baseline in turns on the same requests, after one run of each that does not count; seconds
are medians, `times` is the median of the turns' own ratios, so that a machine that is busy with other things slows
both. Each line also checks that both give the same: log p to 1e-3, or the same replies. With lm-eval installed, its
HF backend scores the same multiple-choice items (`pip install -e '.[comparison]'`). Personas, questions and options
are the town's; a personalizer that stands in for Persona-Plug is untrained, for speed does not depend on the weights.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

import persona
from persona.data.town import TownConfig, load
from persona.errors import UserError
from persona.lm import BaseLM
from persona.methods.persona_plug import PersonaPlug, PersonaPlugConfig
from persona.personalizer import LanguageModel, Personalizer
from persona.progress import Bar
from persona.town.sentences import history_prompt, item_text_with_label
from persona.types import Message, Request, Response, Sample, Sampling

QUESTIONS = 8  # asked about one context
TOLERANCE = 1e-3  # of log p between two ways to compute it


class DoorsOpen(Personalizer):
    """Edits nothing, but might: beginnings are not shared under it."""

    method = "doors_open"

    def modules(self, requests):
        return nullcontext()


@dataclass(frozen=True)
class Race:
    """Ours and a baseline: functions that return log p (lists of lists) or replies."""

    what: str
    ours: Callable[[], list]
    baseline_name: str
    baseline: Callable[[], list]

    def run(self, turns: int, advance: Callable[[], None]) -> tuple[str, ...]:
        """Cells of the table. Raises UserError when the two differ."""
        agreement = agree(self.what, self.ours(), self.baseline())
        seconds: tuple[list[float], list[float]] = ([], [])
        for turn in range(turns):
            for side in ((0, 1), (1, 0))[turn % 2]:
                start = time.perf_counter()
                (self.ours, self.baseline)[side]()
                seconds[side].append(time.perf_counter() - start)
            advance()
        times = median(b / a for a, b in zip(*seconds, strict=True))
        ours, baseline = (f"{median(side):.3f}" for side in seconds)
        return self.what, ours, baseline, f"{times:.1f}", self.baseline_name, agreement


def agree(what: str, ours: list, baseline: list) -> str:
    """How well two results agree, in words. Raises UserError when log p differ by more than TOLERANCE, or when more
    than one reply in twenty differs (equal log p of two tokens may fall either way)."""
    if isinstance(ours[0], Response):
        same = sum(a.tokens == b.tokens for a, b in zip(ours, baseline, strict=True))
        if same < 0.95 * len(ours):
            raise UserError(f"{what}: only {same} of {len(ours)} replies are those of the baseline")
        return f"{same} of {len(ours)} replies"
    pairs = [pair for a, b in zip(ours, baseline, strict=True) for pair in zip(a, b, strict=True)]
    worst = max(abs(a - b) for a, b in pairs)
    if worst > TOLERANCE:
        raise UserError(f"{what}: log p differ from the baseline's by up to {worst:.2g}")
    return f"log p to {worst:.0e}"


# ---- requests ------------------------------------------------------------------------------------------------------


def request_of(sample: Sample, message: str | None = None, **changes) -> Request:
    messages = sample.messages if message is None else (Message("user", message),)
    request = Request(messages, sample.persona, Sampling(max_new_tokens=24), sample.options, sample.task)
    return replace(request, **changes)


def with_past(sample: Sample) -> Request:
    """The question with eight past items in front of it."""
    return request_of(sample, history_prompt(list(sample.persona.history)[:8], sample.messages[0].content))


def on_contexts(base: BaseLM, samples: Sequence[Sample], tokens: int, count: int) -> list[Request]:
    """`count` requests, QUESTIONS in turn on one context of about `tokens` tokens (many residents' past items): which
    of four sentences was the reply?"""
    replies = [sample for sample in samples if sample.task == "town_reply"]
    said = [sample.target for sample in replies]
    items = [item for sample in replies for item in sample.persona.history]
    found: list[Request] = []
    used = 0
    while len(found) < count:
        context = "past : "
        while True:
            longer = context + item_text_with_label(items[used % len(items)]) + " ; "
            used += 1
            if len(base.render((Message("user", longer),))) > tokens:
                break
            context = longer
        for n in range(len(found), min(len(found) + QUESTIONS, count)):
            reply = replies[n % len(replies)]
            options = tuple(dict.fromkeys(said[(n + 5 * o) % len(said)] for o in range(4)))
            asked = f"{context}question : {reply.messages[0].content}"
            found.append(request_of(reply, asked, options=options, task=""))
    return found


# ---- baselines -----------------------------------------------------------------------------------------------------


def one_by_one(ask: Callable[[Sequence[Request]], list], requests: Sequence[Request]) -> Callable[[], list]:
    return lambda: [ask([request])[0] for request in requests]


def lm_eval_choose(base: BaseLM, requests: Sequence[Request], batch_size: int) -> Callable[[], list] | None:
    """lm-eval's log p of each request's options, None where lm-eval is not installed."""
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        return None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = HFLM(
        base.model, backend="causal", tokenizer=base.tokenizer, batch_size=batch_size, max_length=base.max_positions,
        add_bos_token=False if base.chat else None,
    )  # fmt: skip
    texts = [base.text(request.messages) for request in requests]

    def choose() -> list:
        instances = [
            Instance("loglikelihood", {}, (text, option), k)
            for k, (text, request) in enumerate(zip(texts, requests, strict=True))
            for option in request.options or ()
        ]
        found = iter(harness.loglikelihood(instances, disable_tqdm=True))
        return [[next(found)[0] for _ in request.options or ()] for request in requests]

    return choose


# ---- the run -------------------------------------------------------------------------------------------------------


def races(arguments: argparse.Namespace, base: BaseLM, folder: Path) -> list[Race]:
    size, count = arguments.batch_size, arguments.items
    people = load(TownConfig(train=0, dev=0, test=max(count, arguments.users)))
    bare, apart = LanguageModel(base, (), size), LanguageModel(base, (DoorsOpen(),), size)
    made: list[Race] = []

    def against_lm_eval(what: str, requests: list[Request]) -> None:
        theirs = None if base.is_encoder_decoder else lm_eval_choose(base, requests, size)
        if theirs is not None:
            made.append(Race(f"choose, {what}", lambda: bare.choose(requests), "lm-eval, HF backend", theirs))

    short = [with_past(sample) for sample in people.test if sample.options][:count]
    against_lm_eval("own prompts, options of 1-2 tokens", short)
    for tokens in arguments.contexts:
        requests, name = on_contexts(base, people.test, tokens, count), f"{QUESTIONS} questions on {tokens} tokens"
        against_lm_eval(name, requests)
        for verb, ours, theirs in (("choose", bare.choose, apart.choose), ("respond", bare.respond, apart.respond)):
            made.append(
                Race(
                    f"{verb}, {name}", lambda f=ours, r=requests: f(r), "no sharing", lambda f=theirs, r=requests: f(r)
                )
            )
    told = [with_past(sample) for sample in people.test if sample.task == "town_reply"][:count]
    made.append(Race("respond, own prompts", lambda: bare.respond(told), "one by one", one_by_one(bare.respond, told)))

    if arguments.personalizer is None:
        torch.manual_seed(0)
        plug: Personalizer = PersonaPlug(PersonaPlugConfig(store=str(folder)), base)
        plug.embedder.eval()
    else:
        plug = persona.load(base, [arguments.personalizer]).personalizers[0]
    users, n = LanguageModel(base, (plug,), arguments.users), arguments.users
    by_task = {}
    for sample in people.test:
        by_task.setdefault((sample.task, sample.persona.id), request_of(sample))
    talk = [request for (task, _), request in by_task.items() if task == "town_reply"][:n]
    rate = [request for (task, _), request in by_task.items() if task == "town_rating"][:n]
    without = LanguageModel(base, (), n)

    def vectors(requests: Sequence[Request]) -> list:
        return [vector.flatten().tolist() for vector in plug.embeddings(requests)]

    for what, ask, requests in (
        (f"Persona-Plug, {n} users respond", users.respond, talk),
        (f"Persona-Plug, {n} users choose", users.choose, rate),
        ("  of it: the users' vectors", vectors, talk),
        ("  of it: respond of the LM alone", without.respond, talk),
    ):
        made.append(Race(what, lambda f=ask, r=requests: f(r), f"{n} calls", one_by_one(ask, requests)))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="town", help='base LM: "town", a directory, or a hub id')
    parser.add_argument(
        "--personalizer", help="a trained Persona-Plug for this base LM (default: one of random weights)"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 512, 900], help="tokens that questions share")
    parser.add_argument("--items", type=int, default=64, help="requests per line")
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke test: few items, one turn")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.contexts, arguments.items, arguments.users, arguments.turns = [128], 8, 4, 1
    console = Console(width=None if sys.stdout.isatty() else 130)
    try:
        base = persona.load(arguments.model).base
        room = base.max_positions
        if room is not None and max(arguments.contexts) + 100 > room:
            raise UserError(f"--contexts {max(arguments.contexts)} and a question do not fit: {room} positions")
        table = Table(title=f"evaluation, base LM {base.name}")
        for column, justify in (("what", "left"), ("s", "right"), ("baseline s", "right"), ("times", "right"),
                                ("baseline", "left"), ("agreement", "left")):  # fmt: skip
            table.add_column(column, justify=justify, overflow="fold")
        with tempfile.TemporaryDirectory() as folder:
            made = races(arguments, base, Path(folder))
            if not any("lm-eval" in race.baseline_name for race in made):
                missing = "lm-eval is not installed, so its lines are left out: pip install -e '.[comparison]'"
                console.print(missing, markup=False)
            with Bar("turns", len(made) * arguments.turns) as bar:
                for race in made:
                    table.add_row(*race.run(arguments.turns, lambda: bar.advance()))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    where = base.device if base.device.type == "cuda" else f"{base.device}, {torch.get_num_threads()} threads"
    table.caption = (
        f"{arguments.items} requests, batches of {arguments.batch_size}, {arguments.turns} turns, {where}, "
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    console.print(table)


if __name__ == "__main__":
    main()
