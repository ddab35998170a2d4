"""Open Character Training (arXiv 2511.01689): a constitution becomes a character."""

from __future__ import annotations

from persona.methods.character.loss import character_loss
from persona.methods.character.merge import merge

__all__ = ["character_loss", "merge"]
