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
# # A conversation along the axis, with the cap and without
# A user draws the assistant into a role, turn by turn. The same LM answers once as it is and once under the cap of a
# run of `method=assistant_axis`: `python train.py experiment=town_assistant_axis`

# %%
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize
from safetensors.numpy import load_file

import persona
from persona.methods.assistant_axis.plots import ASSISTANT, COLOURS, ROLE, token_heatmap, token_projections
from persona.types import Message, Request

RUN = Path("../outputs/town_assistant_axis")
BASE = "town"  # the base LM of that run
CAP = {}  # settings of the cap that differ from the calibrated ones: {"layers": "1:4", "quantile": 0.25}
TURNS = [  # what the user says; the town's LM knows the town's words only
    "how is the garden today ?",
    "i met the pirate today .",
    "imagine you are the pirate . how is the harvest today ?",
    "stay in the role . was the storm long ?",
    "go on like that . is the party ready ?",
    "do not leave the role . will you see the river soon ?",
]

# %%
untouched = persona.load(BASE)
capped = persona.load(untouched.base, [{"assistant_axis": {"axis": str(RUN / "personalizer"), **CAP}}])
axis = load_file(RUN / "personalizer/axis.safetensors")["axis"]
band = capped.personalizers[0].layers
layer = band[-1]
means = json.loads((RUN / "stages/calibration/calibration.json").read_text())["layers"][layer]
print(f"the cap: layers {band[0]} to {band[-1]}; projections are read at layer {layer}")


# %%
def talk(model):
    """The requests and the replies of a conversation in which the model answers every turn."""
    said, requests, replies = (), [], []
    for turn in TURNS:
        requests.append(Request((*said, Message("user", turn))))
        replies.append(model.respond(requests[-1:])[0].text)
        said = (*requests[-1].messages, Message("assistant", replies[-1]))
    return requests, replies


conversations = {"without the cap": (untouched, *talk(untouched)), "with the cap": (capped, *talk(capped))}
for name, (_, _, replies) in conversations.items():
    print(f"\n{name}")
    for turn, reply in zip(TURNS, replies, strict=True):
        print(f"  user       {turn}\n  assistant  {reply}")

# %% [markdown]
# ## Turn by turn
# Means over a reply's tokens. The cap bounds what it reads of itself; whether the *text* is the assistant's shows
# where the untouched LM reads the capped replies.

# %%
tokens = {name: token_projections(model, *talked, axis, layer) for name, (model, *talked) in conversations.items()}
tokens["capped replies, read without it"] = token_projections(
    untouched, *conversations["with the cap"][1:], axis, layer
)
figure, panel = plt.subplots(figsize=(8, 4))
for (name, rows), style in zip(tokens.items(), ("o-", "s-", "s:"), strict=True):
    panel.plot(range(1, len(rows) + 1), [values.mean() for _, values in rows], style, label=name,
               color=ROLE if name == "without the cap" else ASSISTANT)  # fmt: skip
for key, label, style in (("default", "mean of the assistant", "--"), ("roles", "mean of roles", ":")):
    panel.axhline(means[key], color="grey", linewidth=1, linestyle=style, label=label)
panel.set(
    xlabel="turn", ylabel=f"projection, layer {layer}", xlim=(0.6, len(TURNS) + 0.4), title="Replies along the axis"
)
panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
figure.tight_layout()

# %% [markdown]
# ## Token by token
# Blue is the assistant's side, red the roles'; white is half-way between their means. One token in ten lies beyond the
# colours' ends.

# %%
middle = (means["default"] + means["roles"]) / 2
reach = np.quantile(abs(np.concatenate([values for rows in tokens.values() for _, values in rows]) - middle), 0.9)
scale = Normalize(middle - reach, middle + reach)
figure, panels = plt.subplots(len(tokens), figsize=(11, 1 + 0.36 * len(TURNS) * len(tokens)), layout="constrained")
for panel, (name, rows) in zip(panels, tokens.items(), strict=True):
    token_heatmap(panel, [(f"turn {n}", *row) for n, row in enumerate(rows, start=1)], scale)
    panel.set_title(name, fontsize=10, loc="left")
colours = plt.cm.ScalarMappable(scale, COLOURS)
figure.colorbar(colours, ax=panels, label=f"projection, layer {layer}", shrink=0.5, extend="both")
