"""Every method under every back end, on two CPU processes, against one process at an equal global batch.

    python tests/faults/matrix.py [--methods character,apc] [--launches ddp,zero3] [--out DIR]

Prints a table: the largest difference of a training loss, of a tensor that the method leaves behind, and both again
for a run that was stopped by SIGTERM after two steps of each of its trainings and went on. The last batch of most
epochs is short. All methods of a launch run in one pair of processes, so that what a training leaves behind in a
process shows, too. ZeRO-3 divides every tensor here: by its default it would leave ones as small as these whole.
Nothing is dropped out: every process draws for itself, so that two do not draw what one does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
STEPS, STOP = 4, 2
COMMON = ["trainer.cpu=true", "model.device=cpu", "trainer.wandb=disabled", "trainer.log_every=1",
          "trainer.save_every=100", "trainer.eval_every=2", f"trainer.max_steps={STEPS}"]  # fmt: skip
TOWN = ["data=town", "data.train=3", "data.dev=2", "data.test=1"]
METHODS: dict[str, list[str]] = {
    "persona_plug": ["method=persona_plug", *TOWN],
    "finetune_lora": ["method=finetune_lora", *TOWN],
    "finetune_full": ["method=finetune_full", *TOWN],
    "user_lora": ["method=user_lora", *TOWN],
    "persona_fuse": ["experiment=town_persona_fuse", "method.skip=[]", "data.train=24", "data.dev=6", "data.test=2",
                     "trainer.max_grad_norm=0"],
    "character": ["experiment=town_character", "data.limit=8", "method.distill.repeats=1",
                  "method.introspect.reflections=1", "method.extra_prompts=null"],
    "apc": ["experiment=town_apc", "data.train=3", "data.test=1", "data.questions=4", "data.held_out=2"],
    "assistant_axis": ["experiment=town_assistant_axis", "data.questions=3", "data.dev=2", "data.dev_questions=1",
                       "method.min_count=2", "data.test_questions=1", "method.calibration.widths=[2]",
                       "method.calibration.every=2", "method.calibration.quantiles=[0.05]",
                       "method.calibration.raises=[0.5]"],
}  # fmt: skip
BATCHES = {  # of one process, and of each of two
    "persona_fuse": ("method.warmup.batch_size", "method.routing.batch_size", "method.joint.batch_size"),
}
LAUNCHES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")


def prepare(out: Path) -> None:
    """Before the first launch."""
    out.mkdir(parents=True, exist_ok=True)
    zero3 = json.loads((ROOT / "configs" / "launch" / "deepspeed" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (out / "zero3.json").write_text(json.dumps(zero3))


# ---- in a process --------------------------------------------------------------------------------------------------


def work(launch_name: str, methods: Sequence[str], out: Path, resume: bool) -> None:
    """Train the methods one after the other, whole and stopped, as one of the processes of a launch."""
    from transformers import trainer as transformers_trainer
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from persona.config import launch, load_config
    from train import train

    transformers_trainer.DEFAULT_CALLBACKS.append(StopOnce)
    started = launch.started()
    for method in methods:
        for kind in ["whole", *(["stopped"] if resume else [])]:
            folder, began = out / launch_name / method / kind, time.monotonic()
            given = [*METHODS[method], *COMMON, f"output={folder}", f"launch={launch_name}"]
            keys = BATCHES.get(method, ("trainer.batch_size",))
            given += [f"{key}={2 if started else 4}" for key in keys]
            if launch_name == "zero3":
                given.append(f"launch.deepspeed_config.deepspeed_config_file={out / 'zero3.json'}")
            cfg = load_config("train", given)
            if started:
                launch.take_back_end(cfg.launch)
            StopOnce.armed, stops = kind == "stopped", 0
            while True:
                try:
                    train(cfg)
                    break
                except SystemExit as stopped:
                    if stopped.code != 143 or not StopOnce.armed:
                        raise
                    stops += 1
                    unset_hf_deepspeed_config()  # which would have gone with the process
            if os.environ.get("RANK", "0") == "0":
                done = {"seconds": round(time.monotonic() - began, 1), "stops": stops}
                (folder / "matrix.json").write_text(json.dumps(done))
    if started:
        import torch

        torch.distributed.destroy_process_group()


def _callback() -> type:
    from torch.nn import Dropout
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        armed = False
        seen: set[str] = set()

        def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
            for part in model.modules():
                if isinstance(part, Dropout):
                    part.p = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if Stop.armed and state.global_step == STOP and args.output_dir not in Stop.seen:
                Stop.seen.add(args.output_dir)
                os.kill(os.getpid(), signal.SIGTERM)

    return Stop


# ---- the table -----------------------------------------------------------------------------------------------------


def losses(folder: Path) -> dict[tuple[str, int], float]:
    """The training losses by file and step."""
    found = {}
    for path in folder.rglob("metrics.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            if "loss" in row:
                found[str(path.relative_to(folder)), row["step"]] = row["loss"]
    return found


def tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    files = sorted((folder / "personalizer").rglob("*.safetensors"))
    return {f"{path.relative_to(folder)} {name}": t for path in files for name, t in load_file(path).items()}


def difference(one: Path, other: Path) -> str:
    """ "loss / artefact", each the largest absolute difference; or what cannot be compared."""
    first, second = losses(one), losses(other)
    if first.keys() != second.keys():
        return f"other losses: {len(first)} against {len(second)}"
    loss = max((abs(first[key] - second[key]) for key in first), default=None)
    a, b = tensors(one), tensors(other)
    if {key: t.shape for key, t in a.items()} != {key: t.shape for key, t in b.items()} or not a:
        return "other tensors"
    artefact = max((a[key].double() - b[key].double()).abs().max().item() for key in a if a[key].numel())
    return f"{'none' if loss is None else f'{loss:.1e}'} / {artefact:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--launches", default=",".join(LAUNCHES))
    parser.add_argument("--out", type=Path, default=Path("outputs/matrix"))
    parser.add_argument("--no-resume", action="store_true")
    parser.add_argument("--worker")
    given = parser.parse_args()
    methods, out = given.methods.split(","), given.out.resolve()
    if given.worker:
        work(given.worker, methods, out, not given.no_resume)
        return
    from persona.config.launch import LaunchConfig, start

    prepare(out)
    again = [sys.executable, __file__, "--out", str(out), *(["--no-resume"] if given.no_resume else [])]
    print("| method | launch | loss / artefact against single | stopped and gone on, against whole | s |")
    print("|---|---|---|---|---|")
    for launch_name in given.launches.split(","):
        left = list(methods)
        for method in methods:
            shutil.rmtree(out / launch_name / method, ignore_errors=True)
        while left:
            command = [*again, "--methods", ",".join(left), "--worker", launch_name]
            if launch_name == "single":
                code = subprocess.run(command).returncode
            else:
                code = start(LaunchConfig(num_processes=2), command, cpu=True)
            for method in list(left):
                whole, stopped = (out / launch_name / method / kind for kind in ("whole", "stopped"))
                if not (whole / "matrix.json").is_file():
                    break
                left.remove(method)
                about = json.loads((whole / "matrix.json").read_text())
                against = "" if launch_name == "single" else difference(out / "single" / method / "whole", whole)
                resumed = "-"
                if (stopped / "matrix.json").is_file():
                    stops = json.loads((stopped / "matrix.json").read_text())["stops"]
                    resumed = f"{difference(whole, stopped)} ({stops} stops)" if stops else "no training to stop"
                print(f"| {method} | {launch_name} | {against} | {resumed} | {about['seconds']} |", flush=True)
                if not given.no_resume and resumed == "-":
                    print(f"| {method} | {launch_name} | | failed with {code} | |", flush=True)
            if left and code:
                print(f"| {left[0]} | {launch_name} | failed with {code} | | |", flush=True)
                left = left[1:]
            elif left:
                raise SystemExit(f"{left} left nothing behind")


if "--worker" in sys.argv:
    StopOnce = _callback()
if __name__ == "__main__":
    main()
