"""Checkpoints that appear whole, carry a hash of every file, hold no pickle, and are skipped when damaged.

A mixin over transformers' Trainer: also TRL's trainers take it. What is saved: the trainable weights only (the base LM
stays where it came from), optimizer, schedule, RNG of every process, trainer state.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from persona.errors import UserError
from persona.files import inside, sha256

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # a mixin: it stands before the Trainer in the bases

logger = logging.getLogger(__name__)
MANIFEST = "checkpoint.json"


def damage(folder: Path) -> str | None:
    """Why a checkpoint must not be used, or None when every file is there with its hash."""
    path = folder / MANIFEST
    if not path.is_file():
        return f"{folder} has no {MANIFEST}"
    try:
        files = dict(json.loads(path.read_text())["files"])
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
    """The newest whole checkpoint; damaged ones are skipped with a warning that names the damage."""
    for path in steps(Path(folder)):
        reason = damage(path)
        if reason is None:
            return path
        logger.warning("checkpoint skipped: %s", reason)
    return None


def flatten_optimizer(state: dict) -> tuple[dict[str, Tensor], dict]:
    """An optimizer's state_dict as tensors by name and plain JSON values (param_groups, scalars)."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict] = {}
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value.detach().contiguous().cpu()
            else:
                scalars.setdefault(str(index), {})[key] = value
    return tensors, {"param_groups": state["param_groups"], "scalars": scalars}


def unflatten_optimizer(tensors: dict[str, Tensor], plain: dict) -> dict:
    state: dict[int, dict] = {int(index): dict(values) for index, values in plain["scalars"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": plain["param_groups"]}


class WholeCheckpoints(_Trainer):
    """Mixin for a Trainer: `class MyTrainer(WholeCheckpoints, Trainer)`."""

    _staging: str | None = None

    def _get_output_dir(self, trial):
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        final = Path(self.args.output_dir)
        staging = final / ".staging"
        if self.is_world_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                self._publish(staging / f"checkpoint-{self.state.global_step}", final)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the checkpoint of step {self.state.global_step} could not be saved ({error}); "
                "the ones before it are unchanged"
            ) from error
        finally:
            self._staging = None
            if self.is_world_process_zero():
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _publish(self, staged: Path, final: Path) -> None:
        files = sorted(file for file in staged.rglob("*") if file.is_file())
        for file in files:
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        manifest = {"step": self.state.global_step, "files": {str(f.relative_to(staged)): sha256(f) for f in files}}
        with open(staged / MANIFEST, "w") as stream:
            json.dump(manifest, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        target = final / staged.name
        shutil.rmtree(target, ignore_errors=True)  # the same step, saved again after a damaged one was skipped
        os.rename(staged, target)
        for old in steps(final)[self.args.save_total_limit or len(steps(final)) :]:
            shutil.rmtree(old, ignore_errors=True)

    # ---- what is in a checkpoint, without pickle (DeepSpeed and FSDP keep their own sharded formats) --------------

    @property
    def _plain(self) -> bool:
        return not (self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _save(self, output_dir=None, state_dict=None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trainable_state(self.accelerator.unwrap_model(self.model), state_dict), folder / "model.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        model = self.accelerator.unwrap_model(model or self.model)
        saved = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        expected = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        shapes = {name: tensor.shape for name, tensor in saved.items()}
        if shapes != expected:
            odd = [name for name in sorted({*shapes, *expected}) if shapes.get(name) != expected.get(name)][:3]
            raise UserError(
                f"{resume_from_checkpoint} was made by another model or configuration: it differs in {', '.join(odd)}"
            )
        model.load_state_dict(saved, strict=False)

    def _save_optimizer_and_scheduler(self, output_dir) -> None:
        if not self._plain:
            return super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            tensors, plain = flatten_optimizer(self.optimizer.state_dict())
            save_file(tensors, Path(output_dir) / "optimizer.safetensors")
            schedule = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
            (Path(output_dir) / "optimizer.json").write_text(json.dumps({"optimizer": plain, "schedule": schedule}))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None or not self._plain:
            return super()._load_optimizer_and_scheduler(checkpoint)
        plain = json.loads((Path(checkpoint) / "optimizer.json").read_text())
        tensors = load_file(Path(checkpoint) / "optimizer.safetensors")
        self.optimizer.load_state_dict(unflatten_optimizer(tensors, plain["optimizer"]))
        self.lr_scheduler.load_state_dict({**plain["schedule"], "lr_lambdas": [None]})

    def _save_rng_state(self, output_dir) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        drawn = np.random.get_state(legacy=False)
        version, words, cached = random.getstate()
        tensors = {
            "torch": torch.get_rng_state(),
            "numpy": torch.from_numpy(drawn["state"]["key"].astype(np.int64)),
            "python": torch.tensor(words),
        }
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        rank = self.args.process_index
        save_file(tensors, folder / f"rng-{rank}.safetensors")
        numpy = [drawn["bit_generator"], drawn["state"]["pos"], drawn["has_gauss"], drawn["gauss"]]
        plain = {"numpy": numpy, "python": [version, cached]}
        (folder / f"rng-{rank}.json").write_text(json.dumps(plain))

    def _load_rng_state(self, checkpoint) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint) / f"rng-{self.args.process_index}.safetensors"
        if not path.is_file():
            logger.warning(
                "%s has no random state for process %d: draws differ from an uninterrupted run",
                checkpoint,
                self.args.process_index,
            )
            return
        tensors, plain = load_file(path), json.loads(path.with_suffix(".json").read_text())
        torch.set_rng_state(tensors["torch"])
        name, position, has_gauss, gauss = plain["numpy"]
        np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
        random.setstate((plain["python"][0], tuple(tensors["python"].tolist()), plain["python"][1]))
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])


def trainable_state(model: nn.Module, state_dict: dict | None = None) -> dict[str, Tensor]:
    """The trainable parameters by name, on the CPU. Tied ones are stored under each of their names."""
    wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    source = state_dict if state_dict is not None else dict(model.named_parameters())
    return {name: source[name].detach().cpu().clone().contiguous() for name in wanted}
