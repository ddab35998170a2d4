"""The notebook over a training draws what metrics.jsonl holds."""

from __future__ import annotations

import runpy
from pathlib import Path

import matplotlib
from training_toys import curve, run

matplotlib.use("Agg")
from matplotlib import pyplot as plt

NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "training_curves.py"


def test_notebook(tmp_path, monkeypatch):
    out = tmp_path / "outputs" / "town_persona_plug"
    run(out)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    plt.close("all")
    runpy.run_path(str(NOTEBOOK))
    (number,) = plt.get_fignums()
    loss, norm, tokens, wait = plt.figure(number).axes
    assert list(loss.lines[0].get_xdata()) == list(range(1, 13)) and list(loss.lines[1].get_xdata()) == [4, 8, 12]
    assert list(norm.lines[0].get_ydata()) == list(curve(out, "grad_norm").values())
    assert not len(tokens.lines[0].get_xdata())  # points have no tokens
    assert wait.get_ylim() == (0, 1)
    plt.close("all")
