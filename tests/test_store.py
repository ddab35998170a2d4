"""The history store: what is read back, what is refused, and what a killed writer leaves."""

import json
import multiprocessing
import os
import pickle
import resource
import signal
import time

import numpy as np
import psutil
import pytest
import torch

from persona.encoders import Encoder, EncoderConfig
from persona.errors import UserError
from persona.store import HistoryStore, StoreBusy, as_stored, disk, history_key

fork = multiprocessing.get_context("fork")


def names(count, start=0):
    return [f"item {i}" for i in range(start, start + count)]


def vectors(count, dim=4, start=0):
    """Row i is (i, i + 1/2, …): exact in float16 up to 1,000, and any mix-up shows."""
    return (np.arange(start, start + count)[:, None] + np.arange(dim) / 2).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def filled(folder):
    store = HistoryStore(folder)
    store.add_vectors(names(6), vectors(6))
    store.add([("ada", ["item 4", "item 0", "item 4"]), ("bo", []), ("cy", names(6))], progress=False)
    return store


@pytest.fixture(scope="module")
def tiny(encoder_folder):
    return Encoder(EncoderConfig(str(encoder_folder), pooling="mean"), device="cpu")


# --- reading back ---------------------------------------------------------------------------------


def test_gather_pads_to_the_longest_and_keeps_the_last_items(filled):
    found, mask = filled.gather(["ada", "bo", "cy"], limit=4)
    assert found.dtype == torch.float32 and mask.dtype == torch.bool
    assert found[:, :, 0].tolist() == [[4, 0, 4, 0], [0, 0, 0, 0], [2, 3, 4, 5]]
    assert found[0, 0].tolist() == [4.0, 4.5, 5.0, 5.5]
    assert mask.tolist() == [[True, True, True, False], [False] * 4, [True] * 4]
    found, mask = filled.gather(["bo"])
    assert found.shape == (1, 1, 4) and not mask.any()
    # A random choice keeps the order, takes nothing twice, and depends on the generator alone.
    found, _ = filled.gather(["cy"], limit=3, rng=np.random.default_rng(5))
    again, _ = filled.gather(["cy"], limit=3, rng=np.random.default_rng(5))
    assert (found[0, 1:, 0] > found[0, :-1, 0]).all() and torch.equal(found, again)
    drawn = {tuple(filled.gather(["cy"], 3, np.random.default_rng(i))[0][0, :, 0].tolist()) for i in range(40)}
    assert len(drawn) > 10


def test_rows_texts_and_vectors_fit_together(filled):
    assert filled.rows("ada").tolist() == [4, 0, 4] and filled.rows("bo").tolist() == []
    assert filled.find(["item 3", "never seen", "item 0"]).tolist() == [3, -1, 0]
    assert [filled.text(row) for row in range(6)] == names(6)
    np.testing.assert_array_equal(filled.read([5, 0, 5, 1]), vectors(6)[[5, 0, 5, 1]])
    assert "ada" in filled and "dee" not in filled and len(filled) == 6 and filled.n_histories == 3
    copy = pickle.loads(pickle.dumps(filled))
    np.testing.assert_array_equal(copy.gather(["cy"])[0], filled.gather(["cy"])[0])
    filled.verify(progress=False)


def test_a_long_history_is_read_whole(folder):
    store = HistoryStore(folder)
    store.add_vectors(names(200), vectors(200))
    lengths = [disk_head := 64, 63, 65, 200]
    store.add([(f"user {n}", names(n)) for n in lengths], progress=False)
    assert [store.rows(f"user {n}").tolist() for n in lengths] == [list(range(n)) for n in lengths], disk_head


def test_float16_rounds_to_half_a_unit_in_two_to_the_eleventh(folder):
    unit = np.random.default_rng(0).normal(size=(500, 384)).astype(np.float32)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    half, full = HistoryStore(folder / "half"), HistoryStore(folder / "full", dtype="float32")
    half.add_vectors(names(500), unit)
    full.add_vectors(names(500), unit)
    np.testing.assert_array_equal(full.read(range(500)), unit)
    np.testing.assert_array_equal(half.read(range(500)), as_stored(unit))
    # 2⁻²⁵ is half the spacing of float16 below its smallest normal number.
    assert (np.abs(half.read(range(500)) - unit) <= np.abs(unit) * 2.0**-11 + 2.0**-25).all()
    assert np.abs(half.read(range(500)) @ unit[:100].T - unit @ unit[:100].T).max() < 2e-4


# --- adding ---------------------------------------------------------------------------------------


def test_texts_are_encoded_once_and_as_the_encoder_does(folder, tiny):
    store = HistoryStore(folder, tiny)
    histories = [("a", ["the red house", "the fox", "the red house"]), ("b", ["the fox", "a rainy day"]), ("c", [])]
    added = store.add(histories, progress=False)
    assert (added.histories, added.texts, added.known_histories, added.known_texts) == (3, 3, 0, 2)
    assert len(store) == 3
    texts = ["the red house", "the fox", "a rainy day"]
    np.testing.assert_allclose(store.read(store.find(texts)), as_stored(tiny.encode(texts)), atol=1e-3)
    again = HistoryStore(folder, tiny).add([*histories, ("d", ["the fox", "the dog"])], progress=False)
    assert (again.histories, again.texts, again.known_histories) == (1, 1, 3)
    # What the store has is taken from it, bit by bit; the rest is encoded now, rounded alike, and not written.
    store.refresh()
    embedded = store.embed(["good morning", "the fox"])
    np.testing.assert_array_equal(embedded[1], store.read(store.find(["the fox"]))[0])
    np.testing.assert_allclose(embedded[0], as_stored(tiny.encode(["good morning"]))[0], atol=1e-6)
    assert len(store) == 4 and store.find(["good morning"])[0] == -1


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_content_does_not_depend_on_chunks_or_order(folder, chunk):
    rng = np.random.default_rng(1)
    histories = [(f"user {u}", [f"item {i}" for i in rng.integers(50, size=rng.integers(12))]) for u in range(40)]
    store = HistoryStore(folder)
    order = rng.permutation(50)
    for part in np.array_split(order, 7):
        store.add_vectors([f"item {i}" for i in part], vectors(50)[part])
    store.add([histories[i] for i in rng.permutation(40)], progress=False, chunk=chunk)
    for key, texts in histories:
        expected = [int(text.split()[1]) for text in texts]
        assert HistoryStore(folder).gather([key])[0][0, : len(texts), 0].tolist() == expected
    # 7 commits of one index are at most log2 of that many segments.
    assert len(list(folder.glob("items-*.index"))) <= 3
    store.verify(progress=False)


def test_an_index_of_many_segments_finds_everything_and_keys_that_share_a_half(tmp_path):
    rng = np.random.default_rng(2)
    keys = rng.integers(0, 2**63, size=(5000, 2), dtype=np.uint64)
    keys[1000:2000, 0] = keys[:1000, 0]
    keys[4990:, 0] = keys[0, 0]
    index = disk.KeyIndex(tmp_path, ())
    for number, part in enumerate(np.array_split(rng.permutation(5000), 13)):
        index = disk.KeyIndex(tmp_path, disk.add_keys(tmp_path, index, f"test-{number}", keys[part], part), index)
    assert index.find(keys).tolist() == list(range(5000))
    assert (index.find(keys[:, ::-1].copy()) == -1).all()
    assert len(index.segments) <= 4


def test_segments_are_merged_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "MERGE_ROWS", 16)
    keys = np.random.default_rng(3).integers(0, 40, size=(600, 2), dtype=np.uint64)
    keys = np.unique(keys, axis=0)
    index = disk.KeyIndex(tmp_path, ())
    for number, part in enumerate(np.array_split(np.random.default_rng(4).permutation(len(keys)), 5)):
        index = disk.KeyIndex(tmp_path, disk.add_keys(tmp_path, index, f"test-{number}", keys[part], part))
    assert index.find(keys).tolist() == list(range(len(keys)))


def test_vectors_that_are_there_are_kept(folder):
    store = HistoryStore(folder)
    assert store.add_vectors(["a", "b", "a"], vectors(3)) == 2
    assert store.add_vectors(["b", "c"], vectors(2, start=9)) == 1
    assert store.read(store.find(["a", "b", "c"]))[:, 0].tolist() == [0, 1, 10]


def test_history_keys_tell_histories_apart():
    key = history_key("ada", ["x", "y"])
    assert key == history_key("ada", ["x", "y"]) and key.startswith("ada:")
    others = [("bo", ["x", "y"]), ("ada", ["y", "x"]), ("ada", ["xy"]), ("ada", ["x", "y", "y"]), ("ada", [])]
    assert len({key, *(history_key(*other) for other in others)}) == 6


# --- refusals -------------------------------------------------------------------------------------


def test_another_encoder_is_refused(folder, tiny, encoder_folder):
    HistoryStore(folder, tiny).add([("a", ["the fox"])], progress=False)
    other = Encoder(EncoderConfig(str(encoder_folder), pooling="cls"), device="cpu")
    with pytest.raises(UserError, match="pooling 'mean'.*pooling 'cls'.*use that encoder or another folder"):
        HistoryStore(folder, other)
    with pytest.raises(UserError, match="float16 vectors, not float32"):
        HistoryStore(folder, dtype="float32")
    with pytest.raises(UserError, match="no encoder was given"):
        HistoryStore(folder).add([("b", ["the dog"])], progress=False)
    with pytest.raises(UserError, match="made with the encoder.*needed to add ready-made vectors"):
        HistoryStore(folder).add_vectors(["the dog"], np.zeros((1, 16), np.float32))


def test_bad_input_is_named(filled, folder, tmp_path):
    with pytest.raises(UserError, match="no history under the key 'dee'"):
        filled.rows("dee")
    with pytest.raises(UserError, match="another history under the key 'ada'"):
        filled.add([("ada", ["item 1"])], progress=False)
    with pytest.raises(UserError, match="another history under the key 'new'"):
        filled.add([("new", ["item 1"]), ("new", ["item 2"])], progress=False)
    with pytest.raises(UserError, match="item 1 of history 'x' is NoneType"):
        filled.add([("x", ["item 1", None])], progress=False)
    with pytest.raises(UserError, match="history 'x' is one string"):
        filled.add([("x", "item 1")], progress=False)
    with pytest.raises(UserError, match="width 4, not 3"):
        filled.add_vectors(["z"], np.zeros((1, 3), np.float32))
    with pytest.raises(UserError, match="2 texts need vectors of shape"):
        filled.add_vectors(["y", "z"], np.zeros((1, 4), np.float32))
    for wrong in (np.nan, np.inf, 1e6):
        with pytest.raises(UserError, match="vector of 'z' is not finite in float16"):
            filled.add_vectors(["z"], np.full((1, 4), wrong, np.float32))
    with pytest.raises(UserError, match="no row 6; it has rows 0 to 5"):
        filled.read([0, 6])
    with pytest.raises(UserError, match="no history store in"):
        HistoryStore(tmp_path / "nowhere").rows("ada")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a history store and holds thesis.txt"):
        HistoryStore(tmp_path / "papers").add_vectors(["a"], vectors(1))
    assert os.listdir(tmp_path / "papers") == ["thesis.txt"]
    assert len(HistoryStore(folder)) == 6 and HistoryStore(folder).n_histories == 3


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("pattern", ["users-*.index", "items-*.index", "histories.bin"])
def test_a_flipped_byte_in_an_index_is_found_before_it_is_used(filled, folder, pattern):
    (path,) = folder.glob(pattern)
    flip(path)
    with pytest.raises(UserError, match=f"{path} is damaged"):
        store = HistoryStore(folder)
        store.find(["item 0"])
        store.rows("ada")


@pytest.mark.parametrize(
    "pattern", ["vectors.bin", "texts.bin", "text_ends.bin", "histories.bin", "items-*", "users-*"]
)
def test_verify_finds_every_flipped_byte(filled, folder, pattern):
    (path,) = folder.glob(pattern)
    for place in (0, len(path.read_bytes()) // 2):
        flip(path, place)
        with pytest.raises(UserError, match=f"{path} is damaged"):
            HistoryStore(folder).verify(progress=False)
        flip(path, place)
    HistoryStore(folder).verify(progress=False)


@pytest.mark.parametrize("pattern", ["vectors.bin", "texts.bin", "histories.bin", "items-*.index"])
def test_a_truncated_or_missing_file_is_named(filled, folder, pattern):
    (path,) = folder.glob(pattern)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{path}.*bytes where"):
        HistoryStore(folder)
    path.unlink()
    with pytest.raises(UserError, match=str(path)):
        HistoryStore(folder)


def test_a_damaged_manifest_is_named(filled, folder):
    path = folder / "store.json"
    good = path.read_text()
    for bad, message in [
        (good.replace('"rows": 6', '"rows": 5'), "does not fit its checksum"),
        (good[:-20], "not valid JSON"),
        (json.dumps({**json.loads(good), "format": 2}), "format version 2; this program reads version 1"),
        ("{}", "not the manifest of a history store"),
    ]:
        assert bad != good
        path.write_text(bad)
        with pytest.raises(UserError, match=message):
            HistoryStore(folder)


# --- killed writers, two at once, readers meanwhile -----------------------------------------------


def in_child(function):
    """Run it in a forked process; returns its exit code (negative: the signal that ended it)."""
    child = fork.Process(target=function)
    child.start()
    child.join(60)
    return child.exitcode


def test_an_append_killed_at_any_moment_leaves_the_store_as_before(filled, folder):
    """The writer is killed at its 1st, 2nd, … step towards the disk; a whole store remains, as before or after."""
    histories = [(f"user {u}", names(5, start=u)) for u in range(4)]

    def write(kill_at):
        steps = 0

        def fatal(call):
            def wrapped(*arguments):
                nonlocal steps
                steps += 1
                if steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments)

            return wrapped

        os.fsync, os.replace = fatal(os.fsync), fatal(os.replace)
        store = HistoryStore(folder)
        store.add_vectors(names(4, start=6), vectors(4, start=6))
        store.add(histories, progress=False)

    backup = {path.name: path.read_bytes() for path in folder.iterdir()}
    states = set()
    for kill_at in range(1, 100):
        for path in folder.iterdir():
            path.unlink()
        for name, content in backup.items():
            (folder / name).write_bytes(content)
        code = in_child(lambda at=kill_at: write(at))
        store = HistoryStore(folder)
        store.verify(progress=False)
        states.add((len(store), store.n_histories))
        np.testing.assert_array_equal(store.read(range(len(store))), vectors(len(store)))
        assert store.rows("cy").tolist() == list(range(6))
        store.add_vectors(names(4, start=6), vectors(4, start=6))
        store.add(histories, progress=False)
        assert store.gather(["user 3"])[0][0, :, 0].tolist() == [3, 4, 5, 6, 7]
        kinds = {path.suffix for path in folder.iterdir() if path.name != "lock"}
        assert kinds == {".json", ".bin", ".index"} and len(list(folder.glob("*.index"))) == sum(
            len(index.segments) for index in store._indexes.values()
        )
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert kill_at > 15 and states == {(6, 3), (10, 3), (10, 7)}


def test_a_full_disk_leaves_the_store_as_before(filled, folder):
    """A limit on the size of files stands for the full disk: the kernel refuses the write in the middle of a file."""

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        with pytest.raises(UserError, match="could not be written: File too large"):
            filled.add_vectors(names(2000, start=6), np.zeros((2000, 4), np.float32))
        assert filled.gather(["ada"])[0][0, :, 0].tolist() == [4, 0, 4]

    assert in_child(write) == 0
    store = HistoryStore(folder)
    store.verify(progress=False)
    assert len(store) == 6
    assert store.add_vectors(names(2000, start=6), np.zeros((2000, 4), np.float32)) == 2000
    store.verify(progress=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_named(filled, folder):
    os.chmod(folder, 0o500)
    with pytest.raises(UserError, match=f"{folder} could not be written to: Permission denied"):
        filled.add_vectors(["z"], vectors(1))
    assert len(HistoryStore(folder)) == 6


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=f"{tmp_path / 'file' / 'store'} could not be written to: Not a directory"):
        HistoryStore(tmp_path / "file" / "store").add_vectors(["z"], vectors(1))


@pytest.mark.multi_process
def test_a_killed_build_goes_on_where_it_stopped(folder, tiny):
    def histories(users):
        return [(f"user {u}", [f"the fox {'and the dog ' * i} of {u}" for i in range(9)]) for u in range(users)]

    child = fork.Process(target=lambda: HistoryStore(folder, tiny).add(histories(10_000), progress=False, chunk=20))
    child.start()
    deadline = time.monotonic() + 60
    while HistoryStore(folder).n_histories < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(StoreBusy, match=f"being written by process {child.pid} on"):
        HistoryStore(folder, tiny).add([("late", ["the rain"])], progress=False)
    child.kill()
    child.join()
    store = HistoryStore(folder, tiny)
    done, texts = store.n_histories, len(store)
    assert 3 <= done < 10_000
    added = store.add(histories(done + 5), progress=False)
    assert (added.histories, added.known_histories, added.texts) == (5, done, len(store) - texts)
    assert added.texts <= 45
    last = histories(done + 5)[-1][1]
    np.testing.assert_allclose(store.gather([f"user {done + 4}"])[0][0], as_stored(tiny.encode(last)), atol=1e-3)
    store.verify(progress=False)


@pytest.mark.multi_process
def test_readers_see_whole_snapshots_while_one_writes(folder):
    HistoryStore(folder).add_vectors(names(3), vectors(3))

    def write():
        store = HistoryStore(folder)
        for start in range(3, 198, 13):
            store.add_vectors(names(13, start), vectors(13, start=start))
            store.add([(f"user {start}", names(start))], progress=False)

    def read():
        rng = np.random.default_rng(os.getpid())
        store, seen = HistoryStore(folder), set()
        while len(store) < 198:
            time.sleep(0.002)  # leaves the writer a processor
            store.refresh()
            n = len(store)
            seen.add(n)
            rows = rng.integers(n, size=20)
            np.testing.assert_array_equal(store.read(rows), vectors(n)[rows])
            assert store.find([f"item {row}" for row in rows]).tolist() == rows.tolist()
            if n > 30:
                assert len(store.rows("user 3")) == 3
        assert len(seen) > 3, seen

    processes = [fork.Process(target=function) for function in (read, read, write)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]


# --- memory ---------------------------------------------------------------------------------------


def test_reading_everything_leaves_nothing_in_memory(folder):
    """A mapped file would count here: 92 MB of vectors pass through, a few of them stay."""
    store = HistoryStore(folder)
    for start in range(0, 120_000, 40_000):
        store.add_vectors(names(40_000, start), np.full((40_000, 384), start // 40_000, np.float16))
    store = HistoryStore(folder)
    rng = np.random.default_rng(0)
    process = psutil.Process()
    store.read(np.zeros(2000, dtype=np.int64))  # the memory of one batch, with one page of the file
    before = process.memory_info().rss
    for rows in np.array_split(rng.permutation(120_000), 60):
        assert (store.read(rows)[:, 0] == rows // 40_000).all()
    assert process.memory_info().rss - before < 25e6
