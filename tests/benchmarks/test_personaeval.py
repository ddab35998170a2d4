"""PersonaEval: every metric by hand, the published defects, replies, files, whole runs, and the judge gate."""

import csv
import json
import math

import numpy as np
import pytest
from benchmark_toys import Stated, run, values

from persona.benchmarks import personaeval
from persona.benchmarks.personaeval import (
    LIKELIHOOD,
    METRICS,
    PersonaEvalConfig,
    build,
    parse_reply,
    read_track,
    row_values,
    score,
)
from persona.errors import UserError
from persona.evaluation.episodes import Trivial
from persona.evaluation.judges import gate as judge_gate
from persona.evaluation.judges.parsing import Unreadable
from persona.evaluation.statistics import Metric, estimate

ABCD = ("A", "B", "C", "D")


def row(*probabilities, true="A"):
    return dict(zip("ABCDE", probabilities, strict=False)), true


# ---- metrics -------------------------------------------------------------------------------------------------------


def test_every_metric_by_hand():
    rows = [row(0.7, 0.1, 0.15, 0.05), row(0.5, 0.3, 0.2, 0, true="B"), row(0.05, 0.1, 0.25, 0.6, true="A")]
    # squared errors: .09 + .01 + .0225 + .0025; .25 + .49 + .04 + 0; .9025 + .01 + .0625 + .36
    brier = [0.125, 0.78, 1.335]
    # three confidences, three bins: .7 right, .5 wrong, .6 wrong
    assert score(rows) == pytest.approx(
        {
            "n": 3, "error_rate": 0, "accuracy": 1 / 3, "top1": 1 / 3, "top2": 2 / 3, "mean_rank": (1 + 2 + 4) / 3,
            "brier": sum(brier) / 3, "brier_per_option": sum(brier) / 12, "ece": (0.3 + 0.5 + 0.6) / 3,
            "renormalised": 0,
        }
    )  # fmt: skip


def test_brier_per_option_is_over_all_entries_not_a_mean_of_means():
    four, five = row(1, 0, 0, 0, true="B"), row(0.2, 0.2, 0.2, 0.2, 0.2)
    found = score([four, five])
    assert found["brier"] == pytest.approx((2 + 0.8) / 2)
    assert found["brier_per_option"] == pytest.approx((2 + 0.8) / 9)


def test_ece_shares_a_bin_and_its_upper_edge_belongs_to_it():
    """.62 and .64 are in (.6, .65]: their mean .63 is held against their share right, one half. .65 is in it too."""
    rows = [row(0.62, 0.38, 0, 0), row(0.64, 0.36, 0, 0, true="B")]
    assert score(rows)["ece"] == pytest.approx(0.63 - 0.5)
    rows += [row(0.65, 0.35, 0, 0)]
    assert score(rows)["ece"] == pytest.approx(2 / 3 - (0.62 + 0.64 + 0.65) / 3)


def test_ece_agrees_with_bins_filled_one_by_one_and_its_interval_is_found():
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.random(500), np.arange(1, 21) / 20])
    correct = (rng.random(len(confidence)) < confidence**2).astype(float)
    edges, expected = np.linspace(0, 1, 21), 0.0
    for low, high in zip(edges, edges[1:], strict=False):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    rows = [{"confidence": c, "correct": r} for c, r in zip(confidence, correct, strict=True)]
    metric = Metric(aggregate="ece", columns=("confidence", "correct"))
    found = estimate(rows, [str(i) for i in range(len(rows))], "ece", metric, resamples=500)
    assert found.value == pytest.approx(expected, abs=1e-12)
    assert 0 < found.low < found.high < 0.5


def test_ties_are_split_evenly_where_the_published_metrics_contradict_themselves():
    """Defect 2: the same row is right at first place and yet not among the first two, at rank 4."""
    uniform = [row(0.25, 0.25, 0.25, 0.25)]
    official = score(uniform, compat="reference")
    assert (official["top1"], official["top2"], official["mean_rank"]) == (1, 0, 4)
    found = score(uniform)
    assert (found["top1"], found["top2"], found["mean_rank"]) == (0.25, 0.5, 2.5)
    # Who is true makes no difference to us, and all of it there.
    assert score([row(0.25, 0.25, 0.25, 0.25, true="D")])["top1"] == 0.25
    assert score([row(0.25, 0.25, 0.25, 0.25, true="D")], compat="reference")["mean_rank"] == 1


@pytest.mark.parametrize(
    ("probabilities", "true", "top1", "top2", "rank"),
    [
        ((0.4, 0.4, 0.2, 0), "A", 1 / 2, 1, 1.5),
        ((0.4, 0.4, 0.2, 0), "C", 0, 0, 3),
        ((0.6, 0.2, 0.2, 0), "B", 0, 1 / 2, 2.5),
        ((0.6, 0.2, 0.1, 0.1), "D", 0, 0, 3.5),
        ((1 / 3, 1 / 3, 1 / 3, 0), "B", 1 / 3, 2 / 3, 2),
        ((1, 0, 0, 0), "D", 0, 1 / 3, 3),
    ],
)
def test_a_tied_row_is_worth_what_random_orders_give_it(probabilities, true, top1, top2, rank):
    found = row_values(*row(*probabilities, true=true))
    assert (found["top1"], found["top2"], found["rank"]) == pytest.approx((top1, top2, rank))
    rng, places = np.random.default_rng(1), []
    for _ in range(4000):  # the definition, by drawing
        order = sorted(range(4), key=lambda i: (-probabilities[i], rng.random()))
        places.append(order.index(ABCD.index(true)) + 1)
    assert np.mean(places) == pytest.approx(rank, abs=0.07)
    assert np.mean(np.array(places) <= 2) == pytest.approx(top2, abs=0.04)


def test_the_fifth_candidate_counts():
    """Defect 1: with four stored probabilities, a true fifth one can never be right."""
    rows = [row(0.1, 0.1, 0.1, 0, 0.7, true="E")]
    found, official = score(rows), score(rows, compat="reference")
    assert (found["top1"], found["mean_rank"]) == (1, 1)
    assert found["brier"] == pytest.approx(0.03 + 0.09) and found["ece"] == pytest.approx(0.3)
    assert official["top1"] == 0 and math.isnan(official["mean_rank"]) and official["accuracy"] == 1
    assert official["brier"] == pytest.approx(0.03 / 4) and official["ece"] == pytest.approx(0.1)


def test_all_mass_on_the_fifth_leaves_the_published_confidence_in_no_bin():
    rows = [row(0, 0, 0, 0, 1, true="E"), row(0.8, 0.2, 0, 0, 0)]
    assert score(rows, compat="reference")["ece"] == pytest.approx(0.2 / 2)
    assert score(rows)["ece"] == pytest.approx(0.2 / 2)


def test_published_brier_and_f1():
    rows = [row(1, 0, 0, 0, true="B"), row(0.7, 0.1, 0.1, 0.1)]
    official = score(rows, compat="reference")
    assert official["brier"] == pytest.approx((2 + 0.12) / 8) and score(rows)["brier"] == pytest.approx((2 + 0.12) / 2)
    assert official["f1"] == pytest.approx(2 * 0.5 / 1.5) and "f1" not in score(rows)


def test_sums_near_one_are_renormalised_and_counted():
    """Defect 3: .33, .33, .33 is refused by the published rule."""
    rows = [row(0.33, 0.33, 0.33, 0), row(1, 0, 0, 0)]
    found, official = score(rows), score(rows, compat="reference")
    assert found["renormalised"] == 0.5 and found["error_rate"] == 0
    assert found["top1"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["brier"] == pytest.approx(((2 / 3) ** 2 + 2 / 9) / 2)
    assert official["error_rate"] == 0.5 and official["top1"] == 1 and official["accuracy"] == 0.5


def test_rows_in_error_are_reported_and_only_accuracy_counts_them():
    """Defect 6: the published metrics leave them out without a word."""
    rows = [row(1, 0, 0, 0), (None, "A"), row(0.5, 0.2, 0.1, 0.1), row(1.2, -0.2, 0, 0), row(0, 1, 0, 0)]
    found = score(rows)
    assert (found["n"], found["error_rate"], found["accuracy"], found["top1"]) == (5, 0.6, 0.2, 0.5)
    nothing = score([(None, "A")])
    assert nothing["accuracy"] == 0 and math.isnan(nothing["top1"])


def test_a_sum_off_by_five_hundredths_is_an_error():
    assert score([row(0.5, 0.451, 0, 0)])["error_rate"] == 0
    assert score([row(0.5, 0.45, 0, 0)])["error_rate"] == score([row(0.55, 0.5, 0, 0)])["error_rate"] == 1


def test_rows_that_make_no_sense_are_one_sentence():
    with pytest.raises(UserError, match="row 2: the true option 'Z' is none of A, B, C, D"):
        score([row(1, 0, 0, 0), row(1, 0, 0, 0, true="Z")])
    with pytest.raises(UserError, match="no rows"):
        score([])
    with pytest.raises(UserError, match="compat 'official' is not known"):
        score([row(1, 0, 0, 0)], compat="official")


# ---- replies -------------------------------------------------------------------------------------------------------

NAMES = ("Old Tobit", "O'Hara", "陆小灯")


@pytest.mark.parametrize(
    "reply",
    [
        '{"Old Tobit": 0.5, "O\'Hara": 0.3, "陆小灯": 0.2}',
        'First ```json\n{"Old Tobit": 1, "O\'Hara": 0, "陆小灯": 0}\n``` but no:\n'
        '```json\n{"Old Tobit": 0.5, "O\'Hara": 0.3, "陆小灯": 0.2}\n```\nThat is it.',
        '<think>{"Old Tobit": 1}</think>So:\n{"Old Tobit": 0.5, "O\'Hara": 0.3, "陆小灯": 0.2,}',
        '{"old  tobit": "0.5", "O’HARA": 0.3, "「陆小灯」": 0.2}',
        '```\n{"**Old Tobit**": 0.5, "O\'Hara ": 0.3, "陆小灯": 0.2',
        '{"Old Tobit": 1} is wrong, rather {"Old Tobit": 0.5, "O\'Hara": 0.3, "陆小灯": 0.2}',
    ],
)
def test_replies_that_can_be_read(reply):
    assert parse_reply(reply, NAMES) == (dict(zip(NAMES, (0.5, 0.3, 0.2), strict=True)), False)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("I think it is Old Tobit.", "no JSON object"),
        ('{"Old Tobit": 0.5, "陆小灯": 0.5}', '"O\'Hara" has no probability'),
        ('{"Old Tobit": 0.5, "O\'Hara": 0.5, "陆小灯": "nobody"}', "'陆小灯' is 'nobody', which is no number"),
        ('{"Old Tobit": 50, "O\'Hara": 30, "陆小灯": 20}', "'Old Tobit' is 50, which is not from 0 to 1"),
        ('{"Old Tobit": 0.5, "O\'Hara": 0.2, "陆小灯": 0.2}', "sum to 0.9"),
        ('{"Old Tobit": true, "O\'Hara": 0, "陆小灯": 0}', "no number"),
        ('{"Old Tobit": NaN, "O\'Hara": 0.5, "陆小灯": 0.5}', "not from 0 to 1|no number"),
        ('{"old tobit": 0.2, "OLD TOBIT": 0.3, "O\'Hara": 0.3, "陆小灯": 0.2}', "several probabilities"),
        ('<think>{"Old Tobit": 0.5, "O\'Hara": 0.3, "陆小灯": 0.2}', "no JSON object"),
    ],
)
def test_replies_that_cannot_be_read_say_why(reply, reason):
    with pytest.raises(Unreadable, match=reason):
        parse_reply(reply, NAMES)


def test_names_have_to_be_exact_under_compat():
    """Defect 4."""
    reply = '{"old tobit": 0.5, "O\'Hara": 0.3, "陆小灯": 0.2}'
    assert parse_reply(reply, NAMES)[0]["Old Tobit"] == 0.5
    with pytest.raises(Unreadable, match="no probability"):
        parse_reply(reply, NAMES, "reference")


def test_options_that_differ_in_case_only_are_told_apart_to_the_letter():
    assert parse_reply('{"may": 0.9, "May": 0.1}', ("May", "may"))[0] == {"May": 0.1, "may": 0.9}
    with pytest.raises(Unreadable, match="'May' has no probability"):
        parse_reply('{"may": 0.9, "MAY": 0.1}', ("May", "may"))


# ---- files ---------------------------------------------------------------------------------------------------------


def write(path, rows, columns=("prompt", "option1", "option2", "option3", "option4", "gt")):
    with open(path, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


def test_our_sample_has_the_official_columns_and_twelve_rows():
    samples = build(PersonaEvalConfig()).samples()
    assert [sum(s.task == track for s in samples) for track in personaeval.TRACKS] == [5, 3, 4]
    assert {len(s.options) for s in samples if s.task == "Expertise"} == {5}
    assert any("候选人" in s.messages[0].content for s in samples if s.task == "Drama")
    for one in samples:
        assert one.target in one.options and one.persona is None
        assert all(option in one.messages[0].content for option in one.options)


def test_files_are_read_with_line_breaks_quotes_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "Drama.csv"
    columns = "prompt,option1,option2,option3,option4,gt,extra"
    path.write_bytes(f'\ufeff{columns}\n"Who, ""you""?\nYes",甲,乙,丙,丁,"  乙 ",x\n'.encode())
    (one,) = read_track(path)
    assert one.messages[0].content == 'Who, "you"?\nYes' and one.options == ("甲", "乙", "丙", "丁")
    assert one.target == "乙" and one.id == "Drama-1"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["p", "a", "b", "c", "d", "a"], ["", "a", "b", "c", "d", "a"]], "Drama.csv, row 2 has an empty prompt"),
        ([["p", "a", "b", "c", "d", "e"]], "row 1 has gt 'e', which should be one of its options: a, b, c, d"),
        ([["p", "a", "a", "c", "d", "a"]], "row 1 has the options a, a, c, d"),
        ([["p", "a", "", "", "", "a"]], "row 1 has the options a; there should be several"),
        ([["p", "a", "b", "c"]], "row 1 has not as many fields"),
        ([], "Drama.csv holds no rows"),
    ],
)
def test_bad_rows_are_one_sentence(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_track(write(tmp_path / "Drama.csv", rows))


def test_missing_columns_and_files_are_one_sentence(tmp_path, monkeypatch):
    path = write(tmp_path / "Expertise.csv", [["p", "a", "b", "c", "d", "a"]])
    with pytest.raises(UserError, match="has no column option5; its columns are prompt, option1, .*, gt"):
        build(PersonaEvalConfig(path=str(path)))
    with pytest.raises(UserError, match="has no Literary.csv; it holds Expertise.csv"):
        build(PersonaEvalConfig(path=str(tmp_path)))
    with pytest.raises(UserError, match="benchmark.path=.*nowhere is no file or folder"):
        build(PersonaEvalConfig(path=str(tmp_path / "nowhere")))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="someone/none is no folder here, and the hub gave no Literary.csv"):
        build(PersonaEvalConfig(path="someone/none"))
    for bad in ({"tracks": ["Comedy"]}, {"tracks": []}, {"mode": "vibes"}, {"compat": "official"}):
        with pytest.raises(UserError, match=f"benchmark.{next(iter(bad))}="):
            build(PersonaEvalConfig(**bad))


def test_one_file_or_some_tracks():
    drama = personaeval.SAMPLES / "Drama.csv"
    assert {s.task for s in build(PersonaEvalConfig(path=str(drama))).samples()} == {"Drama"}
    some = build(PersonaEvalConfig(tracks=["Expertise", "Drama"])).samples()
    assert [s.id for s in some] == [*(f"Expertise-{i}" for i in range(1, 5)), *(f"Drama-{i}" for i in range(1, 4))]


def test_a_limit_takes_from_every_track():
    """The first rows of the concatenated tracks would be of the largest track alone."""
    tracks = [s.task for s in build(PersonaEvalConfig(limit=6)).samples()]
    assert tracks == ["Literary"] * 2 + ["Drama"] * 2 + ["Expertise"] * 2
    assert len(build(PersonaEvalConfig(limit=11)).samples()) == 11
    drawn = {tuple(s.id for s in build(PersonaEvalConfig(limit=6, seed=seed)).samples()) for seed in range(5)}
    assert len(drawn) > 1 and len(build(PersonaEvalConfig(limit=99)).samples()) == 12


# ---- runs ----------------------------------------------------------------------------------------------------------


def answers(benchmark, change):
    """A model that says `change(number, sample)` to each prompt."""
    said = {s.messages: change(i, s) for i, s in enumerate(benchmark.samples())}
    return Stated(lambda request: said[request.messages])


def sure(sample, share=0.9, true=None):
    rest = (1 - share) / (len(sample.options) - 1)
    return json.dumps({name: share if name == (true or sample.target) else rest for name in sample.options})


def test_a_run_agrees_with_the_scorer_and_keeps_all_probabilities(tmp_path):
    benchmark = build(PersonaEvalConfig())

    def reply(number, sample):
        if number == 2:
            return "I would rather not say."
        if number == 5:
            return json.dumps(dict(zip(sample.options, (0.33, 0.33, 0.33, 0), strict=True)))
        return sure(sample, 0.4 + 0.05 * number, None if number % 2 else sample.options[0])

    summary, rows = run(benchmark, answers(benchmark, reply), tmp_path)
    given = []
    for number, (sample, row) in enumerate(zip(benchmark.samples(), rows, strict=True)):
        if number == 2:
            assert row.values == {} and row.reason == "the reply holds no JSON object" and "rather not" in row.raw
            given.append((None, sample.target))
            continue
        probabilities = [row.values[f"prob{i}"] for i in range(1, len(sample.options) + 1)]
        assert sum(probabilities) == pytest.approx(1)
        given.append((dict(zip(sample.options, probabilities, strict=True)), sample.target))
    expected, found = score(given), values(summary)
    assert found["renormalised"] == pytest.approx(1 / 11)
    for name in ("top1", "top2", "mean_rank", "brier", "brier_per_option", "ece"):
        assert found[name] == pytest.approx(expected[name]), name
    assert summary.n_unscored == 1 and {row.groups["track"] for row in rows} == set(personaeval.TRACKS)


def test_the_macro_mean_weighs_tracks_alike(tmp_path):
    """Defect 5: all of Literary (5 rows) right and nothing else is 5/12 of the rows, and a third of the tracks."""
    benchmark = build(PersonaEvalConfig())

    def reply(number, sample):
        wrong = next(option for option in sample.options if option != sample.target)
        return sure(sample, true=None if sample.task == "Literary" else wrong)

    found = values(run(benchmark, answers(benchmark, reply), tmp_path)[0])
    assert found["top1"] == pytest.approx(5 / 12) and found["top1_macro"] == pytest.approx(1 / 3)


def test_compat_scores_a_run_as_published(tmp_path):
    ours, theirs = build(PersonaEvalConfig()), build(PersonaEvalConfig(compat="reference"))
    model = answers(ours, lambda number, s: json.dumps({o: round(1 / len(s.options), 2) for o in s.options}))
    found = values(run(ours, model, tmp_path / "ours")[0])
    official, rows = run(theirs, model, tmp_path / "theirs")
    assert found["top1"] == pytest.approx((8 / 4 + 4 / 5) / 12)
    first = [s.options.index(s.target) == 0 for s in ours.samples()]
    assert values(official)["top1"] == pytest.approx(np.mean(first))
    fifth = [row for row, s in zip(rows, ours.samples(), strict=True) if s.options.index(s.target) == 4]
    assert fifth and all("rank" not in row.values and row.values["top1"] == 0 for row in fifth)


def test_the_likelihood_mode_is_the_softmax_of_log_p(tmp_path):
    benchmark = build(PersonaEvalConfig(mode="likelihood", path=str(personaeval.SAMPLES / "Literary.csv")))
    asked = []

    class Reader(Stated):
        def choose(self, requests):
            asked.extend(requests)
            return [[math.log(2 if option == "Pim" else 1) - 40 for option in r.options] for r in requests]

    _, rows = run(benchmark, Reader(lambda request: ""), tmp_path)
    by_prompt = {LIKELIHOOD.messages(prompt=s.messages[0].content): s for s in benchmark.samples()}
    assert {by_prompt[request.messages].id for request in asked} == {row.id for row in rows}
    for row, sample in zip(rows, benchmark.samples(), strict=True):
        weights = [2 if option == "Pim" else 1 for option in sample.options]
        probabilities = [row.values[f"prob{i}"] for i in range(1, 5)]
        assert probabilities == pytest.approx([weight / sum(weights) for weight in weights])


def test_a_real_lm_in_both_modes(llama, tmp_path):
    import persona

    model = persona.load(llama)
    _, rows = run(build(PersonaEvalConfig(max_new_tokens=4)), model, tmp_path / "text")
    assert all(row.values == {} and row.reason for row in rows), "a random LM writes no JSON"
    benchmark = build(PersonaEvalConfig(mode="likelihood", limit=3))
    summary, rows = run(benchmark, model, tmp_path / "likelihood")
    assert set(values(summary)) == set(METRICS)
    assert all(0 < row.values["confidence"] < 1 for row in rows)


@pytest.mark.parametrize("mode", ["text", "likelihood"])
def test_trivial_answers_are_scored_by_the_place_they_take(tmp_path, mode):
    benchmark = build(PersonaEvalConfig(mode=mode))
    places = [s.options.index(s.target) for s in benchmark.samples()]
    commonest = max(set(places), key=places.count)
    constant = values(run(benchmark, Trivial("constant"), tmp_path / "constant")[0])
    assert constant["top1"] == pytest.approx(np.mean([place == commonest for place in places]))
    assert constant["ece"] == pytest.approx(1 - constant["top1"]), "always sure"
    drawn, rows = run(benchmark, Trivial("random"), tmp_path / "random")
    assert drawn.n_unscored == 0 and len({row.raw for row in rows}) > 1


def test_rows_of_one_speaker_are_one_cluster_and_levels_tie_nothing():
    benchmark = build(PersonaEvalConfig())
    clusters = {s.id: benchmark.cluster(s) for s in benchmark.samples()}
    assert clusters["Literary-3"] == "Literary-Pim" and clusters["Expertise-1"] == "Expertise-1"


def test_the_prompt_is_filled_by_what_the_code_gives():
    assert LIKELIHOOD.slots == {"prompt"}


# ---- the judge gate ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Sixty rows of sixty speakers."""
    rows = [[f"Who? {i}", f"a{i}", f"b{i}", f"c{i}", f"d{i}", f"{'abcd'[i % 4]}{i}"] for i in range(60)]
    return build(PersonaEvalConfig(path=str(write(tmp_path_factory.mktemp("many") / "Literary.csv", rows))))


def judged(measured, folder, name, right, silent=0, **settings):
    """A PersonaEval run of a judge that has `right` rows right, and says nothing on the last `silent` ones."""

    def reply(number, sample):
        if number >= len(measured.samples()) - silent:
            return "no comment"
        wrong = next(option for option in sample.options if option != sample.target)
        return sure(sample, true=None if number < right else wrong)

    from persona.evaluation.episodes import run_benchmark

    settings |= {"model": {"endpoint": f"{name}-model"}, "stack": []}
    model = answers(measured, reply)
    run_benchmark(measured, model, folder / name, stack=name, settings=settings, batch_size=4, progress=False)


def test_a_judge_passes_when_the_whole_interval_is_above_chance(many, tmp_path):
    judged(many, tmp_path, "good", 40)
    judged(many, tmp_path, "poor", 18)
    good, poor = (judge_gate.certificate(tmp_path / name) for name in ("good", "poor"))
    assert (good.top1, good.chance, good.n, good.passed) == (pytest.approx(40 / 60), pytest.approx(0.25), 60, True)
    assert poor.top1 == pytest.approx(0.3) and poor.low < 0.25 < poor.high and not poor.passed
    sentences = judge_gate.warn_unless_passed(["good", "poor", "unknown", "poor"], tmp_path)
    assert len(sentences) == 2
    assert "The judge poor did not pass PersonaEval" in sentences[0] and "top-1 0.30" in sentences[0]
    assert "The judge unknown has no readable results" in sentences[1]


def test_a_judge_is_known_by_its_model_too(many, tmp_path):
    judged(many, tmp_path, "good", 40)
    assert judge_gate.warn_unless_passed(["good-model"], tmp_path) == []
    assert len(judge_gate.warn_unless_passed(["model"], tmp_path)) == 1


def test_unreadable_replies_count_as_wrong_at_the_gate(many, tmp_path):
    """Of the rows it answers this judge has two thirds right; it answers 27 of 60."""
    judged(many, tmp_path, "shy", 18, silent=33)
    shy = judge_gate.certificate(tmp_path / "shy")
    assert shy.top1 == pytest.approx(18 / 60) and shy.unscored == 33 and not shy.passed


def test_a_few_rows_are_no_certificate(tmp_path):
    judged(build(PersonaEvalConfig()), tmp_path, "perfect", 12)
    (sentence,) = judge_gate.warn_unless_passed(["perfect"], tmp_path)
    assert "was measured on 12 rows of PersonaEval only, and 50 are needed" in sentence


def test_the_run_on_most_rows_speaks_for_a_judge(many, tmp_path):
    judged(many, tmp_path / "b", "good", 40)
    judged(build(PersonaEvalConfig()), tmp_path / "a", "good", 0)
    assert judge_gate.warn_unless_passed(["good"], tmp_path) == []


def test_the_published_rule_for_ties_certifies_nothing(many, tmp_path):
    judged(many, tmp_path, "good", 40, benchmark={"compat": "reference"})
    assert len(judge_gate.warn_unless_passed(["good"], tmp_path)) == 1
    judged(many, tmp_path / "again", "good", 40, benchmark={"compat": None})
    assert judge_gate.warn_unless_passed(["good"], tmp_path) == []


def test_what_cannot_be_read_certifies_nothing(many, tmp_path):
    judged(many, tmp_path, "good", 40)
    (tmp_path / "good" / "samples.jsonl").write_text("{}\n")
    (tmp_path / "summary.json").write_text("not json")
    assert "good has no readable results" in judge_gate.warn_unless_passed(["good"], tmp_path)[0]
    with pytest.raises(UserError):
        judge_gate.certificate(tmp_path / "good")
    assert len(judge_gate.warn_unless_passed(["good"], tmp_path / "nowhere")) == 1
