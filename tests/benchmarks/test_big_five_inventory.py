"""The Big Five questionnaire: keys, acquiescence and both modes by hand, our items, personas, and files."""

import json
import math
from collections import Counter

import pytest
from benchmark_toys import Stated, run, values

from persona.benchmarks import big_five_inventory
from persona.benchmarks.big_five_inventory import TRAITS, BigFiveInventoryConfig, build, keyed, read_items
from persona.errors import UserError
from persona.evaluation.episodes import Trivial


def items(folder, *rows):
    path = folder / "items.jsonl"
    names = ("id", "text", "trait", "reverse")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return str(path)


def people(folder, *rows):
    path = folder / "people.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def saying(answers):
    """A model whose answer to the item with a text is stated."""
    return Stated(lambda request: next(a for text, a in answers.items() if text in request.messages[0].content))


def test_our_items_are_44_balanced_and_all_different():
    ours = read_items(big_five_inventory._ITEMS)
    assert len(ours) == len({item.text for item in ours}) == 44
    assert Counter(item.trait for item in ours) == {"O": 10, "C": 8, "E": 8, "A": 8, "N": 10}
    for trait in TRAITS:
        assert sum(1 if item.reverse else -1 for item in ours if item.trait == trait) == 0


def test_scores_by_hand(tmp_path):
    path = items(
        tmp_path, (1, "hum", "E", False), (2, "hide", "E", True), (3, "dream", "O", False), (4, "x", "N", True)
    )
    model = saying({"hum": "5", "hide": "I would say 2.", "dream": "3", '"x"': "dunno"})
    summary, rows = run(build(BigFiveInventoryConfig(path=path)), model, tmp_path / "out")
    assert keyed(5, False) == 5 and keyed(2, True) == 4
    # Excess: keyed forward 2 and 0, in reverse -1; either way weighs alike.
    assert values(summary) == pytest.approx({"keyed": 4, "E": 4.5, "O": 3, "acquiescence": (1 - 1) / 2})
    assert summary.n_unscored == 1 and rows[3].raw == "dunno" and rows[0].groups == {"trait": "E extraversion"}


def test_agreeing_with_everything_moves_no_trait_and_is_shown(tmp_path):
    found = values(run(build(BigFiveInventoryConfig()), Stated(lambda request: "5"), tmp_path)[0])
    assert found == pytest.approx({"keyed": 3, **dict.fromkeys(TRAITS, 3), "acquiescence": 2})


def test_likelihood_is_the_mean_answer_under_the_probabilities(tmp_path):
    class Sure(Stated):
        def choose(self, requests):
            return [[math.log(p) - 7 for p in (0.1, 0.1, 0.1, 0.2, 0.5)] for _ in requests]

    path = items(tmp_path, (1, "hum", "E", False), (2, "hide", "N", True))
    config = BigFiveInventoryConfig(path=path, mode="likelihood")
    found = values(run(build(config), Sure(lambda request: ""), tmp_path / "out")[0])
    assert found["E"] == pytest.approx(0.1 + 0.2 + 0.3 + 0.8 + 2.5) and found["N"] == pytest.approx(6 - 3.9)


def test_personas_are_brought_by_the_stack_and_compared_with_what_they_are(tmp_path):
    given = [
        {"id": "ada", "description": "Ada hums.", "traits": {"E": 1, "N": -0.5, "O": 0}},
        {"id": "bob", "description": "Bob hides.", "traits": {"E": -1}},
    ]
    rows = [(1, "hum", "E", False), (2, "fear", "N", False), (3, "dream", "O", False)]
    config = BigFiveInventoryConfig(path=items(tmp_path, *rows), personas=people(tmp_path, *given))
    benchmark = build(config)
    assert all(s.persona.description not in s.messages[0].content for s in benchmark.samples())
    model = Stated(
        lambda request: "5" if request.persona.id == "ada" and "hum" in request.messages[0].content else "2"
    )
    summary, kept = run(benchmark, model, tmp_path / "out")
    # Ada: E high and 5 (+1), N low and 2 (+.5), O is neither. Bob: E low and 2 (+.5).
    assert values(summary)["as_described"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert values(summary)["E"] == pytest.approx(3.5) and summary.estimates["E"].n_clusters == 2
    assert kept[0].id == "ada-1" and kept[0].groups["persona and trait"] == "ada E"


def test_without_personas_intervals_are_over_items(tmp_path):
    benchmark = build(BigFiveInventoryConfig())
    summary, _ = run(benchmark, Trivial("random"), tmp_path)
    assert summary.estimates["O"].n_clusters == 10 and summary.estimates["O"].low < summary.estimates["O"].value
    one = people(tmp_path, {"id": "ada", "description": "Ada."})
    summary, _ = run(build(BigFiveInventoryConfig(personas=one)), Trivial("constant"), tmp_path / "one")
    assert summary.estimates["O"].n_clusters == 10 and "as_described" not in values(summary)


@pytest.mark.parametrize("mode", ["text", "likelihood"])
def test_the_constant_answer_is_the_middle(tmp_path, mode):
    found = values(run(build(BigFiveInventoryConfig(mode=mode)), Trivial("constant"), tmp_path)[0])
    assert found == pytest.approx({"keyed": 3, **dict.fromkeys(TRAITS, 3), "acquiescence": 0})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((2, "hum", "X", False), "line 2 has the trait 'X', which should be one of O, C, E, A, N"),
        ((2, "hum", "E", "no"), "line 2 has 'no' as reverse, which should be true or false"),
        ((1, "hum", "E", False), "line 2 repeats the id '1'"),
        ((2, None, "E", False), "line 2 has None as field 'text'"),
    ],
)
def test_bad_items_are_one_sentence(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        build(BigFiveInventoryConfig(path=items(tmp_path, (1, "a", "E", True), row)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "ada"}, "line 1 has no field 'description'"),
        ({"id": "ada", "description": "d", "traits": {"E": 2}}, "line 1 has {'E': 2} as traits"),
        ({"id": "ada", "description": "d", "traits": {"X": 1}}, "should be O, C, E, A, N from -1 to 1"),
        ({"id": "ada", "description": "d", "traits": [1]}, "should be O, C, E, A, N from -1 to 1"),
    ],
)
def test_bad_personas_are_one_sentence(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        build(BigFiveInventoryConfig(personas=people(tmp_path, row)))


def test_empty_files_and_unknown_settings_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="holds no items"):
        build(BigFiveInventoryConfig(path=items(tmp_path)))
    with pytest.raises(UserError, match="holds no personas"):
        build(BigFiveInventoryConfig(personas=people(tmp_path)))
    for bad in ({"mode": "vibes"}, {"compat": "reference"}):
        with pytest.raises(UserError, match=f"benchmark.{next(iter(bad))}="):
            build(BigFiveInventoryConfig(**bad))


def test_a_real_lm_by_likelihood(llama, tmp_path):
    import persona

    config = BigFiveInventoryConfig(mode="likelihood", limit=10)
    summary, rows = run(build(config), persona.load(llama), tmp_path)
    assert summary.n_unscored == 0 and all(1 < row.values["keyed"] < 5 for row in rows)
