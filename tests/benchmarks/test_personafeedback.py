"""PersonaFeedback: the official layout with its misspelt names, both orders of every pair, three modes, bad input."""

import json
import math
import shutil
from pathlib import Path

import pytest
from benchmark_toys import Stated, run, values

import persona
from persona.benchmarks import personafeedback
from persona.benchmarks.personafeedback import (
    CHOICE,
    REPLY,
    Pair,
    PersonaFeedback,
    PersonaFeedbackConfig,
    chosen_first,
    order_values,
    preferred,
    read_choice,
    read_folder,
    read_pairs,
    read_profiles,
    render_profile,
)  # fmt: skip
from persona.errors import UserError
from persona.evaluation.episodes import Trivial, Unscored
from persona.evaluation.roles import Parrot
from persona.types import Request

SAMPLE = Path(personafeedback.__file__).parent / "samples" / "personafeedback"
BOTH = {"accuracy", "accuracy_one_order", "strict_accuracy", "consistency", "always_first", "always_second"}
AVERAGES = {f"{kind}_avg_{how}" for kind in ("general", "specific") for how in ("macro", "micro")}


def build(**changes) -> PersonaFeedback:
    return personafeedback.build(PersonaFeedbackConfig(**changes))


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_profile_reads_like_a_page():
    profile = {
        "Name": "Ada",
        "Demographics": {"Age": 30, "Job_Title": "clerk", "Home": {"Town": "Ys", "Pets": [], "Rooms": ["one", "two"]}},
        "Personality": {"Calm": True, "Quotes": ["no, never", "yes"], "Note": None},
        "Preference": {},
        "Bias": [{"Topic": "rain", "View": "for"}, ["wet", {"Deep": "nested"}], "mild"],
    }
    assert render_profile(profile) == (
        "Name: Ada\n"
        "Demographics:\n- Age: 30\n- Job Title: clerk\n- Home:\n  - Town: Ys\n  - Rooms: one, two\n"
        "Personality:\n- Calm: yes\n- Quotes: no, never; yes\n"
        "Bias:\n- Topic: rain\n- View: for\n- wet\n- Deep: nested\n- mild"
    )


def test_the_sample_has_the_official_layout():
    files = sorted(str(path.relative_to(SAMPLE)) for path in SAMPLE.rglob("*.jsonl"))
    kinds, tiers = ("general", "spedific"), ("easy", "hard", "medium")
    assert files == [f"data/{kind}/{tier}.jsonl" for kind in kinds for tier in tiers] + ["persona/all_personas.jsonl"]
    pairs, profiles = read_folder(str(SAMPLE))
    assert len(pairs) == 13 and [pair.row for pair in pairs] == list(range(13)) and list(profiles) == list("1234")
    assert all("- Age: " in text and "  - Likes: " in text for text in profiles.values())
    for path in SAMPLE.glob("data/*/*.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(rows) >= 2 and all(list(row) == ["user_id", "question", "chosen", "reject"] for row in rows)
        assert {type(row["user_id"]) for row in rows} == {int, str}
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in pairs)
    assert 4 <= longer <= 9, "length does not tell which answer is better"


ROW = {"user_id": "1", "question": "q", "chosen": "yes", "reject": "no"}


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def without(name: str) -> dict:
    return {key: value for key, value in ROW.items() if key != name}


@pytest.mark.parametrize("row, sentence", [
    (without("reject") | {"rejected": "no"}, "line 2 has no field reject; its fields are user_id, question, chosen"),
    ({"user_id": 1}, "line 2 has no field question, chosen, reject; its fields are user_id"),
    ({}, r"line 2 has no field user_id, question, chosen, reject; its fields are \(none\)"),
    (ROW | {"chosen": "  "}, "line 2 has an empty chosen"),
    (ROW | {"question": ["q"]}, r"line 2 has \['q'\] as field 'question', which should be a string"),
])  # fmt: skip
def test_bad_rows_are_named(tmp_path, row, sentence):
    with pytest.raises(UserError, match=sentence):
        read_pairs(write(tmp_path / "easy.jsonl", ROW, row), "general", "easy")


def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAMPLE, tmp_path / "data set"))


def test_bad_files_are_named(tmp_path, caplog):
    folder = copy(tmp_path)
    easy = folder / "data" / "spedific" / "easy.jsonl"
    write(easy, ROW | {"user_id": 5}, ROW | {"user_id": "0"})
    with pytest.raises(UserError, match="users without persona: 5 in specific-easy-1, 0 in specific-easy-2; .* has 4"):
        read_folder(str(folder))
    easy.write_text("")
    with pytest.raises(UserError, match="easy.jsonl holds no rows"):
        read_folder(str(folder))
    easy.write_text('{"user_id": 1, ')
    with pytest.raises(UserError, match="broken JSON in line 1"):
        read_folder(str(folder))
    easy.unlink()
    with pytest.raises(UserError, match="has no data/spedific/easy.jsonl"):
        read_folder(str(folder))
    with pytest.raises(UserError, match="no file or folder"):
        build(path="./nowhere")
    with pytest.raises(UserError, match="mode=judge is unknown; it should be one of answer, likelihood, reward"):
        build(mode="judge")
    with pytest.raises(UserError, match="access=memory is unknown"):
        build(access="memory")


def test_another_number_of_pairs_than_the_official_one_is_said(tmp_path, caplog):
    folder = copy(tmp_path)
    write(folder / "data" / "general" / "hard.jsonl", ROW, ROW | {"chosen": "no"})
    read_folder(str(folder))
    counts = "general easy 2, general medium 2, general hard 2, specific easy 3, specific medium 2, specific hard 2"
    assert f"holds 13 pairs ({counts}); the official data have 8298" in caplog.text
    assert "1 pairs of two equal answers: general-hard-2" in caplog.text
    caplog.clear()
    build()
    assert not caplog.text, "the package's sample claims to be no more than that"


def test_bad_personas_are_named(tmp_path):
    whole = {"Name": "Ada", "Demographics": {"Age": 3}, "Personality": {}, "Preference": {}, "Bias": {}}
    path = write(tmp_path / "all_personas.jsonl", whole, {"Name": "Ben", "Bias": {}})
    with pytest.raises(UserError, match="line 2 has no Demographics, Personality, Preference; its fields are Name"):
        read_profiles(path)
    with pytest.raises(UserError, match="line 1 is a persona without any content"):
        read_profiles(write(path, dict.fromkeys(whole, {})))
    with pytest.raises(UserError, match="holds no personas"):
        read_profiles(write(path))


# ---- choices -------------------------------------------------------------------------------------------------------


def test_places_follow_no_pattern_and_in_the_published_loader_every_second_row():
    pairs = [Pair(f"general-easy-{i}", "general", "easy", i, "1", "q", "c", "r") for i in range(400)]
    ours = [chosen_first(pair, 0) for pair in pairs]
    assert [chosen_first(pair, 0, "reference") for pair in pairs] == [True, False] * 200
    # A solver that counts along finds every place of the published loader, and a coin's share of ours.
    for period in range(1, 9):
        for shift in range(period):
            some = ours[shift::period]
            assert abs(sum(some) / len(some) - 0.5) < 2.6 * 0.5 / math.sqrt(len(some)), (period, shift)
    assert [chosen_first(pair, 0) for pair in reversed(pairs)] == ours[::-1], "the pair's own, whatever the order"
    differing = sum(a != chosen_first(pair, 1) for a, pair in zip(ours, pairs, strict=True))
    assert 150 < differing < 250


@pytest.mark.parametrize("reply, choice", [
    ("A", "A"), ("b", "B"), ("**B**", "B"), ("Answer: A", "A"), ("(B)", "B"), ("<think>A, surely</think>B", "B"),
    ("A good answer is B", "B"), ("", None), ("A and B", None), ("neither", None),
])  # fmt: skip
def test_letters_out_of_replies(reply, choice):
    assert read_choice(reply) == choice


# The better answer stood in place A first, and then in place B.
@pytest.mark.parametrize("choices, expected", [
    (("A", "B"), {"accuracy": 1, "accuracy_one_order": 1, "strict_accuracy": 1, "invalid": 0,
                  "consistency": 1, "always_first": 0, "always_second": 0}),
    (("B", "A"), {"accuracy": 0, "accuracy_one_order": 0, "strict_accuracy": 0, "invalid": 0,
                  "consistency": 1, "always_first": 0, "always_second": 0}),
    (("A", "A"), {"accuracy": 0.5, "accuracy_one_order": 1, "strict_accuracy": 0, "invalid": 0,
                  "consistency": 0, "always_first": 1, "always_second": 0}),
    (("B", "B"), {"accuracy": 0.5, "accuracy_one_order": 0, "strict_accuracy": 0, "invalid": 0,
                  "consistency": 0, "always_first": 0, "always_second": 1}),
    ((None, "B"), {"accuracy": 0.5, "accuracy_one_order": 0, "strict_accuracy": 0, "invalid": 0.5}),
    ((None, None), {"accuracy": 0, "accuracy_one_order": 0, "strict_accuracy": 0, "invalid": 1}),
    (("tie", "B"), {"accuracy": 0.75, "accuracy_one_order": 0.5, "strict_accuracy": 0, "invalid": 0}),
    (("tie", "tie"), {"accuracy": 0.5, "accuracy_one_order": 0.5, "strict_accuracy": 0, "invalid": 0}),
])  # fmt: skip
def test_both_orders_by_hand(choices, expected):
    assert order_values(choices, ("A", "B")) == expected


def test_one_order_by_hand():
    assert order_values(["A"], ["A"]) == {"accuracy": 1, "invalid": 0}
    assert order_values(["tie"], ["B"]) == {"accuracy": 0.5, "invalid": 0}
    assert order_values([None], ["B"]) == {"accuracy": 0, "invalid": 1}


def test_scores_are_compared():
    assert (preferred(-1, -2), preferred(-2, -1), preferred(-1, -1)) == ("A", "B", "tie")
    with pytest.raises(Unscored):
        preferred(math.nan, -1)


# ---- the benchmark -------------------------------------------------------------------------------------------------


def test_the_prompts_slots_are_those_that_are_filled():
    assert CHOICE.slots == {"persona", "question", "first", "second"} and REPLY.slots == {"persona", "question"}


def test_what_the_model_is_shown():
    benchmark = build()
    pairs = {pair.id: pair for pair in read_folder(str(SAMPLE))[0]}
    assert {sample.target for sample in benchmark.samples()} == {"A", "B"}
    for sample in benchmark.samples():
        (message,) = sample.messages
        pair = pairs[sample.id]
        better, worse = message.content.index(pair.chosen), message.content.index(pair.rejected)
        assert (better < worse) == (sample.target == "A")
        assert sample.persona.description in message.content and pair.question in message.content
        assert benchmark.cluster(sample) == pair.user == sample.persona.id
    bare = build(access="none").samples()[0]
    assert bare.persona.description and bare.persona.description not in bare.messages[0].content
    assert "known about a user" not in bare.messages[0].content
    reward = build(mode="reward").samples()[0]
    assert [message.role for message in reward.messages] == ["system", "user"]
    assert reward.persona.description in reward.messages[0].content
    assert [message.role for message in build(mode="reward", access="none").samples()[0].messages] == ["user"]
    assert reward.target == pairs[reward.id].chosen and set(reward.options) == {
        reward.target,
        pairs[reward.id].rejected,
    }


def test_a_limit_takes_of_every_file():
    groups = [tuple(build().groups(sample).values()) for sample in build(limit=6).samples()]
    assert sorted(groups) == sorted(
        (kind, tier, f"{kind} {tier}") for kind in ("general", "specific") for tier in ("easy", "medium", "hard")
    )
    assert len(build(limit=100).samples()) == 13


def judge(likes) -> Stated:
    """Prefers the answer whose text `likes` scores highest; says nothing readable where both score the same."""

    def reply(request: Request) -> str:
        answers = request.messages[-1].content.split("Answer A:\n")[1].split("\n\nWhich")[0]
        first, second = answers.split("\n\nAnswer B:\n")
        return "A" if likes(first) > likes(second) else "B" if likes(second) > likes(first) else "Both."

    return Stated(reply)


def test_answers_end_to_end(tmp_path):
    pairs = read_folder(str(SAMPLE))[0]
    better = {pair.chosen for pair in pairs}
    summary, rows = run(build(), judge(lambda text: text in better), tmp_path / "right")
    found = values(summary)
    assert found == pytest.approx(
        dict.fromkeys(BOTH | AVERAGES, 1.0) | {"always_first": 0, "always_second": 0, "invalid": 0}
    )
    assert rows[0].raw.count("[the other order]") == 1
    # Of the general pairs it knows the easy ones only; of the specific ones one of three easy, one of two hard.
    ids = ("general-easy-1", "general-easy-2", "specific-easy-1", "specific-hard-1")
    known = {p.chosen for p in pairs if p.id in ids}
    rest = {p.rejected for p in pairs if p.chosen not in known}
    found = values(run(build(), judge(lambda text: text in known | rest), tmp_path / "some")[0])
    assert found == pytest.approx({
        "accuracy": 4 / 13, "accuracy_one_order": 4 / 13, "strict_accuracy": 4 / 13, "consistency": 1, "invalid": 0,
        "always_first": 0, "always_second": 0, "general_avg_macro": 1 / 3, "general_avg_micro": 2 / 6,
        "specific_avg_macro": (1 / 3 + 0 + 1 / 2) / 3, "specific_avg_micro": 2 / 7,
    })  # fmt: skip


def test_unreadable_replies_are_wrong_and_counted(tmp_path):
    summary, _ = run(build(), judge(lambda text: 0), tmp_path)
    found = values(summary)
    assert found["accuracy"] == 0 and found["invalid"] == 1 and summary.n_unscored == 0
    assert "consistency" not in found and "always_first" not in found


def test_a_place_is_no_preference(tmp_path):
    """Whoever always says A is at chance in accuracy, and consistent in nothing; one order alone would hide it."""
    found = values(run(build(), Parrot("A"), tmp_path / "both")[0])
    assert found["accuracy"] == 0.5 and found["strict_accuracy"] == found["consistency"] == 0
    assert (found["always_first"], found["always_second"]) == (1, 0)
    published = build(compat="reference")
    assert [sample.target for sample in published.samples()] == ["A", "B"] * 6 + ["A"]
    found = values(run(published, Parrot("A"), tmp_path / "one")[0])
    assert found["accuracy"] == pytest.approx(7 / 13) and not set(found) & (BOTH - {"accuracy"})


def test_likelihoods_end_to_end(tmp_path):
    better = {pair.chosen for pair in read_folder(str(SAMPLE))[0]}
    benchmark = build(mode="likelihood")
    summary, rows = run(benchmark, judge(lambda text: text in better), tmp_path / "right")
    assert values(summary)["strict_accuracy"] == 1 and set(values(summary)) == BOTH | AVERAGES
    assert "log p" in rows[0].raw
    summary, rows = run(benchmark, judge(lambda text: 0), tmp_path / "ties")  # both letters are as likely
    assert values(summary)["accuracy"] == 0.5 and values(summary)["strict_accuracy"] == 0
    assert rows[0].raw.startswith("tie")


class Tastes(Stated):
    """log p of a reply: so much per word."""

    def __init__(self, per_word) -> None:
        self.per_word = per_word

    def loglikelihood(self, requests, targets):
        counts = [len(target.split()) for target in targets]
        return [(self.per_word(t) * n, n) for t, n in zip(targets, counts, strict=True)]


def test_rewards_end_to_end(tmp_path):
    better = {pair.chosen for pair in read_folder(str(SAMPLE))[0]}
    benchmark = build(mode="reward")
    assert set(benchmark.metrics) == {"accuracy"} | AVERAGES
    summary, rows = run(benchmark, Tastes(lambda text: -1.0 if text in better else -1.01), tmp_path / "right")
    assert values(summary)["accuracy"] == 1 and rows[0].raw in better, "per word, however long"
    summary, rows = run(benchmark, Tastes(lambda text: -1.0), tmp_path / "ties")
    assert values(summary)["accuracy"] == 0.5 and {row.raw for row in rows} == {"tie"}
    summary, _ = run(benchmark, Tastes(lambda text: math.nan), tmp_path / "nan")
    assert summary.n_unscored == 13


@pytest.mark.parametrize("mode", ["answer", "likelihood", "reward"])
def test_a_constant_and_a_random_answer(mode, tmp_path):
    for kind in ("constant", "random"):
        summary, _ = run(build(mode=mode), Trivial(kind), tmp_path / kind)
        assert summary.n_unscored == 0
        if mode != "reward":  # whatever is said is said in both orders
            assert values(summary)["accuracy"] == 0.5 and values(summary)["consistency"] == 0
        elif kind == "constant":
            firsts = sum(s.options[0] == s.target for s in build(mode=mode).samples())
            assert values(summary)["accuracy"] == pytest.approx(max(firsts, 13 - firsts) / 13)


@pytest.mark.parametrize("mode", ["answer", "likelihood", "reward"])
def test_a_real_lm_is_scored_by_what_it_says(llama, mode, tmp_path):
    benchmark, model = build(mode=mode, limit=2, max_new_tokens=3), persona.load(llama)
    summary, rows = run(benchmark, model, tmp_path)
    assert summary.n_unscored == 0
    for sample, row in zip(benchmark.samples(), rows, strict=True):
        if mode == "reward":
            found = [model.loglikelihood([Request(sample.messages)], [text])[0] for text in sample.options]
            means = [total / tokens for total, tokens in found]
            assert row.raw == sample.options[means.index(max(means))]
        elif mode == "likelihood":
            ((first, second),) = model.choose([Request(sample.messages, options=("A", "B"))])
            assert row.raw.startswith("A" if first > second else "B")
            assert row.values["accuracy_one_order"] == ((first > second) == (sample.target == "A"))
