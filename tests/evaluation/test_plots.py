"""Attention and user embeddings as plots.json: which users, which items, and where the points lie."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

import persona
from persona.evaluation import plots
from persona.evaluation.results import read_plots
from persona.personalizer import Personalizer
from persona.types import HistoryItem, Message, Persona, Request, Sample


class Fixed(Personalizer):
    """User i's vector is (i, i²) in the first two places; attention over the last two items, the newer one twice."""

    method = "fixed"

    def __init__(self, hidden: int, without: str = "") -> None:
        self.hidden, self.without = hidden, without

    def embeddings(self, requests: Sequence[Request]):
        numbers = [None if r.persona.id == self.without else int(r.persona.id[1:]) for r in requests]
        return [None if i is None else torch.tensor([[i, i * i] + [0.0] * (self.hidden - 2)]) for i in numbers]

    def attention(self, requests: Sequence[Request]):
        return [np.array([1, 2][-len(r.persona.history) :]) / 3 for r in requests]


def samples(users: int, per_user: int = 2) -> list[Sample]:
    return [
        Sample(f"{u}-{k}", (Message("user", f"question {k}"),), "", Persona(f"u{u}", history=history(u)),
               metadata={"voice": f"v{u % 2}"})
        for u in range(users) for k in range(per_user)
    ]  # fmt: skip


def history(user: int) -> tuple[HistoryItem, ...]:
    return tuple(HistoryItem(str(i), f"item {i} of {user}") for i in range(user))


def test_one_request_per_user_with_a_history(llama):
    drawn = plots.draw(persona.load(llama, [Fixed(llama.hidden_size)]), samples(9))
    assert [shown.user for shown in drawn.attention] == [f"u{i}" for i in range(1, 7)]  # u0 has no items
    assert drawn.attention[0].items == (("item 0 of 1", pytest.approx(2 / 3)),)
    assert drawn.attention[3].items == (("item 2 of 4", pytest.approx(1 / 3)), ("item 3 of 4", pytest.approx(2 / 3)))
    assert drawn.attention[3].query == "question 0"
    assert [(point.label, point.group) for point in drawn.points] == [(f"u{i}", f"v{i % 2}") for i in range(1, 9)]


def test_the_plane_keeps_distances_of_planar_points_and_its_signs_are_fixed():
    vectors = np.array([[0.0, 0, 5], [3, 0, 5], [0, 4, 5], [9, 1, 5]])
    points = plots.plane(vectors)
    gaps = np.linalg.norm(points[:, None] - points[None], axis=-1)
    assert np.allclose(gaps, np.linalg.norm(vectors[:, None] - vectors[None], axis=-1))
    assert np.allclose(points, plots.plane(vectors[:, [2, 1, 0]])), "axes in another order, the same picture"
    assert (points[np.abs(points).argmax(0), [0, 1]] > 0).all()


def test_a_user_without_a_vector_has_no_point(llama):
    drawn = plots.draw(persona.load(llama, [Fixed(llama.hidden_size, without="u3")]), samples(7))
    assert [point.label for point in drawn.points] == ["u1", "u2", "u4", "u5", "u6"]


def test_nothing_to_show_writes_nothing(llama, tmp_path):
    plots.write(persona.load(llama, [{"retrieval": {"ranker": "recency", "k": 1}}]), samples(5), tmp_path)
    plots.write(persona.load(llama), samples(5), tmp_path)
    plots.write(persona.load(llama, [Fixed(llama.hidden_size)]), samples(1), tmp_path)  # u0 has no items
    assert not list(tmp_path.iterdir())
    plots.write(persona.load(llama, [Fixed(llama.hidden_size)]), samples(3), tmp_path)  # two points: attention alone
    shown = read_plots(tmp_path)
    assert len(shown.attention) == 2 and shown.points == ()
