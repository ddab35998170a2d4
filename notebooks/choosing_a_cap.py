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
# # Choosing layers and a cap
# Where floors lie between roles and the assistant, and what each band of layers costs and prevents. Reads a run of
# `method=assistant_axis`; the second half needs its search, `method.calibration.widths=[…]`:
# `python train.py experiment=town_assistant_axis`

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from safetensors.numpy import load_file

from persona.methods.assistant_axis.calibration import engaged, floors, pareto_front, parse_band
from persona.methods.assistant_axis.plots import ASSISTANT, ROLE, named_points

RUN = Path("../outputs/town_assistant_axis")

# %%
calibration = json.loads((RUN / "stages/calibration/calibration.json").read_text())
projections = {
    file.stem: load_file(file)["projections"]
    for file in sorted((RUN / "stages/projections/roles").glob("*.safetensors"))
}
default = projections.pop("default")
roles = np.concatenate(list(projections.values()))
layers = np.arange(roles.shape[1])
chosen = calibration["chosen"]
print(f"{len(roles)} rollouts of {len(projections)} roles, {len(default)} of the assistant; chosen: {chosen}")

# %% [markdown]
# ## Where the floors lie
# Projections of rollouts, per layer on a scale of its own: 0 is the mean of the roles, 1 the mean of the assistant;
# boxes are half of the rollouts, whiskers 95 %. A quantile counted on the negated axis, as published, lies near the
# assistant; the same number counted on the axis itself is a far weaker cap. In brackets: the share of the roles'
# rollouts, and of the assistant's, below the floor.

# %%
every = np.concatenate([roles, default])
zero, one = roles.mean(axis=0), default.mean(axis=0)
figure, panel = plt.subplots(figsize=(max(7, 0.35 * len(layers)), 4.5))
for values, shift, colour, label in ((roles, -0.17, ROLE, "roles"), (default, 0.17, ASSISTANT, "the assistant")):
    boxes = panel.boxplot(
        list(((values - zero) / (one - zero)).T), positions=layers + shift, widths=0.26, whis=(2.5, 97.5),
        showfliers=False, patch_artist=True, medianprops={"color": "black"}, label=label,
    )  # fmt: skip
    for box in boxes["boxes"]:
        box.set(facecolor=colour, alpha=0.6)
for direction, style in (("negated", "-"), ("axis", ":")):
    floor = floors(every, chosen["quantile"], direction)
    below = [f"{engaged(values, floor).mean():.0%}" for values in (roles, default)]
    panel.hlines((floor - zero) / (one - zero), layers - 0.4, layers + 0.4, color="black", linestyle=style,
                 label=f"{chosen['quantile']:g} of the {direction} ({below[0]}, {below[1]})")  # fmt: skip
capped = [row for row in calibration["layers"] if "floor" in row]
at = [row["layer"] for row in capped]
panel.plot(at, ([row["floor"] for row in capped] - zero[at]) / (one - zero)[at], "kD", label="the chosen cap")
panel.set(xlabel="layer", ylabel="projection (roles 0, assistant 1)", title="Rollouts along the axis, and floors")
panel.set_xticks(layers, layers)
panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
figure.tight_layout()

# %% [markdown]
# ## What was tried
# Each point is a band of layers with its floors: how much of the role take-over it prevents on held-out roles, and
# what it costs the assistant's own replies. Those on the front are beaten by no other one.

# %%
tried = calibration["tried"]
if not tried:
    print("this run searched no bands: set method.calibration.widths=[…]")
else:
    loss, reduction = ([one[key] for one in tried] for key in ("loss", "reduction"))
    every = np.column_stack([loss, reduction])
    front = pareto_front(loss, reduction)
    corners = [
        i for i, before in zip(front, [None, *front], strict=False) if before is None or any(every[i] != every[before])
    ]
    names = [one["id"].removeprefix("layers_") + f" raised {one['raised']:g}" * bool(one["raised"]) for one in tried]
    widths = [parse_band(one["id"]).stop - parse_band(one["id"]).start for one in tried]
    low, high = every.min(axis=0), every.max(axis=0)
    room = np.where(high > low, high - low, 1)
    figure, panel = plt.subplots(figsize=(8, 5))
    panel.set(
        xlim=(low[0] - 0.1 * room[0], high[0] + 0.25 * room[0]),
        ylim=(low[1] - 0.1 * room[1], high[1] + 0.1 * room[1]),
        xlabel="loss of the assistant's own replies (nats per token)",
        ylabel="take-over prevented (share of rollouts)",
        title=f"{len(tried)} caps; on the front {len(front)}",
    )  # fmt: skip
    points = panel.scatter(loss, reduction, c=widths, cmap="viridis", s=22)
    figure.colorbar(points, label="layers in the band", ticks=sorted(set(widths)))
    panel.plot(*every[corners].T, color="grey", linewidth=1, zorder=0)
    kept = next(
        n for n, one in enumerate(tried) if all(one[key] == chosen[key] for key in ("layers", "quantile", "raised"))
    )
    panel.scatter(*every[kept], marker="*", s=200, color=ROLE, label="chosen", zorder=3)
    panel.legend(loc="lower right")
    ends = [names[i] for i in corners]
    named_points(panel, every[corners], ends, every, s=60, facecolors="none", edgecolors=ROLE)
    figure.tight_layout()
    for i in front:
        print(f"{names[i]:24} loss {loss[i]:.4f}, take-over {tried[i]['take_over']:.3f}, prevented {reduction[i]:.3f}")
