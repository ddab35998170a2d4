"""A regression with dropout, small enough that a whole run takes a tenth of a second."""

from __future__ import annotations

import json
import os
import socket
import traceback
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from persona.training.trainer import TrainerConfig, fit


class Points(Dataset):
    """n points of a line in five dimensions; point `poisoned` has no finite target."""

    def __init__(self, n: int = 24, poisoned: int | None = None):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 5, generator=generator)
        self.y = self.x.sum(-1)
        if poisoned is not None:
            self.y[poisoned] = torch.nan

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int):
        return self.x[index], self.y[index]


class Toy(nn.Module):
    """A frozen layer, dropout, a trainable layer; `width` lets a checkpoint of another shape be made."""

    def __init__(self, width: int = 8, extra: bool = False):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.frozen = nn.Linear(5, width).requires_grad_(False)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(width, 1)
        self.slow = nn.Parameter(torch.zeros(1))
        if extra:
            self.extra = nn.Parameter(torch.zeros(1))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x, labels, num_items_in_batch=None):
        guess = self.head(self.dropout(self.frozen(x))).squeeze(-1) + self.slow
        count = len(labels) if num_items_in_batch is None else num_items_in_batch
        return {"loss": (guess - labels).square().sum() / count}


def collate(points):
    x, y = zip(*points, strict=True)
    return {"x": torch.stack(x), "labels": torch.stack(y)}


def settings(**changes) -> TrainerConfig:
    options = {"learning_rate": 0.01, "max_steps": 12, "batch_size": 4, "log_every": 1, "save_every": 3}
    options |= {"eval_every": 4, "keep_checkpoints": 10, "wandb": "disabled", "cpu": True}
    return TrainerConfig(**{**options, **changes})


def run(
    out: Path,
    module: nn.Module | None = None,
    data: Dataset | None = None,
    dev: Dataset | None = None,
    callbacks=(),
    **changes,
) -> Toy:
    """One run; its draws start from a seed of its own, as a method's do."""
    torch.manual_seed(5)
    module = Toy() if module is None else module
    # The empty group is as the Trainer's own: what is not to decay, of which a LoRA has none.
    groups = [{"params": list(module.head.parameters())}, {"params": []}, {"params": [module.slow], "lr": 0.001}]
    data = Points() if data is None else data
    fit(module, data, Points(8) if dev is None else dev, collate, settings(**changes), out, groups, callbacks)
    return module


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curve(out: Path, key: str = "loss") -> dict[int, float]:
    return {row["step"]: row[key] for row in rows(out) if key in row}


def process_of_two(rank: int, port: int, act) -> int:
    """A forked process that takes its place in a gloo group as torchrun would give it, and acts."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        from accelerate import PartialState
        from accelerate.state import AcceleratorState

        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="127.0.0.1")
        AcceleratorState._reset_state(reset_partial_state=True)  # this process's parent was alone
        assert PartialState(cpu=True).num_processes == 2
        act()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def in_two(act) -> list[int]:
    """`act` in two processes of a gloo group; their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [process_of_two(rank, port, act) for rank in range(2)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
