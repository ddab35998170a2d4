"""The scripts that time reading and editing states run, and notice when what they compare is not the same."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from persona import lm
from persona.errors import UserError


@pytest.fixture(scope="module")
def scripts(root):
    sys.path.insert(0, str(root / "benchmarks"))  # as python benchmarks/….py has it
    found = {}
    try:
        for name in ("axis_extraction", "steering_overhead"):
            spec = importlib.util.spec_from_file_location(name, root / "benchmarks" / f"{name}.py")
            found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found[name])
        yield found
    finally:
        sys.path.remove(str(root / "benchmarks"))
        for name in found:
            del sys.modules[name]


def test_extraction(scripts, capsys):
    scripts["axis_extraction"].main(["--quick", "--scratch", "32", "2", "400"])
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith("│")]
    names = ("bare forward", "passage_means", "span_means, from text", "logits and all states kept")
    assert all(name in line for name, line in zip(names, lines, strict=True))
    assert "written for 6 rollouts" in said


def test_bytes_do_not_grow_with_rollouts_as_a_dump_does(scripts):
    base, script = lm.load(lm.ModelConfig(device="cpu")), scripts["axis_extraction"]
    small, large = (script.written(base, script.conversations_of(n), 8) for n in (8, 32))
    assert large["dump"] - small["dump"] > 24 * 4 * base.hidden_size * 2
    # A projection per layer, and a few letters of the header.
    assert large["sums and projections"] - small["sums and projections"] < 24 * 4 * 4 + 100


def test_other_means_stop_the_run(scripts):
    means = {i: torch.ones(1, 2, 4) for i in range(2)}
    lines = {"bare forward": lambda: None, "ours": lambda: means, "from text": lambda: means}
    scripts["axis_extraction"].check({**lines, "kept": lambda: list(means.values())}, 2)
    with pytest.raises(UserError, match="the means of conversation 1 differ from those of stored states"):
        scripts["axis_extraction"].check({**lines, "kept": lambda: [means[0], 2 * means[1]]}, 2)


def test_overhead(scripts, capsys):
    scripts["steering_overhead"].main(["--quick"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("no edit", "1 layer, add", "8 layers, add", "8 layers, cap"))
    for library in ("repeng", "steering-vectors"):
        assert f"add: {library}" in said or f"not installed, so not measured: {library}" in said or library in said


def test_more_layers_than_there_are(scripts, capsys):
    with pytest.raises(SystemExit):
        scripts["steering_overhead"].main(["--quick", "--layers", "9"])
    assert "--layers 9: the LM has 8 layers" in capsys.readouterr().err
