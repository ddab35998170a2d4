from __future__ import annotations

import contextlib
import hashlib
import os
import signal

import pytest

from persona.errors import UserError
from persona.files import atomic_folder, atomic_write, sha256


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_with_its_folders(tmp_path):
    target = tmp_path / "a" / "b.txt"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert not target.exists() and temporary.parent == target.parent
    assert target.read_text() == "new" and listing(target.parent) == ["b.txt"]


@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt, UserError))
def test_an_interrupted_write_changes_nothing(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(error):
        with atomic_write(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise error("in the middle")
    assert (tmp_path / "a").read_text() == "old" and listing(tmp_path) == ["a"]


@pytest.mark.parametrize("error", (RuntimeError, KeyboardInterrupt, UserError))
def test_an_interrupted_folder_changes_nothing(tmp_path, error):
    with atomic_folder(tmp_path / "a") as temporary:
        (temporary / "x").write_text("old")
    with pytest.raises(error):
        with atomic_folder(tmp_path / "a") as temporary:
            (temporary / "x").write_text("half")
            raise error("in the middle")
    assert (tmp_path / "a" / "x").read_text() == "old" and listing(tmp_path) == ["a"]


def test_a_folder_replaces_the_old_one_and_nothing_of_it_stays(tmp_path):
    for name in ("x", "y"):
        with atomic_folder(tmp_path / "a") as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / name).write_text(name)
    assert listing(tmp_path / "a" / "deep") == ["y"] and listing(tmp_path) == ["a"]


def killed(act) -> None:
    """A process that is killed in the middle of `act`."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            act(lambda: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def half_a_file(folder):
    def act(die):
        with atomic_write(folder / "a") as temporary:
            temporary.write_text("half")
            die()

    return act


def half_a_folder(folder):
    def act(die):
        with atomic_folder(folder / "b") as temporary:
            (temporary / "x").write_text("half")
            die()

    return act


def test_what_a_killed_writer_left_goes_at_the_next_write(tmp_path):
    folder = tmp_path / "new"  # where this process has not written yet
    for act in (half_a_file(folder), half_a_folder(folder)):
        killed(act)
        (left,) = listing(folder)
        assert left.endswith(".tmp")
    (folder / ".mine.tmp").touch()
    with atomic_write(folder / "c") as temporary:
        temporary.write_text("x")
    assert listing(folder) == [".mine.tmp", "c"]


def test_what_a_living_writer_has_so_far_stays(tmp_path):
    with atomic_write(tmp_path / "one" / "a") as temporary:
        temporary.write_text("half")
        child = os.fork()
        if not child:
            try:
                with atomic_write(tmp_path / "one" / "b"):
                    pass
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert listing(temporary.parent) == [temporary.name, "b"]
    assert listing(tmp_path / "one") == ["a", "b"]


def test_killed_while_a_folder_is_replaced(tmp_path, monkeypatch):
    """Between two renames the old one has stepped aside: the next write leaves the new one, and nothing beside it."""

    def act(die):
        rename = os.rename
        monkeypatch.setattr(os, "rename", lambda a, b: die() if b == tmp_path / "b" else rename(a, b))
        with atomic_folder(tmp_path / "b") as temporary:
            (temporary / "x").write_text("2")

    with atomic_folder(tmp_path / "b") as temporary:
        (temporary / "x").write_text("1")
    killed(act)
    assert not (tmp_path / "b").exists()
    with atomic_folder(tmp_path / "b") as temporary:
        (temporary / "x").write_text("3")
    assert (tmp_path / "b" / "x").read_text() == "3" and ".b.old" not in listing(tmp_path)


def test_ordinary_permissions(tmp_path):
    mask = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("x")
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "x").touch(mode=0o600)
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "folder" / "x").stat().st_mode & 0o777 == 0o644


def test_a_target_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/a could not be written: (File exists|Not a directory)"):
        with atomic_write(tmp_path / "file" / "a"):
            pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder could not be written: Is a directory"):
        with atomic_write(tmp_path / "folder") as temporary:
            temporary.write_text("x")
    assert listing(tmp_path) == ["file", "folder"]


def test_sha256_is_the_hash_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()
