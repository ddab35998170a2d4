import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from evaluation_toys import Ratings, ToyModel

import persona
from persona.errors import UserError
from persona.evaluation.episodes import Benchmark, Cast, Unscored, data_fingerprint, run_benchmark
from persona.evaluation.judges.judging import Rubric
from persona.evaluation.prompts import Prompt
from persona.evaluation.results import Row, read_rows, read_summary
from persona.evaluation.statistics import Metric
from persona.files import LineWriter
from persona.types import Message, Request, Sample, Sampling, Score

SETTINGS = {"base_model": "toy", "personalizers": [], "sampling": asdict(Sampling()), "seed": 0}


def run(benchmark, model, folder, settings=SETTINGS, **more):
    return run_benchmark(benchmark, model, folder, stack="toy", settings=settings, progress=False, **more)


class Probe(Benchmark):
    """A benchmark whose episode is given by the test."""

    name, version, metrics = "probe", "1", {"x": Metric()}

    def __init__(self, episode, n=10):
        self._episode, self._n = episode, n

    def samples(self):
        return [Sample(f"s{i}", (Message("user", "ha " * (i + 1) + "#3"),), target="yes no") for i in range(self._n)]

    def cluster(self, sample):
        return sample.id

    async def episode(self, sample, roles):
        return await self._episode(sample, roles)


def test_a_run_by_hand(tmp_path):
    summary = run(Ratings(60), ToyModel(0.5), tmp_path / "a")
    rows = read_rows(tmp_path / "a" / "samples.jsonl")
    assert [row.id for row in rows] == [f"r{i:04}" for i in range(60)]
    scored = [row for row in rows if row.values]
    assert summary.n == 60 and 0 < summary.n_unscored == 60 - len(scored)
    assert summary.unscored_reasons == {"the reply is not a number": summary.n_unscored}
    accuracy = sum(row.raw == row.target for row in scored) / len(scored)
    assert summary.estimates["accuracy"].value == pytest.approx(accuracy)
    assert summary.estimates["accuracy"].n_clusters == 14
    assert rows[0].items == ("The soup at 0 Mill Road → 1",) and rows[0].n_items == 1
    assert read_summary(tmp_path / "a") == summary


def test_batches_are_full_sorted_by_length_and_the_results_do_not_depend_on_them(tmp_path):
    alone, together = ToyModel(), ToyModel()
    run(Ratings(60), alone, tmp_path / "alone", batch_size=1)
    run(Ratings(60), together, tmp_path / "together", batch_size=16)
    sizes = [len(texts) for _, texts in together.batches]
    assert sum(sizes) == 120 and len(sizes) == 2 * 4  # 16 + 16 + 16 + 12 of each kind
    assert len(alone.batches) == 120
    for _, texts in together.batches:
        assert [len(text) for text in texts] == sorted((len(text) for text in texts), reverse=True)
    same = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("alone", "together")]
    assert same[0] == same[1]


def test_an_episode_may_ask_many_things_at_once_and_in_turns(tmp_path):
    async def episode(sample, roles):
        request = Request(sample.messages, options=("a", "bbb"))
        chosen, first, second = await asyncio.gather(
            roles.model.choose(request),
            roles.model.loglikelihood(request, "yes"),
            roles.model.loglikelihood(request, "yes no"),
        )
        await asyncio.sleep(0)
        reply = await roles.model.respond(request)
        right = chosen == [-1.0, -3.0] and (first[1], second[1]) == (1, 2) and reply.text == "3"
        return Score({"x": float(right)}, raw=reply.text)

    model = ToyModel(1.0)
    summary = run(Probe(episode), model, tmp_path, batch_size=5)
    assert summary.estimates["x"].value == 1.0
    assert sorted((kind, len(texts)) for kind, texts in model.batches) == (
        [("choose", 5)] * 2 + [("loglikelihood", 5)] * 4 + [("respond", 5)] * 2
    )


def test_requests_that_decode_differently_do_not_share_a_batch(tmp_path):
    async def episode(sample, roles):
        sampling = Sampling(temperature=float(int(sample.id[1:]) % 2), seed=int(sample.id[1:]))
        reply = await roles.model.respond(Request(sample.messages, sampling=sampling))
        return Score({"x": 1.0}, raw=reply.text)

    model = ToyModel(1.0)
    seen = []
    respond = model.respond
    model.respond = lambda requests: seen.append({r.sampling.temperature for r in requests}) or respond(requests)
    run(Probe(episode), model, tmp_path)
    assert sorted(seen, key=sorted) == [{0.0}, {1.0}]


class Stops(ToyModel):
    """Fails at the n-th batch, as a machine does that is switched off."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def respond(self, requests):
        if len(self.batches) >= self.at:
            raise RuntimeError("out of memory")
        return super().respond(requests)


@pytest.mark.parametrize("at", [0, 3, 20])
def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(tmp_path, at):
    run(Ratings(60), ToyModel(), tmp_path / "whole", batch_size=4)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(Ratings(60), Stops(at), tmp_path / "broken", batch_size=4)
    path = tmp_path / "broken" / "samples.jsonl"
    kept = {row.id for row in read_rows(path)}
    assert bool(kept) == (at == 20)
    with open(path, "ab") as stream:
        stream.write(b'{"id": "r0059", "clus')  # killed in the middle of a line
    model = ToyModel()
    summary = run(Ratings(60), model, tmp_path / "broken", batch_size=4)
    assert sum(len(texts) for kind, texts in model.batches if kind == "respond") == 60 - len(kept)
    assert path.read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    assert summary.estimates == read_summary(tmp_path / "whole").estimates
    again = ToyModel()
    assert run(Ratings(60), again, tmp_path / "broken") == summary and again.batches == []


def test_kill_nine_loses_no_finished_row(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from evaluation_toys import Ratings, ToyModel
from test_episodes import run
class Slow(ToyModel):
    def respond(self, requests):
        time.sleep(0.05)
        return super().respond(requests)
run(Ratings(60), Slow(), {str(tmp_path / "killed")!r}, batch_size=2)
"""
    child = subprocess.Popen([sys.executable, "-c", script])
    path, deadline = tmp_path / "killed" / "samples.jsonl", time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") >= 10) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    kept = len(read_rows(path))
    assert 10 <= kept < 60
    model = ToyModel()
    run(Ratings(60), model, tmp_path / "killed", batch_size=2)
    run(Ratings(60), ToyModel(), tmp_path / "whole", batch_size=2)
    assert path.read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    assert sum(len(texts) for kind, texts in model.batches if kind == "respond") == 60 - kept


@pytest.mark.slow
@pytest.mark.multi_process
def test_killed_ten_times_on_two_processes_the_samples_are_those_of_an_uninterrupted_run(tmp_path):
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from accelerate import PartialState
from evaluation_toys import Ratings, ToyModel
from test_episodes import run
processes = PartialState(cpu=True)
class Slow(ToyModel):
    def respond(self, requests):
        time.sleep(0.03)
        return super().respond(requests)
run(Ratings(500), Slow(), sys.argv[1], batch_size=1, processes=processes)
"""

    def launch(folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            subprocess.Popen(
                [sys.executable, "-c", script, str(folder)],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.DEVNULL,
            )
            for rank in range(2)
        ]

    def rows(folder):
        return sum(path.read_bytes().count(b"\n") for path in folder.glob("samples*.jsonl"))

    def wait_for_rows(folder, more):
        deadline = time.monotonic() + 100
        while rows(folder) < more and time.monotonic() < deadline:
            time.sleep(0.005)
        return time.monotonic()

    launched, children = time.monotonic(), launch(tmp_path / "whole")
    begun = wait_for_rows(tmp_path / "whole", 1)
    assert [child.wait(300) for child in children] == [0, 0]
    starting, working = begun - launched, time.monotonic() - begun
    rng, counts = random.Random(0), [0]
    for kill in range(10):
        children = launch(tmp_path / "killed")
        if kill % 5 == 4:  # before work goes on
            time.sleep(rng.random() * starting / 2)
        else:  # well into it
            wait_for_rows(tmp_path / "killed", counts[-1] + 1)
            time.sleep(rng.random() * working / 12)
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
        assert [child.wait() for child in children] == [-signal.SIGKILL] * 2, "the run was over before it was killed"
        counts.append(rows(tmp_path / "killed"))
    print(f"rows after each kill: {counts}")
    assert counts == sorted(counts) and counts[-1] < 500 and len(set(counts)) > 8, counts
    assert [child.wait(300) for child in launch(tmp_path / "killed")] == [0, 0]
    ids = [row.id for row in read_rows(tmp_path / "killed" / "samples.jsonl")]
    assert len(ids) == len(set(ids)) == 500
    contents = [(tmp_path / run / "samples.jsonl").read_bytes() for run in ("whole", "killed")]
    assert contents[0] == contents[1]
    assert read_summary(tmp_path / "whole").estimates == read_summary(tmp_path / "killed").estimates


class Share:
    """One of several processes (threads here; accelerate's PartialState in a launch)."""

    def __init__(self, rank, barrier):
        self.process_index, self.num_processes, self._barrier = rank, barrier.parties, barrier

    def wait_for_everyone(self):
        self._barrier.wait(30)


def test_three_processes_give_the_same_files_as_one_also_after_a_change_of_their_number(tmp_path):
    run(Ratings(50), ToyModel(), tmp_path / "one")
    with pytest.raises(RuntimeError):
        run(Ratings(50), Stops(20), tmp_path / "three", batch_size=4)
    left = read_rows(tmp_path / "three" / "samples.jsonl")
    LineWriter(tmp_path / "three" / "samples.part5.jsonl").write(left[0].line())  # left by a larger launch, seen twice
    barrier, found = threading.Barrier(3), []

    def work(rank):
        found.append(run(Ratings(50), ToyModel(), tmp_path / "three", processes=Share(rank, barrier)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and found[0] == found[1] == found[2]
    assert found[0].estimates == read_summary(tmp_path / "one").estimates
    names = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("one", "three")]
    assert names[0] == names[1] == ["meta.json", "samples.jsonl", "summary.json"]
    contents = [(tmp_path / run / "samples.jsonl").read_bytes() for run in ("one", "three")]
    assert contents[0] == contents[1]


def test_works_inside_a_running_loop_as_in_a_notebook(tmp_path):
    async def cell():
        return run(Ratings(10), ToyModel(), tmp_path)

    assert asyncio.run(cell()).n == 10


def test_unscored_is_counted_and_other_errors_end_the_run_naming_the_sample(tmp_path):
    async def unsure(sample, model):
        if sample.id == "s3":
            raise Unscored("no verdict", raw="hm")
        return Score({"x": float("nan") if sample.id == "s4" else 1.0})

    summary = run(Probe(unsure), ToyModel(), tmp_path / "a")
    assert (summary.n, summary.n_unscored) == (10, 2)
    assert summary.unscored_reasons == {"no verdict": 1, "x is not finite": 1}
    assert summary.estimates["x"].n == 8

    async def broken(sample, model):
        return Score({"x": {}[sample.id]})

    with pytest.raises(KeyError) as caught:
        run(Probe(broken), ToyModel(), tmp_path / "b")
    assert caught.value.__notes__ == ['This happened in benchmark "probe", sample "s0".']


def test_a_user_simulator_plays_the_other_side_and_has_to_be_there(tmp_path):
    async def talk(sample, roles):
        said = list(sample.messages)
        for _ in range(2):
            said.append(Message("assistant", (await roles.model.respond(Request(tuple(said)))).text))
            asked = Request((Message("user", f"after {said[-1].content} comes #{len(said)}"),))
            said.append(Message("user", f"next #{(await roles.user_simulator.respond(asked)).text}"))
        return Score({"x": 1.0}, transcript=tuple(said))

    probe = Probe(talk, n=5)
    probe.needs = ("user_simulator",)
    with pytest.raises(UserError, match="needs a user_simulator: choose one with user_simulator=endpoint, say"):
        run(probe, ToyModel(2), tmp_path)
    user = ToyModel(2)
    run(probe, Cast(ToyModel(2), user_simulator=user), tmp_path)
    for row in read_rows(tmp_path / "samples.jsonl"):
        turns = [(message["role"], message["content"]) for message in row.transcript]
        assert turns[1:] == [("assistant", "3"), ("user", "next #2"), ("assistant", "2"), ("user", "next #4")]
    assert sum(len(texts) for _, texts in user.batches) == 10 and all(kind == "respond" for kind, _ in user.batches)


@pytest.mark.parametrize("batch_size", (1, 4))
def test_what_prompts_lost_stands_in_rows_and_summary_by_role(llama, tmp_path, batch_size):
    """A real LM of 256 positions: prompts of s8 and s9 are too long, and so is what the judge reads from s4 on."""
    rubric = Rubric(Prompt("short", "{{ text }} ?"), lambda reply: 1.0, (1.0,), max_new_tokens=8)

    async def asked(sample, roles):
        text = " ".join(["good morning"] * 4 * (int(sample.id[1:]) + 1))
        await roles.judge(rubric, text=text + text)
        request = Request((Message("user", text),), sampling=Sampling(8), options=("good", "morning"))
        both = await asyncio.gather(roles.model.choose(request), roles.model.respond(request))
        if sample.id == "s9":
            raise Unscored("no", raw=both[1].text)
        return Score({"x": 1.0})

    cast = Cast(persona.load(llama), [persona.load(llama)])
    summary = run(Probe(asked), cast, tmp_path, batch_size=batch_size)

    def lost(words, reply):
        return max(0, len(llama.render((Message("user", words),))) + reply - 256)

    longest = max(len(llama.encode_option(option)) for option in ("good", "morning"))
    expected = {}
    for n in range(1, 11):
        text = " ".join(["good morning"] * 4 * n)
        cut = {"judge 1": lost(f"{text}{text} ?", 8), "model": lost(text, 8) + lost(text, longest)}
        expected[f"s{n - 1}"] = {role: tokens for role, tokens in cut.items() if tokens}
    found = {row.id: row.cut for row in read_rows(tmp_path / "samples.jsonl")}
    assert found == expected and found["s0"] == {} and found["s9"].keys() == {"judge 1", "model"}
    assert summary.cut == {
        role: {
            "samples": sum(role in cut for cut in found.values()),
            "tokens": sum(cut.get(role, 0) for cut in found.values()),
        }
        for role in ("judge 1", "model")
    }
    assert 10 > summary.cut["judge 1"]["samples"] > summary.cut["model"]["samples"] > 0


def test_half_a_surrogate_pair_in_a_text_does_not_end_the_run(tmp_path):
    async def odd(sample, model):
        return Score({"x": 1.0}, raw="half \ud83d of an emoji")

    run(Probe(odd), ToyModel(), tmp_path)
    assert read_rows(tmp_path / "samples.jsonl")[0].raw == "half ? of an emoji"


def test_a_model_that_drops_an_answer_ends_the_run(tmp_path):
    model = ToyModel()
    model.respond = lambda requests: []
    with pytest.raises(RuntimeError, match="0 answers to 10 requests"):
        run(Ratings(10), model, tmp_path)


def test_other_settings_are_refused_by_name(tmp_path):
    run(Ratings(10), ToyModel(), tmp_path)
    with pytest.raises(UserError, match=r"other settings: seed was 0, is 1\. Use another output folder or overwrite"):
        run(Ratings(10), ToyModel(), tmp_path, SETTINGS | {"seed": 1})
    with pytest.raises(UserError, match="data was"):
        run(Ratings(11), ToyModel(), tmp_path)
    newer = Ratings(10)
    newer.version = "2"
    with pytest.raises(UserError, match='benchmark_version was "1", is "2"'):
        run(newer, ToyModel(), tmp_path)
    assert read_summary(tmp_path).benchmark_version == "1"
    assert run(newer, ToyModel(), tmp_path, overwrite=True).benchmark_version == "2"
    (tmp_path / "meta.json").unlink()
    with pytest.raises(UserError, match="holds samples but no meta.json"):
        run(newer, ToyModel(), tmp_path)


def test_the_data_fingerprint_sees_every_part_that_is_asked():
    base = Ratings(3).samples()
    seen = {data_fingerprint(base), data_fingerprint(base[::-1]), data_fingerprint(base[:2])}
    for change in (
        {"target": "9"}, {"options": ("a", "b")}, {"messages": (Message("user", "Hi"),)}, {"task": "other"},
        {"persona": replace(base[0].persona, description="a cook")},
        {"persona": replace(base[0].persona, history=base[1].persona.history)},
    ):  # fmt: skip
        seen.add(data_fingerprint([replace(base[0], **change), *base[1:]]))
    assert len(seen) == 9


def test_bad_samples_and_files_are_named(tmp_path):
    twice = Probe(None)
    twice.samples = lambda: [Sample("a", ()), Sample("b", ()), Sample("a", ())]
    with pytest.raises(UserError, match='sample 2 repeats the id "a"'):
        run(twice, ToyModel(), tmp_path)
    twice.samples = lambda: []
    with pytest.raises(UserError, match="has no samples"):
        run(twice, ToyModel(), tmp_path)
    run(Ratings(3), ToyModel(), tmp_path / "c")
    path = tmp_path / "c" / "samples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + "{broken\n" + lines[2])
    with pytest.raises(UserError, match="samples.jsonl, line 2, is not valid JSON"):
        run(Ratings(3), ToyModel(), tmp_path / "c")
    path.write_text(lines[0] + json.dumps({"id": "x"}) + "\n")
    with pytest.raises(UserError, match="line 2, has id where cluster, "):
        run(Ratings(3), ToyModel(), tmp_path / "c")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence():
    writer = LineWriter.__new__(LineWriter)
    writer._path, writer._file = Path("/dev/full"), os.open("/dev/full", os.O_WRONLY)
    sample = Ratings(1).samples()[0]
    with pytest.raises(UserError, match="could not be extended: No space left on device"):
        writer.write(Row.of(sample, "a", Score({"x": 1.0})).line())
    writer.close()
