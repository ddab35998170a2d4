"""log p of given continuations; a prompt is computed once for all its continuations, what rows share once for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from persona.lm.batch import Edit, Row, assemble, check_numbers, entered, prompt_lengths
from persona.lm.load import BaseLM
from persona.lm.prefix import Shared, is_plain


@torch.no_grad()
def score(
    base: BaseLM,
    rows: Sequence[Row],
    continuations: Sequence[Sequence[Sequence[int]]],
    edit: Edit | None = None,
    batch_size: int = 32,
) -> list[list[Tensor]]:
    """Per-token log-probabilities (natural, float32) of each row's continuations, in their order.

    `continuations[r][o]` are the token ids of option `o` of row `r`; the result has the same shape, each entry a
    1-D tensor on the CPU. A row may have any number of continuations, none included. Where nothing edits modules
    (`edit` None), rows share a long common beginning; results are the same up to rounding.
    """
    result: list[list[Tensor]] = [[] for _ in rows]
    shared = Shared(base, rows, edit)
    for batch in shared.batches(batch_size):
        # Options differ in number, so a batch is cut where its options would fill more rows than a batch may have.
        chunk: list[int] = []
        options = 0
        for i in batch:
            if chunk and options + len(continuations[i]) > 4 * batch_size:
                _score_batch(base, rows, continuations, edit, shared, chunk, result)
                chunk, options = [], 0
            if continuations[i]:
                chunk.append(i)
                options += len(continuations[i])
        if chunk:
            _score_batch(base, rows, continuations, edit, shared, chunk, result)
    return result


def _score_batch(
    base: BaseLM,
    rows: Sequence[Row],
    continuations: Sequence[Sequence[Sequence[int]]],
    edit: Edit | None,
    shared: Shared,
    batch: list[int],
    result: list[list[Tensor]],
) -> None:
    device = base.device
    owner = [k for k, i in enumerate(batch) for _ in continuations[i]]  # the batch row of each option
    options = [list(option) for i in batch for option in continuations[i]]
    expand = torch.tensor(owner, device=device)
    width = max(len(option) for option in options)
    targets = torch.full((len(options), width), -100, dtype=torch.long)
    for k, option in enumerate(options):
        targets[k, : len(option)] = torch.tensor(option, dtype=torch.long)
    targets = targets.to(device)
    option_rows = [batch[k] for k in owner]
    lengths = prompt_lengths(base, [rows[i] for i in batch])
    option_lengths = [lengths[k] for k in owner]

    if base.is_encoder_decoder:
        with entered(edit, batch, lengths):
            inputs = assemble(base, [rows[i] for i in batch])
            encoded = base.model.get_encoder()(inputs_embeds=inputs.embeds, attention_mask=inputs.mask)
        with entered(edit, option_rows, option_lengths):
            logits = base.model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded.last_hidden_state[expand]),
                attention_mask=inputs.mask[expand],
                labels=targets,
            ).logits
    else:
        with entered(edit, batch, lengths):
            inputs = assemble(base, [rows[i] for i in batch])
            cache = shared.cache(batch)
            cache = DynamicCache(config=base.model.config) if cache is None else cache
            done = cache.get_seq_length()
            prompt = base.model(
                inputs_embeds=inputs.embeds[:, done:],
                attention_mask=inputs.mask,
                position_ids=inputs.positions[:, done:],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        first = prompt.logits[:, -1:][expand]
        if width == 1:
            logits = first
        else:
            _lend(cache, expand)
            known = targets[:, :-1]
            real = (known != -100).long()
            last = inputs.positions[expand][:, -1:]
            with entered(edit, option_rows, option_lengths):
                rest = base.model(
                    input_ids=known.clamp(min=0),
                    attention_mask=torch.cat([inputs.mask[expand], real], dim=1),
                    position_ids=last + 1 + torch.arange(width - 1, device=device),
                    past_key_values=cache,
                    use_cache=True,
                ).logits
            logits = torch.cat([first, rest], dim=1)

    logps = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0].cpu()
    for k, option in enumerate(options):
        check_numbers(base, logps[k, : len(option)])
        result[option_rows[k]].append(logps[k, : len(option)].clone())


def _lend(cache: DynamicCache, rows: Tensor) -> None:
    """For one more forward: its row k continues the cache's row rows[k].

    Prompts are copied to their options in one layer at a time, while it is computed: all layers at once would take
    options x prompts of memory.
    """
    if not is_plain(cache):
        cache.batch_select_indices(rows)
        return
    for layer in cache.layers:

        def update(keys: Tensor, values: Tensor, *_, layer=layer) -> tuple[Tensor, Tensor]:
            return _behind(layer.keys, keys, rows), _behind(layer.values, values, rows)

        layer.update = update


def _behind(known: Tensor, new: Tensor, rows: Tensor) -> Tensor:
    """[B, heads, C, d] and [K, heads, T, d] → [K, heads, C + T, d]: known[rows[k]], then new[k]; copied once."""
    columns = known.shape[2]
    both = new.new_empty((*new.shape[:2], columns + new.shape[2], new.shape[3]))
    # Layers may be spread over devices; under autocast the cache keeps the values in its keys' (wider) type.
    torch.index_select(known.to(new.dtype), 0, rows.to(known.device), out=both[:, :, :columns])
    both[:, :, columns:] = new
    return both
