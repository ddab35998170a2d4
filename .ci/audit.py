"""Known vulnerabilities in the pinned dependencies: `python .ci/audit.py [REQUIREMENTS] [pip-audit's options]`.

Fails for one that has a fix, unless .ci/audit_allowed.txt lets it pass for a reason and until a date. One without a
fix is told. A machine that cannot reach the advisories (OSV) says so and fails nothing.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Long known to be vulnerable: a service that does not say so gives no advisories, whatever it answers.
CANARY = "jinja2==2.4.1\n"
TOOL = ["-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "-s", "osv"]


def ask(requirements: Path, options: list[str]) -> list[dict[str, Any]] | None:
    """What pip-audit found, a dict for each package; None where it could not ask."""
    command = [sys.executable, *TOOL, "--requirement", str(requirements), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return None


def allowed(path: Path, today: datetime.date) -> set[str]:
    """The ids that may pass today. A line is `ID YYYY-MM-DD reason`; lines that begin with # are remarks."""
    ids = set()
    for line in path.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            id, until, _reason = line.split(maxsplit=2)
            if datetime.date.fromisoformat(until) >= today:
                ids.add(id)
    return ids


def main(arguments: list[str]) -> int:
    own = bool(arguments) and not arguments[0].startswith("-")
    requirements = Path(arguments.pop(0)) if own else HERE.parent / "constraints" / "cpu.txt"
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "canary.txt"
        canary.write_text(CANARY)
        if not any(package.get("vulns") for package in ask(canary, arguments) or []):
            print("audit skipped: the advisories of OSV cannot be reached from here")
            return 0
    found = ask(requirements, arguments)
    if found is None:
        print("audit skipped: the advisories of OSV could not be asked for to the end")
        return 0
    passes = allowed(HERE / "audit_allowed.txt", datetime.date.today())
    failed = 0
    for package in found:
        for advisory in package.get("vulns", []):
            ids = {advisory["id"], *advisory["aliases"]}
            fixes = ", ".join(advisory["fix_versions"])
            what = f"{package['name']} {package['version']}: {advisory['id']}"
            if ids & passes:
                print(f"{what} passes by .ci/audit_allowed.txt")
            elif fixes:
                failed += 1
                print(f"error: {what}, which is fixed in {fixes}")
            else:
                print(f"{what}, which no version fixes yet")
    skipped = [package["name"] for package in found if "skip_reason" in package]
    print(f"audit: {len(found) - len(skipped)} packages, {failed} with a vulnerability that has a fix", end="")
    print(f"; not asked for: {', '.join(skipped)}" if skipped else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
