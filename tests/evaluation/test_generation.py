import json
import os
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
from evaluation_toys import ToyModel, draw
from fault_server import Answer, FaultServer
from test_episodes import Share

from persona.errors import UserError
from persona.evaluation.endpoints.endpoint import Endpoint, EndpointConfig
from persona.evaluation.generation import fingerprint, generate
from persona.evaluation.judges.judging import Unscored
from persona.evaluation.roles import Cast
from persona.evaluation.runner import usage, usage_files
from persona.files import LineWriter, read_lines
from persona.types import HistoryItem, Message, Persona, Request

SETTINGS = {"model": "toy", "seed": 0}
ITEMS = [(f"q{number}", f"question {number} #{number}") for number in range(60)]


async def answer(question, roles):
    """Two turns, the second about the reply to the first."""
    first = await roles.model.respond(Request((Message("user", question),)))
    second = await roles.model.respond(Request((Message("user", f"{question} {first.text} #3"),)))
    return {"question": question, "answers": [first.text, second.text]}


def run(path, model, items=ITEMS, episode=answer, settings=SETTINGS, batch_size=8, **more):
    cast = model if isinstance(model, Cast) else Cast(model)
    return generate(items, episode, cast, path, settings=settings, batch_size=batch_size, **more)


def asked(model):
    return [text for kind, texts in model.batches for text in texts]


def test_one_row_an_item_in_their_order_and_nothing_is_asked_twice(tmp_path):
    model, again = ToyModel(1.0), ToyModel(1.0)
    rows = run(tmp_path / "a.jsonl", model)
    assert [row["id"] for row in rows] == [id for id, _ in ITEMS]
    assert rows[2] == {"id": "q2", "question": ITEMS[2][1], "answers": ["2", "3"]}
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == rows
    assert max(len(texts) for _, texts in model.batches) == 8 and len(model.batches) == 2 * 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.meta.json"]
    assert run(tmp_path / "a.jsonl", again) == rows and again.batches == []
    run(tmp_path / "one.jsonl", ToyModel(1.0), batch_size=1)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()
    assert run(tmp_path / "none.jsonl", again, items=[]) == [] and (tmp_path / "none.jsonl").exists()


def test_rows_of_other_settings_or_items_are_dropped_with_a_warning(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    first = run(path, ToyModel(1.0))
    model = ToyModel(0.0)
    second = run(path, model, settings=SETTINGS | {"seed": 1})
    assert len(asked(model)) == 120 and second != first
    assert "rows of other settings are dropped (seed changed)" in caplog.messages[0]
    changed = [(id, text.replace("question", "riddle") if id == "q3" else text) for id, text in ITEMS]
    model = ToyModel(0.0)
    third = run(path, model, items=changed, settings=SETTINGS | {"seed": 1})
    assert len(asked(model)) == 120 and third[3]["question"] == "riddle 3 #3"
    assert "dropped (items changed)" in caplog.messages[1] and len(caplog.messages) == 2
    run(path, ToyModel(1.0))
    assert [row for row in read_lines(path)] == first


def test_partial_rows_of_other_settings_are_dropped_too(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(RuntimeError):
        run(path, Stops(12))
    assert not path.exists() and len(list(read_lines(tmp_path / "a.part0.jsonl"))) > 0
    model = ToyModel(0.0)
    run(path, model, settings=SETTINGS | {"seed": 1})
    assert len(asked(model)) == 120


def test_a_file_that_was_not_made_here_is_left_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "mine"}\n')
    with pytest.raises(UserError, match=r"a.jsonl was not made by this program \(a.meta.json is missing\): move it"):
        run(path, ToyModel())
    assert path.read_text() == '{"id": "mine"}\n'


class Stops(ToyModel):
    """Fails at the n-th batch, as a machine does that is switched off."""

    def __init__(self, at):
        super().__init__(1.0)
        self.at = at

    def respond(self, requests):
        if len(self.batches) >= self.at:
            raise RuntimeError("out of memory")
        return super().respond(requests)


def test_an_interrupted_run_goes_on(tmp_path):
    whole = run(tmp_path / "whole.jsonl", ToyModel(1.0))
    path = tmp_path / "a.jsonl"
    for at in (4, 10):
        with pytest.raises(RuntimeError, match="out of memory"):
            run(path, Stops(at))
    kept = len(list(read_lines(tmp_path / "a.part0.jsonl")))
    assert 0 < kept < 60 and not path.exists()  # whole or not at all
    with open(tmp_path / "a.part0.jsonl", "ab") as stream:
        stream.write(b'{"id": "q59", "quest')  # killed in the middle of a line
    model = ToyModel(1.0)
    assert run(path, model) == whole and len(asked(model)) == 2 * (60 - kept)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_an_item_without_an_answer_is_a_row_with_a_reason_and_is_asked_again(tmp_path, caplog):
    def unsure(ids):
        async def episode(question, roles):
            row = await answer(question, roles)
            if question.split("#")[1] in ids:
                raise Unscored(f"no list in the reply to {question.split('#')[1]}", raw="hm")
            return row

        return episode

    path = tmp_path / "a.jsonl"
    whole = run(tmp_path / "whole.jsonl", ToyModel(1.0))
    rows = run(path, ToyModel(1.0), episode=unsure({"5", "9"}))
    assert rows[5] == {"id": "q5", "reason": "no list in the reply to 5", "raw": "hm"}
    assert [row["id"] for row in rows if "reason" in row] == ["q5", "q9"] and len(rows) == 60
    assert caplog.messages == [
        "a: 2 of 60 have no answer (1 × no list in the reply to 5; 1 × no list in the reply to 9); "
        "they are asked again at the next start"
    ]
    model = ToyModel(1.0)
    assert run(path, model, episode=unsure({"9"}))[5] == whole[5] and len(asked(model)) == 4
    assert run(path, ToyModel(1.0)) == whole and len(caplog.messages) == 2
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def endpoint(server, **more):
    return Endpoint(EndpointConfig("judge-7b", server.url, retries=0, **more), backoff=0.01)


async def teach(question, roles):
    first = await roles.reference.respond(Request((Message("user", question),)))
    second = await roles.model.respond(Request((Message("user", f"{question} {first.text} #3"),)))
    return {"chosen": first.text, "rejected": second.text}


def test_a_teacher_that_dies_half_way_ends_the_run_and_loses_nothing(tmp_path, caplog):
    caplog.set_level("INFO", "persona")
    dead = threading.Event()

    def plan(seen):
        if len(server.seen) > 30:
            dead.set()
        return Answer(fault="500") if dead.is_set() else Answer(text=f"{draw(seen.text):.6f}")

    path = tmp_path / "a.jsonl"
    with FaultServer(plan) as server:
        whole = run(tmp_path / "whole.jsonl", Cast(ToyModel(1.0), reference=endpoint(FaultServerless())), [], teach)
        assert whole == []
        with pytest.raises(UserError, match="judge-7b at .* is down: 2. questions in a row had no reply"):
            run(path, Cast(ToyModel(1.0), reference=endpoint(server, concurrency=4)), episode=teach, batch_size=2)
        kept = {row["id"] for row in read_lines(tmp_path / "a.part0.jsonl") if "reason" not in row}
        assert 0 < len(kept) <= 30 and not path.exists()
        answered = {seen.text for seen in server.seen[:30]}
        before = len(server.seen)
        dead.clear()
        server.seen.clear()
        server.plan = lambda seen: Answer(text=f"{draw(seen.text):.6f}")
        rows = run(path, Cast(ToyModel(1.0), reference=endpoint(server)), episode=teach, batch_size=2)
        assert not any("reason" in row for row in rows) and len(rows) == 60
        assert [text.split(" ", 7)[:7] for text in caplog.messages if "asked over" in text] == [
            ["a:", "the", "reference", "was", "asked", "over", "all"]
        ]
        texts = [seen.text for seen in server.seen]
        assert len(texts) == len(set(texts)) == 60 - len(kept)
        # An answer that came and whose row was under way when the run ended is all that may be asked for again.
        assert len(answered & set(texts)) <= 30 - len(kept)
    assert [row["chosen"] for row in rows] == [f"{draw(question):.6f}" for _, question in ITEMS]
    spent = [line["reference"] for line in read_lines(*usage_files(path))]
    assert len(spent) == 2 and spent[1]["requests"] == 60 - len(kept)
    assert 0 <= spent[0]["requests"] - before <= 4  # what was about to be sent counts, too
    assert usage(path)["reference"]["requests"] == spent[0]["requests"] + spent[1]["requests"]


class FaultServerless:
    """An address where nothing listens: nobody asks it when there is nothing to ask."""

    url = "http://127.0.0.1:9/v1"


def test_what_an_episode_may_not_do(tmp_path):
    async def own(question, roles):
        return {"id": "x"}

    async def broken(question, roles):
        return {"x": {}[question]}

    with pytest.raises(ValueError, match="the key id of a row is not for an episode to give"):
        run(tmp_path / "a.jsonl", ToyModel(), episode=own)
    with pytest.raises(KeyError) as caught:
        run(tmp_path / "a.jsonl", ToyModel(), episode=broken)
    assert caught.value.__notes__ == ['This happened in a, item "q0".']
    with pytest.raises(UserError, match='a: the id "q1" stands for several items'):
        run(tmp_path / "a.jsonl", ToyModel(), items=[*ITEMS, ITEMS[1]])


def test_the_fingerprint_sees_all_of_an_item():
    ada = Persona("ada", statements=("I bake.",), history=(HistoryItem("1", "soup", "5"),))
    ben = Persona("ada", statements=("I bake.",), history=(HistoryItem("1", "soup", "4"),))
    items = [[("1", "a")], [("1", "b")], [("2", "a")], [("1", ("a", {"k": 1}))], [("1", ("a", {"k": 2}))]]
    items += [[("1", ada)], [("1", ben)], [("1", "a"), ("2", "b")], [("2", "b"), ("1", "a")]]
    assert len({fingerprint(one) for one in items}) == len(items)
    assert fingerprint([("1", Persona("a"))]) == fingerprint([("1", Persona("a"))])
    with pytest.raises(TypeError, match="cannot hold a object"):
        fingerprint([("1", object())])


def test_three_processes_give_the_file_of_one_also_after_a_change_of_their_number(tmp_path):
    whole, path = run(tmp_path / "whole.jsonl", ToyModel(1.0)), tmp_path / "a.jsonl"
    with pytest.raises(RuntimeError):
        run(path, Stops(12))
    row = next(read_lines(tmp_path / "a.part0.jsonl"))
    late = LineWriter(tmp_path / "a.part5.jsonl")  # left by a larger launch: one answer seen twice, one that failed
    for line in (row, {"id": row["id"], "reason": "HTTP 500", "raw": ""}):
        late.write(json.dumps(line).encode() + b"\n")
    kept, models = len(list(read_lines(tmp_path / "a.part0.jsonl"))), [ToyModel(1.0) for _ in range(3)]
    barrier, found = threading.Barrier(3), []

    def work(rank):
        found.append(run(path, models[rank], processes=Share(rank, barrier)))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [whole] * 3 and path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sum(len(asked(model)) for model in models) == 2 * (60 - kept)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] == "a") == ["a.jsonl", "a.meta.json"]


class Slow(ToyModel):
    def respond(self, requests):
        time.sleep(0.01)
        return super().respond(requests)


def forked(act):
    child = os.fork()
    if child:
        return child
    try:
        act()
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_at_random_moments_it_ends_as_an_uninterrupted_run(tmp_path):
    run(tmp_path / "whole.jsonl", ToyModel(1.0))
    path, rng, kills, counts = tmp_path / "a.jsonl", random.Random(0), 0, []
    while kills < 40:
        child = forked(lambda: run(path, Slow(1.0), batch_size=2))
        time.sleep(0.03 + 0.2 * rng.random())
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
        if not path.exists():
            counts.append(len(list(read_lines(tmp_path / "a.part0.jsonl"))))
    assert kills > 2 and counts == sorted(counts)
    run(path, ToyModel(1.0))
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.multi_process
def test_two_processes_killed_and_started_again_give_the_file_of_one(tmp_path):
    sys.path.append(str(Path(__file__).parents[1] / "training"))
    from training_toys import process_of_two

    run(tmp_path / "whole.jsonl", ToyModel(1.0))
    path = tmp_path / "a.jsonl"

    def act():
        from accelerate import PartialState

        processes = PartialState()
        assert len(run(path, Slow(1.0), batch_size=1, processes=processes)) == 60

    def launch():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [process_of_two(rank, port, act) for rank in range(2)]

    children, deadline = launch(), time.monotonic() + 60
    while not all((tmp_path / f"a.part{rank}.jsonl").exists() for rank in range(2)) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    assert not path.exists()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in launch()] == [0, 0]
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
