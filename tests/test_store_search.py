"""Search in the store: exact equals numpy, the index finds nearly all and is refused when it is not this store's."""

import sys

import numpy as np
import pytest

from persona.errors import UserError
from persona.store import HistoryStore, as_stored, search

DIM = 32


def clustered(count, seed=0):
    """Unit vectors around 60 centres, as histories of people with tastes are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(60, DIM))
    found = centres[rng.integers(60, size=count)] + 0.5 * rng.normal(size=(count, DIM))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def make(folder, count, dtype="float16"):
    store = HistoryStore(folder, dtype=dtype)
    store.add_vectors([f"item {i}" for i in range(count)], clustered(count))
    return store


def best(queries, vectors, k):
    scores = queries @ vectors.T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


def recall(found, truth):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, truth, strict=True)])


def test_search_within_a_history_by_hand(tmp_path):
    store = HistoryStore(tmp_path / "store")
    store.add_vectors(["east", "north", "both"], np.array([[1, 0], [0, 1], [0.5, 0.5]], np.float32))
    store.add([("ada", ["north", "both", "east", "north"]), ("bo", []), ("cy", ["east"])], progress=False)
    queries = np.array([[0, 2], [1, 1], [3, 0]], np.float32)
    scores, positions = store.search_history(["ada", "bo", "cy"], queries, k=3)
    assert positions.tolist() == [[0, 3, 1], [-1, -1, -1], [0, -1, -1]]
    assert scores.tolist() == [[2, 2, 1], [-np.inf] * 3, [3, -np.inf, -np.inf]]


def test_exact_search_equals_numpy(tmp_path, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(search, "BLOCK_ROWS", 700)
    store = make(tmp_path / "store", 2000)
    queries = clustered(20, seed=1)
    scores, rows = store.search(queries, 10)
    expected_scores, expected_rows = best(queries, as_stored(clustered(2000)), 10)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
    few = make(tmp_path / "few", 3)
    scores, rows = few.search(queries[:1], 5)
    assert sorted(rows[0, :3]) == [0, 1, 2] and rows[0, 3:].tolist() == [-1, -1] and np.isinf(scores[0, 3:]).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_index_finds_nearly_all_and_what_was_added_since(tmp_path, monkeypatch, dtype):
    pytest.importorskip("faiss")
    monkeypatch.setattr(search, "BLOCK_ROWS", 1500)
    store = make(tmp_path / "store", 6000, dtype)
    store.build_index(progress=False)
    queries = clustered(100, seed=1)
    exact_scores, exact_rows = store.search(queries, 10)
    scores, rows = store.search(queries, 10, approximate=True)
    assert recall(rows, exact_rows) >= 0.9
    # Where it finds the same item, the score is the same: no second rounding.
    same = rows == exact_rows
    np.testing.assert_allclose(scores[same], exact_scores[same], atol=1e-5)
    # All lists = everything; one list of 77 misses some.
    assert recall(store.search(queries, 10, approximate=True, probes=77)[1], exact_rows) == 1
    assert recall(store.search(queries, 10, approximate=True, probes=1)[1], exact_rows) < 1
    store.add_vectors([f"late {i}" for i in range(100)], queries)
    assert (store.search(queries, 10, approximate=True)[1][:, 0] == 6000 + np.arange(100)).all()
    reopened = HistoryStore(tmp_path / "store")
    for one, other in zip(*(s.search(queries, 10, approximate=True) for s in (store, reopened)), strict=True):
        np.testing.assert_array_equal(one, other)
    reopened.verify(progress=False)


def test_an_index_that_does_not_fit_is_refused(tmp_path):
    pytest.importorskip("faiss")
    store, other = make(tmp_path / "store", 300), make(tmp_path / "other", 300)
    with pytest.raises(UserError, match="no index for approximate search; call build_index first"):
        store.search(clustered(1), 1, approximate=True)
    with pytest.raises(UserError, match=r"queries have shape \[1, 31\]; .* takes \[Q, 32\]"):
        store.search(clustered(1)[:, 1:], 1)
    other.build_index(progress=False)
    (tmp_path / "other" / "ivf").rename(tmp_path / "store" / "ivf")
    with pytest.raises(UserError, match="the index of another store; build it again"):
        store.search(clustered(1), 1, approximate=True)
    store.build_index(progress=False)
    for name in ("ivf.index", "lists.bin"):
        path = tmp_path / "store" / "ivf" / name
        content = path.read_bytes()
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        with pytest.raises(UserError, match=f"{path} is damaged"):
            HistoryStore(tmp_path / "store").verify(progress=False)
        path.write_bytes(content[:-1])
        with pytest.raises(UserError, match=f"{path} is missing or does not have"):
            HistoryStore(tmp_path / "store").search(clustered(1), 1, approximate=True)
        path.write_bytes(content)
    HistoryStore(tmp_path / "store").search(clustered(1), 1, approximate=True)


def test_the_index_depends_on_its_seed_alone(tmp_path):
    pytest.importorskip("faiss")
    store = make(tmp_path / "store", 1000)
    contents = []
    for seed in (0, 0, 1):
        store.build_index(seed=seed, progress=False)
        contents.append((tmp_path / "store" / "ivf" / "lists.bin").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def test_without_faiss_the_extra_is_named(tmp_path, monkeypatch):
    store = make(tmp_path / "store", 10)
    monkeypatch.setitem(sys.modules, "faiss", None)  # what Python itself does on a failed import: importing raises
    with pytest.raises(UserError, match=r"install persona\[faiss-cpu\], or persona\[faiss-gpu\]"):
        store.search(clustered(1), 1)
    with pytest.raises(UserError, match=r"install persona\[faiss-cpu\]"):
        store.build_index(progress=False)
