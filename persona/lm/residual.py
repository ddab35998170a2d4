"""The residual stream of a base LM: what its decoder blocks hand on, read and changed by hooks.

Layer l is the output of decoder block l, counted from 0: `hidden_states[l + 1]` of transformers, where the last one is
seen before the final norm. Nothing of the model is changed; hooks are gone when a context is left, exceptions
included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from persona.errors import UserError
from persona.lm.batch import Edit, Row, assemble, batches, entered
from persona.lm.load import BaseLM

# Gets a block's output [B, T, hidden] and returns what takes its place; None leaves it.
Change = Callable[[Tensor], Tensor | None]


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in order, of any causal or encoder-decoder LM of transformers, PEFT-wrapped or not.

    Raises UserError where the decoder holds no list of as many modules as its config has layers.
    """
    if hasattr(model, "get_base_model"):  # PEFT's wrapper
        model = model.get_base_model()
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    decoder = model.get_decoder()
    found = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not found:
        raise UserError(f"{type(model).__name__} has no list of {count} decoder blocks that could be read or changed")
    return found[0]  # modules() goes from the outside in


@contextmanager
def changed(model: nn.Module, changes: Mapping[int, Change]) -> Iterator[None]:
    """Within the context the output of decoder block l passes through `changes[l]`, in every forward.

    Raises UserError for a layer that the model does not have.
    """
    stack = blocks(model)
    odd = [layer for layer in changes if not 0 <= layer < len(stack)]
    if odd:
        raise UserError(f"there is no layer {odd[0]}: the base LM has layers 0 to {len(stack) - 1}")
    handles = []
    try:
        for layer, change in changes.items():
            handles.append(stack[layer].register_forward_hook(_hook(change)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(change: Change) -> Callable[..., Tensor | tuple | None]:
    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        hidden = output if isinstance(output, Tensor) else output[0]
        new = change(hidden)
        if new is None or isinstance(output, Tensor):
            return new
        return (new, *output[1:])

    return after


@contextmanager
def added(model: nn.Module, vectors: Mapping[int, Tensor]) -> Iterator[None]:
    """Within the context row b of layer l has `vectors[l][b]` ([B, hidden]) added at every position.

    At padded positions too, which no other position sees. A batch that generation has expanded (beams) to k·B rows
    repeats each vector k times, as generation does. Rows whose vectors are zero stay the base, bitwise.
    """

    def add(vector: Tensor) -> Change:
        def change(hidden: Tensor) -> Tensor:
            rows = vector.to(hidden).repeat_interleave(hidden.shape[0] // vector.shape[0], dim=0)
            return hidden + rows[:, None]

        return change

    with changed(model, {layer: add(vector) for layer, vector in vectors.items() if bool(vector.any())}):
        yield


@torch.no_grad()
def last_states(
    base: BaseLM,
    rows: Sequence[Row],
    replies: Sequence[Sequence[int]],
    layers: Sequence[int],
    edit: Edit | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Outputs of the decoder blocks `layers` at the last token of each row's prompt and beginning of a reply.

    [rows, layers, hidden], float32 on the CPU. `replies[i]` are token ids and may be empty: then it is the prompt's
    last token, in an encoder-decoder the decoder's start token. `edit` is entered around each forward.
    """
    states = torch.empty(len(rows), len(layers), base.hidden_size)
    lengths = [row.length + len(reply) for row, reply in zip(rows, replies, strict=True)]
    for batch in batches(lengths, batch_size):
        seen: dict[int, Tensor] = {}
        look = {layer: _keep(seen, layer) for layer in layers}
        with entered(edit, batch), changed(base.model, look):
            last = _forward(base, [rows[i] for i in batch], [replies[i] for i in batch])
        for column, layer in enumerate(layers):
            hidden = seen[layer]
            states[batch, column] = hidden[torch.arange(len(batch)), last.to(hidden.device)].float().cpu()
    return states


@torch.no_grad()
def reply_means(
    base: BaseLM,
    rows: Sequence[Row],
    replies: Sequence[Sequence[int]],
    counted: Sequence[int],
    layers: Sequence[int],
    edit: Edit | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Outputs of the decoder blocks `layers`, averaged over the last `counted[i]` tokens of each row's reply.

    [rows, layers, hidden], float32 on the CPU; NaN where nothing is counted. The mean is taken inside the forward, in
    float32. `edit` is entered around each forward and seen in what is read. Raises UserError for an encoder-decoder.
    """
    if base.is_encoder_decoder:
        raise UserError(f"{base.name} is an encoder-decoder LM: means over a reply are read from decoder-only LMs")
    means = torch.full((len(rows), len(layers), base.hidden_size), float("nan"))
    lengths = [row.length + len(reply) for row, reply in zip(rows, replies, strict=True)]
    for batch in batches(lengths, batch_size):
        seen: dict[int, Tensor] = {}
        # Padded on the left: a reply's last tokens stand in the last columns.
        place = torch.arange(max(lengths[i] for i in batch), device=base.device).flip(0)
        count = torch.tensor([counted[i] for i in batch], device=base.device)
        weights = (place < count[:, None]).float() / count[:, None]
        look = {layer: _keep_mean(seen, layer, weights) for layer in layers}
        with entered(edit, batch), changed(base.model, look):
            _forward(base, [rows[i] for i in batch], [replies[i] for i in batch])
        for column, layer in enumerate(layers):
            means[batch, column] = seen[layer].cpu()
    return means


def _keep_mean(seen: dict[int, Tensor], layer: int, weights: Tensor) -> Change:
    def look(hidden: Tensor) -> None:
        seen[layer] = torch.einsum("bt,bth->bh", weights.to(hidden.device), hidden.float())

    return look


def _keep(seen: dict[int, Tensor], layer: int) -> Change:
    def look(hidden: Tensor) -> None:
        seen[layer] = hidden

    return look


def _forward(base: BaseLM, rows: Sequence[Row], replies: Sequence[Sequence[int]]) -> Tensor:
    """One forward; the position [B] of each row's last token in its decoder's sequence."""
    if not base.is_encoder_decoder:
        inputs = assemble(base, rows, replies)  # padded on the left: every row ends in the last column
        base.model(
            inputs_embeds=inputs.embeds,
            attention_mask=inputs.mask,
            position_ids=inputs.positions,
            use_cache=False,
            logits_to_keep=1,
        )
        return torch.full((len(rows),), inputs.mask.shape[1] - 1)
    inputs = assemble(base, rows)
    start = base.model.config.decoder_start_token_id
    last = torch.tensor([len(reply) for reply in replies])
    ids = torch.full((len(rows), int(last.max()) + 1), base.tokenizer.pad_token_id)
    for row, reply in enumerate(replies):
        ids[row, : len(reply) + 1] = torch.tensor([start, *reply])
    base.model(inputs_embeds=inputs.embeds, attention_mask=inputs.mask, decoder_input_ids=ids.to(base.device))
    return last
