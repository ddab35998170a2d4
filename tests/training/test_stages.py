import json
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from stages_toys import Toy
from training_toys import in_two

from persona.errors import UserError
from persona.files import sha256
from persona.training.stages import Stage, run_stages


def content(folder: Path) -> dict[str, bytes]:
    """Artefacts by name; records tell time, and are looked at on their own."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("records/")}


def test_what_is_done_is_skipped_and_what_changed_runs_with_all_that_follows(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert Toy().run(tmp_path) == ["square", "add", "total"]
    assert (tmp_path / "total.txt").read_text() == "30"
    caplog.clear()
    assert Toy().run(tmp_path) == []
    assert [record.message for record in caplog.records] == [
        f"stage {name}: skipped, nothing has changed" for name in ("square", "add", "total")
    ]
    caplog.clear()
    assert Toy(offset=1).run(tmp_path) == ["add", "total"]  # its setting, and what follows from it
    assert (tmp_path / "total.txt").read_text() == "35"
    lines = [record.message for record in caplog.records]
    assert lines[1:] == [
        "stage add: done in 0 s (its setting offset has changed)",
        "stage total: done in 0 s (its input sums has changed)",
    ]
    assert Toy(n=6, factor=0, offset=1).run(tmp_path) == ["square", "add", "total"]
    assert Toy(n=6, factor=0, offset=1).run(tmp_path) == []


def test_a_stage_whose_output_comes_out_the_same_changes_nothing_below_it(tmp_path):
    Toy().run(tmp_path)
    (tmp_path / "records" / "square.json").unlink()  # asks for the stage to run again
    assert Toy().run(tmp_path) == ["square"]


def test_a_file_that_is_only_there_counts_for_nothing(tmp_path):
    Toy().run(tmp_path / "whole")
    (tmp_path / "copied").mkdir()
    for name in ("squares.jsonl", "total.txt"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "copied")
    assert Toy().run(tmp_path / "copied") == ["square", "add", "total"]
    for damage in (
        lambda folder: (folder / "squares.jsonl").write_text("0\n1\n"),
        lambda folder: (folder / "sums" / "3.txt").write_text("9 "),
        lambda folder: (folder / "sums" / "extra.txt").write_text("1"),
        lambda folder: (folder / "sums" / "3.txt").rename(folder / "sums" / "33.txt"),
        lambda folder: (folder / "total.txt").unlink(),
        lambda folder: (folder / "records" / "total.json").write_text('{"settings": {'),
    ):
        damage(tmp_path / "copied")
        assert Toy().run(tmp_path / "copied") != []
        assert content(tmp_path / "copied") == content(tmp_path / "whole")


def test_a_record_says_what_a_stage_was_made_of(tmp_path):
    Toy().run(tmp_path)
    record = json.loads((tmp_path / "records" / "add.json").read_text())
    assert record["settings"] == {"offset": 0} and record["processes"] == 1 and record["seconds"] >= 0
    assert record["inputs"] == {"squares.jsonl": sha256(tmp_path / "squares.jsonl")}
    assert list(record["outputs"]) == ["sums"] and record["started"].startswith("20")
    assert list((tmp_path / "work").iterdir()) == []


def test_each_file_is_read_once_for_its_hash(tmp_path, monkeypatch):
    from persona.training import stages

    Toy().run(tmp_path)
    read: list[str] = []
    monkeypatch.setattr(stages, "sha256", lambda path: read.append(Path(path).name) or sha256(path))
    Toy().run(tmp_path)
    assert sorted(read) == sorted(["squares.jsonl", *(f"{n}.txt" for n in range(5)), "total.txt"])


def test_one_stage_alone_wants_those_before_it_done_and_up_to_date(tmp_path):
    with pytest.raises(UserError, match=r"stage=total builds on stage square, but it has not run to its end: run"):
        Toy().run(tmp_path, only="total")
    assert Toy().run(tmp_path, only="square") == ["square"]
    with pytest.raises(UserError, match=r"stage=total builds on stage add, .* run stage=add first"):
        Toy().run(tmp_path, only="total")
    assert Toy().run(tmp_path, only="add") == ["add"]
    assert Toy().run(tmp_path, only="add") == []
    assert Toy().run(tmp_path, only="total") == ["total"]
    with pytest.raises(UserError, match=r"stage=total builds on stage square, but its setting n has changed: run"):
        Toy(n=7).run(tmp_path, only="total")
    assert Toy(n=7).run(tmp_path, only="square") == ["square"]
    with pytest.raises(UserError, match="builds on stage add, but its input squares.jsonl has changed"):
        Toy(n=7).run(tmp_path, only="total")
    Toy(n=7).run(tmp_path)
    (tmp_path / "sums" / "0.txt").write_text("1")
    with pytest.raises(UserError, match="builds on stage add, but sums is not there as it was written"):
        Toy(n=7).run(tmp_path, only="total")


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="stage=ad is no stage; did you mean add. There are square, add, total"):
        Toy().run(tmp_path, only="ad")
    stages = [Stage("dpo", lambda folder: None, ("pairs.jsonl",), ("adapter",), {})]
    with pytest.raises(UserError, match=r"stage dpo reads .*pairs.jsonl, which does not exist"):
        run_stages(stages, tmp_path)
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(RuntimeError, match="stage dpo ended without writing adapter"):
        run_stages(stages, tmp_path)


def test_a_stage_that_fails_has_not_ended_and_takes_its_old_record_along(tmp_path):
    toy = Toy()
    toy.run(tmp_path)
    stages = Toy(offset=2).stages()

    def fails(folder):
        (folder / "work" / "add" / "half").write_text("half")
        raise RuntimeError("out of memory")

    broken = Stage("add", fails, stages[1].reads, stages[1].writes, stages[1].settings)
    with pytest.raises(RuntimeError, match="out of memory"):
        run_stages([stages[0], broken, stages[2]], tmp_path)
    assert not (tmp_path / "records" / "add.json").exists()
    assert (tmp_path / "work" / "add" / "half").exists()
    assert toy.run(tmp_path) == ["add"]  # the settings of before, and what it wrote then is still there


def test_partial_work_is_kept_for_the_same_settings_and_dropped_for_others(tmp_path, capsys, caplog):
    def stop_after(toy, count):
        stages = toy.stages()

        def run(folder):
            toy.n = count
            toy.square(folder)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_stages([Stage("square", run, (), ("squares.jsonl",), stages[0].settings)], tmp_path)

    stop_after(Toy(), 3)
    Toy().run(tmp_path)
    assert capsys.readouterr().out.split("\n")[:2] == ["square goes on at 0", "square goes on at 3"]
    assert (tmp_path / "total.txt").read_text() == "30" and not caplog.messages
    stop_after(Toy(factor=2), 3)
    Toy(factor=3).run(tmp_path)
    assert capsys.readouterr().out.split("\n")[:2] == ["square goes on at 0"] * 2
    assert (tmp_path / "total.txt").read_text() == "90"
    assert ["begun on other settings or inputs and is removed" in message for message in caplog.messages] == [True]


def test_an_input_may_lie_elsewhere_and_a_part_of_a_folder_be_read(tmp_path):
    constitution = tmp_path / "me.txt"
    constitution.write_text("kind\n")
    ran = []

    def stages():
        def write(folder):
            ran.append("write")
            (folder / "out").mkdir(exist_ok=True)
            (folder / "out" / "a.txt").write_text(constitution.read_text())

        def read(folder):
            ran.append("read")
            (folder / "b.txt").write_text((folder / "out" / "a.txt").read_text())

        return [
            Stage("write", write, (str(constitution),), ("out",), {}),
            Stage("read", read, ("out/a.txt",), ("b.txt",), {}),
        ]

    run_stages(stages(), tmp_path / "s")
    run_stages(stages(), tmp_path / "s")
    constitution.write_text("blunt\n")
    with pytest.raises(UserError, match="stage=read builds on stage write, but its input"):
        run_stages(stages(), tmp_path / "s", only="read")
    run_stages(stages(), tmp_path / "s")
    assert ran == ["write", "read"] * 2 and (tmp_path / "s" / "b.txt").read_text() == "blunt\n"


def test_killed_at_random_moments_it_ends_as_an_uninterrupted_run(tmp_path):
    Toy(n=40, factor=3).run(tmp_path / "whole")
    rng, kills = random.Random(0), 0
    for _ in range(30):
        child = os.fork()
        if not child:
            Toy(n=40, factor=3, pause=0.004).run(tmp_path / "killed")
            os._exit(0)
        time.sleep(0.02 + rng.random() * 0.15)
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
            break
        kills += 1
        there = [name for name in content(tmp_path / "killed") if name.startswith("sums/")]
        assert len(there) in (0, 40)  # a folder is there with all of its files or not at all
    Toy(n=40, factor=3).run(tmp_path / "killed")
    assert kills > 2
    whole = {name: data for name, data in content(tmp_path / "killed").items() if not name.startswith(".")}
    assert whole == content(tmp_path / "whole")


@pytest.mark.multi_process
def test_two_processes_run_the_same_stages(tmp_path):
    """Both call each function; rank zero's view of the disk decides, and artefacts are written by it."""

    def act() -> None:
        from accelerate import PartialState

        processes = PartialState()
        toy, rank = Toy(), processes.process_index

        def shared(folder):
            (folder / "work" / "share" / f"{rank}.txt").write_text(str(rank))
            processes.wait_for_everyone()
            if rank == 0:
                parts = sorted((folder / "work" / "share").iterdir())
                (folder / "parts.txt").write_text(" ".join(part.read_text() for part in parts))

        stages = [Stage("share", shared, (), ("parts.txt",), {}), *toy.stages()]
        for _ in range(2):
            run_stages([stages[0]], tmp_path, processes=processes)
        with pytest.raises(UserError, match="run stage=square first"):  # on both of them
            run_stages(stages, tmp_path, only="total", processes=processes)
        (tmp_path / f"done{rank}").touch()

    assert in_two(act) == [0, 0]
    assert (tmp_path / "parts.txt").read_text() == "0 1"
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()
    assert json.loads((tmp_path / "records" / "share.json").read_text())["processes"] == 2
