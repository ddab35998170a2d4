"""Methods under several back ends on two processes: losses and tensors as of one process (the script matrix.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import command, two_processes
from matrix import difference, prepare

SCRIPT = Path(__file__).parent / "matrix.py"


def table(out: Path, *arguments: str) -> dict[tuple[str, str], list[str]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), *arguments], capture_output=True, text=True, timeout=3600
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    assert done.returncode == 0 and not any("failed" in cell for row in rows for cell in row), done.stderr[-3000:]
    return {(row[0], row[1]): row[2:] for row in rows[2:]}


def differences(cell: str) -> list[float]:
    return [0.0 if text == "none" else float(text) for text in cell.partition("(")[0].split(" / ")]


@pytest.mark.multi_process
def test_an_adapter_over_a_divided_base_is_that_of_one_process(tmp_path: Path) -> None:
    """As in the table, by processes that have everything imported."""
    prepare(tmp_path)
    given = ["--methods", "finetune_lora", "--no-resume", "--out", str(tmp_path), "--worker"]
    alone = command("tests/faults/matrix.py", [*given, "single"])
    for launch in ("zero3", "fsdp2"):
        both = two_processes("tests/faults/matrix.py", [*given, launch])
        assert [done.code for done in (alone, *both)] == [0, 0, 0], [done.err[-3000:] for done in (alone, *both)]
        whole = [tmp_path / name / "finetune_lora" / "whole" for name in ("single", launch)]
        loss, artefact = differences(difference(*whole))
        assert loss < 1e-5 and artefact < 1e-6


@pytest.mark.slow
def test_every_method_under_every_back_end(tmp_path: Path) -> None:
    """About half an hour of CPU time."""
    for (method, launch), (against, resumed, _) in table(tmp_path).items():
        if launch != "single":
            loss, artefact = differences(against)
            # AdamW makes steps of its full size out of gradients that are rounding alone (key biases of an encoder).
            assert loss < 1e-5 and artefact < 1e-3, (method, launch, against)
        if "stops" in resumed:
            assert differences(resumed) == [0.0, 0.0], (method, launch, resumed)
