"""An adapter for the length of training: what is active, what moves, and that nothing of it stays in the base."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import persona
from persona import lm
from persona.errors import UserError
from persona.files import sha256
from persona.lm import adapters
from persona.personalizer import LanguageModel, save
from persona.training.lora import LoRA, LoraSettings, adapted, save_adapter
from persona.types import Message, Request

SMALL = LoraSettings(r=2, lora_alpha=4, target_modules=".*(q_proj|down_proj)")
IDS = torch.tensor([[5, 9, 11, 30, 31]])


def state(base: lm.BaseLM) -> dict:
    """Everything training might leave behind: tensors bitwise, modules, attributes, hooks, modes, settings."""
    model = base.model
    return {
        "tensors": {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()},
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "attributes": set(vars(model)),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "modes": [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()],
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "settings": (model.config.to_dict(), model.generation_config.to_dict()),
        "identity": base.identity,
    }


def assert_same(before: dict, after: dict) -> None:
    for key in before:
        if key == "tensors":
            assert before[key].keys() == after[key].keys()
            for name, (identity, tensor) in before[key].items():
                assert identity == after[key][name][0] and torch.equal(tensor, after[key][name][1]), name
        else:
            assert before[key] == after[key], key


@torch.no_grad()
def logits(base: lm.BaseLM) -> torch.Tensor:
    return base.model(IDS).logits


@pytest.fixture(scope="module")
def below(llama, tmp_path_factory) -> list[Path]:
    """Two adapters that change the llama, on overlapping modules."""
    folders = []
    for seed, modules in ((1, "all-linear"), (2, ".*q_proj")):
        torch.manual_seed(seed)
        with adapted(llama, LoraSettings(r=2, lora_alpha=4, target_modules=modules)) as model:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = torch.randn_like(parameter) * 0.05
            folders.append(save_adapter(model, tmp_path_factory.mktemp("below") / str(seed)))
    return folders


def test_a_new_adapter_changes_nothing_and_the_base_comes_back(llama):
    before, plain = state(llama), logits(llama)
    with adapted(llama, SMALL) as model:
        assert torch.equal(logits(llama), plain)
        names = [name for name, p in llama.model.named_parameters() if p.requires_grad]
        assert len(names) == 8 and all(".lora_" in name for name in names)
        # What trainers do to a model.
        model.train()
        model.gradient_checkpointing_enable()
        llama.model.forward = llama.model.forward
        llama.model.config.pad_token_id = 77
        llama.model.config.use_cache = False
        llama.model.generation_config.pad_token_id = 77
    assert_same(before, state(llama))


def test_the_base_comes_back_after_exceptions(llama, below, tmp_path):
    before = state(llama)
    with pytest.raises(RuntimeError, match="halfway"), adapted(llama, SMALL, below):
        raise RuntimeError("halfway")
    assert_same(before, state(llama))
    with pytest.raises(UserError, match="target_modules='nowhere' does not fit"):
        with adapted(llama, LoraSettings(target_modules="nowhere")):
            pass
    with pytest.raises(UserError, match="is not a LoRA adapter in PEFT's format"), adapted(llama, SMALL, [tmp_path]):
        pass
    assert_same(before, state(llama))


def test_an_adapter_of_another_base_is_refused_below(load_base, below):
    neox = load_base("gpt_neox")
    before = state(neox)
    with pytest.raises(UserError, match="which this base LM does not have"):
        with adapted(neox, LoraSettings(r=2), below):
            pass
    assert_same(before, state(neox))


def test_adapters_below_are_active_and_frozen(llama, below):
    """The model under training starts as the stack of those below, also with the new adapter switched off, and only
    the new one has gradients."""
    stack = persona.load(llama, [LoRA(llama, folder) for folder in below])
    with torch.no_grad(), stack.edit([Request((Message("user", "x"),))]):
        expected = llama.model(IDS).logits
    assert not torch.allclose(expected, logits(llama), atol=1e-3)
    with adapted(llama, SMALL, below) as model:
        assert torch.allclose(logits(llama), expected, atol=1e-5)
        for name, parameter in llama.model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.1)
        assert not torch.allclose(logits(llama), expected, atol=1e-3)
        with model.disable_adapter():
            assert torch.allclose(logits(llama), expected, atol=1e-5)
        llama.model(IDS).logits.sum().backward()
        moved = [name for name, parameter in llama.model.named_parameters() if parameter.grad is not None]
        assert moved and all(".lora_" in name for name in moved)


def test_what_is_written_loads_in_plain_peft_and_as_a_personalizer(llama, below, tmp_path):
    from peft import PeftModel

    folder = save(LoRA(llama, below[0]), llama, tmp_path / "personalizer")
    theirs = PeftModel.from_pretrained(copy.deepcopy(llama.model), folder / "adapter").eval()
    model = persona.load(llama, [folder])
    with torch.no_grad(), model.edit([Request((Message("user", "x"),))]):
        assert torch.allclose(llama.model(IDS).logits, theirs(IDS).logits, atol=1e-5)
    assert type(model) is LanguageModel and type(model.personalizers[0]) is LoRA


def test_the_same_adapter_is_the_same_file(llama, tmp_path):
    """PEFT writes sets in the order of the process's hash seed."""
    torch.manual_seed(0)
    with adapted(llama, LoraSettings(r=2)) as model:
        folder = save_adapter(model, tmp_path / "adapter")
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) == 14
    assert list(config) == sorted(config)
    with adapted(llama, LoraSettings(r=2)) as model:
        other = adapters.load_adapter(folder)
        for name, (down, _) in other.modules.items():
            llama.model.get_submodule(name).lora_A["default"].weight.data = down.clone()
        again = save_adapter(model, tmp_path / "again")
    assert [sha256(file) for file in sorted(folder.iterdir())] == [sha256(file) for file in sorted(again.iterdir())]
