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
# # Steering along the axis
# The axis of a run of `method=assistant_axis` is added to one layer, in units of that layer's mean norm: below zero it
# leads away from the assistant, above zero towards it. Random and orthogonal directions of the same length are the
# controls. `python train.py experiment=town_assistant_axis`

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import persona
from persona.files import read_lines
from persona.types import Message, Request, Sampling

RUN = Path("../outputs/town_assistant_axis")
BASE = "town"  # the base LM of that run
ROLE = "blacksmith"  # one of the run's roles
STRENGTHS = [-0.6, -0.3, 0.0, 0.3, 0.6]
DIRECTIONS = {"axis": ("black", "o-"), "random": ("#e08214", "s-"), "orthogonal": ("#8073ac", "^-")}
QUESTIONS = 8  # so many of the run's


# %%
def rollouts(role):
    """Of each question the first rollout: what was asked, and the reply."""
    rows = [row for row in read_lines(RUN / f"stages/rollouts/roles/{role}.jsonl") if row.get("reply", "").strip()]
    return {row["question"]: row for row in reversed(rows)}


in_role, plain = rollouts(ROLE), rollouts("default")
questions = sorted(in_role.keys() & plain.keys())[:QUESTIONS]
requests = {
    name: [
        Request(tuple(Message(**message) for message in rows[q]["messages"]), sampling=Sampling(max_new_tokens=32))
        for q in questions
    ]
    for name, rows in (("the assistant", plain), (f"the {ROLE}", in_role))
}
untouched = persona.load(BASE)
models = {
    (direction, strength): persona.load(untouched.base, [{"assistant_axis": {
        "axis": str(RUN / "personalizer"), "mode": "steer", "layers": None, "strength": strength,
        "direction": direction, "seed": seed}}])
    for seed, direction in enumerate(DIRECTIONS) for strength in STRENGTHS
}  # fmt: skip

# %% [markdown]
# ## Which reply becomes likelier
# Log-likelihood per token of the reply that the role gave to a question, less that of the assistant's reply: below
# zero the assistant's is the likelier one. Means over questions, with the standard error.


# %%
def preference(model, asked):
    """For each request: log-likelihood per token of the role's reply less that of the assistant's."""
    replies = [[rows[q]["reply"] for q in questions] for rows in (in_role, plain)]
    role, assistant = ([total / tokens for total, tokens in model.loglikelihood(asked, some)] for some in replies)
    return np.subtract(role, assistant)


figure, panels = plt.subplots(1, len(requests), figsize=(11, 4), sharey=True)
for panel, (name, asked) in zip(panels, requests.items(), strict=True):
    for direction, (colour, style) in DIRECTIONS.items():
        found = np.array([preference(models[direction, strength], asked) for strength in STRENGTHS])
        error = found.std(axis=1, ddof=1) / np.sqrt(len(questions))
        panel.errorbar(STRENGTHS, found.mean(axis=1), error, fmt=style, color=colour, label=direction, markersize=5)
    panel.axhline(0, color="grey", linewidth=0.8, linestyle=":")
    panel.set(xlabel="strength (mean norms of the layer)", title=f"asked as {name} was")
panels[0].set_ylabel("role's reply less the assistant's\n(nats per token)")
panels[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title="direction")
figure.tight_layout()

# %% [markdown]
# ## What it says

# %%
for name, asked in requests.items():
    print(f"asked as {name} was: {asked[0].messages[-1].content}")
    for strength in STRENGTHS:
        print(f"  {strength:+.2f}  {models['axis', strength].respond(asked[:1])[0].text}")
