"""Kill every method and the evaluation at random moments, start the same command again, and look at what comes out.

    python tests/faults/chaos.py --kills 100                 # about an hour of two cores
    python tests/faults/chaos.py --kills 10 --only apc       # cases whose name holds this word

Every case is a command of the town, run once without trouble. Then chains: the command is killed four to six times
(SIGKILL of all its processes, SIGTERM, SIGKILL of one rank of two, of the launcher alone) in stages that were hit
least so far, started again each time, and in the end compared with the run that nothing happened to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT / "tests" / "evaluation"), str(ROOT)]

# Processes that fork have one thread, as those that are started anew.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

from chains import GROUP, LAUNCHER, RANK, TERM, Case, Chain, chain, uninterrupted  # noqa: E402
from commands import import_for_all  # noqa: E402
from fault_server import Answer, FaultServer, Seen  # noqa: E402

TRAINER = ("trainer.cpu=true", "model.device=cpu", "trainer.wandb=disabled", "trainer.resume=true",
           "trainer.log_every=1", "trainer.keep_checkpoints=2")  # fmt: skip
TOWN = ("data.train=4", "data.dev=2", "data.test=1")
STEPS = ("trainer.max_steps=24", "trainer.save_every=4", "trainer.eval_every=10", "trainer.batch_size=4")
TEACHER = ("teacher=endpoint", "teacher.endpoint.model=judge-7b", "teacher.endpoint.base_url={url}")
JUDGE = ("judge=endpoint", "judge.endpoint.endpoint.model=judge-7b", "judge.endpoint.endpoint.base_url={url}")

FINETUNE = ("experiment=town_finetune_lora", *TOWN, *TRAINER, *STEPS)
PLUG = ("experiment=town_persona_plug", *TOWN, "data.limit=8", *TRAINER, "method.store={root}/store",
        "trainer.max_steps=9", "trainer.save_every=2", "trainer.eval_every=5", "trainer.batch_size=2")  # fmt: skip
FUSE = ("experiment=town_persona_fuse", *TRAINER, "method.skip=[]", "data.train=50", "data.dev=4", "data.test=6",
        "trainer.save_every=4", "trainer.eval_every=8", "method.warmup.epochs=2", "method.routing.epochs=4",
        "method.routing.batch_size=16", "method.joint.epochs=2", "method.joint.batch_size=16")  # fmt: skip
CHARACTER = ("experiment=town_character", *TRAINER, *TEACHER, "data.limit=6", "method.extra_prompts=null",
             "method.prompts={root}/../prompts",
             "method.expand.per_trait=8", "method.introspect.reflections=2", "method.introspect.interactions=1",
             "trainer.max_steps=10", "trainer.save_every=3", "trainer.batch_size=4")  # fmt: skip
APC = ("experiment=town_apc", *TRAINER, *TEACHER, "data.train=2", "data.test=1", "data.questions=4",
       "method.queries=teacher", "method.queries_per_statement=1", "method.max_queries=4",
       "method.reward=discriminators", "method.other_responses=3", "method.others=2", "method.gap=0.0",
       "method.natural=2", "method.told=0", "method.discriminator.relevance_epochs=1",
       "method.discriminator.nli_epochs=1", "method.samples=2", "trainer.max_steps=8", "trainer.save_every=2",
       "trainer.batch_size=4")  # fmt: skip
AXIS = ("experiment=town_assistant_axis", *TRAINER, "data.questions=4", "data.dev=16", "data.dev_questions=1",
        "data.dev_tasks=8", "method.max_new_tokens=16", "method.min_count=2", "method.calibration.widths=[1]",
        "method.calibration.raises=[0]")  # fmt: skip

CASES = (
    Case("finetune_lora", "train.py", (*FINETUNE, "trainer.workers=1")),
    Case("user_lora", "train.py", ("experiment=town_user_lora", *TOWN, *TRAINER, *STEPS)),
    Case("persona_plug", "train.py", PLUG),
    Case("persona_fuse", "train.py", FUSE),
    Case("persona_fuse synthesis", "train.py",
         ("method=persona_fuse", "model=town", "data=situations", "data.path={root}/../queries.jsonl", *TRAINER,
          *TEACHER, "stage=synthesis", "method.router.path=town", "method.router.pooling=mean")),
    Case("character", "train.py", CHARACTER),
    Case("apc", "train.py", APC),
    Case("apc experience", "train.py", (*APC, "method.mode=experience")),
    Case("assistant_axis", "train.py", AXIS),
    Case("evaluation", "evaluate.py",
         ("baselines=town_role_play", "benchmark=apc", "judge=oracle", "data.test=2", "data.train=1",
          "benchmark.max_new_tokens=40", "benchmark.limit=24", "model.batch_size=4")),
    Case("evaluation over HTTP", "evaluate.py",
         ("data=constitution", "data.path=town_sunny", "benchmark=character", "benchmark.language=town",
          "benchmark.limit=16", "benchmark.max_new_tokens=24", "model.batch_size=4", *JUDGE)),
)  # fmt: skip
TWO = ("finetune_lora", "persona_plug", "persona_fuse", "character", "apc", "assistant_axis", "evaluation",
       "evaluation over HTTP")  # fmt: skip


def cases() -> list[Case]:
    """Every case, and on two processes those of `TWO`."""
    two = [Case(f"{case.name}, 2 processes", case.program, case.arguments, 2) for case in CASES if case.name in TWO]
    lora = CASES[0]
    return [*CASES, *two, Case(f"{lora.name}, launch=ddp", lora.program, lora.arguments, 2, launched=True)]


# What the programs import anyway.
IMPORTED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "openai", "persona.config",
            "persona.players", "persona.training.preference", "persona.training.supervised",
            "persona.training.classifier", "persona.methods.persona_plug", "persona.methods.finetune",
            "persona.methods.persona_fuse", "persona.methods.character", "persona.methods.apc",
            "persona.methods.assistant_axis", "persona.benchmarks", "persona.evaluation.report")  # fmt: skip


# ---- who plays teacher and judge -----------------------------------------------------------------------------------

SECONDS = 0.03  # a reply takes that long, so that kills find requests under way
TOWNISH = ("i like old things .", "the fair is today .", "my pet is a cat .", "i am a baker .", "is it sweet ?",
           "how is the fair today ?", "what is your pet ?", "do you like old things ?", "what is it ?")  # fmt: skip
POLES = [(trait, level) for trait in "OCEAN" for level in ("high", "low")]


def reply(seen: Seen) -> Answer:
    """By what it is asked alone, so that everybody who asks the same is told the same."""
    text = "\n".join(message["content"] for message in seen.body["messages"])
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
    return Answer(text=said(text, number), seconds=SECONDS)


def said(text: str, number: int) -> str:
    if "numbered messages only" in text or "numbered from 1" in text:
        return "\n".join(f"{n}. {TOWNISH[(number + n) % len(TOWNISH)]}" for n in range(1, 9))
    if "Work in this order" in text or "query" in text:
        return situation(text)
    if "<answer>" in text:
        return f"<answer>{('yes', 'no')[number % 2]}</answer>"
    return f'"{TOWNISH[number % len(TOWNISH)]}"'


def situation(text: str) -> str:
    """What PersonaFuse's data stage is told: the query itself says what it calls for."""
    found = re.search(r"query \w+[^\n]*", text)
    query = found[0] if found else ""
    levels = {**dict.fromkeys("OCEAN", "none"), **dict(re.findall(r"([OCEAN])=(high|low)", query))}
    if "Work in this order" in text:
        traits = {trait: {"level": level, "reason": f"as it is {level}"} for trait, level in levels.items()}
        return json.dumps({"cues": {"task": "a chat"}, "traits": traits, "response": f"An answer to {query}."})
    return "no" if "Could this answer do harm" in text else json.dumps(levels)


def prepare(folder: Path) -> None:
    """Files that commands name: bare queries, four for each pole and eight that call for nothing, and prompts in the
    town's words beside the one that asks for more of them."""
    asked = [f"query {n} about {n} {n + 1} {n + 2} : {POLES[n % 10][0]}={POLES[n % 10][1]}" for n in range(40)]
    asked += [f"query n{n} sum {n} + {n + 1}" for n in range(8)]
    rows = [{"id": f"q{n}", "messages": [{"role": "user", "content": text}], "source": "ours"}
            for n, text in enumerate(asked)]  # fmt: skip
    prompts = ROOT / "persona" / "methods" / "character" / "prompts"
    shutil.copytree(prompts / "town", folder / "prompts", dirs_exist_ok=True)
    shutil.copyfile(prompts / "english" / "expand.md", folder / "prompts" / "expand.md")
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- all of them ---------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", default="", help="cases whose name this regular expression finds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for what is made, which else is removed")
    given = parser.parse_args()
    rng = random.Random(given.seed)
    chosen = [case for case in cases() if re.search(given.only, case.name)]
    if not chosen:
        parser.error(f"no case is called {given.only}: there are {', '.join(case.name for case in cases())}")
    root = given.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    root.mkdir(parents=True, exist_ok=True)
    chains: list[Chain] = []
    places: dict[str, Counter[str]] = defaultdict(Counter)
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it has started ends with it
    import_for_all(IMPORTED)
    with FaultServer(reply) as server:
        for number, case in enumerate(chosen):
            # What is left is shared evenly among the cases to come.
            left = given.kills - sum(len(made.kills) for made in chains)
            share = round(left / (len(chosen) - number))
            folder = root / re.sub(r"\W+", "_", case.name)
            prepare(folder)
            whole = uninterrupted(case, folder, server.url, fork=True)
            told = ", ".join(f"{where} {seconds:.1f} s" for where, seconds in whole.seconds.items())
            print(f"# {case.name}: {told}", flush=True)
            kinds = (GROUP, TERM) if case.processes == 1 else (RANK, RANK, LAUNCHER if case.launched else GROUP, TERM)
            while share > 0:
                size = min(share, rng.randint(4, 6))
                place = folder / f"chain{len(chains)}"
                made = chain(case, whole, place, server.url, size, rng, kinds, places[case.name], say)
                chains.append(made)
                share -= max(len(made.kills), 1)
                for what in ("lost", "doubled", "wrong", "orphans", "unclear"):
                    for line in getattr(made, what):
                        print(f"  {what}: {line}", flush=True)
                if not (made.lost or made.doubled or made.wrong or given.keep):
                    shutil.rmtree(place)
    print("\n" + table(chains))
    print("\nstages: " + "; ".join(f"{name}: {', '.join(f'{p} {n}' for p, n in hit.items())}"
                                   for name, hit in places.items()))  # fmt: skip
    slowest = max((made.slowest for made in chains), default=0.0)
    print(f"{time.monotonic() - began:.0f} s, seed {given.seed}; once one rank was killed, the launch ended within "
          f"{slowest:.1f} s")  # fmt: skip
    bad = any(made.lost or made.doubled or made.wrong or made.orphans or made.unclear for made in chains)
    if not given.keep and not bad:
        shutil.rmtree(root)
    elif bad:
        print(f"what went wrong lies in {root}")
    return int(bad)


def say(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {text}", flush=True)


def table(chains: list[Chain]) -> str:
    """One row for each case and kind of kill; what a chain left counts for the case."""
    ends_in = ("lost rows", "doubled rows", "wrong results", "orphans", "unclear")
    columns = ("case", GROUP, TERM, "one rank", "launcher", "starts", *ends_in)
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    by_case: dict[str, list[Chain]] = defaultdict(list)
    for made in chains:
        by_case[made.case].append(made)
    by_case["all"] = chains
    for name, some in by_case.items():
        kinds = Counter(kind for made in some for kind, _ in made.kills)
        ends = [sum(len(getattr(made, what)) for made in some) for what in ("lost", "doubled", "wrong", "orphans",
                                                                            "unclear")]  # fmt: skip
        cells = [
            name,
            *(kinds[kind] for kind in (GROUP, TERM, RANK, LAUNCHER)),
            sum(made.starts for made in some),
            *ends,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
