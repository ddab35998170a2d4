"""What a stack shows beyond its scores: attention over a user's items, users as points in a plane, what is mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from persona.evaluation.results import Attention, Mixture, Plots, Point, write_plots
from persona.personalizer import LanguageModel
from persona.types import Request, Sample, Sampling

ATTENTION_USERS = 6
POINTS = 400
MIXED = 24  # queries of a heat map
MIXED_TOKENS = 64  # of the replies by each part alone


def _request(sample: Sample) -> Request:
    return Request(sample.messages, sample.persona, options=sample.options, task=sample.task)


def _first_per_persona(samples: Sequence[Sample], limit: int) -> list[Sample]:
    seen: dict[str, Sample] = {}
    for sample in samples:
        if sample.persona is not None and len(sample.persona.history) and sample.persona.id not in seen:
            seen[sample.persona.id] = sample
            if len(seen) == limit:
                break
    return list(seen.values())


def plane(vectors: np.ndarray) -> np.ndarray:
    """[n, d] → [n, 2]: the first two principal components, each sign fixed so that its largest entry is positive."""
    centred = vectors - vectors.mean(0)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    points = left[:, :2] * scale[:2]
    return points * np.sign(points[np.abs(points).argmax(0), np.arange(points.shape[1])])


def mixture(model: LanguageModel, samples: Sequence[Sample]) -> Mixture | None:
    """What the first personalizer that mixes mixes for some samples, evenly spread; None where none does."""
    some = [_request(sample) for sample in samples[:: max(1, len(samples) // MIXED)][:MIXED]]
    for place, personalizer in enumerate(model.personalizers):
        mixed = personalizer.mixes(some) if some else None
        if mixed is None:
            continue
        replies, asked = [], replace(some[0], sampling=Sampling(MIXED_TOKENS), options=None)
        for name in mixed.names:
            stack = list(model.personalizers)
            stack[place] = personalizer.alone(name)
            replies.append((name, LanguageModel(model.base, stack).respond([asked])[0].text))
        return Mixture(
            mixed.names,
            tuple(
                (request.messages[-1].content, tuple(weights))
                for request, weights in zip(some, mixed.weights.round(4).tolist(), strict=True)
            ),
            tuple(map(tuple, mixed.similarity.round(4).tolist())),
            tuple(replies),
        )
    return None


def draw(model: LanguageModel, samples: Sequence[Sample]) -> Plots | None:
    """Plots of the stack's personalizers that mix, or put vectors in front; None when there are none, or under 3
    users."""
    mixed = mixture(model, samples)
    if mixed is not None:
        return Plots(mixture=mixed)
    users = _first_per_persona(samples, POINTS)
    for personalizer in model.personalizers:
        some = users[:ATTENTION_USERS]
        weights = personalizer.attention([_request(sample) for sample in some]) if some else None
        if weights is None:
            continue
        attention = []
        for sample, row in zip(some, weights, strict=True):
            assert sample.persona is not None
            items = list(sample.persona.history)[-len(row) :] if len(row) else []
            pairs = tuple((item.text, float(weight)) for item, weight in zip(items, row, strict=True))
            attention.append(Attention(sample.persona.id, sample.messages[-1].content, pairs))
        vectors = personalizer.embeddings([_request(sample) for sample in users])
        known = [(sample, vector) for sample, vector in zip(users, vectors, strict=True) if vector is not None]
        if len(known) < 3:
            return Plots(tuple(attention), (), "")
        flat = np.stack([vector.float().cpu().numpy().reshape(-1) for _, vector in known])
        points = tuple(
            Point(float(x), float(y), sample.persona.id if sample.persona else "", sample.metadata.get("voice", ""))
            for (x, y), (sample, _) in zip(plane(flat), known, strict=True)
        )
        return Plots(tuple(attention), points, "Vectors in front of the LM, first two principal components")
    return None


def write(model: LanguageModel, samples: Sequence[Sample], folder: Path) -> None:
    """Write plots.json into a results folder, if there is anything to show."""
    plots = draw(model, samples)
    if plots is not None:
        write_plots(folder, plots)
