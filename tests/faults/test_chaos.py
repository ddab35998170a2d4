"""The chaos script in small: a training that is killed three times; and what it looks at in what a run leaves."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from chains import GROUP, START, TERM, Case, Reference, chain, compare, uninterrupted


@pytest.fixture(scope="module")
def case(training) -> Case:
    steps = ("trainer.max_steps=40", "trainer.save_every=3", "trainer.eval_every=15", "trainer.log_every=1")
    return Case("lora", "train.py", (*training, *steps, "trainer.wandb=disabled"))


@pytest.fixture(scope="module")
def whole(case, tmp_path_factory) -> Reference:
    return uninterrupted(case, tmp_path_factory.mktemp("chaos"), "", fork=True)


def test_a_training_that_is_killed_three_times_ends_as_one_that_ran_through(case, whole, tmp_path):
    hits = Counter[str]()
    made = chain(case, whole, tmp_path, "", 3, random.Random(1), (GROUP, TERM, GROUP), hits)
    assert made.starts == len(made.kills) + 1 >= 3 and set(hits) - {START}
    assert not (made.lost or made.doubled or made.wrong or made.orphans), made
    assert (tmp_path / "out" / "personalizer" / "adapter" / "adapter_model.safetensors").is_file()


def test_what_differs_is_seen(whole, tmp_path):
    """Two rows less and one twice, another loss, other weights, a file too many and one that was being written."""

    def left(name: str) -> Path:
        return Path(shutil.copytree(whole.out, tmp_path / name / whole.out.name))

    assert compare(whole.out, left("same")) == compare(whole.out, whole.out)
    rows = (whole.out / "metrics.jsonl").read_text().splitlines(keepends=True)
    out = left("rows")
    (out / "metrics.jsonl").write_text("".join([*rows[2:], rows[5]]))
    found = compare(whole.out, out)
    assert (len(found.lost), len(found.doubled), found.wrong) == (2, 1, [])
    out = left("values")
    (out / "metrics.jsonl").write_text("".join([json.dumps({**json.loads(rows[0]), "loss": 7.0}) + "\n", *rows[1:]]))
    weights = out / "personalizer" / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    (out / "new.json").write_text("{}")
    (out / "stages").mkdir()
    (out / "stages" / ".pairs.123-abc.x.tmp").mkdir()
    assert len(compare(whole.out, out).wrong) == 4
