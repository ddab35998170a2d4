"""Each expert's own clipping, where back ends divide gradients over processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fuse_toys import config, toy_people, trainer
from torch import nn

from persona.errors import UserError
from persona.methods import persona_fuse
from persona.methods.persona_fuse.experts import Experts
from persona.methods.persona_fuse.training import ClipEach
from persona.personalizer import LanguageModel

sys.path.append(str(Path(__file__).parents[2] / "training"))
from training_toys import in_two


def test_under_deepspeed_it_is_refused_in_one_sentence(llama, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError) as caught:
        persona_fuse.train(config(llama), LanguageModel(llama), toy_people(), trainer(), tmp_path, stage="warmup")
    assert str(caught.value) == (
        "DeepSpeed divides the gradients, of which each expert's is clipped by itself: choose "
        "method.warmup.together=false or trainer.max_grad_norm=0"
    )


class Weighed(nn.Module):
    """A loss whose gradients differ by expert: number e's are e times the first's."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self) -> torch.Tensor:
        of_expert = torch.arange(1.0, self.experts.count + 1)
        return sum((p.flatten(1).sum(1) * of_expert).sum() for p in self.experts.parameters())


@pytest.mark.multi_process
def test_under_fsdp2_two_processes_clip_as_one(llama) -> None:
    def clipped(divide=lambda module: module) -> list[torch.Tensor]:
        experts = Experts.new(llama, config(llama).lora, seed=0, count=3)
        clip = ClipEach(experts, 50.0)
        divide(Weighed(experts))().backward()
        clip.on_pre_optimizer_step(None, None, None)
        return [p.grad for p in experts.parameters()]

    plain = clipped()
    norms = torch.stack([grad.flatten(1).norm(dim=-1) for grad in plain]).norm(dim=0)
    assert norms[1:].tolist() == pytest.approx([50.0, 50.0], rel=1e-4)  # the first's is below
    assert norms[0] < 49

    def act() -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for ours, theirs in zip(clipped(lambda module: fully_shard(module, mesh=mesh)), plain, strict=True):
            assert torch.allclose(ours.full_tensor(), theirs)

    assert in_two(act) == [0, 0]
