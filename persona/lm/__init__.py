"""What we ask of a base LM: load it, generate, score, choose; never change it."""

from persona.lm.batch import Row, assemble
from persona.lm.generate import respond
from persona.lm.load import BaseLM, ModelConfig, load
from persona.lm.score import score

__all__ = ["BaseLM", "ModelConfig", "Row", "assemble", "load", "respond", "score"]
