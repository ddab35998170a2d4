"""What the notebooks draw: names that do not cover each other, and text in the colours of its values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from persona.lm import BaseLM
from persona.lm.edits import Edit, edited
from persona.lm.residual import Site
from persona.methods.assistant_axis.plots import COLOURS, named_points, token_heatmap, token_projections
from persona.metrics.projection import project
from persona.personalizer import LanguageModel, Personalizer
from persona.types import Message, Request


@pytest.fixture
def axes() -> Iterator[Axes]:
    figure, axes = plt.subplots(figsize=(5, 4))
    yield axes
    plt.close(figure)


def test_names_cover_neither_each_other_nor_points(axes: Axes) -> None:
    rng = np.random.default_rng(0)
    points, star = rng.normal(size=(60, 2)), np.array([[0.0, 0.0]])
    names = [f"role number {n}" for n in range(60)]
    axes.set(xlim=(-3, 3), ylim=(-3, 3))
    left_out = named_points(axes, points, names, star)
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    assert len(boxes) > 20 and set(boxes) | set(left_out) == set(names) and not set(boxes) & set(left_out)
    assert not any(one.overlaps(other) for one, other in combinations(boxes.values(), 2))
    dots = axes.transData.transform(np.vstack([points, star]))
    assert not any(box.contains(*dot) for box in boxes.values() for dot in dots)
    frame = axes.get_window_extent()
    assert all(frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1) for box in boxes.values())


def test_few_names_all_find_room(axes: Axes) -> None:
    axes.set(xlim=(0, 1), ylim=(0, 1))
    assert (
        named_points(axes, np.array([[0.5, 0.5], [0.5, 0.51], [0.98, 0.5]]), ["ghost", "judge", "a long name"]) == []
    )


def test_heatmap_colours_tokens_and_goes_on_in_the_next_line(axes: Axes) -> None:
    rows = [("one", ["aye", " aye", "\n"], np.array([0.0, 1.0, 0.5])), ("two", ["a" * 8, "b" * 8], np.zeros(2))]
    token_heatmap(axes, rows, Normalize(0, 1), width=12)
    shown = {text.get_text(): (text.get_position(), text.get_color()) for text in axes.texts}
    assert shown["one"][0][1] == 0 and shown["two"][0][1] == 1
    assert shown["⏎"][0][1] == 0 and shown["b" * 8][0] == (4.5, 2)  # too long for the line of the other one
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert [patch.get_facecolor() for patch in patches[:3]] == [COLOURS(0.0), COLOURS(1.0), COLOURS(0.5)]
    # Words on the dark ends are white, in the pale middle black.
    assert [shown["aye"][1], shown["⏎"][1]] == ["white", "black"]


class Held(Personalizer):
    """A floor so high that every state is moved up to it."""

    method = "held"

    def __init__(self, base: BaseLM, direction: torch.Tensor) -> None:
        self.base, self.cap = base, Edit(Site(1), "cap", direction, floor=50.0)

    def modules(self, requests):
        return edited(self.base.model, [self.cap])


def test_projections_of_tokens_average_to_the_reply(llama: BaseLM) -> None:
    axis = np.random.default_rng(0).normal(size=(2, llama.hidden_size)).astype(np.float32)
    requests = [Request((Message("user", text),)) for text in ("how was your day ?", "what do you think of boats ?")]
    replies = ["i like small boats", "good morning , the red house by the river"]
    model = LanguageModel(llama)
    found = token_projections(model, requests, replies, axis, 1)
    for (texts, values), reply, mean in zip(found, replies, model.reply_means(requests, replies, (1,)), strict=True):
        assert "".join(texts).strip() == reply and len(texts) == len(values) > 3 and np.ptp(values) > 0
        assert values.mean() == pytest.approx(project(mean[0], axis[1]), abs=1e-4)
    capped = LanguageModel(llama, [Held(llama, torch.from_numpy(axis[1]))])
    for _, values in token_projections(capped, requests, replies, axis, 1):
        assert values == pytest.approx(np.full(len(values), 50.0), abs=1e-3)
