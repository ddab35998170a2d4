"""The notebooks run on small runs in the town, as scripts; one is also converted and executed as a notebook."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from persona.config import load_config
from train import train

NOTEBOOKS = Path(__file__).resolve().parents[3] / "notebooks"
FIGURES = {
    "persona_space": 3,
    "choosing_a_cap": 2,
    "conversation_projection": 2,
    "steering_sweep": 1,
    "comparing_axes": 2,
}
# tests/methods/persona_fuse/test_fuse_notebook.py, tests/training/test_training_notebook.py
OTHERS = {"expert_mixtures", "training_curves"}
SMALL = (
    "experiment=town_assistant_axis", "data.questions=2", "data.tasks=1", "data.dev=14", "data.dev_questions=1",
    "data.test_questions=1", "method.min_count=2", "method.calibration.every=2", "method.calibration.quantiles=[0.05]",
    "method.calibration.raises=[0,0.5]",
)  # fmt: skip


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the repository's root would be: two runs in outputs/, and the notebooks beside them."""
    root = tmp_path_factory.mktemp("runs")
    runs = {
        "town_assistant_axis": ("method.calibration.widths=[2]",),
        "town_axis_child": ("method.calibration.widths=[]", "trainer.seed=1"),
    }
    for name, own in runs.items():
        train(load_config("train", [*SMALL, *own, f"output={root / 'outputs' / name}"]))
    shutil.copytree(NOTEBOOKS, root / "notebooks")
    return root


def test_every_notebook_is_tested() -> None:
    assert {path.stem for path in NOTEBOOKS.iterdir() if path.suffix == ".py"} == {*FIGURES, *OTHERS}
    assert not list(NOTEBOOKS.glob("*.ipynb"))  # what cells have shown is not committed


@pytest.mark.parametrize("name", FIGURES)
def test_notebook_runs_and_labels_what_it_draws(
    name: str, outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(outputs / "notebooks")
    plt.close("all")
    runpy.run_path(f"{name}.py")
    figures = [plt.figure(number) for number in plt.get_fignums()]
    plt.close("all")
    assert len(figures) == FIGURES[name] and capsys.readouterr().out
    for figure in figures:
        panels = [panel for panel in figure.axes if panel.axison]
        assert all(panel.get_title() or panel.get_ylabel() or panel.get_xlabel() for panel in panels) and panels


@pytest.mark.slow
def test_a_script_is_a_notebook(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jupytext, nbclient = pytest.importorskip("jupytext"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = jupytext.read(outputs / "notebooks" / "persona_space.py")
    where = {"metadata": {"path": str(outputs / "notebooks")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in shown) == FIGURES["persona_space"]
    assert [cell.cell_type for cell in notebook.cells].count("markdown") > 3
