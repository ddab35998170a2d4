"""What a run asks of endpoints: which questions again at the next start, and what is counted over all starts."""

import asyncio
import gc
import os
import signal
import threading
import time

import pytest
from evaluation_toys import ToyModel
from fault_server import Answer, FaultServer
from test_episodes import Share

from persona.errors import UserError
from persona.evaluation import runner
from persona.evaluation.endpoints.endpoint import Endpoint, EndpointConfig
from persona.evaluation.episodes import Benchmark, run_benchmark
from persona.evaluation.judges.judging import Rubric
from persona.evaluation.judges.parsing import parse_integer
from persona.evaluation.prompts import Prompt
from persona.evaluation.results import read_rows, read_summary
from persona.evaluation.roles import Cast
from persona.evaluation.statistics import Metric
from persona.types import Message, Request, Sample, Score


class Graded(Benchmark):
    """The model answers each question, and all judges grade the answer: the mean of those that can be read."""

    name, version, metrics = "graded", "1", {"grade": Metric()}

    def __init__(self, n=40):
        prompt = Prompt("rubric", "Grade this from 1 to 5: {{answer}}")
        self.rubric = Rubric(prompt, lambda reply: parse_integer(reply, 1, 5), (1.0, 5.0), 8)
        self.n = n

    def samples(self):
        return [Sample(f"s{i:02}", (Message("user", f"question {i} #3"),), target="3") for i in range(self.n)]

    async def episode(self, sample, roles):
        reply = await roles.model.respond(Request(sample.messages))
        verdicts = tuple(await roles.judge(self.rubric, answer=f"{sample.id} {reply.text}"))
        values = [verdict.value for verdict in verdicts if verdict.value is not None]
        if not values and verdicts:
            return Score(reason="no verdict", raw=reply.text, verdicts=verdicts)
        return Score({"grade": sum(values) / max(len(values), 1)}, raw=reply.text, verdicts=verdicts)


def endpoint(server, **more):
    return Endpoint(EndpointConfig("judge-7b", server.url, **({"retries": 0} | more)), backoff=0.01)


def run(tmp_path, folder, cast, n=40, **more):
    benchmark = Graded(n)
    return run_benchmark(benchmark, cast, tmp_path / folder, stack="toy", settings={}, progress=False, **more)


def fails_for(*ids, text="4", fault="500"):
    return lambda seen: Answer(fault=fault) if any(id in seen.text for id in ids) else Answer(text=text)


def test_a_judge_that_could_not_be_asked_is_asked_again_at_the_next_start(tmp_path):
    with FaultServer(fails_for("s03 ", "s17 ")) as server:
        first = run(tmp_path, "a", Cast(ToyModel(1.0), [endpoint(server)]))
        rows = {row.id: row for row in read_rows(tmp_path / "a" / "samples.jsonl")}
        assert first.n_unscored == 2 and [id for id, row in rows.items() if row.failed] == ["s03", "s17"]
        assert rows["s03"].reason == "no verdict" and rows["s03"].verdicts[0].failed and not rows["s04"].failed
        server.plan = fails_for("s17 ")
        server.seen.clear()
        assert run(tmp_path, "a", Cast(ToyModel(1.0), [endpoint(server)])).n_unscored == 1
        server.plan = fails_for()
        assert run(tmp_path, "a", Cast(ToyModel(1.0), [endpoint(server)])).n_unscored == 0
        assert sorted(seen.text.split()[-2] for seen in server.seen) == ["s03", "s17", "s17"]
        model = ToyModel(1.0)
        last = run(tmp_path, "a", Cast(model, [endpoint(server)]))
        assert model.batches == [] and len(server.seen) == 3  # nothing is left to ask
        run(tmp_path, "whole", Cast(ToyModel(1.0), [endpoint(server)]))
    contents = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("a", "whole")]
    assert contents[0] == contents[1]
    assert last.environment["usage"]["judge 1"]["requests"] == 40 + 2 + 1
    assert last.environment["usage"]["judge 1"]["failed"] == 3


def test_the_model_that_could_not_be_asked_is_asked_again_and_one_that_said_nothing_of_use_is_not(tmp_path):
    with FaultServer(fails_for("question 5 ", fault="nothing")) as model, FaultServer(fails_for("s07 ")) as judge:
        cast = Cast(endpoint(model), [endpoint(judge)])
        run(tmp_path, "a", cast)
        rows = {row.id: row for row in read_rows(tmp_path / "a" / "samples.jsonl")}
        assert rows["s05"].failed and rows["s05"].reason == "endpoint judge-7b: the connection was cut after 1 try"
        judge.plan = lambda seen: Answer(text="I would rather not say.")
        model.plan = fails_for()
        run(tmp_path, "a", Cast(endpoint(model), [endpoint(judge)]))
        rows = {row.id: row for row in read_rows(tmp_path / "a" / "samples.jsonl")}
        assert {id for id, row in rows.items() if not row.values} == {"s05", "s07"}  # now they cannot be read
        assert not any(row.failed for row in rows.values())
        before = len(judge.seen)
        assert run(tmp_path, "a", Cast(endpoint(model), [endpoint(judge)])).n_unscored == 2
        assert len(judge.seen) == before


def test_a_sample_that_another_judge_has_scored_stays_as_it_is(tmp_path):
    with FaultServer(fails_for("s03 "), models=("one",)) as one, FaultServer(models=("two",)) as two:
        cast = Cast(ToyModel(1.0), [Endpoint(EndpointConfig(name, server.url, retries=0), backoff=0.01)
                                    for name, server in (("one", one), ("two", two))])  # fmt: skip
        assert run(tmp_path, "a", cast).n_unscored == 0
        row = read_rows(tmp_path / "a" / "samples.jsonl")[3]
        assert [verdict.failed for verdict in row.verdicts] == [True, False] and row.values and not row.failed


def test_a_row_of_a_failed_call_never_takes_the_place_of_another(tmp_path):
    """It may lie in the part of any process, in any order."""
    with FaultServer(fails_for("s03 ")) as server:
        run(tmp_path, "a", Cast(ToyModel(1.0), [endpoint(server)]))
        failed = (tmp_path / "a" / "samples.jsonl").read_bytes().splitlines(keepends=True)[3]
        server.plan = fails_for()
        run(tmp_path, "a", Cast(ToyModel(1.0), [endpoint(server)]))
        (tmp_path / "a" / "samples.part1.jsonl").write_bytes(failed)
        server.seen.clear()
        assert run(tmp_path, "a", Cast(ToyModel(1.0), [endpoint(server)])).n_unscored == 0
        assert server.seen == [] and not (tmp_path / "a" / "samples.part1.jsonl").exists()


def test_usage_is_that_of_all_processes_and_all_starts(tmp_path):
    counts = {"prompt_tokens": 10, "completion_tokens": 2}
    with FaultServer() as server:
        server.plan = lambda seen: Answer(usage=counts) if len(server.seen) <= 15 else Answer(fault="500")
        with pytest.raises(UserError, match="is down"):
            run(tmp_path, "a", Cast(ToyModel(1.0), [endpoint(server, price_in=1.0, concurrency=4)]))
        kept = [row for row in read_rows(tmp_path / "a" / "samples.jsonl") if not row.failed]
        server.plan = lambda seen: Answer(usage=counts)
        barrier, found = threading.Barrier(3), []

        def work(rank):
            cast = Cast(ToyModel(1.0), [endpoint(server, price_in=1.0)])  # each process has an account of its own
            found.append(run(tmp_path, "a", cast, processes=Share(rank, barrier)))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    usage = read_summary(tmp_path / "a").environment["usage"]["judge 1"]
    # What was under way when the first run ended is at most as much as may be asked at once.
    assert 0 <= usage["requests"] - len(server.seen) <= 4 and usage["failed"] >= 20
    answered = usage["prompt_tokens"] / 10
    assert 40 <= answered <= 15 + 40 - len(kept) + 4 and usage["completion_tokens"] == 2 * answered
    assert usage["cost"] == pytest.approx(answered * 10 / 1e6)
    assert len(found) == 3 and found[0] == found[1] == found[2]
    assert len(runner.usage_files(tmp_path / "a" / "samples.jsonl")) == 3
    run(tmp_path, "a", Cast(ToyModel(1.0)), overwrite=True)
    assert not runner.usage_files(tmp_path / "a" / "samples.jsonl")
    assert "usage" not in read_summary(tmp_path / "a").environment


def test_what_a_killed_run_had_noted_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_USAGE_SECONDS", 0.01)
    with FaultServer(lambda seen: Answer(seconds=0.02)) as server:
        child = os.fork()
        if not child:
            try:
                run(tmp_path, "a", Cast(ToyModel(1.0), [endpoint(server, concurrency=1)]))
            finally:
                os._exit(0)
        path, deadline = tmp_path / "a" / "samples.jsonl", time.monotonic() + 30
        while not (path.exists() and path.read_bytes().count(b"\n") >= 10) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kept = len(read_rows(path))
        noted = runner.usage(path)["judge 1"]["requests"]
        assert 10 <= kept < 40 and kept - 2 <= noted <= len(server.seen)
        asked = len(server.seen)
        server.plan = lambda seen: Answer()
        summary = run(tmp_path, "a", Cast(ToyModel(1.0), [endpoint(server)]))
        assert len(server.seen) - asked == 40 - kept
    assert summary.environment["usage"]["judge 1"]["requests"] == noted + 40 - kept


def test_a_stopped_run_complains_of_no_question(tmp_path, caplog):
    """A signal between two questions: what was asked of one before waits for nobody, and Python would say so."""

    async def waits():
        await asyncio.sleep(60)

    async def episode(item, roles):
        asyncio.gather(waits(), waits())  # not yet awaited
        await asyncio.sleep(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run_episodes([1], episode, Cast(ToyModel()), tmp_path / "rows.jsonl", who="it", batch_size=1,
                            title="it", total=1, show=False)  # fmt: skip
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
