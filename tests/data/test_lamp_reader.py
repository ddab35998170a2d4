"""LaMP's official files: every shape they come in, and everything that can be wrong with them."""

import contextlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from persona.data import DataConfig, load
from persona.data.lamp_tasks import FIELDS
from persona.errors import UserError

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "lamp"
PLACES = {"LaMP_1": "LaMP_1", "LaMP_2": "LaMP_2", "LaMP_3": "LaMP_time_3", "LaMP_4": "time/LaMP_4",
          "LaMP_5": "LaMP_5", "LaMP_7": "LaMP_7"}  # fmt: skip


@pytest.fixture
def read(tmp_path):
    """Read a folder with a cache of its own; settings as keywords."""
    return lambda path, **settings: load(DataConfig(path=str(path), cache=str(tmp_path / "cache"), **settings))


@pytest.fixture
def copied(tmp_path):
    """A copy of the tweets, to break; returns (folder, edit): edit(file, function) rewrites a file's JSON."""
    folder = tmp_path / "copy"
    shutil.copytree(FIXTURES / "LaMP_7", folder)

    def edit(name, change):
        value = json.loads((folder / name).read_text())
        changed = change(value)
        (folder / name).write_text(json.dumps(value if changed is None else changed))

    return folder, edit


@pytest.mark.parametrize("name", list(PLACES))
def test_every_task_reads_as_the_json_module_does(read, name):
    people = read(FIXTURES / PLACES[name])
    assert people.name == f"lamp/{name}" and list(people.tasks) == [name]
    for split in ("train", "dev"):
        (questions,) = (FIXTURES / PLACES[name]).rglob(f"{split}_questions.json")
        rows = json.loads(questions.read_text())
        golds = json.loads(questions.with_name(f"{split}_outputs.json").read_text())["golds"]
        samples = people.split(split)
        assert len(samples) == len(rows) > 0
        for sample, row, gold in zip(samples, rows, golds, strict=True):
            assert (sample.id, sample.target, sample.task) == (row["id"], gold["output"], name)
            assert [(message.role, message.content) for message in sample.messages] == [("user", row["input"])]
            assert sample.persona.id == row.get("user_id", row["id"])
            fields = FIELDS[name]
            assert [(i.id, i.text, i.label, i.date) for i in sample.persona.history] == [
                (i["id"], i[fields.text], i[fields.label] if fields.label else None, i.get("date"))
                for i in row["profile"]
            ]
    rules = people.tasks[name]
    assert all(sample.target in rules.labels for sample in people.dev if rules.labels)


def test_a_folder_of_several_tasks_needs_the_task(read):
    with pytest.raises(UserError, match="holds several train_questions.json .* name one with data.task"):
        read(FIXTURES)
    assert len(read(FIXTURES, task="LaMP-3").dev) == 3
    assert read(FIXTURES, task="LaMP_4").dev[0].persona.id == "writer0"


def test_user_and_time_based_of_one_task_are_not_mixed_up(read, tmp_path):
    shutil.copytree(FIXTURES / "LaMP_7", tmp_path / "both" / "LaMP_7")
    shutil.copytree(FIXTURES / "LaMP_7", tmp_path / "both" / "time" / "LaMP_7")
    with pytest.raises(UserError, match="let data.path point further down"):
        read(tmp_path / "both", task="LaMP_7")


def test_merged_form_gives_the_same_samples(read, copied):
    folder, edit = copied
    before = list(read(folder).dev)
    for split in ("train", "dev"):
        golds = {
            row["id"]: row["output"] for row in json.loads((folder / f"{split}_outputs.json").read_text())["golds"]
        }
        edit(
            f"{split}_questions.json", lambda rows, golds=golds: [{**row, "output": golds[row["id"]]} for row in rows]
        )
        (folder / f"{split}_outputs.json").unlink()
    with pytest.raises(UserError, match="cannot be told from the files; name it with data.task"):
        read(folder)
    after = list(read(folder, task="LaMP_7").dev)
    assert [(s.id, s.target, list(s.persona.history)) for s in after] == [
        (s.id, s.target, list(s.persona.history)) for s in before
    ]


def test_hidden_test_split(read, copied):
    folder, _ = copied
    shutil.copy(folder / "dev_questions.json", folder / "test_questions.json")
    people = read(folder)
    assert [sample.target for sample in people.test] == ["", ""]
    assert [sample.id for sample in people.test] == [sample.id for sample in people.dev]
    assert read(FIXTURES / "LaMP_7").test == ()


def test_limit(read):
    people = read(FIXTURES / "LaMP_5", limit=1)
    assert (len(people.train), len(people.dev)) == (1, 1)


def test_numbers_as_scores_and_ids_are_read_as_text(read, tmp_path):
    shutil.copytree(FIXTURES / "LaMP_time_3", tmp_path / "LaMP_3")
    for path in (tmp_path / "LaMP_3").glob("*_questions.json"):
        rows = json.loads(path.read_text())
        for row in rows:
            for item in row["profile"]:
                item["score"] = int(item["score"])
        path.write_text(json.dumps(rows))
    assert read(tmp_path / "LaMP_3").dev[0].persona.history[0].label == "5"


# ---- what can be wrong ---------------------------------------------------------------------------------------------


def test_missing_outputs(read, copied):
    folder, _ = copied
    (folder / "dev_outputs.json").unlink()
    with pytest.raises(UserError, match=r"dev_questions.json, row 1 \(id 720\) has no output, .* no dev_outputs.json"):
        read(folder, task="LaMP_7")


def test_missing_questions(read, copied):
    folder, _ = copied
    (folder / "dev_questions.json").unlink()
    with pytest.raises(UserError, match="there is no dev_questions.json in"):
        read(folder)


def test_outputs_of_other_ids(read, copied):
    folder, edit = copied

    def rename(outputs):
        outputs["golds"][0]["id"] = "other"
        outputs["golds"].append({"id": "spare", "output": "x"})

    edit("dev_outputs.json", rename)
    with pytest.raises(UserError) as caught:
        read(folder)
    assert str(caught.value).endswith(
        "dev_questions.json (2 rows) and dev_outputs.json (3 rows) do not belong together: "
        "1 questions have no output (ids 720); 2 outputs have no question (ids other, spare)"
    )


def test_duplicate_ids(read, copied):
    folder, edit = copied
    edit("train_questions.json", lambda rows: rows + [rows[1]])
    with pytest.raises(UserError, match=r"train_questions.json, row 5 \(id 701\) repeats an id"):
        read(folder)
    edit("train_questions.json", lambda rows: rows[:4])
    edit("train_outputs.json", lambda outputs: outputs["golds"].append(outputs["golds"][0]))
    with pytest.raises(UserError, match="row 5 of golds repeats the id 700"):
        read(folder)


def test_wrong_task_names(read, copied):
    folder, edit = copied
    with pytest.raises(UserError, match="did you mean LaMP_7"):
        read(folder, task="LaMP_77")
    with pytest.raises(
        UserError, match="data.task is LaMP_3, but .*dev_outputs.json|train_outputs.json says its task"
    ):
        read(folder, task="LaMP_3")
    edit("train_outputs.json", lambda outputs: outputs.update(task="LaMP_9"))
    with pytest.raises(UserError, match="no task 'LaMP_9'"):
        read(folder)
    edit("train_outputs.json", lambda outputs: outputs.update(task="LaMP_2"))
    with pytest.raises(UserError, match="train_questions.json, row 1 .* has no field 'description'"):
        read(folder)
    edit("train_outputs.json", lambda outputs: outputs.update(task="LaMP-7"))
    assert read(folder).train[0].task == "LaMP_7"


def test_empty_profile_is_fatal_unless_allowed_and_then_counted(read, copied, caplog):
    folder, edit = copied
    edit("train_questions.json", lambda rows: [{**row, "profile": []} if row["id"] != "700" else row for row in rows])
    with pytest.raises(
        UserError, match=r"3 samples have an empty profile \(ids 701, 710, 711\); .*allow_empty_profile"
    ):
        read(folder)
    with caplog.at_level(logging.WARNING):
        people = read(folder, allow_empty_profile=True)
    assert [len(sample.persona.history) for sample in people.train] == [6, 0, 0, 0]
    assert "3 samples have an empty profile" in caplog.text


def test_item_without_text(read, copied, caplog):
    folder, edit = copied

    def blank(rows):
        rows[1]["profile"][2]["text"] = "  "

    edit("dev_questions.json", blank)
    with pytest.raises(UserError, match=r"1 profile items have no text \(ids t23 of 721\); .*allow_empty_text"):
        read(folder)
    with caplog.at_level(logging.WARNING):
        assert len(read(folder, allow_empty_text=True).dev[1].persona.history) == 6
    assert "1 profile items have no text" in caplog.text
    edit("dev_questions.json", lambda rows: rows[1]["profile"][2].pop("text") and None)
    with pytest.raises(UserError, match=r"row 2 \(id 721\), item 3 of the profile has no field 'text'.*fields: id"):
        read(folder)


def test_empty_abstract_with_a_title_is_text_enough(read, tmp_path):
    shutil.copytree(FIXTURES / "LaMP_5", tmp_path / "LaMP_5")
    path = tmp_path / "LaMP_5" / "dev_questions.json"
    rows = json.loads(path.read_text())
    rows[0]["profile"][0]["abstract"] = ""
    path.write_text(json.dumps(rows))
    assert read(tmp_path / "LaMP_5").dev[0].persona.history[0].text == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("input"), r"row 2 \(id 721\) has no field 'input'"),
        (lambda row: row.update(input=" "), r"row 2 \(id 721\) has an empty input"),
        (lambda row: row.pop("id"), "row 2 has no field 'id'"),
        (lambda row: row.pop("profile"), r"row 2 \(id 721\) has no list 'profile'"),
        (lambda row: row.update(profile=[7]), r"item 1 of the profile is 7, where a JSON object should be"),
    ],
)
def test_rows_that_lack_something(read, copied, change, message):
    folder, edit = copied
    edit("dev_questions.json", lambda rows: change(rows[1]) and None)
    with pytest.raises(UserError, match=message):
        read(folder)


def test_broken_json_and_cut_off_file_leave_no_cache(read, copied, tmp_path):
    folder, _ = copied
    path = folder / "train_questions.json"
    whole = path.read_text()
    path.write_text(whole.replace('"id": "711"', '"id": "711'))
    with pytest.raises(
        UserError, match=r"train_questions.json holds broken JSON in row 4 \(counted from 1\), at byte"
    ):
        read(folder)
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"train_questions.json is cut off in row 3 \(counted from 1\)"):
        read(folder)
    assert [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"] == []
    path.write_text(whole)
    assert len(read(folder).train) == 4


def test_a_file_of_another_shape(read, copied):
    folder, _ = copied
    (folder / "train_questions.json").write_text('{"questions": []}')
    with pytest.raises(UserError, match="holds no rows; it should be a list of questions"):
        read(folder)
    (folder / "train_outputs.json").write_text('[{"id": "700", "output": "x"}]')
    with pytest.raises(UserError, match="train_outputs.json holds no golds"):
        read(folder)


@contextlib.contextmanager
def as_nobody():
    """Without root's right to read everything, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that anyone may enter, outside pytest's own, with the tweets in it."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        shutil.copytree(FIXTURES / "LaMP_7", Path(name) / "LaMP_7")
        (Path(name) / "cache").mkdir()
        os.chmod(Path(name) / "cache", 0o777)
        yield Path(name)


def test_no_permission(open_folder):
    folder, cache = open_folder / "LaMP_7", open_folder / "cache"
    cfg = DataConfig(path=str(folder), cache=str(cache))
    secret = folder / "train_questions.json"
    secret.chmod(0)
    with as_nobody(), pytest.raises(UserError, match="train_questions.json could not be read: Permission denied"):
        load(cfg)
    secret.chmod(0o644)
    folder.chmod(0)
    with as_nobody(), pytest.raises(UserError, match="data.path .* could not be read: Permission denied"):
        load(cfg)
    folder.chmod(0o755)
    cache.chmod(0o555)
    with as_nobody(), pytest.raises(UserError, match="data.cache .* could not be used: Permission denied"):
        load(cfg)
    cache.chmod(0o777)
    with as_nobody():
        assert len(load(cfg).dev) == 2


def test_path_is_missing_or_a_file(read, tmp_path):
    with pytest.raises(UserError, match="data.path is not set"):
        load(DataConfig(cache=str(tmp_path)))
    with pytest.raises(UserError, match="could not be read: No such file"):
        read(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be read: Not a directory"):
        read(tmp_path / "file")
    with pytest.raises(UserError, match="data.name is 'lamb'"):
        load(DataConfig(name="lamb"))
