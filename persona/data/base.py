"""What every reader hands out: people with samples (`People`) and the rules of their tasks (`Task`).

A task's rules say which text of a history item is encoded or searched, which part of a prompt is the query, and how
history items are written into a prompt. Methods reach them by the task's name (`Request.task`) through `task()`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from persona.data.rows import first_few
from persona.errors import UserError
from persona.types import HistoryItem, Sample

log = logging.getLogger(__name__)

KINDS = ("generation", "classification", "rating")
SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Task:
    """The rules of one task, as pure functions.

    `labels` is the closed list of answers of a classification or rating task (empty for generation).
    `snippet_text(item)` is the part of an item that a token budget may cut; `snippet(item, text)` writes the item into
    a prompt with that part replaced by `text`; `join(snippets, prompt)` puts the snippets and the prompt together.
    `inline` says that `join` inserts them into the prompt instead of writing them in front of it; `trailing` is the
    fixed phrase that `join` puts between the snippets and the prompt. Both are needed to count tokens.
    `example(item)` is a past item as a (prompt, reply) pair to train on, None where the item gives none.
    `metrics` names what `persona.benchmarks.lamp.score` or a benchmark reports for it.
    """

    name: str
    kind: str
    item_text: Callable[[HistoryItem], str]
    item_text_with_label: Callable[[HistoryItem], str]
    query_text: Callable[[str], str]
    snippet_text: Callable[[HistoryItem], str]
    snippet: Callable[[HistoryItem, str], str]
    join: Callable[[Sequence[str], str], str]
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    inline: bool = False
    trailing: str = ""
    example: Callable[[HistoryItem], tuple[str, str] | None] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"task {self.name} is of kind {self.kind!r}, which should be one of {', '.join(KINDS)}")
        if bool(self.labels) == (self.kind == "generation"):
            raise UserError(
                f"task {self.name} is of kind {self.kind} and has {len(self.labels)} labels: "
                "a classification or rating task lists its labels, a generation task has none"
            )


@dataclass(frozen=True)
class People:
    """People and what is asked on their behalf. The splits may be lazy views of rows that stay on disk.

    `tasks` maps every `Sample.task` that occurs to its rules; `Sample.persona.history` holds the profile.
    `test` may lack targets (LaMP keeps its own hidden): they are then "".
    """

    name: str
    tasks: Mapping[str, Task]
    train: Sequence[Sample]
    dev: Sequence[Sample]
    test: Sequence[Sample] = ()

    def split(self, name: str) -> Sequence[Sample]:
        """The samples of "train", "dev" or "test"; raises UserError for another name."""
        if name not in SPLITS:
            raise UserError(f"there is no split {name!r}; it should be one of {', '.join(SPLITS)}")
        return getattr(self, name)


@dataclass
class DataConfig:
    """Which people to read, and from where.

    name: reader: "lamp" or "jsonl" here; "town" has a config of its own.
    path: the folder (any of LaMP's nests; for jsonl the folder that holds people.jsonl).
    task: LaMP task; None reads it from the outputs files or the folder's name. For jsonl: task of rows without one.
    cache: folder for the Arrow files made from the input, one sub-folder per state of the input files.
    limit: read only the first so many samples of each split (after the cache is built); None reads all.
    compat: "pplug_reference" takes Persona-Plug's published item and query texts instead of LaMP's (docs/errata.md).
    allow_empty_profile, allow_empty_text: go on, with a warning that counts them, when samples have no history items
        or items have no text; otherwise either is an error.
    """

    name: str = "lamp"
    path: str | None = None
    task: str | None = None
    cache: str = "cache/data"
    limit: int | None = None
    compat: str | None = None
    allow_empty_profile: bool = False
    allow_empty_text: bool = False


@dataclass
class _Registry:
    """Known tasks by (name, compat)."""

    tasks: dict[tuple[str, str | None], Task] = field(default_factory=dict)


_REGISTRY = _Registry()


def register(task: Task, compat: str | None = None) -> Task:
    """Make `task` known to `task()` under its name; a second registration of a name replaces the first."""
    _REGISTRY.tasks[task.name, compat] = task
    return task


def canonical(name: str) -> str:
    """The registered spelling of a task's name: hyphens and letter case do not matter ("lamp-3" is "LaMP_3").

    Raises UserError that names the nearest task when there is none of that name.
    """
    known = {task: task for task, compat in _REGISTRY.tasks if compat is None}
    if name in known:
        return name
    folded = {task.lower().replace("-", "_"): task for task in known}
    key = name.lower().replace("-", "_")
    if key in folded:
        return folded[key]
    if key == "lamp_6":
        raise UserError("task LaMP_6 is not supported: its e-mails (Avocado) are private and not part of LaMP's files")
    near = get_close_matches(key, folded, n=1, cutoff=0.0)
    hint = f"; did you mean {folded[near[0]]}?" if near else ""
    raise UserError(f"there is no task {name!r}{hint} (known: {', '.join(sorted(known))})")


def task(name: str, compat: str | None = None) -> Task:
    """The rules of the task `name` (`canonical` spelling or near enough), LaMP's own or registered ones.

    With compat="pplug_reference" LaMP's tasks take Persona-Plug's published item and query texts; tasks that have no
    such variant are returned as they are. Raises UserError for an unknown name or compat value.
    """
    if compat not in (None, "pplug_reference"):
        raise UserError(f"compat {compat!r} is not known for tasks; it should be null or pplug_reference")
    name = canonical(name)
    return _REGISTRY.tasks.get((name, compat)) or _REGISTRY.tasks[name, None]


def check_empty(source: Path, facts: Mapping[str, Sequence[str]], cfg: DataConfig) -> None:
    """Refuse samples without history items and items without text, or warn and count them where `cfg` allows them.

    `facts` holds their ids as "empty_profiles" and "empty_texts". Raises UserError.
    """
    cases = (
        ("empty_profiles", "samples have an empty profile", "allow_empty_profile", cfg.allow_empty_profile),
        ("empty_texts", "profile items have no text", "allow_empty_text", cfg.allow_empty_text),
    )
    for kind, what, key, allowed in cases:
        if not facts[kind]:
            continue
        text = f"{source}: {len(facts[kind])} {what} (ids {first_few(facts[kind])})"
        if not allowed:
            raise UserError(f"{text}; mend them, or set data.{key}=true to go on with them")
        log.warning("%s", text)


def plain_task(name: str, kind: str = "generation", labels: Sequence[str] = ()) -> Task:
    """Rules for people of one's own: the item's text is what is encoded, the whole prompt is the query."""

    def with_label(item: HistoryItem) -> str:
        return item.text if item.label is None else f"{item.label}: {item.text}"

    def snippet(item: HistoryItem, text: str) -> str:
        return f'"{text}"' if item.label is None else f'"{item.label}" for "{text}"'

    metrics = {"generation": ("rouge1", "rougeL"), "classification": ("accuracy", "f1"), "rating": ("mae", "rmse")}
    return Task(
        name=name,
        kind=kind,
        labels=tuple(labels),
        item_text=lambda item: item.text,
        item_text_with_label=with_label,
        query_text=lambda prompt: prompt,
        snippet_text=lambda item: item.text,
        snippet=snippet,
        join=lambda snippets, prompt: f"{', and '.join(snippets)}. {prompt}",
        metrics=metrics.get(kind, ()),
    )
