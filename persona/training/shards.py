"""What ZeRO and FSDP2 have made of a module, undone: whole, ordinary parameters on every process, no hooks.

A base LM goes on after its training: it generates the next stage's data, and is trained again under another adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

STATE_OF_ZERO3 = ("ds_", "_ds_", "_original_parameters", "_external_params")


def homes(module: nn.Module) -> dict[str, torch.device]:
    """Where the parameters are before they are divided, and are put back to."""
    return {name: parameter.device for name, parameter in module.named_parameters(remove_duplicate=False)}


def undo(trainer: Trainer, devices: dict[str, torch.device]) -> None:
    """After a training: every parameter of `trainer.model` whole again, bitwise, on its device of before.

    Parameters are gathered one by one, by all processes together. The modules stay the same objects, and so do the
    parameters where nothing was divided.
    """
    if trainer.is_deepspeed_enabled:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        engine: Any = trainer.model_wrapped
        module = engine.module
        engine.destroy()
        unset_hf_deepspeed_config()  # models loaded from here on are not divided
        if engine.zero_optimization_stage() == 3:
            _replace(module, _of_zero3, devices)
            for part in module.modules():
                part._parameters = dict(part._parameters)  # DeepSpeed's own kind of dict gathers what it is asked for
                for name in [name for name in vars(part) if name.startswith(STATE_OF_ZERO3)]:
                    delattr(part, name)

    elif trainer.is_fsdp_enabled:
        undo_fsdp2(trainer.model, devices)


def undo_fsdp2(module: nn.Module, devices: dict[str, torch.device]) -> None:
    """PyTorch has no way back from `fully_shard`: what it has registered is taken off by hand."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    divided: list[Any] = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in divided:
        part.reshard()
    _replace(module, lambda parameter: parameter.full_tensor().detach(), devices)
    for part in divided:
        state = part._get_fsdp_state()
        for hook in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
            hook.remove()
        for group in state._fsdp_param_groups:
            for hooks in (group._module_to_pre_save_state_dict_hook_handle,
                          group._module_to_pre_load_state_dict_hook_handle):  # fmt: skip
                for hook in hooks.values():
                    hook.remove()
        part.__class__ = type(part).__mro__[FSDPModule._orig_cls_mro_index]
    for part in divided:
        for key in (REGISTRY_KEY, STATE_KEY):
            vars(part).pop(key, None)
        _module_state_mapping.pop(part, None)


def _of_zero3(parameter: nn.Parameter) -> Tensor:
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.data.clone()


def _replace(module: nn.Module, gather: Callable[[Any], Tensor], devices: dict[str, torch.device]) -> None:
    """Tied parameters stay tied."""
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for part, key, name, parameter in list(_places(module)):
        if parameter not in whole:
            whole[parameter] = nn.Parameter(gather(parameter).to(devices[name]), parameter.requires_grad)
        part._parameters[key] = whole[parameter]


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    for prefix, part in module.named_modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                yield part, key, f"{prefix}.{key}" if prefix else key, parameter
