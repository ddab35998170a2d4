"""The residual stream of a base LM: what its decoder blocks take and hand on, read and changed by hooks.

Layer l is the output of decoder block l, counted from 0: `hidden_states[l + 1]` of transformers, where the last one is
seen before the final norm. Nothing of the model is changed; hooks are gone when a context is left, exceptions
included. A model may be spread over devices or wrapped by PEFT.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from persona.errors import UserError
from persona.lm.batch import Edit, Row, assemble, batches, entered, prompt_lengths
from persona.lm.load import BaseLM
from persona.lm.spans import message_tokens, reply_tokens
from persona.types import Conversation, Request

PARTS = ("block", "block_input", "attention", "mlp")
PLACES = ("reply", "prompt_last")  # where the state of a message is read
# What the parts are called within a decoder block of transformers, in families that add their output to the stream.
NAMES = {
    "attention": ("self_attn", "attention", "attn", "self_attention", "SelfAttention"),
    "mlp": ("mlp", "block_sparse_moe", "fc2", "DenseReluDense"),
}

# Gets a site's states [B, T, hidden] and returns what takes their place; None leaves them.
Change = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True, order=True)
class Site:
    """A place in decoder block `layer`: "block" is its output, "block_input" its input (the output of the block
    before), "attention" and "mlp" what its modules return, before a norm that some families put behind them (Gemma 2
    and 3) and before it is added to the stream."""

    layer: int
    part: str = "block"

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise UserError(f"a site's part is one of {', '.join(PARTS)}, not {self.part!r}")


def decoder(model: nn.Module) -> nn.Module:
    """The decoder without its LM head, PEFT-wrapped or not."""
    if hasattr(model, "get_base_model"):  # PEFT's wrapper
        model = model.get_base_model()
    return model.get_decoder()


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, in order, of any causal or encoder-decoder LM of transformers, PEFT-wrapped or not.

    Raises UserError where the decoder holds no list of as many modules as its config has layers.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
    found = [
        module for module in decoder(model).modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise UserError(f"{type(model).__name__} has no list of {count} decoder blocks that could be read or changed")
    return found[0]  # modules() goes from the outside in


def _module(model: nn.Module, site: Site) -> nn.Module:
    """The module whose input or output `site` is."""
    stack = blocks(model)
    if not 0 <= site.layer < len(stack):
        raise UserError(f"there is no layer {site.layer}: the base LM has layers 0 to {len(stack) - 1}")
    block = stack[site.layer]
    if site.part not in NAMES:
        return block
    # T5 keeps attention and MLP one level further down, each in a layer that adds the stream itself.
    inner = [block, *block.layer] if isinstance(getattr(block, "layer", None), nn.ModuleList) else [block]
    for module in inner:
        for name in NAMES[site.part]:
            found = getattr(module, name, None)
            # Where the module is handed the stream (BLOOM, MPT), it has added it to what it returns.
            if isinstance(found, nn.Module) and "residual" not in inspect.signature(type(found).forward).parameters:
                return found
    raise UserError(
        f"{type(block).__name__} has no {site.part} module that could be read or changed: use the parts block or "
        "block_input"
    )


def stream_size(model: nn.Module) -> int:
    """The width of the residual stream; OPT's smallest embeddings are narrower."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def site_device(model: nn.Module, site: Site) -> torch.device:
    """Where the states at a site will be, as far as its weights tell (offloaded ones are nowhere: then the CPU)."""
    device = next((weight.device for weight in _module(model, site).parameters()), torch.device("meta"))
    return torch.device("cpu") if device.type == "meta" else device


@contextmanager
def changed(model: nn.Module, changes: Mapping[Site, Change]) -> Iterator[None]:
    """Within the context the states at each site pass through its change, in every forward.

    Raises UserError for a layer that the model does not have, and for a part that is not found in its blocks.
    """
    handles = []
    try:
        for site, change in changes.items():
            module = _module(model, site)
            if site.part == "block_input":
                handles.append(module.register_forward_pre_hook(_before(change), with_kwargs=True))
            elif isinstance(module, nn.Linear) or hasattr(module, "base_layer"):  # OPT's MLP sees [B·T, hidden]
                shape: list[torch.Size] = []
                block = blocks(model)[site.layer]
                handles.append(block.register_forward_pre_hook(_note(shape), with_kwargs=True))
                handles.append(module.register_forward_hook(_after(change, shape)))
            else:
                handles.append(module.register_forward_hook(_after(change)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(change: Change) -> Callable[..., tuple[tuple, dict] | None]:
    def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        new = change(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    return before


def _note(shape: list[torch.Size]) -> Callable[..., None]:
    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        shape[:] = [(args[0] if args else kwargs["hidden_states"]).shape]

    return note


def _after(change: Change, shape: list[torch.Size] | None = None) -> Callable[..., Tensor | tuple | None]:
    def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        hidden = output if isinstance(output, Tensor) else output[0]
        new = change(hidden if shape is None else hidden.view(shape[0]))
        if new is None:
            return None
        new = new.view(hidden.shape)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    return after


# ---- reading -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def last_states(
    base: BaseLM,
    rows: Sequence[Row],
    replies: Sequence[Sequence[int]],
    sites: Sequence[Site],
    edit: Edit | None = None,
    batch_size: int = 32,
) -> Tensor:
    """States at `sites` at the last token of each row's prompt and beginning of a reply.

    [rows, sites, hidden], float32 on the CPU. `replies[i]` are token ids and may be empty: then it is the prompt's
    last token, in an encoder-decoder the decoder's start token. `edit` is entered around each forward.
    """
    states = torch.empty(len(rows), len(sites), stream_size(base.model))
    lengths = [row.length + len(reply) for row, reply in zip(rows, replies, strict=True)]
    for batch in batches(lengths, batch_size):
        # A decoder's rows are padded on the left, those of an encoder-decoder's decoder begin with its start token.
        last = torch.tensor([len(replies[i]) if base.is_encoder_decoder else -1 for i in batch])
        seen: dict[Site, Tensor] = {}
        with entered(edit, batch, prompt_lengths(base, [rows[i] for i in batch])):
            with changed(base.model, {site: _pick(seen, site, last) for site in sites}):
                _forward(base, [rows[i] for i in batch], [replies[i] for i in batch])
        for column, site in enumerate(sites):
            states[batch, column] = seen[site].float().cpu()
    return states


def _pick(seen: dict[Site, Tensor], site: Site, columns: Tensor) -> Change:
    def look(hidden: Tensor) -> None:  # a copy: some families (Falcon) go on to write into it
        seen[site] = hidden[torch.arange(len(columns), device=hidden.device), columns.to(hidden.device)]

    return look


def _forward(base: BaseLM, rows: Sequence[Row], replies: Sequence[Sequence[int]]) -> None:
    """One forward of the decoder, without the LM head."""
    if not base.is_encoder_decoder:
        inputs = assemble(base, rows, replies)
        decoder(base.model)(
            inputs_embeds=inputs.embeds,
            attention_mask=inputs.mask,
            position_ids=inputs.positions,
            use_cache=False,
        )
        return
    inputs = assemble(base, rows)
    start = base.model.config.decoder_start_token_id
    ids = torch.full((len(rows), max(len(reply) for reply in replies) + 1), base.tokenizer.pad_token_id)
    for row, reply in enumerate(replies):
        ids[row, : len(reply) + 1] = torch.tensor([start, *reply])
    encoded = base.model.get_encoder()(inputs_embeds=inputs.embeds, attention_mask=inputs.mask)
    decoder(base.model)(
        input_ids=ids.to(base.device),
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=inputs.mask,
        use_cache=False,
    )


@dataclass(frozen=True)
class Passage:
    """What is read in one row of a forward: `reply` (token ids) follows the row's prompt; `spans` [start, stop) count
    from the row's first position, vectors in front included, in an encoder-decoder from the decoder's start token."""

    row: Row
    reply: list[int]
    spans: list[tuple[int, int]]


@torch.no_grad()
def passage_means(
    base: BaseLM, passages: Sequence[Passage], sites: Sequence[Site], edit: Edit | None = None, batch_size: int = 32
) -> Iterator[tuple[int, Tensor]]:
    """Each passage's index and [spans, sites, hidden]: the mean state over the positions of each of its spans, float32
    on the CPU; NaN for an empty span. Batches come longest first, so the indices are in another order.

    Nothing else is kept: means are taken within the forward, in float32, and the LM head is not computed. `edit` is
    entered around each forward over the passages with the indices that it gets, and seen in what is read.
    Raises UserError for a passage longer than the LM's positions, and for states that are not finite.
    """
    lengths = [passage.row.length + len(passage.reply) for passage in passages]
    for index, length in enumerate(lengths):
        if base.max_positions is not None and length > base.max_positions:
            raise UserError(
                f"{_opening(passages[index])} is {length} tokens long, but {base.name} has {base.max_positions} "
                "positions: leave out turns"
            )
    for batch in batches(lengths, batch_size):
        some = [passages[i] for i in batch]
        rows, replies = [passage.row for passage in some], [passage.reply for passage in some]
        left = not base.is_encoder_decoder
        width = max(lengths[i] for i in batch) if left else 1 + max(len(reply) for reply in replies)
        shifts = [width - lengths[i] if left else 0 for i in batch]
        weights = torch.zeros(len(batch), max(len(passage.spans) for passage in some), width)
        for b, (passage, shift) in enumerate(zip(some, shifts, strict=True)):
            for s, (start, stop) in enumerate(passage.spans):
                weights[b, s, shift + start : shift + stop] = 1 / max(1, stop - start)
        weights = weights.to(base.device)
        means: dict[Site, Tensor] = {}
        with entered(edit, batch, prompt_lengths(base, rows)):
            with changed(base.model, {site: _mean(means, site, weights) for site in sites}):
                _forward(base, rows, replies)
        found = torch.stack([means[site].to(base.device) for site in sites], dim=2).cpu()  # [B, spans, sites, hidden]
        if not bool(found.isfinite().all()):
            b, _, place, _ = (~found.isfinite()).nonzero()[0].tolist()
            raise UserError(
                f"states at layer {sites[place].layer} are not finite for {_opening(some[b])}: the LM overflows in "
                "this dtype, or its weights are damaged"
            )
        for b, (index, passage) in enumerate(zip(batch, some, strict=True)):
            mine = found[b, : len(passage.spans)].clone()
            mine[[s for s, (start, stop) in enumerate(passage.spans) if start == stop]] = torch.nan
            yield index, mine


def _mean(means: dict[Site, Tensor], site: Site, weights: Tensor) -> Change:
    def reduce(hidden: Tensor) -> None:
        means[site] = torch.bmm(weights.to(hidden.device), hidden.float())

    return reduce


def _opening(passage: Passage) -> str:
    messages = passage.row.request.messages
    return f"the conversation that begins {messages[0].content[:60]!r}" if messages else "a passage"


def span_means(
    base: BaseLM,
    conversations: Sequence[Conversation],
    sites: Sequence[Site],
    edit: Edit | None = None,
    batch_size: int = 32,
    prefixes: Sequence[Tensor | None] | None = None,
    where: str = "reply",
) -> Iterator[tuple[int, Tensor]]:
    """Per conversation its index and [assistant turns, sites, hidden]: the mean state over the tokens of each of the
    assistant's messages, float32 on the CPU, by one forward (reference/assistant_axis.md 3.3; 5.5 to 5.7). With
    `where` "prompt_last" it is the state at the token before the message, where its first token is chosen.

    Spans are those of `message_spans`; a message without tokens has NaN, and keeps its turn. In an encoder-decoder the
    conversation up to a reply is the encoder's and the reply the decoder's, so there is a forward for each reply.
    `edit` gets indices of conversations; `prefixes` are vectors in front. To an edit the last reply is the response.
    Order, what is kept, and errors as `passage_means`; UserError also as `message_spans`.
    """
    prefixes = [None] * len(conversations) if prefixes is None else prefixes
    passages: list[Passage] = []
    owners: list[int] = []  # of each passage its conversation
    for index, (messages, prefix) in enumerate(zip(conversations, prefixes, strict=True)):
        new = _passages(base, messages, prefix)
        if where == "prompt_last":
            new = [replace(one, spans=[(max(start - 1, 0), start) if start < stop else (start, stop)
                                       for start, stop in one.spans]) for one in new]  # fmt: skip
        passages += new
        owners += [index] * len(new)
        if not new:
            yield index, torch.empty(0, len(sites), stream_size(base.model))
    place = {first: owners.index(first) for first in set(owners)}
    open_turns: dict[int, dict[int, Tensor]] = {}
    theirs = None if edit is None else lambda indices: edit([owners[i] for i in indices])
    for i, means in passage_means(base, passages, sites, theirs, batch_size):
        turns = open_turns.setdefault(owners[i], {})
        turns[i - place[owners[i]]] = means
        if len(turns) == owners.count(owners[i]):
            del open_turns[owners[i]]
            yield owners[i], torch.cat([turns[turn] for turn in sorted(turns)])


def _passages(base: BaseLM, messages: Conversation, prefix: Tensor | None) -> list[Passage]:
    """A conversation as one row whose last reply is its reply; in an encoder-decoder a row for each of its replies."""
    replies = [place for place, message in enumerate(messages) if message.role == "assistant"]
    request = Request(messages)
    if base.is_encoder_decoder:
        found = []
        for place in replies:
            ids, span = reply_tokens(base, messages[:place], messages[place].content)
            row = Row(base.render(messages[:place]), prefix, request)
            found.append(Passage(row, ids, [(1 + span.start, 1 + span.stop)]))
        return found
    if not replies:
        return []
    ids, spans = message_tokens(base, messages)
    first = 0 if prefix is None else len(prefix)
    # What follows the last reply changes nothing before it.
    begins, stop = spans[replies[-1]].start, max(spans[place].stop for place in replies)
    places = [(first + spans[place].start, first + spans[place].stop) for place in replies]
    return [Passage(Row(ids[:begins], prefix, request), ids[begins:stop], places)]


@torch.no_grad()
def mean_norms(
    base: BaseLM, conversations: Sequence[Conversation], sites: Sequence[Site], batch_size: int = 32
) -> list[float]:
    """Per site the mean length of the states over all tokens of the conversations: the unit of a relative strength
    (`edits.add`; reference/assistant_axis.md 3.5). Raises UserError for an encoder-decoder."""
    if base.is_encoder_decoder:
        raise UserError(f"mean norms are read from decoder-only LMs, and {base.name} is none")
    rows = [Row(message_tokens(base, messages)[0], None, Request(messages)) for messages in conversations]
    totals, tokens = torch.zeros(len(sites), dtype=torch.float64), 0
    for batch in batches([row.length for row in rows], batch_size):
        some = [rows[i] for i in batch]
        sums: dict[Site, Tensor] = {}
        width = max(row.length for row in some)
        real = torch.tensor([[0.0] * (width - row.length) + [1.0] * row.length for row in some])
        with changed(base.model, {site: _lengths(sums, site, real) for site in sites}):
            _forward(base, some, [[] for _ in some])
        totals += torch.stack([sums[site].double().cpu() for site in sites])
        tokens += sum(row.length for row in some)
    return (totals / tokens).tolist()


def _lengths(sums: dict[Site, Tensor], site: Site, real: Tensor) -> Change:
    def reduce(hidden: Tensor) -> None:
        sums[site] = (hidden.float().norm(dim=-1) * real.to(hidden.device)).sum()

    return reduce
