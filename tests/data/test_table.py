"""Arrow tables on disk and the lazy views over them."""

import pickle

import pytest

from persona.data.table import History, Samples, TableWriter, cached_table
from persona.types import HistoryItem, Message

ITEMS = [HistoryItem(str(i), f"text {i}", None if i % 2 else f"label {i}", "2020-01-01") for i in range(7)]


@pytest.fixture
def table(tmp_path):
    with TableWriter(tmp_path) as writer:
        writer.person("first", ITEMS[:2])
        ann = writer.person("ann", ITEMS[2:], description="tall", statements=["a", "b"], attributes={"age": "30"})
        empty = writer.person("none", [])
        message = (Message("user", "hi"),)
        writer.sample("q1", message, "yes", "plain", ann)
        writer.sample("q2", message, "no", "plain", ann, selection=[3, 0], options=["yes", "no"])
        writer.sample("q3", message, "", "plain", empty)
        writer.sample("q4", message, "x", "plain", None)
    return str(tmp_path)


def test_what_is_written_is_read(table):
    samples = Samples(table)
    assert [sample.id for sample in samples] == ["q1", "q2", "q3", "q4"]
    ann = samples[0].persona
    assert (ann.id, ann.description, ann.statements, ann.attributes) == ("ann", "tall", ("a", "b"), {"age": "30"})
    assert list(ann.history) == ITEMS[2:]
    assert samples[1].options == ("yes", "no") and samples[0].options is None
    assert list(samples[1].persona.history) == [ITEMS[5], ITEMS[2]]
    assert list(samples[2].persona.history) == []
    assert samples[3].persona is None


def test_history_is_a_sequence_like_a_list(table):
    for history, items in [(Samples(table)[0].persona.history, ITEMS[2:]),
                           (Samples(table)[1].persona.history, [ITEMS[5], ITEMS[2]])]:  # fmt: skip
        assert len(history) == len(items)
        for index in range(-len(items), len(items)):
            assert history[index] == items[index]
        for cut in (slice(None), slice(1, None), slice(-1, None), slice(0, 0), slice(3, 1), slice(None, None, -1)):
            assert history[cut] == items[cut]
        with pytest.raises(IndexError):
            history[len(items)]
        assert items[0] in history and ITEMS[0] not in history


def test_views_pickle_without_their_rows_and_compare_equal(table):
    history = Samples(table)[0].persona.history
    packed = pickle.dumps(history)
    assert b"text" not in packed
    assert pickle.loads(packed) == history == ITEMS[2:]
    assert hash(pickle.loads(packed)) == hash(history)
    assert [sample.id for sample in pickle.loads(pickle.dumps(Samples(table, 2)))] == ["q1", "q2"]


def test_limit_and_many_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("persona.data.table.BATCH_ROWS", 3)
    with TableWriter(tmp_path) as writer:
        for number in range(10):
            person = writer.person(str(number), ITEMS[: number % 5])
            writer.sample(str(number), (Message("user", "hi"),), "", "plain", person)
    samples = Samples(str(tmp_path))
    assert [len(sample.persona.history) for sample in samples] == [n % 5 for n in range(10)]
    assert list(samples[9].persona.history) == ITEMS[:4]
    assert len(Samples(str(tmp_path), 4)) == 4 and len(Samples(str(tmp_path), 40)) == 10


def test_cache_builds_once_and_again_when_the_source_changes(tmp_path):
    source, built = tmp_path / "source.json", []

    def build(writer, advance):
        built.append(source.read_text())
        writer.person(built[-1], [])
        return {"count": len(built)}

    source.write_text("one")
    first, facts = cached_table(tmp_path / "cache", [source], "x", build)
    assert cached_table(tmp_path / "cache", [source], "x", build) == (first, facts)
    assert built == ["one"] and facts == {"count": 1}
    source.write_text("three")
    second, _ = cached_table(tmp_path / "cache", [source], "x", build)
    assert second != first and built == ["one", "three"]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    source = tmp_path / "source.json"
    source.write_text("one")

    def build(writer, advance):
        writer.person("half", ITEMS)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        cached_table(tmp_path / "cache", [source], "x", build)
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_history_repr_is_short(table):
    assert repr(History(table, 0, 2)) == f"History(2 items of {table})"
