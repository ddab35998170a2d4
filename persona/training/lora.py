"""LoRA adapters: put into a base LM for the length of training, kept in PEFT's format, used as a personalizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import PartialState

from persona.errors import UserError
from persona.files import atomic_folder
from persona.lm import BaseLM, adapters
from persona.lm.adapters import CONFIG, WEIGHTS
from persona.personalizer import Personalizer
from persona.types import Request


@dataclass
class LoraSettings:
    """PEFT's names. Defaults as in Open Character Training (reference/open_character_training 3.4)."""

    r: int = 64
    lora_alpha: int = 128
    lora_dropout: float = 0.0
    target_modules: str = "all-linear"  # or a regular expression over module names


@contextmanager
def adapted(base: BaseLM, settings: LoraSettings, below: Sequence[Path | str] = ()) -> Iterator[Any]:
    """A new, trainable adapter in `base.model` for the length of the context, which gets PEFT's model over it.

    `below` are folders of trained adapters that are active and frozen under the new one, each with weight 1; with
    PEFT's `disable_adapter()` the model is the base under those of `below`. On leaving, exceptions included, the base
    is what it was: the same tensors, no module, hook, patched forward or changed setting left over.
    Raises UserError when `target_modules` fits no module, or an adapter below does not fit the base.
    """
    from peft import LoraConfig, get_peft_model  # takes seconds to import

    # Remembered from here on: an adapter among the base's modules is not a part of the base.
    _ = base.identity
    under = [adapters.load_adapter(folder) for folder in below]
    with as_it_was(base.model):
        try:
            peft_model = get_peft_model(base.model, LoraConfig(**asdict(settings)))
        except ValueError as error:
            raise UserError(
                f"target_modules={settings.target_modules!r} does not fit this base LM: it should be all-linear, or "
                f"a regular expression that matches whole module names ({error})"
            ) from error
        try:
            with adapters.apply(base.model, under, torch.ones(1, len(under))):
                yield peft_model
        finally:
            peft_model.unload()


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """A frozen model is on leaving what it was, exceptions included: trainers patch `forward`, change settings, add
    hooks, switch dropout and checkpointing on."""
    attributes = set(vars(model))
    kept: list[dict] = [vars(config) for config in (model.config, model.generation_config) if config]
    kept += [hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    before = [dict(content) for content in kept]
    try:
        yield
    finally:
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for content, old in zip(kept, before, strict=True):
            content.clear()
            content.update(old)
        model.eval().requires_grad_(False)


def spare_head(base: BaseLM) -> None:
    """Raises UserError when an adapter changes the output head: TRL's trainers read the head's own weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(base.model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "target_modules includes the base LM's output head, which this trainer cannot change: name others"
        )


def save_adapter(peft_model: Any, folder: Path) -> Path:
    """Write the adapter as PEFT reads it, whole or not at all; of several processes the first writes, others wait."""
    processes = PartialState()
    if processes.is_main_process:
        with atomic_folder(folder) as temporary:
            peft_model.save_pretrained(temporary)
            (temporary / "README.md").unlink(missing_ok=True)  # PEFT's model card with nothing filled in
            config = json.loads((temporary / CONFIG).read_text())
            # Sets come in the order of Python's hash seed; the same adapter is the same file.
            config = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
            (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    processes.wait_for_everyone()
    return folder


def keep(work: Path, folder: Path) -> Path:
    """Copy what a training left in its working folder `work` to `folder`, whole: the adapter, its metrics, the list of
    what was dropped. Of several processes the first copies, the others wait."""
    processes = PartialState()
    if processes.is_main_process:
        with atomic_folder(folder) as temporary:
            for file in (*(work / "adapter").iterdir(), work / "metrics.jsonl", work / "dropped.jsonl"):
                if file.is_file():
                    shutil.copyfile(file, temporary / file.name)
    processes.wait_for_everyone()
    return folder


class LoRA(Personalizer):
    """One adapter for everybody, in PEFT's own format in `adapter/` (loads in plain PEFT).

    Made from any folder with such an adapter; a method that ends in one subclasses this with its own `method`.
    """

    method = "lora"

    def __init__(self, base: BaseLM, folder: Path):
        self.base, self.folder = base, folder
        self.adapter = adapters.load_adapter(folder)

    @contextmanager
    def modules(self, requests: Sequence[Request]) -> Iterator[None]:
        with adapters.apply(self.base.model, [self.adapter], torch.ones(len(requests), 1)):
            yield

    def config(self) -> dict[str, Any]:
        return {}

    def write(self, folder: Path) -> None:
        (folder / "adapter").mkdir()
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(self.folder / name, folder / "adapter" / name)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> Self:
        return cls(base, folder / "adapter")
