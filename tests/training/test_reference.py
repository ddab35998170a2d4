"""Reference log-probs on disk: what is computed, what is found again, what is missing."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from test_trainer import process_of_two

from persona.errors import UserError
from persona.training import reference
from persona.training.reference import Reference, content_key, reference_logps

ROWS = [([1] * (1 + i % 3), [2 + i] * (1 + 7 * i % 5)) for i in range(11)]


class Forward:
    """Gives every token of a reply its own number; remembers the batches. Dies after `lives` of them."""

    def __init__(self, lives: int = 1000):
        self.lives, self.batches = lives, []

    def __call__(self, rows):
        if len(self.batches) == self.lives:
            raise RuntimeError("no power")
        self.batches.append(list(rows))
        return [torch.arange(len(reply)) - 100.0 * reply[0] for _, reply in rows]


def check(found: Reference) -> None:
    assert len(found) == len(ROWS)
    for row, (_, reply) in enumerate(ROWS):
        assert found[row].tolist() == [k - 100.0 * reply[0] for k in range(len(reply))]


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("chunk-*.safetensors"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 4)


def test_every_row_once_in_batches_of_like_length(tmp_path):
    forward = Forward()
    check(reference_logps(forward, ROWS, tmp_path, ["m"], 2))
    lengths = [[len(p) + len(r) for p, r in batch] for batch in forward.batches]
    assert [len(batch) for batch in lengths] == [2, 2, 2, 2, 2, 1]
    assert sum(lengths, []) == sorted((len(p) + len(r) for p, r in ROWS), reverse=True)
    assert [file.name for file in files(tmp_path)] == [f"chunk-0000{i}.safetensors" for i in range(3)]


def test_what_is_there_is_not_computed_again(tmp_path):
    reference_logps(Forward(), ROWS, tmp_path, ["m"], 2)
    again = Forward()
    check(reference_logps(again, ROWS, tmp_path, ["m"], 3))
    assert not again.batches


def test_a_killed_run_goes_on(tmp_path):
    with pytest.raises(RuntimeError, match="no power"):
        reference_logps(Forward(lives=3), ROWS, tmp_path, ["m"], 2)
    assert len(files(tmp_path)) == 1
    again = Forward()
    check(reference_logps(again, ROWS, tmp_path, ["m"], 2))
    assert sum(map(len, again.batches)) == 7  # of 11 rows 4 were on disk


def test_the_key_is_everything_the_numbers_depend_on():
    one = content_key(["base", "fp32"], ROWS)
    assert one == content_key(("base", "fp32"), [(tuple(p), tuple(r)) for p, r in ROWS])
    others = [
        content_key(["base", "bf16"], ROWS),
        content_key(["base", "fp32", "adapter"], ROWS),
        content_key(["base", "fp32"], ROWS[::-1]),
        content_key(["base", "fp32"], ROWS[:-1]),
        content_key(["base", "fp32"], [([*ROWS[0][0], ROWS[0][1][0]], ROWS[0][1][1:]), *ROWS[1:]]),  # another border
    ]
    assert len({one, *others}) == 6


def test_missing_rows_are_listed(tmp_path):
    reference_logps(Forward(), ROWS, tmp_path, ["m"], 2)
    folder = files(tmp_path)[0].parent
    files(tmp_path)[1].unlink()
    with pytest.raises(UserError, match=r"lacks reference log-probs of 4 of 11 rows \((\d+, ){3}\d+\)"):
        Reference(folder, ROWS)
    check(reference_logps(Forward(), ROWS, tmp_path, ["m"], 2))
    longer = [*ROWS[:-1], (ROWS[-1][0], [*ROWS[-1][1], 9])]
    with pytest.raises(UserError, match=r"of 1 of 11 rows \(10\)"):
        Reference(folder, longer)


def test_a_damaged_file_is_named(tmp_path):
    reference_logps(Forward(), ROWS, tmp_path, ["m"], 2)
    path = files(tmp_path)[2]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"chunk-00002.safetensors is damaged .*remove it"):
        reference_logps(Forward(), ROWS, tmp_path, ["m"], 2)


@pytest.mark.multi_process
def test_two_processes_share_the_work(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def act() -> None:
        forward = Forward()
        check(reference_logps(forward, ROWS, tmp_path, ["m"], 2))
        assert 3 <= sum(map(len, forward.batches)) <= 8

    children = [process_of_two(rank, port, act) for rank in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert len(files(tmp_path)) == 3
