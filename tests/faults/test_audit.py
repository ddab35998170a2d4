"""The dependency audit with the real pip-audit, on advisories that a server on loopback gives."""

import json
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import ROOT

pytest.importorskip("pip_audit", reason="pip-audit comes with the extra dev")


class Advisories(BaseHTTPRequestHandler):
    """As OSV answers: by name and version."""

    known = {"jinja2": ["3.1"], "fixable": ["2.0"], "hopeless": []}

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        package = json.loads(self.rfile.read(int(self.headers["content-length"])))["package"]["name"]
        body = {}
        if package in self.known:
            events = [{"introduced": "0"}, *({"fixed": fix} for fix in self.known[package])]
            affected = {"package": {"name": package, "ecosystem": "PyPI"}, "versions": ["1.0"],
                        "ranges": [{"type": "ECOSYSTEM", "events": events}]}  # fmt: skip
            advisory = {"id": f"GHSA-{package}", "aliases": [f"CVE-{package}"], "summary": "bad", "details": "bad"}
            times = {"published": "2026-01-01T00:00:00Z", "modified": "2026-01-01T00:00:00Z"}
            body = {"vulns": [{**advisory, **times, "affected": [affected]}]}
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def audit(tmp_path):
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Advisories)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def run(lines: str, allow: str = "", known: dict | None = None, url: str = "") -> tuple[int, str]:
        Advisories.known = {"jinja2": ["3.1"], "fixable": ["2.0"], "hopeless": []} if known is None else known
        (tmp_path / "pins.txt").write_text(lines)
        (tmp_path / ".ci" / "audit_allowed.txt").write_text(f"# ID day why\n{allow}")
        command = [sys.executable, tmp_path / ".ci" / "audit.py", tmp_path / "pins.txt", "--osv-url"]
        command.append(url or f"http://127.0.0.1:{server.server_address[1]}/v1/query")
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout

    yield run
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_fails_what_passes_and_what_is_told(audit):
    code, said = audit("fixable==1.0\nhopeless==1.0\nsound==1.0\n")
    assert code == 1 and "error: fixable 1.0: CVE-fixable, which is fixed in 2.0" in said
    assert "hopeless 1.0: CVE-hopeless, which no version fixes yet" in said
    assert "audit: 3 packages, 1 with a vulnerability that has a fix\n" in said
    code, said = audit("fixable==1.0\n", "CVE-fixable 2999-01-01 only its server is affected\n")
    assert code == 0 and "fixable 1.0: CVE-fixable passes by .ci/audit_allowed.txt" in said
    code, said = audit("fixable==1.0\n", "CVE-fixable 2026-01-01 only its server is affected\n")
    assert code == 1 and "error: fixable 1.0" in said  # its day is over
    assert audit("hopeless==1.0\n")[0] == 0


def test_without_advisories_it_is_skipped_and_says_so(audit):
    for url, known in (("http://127.0.0.1:9/v1/query", None), ("", {})):
        code, said = audit("fixable==1.0\n", url=url, known=known)
        assert code == 0 and said == "audit skipped: the advisories of OSV cannot be reached from here\n"


def test_ci_runs_it_on_the_pins():
    assert ".ci/audit.py" in (ROOT / ".ci" / "run").read_text()
    pins = Path(ROOT / "constraints" / "cpu.txt").read_text()
    assert "\npip-audit==" in pins
