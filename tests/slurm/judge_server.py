"""A judge that says "4" to everything, on the port that is its argument; `python judge_server.py 30001`."""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Judge(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send({"data": [{"id": "judge"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"index": 0, "message": {"role": "assistant", "content": "Score: 4"}, "finish_reason": "stop"}
        self._send({"id": "1", "object": "chat.completion", "model": "judge", "choices": [choice]})

    def _send(self, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


ThreadingHTTPServer(("", int(sys.argv[1])), Judge).serve_forever()
