"""The script that times preference training runs, and notices when the two sides are not the same thing."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest

from persona.errors import UserError


@pytest.fixture(scope="module")
def script(root):
    spec = importlib.util.spec_from_file_location("dpo_step", root / "benchmarks" / "dpo_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quick_run(script, capsys):
    script.main(["--quick", "--scratch", "32", "1", "400"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "reference" in line]
    assert ["with the reference" in lines[0], "reference known to both" in lines[1]] == [True, True]


def test_other_tokens_stop_the_run(script):
    ours = SimpleNamespace(data_collator=SimpleNamespace(rows=[([1, 2], [3]), ([1, 2], [4])]))
    theirs = SimpleNamespace(train_dataset=[{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [5]}])
    with pytest.raises(UserError, match="TRL's tokens differ from ours in 2 of 2 rows"):
        script.check(ours, theirs, 1)
