"""Agreement against textbook tables and against hand calculation."""

from __future__ import annotations

import math
import warnings

import pytest

from persona.metrics.agreement import cohen_kappa, krippendorff_alpha

NONE = math.nan
# Krippendorff, "Computing Krippendorff's Alpha-Reliability": four observers, twelve units, seven values missing.
FOUR_OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
    [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
]


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_of_the_textbook(level, alpha):
    assert krippendorff_alpha(FOUR_OBSERVERS, level) == pytest.approx(alpha, abs=5e-4)


def test_alpha_by_hand():
    # Two observers, ten units: 4 disagree. 14 zeros and 6 ones: Do = 8 / 20, De = 2 * 14 * 6 / (20 * 19).
    one, other = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert krippendorff_alpha([one, other], "nominal") == pytest.approx(1 - (8 / 20) / (168 / 380))
    # Perfect disagreement on two units: Do = 1, De = 2 * 2 * 2 / (4 * 3) = 2 / 3.
    assert krippendorff_alpha([[0, 1], [1, 0]], "nominal") == pytest.approx(1 - 1 / (2 / 3))
    # Interval, values 1 2 and 2 4: Do = mean (1 + 4) / 2; De over the 6 pairs of 1 2 2 4: (1 + 1 + 9 + 0 + 4 + 4) / 6.
    assert krippendorff_alpha([[1, 2], [2, 4]], "interval") == pytest.approx(1 - 2.5 / (19 / 6))


def test_items_with_one_rating_do_not_count():
    alone = [[*row, extra] for row, extra in zip(FOUR_OBSERVERS, (5, NONE, NONE, NONE), strict=True)]
    for level in ("nominal", "ordinal", "interval"):
        assert krippendorff_alpha(alone, level) == krippendorff_alpha(FOUR_OBSERVERS, level)


@pytest.mark.parametrize(
    "ratings",
    [
        [[1, 2, 3]],  # one judge
        [[1, NONE], [NONE, 2]],  # nothing judged twice
        [[3, 3], [3, 3]],  # nothing varies
        [[3, 3, 1], [3, 3, NONE]],  # nothing that counts varies
        [[NONE, NONE], [NONE, NONE]],
        [[], []],
    ],
)
def test_alpha_is_nan_where_it_is_not_defined(ratings):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for level in ("nominal", "ordinal", "interval"):
            assert math.isnan(krippendorff_alpha(ratings, level))


def test_alpha_wants_judges_by_items():
    with pytest.raises(ValueError, match=r"\[judges, items\], and have the shape \[3\]"):
        krippendorff_alpha([1, 2, 3], "nominal")


def test_kappa_of_the_textbook():
    # 50 grants, two readers: yes/yes 20, yes/no 5, no/yes 10, no/no 15. Observed .7, expected .5 * .6 + .5 * .4 = .5.
    one = ["yes"] * 25 + ["no"] * 25
    other = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(one, other) == pytest.approx(0.4)


def test_weighted_kappa_by_hand():
    # Distances 0, 1, 0: observed 1 / 3. Over all 9 pairs of 1 1 2 with 1 2 2, it is 1 in 5, squared or not.
    for weights in ("linear", "quadratic"):
        assert cohen_kappa([1, 1, 2], [1, 2, 2], weights=weights, labels=range(1, 6)) == pytest.approx(1 - 3 / 5)
    # 1 3 5 and 3 3 5: observed 2 / 3 or 4 / 3; expected over 9 pairs: (2 + 2 + 4 + 0 + 0 + 2 + 2 + 2 + 0) / 9 = 14 / 9
    # or, squared, (4 + 4 + 16 + 0 + 0 + 4 + 4 + 4 + 0) / 9 = 4.
    assert cohen_kappa([1, 3, 5], [3, 3, 5], weights="linear", labels=range(1, 6)) == pytest.approx(1 - 6 / 14)
    assert cohen_kappa([1, 3, 5], [3, 3, 5], weights="quadratic", labels=range(1, 6)) == pytest.approx(1 - 1 / 3)
    # Distances are places on the scale that is given, not among the verdicts that occur. Observed 1 / 3; over all 9
    # pairs of 1 2 4 with 2 2 4: (1 + 1 + 4 + 0 + 0 + 1 + 1 + 1 + 0) / 9, or with a 3 between 2 and 4
    # (1 + 1 + 9 + 0 + 0 + 4 + 4 + 4 + 0) / 9.
    squeezed = cohen_kappa([1, 2, 4], [2, 2, 4], weights="quadratic", labels=(1, 2, 4))
    spread = cohen_kappa([1, 2, 4], [2, 2, 4], weights="quadratic", labels=(1, 2, 3, 4))
    assert squeezed == pytest.approx(1 - 3 / 9) and spread == pytest.approx(1 - 3 / 23)


def test_kappa_where_nothing_varies():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(cohen_kappa([3, 3], [3, 3]))
        assert math.isnan(cohen_kappa([], []))
        assert cohen_kappa([1, 1], [2, 2]) == 0.0
        assert cohen_kappa([1, 1], [1, 2]) == 0.0


def test_kappa_complains():
    with pytest.raises(ValueError, match="2 and 1 were given"):
        cohen_kappa([1, 2], [1])
    with pytest.raises(ValueError, match=r"verdicts \[7\] are not among the labels"):
        cohen_kappa([1, 7], [1, 1], labels=(1, 2))
    with pytest.raises(ValueError, match="weighted kappa needs labels"):
        cohen_kappa([1, 2], [1, 2], weights="linear")
