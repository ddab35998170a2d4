"""Train personalized language models, and measure what the training bought."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persona.lm import BaseLM, ModelConfig
    from persona.personalizer import LanguageModel

__all__ = ["load"]


def load(base: BaseLM | ModelConfig | str, personalizers: Sequence[Any] = (), batch_size: int = 32) -> LanguageModel:
    """A base LM (loaded, or by name or directory) under a stack of personalizers (objects, directories, or names).

    >>> model = persona.load("town", ["outputs/town_persona_plug/personalizer"])
    >>> model.respond([Request((Message("user", "how was your day ?"),), persona=ada)])

    Raises UserError when a directory does not fit the base LM, was changed, or has another format version. Warns when
    a personalizer was trained on top of others than those below it here.
    """
    # Imported here, so that `import persona` stays cheap (torch and transformers take seconds).
    from persona import lm
    from persona.methods import load_personalizer
    from persona.personalizer import LanguageModel

    if isinstance(base, str):
        base = lm.ModelConfig(path=base)
    if isinstance(base, lm.ModelConfig):
        base = lm.load(base)
    stack = [load_personalizer(what, base) for what in personalizers]
    for place, personalizer in enumerate(stack):
        below, meant = tuple(other.method for other in stack[:place]), personalizer.trained_on_top_of
        if meant is not None and meant != below:
            logging.getLogger(__name__).warning(
                "%s was trained on top of %s and stands on top of %s here",
                personalizer.method, " + ".join(meant) or "the bare LM", " + ".join(below) or "the bare LM",
            )  # fmt: skip
    return LanguageModel(base, stack, batch_size)
