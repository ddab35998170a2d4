"""Endpoints over real HTTP on loopback: every fault ends scored, unscored with a reason, or in one sentence."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import logging
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest
from fault_server import FAULTS, Answer, FaultServer, Seen

import persona
from evaluate import evaluate
from persona.config import load_config
from persona.errors import UserError
from persona.evaluation.endpoints.budget import estimate_tokens
from persona.evaluation.endpoints.endpoint import Endpoint, EndpointConfig, PersonalizedEndpoint, _retry_after
from persona.evaluation.endpoints.reply_cache import ReplyCache
from persona.evaluation.episodes import Benchmark, Cast, run_benchmark
from persona.evaluation.judges.judging import Rubric, Unreadable, Unscored
from persona.evaluation.prompts import Prompt
from persona.evaluation.results import read_rows, read_summary
from persona.evaluation.roles import Parrot, Roles
from persona.evaluation.statistics import Metric
from persona.methods.prompt import Description, Retrieval, RetrievalConfig
from persona.personalizer import Personalizer
from persona.types import HistoryItem, Message, Persona, Request, Sample, Sampling, Score

KEY = "sk-sentinel-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def parse(text: str) -> float:
    if not text.strip().isdigit():
        raise Unreadable("the reply is no number")
    return float(text)


GRADE = Rubric(Prompt("grade", "Grade this from 1 to 5: {{ reply }}"), parse, (1, 5), max_new_tokens=16)


class Graded(Benchmark):
    """The model's reply is the sample's text, and the judge grades it."""

    name, version, needs = "graded", "1", ("judge",)
    metrics = {"grade": Metric(description="mean grade")}
    prompts = (GRADE.prompt,)

    def __init__(self, n: int, poisoned: tuple[int, ...] = ()) -> None:
        self._texts = [f"essay {i:02}{' poison' if i in poisoned else ''}" for i in range(n)]

    def samples(self) -> list[Sample]:
        return [Sample(f"s{i:02}", (Message("user", text),)) for i, text in enumerate(self._texts)]

    async def episode(self, sample: Sample, roles: Roles) -> Score:
        (verdict,) = await roles.judge(GRADE, reply=sample.messages[0].content)
        if verdict.value is None:
            return Score(reason=verdict.reason, raw=verdict.raw, verdicts=(verdict,))
        return Score({"grade": float(verdict.value)}, raw=verdict.raw, verdicts=(verdict,))


def judged_by(judge, folder: Path, benchmark: Benchmark, batch_size: int = 4):
    run_benchmark(
        benchmark, Cast(Parrot("x"), judges=[judge]), folder, stack="toy", settings={}, batch_size=batch_size,
        progress=False,
    )  # fmt: skip
    return read_rows(folder / "samples.jsonl")


def make(server: FaultServer | str, backoff: float = 0.01, **settings) -> Endpoint:
    url = server if isinstance(server, str) else server.url
    return Endpoint(EndpointConfig(**{"model": "judge-7b", "base_url": url} | settings), backoff=backoff)


def ask(text: str = "how ?", **sampling) -> Request:
    return Request((Message("user", text),), sampling=Sampling(**sampling))


def respond(endpoint: Endpoint | PersonalizedEndpoint, *requests: Request, failures: bool = False):
    async def main():
        return await asyncio.gather(*(endpoint.respond(one) for one in requests), return_exceptions=failures)

    return asyncio.run(main())


def check(endpoint: Endpoint) -> None:
    asyncio.run(endpoint.check())


def sentence(error) -> str:
    """The error's message, after a look at its form."""
    text = str(error.value)
    assert "\n" not in text and KEY not in text and "Traceback" not in text and len(text) < 400
    return text


# ---- faults --------------------------------------------------------------------------------------------------------


def test_every_fault_ends_scored_or_unscored_with_a_reason(tmp_path):
    def plan(seen: Seen) -> Answer:
        number = int(seen.text.split("essay ")[1][:2])
        faults = number % 4 if "poison" not in seen.text else 99
        return Answer(fault=FAULTS[(number + seen.before) % len(FAULTS)]) if seen.before < faults else Answer()

    poisoned = (3, 17, 30)
    with FaultServer(plan) as server:
        judge = make(server, timeout=1.5, retries=6)
        started = time.monotonic()
        rows = judged_by(judge, tmp_path, Graded(40, poisoned))
        seconds = time.monotonic() - started
    assert [row.id for row in rows] == [f"s{i:02}" for i in range(40)]
    for number, row in enumerate(rows):
        if number in poisoned:
            assert row.values == {} and row.reason.startswith("endpoint judge-7b: ")
            assert row.reason.endswith(" after 7 tries")
        else:
            assert row.values == {"grade": 4.0}, row.reason
    usage = judge.usage
    faults = sum(number % 4 for number in range(40) if number not in poisoned)
    assert usage["failed"] == 3 and usage["requests"] == len(server.seen) == 40 + usage["retries"]
    assert usage["retries"] >= faults + 3 * 6  # (a busy machine may be too late with a proper answer: one more try)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (37 * 10, 37 * 2)
    asked = Counter(seen.text for seen in server.seen)
    assert max(asked.values()) == 7 and len(asked) == 40
    assert seconds < 60


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("429", "HTTP 429"),
        ("500", "HTTP 500"),
        ("garbage", "an answer that is no JSON"),
        ("html", "an answer that is no JSON"),
        ("no choices", "an answer that is no chat completion"),
        ("half", "the connection was cut"),
        ("nothing", "the connection was cut"),
        ("slow", "no reply within 0.5 s"),
        ("drip", "no reply within 0.5 s"),
    ],
)
def test_each_fault_has_its_reason_and_is_tried_again(fault, reason):
    timeout = 0.5 if fault in ("slow", "drip") else 30.0
    with FaultServer(lambda seen: Answer(fault=fault)) as server:
        (found,) = respond(make(server, retries=1, timeout=timeout), ask(), failures=True)
        assert isinstance(found, Unscored) and found.reason == f"endpoint judge-7b: {reason} after 2 tries"
        assert len(server.seen) == 2
    with FaultServer(lambda seen: Answer(fault="" if seen.before else fault)) as server:
        (found,) = respond(make(server, timeout=timeout), ask())
        assert found.text == "4"


def test_a_pause_that_the_server_asks_for_is_kept_by_all():
    def plan(seen: Seen) -> Answer:
        wait = seen.text == "first" and not seen.before
        return Answer(fault="429", headers={"Retry-After": "0.6"}) if wait else Answer()

    with FaultServer(plan) as server:
        endpoint = make(server)

        async def main():
            first = asyncio.create_task(endpoint.respond(ask("first")))
            while not endpoint.usage["retries"]:
                await asyncio.sleep(0.01)
            await asyncio.gather(first, *(endpoint.respond(ask(f"later {i}")) for i in range(3)))

        asyncio.run(main())
    times = [seen.at - server.seen[0].at for seen in server.seen]
    assert len(times) == 5 and min(times[1:]) >= 0.6


def test_retry_after_is_read_in_all_its_forms():
    assert _retry_after({"retry-after": "7"}) == 7
    assert _retry_after({"retry-after-ms": "250", "retry-after": "7"}) == 0.25
    assert 28 < _retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) <= 30
    assert [_retry_after({"retry-after": text}) for text in ("", "soon", "-3", "nan", "inf")] == [0] * 5


def test_a_pause_longer_than_ten_minutes_ends_the_run():
    with FaultServer(lambda seen: Answer(fault="429", headers={"Retry-After": "86400"})) as server:
        with pytest.raises(UserError) as error:
            respond(make(server), ask())
    assert sentence(error).endswith("wants no request for the next 86400 s (HTTP 429): go on then")


def test_pauses_between_tries_grow():
    with FaultServer(lambda seen: Answer(fault="500")) as server:
        respond(make(server, retries=4, backoff=0.04), ask(), failures=True)
    times = [seen.at for seen in server.seen]
    pauses = [later - earlier for earlier, later in zip(times, times[1:], strict=False)]
    for number, pause in enumerate(pauses):  # half of 0.04 · 2^k at least
        assert pause >= 0.02 * 2**number


def test_an_outage_ends_the_run_and_the_same_command_goes_on(tmp_path):
    up = 10
    with FaultServer(lambda seen: Answer(fault="" if int(seen.text[-2:]) < up else "500")) as server:
        with pytest.raises(UserError) as error:
            judged_by(make(server, retries=1, concurrency=4), tmp_path, Graded(90))
        end = (
            "questions in a row had no reply, the last one for HTTP 500; the same command goes on when it is up again"
        )
        assert re.search(rf"is down: 2\d {end}$", sentence(error))
        rows = read_rows(tmp_path / "samples.jsonl")
        assert {row.id for row in rows if row.values} == {f"s{i:02}" for i in range(10)}
        assert len(rows) < 10 + 20  # not the 80 that were left
        up = 90
        rows = judged_by(make(server), tmp_path, Graded(90))
    assert len(rows) == 90 and sum(not row.values for row in rows) < 20


def test_a_success_between_failures_is_no_outage(tmp_path):
    with FaultServer(lambda seen: Answer(fault="" if int(seen.text[-2:]) % 10 == 9 else "500")) as server:
        rows = judged_by(make(server, retries=0, concurrency=1), tmp_path, Graded(50), batch_size=1)
    assert sum(bool(row.values) for row in rows) == 5


def test_a_refused_question_is_unscored_at_once(tmp_path):
    def plan(seen: Seen) -> Answer:
        text = "This model's maximum context length is 4096 tokens"
        return Answer(status=400, text=text, code="context_length_exceeded") if "poison" in seen.text else Answer()

    with FaultServer(plan) as server:
        rows = judged_by(make(server), tmp_path, Graded(3, poisoned=(1,)), batch_size=1)
        assert len(server.seen) == 3
    assert rows[1].reason == "endpoint judge-7b: refused with HTTP 400 context_length_exceeded"
    assert rows[1].raw.startswith("Error code: 400") or "maximum context length" in rows[1].raw
    assert rows[0].values and rows[2].values


def test_settings_that_the_server_refuses_from_the_start_end_the_run(tmp_path):
    with FaultServer(lambda seen: Answer(status=400, text="temperature is not supported")) as server:
        with pytest.raises(UserError) as error:
            judged_by(make(server), tmp_path, Graded(60))
    assert "temperature is not supported" in sentence(error)
    with FaultServer(lambda seen: Answer(status=429, text="You are out of it", code="insufficient_quota")) as server:
        with pytest.raises(UserError, match="no credit left"):
            respond(make(server), ask())
        assert len(server.seen) == 1


# ---- what is sent and what comes back ------------------------------------------------------------------------------


def test_sampling_is_sent_as_the_server_names_it():
    with FaultServer() as server:
        endpoint = make(server)
        messages = (Message("system", "be brief"), Message("user", "how ?"))
        greedy = Request(messages, Persona("ada", "never sent"), Sampling(max_new_tokens=9), ("a", "b"), "task")
        sampled = replace(greedy, sampling=Sampling(5, temperature=0.7, top_p=0.9, stop=("\n\n", "END"), seed=11))
        respond(endpoint, greedy)
        respond(endpoint, sampled)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "how ?"}]
    assert [seen.body for seen in server.seen] == [
        {"model": "judge-7b", "messages": chat, "max_tokens": 9, "temperature": 0.0},
        {
            "model": "judge-7b", "messages": chat, "max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "seed": 11,
            "stop": ["\n\n", "END"],
        },
    ]  # fmt: skip
    assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"


def test_a_reply_that_has_begun_is_sent_as_vllm_wants_it():
    with FaultServer() as server:
        respond(make(server), Request((Message("user", "how ?"),), prefill="<think> so"))
    body = server.seen[0].body
    assert body["messages"][1:] == [{"role": "assistant", "content": "<think> so"}]
    assert (body["add_generation_prompt"], body["continue_final_message"]) == (False, True)


def test_servers_with_another_name_for_max_tokens_are_asked_their_way():
    def plan(seen: Seen) -> Answer:
        old = "max_tokens" in seen.body
        return Answer(status=400, text="Unsupported parameter: use 'max_completion_tokens'") if old else Answer()

    with FaultServer(plan) as server:
        endpoint = make(server, retries=0)
        replies = respond(endpoint, *(ask(str(i)) for i in range(8)))
        before = len(server.seen)
        respond(endpoint, ask("again"))
        assert [reply.text for reply in replies] == ["4"] * 8
        assert len(server.seen) == before + 1 and server.seen[-1].body["max_completion_tokens"] == 64
        assert endpoint.usage["requests"] == len(server.seen)


def test_how_a_reply_ended():
    answers = {
        "whole": Answer(text="done"),
        "cut": Answer(text="and the", finish="length"),
        "withheld": Answer(text="", finish="content_filter"),
        "silent": Answer(text=None),  # type: ignore[arg-type]
        "half an emoji": Answer(text="\ud83d"),
    }
    with FaultServer(lambda seen: answers[seen.text]) as server:
        whole, cut, withheld, silent, emoji = respond(make(server), *(ask(text) for text in answers), failures=True)
    assert (whole.text, whole.finish_reason) == ("done", "eos")
    assert (cut.text, cut.finish_reason) == ("and the", "length")
    assert isinstance(withheld, Unscored) and "content filter" in withheld.reason
    assert silent.text == "" and emoji.text == "\ud83d"


def test_no_likelihoods_and_no_beams():
    endpoint = make("http://127.0.0.1:1/v1")
    assert endpoint.likelihoods is False and endpoint.name == "judge-7b"
    for question in (endpoint.choose(ask()), endpoint.loglikelihood(ask(), "yes")):
        with pytest.raises(UserError) as error:
            asyncio.run(question)
        assert sentence(error).startswith("endpoint judge-7b gives no log-likelihoods")
    with pytest.raises(UserError, match="no beam search: set num_beams=1"):
        asyncio.run(endpoint.respond(ask(num_beams=4)))


def test_usage_and_cost():
    counts = {"prompt_tokens": 1000, "completion_tokens": 50}
    with FaultServer(lambda seen: Answer(usage=None if seen.text == "abcdef" else counts)) as server:
        endpoint = make(server, price_in=2.0, price_out=10.0)
        respond(endpoint, ask("a"), ask("b"))
        assert endpoint.usage == {
            "requests": 2, "cached": 0, "retries": 0, "failed": 0, "unreported": 0, "prompt_tokens": 2000,
            "completion_tokens": 100, "cost": 0.005,
        }  # fmt: skip
        respond(endpoint, ask("abcdef"))  # six bytes: two tokens, and four around them
        assert estimate_tokens(["abcdef"]) == 6 and endpoint.usage["unreported"] == 1
        assert endpoint.usage["prompt_tokens"] == 2006
    json.dumps(endpoint.usage)


# ---- how fast ------------------------------------------------------------------------------------------------------


def test_sixteen_slow_calls_run_at_once():
    together = threading.Barrier(16)

    def plan(seen: Seen) -> Answer:
        together.wait(timeout=30)  # nobody is answered before all sixteen have asked
        return Answer()

    with FaultServer(plan) as server:
        respond(make(server), *(ask(str(i)) for i in range(16)))
    with FaultServer(lambda seen: Answer(seconds=0.1)) as server:
        respond(make(server, concurrency=3), *(ask(str(i)) for i in range(9)))
        assert server.most_open <= 3


def test_requests_per_minute_are_kept_from_the_first_on():
    per_second = 30
    with FaultServer(lambda seen: Answer(fault="500" if seen.text == "0" and not seen.before else "")) as server:
        endpoint = make(server, requests_per_minute=per_second * 60)
        started = time.monotonic()
        respond(endpoint, *(ask(str(i)) for i in range(25)))
    assert len(server.seen) == 26  # the second try counts as well
    for number, at in enumerate(sorted(seen.at for seen in server.seen)):
        assert at - started >= number / per_second - 0.005  # (a leaky bucket would let the first 30 through at once)


def test_tokens_per_minute_are_kept_and_what_is_not_used_is_given_back():
    usage = {"prompt_tokens": 40, "completion_tokens": 10}
    assert estimate_tokens(["0" * 99]) == 37
    with FaultServer(lambda seen: Answer(usage=usage)) as server:
        endpoint = make(server, tokens_per_minute=60_000, concurrency=1)
        started = time.monotonic()
        respond(endpoint, *(ask(f"{i:099}", max_new_tokens=1500) for i in range(9)))
    # 50 tokens a request, 1,000 a second: number n goes after n · 0.05 s. Without giving back it were n · 1.537 s.
    for number, seen in enumerate(server.seen):
        assert seen.at - started >= number * 0.05 - 0.005
    assert server.seen[-1].at - started < 8 * 1.537


# ---- caps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cap", "higher", "words"),
    [
        ({"max_requests": 10}, {"max_requests": 100}, "max_requests=10 is used up"),
        # 12 tokens a reply: 10 · 1 + 2 · 5 in millionths. The next one may take more, so at most 10 replies fit.
        ({"max_cost": 210e-6}, {"max_cost": 1.0}, "of max_cost=0.00021 is spent"),
    ],
)
@pytest.mark.parametrize("cache", [False, True])
def test_a_cap_stops_with_one_sentence_and_a_higher_one_goes_on(tmp_path, cap, higher, words, cache):
    settings = {"price_in": 1.0, "price_out": 5.0, "cache": str(tmp_path / "replies.sqlite") if cache else None}
    with FaultServer(lambda seen: Answer(seconds=0.02)) as server:
        judge = make(server, **settings, **cap)
        with pytest.raises(UserError) as error:
            judged_by(judge, tmp_path / "run", Graded(30))
        assert words in sentence(error) and "the same command goes on with a higher one" in sentence(error)
        assert judge.usage["cost"] <= cap.get("max_cost", 1) and judge.usage["requests"] <= 10
        kept = read_rows(tmp_path / "run" / "samples.jsonl")
        paid = len(server.seen)
        assert 0 < paid == len(kept) and all(row.values for row in kept)  # nothing that was paid for is lost
        rows = judged_by(make(server, **settings, **higher), tmp_path / "run", Graded(30))
    assert len(rows) == 30 and all(row.values for row in rows)
    assert len(server.seen) == 30


def test_a_cap_counts_tries_and_holds_while_calls_are_under_way():
    with FaultServer(lambda seen: Answer(fault="500" if seen.before < 1 else "")) as server:
        endpoint = make(server, max_requests=7)
        results = respond(endpoint, *(ask(str(i)) for i in range(6)), failures=True)
        assert len(server.seen) == endpoint.usage["requests"] == 7
    assert sum(isinstance(result, UserError) for result in results) == 5


# ---- the cache -----------------------------------------------------------------------------------------------------


def test_a_second_run_asks_nothing(tmp_path):
    cache = str(tmp_path / "cache" / "replies.sqlite")
    with FaultServer(lambda seen: Answer(fault="" if seen.before else "500")) as server:
        first = judged_by(make(server, cache=cache), tmp_path / "1", Graded(12))
        asked = len(server.seen)
        again = make(server, cache=cache)
        second = judged_by(again, tmp_path / "2", Graded(12))
        assert len(server.seen) == asked == 24
        usage = again.usage
        assert (usage["requests"], usage["cached"], usage["cost"]) == (0, 12, 0)
        url = server.url
    assert [row.line() for row in first] == [row.line() for row in second]
    # What is kept can be had without server and key.
    os.environ.pop("OPENAI_API_KEY")
    offline = make(url, cache=cache, retries=0)
    assert judged_by(offline, tmp_path / "3", Graded(12)) == first
    with pytest.raises(UserError) as error:
        judged_by(offline, tmp_path / "4", Graded(13))
    assert f"nothing answers at {url}" in sentence(error)


def test_the_cache_tells_everything_apart_that_was_asked(tmp_path):
    cache = str(tmp_path / "replies.sqlite")
    with FaultServer(models=["judge-7b", "other"]) as server:
        requests = [
            ask("a"), ask("b"), ask("a", max_new_tokens=5), ask("a", temperature=0.5), ask("a", stop=("x",)),
            ask("a", temperature=0.5, seed=1), ask("a", temperature=0.5, top_p=0.5),
            Request((Message("system", "a"),)), Request((Message("user", "a"), Message("user", "a"))),
        ]  # fmt: skip
        respond(make(server, cache=cache), *requests)
        respond(make(server, cache=cache, model="other"), ask("a"))
        assert len(server.seen) == len(requests) + 1
        respond(make(server, cache=cache), *requests, ask("a", seed=4))  # a seed is nothing to a greedy reply
        assert len(server.seen) == len(requests) + 1
    with FaultServer(lambda seen: Answer(text="elsewhere")) as server:
        (reply,) = respond(make(server, cache=cache), ask("a"))
        assert reply.text == "elsewhere"


def test_failures_are_not_kept(tmp_path):
    cache = str(tmp_path / "replies.sqlite")
    with FaultServer(lambda seen: Answer(fault="" if seen.before > 1 else "500")) as server:
        (failed,) = respond(make(server, cache=cache, retries=1), ask(), failures=True)
        assert isinstance(failed, Unscored)
        (reply,) = respond(make(server, cache=cache), ask())
        assert reply.text == "4"


FILL = """
import sys
from persona.evaluation.endpoints.reply_cache import ReplyCache
from persona.types import Response
print("ready", flush=True)
sys.stdin.readline()
cache = ReplyCache(sys.argv[1])
for i in range(200):
    kept = cache.put(f"key {i}", Response(f"{sys.argv[2]} {i}"))
    assert cache.get(f"key {i}") == kept
print(sum(cache.get(f"key {i}").text.startswith(sys.argv[2]) for i in range(200)))
"""


def test_several_processes_fill_one_cache(tmp_path):
    path = tmp_path / "replies.sqlite"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", FILL, str(path), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in "abcdef"
    ]
    assert [process.stdout.readline() for process in started] == ["ready\n"] * 6
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0] * 6
    assert sum(int(out) for out, _ in outputs) == 200  # each reply is that of one process, for all of them
    assert len(ReplyCache(path)) == 200


def test_a_cache_that_is_none(tmp_path):
    (tmp_path / "notes.txt").write_text("not a data base, but long enough to be taken for one\n" * 100)
    with pytest.raises(UserError, match=r"notes\.txt cannot be used"):
        ReplyCache(tmp_path / "notes.txt")
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE invoices (number INTEGER)")
    other.commit()
    other.close()
    with pytest.raises(UserError, match=r"other\.sqlite is no cache of replies"):
        ReplyCache(tmp_path / "other.sqlite")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        ReplyCache(tmp_path / "file" / "replies.sqlite")


# ---- keys ----------------------------------------------------------------------------------------------------------


def test_the_key_is_nowhere(tmp_path, caplog, capfd):
    """Not even from a server that repeats it in errors, in bodies that are none, and in replies."""
    caplog.set_level(logging.DEBUG)

    def plan(seen: Seen) -> Answer:
        said = seen.headers["authorization"]
        if "poison" in seen.text:
            return Answer(status=(500, 400)[int(seen.text.split("essay ")[1][:2]) % 2], text=f"bad key: {said}")
        return Answer(text=f"your key is {said}")

    with FaultServer(plan) as server:
        judge = make(server, retries=1, cache=str(tmp_path / "replies.sqlite"))
        rows = judged_by(judge, tmp_path / "run", Graded(8, poisoned=(2, 3)))
        assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"
    assert "[key]" in rows[0].raw and "[key]" in rows[2].raw + rows[3].raw
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"samples.jsonl", "summary.json", "replies.sqlite"} <= {path.name for path in files}
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path
    assert len(caplog.records) > 10
    for record in caplog.records:
        assert KEY not in record.getMessage() and KEY not in repr(record.__dict__)
    captured = capfd.readouterr()
    assert KEY not in captured.out + captured.err
    assert KEY not in repr(judge.config) + repr(vars(judge)) + json.dumps(judge.usage)


def test_a_refused_key_and_no_key():
    with FaultServer(key="another") as server:
        for question in (check, lambda endpoint: respond(endpoint, ask())):
            with pytest.raises(UserError) as error:
                question(make(server))
            assert sentence(error) == f"{server.url} refuses the key in OPENAI_API_KEY (HTTP 401)"
        with pytest.raises(UserError) as error:
            check(make(server, api_key_env="MY_OTHER_KEY"))
        assert sentence(error) == f"{server.url} refuses a request without a key (MY_OTHER_KEY is not set) (HTTP 401)"
    with FaultServer() as server:  # a server on this machine may ask for none
        check(make(server, api_key_env="MY_OTHER_KEY"))
    with pytest.raises(UserError) as error:
        check(make("https://models.example.org/v1", api_key_env="MY_OTHER_KEY"))
    assert sentence(error) == "https://models.example.org/v1 needs a key: set the environment variable MY_OTHER_KEY"


def test_a_key_that_is_none(monkeypatch):
    with FaultServer(key="abc") as server:
        monkeypatch.setenv("OPENAI_API_KEY", " abc\n")  # as `export KEY=$(cat file)` or an editor leaves it
        check(make(server))
        for bad in ("two words", "naïve", "line\nbreak"):
            monkeypatch.setenv("OPENAI_API_KEY", bad)
            with pytest.raises(UserError) as error:
                check(make(server))
            assert sentence(error).startswith("the environment variable OPENAI_API_KEY holds")
            assert bad not in str(error.value)


# ---- before the run ------------------------------------------------------------------------------------------------


def test_nothing_listens(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        judged_by(make(url, backoff=1.0), tmp_path, Graded(3))
    assert sentence(error) == (
        f"nothing answers at {url} (no connection): start the server there, or correct base_url"
    )
    assert time.monotonic() - started < 20  # six pauses were 30 s


def test_a_model_that_the_server_does_not_have():
    def plan(seen: Seen) -> Answer:
        known = seen.body["model"] in ("judge-7b", "judge-70b")
        return Answer() if known else Answer(status=404, text=f"The model {seen.body['model']} does not exist.")

    with FaultServer(plan, models=["judge-7b", "judge-70b", "writer"]) as server:
        check(make(server))
        assert server.seen == []
        with pytest.raises(UserError) as error:
            check(make(server, model="jugde-7b"))
        assert sentence(error) == (
            f"{server.url} does not answer for the model jugde-7b (HTTP 404); did you mean judge-7b?"
        )
        with pytest.raises(UserError) as error:
            respond(make(server, model="jugde-7b"), ask())
        assert f"{server.url} has no model jugde-7b, or is not the right address" in sentence(error)
    # One that answers to any name, as itself.
    with FaultServer(lambda seen: Answer(model="judge-7b")) as server:
        with pytest.raises(UserError) as error:
            check(make(server, model="jugde-7b"))
        assert sentence(error) == (
            f"{server.url} has no model jugde-7b: it answers as judge-7b; did you mean judge-7b?"
        )


def test_an_alias_that_the_server_does_not_list(caplog):
    with FaultServer(lambda seen: Answer(model="judge-7b:latest"), models=["judge-7b:latest"]) as server:
        endpoint = make(server)
        check(endpoint)
        check(endpoint)  # known from the first time
        assert len(server.seen) == 1 and "does not list the model judge-7b" in caplog.text
    with FaultServer(models=None) as server:  # and one that lists nothing at all
        check(make(server))
        check(make(server, model="whatever"))


def test_no_proxy_stands_before_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with FaultServer() as server:
        check(make(server))


def test_an_address_that_a_server_wrote_into_a_file(tmp_path, monkeypatch):
    """Replies and results go by the file's name: the server that comes back elsewhere is the same one."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    address = tmp_path / "judge.url"
    with pytest.raises(UserError) as error:
        make(f"file:{address}")
    assert f"base_url=file:{address}: no server has written its address there" in sentence(error)
    for _ in range(2):
        with FaultServer() as server:
            address.write_text(server.url + "\n")
            endpoint = make(f"file:{address}", cache=str(tmp_path / "cache.sqlite"))
            assert respond(endpoint, ask())[0].text == "4"
            assert endpoint.config.base_url == f"file:{address}"
            asked = len(server.seen)
    assert asked == 0  # of the second server: the reply was there


def test_a_base_url_without_its_path():
    with FaultServer() as server:
        with pytest.raises(UserError) as error:
            check(make(server.url.removesuffix("/v1")))
    assert sentence(error).endswith("(many servers answer below /v1: is it missing in base_url?)")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": ""}, "needs a model and a base_url"),
        ({"base_url": "localhost:8000/v1"}, "should look like http://localhost:8000/v1"),
        ({"base_url": "http://localhost:port/v1"}, "is no address"),
        ({"base_url": "https://me:secret@host/v1"}, "belongs into the environment"),
        ({"base_url": "https://host/v1?key=secret"}, "belongs into the environment"),
        ({"timeout": 0}, "timeout=0 has to be greater than 0"),
        ({"requests_per_minute": float("nan")}, "requests_per_minute=nan has to be greater than 0"),
        ({"retries": -1}, "retries=-1 has to be 0 or more"),
        ({"max_cost": 1.0}, "never reached"),
    ],
)
def test_settings_that_cannot_be_meant(settings, words):
    with pytest.raises(UserError) as error:
        make("http://localhost/v1", **settings)
    assert words in sentence(error) and "secret" not in str(error.value)


# ---- event loops ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_one_endpoint_serves_several_event_loops(tmp_path):
    """Each stack of a run has a loop of its own; connections of the one before are closed and do not disturb."""
    with FaultServer() as server:
        judge = make(server, concurrency=2)
        for number in range(3):
            rows = judged_by(judge, tmp_path / str(number), Graded(6))
            assert all(row.values for row in rows)
        gc.collect()  # what was left open complains now
        assert judge.usage["requests"] == 18 and judge._live == {}


# ---- personalizers of the prompt -----------------------------------------------------------------------------------


def test_a_description_and_retrieved_items_in_front_of_an_endpoint(llama):
    texts = ("the red house by the river", "small boats in the rain", "a long walk", "good morning")
    history = tuple(HistoryItem(str(number), text) for number, text in enumerate(texts))
    ada = Persona("ada", "ada likes the rain .", history=history)
    tokens_only = SimpleNamespace(tokenizer=llama.tokenizer, device="cpu")  # an endpoint needs no local weights
    for base in (llama, tokens_only):
        stack = [Retrieval(RetrievalConfig(ranker="bm25", k=1, max_length=400), base), Description()]
        with FaultServer() as server:
            personalized = PersonalizedEndpoint(make(server), stack)
            request = Request((Message("user", "do you like boats ?"),), ada)
            respond(personalized, request)
            (system, user) = server.seen[0].body["messages"]
            assert system == {"role": "system", "content": "ada likes the rain ."}
            assert "small boats in the rain" in user["content"] and "do you like boats ?" in user["content"]
            assert "red house" not in user["content"]
            assert personalized.usage["requests"] == 1
            assert personalized.name == "judge-7b" and not personalized.likelihoods
    with pytest.raises(UserError, match="gives no log-likelihoods"):
        asyncio.run(personalized.choose(ask()))


def test_a_personalized_endpoint_is_measured_like_any_model(tmp_path):
    class Echo(Benchmark):
        name, version, metrics = "echo", "1", {"told": Metric()}

        def samples(self):
            people = [Persona(name, f"i am {name} .") for name in ("ada", "ben", "cleo")]
            return [Sample(p.id, (Message("user", "who are you ?"),), p.description, p) for p in people]

        async def episode(self, sample, roles):
            reply = await roles.model.respond(Request(sample.messages, sample.persona))
            return Score({"told": float(reply.text == sample.target)}, raw=reply.text)

    with FaultServer(lambda seen: Answer(text=seen.body["messages"][0]["content"])) as server:
        for stack, told in (([Description()], 1.0), ([], 0.0)):
            model = PersonalizedEndpoint(make(server), stack)
            summary = run_benchmark(
                Echo(), model, tmp_path / str(told), stack="x", settings={}, progress=False, batch_size=4
            )
            assert summary.estimates["told"].value == told
            assert summary.environment["usage"]["model"]["requests"] == 3


def test_the_command_measures_a_server_under_a_stack_and_lets_another_judge(tmp_path):
    with FaultServer(models=("writer",)) as writer, FaultServer(lambda seen: Answer(text="4")) as grader:
        given = ["benchmark=personagym", "benchmark.limit=3", "judge=endpoint", f"output={tmp_path}", "trivial=false"]
        model = ["endpoint.model=writer", f"endpoint.base_url={writer.url}", "personalizers=[description]"]
        judge = ["judge.endpoint.endpoint.model=judge-7b", f"judge.endpoint.endpoint.base_url={grader.url}"]
        folder = evaluate(load_config("evaluate", [*given, *model, *judge]))
    rows = read_rows(folder / "description" / "samples.jsonl")
    assert len(rows) == 3 and {verdict.judge for row in rows for verdict in row.verdicts} == {"judge-7b"}
    settings = read_summary(folder / "description").settings
    assert settings["model"] == {"endpoint": "writer", "base_url": writer.url}
    assert settings["stack"][0][0] == "description" and settings["judge"]["endpoint"]["model"] == "judge-7b"


@pytest.mark.parametrize("door", ["embeddings", "modules"])
def test_other_doors_are_refused(door):
    kind = type("Inner", (Personalizer,), {"method": "inner", door: lambda self, requests: None})
    with pytest.raises(UserError) as error:
        PersonalizedEndpoint(make("http://127.0.0.1:1/v1"), [Description(), kind()])
    assert sentence(error).startswith(f"personalizer inner acts on {door}, which judge-7b, an endpoint,")


# ---- a real server -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")),
    reason="transformers serve needs fastapi and uvicorn",
)
def test_transformers_serve_as_judge(root, tmp_path):
    """The town's LM over HTTP says what it says here, as a judge and as a model."""
    folder = str(root / "persona" / "town" / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(port), "--device", "cpu"),
    ]
    things = ("bakery", "party", "train", "market", "soup", "garden", "boat", "walk")
    rubric = replace(GRADE, prompt=Prompt("how", "how was the {{ reply }} ?"), parse=lambda text: len(text.split()))

    class Asked(Benchmark):
        name, version, needs, metrics = "asked", "1", ("judge",), {"words": Metric()}

        def samples(self):
            return [Sample(thing, (Message("user", thing),)) for thing in things]

        async def episode(self, sample, roles):
            (verdict,) = await roles.judge(rubric, reply=sample.id)
            return Score({"words": float(verdict.value)}, raw=verdict.raw)

    with open(tmp_path / "server.log", "w") as output:
        environment = os.environ | {"HF_HOME": str(tmp_path / "hub")}
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            deadline = time.monotonic() + 120
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()
                time.sleep(0.2)
            settings = {"api_key_env": "NO_SUCH_KEY", "backoff": 0.1, "retries": 2, "concurrency": 4}
            url = f"http://127.0.0.1:{port}/v1"
            judge = make(url, model=folder, **settings)
            rows = judged_by(judge, tmp_path / "run", Asked())
            with pytest.raises(UserError, match="does not answer for the model nobody"):
                check(make(url, model="nobody", **settings))
        finally:
            server.terminate()
            server.wait(timeout=30)
    requests = [ask(f"how was the {thing} ?", max_new_tokens=16) for thing in things]
    local = persona.load("town").respond(requests)
    assert [row.raw for row in rows] == [reply.text for reply in local]
    assert [row.values["words"] for row in rows] == [len(reply.text.split()) for reply in local]
    usage = judge.usage  # one request is the check: such a server does not list a folder
    assert (usage["requests"], usage["failed"], usage["retries"], usage["unreported"]) == (9, 0, 0, 0)
