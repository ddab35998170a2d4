"""Folders and files that may not be written, by somebody who is not root."""

import os
import shutil

import pytest
from commands import command
from fault_toys import no_privileges


@pytest.fixture(scope="module")
def place(training, evaluation, tmp_path_factory):
    """A folder with a finished training and evaluation in it, and their commands."""
    folder = tmp_path_factory.mktemp("place")
    commands = {"train.py": training, "evaluate.py": evaluation}
    for script, given in commands.items():
        done = command(script, [*given, f"output={folder / 'run'}"], no_privileges)
        assert done.code == 0, done.err[-3000:]
    return folder, commands


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_no_right_to_make_the_output_folder(place, script):
    folder, commands = place
    os.chmod(folder, 0o555)
    try:
        done = command(script, [*commands[script], f"output={folder / 'new'}"], no_privileges)
    finally:
        os.chmod(folder, 0o755)
    assert "could not be written: Permission denied" in done.sentence and not (folder / "new").exists()


@pytest.mark.parametrize(
    ("script", "closed", "more", "sentence"),
    [
        ("train.py", ".", [], "config.yaml could not be written: Permission denied"),
        ("train.py", "checkpoints", [], "checkpoint-6 could not be written: Permission denied"),
        ("evaluate.py", "evaluation/town/untouched", [], "samples.jsonl could not be written: Permission denied"),
        ("evaluate.py", "evaluation/town/untouched", ["overwrite=true"], "Permission denied"),
        ("evaluate.py", "evaluation/town", [], "config.yaml could not be written: Permission denied"),
        ("evaluate.py", "evaluation/town/untouched/samples.jsonl", [], "samples.jsonl cannot be opened for writing"),
        ("evaluate.py", "evaluation/town/untouched/meta.json", [], "meta.json could not be written or read: Perm"),
    ],
)
def test_a_folder_or_file_that_may_not_be_written(place, script, closed, more, sentence):
    folder, commands = place
    path = folder / "run" / closed
    mode = path.stat().st_mode
    if closed == "checkpoints":
        shutil.rmtree(path / "checkpoint-6")
    before = {file: file.read_bytes() for file in (folder / "run").rglob("*") if file.is_file()}
    os.chmod(path, 0o555 if path.is_dir() else (0o444 if path.suffix == ".jsonl" else 0o000))
    try:
        given = [*commands[script], f"output={folder / 'run'}"]
        said = command(script, [*given, *more], no_privileges).sentence
        assert sentence in said
    finally:
        os.chmod(path, mode)
    kept = {file: file.read_bytes() for file in before if file.is_file()}
    names = ("samples.jsonl", "model.safetensors", "adapter_model.safetensors", "summary.json")
    assert all(kept.get(file) == content for file, content in before.items() if file.name in names)
    assert command(script, given, no_privileges).code == 0  # and goes on
