"""A real Slurm of two nodes for the tests here, where there can be one; else they are skipped, with the reason."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm_cluster as slurm

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    if reason := slurm.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents):  # munge wants to reach its socket
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o111)
    made = slurm.make(folder)
    made.environment |= {
        **{"PERSONA_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"},
        **{"TOKENIZERS_PARALLELISM": "false"},
    }
    try:
        made.start()
        yield made
    finally:
        made.stop()
