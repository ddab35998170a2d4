"""The README's tree names every module, and its commands use configs that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_module_has_a_line_in_the_tree() -> None:
    tree = README.split("## The house")[1].split("```")[1]
    named = {line.split()[0] for line in tree.splitlines() if line.strip()}
    modules = {path.name for path in (ROOT / "persona").rglob("*.py") if path.name != "__init__.py"}
    modules |= {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    assert len(modules) > 40
    assert modules - named == set()
    assert {name for name in named if name.endswith(".py")} - modules == {"train.py", "evaluate.py"} | (
        {"__init__.py"} & named
    )


def test_commands_name_configs_that_exist() -> None:
    for group in ("experiment", "data", "method", "model", "benchmark", "baselines", "trainer", "launch"):
        for choice in re.findall(rf"(?<![\w.+]){group}=([a-z_0-9]+)", README):
            assert (ROOT / "configs" / group / f"{choice}.yaml").is_file(), f"{group}={choice}"
