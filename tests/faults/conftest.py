"""A scratch LM that knows the town's words, for commands that train and evaluate in a second."""

from __future__ import annotations

from pathlib import Path

import pytest

TOWN = ("data=town", "data.train=2", "data.dev=2", "data.test=1", "model=local", "model.device=cpu")


@pytest.fixture(scope="session")
def town_lm(tmp_path_factory) -> Path:
    from persona.lm import scratch
    from persona.town.grammar import vocabulary
    from persona.town.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("town") / "lm"
    return scratch.make(folder, build_tokenizer(vocabulary()), "llama", 32, 1, 2, max_positions=512)


@pytest.fixture(scope="session")
def training(town_lm) -> list[str]:
    """Six steps of LoRA with a checkpoint every second one."""
    return [*TOWN, f"model.path={town_lm}", "method=finetune_lora", "debug=tiny", "trainer.cpu=true",
            "trainer.resume=true", "trainer.max_steps=6", "trainer.save_every=2", "trainer.eval_every=6"]  # fmt: skip


@pytest.fixture(scope="session")
def evaluation(town_lm) -> list[str]:
    """Six samples of the town under the untouched LM."""
    return [*TOWN, f"model.path={town_lm}", "benchmark.limit=6", "benchmark.max_new_tokens=4", "trivial=false"]
