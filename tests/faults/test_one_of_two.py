"""One of two processes fails: both end soon, one of them says why, and the same command goes on to the same result."""

import json
from pathlib import Path

import pytest
from commands import Done, command, two_processes
from fault_toys import trouble, with_trouble

pytestmark = pytest.mark.multi_process


def values(run: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def said(done: list[Done]) -> list[str]:
    assert not any("Traceback" in one.err for one in done), [one.err[-3000:] for one in done]
    return [line for one in done for line in one.said]


@pytest.fixture(scope="module")
def trained(training, tmp_path_factory) -> Path:
    """By two processes without a fault; the trouble that is over stands in the stack."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "over").touch()
    given = [*training, "trainer.batch_size=1", "method.lora_dropout=0.0", f"output={folder / 'run'}"]
    done = two_processes("train.py", [*given, trouble("error", 1, folder / "over", 1)], with_trouble)
    assert [one.code for one in done] == [0, 0], [one.err[-3000:] for one in done]
    return folder / "run"


@pytest.mark.parametrize(
    ("what", "rank", "sentence"),
    [("error", 0, "row 3 of the data has no text"), ("broken", 1, "the loss became nan in step")],
)
def test_an_error_in_training(trained, training, tmp_path, what, rank, sentence):
    given = [*training, "trainer.batch_size=1", "method.lora_dropout=0.0", f"output={tmp_path / 'run'}"]
    given.append(trouble(what, 4, tmp_path / "over", rank))
    done = two_processes("train.py", given, with_trouble, timeout=100)
    assert [one.code for one in done] == [2, 2]
    (line,) = said(done)
    assert line.startswith(f"[process {rank}] error: " if rank else "error: ") and sentence in line
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["state"] == "failed" and sentence in state["message"]
    (tmp_path / "over").touch()
    done = two_processes("train.py", given, with_trouble)
    assert [one.code for one in done] == [0, 0] and "going on from" in done[0].err
    name = "personalizer/adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes()
    assert values(tmp_path / "run") == values(trained)


def test_an_error_in_an_evaluation_whose_other_process_waits(evaluation, tmp_path):
    """Rank zero has its rows and waits for the other; those of both are kept."""
    given = [*evaluation, "model.batch_size=1", "baselines={}", "benchmark.num_beams=1"]
    stack = trouble("error", 3, tmp_path / "over", 1)
    done = two_processes("evaluate.py", [*given, f"output={tmp_path / 'two'}", stack], with_trouble, timeout=100)
    assert [one.code for one in done] == [2, 2]
    assert said(done) == ["[process 1] error: row 3 of the data has no text"]
    folder = tmp_path / "two" / "evaluation" / "town" / "trouble"
    kept = [path.read_text().splitlines() for path in sorted(folder.glob("samples*.jsonl"))]
    assert kept[-1] and sum(map(len, kept)) >= 3
    (tmp_path / "over").touch()
    assert [
        one.code for one in two_processes("evaluate.py", [*given, f"output={tmp_path / 'two'}", stack], with_trouble)
    ] == [0, 0]
    assert command("evaluate.py", [*given, f"output={tmp_path / 'one'}", stack], with_trouble).code == 0
    alone = tmp_path / "one" / "evaluation" / "town" / "trouble"
    assert (folder / "samples.jsonl").read_bytes() == (alone / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed(training, tmp_path, rank):
    """Whoever started them says so (launch=, srun, torchrun); the other ends without a traceback."""
    given = [*training, "trainer.batch_size=1", f"output={tmp_path / 'run'}"]
    done = two_processes(
        "train.py", [*given, trouble("killed", 4, tmp_path / "over", rank)], with_trouble, timeout=100
    )
    assert [one.code for one in done] == ([-9, 2] if rank == 0 else [2, -9])
    assert said(done) == ([] if rank == 0 else ["ends, as another process of this run has gone"])


def test_numbers_that_are_none_in_an_evaluation(evaluation, tmp_path):
    """What is chosen by them means nothing; rows before stay, and once the weights are right it goes on."""
    given = [*evaluation, "model.batch_size=2", f"output={tmp_path}", trouble("broken", 2, tmp_path / "over")]
    done = command("evaluate.py", given, with_trouble)
    assert "gives log-probabilities that are not numbers: it overflows in torch.float32, or weights" in done.sentence
    rows = tmp_path / "evaluation" / "town" / "trouble" / "samples.jsonl"
    before = rows.read_text().splitlines()
    assert 0 < len(before) < 6
    (tmp_path / "over").touch()
    assert command("evaluate.py", given, with_trouble).code == 0
    assert len(rows.read_text().splitlines()) == 6 and set(before) <= set(rows.read_text().splitlines())
