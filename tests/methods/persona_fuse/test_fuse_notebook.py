"""The notebook runs as a script on experts that nobody has trained, and labels what it draws."""

from __future__ import annotations

import runpy

import matplotlib
from fuse_toys import trained_looking

from persona import lm
from persona.methods.persona_fuse.personalizer import PersonaFuse
from persona.personalizer import save

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def test_notebook(root, tmp_path, monkeypatch, capsys):
    base = lm.load(lm.ModelConfig(path="town", device="cpu"))
    fuse = PersonaFuse(base, trained_looking(base))
    save(fuse, base, tmp_path / "outputs" / "town_persona_fuse" / "personalizer")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    plt.close("all")
    runpy.run_path(str(root / "notebooks" / "expert_mixtures.py"))
    figures = [plt.figure(number) for number in plt.get_fignums()]
    assert len(figures) == 2 and all(figure.axes[0].get_title() and figure.axes[0].get_xlabel() for figure in figures)
    ticks = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    plt.close("all")
    assert ticks == list(fuse.names)
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said if line.startswith(" ")] == list(fuse.names)
