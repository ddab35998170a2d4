"""Configs: closed schemas for Hydra, all problems named at once, and what a run writes about itself.

cfg = load_config("train", ["method=finetune_lora", "trainer.epochs=1"])     # tests, notebooks

if __name__ == "__main__":                                                   # train.py, evaluate.py
    entry(train, "train")
"""

from persona.config.compose import CONFIGS, bind, check_overrides, load_config
from persona.config.run import entry, run_state, save_run_files, start_processes
from persona.config.schemas import EvaluateConfig, RoleConfig, TrainConfig

__all__ = [
    "CONFIGS",
    "EvaluateConfig",
    "RoleConfig",
    "TrainConfig",
    "bind",
    "check_overrides",
    "entry",
    "load_config",
    "run_state",
    "save_run_files",
    "start_processes",
]
