"""benchmarks/gpu_sizes.py on a tiny LM: a training and a reading, and what a row that fails leaves."""

import importlib
import json

import pytest


@pytest.fixture
def script(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    return importlib.import_module("gpu_sizes")


def test_quick_run(script, capsys, tmp_path, monkeypatch):
    def refuses(setting, out):
        raise RuntimeError("no memory left")

    monkeypatch.setitem(script.ROWS, "LoRA, broken", lambda s: script.trained(refuses, "broken", s))
    only = ["LoRA, 8", "Axis, extraction", "LoRA, broken"]
    script.main(["--quick", "--steps", "8", "--only", *only, "--out", str(tmp_path / "rows.json")])
    rows = {row["row"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == ["LoRA, 8 × 1,024", "Axis, extraction, 512 tokens", "LoRA, broken"]
    trained = rows["LoRA, 8 × 1,024"]
    assert trained["tokens_per_second"] > 0 and trained["memory_gb"] > 0
    # Steps 5 to 8 alone: 8 rows of 1,024 tokens divided by 32 each, one row a step here.
    assert trained["samples_per_second"] * trained["seconds_per_step"] == pytest.approx(1, rel=0.01)
    assert rows["LoRA, broken"]["failed"] == "RuntimeError: no memory left"
    assert "tokens/s" in capsys.readouterr().out
