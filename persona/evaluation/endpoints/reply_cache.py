"""Replies of endpoints on disk, keyed by everything that was asked: what is there is never paid for twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from persona.errors import UserError
from persona.types import Response

_FORMAT = 1
_BUSY_SECONDS = 60.0

T = TypeVar("T")


def reply_key(model: str, base_url: str, asked: Mapping[str, Any]) -> str:
    """64 hex digits of server, model, messages and sampling, whatever the order of the keys. No API key enters it."""
    content = json.dumps([model, base_url, asked], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()


class ReplyCache:
    """An SQLite file that any number of processes may read and fill at once (WAL; not on a network file system).

    Raises UserError when the file cannot be opened or written, is no such cache, or has another format version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the cache {self.path} cannot be made: {error.strerror}") from error
        self._connection = self._guard(self._open)

    def _open(self) -> sqlite3.Connection:
        # Autocommit: every statement is a transaction. Each run of a benchmark may have a thread of its own.
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("BEGIN IMMEDIATE")  # one process makes the table, the others find it
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            strange = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] if not found else 0
            if found not in (0, _FORMAT) or strange:
                raise UserError(f"{self.path} is no cache of replies of format version {_FORMAT}: name another file")
            columns = "key TEXT PRIMARY KEY, text TEXT NOT NULL, finish_reason TEXT NOT NULL"
            connection.execute(f"CREATE TABLE IF NOT EXISTS replies ({columns})")
            connection.execute(f"PRAGMA user_version={_FORMAT}")
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        return connection

    def get(self, key: str) -> Response | None:
        """The reply that was kept under `key`, if any."""
        query = "SELECT text, finish_reason FROM replies WHERE key = ?"
        row = self._guard(lambda: self._connection.execute(query, (key,)).fetchone())
        return None if row is None else Response(row[0], finish_reason=row[1])

    def put(self, key: str, response: Response) -> Response:
        """Keep a reply and return the one that is kept: the first one, where several processes asked the same."""
        # A lone surrogate (half of an escaped emoji) is no UTF-8.
        text = response.text.encode(errors="replace").decode()
        values = (key, text, response.finish_reason)
        self._guard(lambda: self._connection.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?)", values))
        return self.get(key) or response

    def __len__(self) -> int:
        return self._guard(lambda: self._connection.execute("SELECT count(*) FROM replies").fetchone()[0])

    def close(self) -> None:
        self._connection.close()

    def _guard(self, action: Callable[[], T]) -> T:
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return action()
            except sqlite3.Error as error:
                # SQLite's own time-out does not cover the moments in which others open the file or leave it last.
                busy = getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
                if not busy or time.monotonic() > deadline:
                    raise UserError(f"the cache {self.path} cannot be used: {error}") from error
            time.sleep(0.02)
