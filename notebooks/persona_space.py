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
# # Persona space
# Where roles lie among each other, and how the axis runs through them. Reads a run of `method=assistant_axis`:
# `python train.py experiment=town_assistant_axis`

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from persona.methods.assistant_axis.axis import SHARES, pca
from persona.methods.assistant_axis.interchange import read
from persona.methods.assistant_axis.plots import ASSISTANT, ROLE, named_points
from persona.metrics.projection import project

RUN = Path("../outputs/town_assistant_axis")  # or a folder in the published hub layout
LAYER = None  # None: the middle one

# %%
vectors = read(RUN / "stages/axis" if (RUN / "stages").is_dir() else RUN)
layer = len(vectors.axis) // 2 if LAYER is None else LAYER
axis, default = vectors.axis[layer].numpy(), vectors.default[layer].numpy()
names = list(vectors.roles)
roles = np.stack([vectors.roles[name][layer].numpy() for name in names])
space = pca(roles, towards=axis)
print(f"layer {layer} of {len(vectors.axis)}; {len(names)} roles, {len(vectors.traits)} traits")

# %% [markdown]
# ## How many dimensions roles have

# %%
figure, left = plt.subplots(figsize=(7, 4.5))
shown = np.cumsum(space.explained)
left.plot(np.arange(1, len(shown) + 1), shown, "o-", color=ASSISTANT, markersize=4)
for share in SHARES:
    left.axhline(share, color="grey", linewidth=0.5)
    left.text(1, share, f"{share:.0%}: {space.dimensions(share)} components", va="bottom", fontsize=8)
left.set(xlabel="components", ylabel="share of variance", ylim=(0, 1.05), title=f"Variance of roles, layer {layer}")
left.xaxis.get_major_locator().set_params(integer=True)
figure.tight_layout()

# %% [markdown]
# ## The map
# Left: the first two components of the roles' vectors, and the part of the axis that lies in this plane, from the mean
# of the roles to the assistant. Right: the same roles by the axis itself.

# %%
direction = axis / np.linalg.norm(axis)
inside = np.linalg.norm(space.components[:2] @ direction)
assistant = space.place(default)[:2]
many = len(names) > 60  # then only a large map has room for their names
figure, (left, right) = plt.subplots(*((2, 1) if many else (1, 2)), figsize=(14, 24) if many else (13, 6))

places = np.vstack([space.coordinates[:, :2], assistant])
margin = 0.15 * np.ptp(places, axis=0)
left.set(xlim=(places[:, 0].min() - margin[0], places[:, 0].max() + margin[0]),
         ylim=(places[:, 1].min() - margin[1], places[:, 1].max() + margin[1]),
         xlabel=f"PC1 ({space.explained[0]:.0%} of the variance)", ylabel=f"PC2 ({space.explained[1]:.0%})",
         title=f"Persona space: |cos(axis, PC1)| = {abs(space.components[0] @ direction):.2f}, "
               f"cos(axis, plane) = {inside:.2f}")  # fmt: skip
left.axline((0, 0), assistant, color=ASSISTANT, linestyle="--", linewidth=1, alpha=0.5, zorder=0)
left.plot(*zip((0, 0), assistant, strict=True), color=ASSISTANT, linewidth=2, zorder=0, label="the axis in this plane")
left.scatter(*assistant, marker="*", s=220, color=ASSISTANT, label="the assistant", zorder=3)
left.legend(loc="upper left")
unnamed = named_points(left, space.coordinates[:, :2], names, assistant[None], color=ROLE, s=18)

along = project(np.vstack([roles, default]), axis)
right.set(xlim=(along.min() - 0.1 * np.ptp(along), along.max() + 0.15 * np.ptp(along)), ylim=left.get_ylim(),
          xlabel="projection onto the axis", ylabel="PC2", title="Roles and the assistant along the axis")  # fmt: skip
right.scatter(along[-1], assistant[1], marker="*", s=220, color=ASSISTANT, zorder=3)
unnamed += named_points(right, np.column_stack([along[:-1], space.coordinates[:, 1]]), names, color=ROLE, s=18)
figure.tight_layout()
if unnamed:
    print("without room for their names:", ", ".join(sorted(set(unnamed))))

# %% [markdown]
# ## Who is nearest to the assistant, and who is farthest
# The gap between the assistant and the nearest role, as a share of the whole range, is 0.03 to 0.5 in published
# models.

# %%
order = np.argsort(-along[:-1])
for title, some in (("nearest", order[:8]), ("farthest", order[::-1][:8])):
    print(f"{title:9}", ", ".join(f"{names[i]} {along[i]:.1f}" for i in some))
gap = (along[-1] - along[order[0]]) / np.ptp(along)
print(f"assistant {along[-1]:.1f}; gap to the nearest role {gap:.2f} of the range")

# %% [markdown]
# ## How sure the direction is, layer by layer
# The bands are 95 % of resampled roles, and of two halves of the roles against each other.

# %%
report = RUN / "stages/axis/axis.json"
if report.is_file():
    rows = json.loads(report.read_text())["layers"]
    at = [row["layer"] for row in rows]
    figure, panel = plt.subplots(figsize=(7, 3.5))
    for key, label, colour in (
        ("resampled_roles", "axis of resampled roles", ASSISTANT),
        ("split_roles", "halves of the roles", "grey"),
    ):
        panel.plot(at, [row[key]["median"] for row in rows], "o-", color=colour, label=label, markersize=4)
        panel.fill_between(at, *([row[key][end] for row in rows] for end in ("low", "high")), color=colour, alpha=0.2)
    halves = [row["halves_of_questions_cosine"] for row in rows]
    panel.plot(
        at,
        [np.nan if half is None else half for half in halves],
        "s--",
        color="black",
        label="halves of the questions",
        markersize=4,
    )
    panel.plot(at, [abs(row["pc1_cosine"]) for row in rows], "^:", color=ROLE, label="|cos(axis, PC1)|", markersize=4)
    panel.set(xlabel="layer", ylabel="cosine", ylim=(0, 1.03), title="Direction of the axis")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend(fontsize=8)
    figure.tight_layout()
