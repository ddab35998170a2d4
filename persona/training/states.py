"""Trainable weights and optimizer states by parameter name, whole on the CPU, whatever holds them.

Plain tensors (one process, DDP), DTensors (FSDP2) and DeepSpeed's flat partitions (ZeRO-1, 2, 3) give the same tensors
under the same names, so that a run goes on under another back end. All of it is collective: every process calls it,
one parameter is gathered at a time, and only the process that asks for the result (`keep`) holds more than that one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from persona.errors import UserError

logger = logging.getLogger(__name__)
STEP = "step"  # Adam's count of updates, a scalar; every other state has its parameter's shape


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name; one that is tied has its first name. Names are those of the bare module.

    Under FSDP2 they are this process's parts, as the optimizer has them.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # the outermost stays whole after an evaluation's forward, in other parameters than these
    names = ((name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in module.named_parameters())
    return {name: parameter for name, parameter in names if parameter.requires_grad}


def shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter; under ZeRO-3 the tensor itself is empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


# ---- weights -------------------------------------------------------------------------------------------------------


def weights(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """The trainable weights by name: in fp32 where the optimizer has a master copy, else as they are.

    Empty unless `keep`, but to be called by every process.
    """
    return {name: tensor for name, p in trainable(module).items() if (tensor := _kept(_weight(p), keep)) is not None}


def set_weights(module: nn.Module, saved: Mapping[str, Tensor], where: str) -> None:
    """Give the trainable parameters the weights that `weights` gave; every process calls it with all of them.

    Raises UserError, naming `where` they come from, when names or shapes are not those of `module`.
    """
    own = {name: shape(parameter) for name, parameter in trainable(module).items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if own != theirs:
        odd = [name for name in sorted({*own, *theirs}) if own.get(name) != theirs.get(name)][:3]
        raise UserError(f"{where} was made by another model or configuration: it differs in {', '.join(odd)}")
    with torch.no_grad():
        for name, parameter in trainable(module).items():
            _set_weight(parameter, saved[name])


def _kept(tensor: Tensor, keep: bool) -> Tensor | None:
    return tensor.detach().cpu().clone().contiguous() if keep else None


def _weight(parameter: nn.Parameter) -> Tensor:
    if _is_zero(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        _set_zero(parameter, value)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
    elif hasattr(parameter, "_hp_mapping"):
        _set_zero(parameter, value)
        parameter.data.copy_(value)
    else:
        parameter.copy_(_like(parameter, value))


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` sharded as `parameter` is; every process cuts its own shard, nothing is sent."""
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


# ---- optimizer states ----------------------------------------------------------------------------------------------


def optimizer_states(module: nn.Module, optimizer: Any, keep: bool) -> dict[str, Tensor]:
    """The optimizer's states as `<parameter>.<state>` (exp_avg, exp_avg_sq, step). A parameter that has not had a
    gradient yet has none. Empty unless `keep`, but to be called by every process.
    """
    found: dict[str, Tensor] = {}
    parameters = trainable(module)
    if any(_is_zero(parameter) for parameter in parameters.values()):
        _link(_zero(optimizer))
    for name, parameter in parameters.items():
        for key, tensor in _states(parameter, optimizer):
            if (kept := _kept(tensor, keep)) is not None:
                found[f"{name}.{key}"] = kept
    return found


def set_optimizer_states(module: nn.Module, optimizer: Any, saved: Mapping[str, Tensor]) -> None:
    """Give the optimizer the states that `optimizer_states` gave; every process calls it with all of them."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for full, tensor in saved.items():
        name, _, key = full.rpartition(".")
        by_name.setdefault(name, {})[key] = tensor
    parameters = trainable(module)
    if any(_is_zero(parameter) for parameter in parameters.values()):
        _set_zero_states(_zero(optimizer), parameters, by_name)
        return
    names = {id(parameter): name for name, parameter in parameters.items()}
    state: dict[int, dict[str, Any]] = {}
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(listed):
        if values := by_name.get(names.get(id(parameter), "")):
            state[index] = {key: v if key == STEP else _like(parameter, v) for key, v in values.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _states(parameter: nn.Parameter, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    if _is_zero(parameter):
        from deepspeed.utils import safe_get_full_optimizer_state

        zero = _zero(optimizer)
        clock, keys = _clock(zero), _keys(zero)
        if clock is not None:
            yield STEP, torch.tensor(clock, dtype=torch.float32)
            for key in keys:
                yield key, safe_get_full_optimizer_state(parameter, key)
        return
    for key, value in optimizer.state.get(parameter, {}).items():
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
        yield key, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------
# ZeRO keeps one flat fp32 partition per parameter group (stage 3: per sub-group) and process, and Adam's states beside
# it, with one count of updates for all of a partition's parameters.


def _is_zero(parameter: Tensor) -> bool:
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


def _zero(optimizer: Any) -> Any:
    """DeepSpeed's optimizer within accelerate's wrappers; its `optimizer` is the one that steps."""
    while not any(hasattr(optimizer, name) for name in _FLAT):
        optimizer = optimizer.optimizer
    return optimizer


# Stage 3; stages 1 and 2; the bf16 optimizer that DeepSpeed takes for stage 1 with fp32 gradients.
_FLAT = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


def _flat(zero: Any) -> list[Tensor]:
    return next(list(getattr(zero, name)) for name in _FLAT if hasattr(zero, name))


def _clock(zero: Any) -> int | None:
    """The number of updates so far, or None before the first. DeepSpeed's fused Adam counts in the group."""
    counts = [state[STEP] for state in zero.optimizer.state.values() if STEP in state]
    counts += [group[STEP] for group in zero.optimizer.param_groups if STEP in group]
    return int(max(counts)) if counts else None


def _keys(zero: Any) -> list[str]:
    flat = _flat(zero)[0]
    return sorted(
        key
        for key, value in zero.optimizer.state[flat].items()
        if isinstance(value, Tensor) and value.shape == flat.shape
    )


def _set_zero(parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
    """This process's part of the fp32 weight (or of state `key`) of a parameter."""
    if hasattr(parameter, "ds_id"):
        size, rank = parameter.ds_tensor.numel(), parameter.ds_zero_partition_rank
        part = torch.zeros(size, dtype=torch.float32)  # the last part may reach beyond the parameter's end
        mine = value.flatten()[rank * size : (rank + 1) * size]
        part[: mine.numel()] = mine
        parameter._z3_optimizer.set_local_hp_param(part.to(parameter.device), parameter, key)
    else:
        parameter.set_full_hp_param(value, key)


def _set_zero_states(zero: Any, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Any]) -> None:
    if not saved:
        return
    _make_states(zero)
    counts = {int(states[STEP]) for states in saved.values()}
    if len(counts) > 1 or saved.keys() != parameters.keys():
        logger.warning(
            "some parameters were updated less often than others, and ZeRO counts for all at once: the steps that "
            "follow differ a little from an uninterrupted run"
        )
    inner, clock = zero.optimizer, max(counts)
    for state in inner.state.values():
        if STEP in state:
            state[STEP] = torch.full_like(state[STEP], clock) if isinstance(state[STEP], Tensor) else clock
    for group in inner.param_groups:
        if STEP in group:
            group[STEP] = clock
    keys = _keys(zero)
    for name, parameter in parameters.items():
        for key in keys:
            value = saved.get(name, {}).get(key)
            _set_zero(parameter, torch.zeros(shape(parameter)) if value is None else value, key)


def _make_states(zero: Any) -> None:
    """Let the optimizer make its states, which it does at its first step: one at learning rate zero moves nothing."""
    inner, flat = zero.optimizer, _flat(zero)
    of_group: dict[int, list[Tensor]] = {index: [] for index in range(len(inner.param_groups))}
    for index, partition in enumerate(flat):
        of_group[getattr(zero, "sub_group_to_group_id", {}).get(index, index)].append(partition)
    before = [(group["params"], group["lr"]) for group in inner.param_groups]
    gradients = [partition.grad for partition in flat]
    for index, group in enumerate(inner.param_groups):
        group["params"], group["lr"] = of_group[index], 0.0
    for partition in flat:
        partition.grad = torch.zeros_like(partition)
    inner.step()
    for partition, gradient in zip(flat, gradients, strict=True):
        partition.grad = gradient
    for group, (members, rate) in zip(inner.param_groups, before, strict=True):
        group["params"], group["lr"] = members, rate
    _link(zero)


def _link(zero: Any) -> None:
    """Let every parameter find its part of the states. DeepSpeed 0.19 does so after the first group's first step, when
    the other groups have none yet, and never again."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = not zero.optimizer.state
        zero._lazy_init_hp_params_optimizer_state()
