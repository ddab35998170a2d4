"""Imports run one way (the layers are in pyproject.toml), and `import persona` stays cheap."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "wandb", "matplotlib")


def lint(folder: Path) -> subprocess.CompletedProcess:
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    return subprocess.run([sys.executable, "-c", command], cwd=folder, capture_output=True, text=True)


def test_imports_run_one_way(root):
    done = lint(root)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "room, line",
    (
        ("methods", "from persona.benchmarks import lamp"),
        ("benchmarks", "from persona.methods.persona_plug import aggregate"),
        ("lm", "import persona.personalizer"),
        ("training", "from persona import methods"),
        ("new_room", "from persona import types"),
    ),
)
def test_a_wrong_import_is_seen_also_inside_a_function(root, tmp_path, room, line):
    """In a copy of the tree without its data, so that the check itself is known to work."""
    shutil.copytree(root / "persona", tmp_path / "persona", ignore=shutil.ignore_patterns("model", "__pycache__"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    (tmp_path / "persona" / room).mkdir(exist_ok=True)
    (tmp_path / "persona" / room / "__init__.py").touch()
    (tmp_path / "persona" / room / "stray.py").write_text(f"def hidden():\n    {line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1 and room in done.stdout, done.stdout + done.stderr


def test_import_persona_is_cheap():
    code = f"import sys, persona; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_nothing_in_the_package_knows_the_entry_points(root):
    for path in (root / "persona").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & {"train", "evaluate", "tests"}, path
