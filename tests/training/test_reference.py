"""Reference log-probs on disk: what is computed, what is found again, what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from training_toys import in_two

from persona.errors import UserError
from persona.training import reference
from persona.training.reference import Reference, content_key, reference_logps

# Seven prompts of 1 to 7 tokens, the first four of them with a second reply; replies of 1 to 4 tokens.
ROWS = [([9 + i] * (1 + i), [40 + i, *[50] * (i % 4)]) for i in range(7)]
ROWS += [(prompt, [60, 61, 62, 63][: 4 - i]) for i, (prompt, _) in enumerate(ROWS[:4])]


@torch.no_grad()
def check(base, found: Reference) -> None:
    """Against a plain forward over each row alone."""
    assert len(found) == len(ROWS)
    for row, (prompt, reply) in enumerate(ROWS):
        logits = base.model(torch.tensor([prompt + reply])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(reply)), torch.tensor(reply)]
        assert torch.allclose(found[row], expected, atol=1e-5), row


def compute(base, folder: Path, rows=ROWS, batch_size: int = 2) -> Reference:
    return reference_logps(base, rows, folder, ["m"], batch_size)


@pytest.fixture()
def prompts(llama):
    """The prompts (by their number in ROWS) of every forward over prompts so far."""
    seen: list[list[int]] = []
    embed = llama.model.get_input_embeddings()

    def note(module, args):
        firsts = [int(row[row != 0][0]) - 9 for row in args[0]]
        seen.extend([firsts] if all(0 <= first < 7 for first in firsts) else [])

    handle = embed.register_forward_pre_hook(note)
    yield seen
    handle.remove()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 3)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("chunk-*.safetensors"))


def test_every_prompt_once_longest_first(llama, tmp_path, prompts):
    found = compute(llama, tmp_path)
    assert prompts == [[6, 5], [4], [3, 2], [1], [0]]  # files of three prompts, batches of two
    assert [file.name for file in files(tmp_path)] == [f"chunk-0000{i}.safetensors" for i in range(3)]
    check(llama, found)


def test_what_is_there_is_not_computed_again(llama, tmp_path, prompts):
    compute(llama, tmp_path)
    prompts.clear()
    found = compute(llama, tmp_path, batch_size=3)
    assert prompts == []
    check(llama, found)


def test_a_killed_run_goes_on(llama, tmp_path, prompts, monkeypatch):
    def dies(*args, **kwargs):
        if len(prompts) == 3:
            raise RuntimeError("no power")
        return score(*args, **kwargs)

    score = reference.score
    monkeypatch.setattr(reference, "score", dies)
    with pytest.raises(RuntimeError, match="no power"):
        compute(llama, tmp_path)
    assert len(files(tmp_path)) == 1
    monkeypatch.undo()
    monkeypatch.setattr(reference, "CHUNK", 3)
    prompts.clear()
    found = compute(llama, tmp_path)
    assert prompts == [[3, 2], [1], [0]]
    check(llama, found)


def test_the_key_is_everything_the_numbers_depend_on():
    one = content_key(["base", "fp32"], ROWS)
    assert one == content_key(("base", "fp32"), [(tuple(p), tuple(r)) for p, r in ROWS])
    others = [
        content_key(["base", "bf16"], ROWS),
        content_key(["base", "fp32", "adapter"], ROWS),
        content_key(["base", "fp32"], ROWS[::-1]),
        content_key(["base", "fp32"], ROWS[:-1]),
        content_key(["base", "fp32"], [*ROWS[:1], ([*ROWS[1][0], ROWS[1][1][0]], ROWS[1][1][1:]), *ROWS[2:]]),
    ]  # the last: the same tokens with another border between prompt and reply
    assert len({one, *others}) == 6


def test_missing_rows_are_listed(llama, tmp_path):
    compute(llama, tmp_path)
    folder = files(tmp_path)[0].parent
    files(tmp_path)[1].unlink()
    with pytest.raises(UserError, match=r"lacks reference log-probs of 6 of 11 rows \(1, 2, 3, 8, 9, 10\): remove"):
        Reference(folder, ROWS)
    check(llama, compute(llama, tmp_path))
    longer = [*ROWS[:-1], (ROWS[-1][0], [*ROWS[-1][1], 9])]
    with pytest.raises(UserError, match=r"of 1 of 11 rows \(10\)"):
        Reference(folder, longer)


def test_a_damaged_file_is_named(llama, tmp_path):
    compute(llama, tmp_path)
    path = files(tmp_path)[2]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"chunk-00002.safetensors is damaged .*remove it"):
        compute(llama, tmp_path)


@pytest.mark.multi_process
def test_two_processes_share_the_work(llama, tmp_path, prompts):
    shares = ([[6, 5], [4], [0]], [[3, 2], [1]])

    def act() -> None:
        check_later = compute(llama, tmp_path)
        assert prompts == shares[int(os.environ["RANK"])]
        check(llama, check_later)

    assert in_two(act) == [0, 0]
    assert len(files(tmp_path)) == 3
