"""A disk that is full, at every file that a training and an evaluation write: a sentence, and then the same result."""

import json
from functools import partial
from pathlib import Path

import pytest
from commands import command
from fault_toys import small_disk, small_files

from persona.evaluation.results import read_rows
from persona.training.watch import MEASURED

# KiB that the disk has, and which write is the first that does not fit.
TRAINING = {
    4: "meta.json could not be written: No space left on device",
    12: "checkpoints has no room for a checkpoint of 0.1 MB: No space left on device",
    100: "the checkpoint of step 2 could not be saved",
    150: "the checkpoint of step 4 could not be saved",
    200: "the checkpoint of step 4 could not be saved",
    290: "the checkpoint of step 6 could not be saved",
}
EVALUATION = {
    8: "state.json could not be written: No space left on device",
    12: "untouched/meta.json could not be written: No space left on device",
    24: "samples.jsonl could not be extended: No space left on device; its rows are kept",
    28: "samples.jsonl could not be written: No space left on device",
    40: "report.html could not be written: No space left on device",
}


def values(run: Path) -> list[dict]:
    """What a training has logged, without how long things took, and without the mean over one start's steps."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    rows = (row for row in rows if "train_loss" not in row)
    varies = {*MEASURED, "padding", "eval_runtime", "train_runtime"}
    return [{k: v for k, v in row.items() if k not in varies and "_per_second" not in k} for row in rows]


def left_over(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".tmp" in path.name or path.name == ".staging"]


@pytest.fixture(scope="module")
def whole(training, evaluation, tmp_path_factory) -> Path:
    """Both commands without a fault."""
    folder = tmp_path_factory.mktemp("whole")
    for script, given in (("train.py", training), ("evaluate.py", evaluation)):
        assert command(script, [*given, f"output={folder}"]).code == 0
    return folder


def test_training_on_a_disk_that_grows_too_slowly(whole, training, tmp_path):
    with small_disk(tmp_path / "disk") as remount:
        run, steps = tmp_path / "disk" / "run", []
        for kib, sentence in TRAINING.items():
            remount(f"size={kib}k")
            assert sentence in command("train.py", [*training, f"output={run}"]).sentence, kib
            assert not left_over(run), kib
            steps.append(sum(1 for _ in run.glob("checkpoints/checkpoint-*/checkpoint.json")))
        assert steps == [0, 0, 0, 1, 1, 2]
        remount("size=4m")
        done = command("train.py", [*training, f"output={run}"])
        assert done.code == 0 and f"going on from {run}/checkpoints/checkpoint-4" in done.err
        assert values(run) == values(whole)
        name = "personalizer/adapter/adapter_model.safetensors"
        assert (run / name).read_bytes() == (whole / name).read_bytes()
        assert json.loads((run / "state.json").read_text())["state"] == "done"


def test_evaluation_on_a_disk_that_grows_too_slowly(whole, evaluation, tmp_path):
    with small_disk(tmp_path / "disk") as remount:
        folder, kept = tmp_path / "disk" / "run" / "evaluation" / "town", [0]
        for kib, sentence in EVALUATION.items():
            remount(f"size={kib}k")
            assert sentence in command("evaluate.py", [*evaluation, f"output={tmp_path / 'disk' / 'run'}"]).sentence
            rows = folder / "untouched" / "samples.jsonl"
            kept.append(len(read_rows(rows)) if rows.exists() else 0)
            assert not left_over(folder)
        assert kept == sorted(kept) and 0 < kept[3] < 6 == kept[-1]
        remount("size=4m")
        assert command("evaluate.py", [*evaluation, f"output={tmp_path / 'disk' / 'run'}"]).code == 0
        uninterrupted = whole / "evaluation" / "town"
        for name in ("samples.jsonl", "meta.json"):
            assert (folder / "untouched" / name).read_bytes() == (uninterrupted / "untouched" / name).read_bytes()
        assert (folder / "report.html").stat().st_size > 10_000


def test_a_disk_that_became_read_only(whole, training, evaluation, tmp_path):
    with small_disk(tmp_path / "disk", 4096) as remount:
        run = tmp_path / "disk" / "run"
        for script, given in (("train.py", training), ("evaluate.py", evaluation)):
            assert command(script, [*given, f"output={run}"]).code == 0
        remount("ro")
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        for script, given in (("train.py", training), ("evaluate.py", evaluation)):
            for output in (run, tmp_path / "disk" / "new"):
                assert "Read-only file system" in command(script, [*given, f"output={output}"]).sentence
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_file_as_large_as_it_may_be(whole, evaluation, tmp_path):
    """The limit of a quota: without root as well."""
    given = [*evaluation, f"output={tmp_path}"]
    for size, name in ((3500, "samples.jsonl"), (30_000, "report.html")):
        assert f"{name} could not be" in command("evaluate.py", given, partial(small_files, size)).sentence
    assert command("evaluate.py", given).code == 0
    name = "evaluation/town/untouched/samples.jsonl"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
