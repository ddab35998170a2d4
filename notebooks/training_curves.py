# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How a training went
# Loss, gradient norm, speed and waiting over steps, for any number of runs beside each other. Reads what each training
# writes, `metrics.jsonl`: `python train.py experiment=town_persona_plug`. What the values mean: docs/design.md.

# %%
from pathlib import Path

import matplotlib.pyplot as plt

from persona.files import read_lines

RUNS = [Path("../outputs/town_persona_plug")]
# What is drawn, with the name of its axis; a run without a value (tokens where there are none) has no line there.
PANELS = {
    "loss": "loss (dashed: dev)",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens / s",
    "data_wait": "share of time waiting for data",
}


# %%
def curve(run, key):
    """Steps and values of one key."""
    points = [(row["step"], row[key]) for row in read_lines(run / "metrics.jsonl") if key in row]
    return zip(*points, strict=True) if points else ([], [])


figure, panels = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
for panel, (key, name) in zip(panels.flat, PANELS.items(), strict=True):
    for number, run in enumerate(RUNS):
        panel.plot(*curve(run, key), color=f"C{number}", label=run.name)
        if key == "loss":
            panel.plot(*curve(run, "eval_loss"), "o--", color=f"C{number}", markersize=3)
    panel.set_title(name, fontsize=10)
    if key != "loss":
        panel.set_ylim(bottom=0, top=1 if key == "data_wait" else None)
    panel.grid(alpha=0.3)
for panel in panels[1]:
    panel.set_xlabel("step")
panels[0, 0].legend(frameon=False)
plt.show()
