"""The throughput script runs, compares like with like, and notices when it does not."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from persona.errors import UserError
from persona.types import Response


@pytest.fixture(scope="module")
def script(root):
    path = root / "benchmarks" / "evaluation_throughput.py"
    spec = importlib.util.spec_from_file_location("evaluation_throughput", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_quick_run(script, capsys):
    script.main(["--quick"])
    table = capsys.readouterr().out
    lines = [line for line in table.splitlines() if "replies" in line or "log p to" in line]
    assert len(lines) >= 7 and any("no sharing" in line for line in lines) and any("4 users" in line for line in lines)
    assert "lm-eval is not installed" in table or "lm-eval, HF backend" in table


def test_contexts_really_share(script):
    from persona.lm import ModelConfig, load
    from persona.lm.prefix import find_families

    base = load(ModelConfig(device="cpu"))
    people = script.load(script.TownConfig(train=0, dev=0, test=20))
    requests = script.on_contexts(base, people.test, 128, 16)
    prompts = [base.render(request.messages) for request in requests]
    assert all(100 <= len(prompt) <= 160 for prompt in prompts)
    families = find_families(prompts)
    assert sorted(sorted(members) for _, members in families) == [list(range(8)), list(range(8, 16))]
    assert all(n >= 100 for n, _ in families) and all(len(request.options) == 4 for request in requests)


def test_a_difference_stops_the_run(script):
    assert script.agree("a", [[-1.0, -2.0]], [[-1.0, -2.0005]]) == "log p to 5e-04"
    with pytest.raises(UserError, match="what: log p differ from the baseline's by up to 0.002"):
        script.agree("what", [[-1.0, -2.0]], [[-1.0, -2.002]])
    with pytest.raises(UserError, match="only 1 of 2 replies"):
        script.agree("what", [Response("a", (1,)), Response("b", (2,))], [Response("a", (1,)), Response("b", (3,))])


def test_a_context_that_does_not_fit(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--contexts", "5000"])
    assert "--contexts 5000 and a question do not fit: 1024 positions" in capsys.readouterr().err
