"""Low-rank adapters applied per row of a batch, by hooks that leave the base LM as it was.

PEFT's mixed batches allow one adapter per row and re-write the model's modules; here a row may carry a weighted sum of
any adapters, and nothing of the base is touched. Reads adapters in PEFT's own format.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from persona.errors import UserError


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
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
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
            handles.append(module.register_forward_hook(_hook(down, up, per_rank)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(down: Tensor, up: Tensor, per_rank: Tensor):
    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0]
        scale = per_rank.repeat_interleave(x.shape[0] // per_rank.shape[0], dim=0)[:, None]
        low = (x @ down.T) * scale
        # Rows whose gates are all zero stay bitwise the base: adding a zero is exact.
        return output + low @ up.T

    return add


@contextmanager
def apply_own(
    model: nn.Module, modules: dict[str, tuple[Tensor, Tensor]], owners: Sequence[int], scaling: float
) -> Iterator[None]:
    """Each row its own adapter out of many: row b adds `scaling · B[o] A[o] x` with o = owners[b], nothing if o < 0.

    `modules` maps a module's name to A [U, r, in] and B [U, out, r]; gradients flow into both. Beams and removal as in
    `apply`. Raises UserError when a module is not in the model.
    """
    handles = []
    names = dict(model.named_modules())
    missing = sorted(set(modules) - set(names))
    if missing:
        raise UserError(f"the adapters change module {missing[0]!r}, which this base LM does not have")
    present = torch.tensor([float(owner >= 0) for owner in owners])
    index = torch.tensor([max(owner, 0) for owner in owners], dtype=torch.long)
    try:
        if bool(present.any()):
            for name, (down, up) in modules.items():
                handles.append(names[name].register_forward_hook(_own_hook(down, up, index, present * scaling)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own_hook(down: Tensor, up: Tensor, index: Tensor, factor: Tensor):
    def add(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = args[0]
        repeats = x.shape[0] // len(index)
        rows = index.repeat_interleave(repeats).to(down.device)
        scale = factor.repeat_interleave(repeats).to(x)[:, None, None]
        low = torch.bmm(x, down[rows].to(x).transpose(1, 2)) * scale
        return output + torch.bmm(low, up[rows].to(x).transpose(1, 2))

    return add
