"""Edits of the residual stream: add a vector, ablate a direction, cap the projection onto it.

`add`, `ablate` and `cap` are pure functions of states. `edited` applies them within the forwards of a base LM, at any
site, to all positions or some, per row of a batch. The assistant-axis paper's cap is a floor under the projection onto
the axis; its published settings are ceilings on the negated axis, which is the same (reference/assistant_axis.md 3.6).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from persona.errors import UserError
from persona.lm.batch import running
from persona.lm.residual import Change, Site, changed, decoder, site_device, stream_size

KINDS = ("add", "ablate", "cap")
POSITIONS = ("all", "prompt", "response", "last")


def unit(direction: Tensor) -> Tensor:
    """direction / |direction|, in float32 or wider."""
    direction = direction.to(torch.promote_types(direction.dtype, torch.float32))
    return direction / direction.norm(dim=-1, keepdim=True)


def add(hidden: Tensor, vector: Tensor, strength: float = 1.0, norm: float | None = None) -> Tensor:
    """hidden [..., H] + strength · vector [H]; with `norm`, strength · norm · vector / |vector|.

    `norm` is the mean length of the states at this layer (`residual.mean_norms`): then a strength means the same at
    each layer and in each LM, as in the assistant-axis paper's steering (reference/assistant_axis.md 3.5). Computed in
    float32 at least, returned in the states' dtype.
    """
    vector = _pushed(vector, strength, norm)
    return (hidden + vector.to(hidden.device)).to(hidden.dtype)


def cap(hidden: Tensor, direction: Tensor, floor: float | None = None, ceiling: float | None = None) -> Tensor:
    """States [..., H] with their projection onto the unit direction held within [floor, ceiling], either one open.

    h + (clamp(<h, v>) - <h, v>) · v with v = direction / |direction|; a state within the bounds stays as it is,
    bitwise. A floor under v is a ceiling on -v. Raises UserError for a floor above the ceiling.
    """
    _check_bounds(floor, ceiling)
    if floor is None and ceiling is None:
        return hidden
    v = unit(direction).to(hidden.device)
    return _moved(hidden, _excess(hidden, v, floor, ceiling), v)


def ablate(hidden: Tensor, direction: Tensor) -> Tensor:
    """States [..., H] without their part along the direction: capped from both sides at 0."""
    return cap(hidden, direction, 0.0, 0.0)


def _pushed(vector: Tensor, strength: float, norm: float | None) -> Tensor:
    if norm is not None:
        return strength * norm * unit(vector)
    return strength * vector.to(torch.promote_types(vector.dtype, torch.float32))


def _excess(hidden: Tensor, v: Tensor, floor, ceiling) -> Tensor:
    """How far the projection [...] has to move, 0 within the bounds. v [H], or [B, H] for hidden [B, T, H]; bounds are
    numbers or tensors that fit the projection."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    projection = wide @ v.to(wide.dtype) if v.ndim == 1 else torch.einsum("bth,bh->bt", wide, v.to(wide.dtype))
    return projection.clamp(floor, ceiling) - projection


def _moved(hidden: Tensor, change: Tensor, v: Tensor) -> Tensor:
    along = v if v.ndim == 1 else v[:, None]
    return torch.addcmul(hidden, change[..., None], along.to(change.dtype)).to(hidden.dtype)


def _check_bounds(floor: float | None, ceiling: float | None) -> None:
    if floor is not None and ceiling is not None and floor > ceiling:
        raise UserError(f"a cap's floor of {floor} lies above its ceiling of {ceiling}")


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit of the states at `site`. `kind`: "add" (`strength`, `norm` as in `add`), "ablate", or "cap" (`floor`,
    `ceiling`, or both for a band). `direction` [hidden].

    `positions`: "all", the "prompt" (vectors in front included), the "response" (the reply's tokens), or "last", those
    that a token of the reply is predicted from: the prompt's last one and the reply's. Each is the same position
    whether a reply is generated with a cache or given whole.
    Raises UserError for what cannot be applied: unknown names, a cap without bounds, a direction of no length.
    """

    site: Site
    kind: str
    direction: Tensor
    strength: float = 1.0
    norm: float | None = None
    floor: float | None = None
    ceiling: float | None = None
    positions: str = "all"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"an edit's kind is one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.positions not in POSITIONS:
            raise UserError(f"an edit's positions are one of {', '.join(POSITIONS)}, not {self.positions!r}")
        where = f"the {self.kind} at layer {self.site.layer}"
        if self.direction.ndim != 1 or not bool(self.direction.isfinite().all()):
            raise UserError(f"{where} needs one direction of finite numbers, but has {tuple(self.direction.shape)}")
        if (self.kind != "add" or self.norm is not None) and not bool(self.direction.any()):
            raise UserError(f"{where} has a direction of length 0: it points nowhere")
        if (self.kind == "cap") != (self.floor is not None or self.ceiling is not None):
            raise UserError(f"{where}: a cap needs a floor or a ceiling, and only a cap has them")
        _check_bounds(self.floor, self.ceiling)

    @property
    def bounds(self) -> tuple[float, float]:
        if self.kind == "ablate":
            return 0.0, 0.0
        return (
            -torch.inf if self.floor is None else self.floor,
            torch.inf if self.ceiling is None else self.ceiling,
        )


class Counts:
    """Per edit how many positions it was asked about and at how many it moved the state; only ablations and caps are
    counted. Padding does not count, nor do rows of a generated batch behind their end."""

    def __init__(self) -> None:
        self.acted: list[int] = []
        self.seen: list[int] = []

    def engaged(self) -> list[float | None]:
        """Per edit the share of positions where it acted; None where it has seen none."""
        return [a / n if n else None for a, n in zip(self.acted, self.seen, strict=True)]

    def _add(self, acted: Sequence[int], seen: Sequence[int]) -> None:
        if not self.seen:
            self.acted, self.seen = [0] * len(acted), [0] * len(seen)
        self.acted = [a + b for a, b in zip(self.acted, acted, strict=True)]
        self.seen = [a + b for a, b in zip(self.seen, seen, strict=True)]


# ---- within forwards -----------------------------------------------------------------------------------------------


class _Step:
    """Edits of one site that act together: of one kind, at the same positions, and no row has two of them (additions
    aside, which add up). `vectors` is [H], or [B, H] where rows differ."""

    def __init__(self, adds: bool, positions: str, batch: int | None) -> None:
        self.adds, self.positions, self.batch = adds, positions, batch
        self.edits: list[tuple[int, Edit, list[int]]] = []  # its number, the edit, its rows
        self.low: Any = -torch.inf  # a number, or [B, 1] where rows differ
        self.high: Any = torch.inf

    def build(self, device: torch.device) -> None:
        first = self.edits[0][1]
        if self.batch is None and not self.adds:  # of such edits a step has one
            self.vectors = unit(first.direction).to(device)
            self.low, self.high = first.bounds
            return
        vectors = torch.zeros(self.batch or 1, len(first.direction))
        low, high = torch.full((len(vectors), 1), -torch.inf), torch.full((len(vectors), 1), torch.inf)
        for _, edit, rows in self.edits:
            index = torch.tensor(rows)
            vector = _pushed(edit.direction, edit.strength, edit.norm) if self.adds else unit(edit.direction)
            vectors = vectors.index_add(0, index, vector.to(vectors).expand(len(rows), -1))
            low[index], high[index] = edit.bounds
        self.vectors = (vectors[0] if self.batch is None else vectors).to(device)
        self.low, self.high = low.to(device), high.to(device)

    def apply(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The states changed where `mask` [B, T] says (None: everywhere), and for bounds how far each was moved."""
        vectors, low, high = self.vectors.to(hidden.device), self.low, self.high
        if self.batch is not None:  # beams: generation repeats each row
            times = hidden.shape[0] // self.batch
            vectors = vectors.repeat_interleave(times, dim=0)
            low, high = (bound.to(hidden.device).repeat_interleave(times, dim=0) for bound in (low, high))
        mask = None if mask is None else mask.to(hidden.device)
        if self.adds:
            pushed = vectors if vectors.ndim == 1 else vectors[:, None]
            pushed = pushed if mask is None else pushed * mask[..., None]
            return (hidden + pushed).to(hidden.dtype), None
        excess = _excess(hidden, vectors, low, high)
        excess = excess if mask is None else excess * mask
        return _moved(hidden, excess, vectors), excess.detach()


def _steps(edits: Sequence[tuple[int, Edit]], rows: Sequence[Sequence[int]] | None) -> list[_Step]:
    """The edits of one site as few steps, in which those of each row keep their order."""
    steps: list[_Step] = []
    for number, edit in edits:
        mine = [0] if rows is None else [b for b, numbers in enumerate(rows) if number in numbers]
        adds = edit.kind == "add"
        if not mine or (adds and (edit.strength == 0 or not bool(edit.direction.any()))):
            continue
        joined = None
        for step in reversed(steps):
            meets = not set(mine).isdisjoint(b for _, _, others in step.edits for b in others)
            if (step.adds, step.positions) == (adds, edit.positions) and (adds or not meets):
                joined = step
            if joined or meets:
                break
        if joined is None:
            joined = _Step(adds, edit.positions, None if rows is None else len(rows))
            steps.append(joined)
        joined.edits.append((number, edit, mine))
    return steps


class _Forward:
    """What the steps of all sites share: where in a forward they act, and what is counted after it."""

    def __init__(self, steps: Sequence[_Step]) -> None:
        self.batch = steps[0].batch
        self.bounds = [step for step in steps if not step.adds]
        self.kinds = sorted({step.positions for step in steps} - {"all"})
        self.masks: dict[str, Tensor] = {}
        self.real = torch.ones(1, 1, dtype=torch.bool)
        self.moved: list[Tensor | None] = [None] * len(self.bounds)
        self.acted: Tensor | None = None  # [bounds], or [bounds, B] where rows differ
        self.seen: Tensor | None = None

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """In front of the decoder: which of the columns it computes are whose."""
        given: Any = kwargs.get("inputs_embeds")
        given = kwargs.get("input_ids", args[0] if args else None) if given is None else given
        rows, columns = given.shape[:2]
        if self.batch is not None and rows % self.batch:
            raise UserError(f"edits were given for {self.batch} rows, but the forward has {rows}")
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.real = given.new_ones((rows, columns), dtype=torch.bool) if mask is None else mask[:, -columns:].bool()
        if running.going is not None and len(running.going) == rows:
            self.real = self.real & running.going[:, None]
        if self.kinds:
            self._mark(kwargs, mask, rows, columns, given.device)

    def _mark(self, kwargs: dict, mask: Tensor | None, rows: int, columns: int, device: torch.device) -> None:
        if running.prompts is None or rows % len(running.prompts):
            raise UserError(
                f"an edit at the {self.kinds[0]} positions needs to know where replies begin: run the forward through "
                "persona.lm, or within persona.lm.batch.prompts(lengths of its rows' prompts)"
            )
        place = kwargs.get("position_ids")
        if place is None or place.ndim != 2:
            if mask is not None:
                place = mask.cumsum(-1)[:, -columns:] - 1
            else:
                past = kwargs.get("past_key_values")
                place = torch.arange(columns, device=device) + (0 if past is None else past.get_seq_length())
        first = running.prompts.to(device).repeat_interleave(rows // len(running.prompts))[:, None]
        here = {"prompt": place < first, "response": place >= first, "last": place >= first - 1}
        self.masks = {kind: here[kind] for kind in self.kinds}

    def after(self, module: nn.Module, args: tuple, output: object) -> None:
        """Behind the decoder: one sum over all bounds, so that counting costs little; nothing waits for a device."""
        where = [
            self.real if step.positions == "all" else self.real & self.masks[step.positions] for step in self.bounds
        ]
        device = self.real.device
        moved = torch.stack([moved.to(device) for moved in self.moved if moved is not None]) != 0  # [bounds, B, T]
        valid = torch.stack(where)
        shape = (len(where), -1) if self.batch is None else (len(where), self.batch, -1)
        acted, seen = ((moved & valid).reshape(shape).sum(-1), valid.reshape(shape).sum(-1))
        self.acted = acted if self.acted is None else self.acted + acted
        self.seen = seen if self.seen is None else self.seen + seen

    def count(self, counts: Counts, edits: int) -> None:
        totals = [[0] * edits, [0] * edits]
        for total, found in zip(totals, (self.acted, self.seen), strict=True):
            for step, numbers in zip(self.bounds, [] if found is None else found.tolist(), strict=found is not None):
                for number, _, rows in step.edits:
                    total[number] += numbers if self.batch is None else sum(numbers[b] for b in rows)
        counts._add(*totals)


@contextmanager
def edited(
    model: nn.Module,
    edits: Sequence[Edit],
    rows: Sequence[Sequence[int]] | None = None,
    counts: Counts | None = None,
) -> Iterator[Counts]:
    """Within the context every forward's states pass through the edits, those at one site in their order.

    `rows[b]` are the numbers of the edits that apply to row b of the batch; None applies all to every row. A batch
    that generation has expanded (beams) to k·B rows repeats each row, as generation does. Rows without an edit, and
    edits of strength 0, are the base LM, bitwise. Where positions matter, `persona.lm` says where replies begin.
    Hooks are gone on leaving, exceptions included. Gradients flow into directions and through the states; nothing is
    written in place. Contexts within each other act in the order they were entered.

    Yields what was counted, complete after the context; `counts` goes on from earlier ones with the same edits.
    Raises UserError for a site that the model does not have and a direction of another width.
    """
    counts = Counts() if counts is None else counts
    width = stream_size(model)
    for edit in edits:
        if len(edit.direction) != width:
            raise UserError(
                f"the {edit.kind} at layer {edit.site.layer} has a direction of {len(edit.direction)} numbers, but "
                f"the LM has states of {width}: it belongs to another LM"
            )
    by_site: dict[Site, list[tuple[int, Edit]]] = {}
    for number, edit in enumerate(edits):
        by_site.setdefault(edit.site, []).append((number, edit))
    plan = {site: steps for site, found in by_site.items() if (steps := _steps(found, rows))}
    if not plan:
        counts._add([0] * len(edits), [0] * len(edits))
        yield counts
        return
    forward = _Forward([step for steps in plan.values() for step in steps])
    for site, steps in plan.items():
        for step in steps:
            step.build(site_device(model, site))
    handles = []
    try:
        if forward.kinds or forward.bounds or forward.batch is not None:
            handles.append(decoder(model).register_forward_pre_hook(forward.before, with_kwargs=True))
        if forward.bounds:
            handles.append(decoder(model).register_forward_hook(forward.after))
        with changed(model, {site: _change(steps, forward) for site, steps in plan.items()}):
            yield counts
    finally:
        for handle in handles:
            handle.remove()
    forward.count(counts, len(edits))


def _change(steps: Sequence[_Step], forward: _Forward) -> Change:
    slots = [None if step.adds else forward.bounds.index(step) for step in steps]

    def change(hidden: Tensor) -> Tensor:
        for step, slot in zip(steps, slots, strict=True):
            hidden, moved = step.apply(hidden, forward.masks.get(step.positions))
            if slot is not None:
                forward.moved[slot] = moved
        return hidden

    return change
