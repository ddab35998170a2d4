"""Files that were torn, edited or deleted between two starts: said, skipped where another copy serves, never used."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import command

from persona.errors import UserError
from persona.evaluation.generation import generate
from persona.evaluation.roles import Cast


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.fixture(scope="module")
def whole(training, evaluation, tmp_path_factory) -> Path:
    """A training with all of its three checkpoints, and an evaluation."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert command("train.py", [*training, "trainer.keep_checkpoints=3", f"output={folder}"]).code == 0
    assert command("evaluate.py", [*evaluation, f"output={folder}"]).code == 0
    return folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


ADAPTER = "personalizer/adapter/adapter_model.safetensors"


@pytest.mark.parametrize(
    ("six", "four", "reasons"),
    [
        (("optimizer.safetensors", truncate), ("rng.json", flip), ("is not the file that was saved",) * 2),
        (("checkpoint.json", os.remove), ("", empty), ("has no checkpoint.json",) * 2),
    ],
)
def test_two_damaged_checkpoints_are_passed_over_and_the_result_is_the_same(
    run, whole, training, six, four, reasons: tuple[str, str]
):
    for step, (name, damage) in ((6, six), (4, four)):
        damage(run / "checkpoints" / f"checkpoint-{step}" / name)
    shutil.rmtree(run / "personalizer")
    done = command("train.py", [*training, f"output={run}"])
    assert done.code == 0, done.err[-2000:]
    skipped = [line for line in done.err.splitlines() if line.startswith("checkpoint skipped: ")]
    assert len(skipped) == 2 and all(why in line for why, line in zip(reasons, skipped, strict=True))
    assert f"going on from {run}/checkpoints/checkpoint-2" in done.err
    assert (run / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes() and losses(run) == losses(whole)


def test_when_every_checkpoint_is_damaged_it_starts_over_and_says_so(run, whole, training):
    for step in (2, 4, 6):
        flip(run / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")
    done = command("train.py", [*training, f"output={run}"])
    assert done.code == 0 and done.err.count("checkpoint skipped: ") == 3 and "going on" not in done.err
    assert (run / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes() and losses(run) == losses(whole)


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("adapter/adapter_model.safetensors", flip, "is not the file that was saved"),
        ("adapter/adapter_config.json", os.remove, "lacks its file adapter/adapter_config.json"),
        ("personalizer.json", truncate, "personalizer.json is damaged"),
        ("", empty, "is not a personalizer: it has no personalizer.json"),
    ],
)
def test_a_damaged_personalizer_is_not_measured(run, evaluation, name, damage, sentence):
    damage(run / "personalizer" / name)
    given = [*evaluation, f"personalizers=[{run / 'personalizer'}]", f"output={run}"]
    assert sentence in command("evaluate.py", given).sentence


@pytest.mark.parametrize("torn", [True, False])
def test_lines_of_metrics(run, whole, training, torn):
    """A torn last line is a writer's that was killed; one in the middle was not written like that."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    shutil.rmtree(run / "checkpoints" / "checkpoint-6")
    if torn:
        path.write_text("".join(lines[:5]) + lines[5][:10])
        assert command("train.py", [*training, f"output={run}"]).code == 0
        assert losses(run) == losses(whole)
    else:
        path.write_text("".join([lines[0], lines[1][:10] + "\n", *lines[2:]]))
        before = path.read_bytes()
        assert f"{path}, line 2, is not valid JSON" in command("train.py", [*training, f"output={run}"]).sentence
        assert path.read_bytes() == before


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("samples.jsonl", lambda lines: [*lines[:3], lines[3][:30]], ""),
        ("samples.jsonl", lambda lines: [*lines[:2], "{}\n", *lines[3:]], "samples.jsonl, line 3"),
        (
            "samples.jsonl",
            lambda lines: [*lines[:2], lines[2][:30] + "\n"],
            "samples.jsonl, line 3, is not valid JSON",
        ),
        ("meta.json", lambda lines: lines[:2], "meta.json is damaged, it is not valid JSON"),
        ("meta.json", lambda lines: ["[]\n"], "meta.json does not say what its rows are of"),
        ("summary.json", lambda lines: lines[:4], "summary.json is not valid JSON"),
    ],
)
def test_files_of_an_evaluation(run, whole, evaluation, name, change, sentence):
    folder = run / "evaluation" / "town" / "untouched"
    edit(folder / name, change)
    before = (folder / "samples.jsonl").read_bytes()
    done = command("evaluate.py", [*evaluation, f"output={run}"])
    if sentence:
        assert sentence in done.sentence and (folder / "samples.jsonl").read_bytes() == before
    else:
        assert done.code == 0
        theirs = whole / "evaluation" / "town" / "untouched" / "samples.jsonl"
        assert (folder / "samples.jsonl").read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("rows.jsonl", '{"id": "1"\n{"id": "2", "n": 1}\n', "rows.jsonl, line 1, is not valid JSON"),
        ("rows.meta.json", '{"settings": {}', "rows.meta.json is damaged"),
        ("rows.meta.json", '{"items": "0"}', "rows.meta.json does not say what its rows are of"),
    ],
)
def test_files_of_a_stage(tmp_path, name, content, sentence):
    async def episode(item: int, roles: object) -> dict:
        return {"n": item}

    def rows() -> list[dict]:
        items = [("1", 1), ("2", 2)]
        return generate(items, episode, Cast(None), tmp_path / "rows.jsonl", settings={"a": 1}, batch_size=2)

    assert rows() == [{"id": "1", "n": 1}, {"id": "2", "n": 2}]
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        rows()
