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
# # Which experts a situation calls for
# Reads the personalizer of a PersonaFuse run: `python train.py experiment=town_persona_fuse`. The same three things
# stand in the report of an evaluation.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import persona
from persona.data.situations import expert_vector_of
from persona.data.town import TownSituationsConfig, load_situations
from persona.evaluation.plots import mixture

RUN = Path("../outputs/town_persona_fuse")
BASE = "town"

# %%
model = persona.load(BASE, [RUN / "personalizer"])
samples = load_situations(TownSituationsConfig()).dev  # or the dev split of data=situations
called = np.array([expert_vector_of(sample) for sample in samples])
order = np.lexsort(-called.T[::-1])  # by what is called for, so that blocks show
samples = [samples[i] for i in order]
mixed = mixture(model, samples)


# %%
def heat(values, rows, columns, title, low=0.0, size=(8, 7)):
    figure, panel = plt.subplots(figsize=size)
    shown = panel.imshow(values, vmin=low, vmax=1, aspect="auto", cmap="viridis" if low == 0 else "RdBu_r")
    panel.set_xticks(range(len(columns)), columns)
    panel.set_yticks(range(len(rows)), rows, fontsize=7)
    panel.set_title(title)
    panel.set_xlabel("expert")
    panel.set_ylabel("query" if low == 0 else "expert")
    figure.colorbar(shown)
    figure.tight_layout()


# %% [markdown]
# ## Gates over situations
# A row is a query, and sums to 1. Neutral queries should lie on `null`.

# %%
queries, gates = zip(*mixed.queries, strict=True)
heat(np.array(gates), [query[:60] for query in queries], mixed.names, "gate of each expert")

# %% [markdown]
# ## How alike the experts are
# The cosine between the changes of weights that two experts make. Both poles of a trait may well be alike: what
# is common to all replies, each expert learns for itself.

# %%
heat(np.array(mixed.similarity), mixed.names, mixed.names, "cosine of the changes of weights", low=-1.0, size=(6, 5))

# %% [markdown]
# ## What each expert changes
# The reply to one query by each expert alone, whatever the router would choose; `null` is the base LM.

# %%
print(queries[0])
for name, reply in mixed.replies:
    print(f"{name:>5}  {reply}")
