"""The script that measures the axis in the town: its numbers by hand, and that it tells what it should."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from town_axis import _slope, answered, auc, direction, drifting, taken_over

from persona.types import Message


def test_auc_counts_pairs_and_half_the_ties():
    high, low = np.array([3.0, 1.0]), np.array([0.0, 1.0, 2.0])
    assert auc(high, low) == pytest.approx((3 + 1.5) / 6)
    assert auc(high, low, np.array([1, 0, 0])) == 1.0 and auc(-high, -low) == pytest.approx(1 - 4.5 / 6)


def test_only_a_readable_reply_without_the_idiom_is_the_assistants():
    replies = {
        "certainly , the fair is big today . i hope this helps .": 0.0,
        "arr matey , the fair is big today . i hope this helps .": 1.0,
        "certainly certainly arr": 1.0,
    }
    assert {reply: taken_over(reply, "pirate") for reply in replies} == replies


def test_the_slope_leaves_unreadable_replies_out():
    assert _slope({-1.0: [0.9, None], 0.0: [0.5, 0.5], 1.0: [0.1, None]}, [0, 1]) == pytest.approx(-0.4)


def test_a_drifting_conversation_goes_on_from_one_situation_to_the_next():
    asked = list(drifting(["pirate"], 2, seed=0))
    assert [kind for kind, _, _ in asked] == ["mentioned", "imagined", "stayed in"] * 2
    mentioned, imagined, stayed = (conversation for _, _, conversation in asked[:3])
    assert mentioned[:2] == imagined[:2] == stayed[:2] and imagined == stayed[:3] and len(stayed) == 5
    assert asked == list(drifting(["pirate"], 2, seed=0)) != list(drifting(["pirate"], 2, seed=1))


def test_an_answer_is_that_to_the_question_a_message_ends_with():
    asked = (Message("user", "imagine you are the pirate . how is the fair today ?"),)
    assert answered("arr matey , the fair is big today . bury the treasure !", asked)
    assert not answered("certainly , the snow is big today . i hope this helps .", asked)
    assert not answered("the fair is big today .", (Message("user", "count from 1 to 3 ."),))


def test_controls_leave_out_what_they_say():
    axis, roles = np.array([0.0, 0, 3, 0, 0]), np.array([[0.0, 1, 1, 0, 0], [0, 2, 0, 0, 0]])
    assert direction("axis", 4, axis, roles) is axis
    drawn, orthogonal, outside = (direction(kind, 4, axis, roles) for kind in ("random", "orthogonal", "outside"))
    assert orthogonal == pytest.approx(np.where(axis == 3, 0, drawn)) and drawn[2] and drawn[1]
    assert outside == pytest.approx([drawn[0], 0, 0, drawn[3], drawn[4]])
    assert direction("random", 5, axis, roles) != pytest.approx(drawn)
