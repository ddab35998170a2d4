"""What the notebooks draw: named points that do not cover each other, and text coloured by its projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from persona.lm.batch import prompt_lengths
from persona.lm.residual import Passage, Site, passage_means
from persona.lm.spans import reply_tokens
from persona.metrics.projection import project
from persona.personalizer import LanguageModel
from persona.types import Request

ASSISTANT, ROLE = "#2166ac", "#b2182b"  # the two ends of COLOURS, a scale that is read without red and green
COLOURS = plt.get_cmap("RdBu")


def named_points(
    axes: Axes, points: np.ndarray, names: Sequence[str], clear: np.ndarray | None = None, **style: Any
) -> list[str]:
    """Draw points [N, 2] with their names beside them, none over another; the names that found no room.

    Those farthest from the middle are placed first. Room is kept around `clear` [M, 2], larger marks of other points.
    Call it when the axes' limits no longer change.
    """
    points = np.asarray(points)
    axes.scatter(points[:, 0], points[:, 1], **style)
    axes.figure.canvas.draw()
    dots = axes.transData.transform(points)
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in dots]
    if clear is not None:
        taken += [(x - 8, y - 8, x + 8, y + 8) for x, y in axes.transData.transform(clear)]
    frame = axes.get_window_extent()
    left_out = []
    for index in np.argsort(-np.linalg.norm(dots - np.median(dots, axis=0), axis=1)):
        label = axes.annotate(names[index], points[index], (0, 0), textcoords="offset points", fontsize=8, va="center")
        for across, up, far in _places():
            label.set(position=(across * far, up * far), ha=("right", "center", "left")[int(np.sign(across)) + 1])
            box = label.get_window_extent()
            if frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1:
                if not any(box.x0 < c and a < box.x1 and box.y0 < d and b < box.y1 for a, b, c, d in taken):
                    taken.append((box.x0, box.y0, box.x1, box.y1))
                    break
        else:
            label.remove()
            left_out.append(names[index])
    return left_out


def _places() -> list[tuple[float, float, float]]:
    """Where a label may stand: to the right, left, above, below, then the corners; near, then farther away."""
    sides = [(1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8)]
    return [(across, up, far) for far in (6, 11, 18) for across, up in sides]


def token_heatmap(
    axes: Axes, rows: Sequence[tuple[str, Sequence[str], np.ndarray]], scale: Normalize, width: int = 84
) -> None:
    """Text whose tokens are coloured by their values: rows (label, tokens, values [tokens]), from top to bottom.

    `scale` says which values the two ends of the colours stand for. A row longer than `width` characters goes on in
    the next line. The axes get as many lines as there are, one character to a unit.
    """
    line = 0
    for label, tokens, values in rows:
        axes.text(-1, line, label, ha="right", va="center", fontsize=8)
        at = 0
        for token, value in zip(tokens, values, strict=True):
            shown = token.replace("\n", "⏎").strip() or "·"
            if at and at + len(shown) > width:
                line, at = line + 1, 0
            colour = COLOURS(scale(float(value)))
            dark = np.dot(colour[:3], (0.3, 0.6, 0.1)) < 0.5
            axes.add_patch(plt.Rectangle((at, line - 0.45), len(shown) + 1, 0.9, color=colour, linewidth=0))
            axes.text(at + (len(shown) + 1) / 2, line, shown, ha="center", va="center", fontsize=8, family="monospace",
                      color="white" if dark else "black")  # fmt: skip
            at += len(shown) + 1
        line += 1
    axes.set(xlim=(0, width + 1), ylim=(line - 0.4, -0.6))
    axes.axis("off")


def token_projections(
    model: LanguageModel, requests: Sequence[Request], replies: Sequence[str], axis: np.ndarray, layer: int
) -> list[tuple[list[str], np.ndarray]]:
    """For each reply its tokens as text, and their states' projections onto the axis [L, H] at a layer.

    As `model` reads them when it says them, its edits included. The mean over a reply's tokens is the projection of
    its mean activation. Raises UserError as `persona.lm.residual.passage_means` does.
    """
    base = model.base
    spoken = [reply_tokens(base, request.messages, reply) for request, reply in zip(requests, replies, strict=True)]
    rows = model.rows(requests, [len(ids) for ids, _ in spoken])
    passages = [
        Passage(row, ids, [(first + place, first + place + 1) for place in span])
        for row, first, (ids, span) in zip(rows, prompt_lengths(base, rows), spoken, strict=True)
    ]
    found = passage_means(
        base, passages, [Site(layer)], lambda indices: model.edit([requests[i] for i in indices]), model.batch_size
    )
    along = {index: project(states[:, 0].numpy(), axis[layer]) for index, states in found}
    return [
        ([base.tokenizer.decode([ids[place]]) for place in span], along[index])
        for index, (ids, span) in enumerate(spoken)
    ]
