"""A real HTTP server on loopback that answers as OpenAI-compatible ones do on bad days, the way a test orders it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("429", "500", "garbage", "half", "nothing", "slow", "drip", "no choices", "html")


@dataclass
class Seen:
    """One request: when it came (monotonic), what it said, and how often this very question had come before."""

    at: float
    body: dict[str, Any]
    headers: dict[str, str]
    before: int

    @property
    def text(self) -> str:
        return self.body["messages"][-1]["content"]


@dataclass
class Answer:
    """What is sent: a fault of FAULTS, or `status` with `text` as the reply (200) or as the error."""

    fault: str = ""
    text: str = "4"
    status: int = 200
    finish: str = "stop"
    headers: dict[str, str] = field(default_factory=dict)
    usage: dict[str, Any] | None = field(default_factory=lambda: {"prompt_tokens": 10, "completion_tokens": 2})
    code: str | None = None
    seconds: float = 0.0  # before it
    model: str | None = None  # the name it answers as; None: the one it was asked for


class FaultServer:
    """`plan` says what each chat request gets. Requests are kept in `seen`; `models` is the list (None: HTTP 404)."""

    def __init__(
        self,
        plan: Callable[[Seen], Answer] = lambda seen: Answer(),
        models: Sequence[str] | None = ("judge-7b",),
        key: str | None = None,
    ) -> None:
        self.plan, self.models, self.key = plan, models, key
        self.seen: list[Seen] = []
        self.open = self.most_open = 0
        self._counts: Counter[str] = Counter()
        self._lock, self.stopping = threading.Lock(), threading.Event()

    def __enter__(self) -> FaultServer:
        server = self

        class Handler(_Handler):
            owner = server

        self._http = _Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def note(self, body: dict[str, Any], headers: dict[str, str]) -> Seen:
        with self._lock:
            text = body["messages"][-1]["content"]
            seen = Seen(time.monotonic(), body, headers, self._counts[text])
            self._counts[text] += 1
            self.seen.append(seen)
        return seen

    def enter(self, step: int) -> None:
        with self._lock:
            self.open += step
            self.most_open = max(self.most_open, self.open)


class _Http(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is part of the play."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes
    owner: FaultServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._unknown_key():
            return
        if self.owner.models is None or not self.path.endswith("/v1/models"):
            self._send(404, {"error": {"message": "not found"}})
        else:
            self._send(200, {"object": "list", "data": [{"id": name} for name in self.owner.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self._unknown_key():
            return
        seen = self.owner.note(body, {name.lower(): value for name, value in self.headers.items()})
        if not self.path.endswith("/v1/chat/completions"):
            return self._send(404, {"error": {"message": "not found"}})
        self.owner.enter(1)
        answer = self.owner.plan(seen)
        self.owner.stopping.wait(answer.seconds)
        self.owner.enter(-1)  # before the client knows and may send the next one
        with suppress(ConnectionError):
            self._play(answer, body)

    def _unknown_key(self) -> bool:
        given = self.headers.get("authorization", "")
        if self.owner.key is None or given == f"Bearer {self.owner.key}":
            return False
        self._send(401, {"error": {"message": f"Incorrect API key provided: {given}."}})
        return True

    def _play(self, answer: Answer, body: dict[str, Any]) -> None:
        message = {"role": "assistant", "content": answer.text}
        complete = {
            "id": "1", "object": "chat.completion", "created": 0, "model": answer.model or body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": answer.finish}], "usage": answer.usage,
        }  # fmt: skip
        whole = json.dumps(complete).encode()
        if answer.fault == "429":
            self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.05"} | answer.headers)
        elif answer.fault == "500":
            self._send(500, {"error": {"message": "out of order"}})
        elif answer.fault == "garbage":
            self._bytes(200, b'{"id": "1", "choices": [{"mess\x00\xff')
        elif answer.fault == "html":
            self._bytes(200, b"<html>Welcome to this network</html>", {"Content-Type": "text/html"})
        elif answer.fault == "no choices":
            self._send(200, {**complete, "choices": []})
        elif answer.fault == "half":
            self._head(200, len(whole))
            self.wfile.write(whole[: len(whole) // 2])
            self._hang_up()
        elif answer.fault == "nothing":
            self._hang_up()
        elif answer.fault == "slow":
            self.owner.stopping.wait(5.0)
            self._hang_up()
        elif answer.fault == "drip":  # each byte comes in time, the whole never does
            self._head(200, len(whole))
            for place in range(len(whole)):
                if self.owner.stopping.wait(0.05):
                    break
                self.wfile.write(whole[place : place + 1])
            self._hang_up()
        elif answer.status != 200:
            self._send(answer.status, {"error": {"message": answer.text, "code": answer.code}}, answer.headers)
        else:
            self._bytes(200, whole)

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._bytes(status, json.dumps(value).encode(), headers)

    def _bytes(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, len(content), headers)
        self.wfile.write(content)

    def _head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(length)} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
