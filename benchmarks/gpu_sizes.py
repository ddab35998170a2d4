"""Every method at the size of a real LM: tokens a second, model FLOPs utilisation and memory on one GPU.

    python benchmarks/gpu_sizes.py                         # Llama-3.2-1B and Llama-3.1-8B
    python benchmarks/gpu_sizes.py --models llama32_1b --only LoRA "user LoRA"
    python benchmarks/gpu_sizes.py --quick                 # a smoke test: a tiny LM, short texts, on a CPU as well

Weights are random, of the published shapes (configs/model), made on the GPU; texts are random words; so nothing is
downloaded, and only speed and memory mean anything. Each row is the method's own training as train.py runs it, or its
generation; tokens/s, utilisation and memory are what it wrote to metrics.jsonl itself (persona/training/watch.py) in
its last windows, the lowest and highest of them in brackets. Tokens are those that the base LM was given, padding
aside. A row that does not run says why, and the others go on. `--out` gets a JSON row for each.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from persona.config import load_config
from persona.data.base import People, plain_task, register
from persona.data.situations import TRAITS, expert_vector, metadata
from persona.lm import BaseLM, scratch
from persona.lm.edits import Edit, edited
from persona.lm.residual import Site, blocks
from persona.lm.sums import rollout_sums
from persona.methods import finetune, persona_fuse, persona_plug
from persona.personalizer import LanguageModel
from persona.plan.models import ENCODERS, READERS
from persona.training.lora import LoraSettings
from persona.training.preference import Pair, train_preferences
from persona.training.supervised import train_supervised
from persona.training.trainer import OwnTrainer
from persona.types import HistoryItem, Message, Persona, Request, Sample, Sampling

WORDS = ["".join(letters) for letters in product("bdfglmnprst", "aeiou", "bdfglmnprst")][:500]  # a token each
TASK = register(plain_task("plain"))
WINDOW = 4  # steps in a row of metrics.jsonl
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1500, "max_position_embeddings": 8192,
}  # fmt: skip
ROUTER, ENCODER = READERS["Qwen/Qwen2.5-0.5B"], ENCODERS["BAAI/bge-base-en-v1.5"]  # their published shapes


# ---- LMs and texts -------------------------------------------------------------------------------------------------


def random_lm(architecture: dict[str, Any], dtype: torch.dtype, tokenizer: Any, name: str) -> BaseLM:
    """Random weights of a shape, made where they are used."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**architecture)
    config.eos_token_id, config.bos_token_id, config.pad_token_id = tokenizer.eos_token_id, None, None
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return BaseLM(model, tokenizer, name)


@dataclass
class Setting:
    """One base LM, folders, and how large everything is."""

    base: BaseLM
    root: Path
    router: Path
    encoder: Path
    steps: int
    scale: int  # what lengths and batches are divided by

    def text(self, rng: random.Random, tokens: int) -> str:
        return " ".join(rng.choices(WORDS, k=max(2, tokens // self.scale)))

    def rows(self, count: int) -> int:
        return max(1, count // self.scale)

    @property
    def under(self) -> LanguageModel:
        return LanguageModel(self.base, (), 64)

    def config(self, method: str, batch: int, *overrides: str) -> Any:
        return load_config("train", [
            f"method={method}", "trainer.wandb=disabled", "trainer.precision=bf16", "trainer.resume=false",
            f"trainer.batch_size={self.rows(batch)}", f"trainer.max_steps={self.steps}", f"trainer.log_every={WINDOW}",
            "trainer.save_every=100000", "trainer.workers=2", *overrides,
        ])  # fmt: skip

    def people(self, train: Sequence[Sample], dev: Sequence[Sample] = ()) -> People:
        return People("random words", {TASK.name: TASK}, train, dev)

    def samples(self, count: int, prompt: int, reply: int, history: int = 0, item: int = 64) -> list[Sample]:
        """`count` samples of as many people, each with `history` past items."""
        found = []
        for number in range(count):
            rng = random.Random(number)
            items = tuple(HistoryItem(f"{number}-{n}", self.text(rng, item)) for n in range(self.rows(history)))
            who = Persona(f"p{number}", history=items) if history else None
            asked = (Message("user", self.text(rng, prompt)),)
            found.append(Sample(f"s{number}", asked, self.text(rng, reply), who, task=TASK.name))
        return found


# ---- trainings -----------------------------------------------------------------------------------------------------


def lora(s: Setting, out: Path, *more: str) -> None:
    """Eight rows of 1,024 tokens, replies of 256 of them."""
    c = s.config("finetune_lora", 8, "method.max_input_length=2048", "method.r=16", *more)
    finetune.train(c.method, s.under, s.people(s.samples(160, 768, 256)), c.trainer, out)


def recomputed(s: Setting, out: Path) -> None:
    lora(s, out, "trainer.gradient_checkpointing=true")


def fully(s: Setting, out: Path) -> None:
    """As LoRA; weights, gradients and AdamW's states in bf16, activations computed again."""
    c = s.config("finetune_full", 8, "method.max_input_length=2048", "trainer.gradient_checkpointing=true")
    # Of 8 billion weights the checkpoint and the personalizer are 64 GB, which is not what is measured here.
    with patch.object(OwnTrainer, "_save_checkpoint"), patch.object(finetune, "save"):
        finetune.train(c.method, s.under, s.people(s.samples(160, 768, 256)), c.trainer, out)


def user_lora(s: Setting, out: Path) -> None:
    """An adapter for each of 32 users, whose items have 512 tokens; eight rows."""
    c = s.config("user_lora", 8, "method.max_input_length=2048")
    finetune.train(c.method, s.under, s.people([], s.samples(32, 64, 64, history=8, item=512)), c.trainer, out)


def plug(s: Setting, out: Path) -> None:
    """Histories of 100 items, an encoder of BGE-base's shape; 16 rows of 256 + 64 tokens."""
    c = s.config("persona_plug", 16, f"method.store={out}/store", "method.augment_copies=0",
                 f"method.encoder.name={s.encoder}", "method.encoder.pooling=cls",
                 "method.encoder.normalize=true")  # fmt: skip
    persona_plug.train(c.method, s.under, s.people(s.samples(320, 250, 64, history=100)), c.trainer, out)


def fuse(s: Setting, out: Path, stage: str) -> None:
    """Ten experts of rank 16, a router of Qwen2.5-0.5B's shape; 512 + 256 tokens."""
    batch = {"warmup": 1, "router": s.rows(64), "joint": s.rows(8)}[stage]
    others = [name for name in ("warmup", "router", "joint") if name != stage]
    key = "routing" if stage == "router" else stage
    c = s.config("persona_fuse", 8, f"method.skip=[{','.join(others)}]", f"method.router.path={s.router}",
                 f"method.{key}.batch_size={batch}", "trainer.max_grad_norm=1")  # fmt: skip
    samples = []
    for number in range(320):
        rng = random.Random(number)
        levels = {trait: 0 for trait in TRAITS} | {list(TRAITS)[number % 5]: 1 if number % 10 < 5 else -1}
        asked = (Message("user", s.text(rng, 512)),)
        told = metadata(levels, expert_vector(levels), "random")
        samples.append(Sample(f"q{number}", asked, s.text(rng, 256), task="situation", metadata=told))
    persona_fuse.train(c.method, s.under, s.people(samples, samples[:10]), c.trainer, out)


def preferences(s: Setting, out: Path, batch: int, prompt: int, reply: int) -> None:
    c = s.config("finetune_lora", batch)
    rng = random.Random(0)
    pairs = [Pair((Message("user", s.text(rng, prompt)),), s.text(rng, reply), s.text(rng, reply))
             for _ in range(s.rows(batch) * s.steps)]  # fmt: skip
    train_preferences(s.base, pairs, (), beta=0.1, nll_coef=0.1, kl_coef=0.001, lora=LoraSettings(), max_length=None,
                      trainer=c.trainer, out=out)  # fmt: skip


def character_dpo(s: Setting, out: Path) -> None:
    """Rank 64, four pairs of 1,024 tokens each; the reference's log-probs are known before the first step."""
    preferences(s, out, 4, 256, 768)


def character_sft(s: Setting, out: Path) -> None:
    """Rank 64, four transcripts of 2,048 tokens, of which the assistant's half counts."""
    c, rng = s.config("finetune_lora", 4), random.Random(0)
    talks = [tuple(Message(role, s.text(rng, 256)) for _ in range(4) for role in ("user", "assistant"))
             for _ in range(4 * s.steps)]  # fmt: skip
    train_supervised(s.base, talks, lora=LoraSettings(), max_length=None, trainer=c.trainer, out=out)


def apc_dpo(s: Setting, out: Path) -> None:
    """Rank 64, sixteen pairs of 256 tokens each."""
    preferences(s, out, 16, 128, 128)


TRAININGS: dict[str, Callable[[Setting, Path], None]] = {
    "LoRA, 8 × 1,024": lora,
    "LoRA, recomputed": recomputed,
    "user LoRA, 8 × 512": user_lora,
    "Persona-Plug, 16 × 320": plug,
    "PersonaFuse warm-up, 10 × 768": lambda s, out: fuse(s, out, "warmup"),
    "PersonaFuse router, 128 queries": lambda s, out: fuse(s, out, "router"),
    "PersonaFuse joint, 16 × 768": lambda s, out: fuse(s, out, "joint"),
    "Character DPO, 4 pairs of 1,024": character_dpo,
    "Character SFT, 4 × 2,048": character_sft,
    "APC DPO, 16 pairs of 256": apc_dpo,
    "all weights, recomputed, 8 × 1,024": fully,
}


def trained(run: Callable[[Setting, Path], None], name: str, s: Setting) -> dict[str, Any]:
    """What the training said of its last windows; the first has what is made once in it."""
    out = s.root / "".join(letter if letter.isalnum() else "_" for letter in name)
    run(s, out)
    files = sorted(out.rglob("metrics.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    rows = [row for row in rows if "loss" in row][1:]
    found: dict[str, Any] = {"steps": s.steps}
    for key in ("tokens_per_second", "mfu", "samples_per_second", "seconds_per_step", "data_wait", "padding"):
        values = [row[key] for row in rows if key in row]
        if values:
            found[key], found[f"{key} range"] = median(values), [min(values), max(values)]
    found["memory_gb"] = max((row["memory_gb"] for row in rows), default=None)
    found["memory_reserved_gb"] = max((row.get("memory_reserved_gb", 0) for row in rows), default=None)
    return found


# ---- the Assistant Axis: generation and reading ---------------------------------------------------------------------


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], int], turns: int = 3) -> dict[str, Any]:
    """Tokens a second of `run`, which says how many; a first turn does not count."""
    run()
    rates = []
    for _ in range(turns):
        since = clock()
        tokens = run()
        rates.append(tokens / (clock() - since))
    return {"tokens_per_second": median(rates), "tokens_per_second range": [min(rates), max(rates)]}


def conversations(s: Setting, count: int, tokens: int) -> list[tuple[Message, Message]]:
    rng = random.Random(1)
    return [(Message("user", s.text(rng, tokens)), Message("assistant", s.text(rng, tokens))) for _ in range(count)]


def rollouts(s: Setting, cap: bool) -> dict[str, Any]:
    """64 replies of 128 tokens to prompts of 256; new tokens count. `cap`: under a floor on the axis in an eighth of
    the blocks, which acts on about half of the tokens."""
    new = max(4, 128 // s.scale)
    requests = [Request(talk[:1], sampling=Sampling(max_new_tokens=new, temperature=0.7, seed=n))
                for n, talk in enumerate(conversations(s, s.rows(64), 256))]  # fmt: skip
    depth, drawn = len(blocks(s.base.model)), torch.Generator().manual_seed(0)
    edits = [Edit(Site(layer), "cap", torch.randn(s.base.hidden_size, generator=drawn), floor=0.0)
             for layer in range(depth // 2, depth // 2 + max(1, depth // 8))]  # fmt: skip

    def run() -> int:
        if not cap:
            return sum(len(response.tokens) for response in s.under.respond(requests))
        with edited(s.base.model, edits):
            return sum(len(response.tokens) for response in s.under.respond(requests))

    return timed(run)


def extraction(s: Setting) -> dict[str, Any]:
    """Means over replies at the output of every block, 128 rollouts of 256 + 256 tokens."""
    talks = conversations(s, s.rows(128), 256)
    sites = [Site(layer) for layer in range(len(blocks(s.base.model)))]

    def run() -> int:
        rollout_sums(s.base, talks, [0] * len(talks), sites, batch_size=16)
        return sum(len(s.base.render(talk)) for talk in talks)

    return timed(run)


READINGS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "Axis, rollouts: 64 × 128 new": lambda s: rollouts(s, False),
    "… under a cap": lambda s: rollouts(s, True),
    "Axis, extraction, 512 tokens": extraction,
}


# ---- all of it -----------------------------------------------------------------------------------------------------


ROWS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    **{name: partial(trained, run, name) for name, run in TRAININGS.items()},
    **READINGS,
}


def measure(name: str, run: Callable[[Setting], dict[str, Any]], s: Setting) -> dict[str, Any]:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    since = time.perf_counter()
    try:
        found = run(s)
    except Exception as error:  # the other rows say something all the same
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        sys.excepthook(type(error), error, error.__traceback__)
        found = {"failed": reason}
    if torch.cuda.is_available():
        found.setdefault("memory_gb", torch.cuda.max_memory_allocated() / 1e9)
    return {"row": name, **found, "seconds": time.perf_counter() - since}


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in row:
        return row["model"], row["row"], row["failed"][:60], "", "", ""

    def between(key: str, form: str) -> str:
        low, high = row.get(f"{key} range", (None, None))
        return "" if low is None else f"{row[key]:{form}} [{low:{form}}, {high:{form}}]"

    memory = row.get("memory_gb")
    step = f"{row['seconds_per_step']:.3f}" if "seconds_per_step" in row else ""
    return (row["model"], row["row"], between("tokens_per_second", ",.0f"), between("mfu", ".3f"), step,
            "" if memory is None else f"{memory:.1f}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama32_1b", "llama31_8b"], help="of configs/model")
    parser.add_argument("--only", nargs="+", default=[], help="rows that begin like one of these")
    parser.add_argument("--steps", type=int, default=5 * WINDOW, help="of each training; the first four do not count")
    parser.add_argument("--minutes", type=float, default=60.0, help="no row is begun after so many")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    parser.add_argument("--quick", action="store_true", help="a smoke test: a tiny LM, a 32nd of all lengths")
    given = parser.parse_args(argv)
    until = time.monotonic() + 60 * given.minutes
    console, rows = Console(width=None if sys.stdout.isatty() else 130), []
    tokenizer = scratch.train_tokenizer([f"{word} {word}" for word in WORDS], 1500)
    dtype = torch.bfloat16 if torch.cuda.is_available() or not given.quick else torch.float32
    scale = 32 if given.quick else 1
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        router = random_lm(TINY if given.quick else ROUTER, dtype, tokenizer, "router")
        router.model.save_pretrained(root / "router")
        tokenizer.save_pretrained(root / "router")
        small = {"num_hidden_layers": 2, "hidden_size": 48} if given.quick else {}
        shape = {**ENCODER, "vocab_size": len(tokenizer), "pad_token_id": 0, **small}
        AutoModel.from_config(AutoConfig.for_model(**shape)).save_pretrained(root / "encoder")
        tokenizer.save_pretrained(root / "encoder")
        del router
        for model in ["tiny"] if given.quick else given.models:
            shape = TINY if given.quick else load_config("train", [f"model={model}"]).model.architecture
            s = Setting(random_lm(dict(shape), dtype, tokenizer, model), root / model, root / "router",
                        root / "encoder", given.steps, scale)  # fmt: skip
            for name, run in ROWS.items():
                if given.only and not name.startswith(tuple(given.only)):
                    continue
                if time.monotonic() > until:
                    rows.append({"row": name, "failed": "no time left"})
                else:
                    rows.append(measure(name, run, s))
                rows[-1]["model"] = model
                print(json.dumps(rows[-1]), flush=True)
                if given.out:
                    given.out.write_text(json.dumps(rows, indent=1))
            del s
    table = Table()
    for column in ("LM", "", "tokens/s [lowest, highest window]", "MFU", "s a step", "GB"):
        table.add_column(column, justify="right" if column not in ("LM", "") else "left")
    for row in rows:
        table.add_row(*cells(row))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    table.caption = f"{where}, PyTorch {torch.__version__}, bf16, random weights and words, {given.steps} steps"
    console.print(table)


if __name__ == "__main__":
    main()
