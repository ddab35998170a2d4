"""Checkpoints that appear whole, carry a hash of every file, hold no pickle, and are skipped when damaged.

A mixin over transformers' Trainer: also TRL's trainers take it. What is saved, in one format under every back end and
for any number of processes: the trainable weights only (the base LM stays where it came from), the optimizer's states
by parameter, the schedule, the random state of every process, the Trainer's own state.
"""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona.errors import UserError
from persona.files import atomic_folder, inside, sha256
from persona.training.signals import Interrupted, Signals, any_process
from persona.training.states import optimizer_states, set_optimizer_states, set_weights, weights

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # a mixin: it stands before the Trainer in the bases

logger = logging.getLogger(__name__)
MANIFEST = "checkpoint.json"
FORMAT = 2  # 1, without a number in the manifest: optimizer states by position, sharded files of DeepSpeed
BY_GROUP = ("base_lrs", "_last_lr", "min_lrs")  # what a schedule keeps for each group of parameters


def manifest(folder: Path) -> dict[str, Any]:
    """What a whole checkpoint says of itself: format, step, hashes, batch, seconds that it took to save."""
    return json.loads((folder / MANIFEST).read_text())


def damage(folder: Path) -> str | None:
    """Why a checkpoint must not be used, or None when every file is there with its hash."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"{folder} has no {MANIFEST}"
    try:
        files = dict(manifest(folder)["files"])
    except (ValueError, KeyError, TypeError) as error:
        return f"{path} cannot be read ({error})"
    if extra := sorted(
        name
        for file in folder.rglob("*")
        if not file.is_dir() and (name := file.relative_to(folder).as_posix()) not in {*files, MANIFEST}
    ):
        return f"{folder} holds {extra[0]}, which was not saved with it"
    if not files:
        return f"{path} names no file"
    for name, expected in files.items():
        try:
            inside(folder, name)
        except UserError as error:
            return str(error)
        if not (folder / name).is_file():
            return f"{folder} lacks {name}"
        if sha256(folder / name) != expected:
            return f"{folder / name} is not the file that was saved"
    return None


def steps(folder: Path) -> list[Path]:
    """The checkpoint folders in `folder`, newest first."""
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def newest(folder: Path | str) -> Path | None:
    """The newest whole checkpoint; damaged ones are skipped with a warning that names the damage.

    Raises UserError when it is in another format: it is whole, and going on from one before it would lose steps.
    """
    for path in steps(Path(folder)):
        reason = damage(path)
        if reason is None:
            if (form := manifest(path).get("format", 1)) != FORMAT:
                raise UserError(
                    f"{path} is in checkpoint format {form}, and this version of persona reads format {FORMAT}: "
                    "finish the run with the version that began it (meta.json has the commit), or start over with "
                    "trainer.resume=false"
                )
            return path
        logger.warning("checkpoint skipped: %s", reason)
    return None


def newest_for_all(folder: Path) -> Path | None:
    """`newest`, looked for by one process on behalf of all: they go on from the same, and files are hashed once."""
    answer: list[Any] = [None, None]
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        try:
            answer[0] = newest(folder)
        except UserError as error:
            answer[1] = str(error)
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


class WholeCheckpoints(_Trainer):
    """Mixin for a Trainer: `class MyTrainer(WholeCheckpoints, Trainer)`."""

    signals: Signals | None = None  # told how long a save took

    # ---- saving ----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        begun = time.monotonic()
        step, main = self.state.global_step, self.is_world_process_zero()
        self.store_flos()
        module = self.accelerator.unwrap_model(self.model)
        # Everything is gathered before anything is written: the rest is one process's, and cannot wait for another.
        tensors = {
            "model": weights(module, keep=main),
            "optimizer": optimizer_states(module, self.optimizer, keep=main),
        }
        drawn = gather_object([random_state()])
        failure = None
        if main:
            try:
                self._write(step, tensors, drawn, begun)
            except UserError as error:
                failure = error
        if any_process(failure is not None):
            raise UserError(
                f"the checkpoint of step {step} could not be saved ({failure or 'the first process says why'}); "
                "the ones before it are unchanged"
            )
        if main and self.signals is not None:
            self.signals.saved(time.monotonic() - begun)

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], drawn: list[dict], begun: float) -> None:
        folder = Path(self.args.output_dir)
        for left in folder.glob(".checkpoint-*"):
            shutil.rmtree(left, ignore_errors=True)  # of a process that was killed while it saved, elsewhere too
        with atomic_folder(folder / f"checkpoint-{step}") as staged:
            for name, found in tensors.items():
                save_file(found, staged / f"{name}.safetensors")
            write_random_states(staged, drawn)
            (staged / "schedule.json").write_text(json.dumps(self._schedule()))
            self.state.stateful_callbacks["TrainerControl"] = self.control.state()
            self.state.save_to_json(str(staged / "trainer_state.json"))
            told = {
                "format": FORMAT,
                "step": step,
                "batch": self._batch(),
                "evaluated": not self.control.should_evaluate,
                "files": {file.name: sha256(file) for file in sorted(staged.iterdir())},
                "seconds": round(time.monotonic() - begun, 3),
            }
            (staged / MANIFEST).write_text(json.dumps(told, indent=1))
        best = folder / f"checkpoint-{self.state.best_global_step}"
        for old in steps(folder)[self.args.save_total_limit or len(steps(folder)) :]:
            if old != best:
                shutil.rmtree(old, ignore_errors=True)

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """Nothing: weights are in checkpoints, and a method saves its own personalizer."""

    def _batch(self) -> list[int]:
        """Samples of a forward, processes, forwards of a step."""
        args = self.args
        return [args.per_device_train_batch_size, args.world_size, args.gradient_accumulation_steps]

    # ---- the best one ----------------------------------------------------------------------------------------------

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        if self._determine_best_metric(metrics, trial):
            self.control.should_save = True  # the best dev loss so far always has a checkpoint
        return metrics

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except Interrupted:
            self._save_checkpoint(model, trial)
            self.control.should_evaluate = self.control.should_save = False
            self.control.should_training_stop = True

    def best(self) -> Path | None:
        """The checkpoint of the best dev loss, or None where no dev loss was measured."""
        path = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        return path if path.is_dir() else None

    # ---- loading ---------------------------------------------------------------------------------------------------

    def check(self, checkpoint: Path) -> None:
        """A run goes on with as many samples a step as before, in whatever way they are shared out: then it sees the
        same samples in the same steps. Raises UserError."""
        there, here = manifest(checkpoint)["batch"], self._batch()
        if int(np.prod(there)) != int(np.prod(here)):
            raise UserError(
                f"{checkpoint} was saved with {_product(there)} samples a step (trainer.batch_size x processes x "
                f"trainer.gradient_accumulation), and this run has {_product(here)}: choose them so that the product "
                "stays, or trainer.resume=false to start over"
            )
        if there[1] != here[1] and self.is_world_process_zero():
            logger.warning(
                "%s was saved by %d processes and goes on with %d: the samples of a step and their order stay; random "
                "draws such as dropout are each process's own and become others%s",
                *(checkpoint, there[1], here[1]),
                f", seeded anew for process {there[1]} and up" if there[1] < here[1] else "",
            )

    def _init_training_state(self, max_steps, *args):
        found = super()._init_training_state(max_steps, *args)
        # The Trainer takes how often to log, evaluate and save from the checkpoint; what the command says counts.
        self.state.compute_steps(self.args, max_steps)
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Nothing yet: the weights are loaded once the back end has them in its hands."""

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        found = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            folder = Path(resume_from_checkpoint)
            self.load_weights(folder)
            module = self.accelerator.unwrap_model(self.model)
            set_optimizer_states(module, self.optimizer, load_file(folder / "optimizer.safetensors"))
            self._load_schedule(folder / "schedule.json")
        return found

    def load_weights(self, checkpoint: Path) -> None:
        """Give the model the trainable weights of a checkpoint; every process calls it. Raises UserError."""
        saved = load_file(checkpoint / "model.safetensors")
        set_weights(self.accelerator.unwrap_model(self.model), saved, str(checkpoint))

    def _filled(self) -> list[int]:
        """The groups of the optimizer that hold a parameter. DeepSpeed leaves the others out, and empties its own."""
        groups = enumerate(self.optimizer.param_groups)
        return [index for index, group in groups if group["params"] or self.is_deepspeed_enabled]

    def _schedule(self) -> dict[str, Any]:
        state = {key: value for key, value in self.lr_scheduler.state_dict().items() if key != "lr_lambdas"}
        rates = {key: [state[key][index] for index in self._filled()] for key in BY_GROUP if key in state}
        return {**state, **rates}

    def _load_schedule(self, path: Path) -> None:
        schedule, own, filled = json.loads(path.read_text()), self.lr_scheduler.state_dict(), self._filled()
        for key in (key for key in BY_GROUP if key in own):
            if len(schedule[key]) != len(filled):
                raise UserError(f"{path.parent} has {len(schedule[key])} groups of parameters, this run {len(filled)}")
            found = dict(zip(filled, schedule[key], strict=True))
            schedule[key] = [found.get(index, value) for index, value in enumerate(own[key])]
        groups = self.optimizer.param_groups
        self.lr_scheduler.load_state_dict({**schedule, "lr_lambdas": [None] * len(groups)})
        for group, rate in zip(groups, schedule["_last_lr"], strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is not None:
            seed = [self.args.seed, self.state.global_step]
            set_random_state(Path(checkpoint), self.args.process_index, seed)


def _product(batch: list[int]) -> str:
    return f"{' x '.join(map(str, batch))} = {int(np.prod(batch))}"


# ---- random state --------------------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """Where torch's, numpy's and Python's generators of this process (and its GPU's) stand."""
    drawn = np.random.get_state(legacy=False)
    version, words, cached = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(drawn["state"]["key"].astype(np.int64)),
        "python": torch.tensor(words),
    }
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    numpy = [drawn["bit_generator"], drawn["state"]["pos"], drawn["has_gauss"], drawn["gauss"]]
    return {"tensors": tensors, "plain": {"numpy": numpy, "python": [version, cached]}}


def write_random_states(folder: Path, drawn: list[dict[str, Any]]) -> None:
    """rng.safetensors and rng.json of all processes, by rank."""
    tensors = {f"{rank}.{key}": t for rank, state in enumerate(drawn) for key, t in state["tensors"].items()}
    save_file(tensors, folder / "rng.safetensors")
    (folder / "rng.json").write_text(json.dumps([state["plain"] for state in drawn]))


def set_random_state(folder: Path, rank: int, seed: list[int]) -> None:
    """Put the generators where process `rank` had them; where none of that rank was saved, seed them by `seed` and
    the rank."""
    states = json.loads((folder / "rng.json").read_text())
    if rank >= len(states):
        drawn = [int(word) for word in np.random.SeedSequence([*seed, rank]).generate_state(3)]
        torch.manual_seed(drawn[0])  # the GPU's too
        np.random.seed(drawn[1])
        random.seed(drawn[2])
        return
    tensors, plain = load_file(folder / "rng.safetensors"), states[rank]
    torch.set_rng_state(tensors[f"{rank}.torch"])
    name, position, has_gauss, gauss = plain["numpy"]
    np.random.set_state((name, tensors[f"{rank}.numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate((plain["python"][0], tuple(tensors[f"{rank}.python"].tolist()), plain["python"][1]))
    if f"{rank}.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"{rank}.cuda"])
