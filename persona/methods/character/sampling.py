"""How every text of the method is drawn: one temperature, and a seed that belongs to what is asked."""

from __future__ import annotations

from dataclasses import dataclass

from persona.evaluation.generation import seed_of
from persona.types import Sampling


@dataclass
class SamplingConfig:
    """As published, without its repetition penalty of 1.1, which the paper does not have (docs/errata.md)."""

    temperature: float = 0.7
    top_p: float = 0.95

    def of(self, max_new_tokens: int, seed: int, name: str) -> Sampling:
        """Sampling for the text called `name`: the same in any batch, on any process, in any order."""
        return Sampling(max_new_tokens, self.temperature, self.top_p, seed=seed_of(seed, name))
