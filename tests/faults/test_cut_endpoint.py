"""A judge that dies half way through a command, and one that only has bad moments."""

import json
import re
from pathlib import Path

from commands import command
from evaluation.fault_server import FAULTS, Answer, FaultServer, Seen

from persona.evaluation.results import read_rows

SAMPLES = 30  # one question to the judge each
FOUR = "Therefore, the final score is 4."


def given(writer: str, judge: str, out: Path, retries: int) -> list[str]:
    return [
        *("benchmark=personagym", f"benchmark.limit={SAMPLES}", "trivial=false", "personalizers=[description]"),
        *("endpoint.model=writer", f"endpoint.base_url={writer}", "judge=endpoint"),
        *("judge.endpoint.endpoint.model=judge-7b", f"judge.endpoint.endpoint.base_url={judge}"),
        *(f"judge.endpoint.endpoint.retries={retries}", "judge.endpoint.endpoint.timeout=1", f"output={out}"),
    ]


def rows_of(out: Path) -> list[dict]:
    return [vars_of(row) for row in read_rows(out / "evaluation" / "personagym" / "description" / "samples.jsonl")]


def vars_of(row) -> dict:
    return {"id": row.id, "values": row.values, "failed": row.failed}


def test_a_judge_that_dies_and_comes_back_is_asked_what_is_missing(tmp_path):
    """The sentence, the rows so far, and a second start that asks for the others only."""
    grade, alive = Answer(text=FOUR), 6

    def dying(seen: Seen) -> Answer:
        return grade if len(judge.seen) <= alive else Answer(fault="nothing")

    with FaultServer(models=("writer",)) as writer:
        with FaultServer(lambda seen: grade) as judge:
            assert command("evaluate.py", given(writer.url, judge.url, tmp_path / "whole", 0)).code == 0
            whole = len(judge.seen)
        with FaultServer(dying) as judge:
            arguments = given(writer.url, judge.url, tmp_path / "cut", 0)
            done = command("evaluate.py", arguments)
            assert re.search(
                r"is down: \d+ questions in a row had no reply, the last one for the connection was cut", done.sentence
            )
            assert "the same command goes on when it is up again" in done.sentence
            state = json.loads((tmp_path / "cut" / "evaluation" / "personagym" / "state.json").read_text())
            assert state["state"] == "failed" and "is down" in state["message"]
            scored = [row for row in rows_of(tmp_path / "cut") if row["values"]]
            assert 0 < len(scored) < SAMPLES
            alive, before = 10**9, len(judge.seen)
            assert command("evaluate.py", arguments).code == 0
            assert len(judge.seen) - before == whole * (SAMPLES - len(scored)) // SAMPLES
    again = rows_of(tmp_path / "cut")
    assert again == rows_of(tmp_path / "whole") and all(row in again for row in scored)


def test_a_judge_with_bad_moments_changes_nothing(tmp_path):
    """Each question meets one of the faults first: 429, 5xx, garbage, half a body, a hang."""
    kinds = [fault for fault in FAULTS if fault not in ("slow", "drip")]

    def moody(seen: Seen) -> Answer:
        if seen.before == 0 and len(judge.seen) % 3:
            return Answer(fault="slow" if len(judge.seen) == 7 else kinds[len(judge.seen) % len(kinds)])
        return Answer(text=FOUR)

    with FaultServer(models=("writer",)) as writer, FaultServer(moody) as judge:
        done = command("evaluate.py", given(writer.url, judge.url, tmp_path, 4))
    assert done.code == 0, done.err[-2000:]
    rows = rows_of(tmp_path)
    assert len(rows) == SAMPLES and all(row["values"] and not row["failed"] for row in rows)
