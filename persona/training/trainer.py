"""One training loop for every method: transformers' Trainer, with checkpoints and signals that lose nothing.

A method hands over a torch module whose forward returns {"loss"} (summed over `labels`, divided by
`num_items_in_batch`), a map-style data set and a collator; the rest is here. TRL's trainers go through the same
`arguments` and `run` (persona/training/preference.py, supervised.py).
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import DistributedType, PartialState
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from persona.errors import UserError
from persona.training import shards
from persona.training.checkpoints import WholeCheckpoints, manifest, newest_for_all, steps
from persona.training.remainder import EveryRowOnce
from persona.training.signals import Interrupted, Signals, Stopped, any_process
from persona.training.watch import Metrics, Watched

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # for mixins: they stand before the Trainer in the bases

logger = logging.getLogger(__name__)


@dataclass
class TrainerConfig:
    """How to train. Symbols and defaults as in the PPlug repository where it has them (lr, wd, warm-up, epochs)."""

    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    warmup_ratio: float = 0.05
    scheduler: str = "linear"
    scheduler_options: dict[str, Any] = field(default_factory=dict)  # e.g. min_lr_rate of cosine_with_min_lr
    adam_beta2: float = 0.999
    epochs: float = 2.0
    max_steps: int = -1  # > 0 overrides epochs
    batch_size: int = 16  # per process and forward
    gradient_accumulation: int = 1
    max_grad_norm: float = 1.0
    precision: str = "fp32"  # fp32 | bf16 (autocast)
    gradient_checkpointing: bool = False
    seed: int = 0
    log_every: int = 10
    eval_every: float = 0.25  # < 1: share of all steps; >= 1: steps
    save_every: float = 0.25
    keep_checkpoints: int = 2  # the newest; that of the best dev loss stays besides
    weights: str = "last"  # last | best: which step's the personalizer gets (best: that of the best dev loss)
    grace_seconds: float = 300.0  # from a signal to the end, as slurm/train.sbatch asks for
    workers: int = 0  # processes that prepare batches
    resume: bool = True
    wandb: str = "offline"  # offline | online | disabled
    cpu: bool = False  # stay on the CPU even where there is a GPU


class _Bar(ProgressCallback):
    """transformers' progress bar (rate, time left) with the last values beside it rather than a line per log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {key: logs[key] for key in ("loss", "eval_loss", "learning_rate") if key in logs}
            self.training_bar.set_postfix({**self.shown, **shown})
            self.shown = {**self.shown, **shown}

    shown: dict[str, Any] = {}

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Around a training: an error leaves no bar that draws itself over what is said about it."""
        try:
            yield
        finally:
            for bar in (self.prediction_bar, self.training_bar):
                if bar is not None:
                    bar.close()


class OwnTrainer(Watched, WholeCheckpoints, EveryRowOnce, _Trainer):
    """Mixin: whole checkpoints, every row once an epoch, what is measured, FSDP on CPUs as well; a loss that is not
    finite ends the run and names its step."""

    def create_accelerator_and_postprocess(self) -> None:
        state = PartialState()
        if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
            # On CPUs accelerate would quietly make it data parallel; it only asks whether this was a launch for GPUs.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss became {loss.item()} in step {self.state.global_step + 1} (learning rate "
                f"{self._get_learning_rate():.2e}): lower trainer.learning_rate or look at the data of that step; "
                "the checkpoints before it are whole"
            )
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if not math.isfinite(metrics.get("eval_loss", 0.0)):  # the last step alone can do it: no training loss shows
            raise UserError(
                f"the dev loss is {metrics['eval_loss']} after step {self.state.global_step}: lower "
                "trainer.learning_rate or look at the dev data"
            )
        return metrics

    def _run_epoch(self, **kwargs: Any) -> None:
        # transformers looks whether all steps are done after a step only: a run that was killed behind its last one,
        # in the middle of an epoch, would take one more when it is resumed.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    # TRL's trainers write a model card beside every checkpoint and tell the hub what is trained.
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _send_telemetry(self) -> None:
        pass


class MethodTrainer(OwnTrainer, Trainer):
    """Trainer over a method's module; what its `notes()` gives, where it has them, is logged beside the loss."""

    optimizer: torch.optim.Optimizer | None
    groups: list[dict[str, Any]] | None = None  # of the optimizer's parameters, where the Trainer's own will not do

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        # Made here and not given to the Trainer: under DeepSpeed it would forget it.
        if self.optimizer is None and self.groups is not None:
            known = self.args
            options = {"lr": known.learning_rate, "weight_decay": known.weight_decay, "betas": (0.9, known.adam_beta2)}
            self.optimizer = torch.optim.AdamW([{**options, **group} for group in self.groups])
            if self.is_fsdp_enabled:  # puts other parameters in the optimizer; these would be held whole all along
                for group in self.groups:
                    group["params"].clear()
                self.groups = None
        return super().create_optimizer(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        module = self.accelerator.unwrap_model(self.model)
        if "loss" in logs and hasattr(module, "notes"):
            logs = {**logs, **module.notes()}
        super().log(logs, *args, **kwargs)


def fit(
    module: nn.Module,
    train: Dataset,
    dev: Dataset | None,
    collate: Callable[[list[Any]], dict[str, Any]],
    config: TrainerConfig,
    out: Path,
    groups: list[dict[str, Any]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train `module`'s trainable parameters; resumes from the newest whole checkpoint in `out/checkpoints`.

    `groups` are optimizer parameter groups where a method wants more than one learning rate. Raises Stopped after a
    SIGTERM or SIGUSR1 (a checkpoint is saved first), UserError for a loss that is not finite or an empty data set.
    """
    if len(train) == 0:  # type: ignore[arg-type]
        raise UserError("there is nothing to train on: the training split is empty")
    # No list of them: FSDP2 puts others in their place, and whoever holds the first ones holds them whole.
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise UserError("there is nothing to train: no parameter of the method is trainable")
    # FSDP divides a model by the blocks that its class names.
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    classes = {type(part).__name__ for part in module.modules()}
    module._no_split_modules = sorted({name for one in models for name in one._no_split_modules or ()} & classes)  # type: ignore[assignment]
    module.accepts_loss_kwargs = True  # the Trainer then counts labels over all processes and accumulated batches
    evaluates = dev is not None and len(dev) > 0  # type: ignore[arg-type]
    trainer = MethodTrainer(
        model=module,
        args=arguments(config, out, evaluates),
        train_dataset=train,
        eval_dataset=dev if evaluates else None,
        data_collator=collate,
        callbacks=list(callbacks),
    )
    trainer.groups = groups
    run(trainer, config, out)


def arguments(
    config: TrainerConfig,
    out: Path,
    evaluates: bool,
    kind: type[TrainingArguments] = TrainingArguments,
    **more: Any,
) -> TrainingArguments:
    """What transformers' Trainer (or TRL's, with its `kind` and `more`) is told; makes `out/checkpoints`."""
    folder = out / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    # By itself DeepSpeed would cast the module for good, the frozen base LM included, where others compute in bf16.
    casts = config.precision == "bf16" and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    made = kind(
        output_dir=str(folder),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type=config.scheduler,
        lr_scheduler_kwargs=dict(config.scheduler_options),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16" and not casts,
        gradient_checkpointing=config.gradient_checkpointing,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_every,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=config.keep_checkpoints,
        metric_for_best_model="loss" if evaluates else None,
        greater_is_better=False,
        dataloader_num_workers=config.workers,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=[],
        use_cpu=config.cpu or not torch.cuda.is_available(),
        prediction_loss_only=True,
        **more,
    )
    if casts:
        made.deepspeed_plugin.deepspeed_config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return made


def run(trainer: OwnTrainer, config: TrainerConfig, out: Path) -> None:
    """Train to the end, from the newest whole checkpoint in `out/checkpoints` on, with signals, metrics and progress.

    Leaves the trainer's model with the last weights, or those of the best dev loss (`config.weights`).
    Raises Stopped after a SIGTERM or SIGUSR1 (a checkpoint is saved first), UserError for a checkpoint in another
    format, of another model or with another number of samples a step.
    """
    folder = out / "checkpoints"
    last = newest_for_all(folder) if config.resume else None
    if last is not None:
        trainer.check(last)
        if trainer.is_world_process_zero():
            logger.warning("going on from %s", last)
        trainer.args.eval_on_start = not manifest(last)["evaluated"]  # the evaluation it was stopped in
    elif trainer.is_world_process_zero():
        # Those of an earlier run would count as newer than this one's, at the next resume and when the oldest go.
        for old in steps(folder) if not config.resume else []:
            logger.warning("trainer.resume=false: %s of an earlier run is removed", old)
            shutil.rmtree(old)
    bar, metrics = _Bar(), Metrics(trainer, config, out)
    signals = Signals(config.grace_seconds, manifest(last)["seconds"] if last is not None else None, folder)
    trainer.signals = signals
    trainer.remove_callback(ProgressCallback)
    for callback in (bar, signals, metrics):
        trainer.add_callback(callback)
    devices = shards.homes(trainer.model)
    with bar.closed(), signals.listening(), closing(metrics):
        try:
            trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
        except Interrupted:
            signals.asked = True
        if any_process(signals.asked):
            raise Stopped(trainer.state.global_step, folder)
        if config.weights == "best":
            _take_best(trainer)
    shards.undo(trainer, devices)


def _take_best(trainer: OwnTrainer) -> None:
    best, state = trainer.best(), trainer.state
    if best is not None and state.best_global_step != state.global_step:
        trainer.load_weights(best)
    if trainer.is_world_process_zero():
        logger.warning(
            "trainer.weights=best: %s",
            f"those of step {state.best_global_step}, dev loss {state.best_metric:.4f}"
            if best is not None
            else "there was no dev loss, the last ones are taken",
        )
