"""Data made by models: one row for each item, on disk as soon as it is there, through the runner of episodes.

    async def episode(question: str, roles: Roles) -> dict:
        reply = await roles.reference.respond(Request((Message("user", question),)))
        return {"question": question, "answer": reply.text}

    rows = generate([("1", "why ?"), ...], episode, Cast(model, reference=teacher), out / "answers.jsonl", ...)

What is on disk then:

    answers.jsonl            rows {"id": ..., "question": ..., "answer": ...} in the items' order, when all are done
    answers.part<r>.jsonl    what process r has finished since
    answers.meta.json        settings, and a fingerprint of the items
    answers.usage*.jsonl     what endpoints were asked for them
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from persona.errors import UserError
from persona.evaluation.judges.judging import Unscored
from persona.evaluation.roles import Cast, Roles
from persona.evaluation.runner import Processes, part, parts, place, run_episodes, usage, usage_files
from persona.files import atomic_write, read_lines, read_meta, write_json

logger = logging.getLogger(__name__)
T = TypeVar("T")


def generate(
    items: Sequence[tuple[str, T]],
    episode: Callable[[T, Roles], Awaitable[Mapping[str, Any]]],
    cast: Cast,
    path: Path,
    *,
    settings: Mapping[str, Any],
    batch_size: int,
    processes: Processes | None = None,
    title: str = "",
) -> list[dict[str, Any]]:
    """One row {"id": ..., **what `episode` returns} for each (id, item), in their order, from `path` or asked for now.

    A run that was stopped goes on, and asks nothing twice. `settings` (JSON values) is all that rows depend on beside
    the items: models, prompts, sampling, seed. Rows made with other settings or items are dropped with a warning.
    An item whose episode raises `Unscored` (a reply that cannot be read, a request that is refused) gives the row
    {"id", "reason", "raw"}; such rows are counted in a warning, and their items are asked again at the next start.
    With `processes`, each takes every n-th item, rank zero joins their rows, and all of them return them.

    Raises UserError for ids that repeat, for a `path` that was not written here, where an endpoint cannot be asked any
    more, and at the end where calls to one got no reply (`Unscored.failed`), for these may get one another time; rows
    so far are kept. Raises ValueError when `episode` returns a key "id", "reason" or "failed".
    """
    path, items = Path(path), list(items)
    title = title or path.stem
    ids = [id for id, _ in items]
    if twice := [id for id, n in Counter(ids).items() if n > 1]:
        raise UserError(f'{title}: the id "{twice[0]}" stands for several items')
    rank, world = place(processes)
    if rank == 0:
        _prepare(path, {"settings": json.loads(json.dumps(dict(settings))), "items": fingerprint(items)})
    if processes:
        processes.wait_for_everyone()

    rows = _read(path)
    mine = items[rank::world]
    left = [(id, item) for id, item in mine if "reason" in rows.get(id, {"reason": ""})]

    async def line(item: tuple[str, T], roles: Roles) -> bytes:
        try:
            row = await episode(item[1], roles)
        except Unscored as error:
            failed = {"failed": True} if error.failed else {}
            return _line({"id": item[0], "reason": error.reason, "raw": error.raw, **failed})
        except Exception as error:
            error.add_note(f'This happened in {title}, item "{item[0]}".')
            raise
        if taken := {"id", "reason", "failed"} & row.keys():
            raise ValueError(f"{title}: the key {min(taken)} of a row is not for an episode to give")
        return _line({"id": item[0], **row})

    if left:
        run_episodes(
            left,
            line,
            cast,
            part(path, rank),
            who=title,
            batch_size=batch_size,
            title=title,
            total=len(mine),
            show=rank == 0,
        )
    if processes:
        processes.wait_for_everyone()
    if rank == 0:
        _join(path, ids, title)
    if processes:
        processes.wait_for_everyone()
    made = list(read_lines(path))
    if failed := [row for row in made if row.get("failed")]:
        raise UserError(
            f'{title}: {len(failed)} of {len(made)} got no reply, the first of them "{failed[0]["id"]}" '
            f"({failed[0]['reason']}): the same command asks for these again and keeps the others"
        )
    return made


def seed_of(seed: int, *names: object) -> int:
    """A seed of its own for everything that has a name: the same in any batch, on any process, in any order."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def fingerprint(items: Sequence[tuple[str, Any]]) -> str:
    """16 hex digits over ids and items, in order. Items are JSON values or hold dataclasses, sequences, mappings."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, ensure_ascii=False, sort_keys=True, default=_plain).encode() + b"\n")
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {entry.name: getattr(value, entry.name) for entry in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):  # a history that stays on disk, say
        return list(value)
    raise TypeError(f"items to generate from cannot hold a {type(value).__name__}")


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="replace")


def _prepare(path: Path, made_of: Mapping[str, Any]) -> None:
    meta = path.with_name(f"{path.stem}.meta.json")
    there = [file for file in parts(path) if file.exists()]
    before = read_meta(meta) if meta.exists() else None
    if before is not None and not (isinstance(before.get("settings"), dict) and "items" in before):
        raise UserError(f"{meta} does not say what its rows are of: restore it, or move both away")
    if there and before is None:
        raise UserError(f"{there[0]} was not made by this program ({meta.name} is missing): move it away")
    if before is not None and before != made_of:
        old, new = (what["settings"] | {"items": what["items"]} for what in (before, made_of))
        changed = ", ".join(key for key in {**old, **new} if old.get(key) != new.get(key))
        if there:
            logger.warning("%s: rows of other settings are dropped (%s changed)", path, changed)
        for file in (*there, *usage_files(path)):
            file.unlink()
    if before != made_of:
        write_json(meta, made_of)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Rows by id; of several for one item an answer rather than a reason why there is none."""
    rows: dict[str, dict[str, Any]] = {}
    for row in (row for file in parts(path) for row in read_lines(file)):
        if "reason" in rows.get(row["id"], {"reason": ""}):
            rows[row["id"]] = row
    return rows


def _join(path: Path, ids: Sequence[str], title: str) -> None:
    rows = _read(path)
    if parts(path)[1:] or not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"".join(_line(rows[id]) for id in ids))
        for file in parts(path)[1:]:
            file.unlink()
    for role, counts in usage(path).items():
        told = ", ".join(f"{key} {value:g}" for key, value in counts.items() if value)
        logger.info("%s: the %s was asked over all starts: %s", title, role, told)
    if reasons := Counter(row["reason"] for row in rows.values() if "reason" in row):
        told = "; ".join(f"{n} × {reason}" for reason, n in reasons.most_common(3))
        logger.warning(
            "%s: %d of %d have no answer (%s); they are asked again at the next start",
            title,
            reasons.total(),
            len(ids),
            told,
        )
