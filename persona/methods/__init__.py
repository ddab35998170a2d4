"""One room per method. A method trains on top of a language model and leaves a personalizer directory behind."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import Any

from persona.errors import UserError
from persona.files import sha256
from persona.lm import BaseLM
from persona.personalizer import Personalizer, read_manifest

# Name in configs and manifests -> "module:class" of its personalizer. Imported only when asked for.
PERSONALIZERS = {
    "assistant_axis": "persona.methods.assistant_axis:AssistantAxis",
    "character": "persona.methods.character:CharacterLoRA",
    "persona_fuse": "persona.methods.persona_fuse:PersonaFuse",
    "persona_plug": "persona.methods.persona_plug:PersonaPlug",
    "lora": "persona.training.lora:LoRA",
    "weights": "persona.methods.finetune:Weights",
    "user_lora": "persona.methods.finetune:UserLoRA",
    "description": "persona.methods.prompt:Description",
    "retrieval": "persona.methods.prompt:Retrieval",
    "system_prompt": "persona.methods.prompt:SystemPrompt",
    "apc": "persona.methods.apc:APC",
    "statements": "persona.methods.statements:Statements",
    "constitution": "persona.methods.statements:Constitution",
    "steering": "persona.methods.steering:Steering",
}


def personalizer_class(method: str) -> type[Personalizer]:
    if method not in PERSONALIZERS:
        near = difflib.get_close_matches(method, PERSONALIZERS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PERSONALIZERS)}"
        raise UserError(f"there is no personalizer {method!r}: {hint}")
    module, _, name = PERSONALIZERS[method].partition(":")
    return getattr(importlib.import_module(module), name)


def load_personalizer(what: Personalizer | Path | str | dict[str, Any], base: BaseLM) -> Personalizer:
    """From a directory, from the bare name of a prompt personalizer, or from `{name: {setting: value}}`."""
    if isinstance(what, Personalizer):
        return what
    if isinstance(what, dict):
        if len(what) != 1:
            raise UserError(f"a personalizer is a directory, a name, or one {{name: settings}} entry, not {what}")
        ((method, settings),) = what.items()
        return personalizer_class(method).load(Path(), dict(settings or {}), base)
    if not Path(what).is_dir() and str(what) in PERSONALIZERS:
        return personalizer_class(str(what)).load(Path(), {}, base)
    manifest = read_manifest(what, base)
    personalizer = personalizer_class(manifest["method"]).load(Path(what), manifest["config"], base)
    personalizer.fingerprint = sha256(Path(what) / "personalizer.json")
    personalizer.trained_on_top_of = tuple(manifest["trained_on_top_of"])
    return personalizer
