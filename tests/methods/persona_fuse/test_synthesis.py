"""The data stage with a scripted teacher and judge over real HTTP; filters, floors and splits by hand."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from fuse_toys import config, trainer

from persona.data import SituationsConfig, load
from persona.data.base import People
from persona.data.situations import annotated, expert_vector, expert_vector_of, traits_of
from persona.errors import UserError
from persona.evaluation.endpoints.endpoint import Endpoint, EndpointConfig
from persona.evaluation.judges.judging import Unreadable
from persona.methods import persona_fuse
from persona.methods.persona_fuse.synthesis import (
    SHOWN,
    SynthesisConfig,
    near_duplicates,
    read_analysis,
    shown,
    split_of,
    stage,
    stratified,
)
from persona.personalizer import LanguageModel
from persona.training.stages import run_stages
from persona.types import Message, Sample

sys.path.append(str(Path(__file__).parents[2] / "evaluation"))
from fault_server import Answer, FaultServer, Seen

NONE = dict.fromkeys("OCEAN", "none")
POLES = [(trait, level) for trait in "OCEAN" for level in ("high", "low")]


def analysis(levels: dict[str, str], response: str) -> str:
    traits = {trait: {"level": level, "reason": f"as it is {level}"} for trait, level in levels.items()}
    return json.dumps({"cues": {"people": "two friends", "task": "a chat"}, "traits": traits, "response": response})


def scripted(seen: Seen) -> Answer:
    """A query says itself what it calls for ("query 3 O=high"), and which filter it is for."""
    query = re.search(r"query \w+[^\n]*", seen.text)[0]
    levels = {**NONE, **dict(re.findall(r"([OCEAN])=(high|low)", query))}
    if "Work in this order" in seen.text:
        if "garbled" in query:
            return Answer(text="I would rather not.")
        return Answer(text=analysis(levels, "word " * 500 if "endless" in query else f"An answer to {query}."))
    if "Could this answer do harm" in seen.text:
        return Answer(text="yes" if "harmful" in query else "no")
    return Answer(text=json.dumps(NONE if "misjudged" in query else levels))


def pool(*queries: str) -> list[Sample]:
    return [Sample(f"q{n}", (Message("user", text),), metadata={"source": "ours"}) for n, text in enumerate(queries)]


def called(n: int) -> str:
    trait, level = POLES[n % 10]
    return f"query {n} about {n} {n + 1} {n + 2} : {trait}={level}"


# Ten poles, four queries each, and eight neutral ones: 16 %.
GOOD = [called(n) for n in range(40)] + [f"query n{n} sum {n} + {n + 1}" for n in range(8)]


def endpoint(server: FaultServer) -> Endpoint:
    return Endpoint(EndpointConfig(model="judge-7b", base_url=server.url, retries=0, concurrency=1), backoff=0.01)


def run(server: FaultServer, queries: list[Sample], folder: Path, **settings) -> list[dict]:
    teacher = endpoint(server)
    made = stage(queries, teacher, (), SynthesisConfig(**settings), 0, 4)
    run_stages([made], folder)
    return [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]


def dropped(folder: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in map(json.loads, (folder / "dropped.jsonl").read_text().splitlines())}


def test_queries_become_annotated_responses_that_the_reader_takes(tmp_path):
    with FaultServer(scripted) as server:
        rows = run(server, pool(*GOOD), tmp_path)
    assert len(rows) == 48 and not dropped(tmp_path) and len(server.seen) == 3 * 48
    first = rows[0]
    assert (first["id"], first["response"]) == ("q0", f"An answer to {GOOD[0]}.")
    assert first["traits"] == {"O": 1, "C": 0, "E": 0, "A": 0, "N": 0} and first["source"] == "ours"
    assert first["cot"].splitlines()[:3] == ["people: two friends", "task: a chat", "O, high: as it is high"]
    people = load(SituationsConfig(path=str(tmp_path / "sft.jsonl")))
    samples = [*people.train, *people.dev, *people.test]
    assert len(samples) == 48 and all(annotated(sample) for sample in samples)
    assert Counter(vector.index(1) for s in samples if any(vector := expert_vector_of(s))) == dict.fromkeys(
        range(10), 4
    )
    assert traits_of(next(s for s in samples if s.id == "q1")) == {"O": -1, "C": 0, "E": 0, "A": 0, "N": 0}


def test_every_filter_drops_its_own_and_says_so(tmp_path, caplog):
    bad = ["query b0 garbled", "query b1 endless", "query b2 harmful", "query b3 E=high misjudged",
           "QUERY 5 about 5 6 7 : C=low"]  # fmt: skip
    bad[4] = GOOD[5].upper().replace("C=LOW", "C=low").replace("E=LOW", "E=low").replace("QUERY", "query")
    with FaultServer(scripted) as server:
        rows = run(server, pool(*GOOD, *bad), tmp_path)
    reasons = dropped(tmp_path)
    assert len(rows) == 48 and len(reasons) == 5
    assert reasons["q48"].startswith("the teacher's reply: no JSON")
    assert reasons["q49"] == "the response is too short or too long"
    assert reasons["q50"] == "the response could do harm"
    assert reasons["q51"] == "the judge sees other traits than were decided"
    assert reasons["q52"] == "nearly the query of another row"
    assert "5 of 53 queries are left out (1 × " in caplog.text
    asked = Counter(
        "judge" if "Could this" in s.text or "does the answer" in s.text else "teacher" for s in server.seen
    )
    # The judge is not asked about what is unreadable or too long, and about harm only where there is some.
    assert asked == {"teacher": 53, "judge": 2 * 51 - 1}


def test_agreement_can_be_looser(tmp_path):
    with FaultServer(scripted) as server:
        rows = run(server, pool(*GOOD, "query b3 E=high misjudged"), tmp_path, agreement=4)
    assert len(rows) == 49


def test_a_teacher_that_dies_half_way_is_asked_for_the_rest(tmp_path):
    def dies(seen: Seen) -> Answer:
        return scripted(seen) if len(server.seen) <= 98 else Answer("500")

    queries = pool(*GOOD)
    with FaultServer(dies) as server:
        with pytest.raises(UserError, match="is down: 20 questions in a row had no reply"):
            run(server, queries, tmp_path / "a")
        assert not (tmp_path / "a" / "sft.jsonl").exists()
        server.plan, before = scripted, len(server.seen)
        resumed = run(server, queries, tmp_path / "a")
        again = server.seen[before:]
        assert not any("Work in this order" in seen.text for seen in again), "the teacher's replies were all there"
        assert 0 < len(again) < 2 * 48
        asked = len(server.seen)
        assert run(server, queries, tmp_path / "a") == resumed and len(server.seen) == asked, "nothing has changed"
        assert run(server, queries, tmp_path / "b") == resumed


@pytest.mark.parametrize(
    ("who", "calls"), [("Work in this order", 1 + 2 * 48), ("Could this answer do harm", 2), ("does the answer", 2)]
)
def test_a_call_without_reply_leaves_the_stage_open_and_is_asked_again(tmp_path, who, calls):
    """Of all calls one fails; as long as it does, every start ends with one sentence, and then no other is repeated
    but the judge's first question on the same response."""

    def flaky(seen: Seen) -> Answer:
        return Answer("500") if who in seen.text and "query 7 " in seen.text else scripted(seen)

    queries = pool(*GOOD)
    with FaultServer(flaky) as server:
        for _ in range(2):
            with pytest.raises(UserError, match=r'1 of 48 got no reply, the first of them "q7" \(.*HTTP 500.*\): the'):
                run(server, queries, tmp_path / "a")
            assert not (tmp_path / "a" / "records").exists() and not (tmp_path / "a" / "sft.jsonl").exists()
        server.plan, before = scripted, len(server.seen)
        rows = run(server, queries, tmp_path / "a")
        again = [seen.text for seen in server.seen[before:]]
        assert len(rows) == 48 and len(again) == calls
        assert all("query 7 " in text for text in again if calls == 2 or who in text)
        assert run(server, queries, tmp_path / "b") == rows


def test_a_real_lm_that_writes_no_json_leaves_nothing_and_is_asked_again(llama, tmp_path):
    """The LM below is the teacher; its replies stay on disk, and another setting asks all of them anew."""
    people = People("toy", {}, tuple(pool(*GOOD[:6])), ())
    settings = config(llama)
    for tokens in (4, 6):
        settings.synthesis.max_new_tokens = tokens
        with pytest.raises(UserError, match="none of 6 queries is left .* .6 × the teacher's reply: no JSON"):
            persona_fuse.train(settings, LanguageModel(llama), people, trainer(), tmp_path)
        replies = [json.loads(line) for line in (tmp_path / "stages" / "analyses.jsonl").read_text().splitlines()]
        assert [row["id"] for row in replies] == [f"q{n}" for n in range(6)] and all(row["raw"] for row in replies)
    assert not (tmp_path / "stages" / "records").exists()


def test_a_pool_of_queries_is_the_methods_first_stage(llama, tmp_path):
    """From a file of bare queries to a personalizer; what was synthesized is learned from, and not asked for again."""
    queries = [{"id": s.id, "messages": [{"role": "user", "content": s.messages[0].content}]} for s in pool(*GOOD)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    people = load(SituationsConfig(path=str(tmp_path / "pool.jsonl")))
    settings, under = config(llama), LanguageModel(llama)

    def train(stage=None):
        return persona_fuse.train(
            settings, under, people, trainer(max_steps=1), tmp_path, teacher=endpoint(server), stage=stage
        )

    with FaultServer(scripted) as server:
        with pytest.raises(UserError, match="stage=warmup builds on stage synthesis, but it has not run"):
            train("warmup")
        assert train("synthesis") == tmp_path / "stages" and not (tmp_path / "stages" / "warmup").exists()
        asked = len(server.seen)
        assert train() == tmp_path / "personalizer" and len(server.seen) == asked == 3 * 48
    traces = (tmp_path / "stages" / "joint" / "traces.jsonl").read_text().splitlines()
    dev = len(load(SituationsConfig(path=str(tmp_path / "stages" / "sft.jsonl"))).dev)
    assert len(traces) == (dev or 48) and (tmp_path / "stages" / "records" / "synthesis.json").is_file()


# ---- pure parts -----------------------------------------------------------------------------------------------------


def test_what_a_teacher_says_is_read():
    levels = {**NONE, "C": "High", "N": "low"}
    traits, cot, response = read_analysis("Here:\n```json\n" + analysis(levels, " Fine. ") + "\n```")
    assert traits == {"O": 0, "C": 1, "E": 0, "A": 0, "N": -1} and response == "Fine." and "N, low: as it" in cot


@pytest.mark.parametrize(
    ("reply", "reason"),
    (
        ("no idea", "no JSON"), ('{"cues": {}, "response": "x"}', "no cues or no traits"),
        (analysis(NONE, "  "), "no response"), (analysis({**NONE, "A": "medium"}, "x"), "level of A is 'medium'"),
        (analysis({k: v for k, v in NONE.items() if k != "E"}, "x"), "no level and reason for E"),
        ('{"cues": {}, "traits": {"O": "high"}, "response": "x"}', "no level and reason for O"),
    ),
)  # fmt: skip
def test_what_cannot_be_read_says_why(reply, reason):
    with pytest.raises(Unreadable, match=reason):
        read_analysis(reply)


def test_the_judges_answers_are_read_back():
    assert len(SHOWN.answers) == 3**5 and all(SHOWN.parse(SHOWN.reply(answer)) == answer for answer in SHOWN.answers)
    assert SHOWN.parse('{"O": "none", "C": "high", "E": "low", "A": "NONE", "N": "none"}') == "0+-00"


def test_a_conversation_is_shown_turn_by_turn():
    assert shown((Message("user", "hi"),)) == "hi"
    assert shown((Message("system", "be brief"), Message("user", "hi"))) == "system: be brief\nuser: hi"


def test_near_duplicates_are_those_of_comparing_all_pairs():
    rng = random.Random(3)
    texts = []
    for _ in range(150):
        words = rng.choice(texts).split() if texts and rng.random() < 0.6 else rng.choices("abcdefgh", k=12)
        words[rng.randrange(len(words))] = rng.choice("abcdefgh")
        texts.append(" ".join(words))
    texts += ["one", "One", "two"]

    def runs(text):
        words = text.lower().split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    for overlap in (0.5, 0.8, 1.0):
        found: dict[int, int] = {}
        for late in range(len(texts)):
            for early in range(late):
                a, b = runs(texts[late]), runs(texts[early])
                if early not in found and len(a & b) / len(a | b) >= overlap:
                    found[late] = early
                    break
        assert near_duplicates(texts, overlap) == found and found[151] == 150


def rows_of(**counts: int) -> list[dict]:
    """So many rows of each pattern: "O+C-" by keyword O1Cm1, none by `none`."""
    found = []
    for pattern, count in counts.items():
        traits = dict.fromkeys("OCEAN", 0) | {t: -1 if m else 1 for t, m in re.findall(r"([OCEAN])(m?)", pattern)}
        found += [{"id": f"{pattern}-{n}", "traits": traits} for n in range(count)]
    return found


EVEN = {f"{trait}{sign}": 10 for trait in "OCEAN" for sign in ("", "m")}


def test_what_is_even_stays_whole():
    rows = rows_of(none=20, **EVEN)
    assert stratified(rows, 0.05, 0.15, 0) == (rows, [])


def test_the_commonest_patterns_are_cut_until_the_floors_hold():
    rows = rows_of(none=20, **{**EVEN, "O": 300, "E": 200})
    kept, spare = stratified(rows, 0.05, 0.15, 0)
    vectors = [expert_vector(row["traits"]) for row in kept]
    assert len(kept) + len(spare) == len(rows) and [row for row in rows if row in kept] == kept
    assert min(sum(v[number] for v in vectors) for number in range(10)) >= 0.05 * len(kept)
    assert sum(not any(v) for v in vectors) >= 0.15 * len(kept)
    assert {row["id"].split("-")[0] for row in spare} == {"O", "E"}, "no other is common"
    assert stratified(rows, 0.05, 0.15, 0)[0] == kept != stratified(rows, 0.05, 0.15, 1)[0]
    # One row more would break a floor.
    assert 20 < 0.15 * (len(kept) + 1) or 10 < 0.05 * (len(kept) + 1)


@pytest.mark.parametrize(
    ("counts", "sentence"),
    (
        ({"none": 20, **EVEN, "Nm": 0}, r"of 110 annotated queries too few call for N- \(0\): add queries"),
        ({"none": 0, **EVEN}, r"too few call for nothing at all \(0\)"),
        ({"none": 40, **{**EVEN, "O": 0, "N": 0, "ON": 9}}, r"too few call for O\+ \(9\), O- \(10\), C\+ \(10\),"),
    ),
)
def test_floors_that_cannot_be_held_are_one_sentence(counts, sentence):
    with pytest.raises(UserError, match=sentence):
        stratified(rows_of(**counts), 0.2 if "ON" in counts else 0.05, 0.15, 0)


def test_splits_are_of_the_query_and_90_5_5():
    found = Counter(split_of(f"query {n}", 0) for n in range(4000))
    assert abs(found["train"] - 3600) < 100 and abs(found["dev"] - 200) < 60 and abs(found["test"] - 200) < 60
    assert split_of("query 1", 0) == split_of("query 1", 0)
    assert [split_of(f"query {n}", 0) for n in range(99)] != [split_of(f"query {n}", 1) for n in range(99)]
