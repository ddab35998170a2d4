"""Low-rank adapters applied per row of a batch, by hooks that leave the base LM as it was.

PEFT's mixed batches allow one adapter per row and re-write the model's modules; here a row may carry a weighted sum of
any adapters, and nothing of the base is touched. Reads and writes adapters in PEFT's own format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import dropout as dropped
from torch.nn.functional import pad

from persona.errors import UserError
from persona.files import atomic_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """One LoRA: for each module name (within the base LM) A [r, in], B [out, r], and the factor on B A."""

    modules: dict[str, tuple[Tensor, Tensor]]
    scaling: dict[str, float]


def load_adapter(folder: Path | str) -> Adapter:
    """Read `adapter_config.json` + `adapter_model.safetensors` as PEFT writes them.

    Raises UserError when the files are missing or damaged, and for PEFT variants that are not a plain low-rank sum
    (DoRA, per-layer ranks, adapted embeddings, other tuners).
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is not a LoRA adapter in PEFT's format: {error}") from error
    odd = [
        key for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias") if config.get(key)
    ]
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.removeprefix("base_model.model.").rpartition(".lora_")
        pairs.setdefault(name, {})[part.split(".")[0]] = tensor
    # Anything else than an A and a B: adapted embeddings, trained biases, copies of the embedding table.
    odd += [name for name, pair in pairs.items() if set(pair) != {"A", "B"}][:1]
    if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none":
        raise UserError(
            f"{folder} is not a plain LoRA adapter ({', '.join(odd) or config.get('peft_type')}): only A·B sums load"
        )
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    return Adapter({name: (pair["A"], pair["B"]) for name, pair in pairs.items()}, dict.fromkeys(pairs, scaling))


def save(adapter: Adapter, folder: Path, base: str) -> Path:
    """Write an adapter as PEFT reads it, whole or not at all; `base` is the LM's name. One scaling for all modules."""
    from peft import LoraConfig  # takes seconds to import

    # Ranks may differ by module (a thin matrix under svd, a module that only one adapter has): zeros change nothing.
    rank = max(down.shape[0] for down, _ in adapter.modules.values())
    (scaling,) = set(adapter.scaling.values())
    alpha = scaling * rank
    tensors = {}
    for name, (down, up) in adapter.modules.items():
        more = rank - down.shape[0]
        tensors[f"base_model.model.{name}.lora_A.weight"] = pad(down, (0, 0, 0, more)).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = pad(up, (0, more)).contiguous()
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=sorted(adapter.modules),
        base_model_name_or_path=base,
    )
    config.inference_mode = True
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(_plain(config.to_dict()), indent=2, sort_keys=True) + "\n")
    return folder


def _plain(value: Any) -> Any:
    """JSON values; a set in order, so that the same adapter is the same file."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, set | list | tuple):
        return sorted(value)
    return value


@contextmanager
def apply(model: nn.Module, adapters: Sequence[Adapter], gates: Tensor) -> Iterator[None]:
    """Within the context every adapted Linear returns `W x + sum_e gates[b, e] · scaling_e · B_e A_e x` for row b.

    `gates` is [B, E], one row per batch row. A batch that generation has expanded (beams) to k·B rows repeats each
    gate k times, as generation does. Hooks are removed on leaving, exceptions included. Zero gates are the base,
    bitwise.
    Raises UserError when an adapter names a module the model does not have.
    """
    handles = []
    names = dict(model.named_modules())
    by_module: dict[str, list[int]] = {}
    for e, adapter in enumerate(adapters):
        for name in adapter.modules:
            if name not in names:
                raise UserError(f"the adapter changes module {name!r}, which this base LM does not have")
            if bool((gates[:, e] != 0).any()):
                by_module.setdefault(name, []).append(e)
    try:
        for name, experts in by_module.items():
            module = names[name]
            weight = module.weight
            down = torch.cat([adapters[e].modules[name][0] for e in experts]).to(weight)  # [sum r, in]
            up = torch.cat([adapters[e].modules[name][1] for e in experts], dim=1).to(weight)  # [out, sum r]
            ranks = [adapters[e].modules[name][0].shape[0] for e in experts]
            factors = torch.tensor([adapters[e].scaling[name] for e in experts])
            per_rank = (gates[:, experts].cpu() * factors).repeat_interleave(torch.tensor(ranks), dim=1).to(weight)
            handles.append(module.register_forward_hook(_hook(down, up, _of(per_rank, name))))
        yield
    finally:
        for handle in handles:
            handle.remove()


Stacked = Mapping[str, tuple[Tensor, Tensor]]
Weights: TypeAlias = "Tensor | Callable[[str], Tensor]"


@contextmanager
def apply_stacked(
    model: nn.Module, modules: Stacked, weights: Weights, which: Weights | None = None, dropout: float = 0.0
) -> Iterator[None]:
    """Row b of every named Linear adds `sum_j weights[b, j] · B[e] A[e] x` with e = which[b, j] (None: all, e = j).

    `modules` maps a module's name to A [E, r, in] and B [E, out, r]; gradients flow into both and into the weights.
    `weights` and `which` are [B, k] for all modules, or functions of a module's name; without `which` the weights may
    also be [B, T, E], one row per token, and their function is called in each forward. One product over all experts
    or, with `which`, over the k of each row, never a loop. `dropout` is what A's input loses. Beams and removal as in
    `apply`; rows whose weights are zero are the base, bitwise. Raises UserError when a module is not in the model.
    """
    handles = []
    names = dict(model.named_modules())
    if missing := sorted(set(modules) - set(names)):
        raise UserError(f"the adapters change module {missing[0]!r}, which this base LM does not have")
    try:
        for name, (down, up) in modules.items():
            own, like, rank = _of(weights, name), names[name].weight, down.shape[1]
            if which is None:
                down, up = down.flatten(0, 1).to(like), up.transpose(0, 1).flatten(1).to(like)
            else:
                chosen = _of(which, name)().to(down.device)
                down = down[chosen].flatten(1, 2).to(like)  # [B, k r, in]
                up = up[chosen].transpose(1, 2).flatten(2).to(like)  # [B, out, k r]

            def per_rank(own=own, rank=rank, like=like) -> Tensor:
                return own().to(like).repeat_interleave(rank, dim=-1)

            handles.append(names[name].register_forward_hook(_hook(down, up, per_rank, dropout)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of(values: Weights, name: str) -> Callable[[], Tensor]:
    return (lambda: values) if isinstance(values, Tensor) else (lambda: values(name))


def _hook(down: Tensor, up: Tensor, per_rank: Callable[[], Tensor], dropout: float = 0.0) -> Callable[..., Tensor]:
    """down [R, in] and up [out, R] for all rows, or [B, R, in] and [B, out, R]; per_rank [B, R] or [B, T, R]."""

    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0]
        scale = per_rank()
        scale = _beams(scale if scale.ndim == 3 else scale[:, None], x)
        if dropout:
            x = dropped(x, dropout)
        # Rows whose weights are all zero stay bitwise the base: adding a zero is exact.
        if down.ndim == 2:
            return output + ((x @ down.T) * scale) @ up.T
        low = torch.bmm(x, _beams(down, x).transpose(1, 2)) * scale
        return output + torch.bmm(low, _beams(up, x).transpose(1, 2))

    return add


def _beams(rows: Tensor, x: Tensor) -> Tensor:
    """[B, …] → [k·B, …] for a batch x that generation has expanded k times."""
    times = x.shape[0] // rows.shape[0]
    return rows if times == 1 else rows.repeat_interleave(times, dim=0)


@contextmanager
def folded(model: nn.Module, modules: Stacked, weights: Weights) -> Iterator[None]:
    """Within the context every named Linear has the weight W + sum_e weights[e] · B_e A_e; on leaving, exceptions
    included, the very tensor that it had. `weights` [E], or a function of a module's name. No gradients.

    Raises UserError when a module is not in the model.
    """
    names = dict(model.named_modules())
    if missing := sorted(set(modules) - set(names)):
        raise UserError(f"the adapters change module {missing[0]!r}, which this base LM does not have")
    kept: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, (down, up) in modules.items():
                kept[name] = names[name].weight.data
                scaled = up * _of(weights, name)().to(up)[:, None, None]
                change = scaled.transpose(0, 1).flatten(1) @ down.flatten(0, 1)
                names[name].weight.data = kept[name] + change.to(kept[name])
        yield
    finally:
        for name, weight in kept.items():
            names[name].weight.data = weight
