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
# # Comparing the axes of two models
# Two models, or a base LM and the same LM under a character. Reads two runs of `method=assistant_axis` on the same
# roles, say `python train.py experiment=town_assistant_axis` and, after `experiment=town_character`, the same with
# `personalizers=[outputs/town_character/personalizer] name=town_axis_child`

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import pearsonr

from persona.methods.assistant_axis.axis import cosine
from persona.methods.assistant_axis.interchange import read
from persona.methods.assistant_axis.plots import ASSISTANT, ROLE, named_points
from persona.metrics.projection import project

RUNS = [Path("../outputs/town_assistant_axis"), Path("../outputs/town_axis_child")]  # or folders in the hub layout
DEPTH = 0.5  # where roles are compared, as a share of the layers

# %%
first, second = (read(run / "stages/axis" if (run / "stages").is_dir() else run) for run in RUNS)
labels = [run.name for run in RUNS]
shared = sorted(set(first.roles) & set(second.roles))
for label, one in zip(labels, (first, second), strict=True):
    print(f"{label}: {list(one.axis.shape)}, {len(one.roles)} roles")
print(f"{len(shared)} roles in both")

# %% [markdown]
# ## Do roles lie alike along both axes?
# Works for any two models. Each role's projection onto its model's own axis: 0 is the mean of the roles, 1 the
# assistant. Role loadings of the first component correlate with r > .92 between published models.


# %%
def places(one, depth):
    layer = min(int(depth * len(one.axis)), len(one.axis) - 1)
    vectors = np.stack([one.roles[name][layer].numpy() for name in shared])
    along, top = project(vectors, one.axis[layer]), project(one.default[layer].numpy(), one.axis[layer])
    return (along - along.mean()) / (top - along.mean()), layer


(across, layer), (up, other) = places(first, DEPTH), places(second, DEPTH)
found = pearsonr(across, up)
low, high = found.confidence_interval()
figure, panel = plt.subplots(figsize=(14, 12) if len(shared) > 60 else (7, 6.5))
for values, limits in ((across, panel.set_xlim), (up, panel.set_ylim)):
    limits(values.min() - 0.08 * np.ptp(values), values.max() + 0.25 * np.ptp(values))
panel.set(xlabel=f"{labels[0]}, layer {layer}", ylabel=f"{labels[1]}, layer {other}",
          title=f"Roles, r = {found.statistic:.2f} [{low:.2f}, {high:.2f}], n = {len(shared)}")  # fmt: skip
panel.axline((0, 0), slope=1, color="grey", linewidth=0.8, linestyle=":")
named_points(panel, np.column_stack([across, up]), shared, color=ROLE, s=18)
figure.tight_layout()

# %% [markdown]
# ## Do the axes point the same way?
# Only where both models have the same residual stream: one is a fine-tuned form of the other, or has adapters on top.

# %%
if first.axis.shape == second.axis.shape:
    pairs = {"the axis": (first.axis, second.axis), "the assistant's vector": (first.default, second.default)}
    figure, panel = plt.subplots(figsize=(7, 3.8))
    for (label, (one, two)), colour in zip(pairs.items(), ("black", ASSISTANT), strict=True):
        panel.plot(cosine(one.numpy(), two.numpy()), "o-", color=colour, label=label, markersize=4)
    every = np.stack([cosine(first.roles[name].numpy(), second.roles[name].numpy()) for name in shared])
    panel.plot(np.median(every, axis=0), "s--", color=ROLE, label="roles' vectors (median, whole range)", markersize=4)
    panel.fill_between(range(every.shape[1]), every.min(axis=0), every.max(axis=0), color=ROLE, alpha=0.2)
    panel.set(
        xlabel="layer", ylabel="cosine", title=f"{labels[0]} and {labels[1]}", ylim=(min(0, panel.get_ylim()[0]), 1.03)
    )
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend(fontsize=8)
    figure.tight_layout()

    moved = cosine((second.default - first.default).numpy(), first.axis.numpy())
    share = np.linalg.norm((second.default - first.default).numpy(), axis=-1) / np.linalg.norm(
        first.axis.numpy(), axis=-1
    )
    for layer, (towards, far) in enumerate(zip(moved, share, strict=True)):
        print(f"layer {layer}: the assistant has moved by {far:.2f} of the axis, cosine to the axis {towards:.2f}")
