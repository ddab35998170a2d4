"""The script that times PersonaFuse's experts runs."""

from __future__ import annotations

import importlib.util


def test_quick_run(root, capsys):
    spec = importlib.util.spec_from_file_location("moe_adapters", root / "benchmarks" / "moe_adapters.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--quick"])
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [row[:3] for row in rows] == [
        [count, kind, step] for kind in ("top-2", "dense") for count in ("2", "4") for step in ("train", "reply")
    ]
    assert all(float(cell) > 0 for row in rows for cell in row[3:])
