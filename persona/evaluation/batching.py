"""A batching front: episodes ask one request at a time, the model answers full batches of whatever is waiting."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from persona import heartbeat
from persona.errors import UserError
from persona.types import Request, Response

_cuts: ContextVar[Counter[str] | None] = ContextVar("cuts", default=None)  # the open episode's
_QUIET_ROUNDS = 4  # passes of the event loop without a new request after which every open episode is waiting


class LanguageModel(Protocol):
    """What is measured: lists in, lists out, in order (`persona.load` returns one)."""

    def respond(self, requests: Sequence[Request]) -> list[Response]: ...

    def choose(self, requests: Sequence[Request]) -> list[list[float]]: ...

    def loglikelihood(self, requests: Sequence[Request], targets: Sequence[str]) -> list[tuple[float, int]]: ...

    personalizers: Sequence[Any]

    @property
    def stream(self) -> tuple[int, int]: ...

    def reply_means(
        self, requests: Sequence[Request], replies: Sequence[str], layers: Sequence[int], untouched: bool = False
    ) -> list[np.ndarray]: ...


@contextmanager
def counting_cuts() -> Iterator[Counter[str]]:
    """Role → tokens lost by the prompts that are asked inside, because they did not fit a local model's positions."""
    counter: Counter[str] = Counter()
    token = _cuts.set(counter)
    try:
        yield counter
    finally:
        _cuts.reset(token)


@dataclass
class _Pending:
    request: Request
    target: str
    future: asyncio.Future
    length: int


class AsyncModel:
    """A batching front over a synchronous language model; made by the runner and handed to each episode.

    Batches are computed in `executor`, so that requests to endpoints go on meanwhile. It has to run one at a time:
    models may share a base whose modules are edited for the length of a batch.
    """

    likelihoods = True

    def __init__(
        self, model: LanguageModel, batch_size: int, executor: Executor | None = None, name: str = "model"
    ) -> None:
        self._model, self._batch_size, self._executor, self.name = model, batch_size, executor, name
        self._pending: dict[tuple[str, Any], list[_Pending]] = {}  # by what is asked, and how
        self._arrived = asyncio.Event()
        self._count = 0

    async def respond(self, request: Request) -> Response:
        """The model's reply to one request."""
        # The seed is the request's own, so requests that differ only in it are decoded together.
        return await self._ask("respond", request, "", replace(request.sampling, seed=0))

    async def choose(self, request: Request) -> list[float]:
        """Summed log p of each of `request.options`, in their order. Raises UserError without options."""
        if not request.options:
            raise UserError("A request to choose has no options; give Request.options.")
        return await self._ask("choose", request, "", None)

    async def loglikelihood(self, request: Request, target: str) -> tuple[float, int]:
        """Summed log p of `target` as the reply, and its number of tokens."""
        return await self._ask("loglikelihood", request, target, None)

    @property
    def stream(self) -> tuple[int, int]:
        """Decoder blocks, and width of the residual stream; only local models have them."""
        return self._model.stream

    @property
    def personalized(self) -> bool:
        """Whether the model is anything but a bare base LM."""
        return bool(self._model.personalizers)

    async def reply_means(
        self, request: Request, reply: str, layers: tuple[int, ...], untouched: bool = False
    ) -> np.ndarray:
        """Mean outputs [layers, hidden] of decoder blocks over `reply`; only local models have them."""
        return await self._ask("reply_means", request, reply, (layers, untouched))

    async def _ask(self, kind: str, request: Request, target: str, how: Any) -> Any:
        length = sum(len(message.content) for message in request.messages) + len(target)
        length += max((len(option) for option in request.options), default=0) if request.options else 0
        entry = _Pending(request, target, asyncio.get_running_loop().create_future(), length)
        self._pending.setdefault((kind, how), []).append(entry)
        self._count += 1
        self._arrived.set()
        answer, cut = await entry.future
        if cut and (counter := _cuts.get()) is not None:
            counter[self.name] += cut
        return answer

    async def serve(self, before_batch: Callable[[], None]) -> None:
        """Answer batches until cancelled; `before_batch` is called before each one. A model error ends the run."""
        while True:
            await self._arrived.wait()
            await self._settle()
            full = [key for key, entries in self._pending.items() if len(entries) >= self._batch_size]
            # Partial batches wait as long as answering full ones may bring them company.
            for key in full or [max(self._pending, key=lambda key: len(self._pending[key]))]:
                entries = sorted(self._pending.pop(key), key=lambda entry: -entry.length)
                whole = len(entries) if not full else len(entries) - len(entries) % self._batch_size
                if entries[whole:]:
                    self._pending[key] = entries[whole:]
                for start in range(0, whole, self._batch_size):
                    before_batch()
                    batch = entries[start : min(start + self._batch_size, whole)]
                    loop = asyncio.get_running_loop()
                    answers = await loop.run_in_executor(self._executor, self._answers, *key, batch)
                    for entry, answer in zip(batch, answers, strict=True):
                        if not entry.future.done():
                            entry.future.set_result(answer)
                    await self._settle()
            if not self._pending:
                self._arrived.clear()

    async def _settle(self) -> None:
        quiet, seen = 0, self._count
        while quiet < _QUIET_ROUNDS:
            await asyncio.sleep(0)
            quiet = quiet + 1 if self._count == seen else 0
            seen = self._count

    def _answers(self, kind: str, how: Any, batch: list[_Pending]) -> list[tuple[Any, int]]:
        """Each one's answer, and how many tokens its prompt lost."""
        requests = [entry.request for entry in batch]
        answers: Sequence[Any]
        since = time.monotonic()
        if kind == "respond":
            answers = self._model.respond(requests)
        elif kind == "choose":
            answers = self._model.choose(requests)
        elif kind == "reply_means":
            answers = self._model.reply_means(requests, [entry.target for entry in batch], *how)
        else:
            answers = self._model.loglikelihood(requests, [entry.target for entry in batch])
        heartbeat.now.busy += time.monotonic() - since
        if len(answers) != len(batch):
            raise RuntimeError(f"The model gave {len(answers)} answers to {len(batch)} requests in {kind}.")
        return list(zip(answers, getattr(self._model, "cut", None) or (0,) * len(batch), strict=True))
