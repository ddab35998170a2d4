"""A batching front for scoring models: episodes ask about one item at a time, the model answers full batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Any

_QUIET_ROUNDS = 4  # passes of the event loop without a new item after which all that come now have come


class Batcher:
    """`answer(items) -> results` in their order, asked through `await ask(item)`.

    Batches hold at most `batch_size` items, each different one once, and are computed one at a time in a thread, so
    that the event loop goes on; items that were waiting when a run was killed are forgotten with its loop. What
    `answer` raises, every item of its batch raises.
    """

    def __init__(self, answer: Callable[[list[Any]], Sequence[Any]], batch_size: int) -> None:
        self._answer, self._batch_size = answer, batch_size
        self._waiting: list[tuple[Hashable, asyncio.Future]] = []
        self._server: asyncio.Task | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def ask(self, item: Hashable) -> Any:
        """The result for one item."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._server, self._waiting = loop, None, []
        future = loop.create_future()
        self._waiting.append((item, future))
        if self._server is None or self._server.done():
            self._server = loop.create_task(self._serve())
        return await future

    async def _serve(self) -> None:
        while self._waiting:
            seen, quiet = 0, 0
            while quiet < _QUIET_ROUNDS and len(self._waiting) < self._batch_size:
                await asyncio.sleep(0)
                quiet = quiet + 1 if len(self._waiting) == seen else 0
                seen = len(self._waiting)
            batch, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
            items = list(dict.fromkeys(item for item, _ in batch))
            try:
                results = await asyncio.to_thread(self._answer, items)
                if len(results) != len(items):
                    raise RuntimeError(f"{len(results)} results for {len(items)} items")
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            found = dict(zip(items, results, strict=True))
            for item, future in batch:
                if not future.done():
                    future.set_result(found[item])
