"""A synthetic town whose truth is known, its tiny language model and its oracle (DESIGN section 6)."""

from pathlib import Path

# The shipped language model of the town: a Hugging Face directory that `persona.lm.load` opens like any other.
MODEL_PATH = Path(__file__).parent / "model"
