"""How fast an endpoint may be asked, and how much of it: pace, caps and the account of tokens and cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from persona.types import Message


class Pace:
    """At most `per_minute` units in any minute, evenly spaced: no burst at the start, none after a pause.

    (A leaky bucket lets twice as much through in its first minute, which a server that counts answers with 429.)
    """

    def __init__(self, per_minute: float) -> None:
        self._seconds = 60.0 / per_minute
        self._free = 0.0  # on the monotonic clock, from when on the next unit may go

    async def take(self, amount: float = 1.0) -> None:
        """Wait for one's turn, in the order of the calls. `amount` may be larger than what a minute allows."""
        start = max(time.monotonic(), self._free)
        self._free = start + amount * self._seconds
        if (wait := start - time.monotonic()) > 0:
            await asyncio.sleep(wait)

    def give_back(self, amount: float) -> None:
        """`amount` that was taken and not used (negative: used beyond what was taken)."""
        self._free -= amount * self._seconds


class Account:
    """What was asked and what it cost, and the caps on both. Counts are of this process, since it started.

    `requests` counts every try that was sent; `cached` replies that were not asked for again; `failed` questions left
    without a reply; `unreported` replies for which the server named no token counts, so that they are estimates.
    Tokens are those of replies that arrived: what a server may charge for one that was cut off is not known here.
    """

    def __init__(
        self, price_in: float, price_out: float, max_cost: float | None, max_requests: int | None, who: str
    ) -> None:
        self.price_in, self.price_out = price_in, price_out
        self.max_cost, self.max_requests, self._who = max_cost, max_requests, who
        self.requests = self.cached = self.retries = self.failed = self.unreported = 0
        self.prompt_tokens = self.completion_tokens = 0
        self.in_flight = 0
        self._reserved = 0.0

    def cost(self, prompt: float, completion: float) -> float:
        """In the currency of the prices, which are per million tokens."""
        return (prompt * self.price_in + completion * self.price_out) / 1e6

    @property
    def spent(self) -> float:
        return self.cost(self.prompt_tokens, self.completion_tokens)

    def over(self, need: float) -> str:
        """The sentence that ends the run when one more request, of at most `need` in cost, breaks a cap; else ""."""
        rest = "what is finished is kept, and the same command goes on with a higher one"
        if self.max_requests is not None and self.requests >= self.max_requests:
            return f"endpoint {self._who}: max_requests={self.max_requests} is used up; {rest}"
        if self.max_cost is not None and self.spent + self._reserved + need > self.max_cost:
            spent = f"{self.spent:.6g} of max_cost={self.max_cost:g} is spent"
            return f"endpoint {self._who}: {spent} and the next request may take {need:.3g}; {rest}"
        return ""

    def start(self, need: float) -> None:
        """A request goes out. Until it has ended, `need` counts as spent."""
        self.requests += 1
        self.in_flight += 1
        self._reserved += need

    def end(self, need: float) -> None:
        """It has ended, with a reply or without one."""
        self.in_flight -= 1
        self._reserved -= need
        if not self.in_flight:
            self._reserved = 0.0  # no rounding error adds up

    def usage(self) -> dict[str, float]:
        counts = ("requests", "cached", "retries", "failed", "unreported", "prompt_tokens", "completion_tokens")
        return {name: getattr(self, name) for name in counts} | {"cost": round(self.spent, 9)}


def estimate_tokens(texts: Sequence[str] | Sequence[Message]) -> int:
    """Tokens of texts or messages, on the high side: one for three bytes, and four around each."""
    parts = [text if isinstance(text, str) else text.content for text in texts]
    return sum(len(part.encode(errors="replace")) // 3 + 4 for part in parts)
