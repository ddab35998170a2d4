"""The rules of LaMP's tasks 1, 2, 3, 4, 5 and 7 (reference/lamp.md §3; task 6 is private).

How LaMP's profile fields become a `HistoryItem`:

| task   | text        | label | encoded or searched  | query: part of the prompt                 |
|--------|-------------|-------|----------------------|-------------------------------------------|
| LaMP_1 | abstract    | title | title + abstract     | the two candidate titles                  |
| LaMP_2 | description | tag   | description          | after "description:"                      |
| LaMP_3 | text        | score | text                 | after "review:"                           |
| LaMP_4 | text        | title | title + text         | after "article:"                          |
| LaMP_5 | abstract    | title | title + abstract     | after "paper:"                            |
| LaMP_7 | text        | -     | text                 | after the first ":"                       |

Where a marker is missing the whole prompt is the query. The wording of the snippets is ours; their shapes are LaMP's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from persona.data.base import Task, register
from persona.types import HistoryItem

TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
    "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip


@dataclass(frozen=True)
class Fields:
    """Names of a profile item's fields in LaMP's files: which one is the text, which one the label."""

    text: str
    label: str | None


FIELDS = {
    "LaMP_1": Fields("abstract", "title"),
    "LaMP_2": Fields("description", "tag"),
    "LaMP_3": Fields("text", "score"),
    "LaMP_4": Fields("text", "title"),
    "LaMP_5": Fields("abstract", "title"),
    "LaMP_7": Fields("text", None),
}


def _after(marker: str) -> Callable[[str], str]:
    """The prompt after the first `marker`, stripped; the whole prompt where the marker or anything after it lacks."""

    def query(prompt: str) -> str:
        found = prompt.partition(marker)[2].strip()
        return found or prompt

    return query


def candidate_titles(prompt: str) -> str:
    """LaMP_1's query: the titles of references [1] and [2], joined by a space.

    They are found by their numbers, so a quotation mark inside a title does no harm (the reference takes the second
    and third quoted string of the prompt). Without the numbers those two quoted strings are used, else the whole
    prompt.
    """
    numbered = re.search(r'\[1\]:\s*"(.*)"\s*\[2\]:\s*"(.*)"', prompt, flags=re.DOTALL)
    if numbered:
        return f"{numbered[1]} {numbered[2]}"
    quoted = re.findall(r'"([^"]*)"', prompt)
    return f"{quoted[1]} {quoted[2]}" if len(quoted) >= 3 else prompt


def own_title(prompt: str) -> str:
    """LaMP_1's query in Persona-Plug's code: the title of the author's own paper; else the whole prompt."""
    found = re.search(r'title "(.*?)",', prompt, flags=re.DOTALL)
    return found[1] if found else prompt


def _text(item: HistoryItem) -> str:
    return item.text


def _title(item: HistoryItem) -> str:
    return item.label or ""


def _title_and_text(item: HistoryItem) -> str:
    return f"{_title(item)} {item.text}".strip()


def _text_and_title(item: HistoryItem) -> str:
    return f"{item.text} {_title(item)}".strip()


def _labelled(name: str) -> Callable[[HistoryItem], str]:
    # The label stands first, so that truncation to an encoder's length cannot lose it.
    return lambda item: f"{name} {item.label}: {item.text}" if item.label else item.text


def _in_front(trailing: str = "") -> Callable[[Sequence[str], str], str]:
    return lambda snippets, prompt: f"{', and '.join(snippets)}. {trailing}{prompt}"


def insert_after_title(snippets: Sequence[str], prompt: str) -> str:
    """LaMP_1's join: the quoted titles come right after the first "title" of the prompt, before the author's own.

    A prompt without that word gets them in front, as in the other tasks.
    """
    joined = ", and ".join(snippets)
    head, word, tail = prompt.partition("title")
    return f"{head}{word} {joined}, and{tail}" if word else f"{joined}. {prompt}"


def _abstract_of_title(item: HistoryItem) -> tuple[str, str] | None:
    # LaMP_1 cannot be asked about a past item; LaMP's PEFT trains on title -> abstract (reference/lamp.md §3.3).
    return (f'Write the abstract of the paper with the title "{item.label}".', item.text) if item.text else None


LAMP_1 = Task(
    name="LaMP_1",
    kind="classification",
    labels=("[1]", "[2]"),
    item_text=_title_and_text,
    item_text_with_label=_title_and_text,
    query_text=candidate_titles,
    snippet_text=_title,
    snippet=lambda item, text: f'"{text}"',
    join=insert_after_title,
    inline=True,
    example=_abstract_of_title,
    metrics=("accuracy",),
)
LAMP_2 = Task(
    name="LaMP_2",
    kind="classification",
    labels=TAGS,
    item_text=_text,
    item_text_with_label=_labelled("tag"),
    query_text=_after("description:"),
    snippet_text=_text,
    snippet=lambda item, text: f'the movie "{text}" has the tag "{item.label}"',
    join=_in_front(),
    metrics=("accuracy", "f1"),
)
LAMP_3 = Task(
    name="LaMP_3",
    kind="rating",
    labels=("1", "2", "3", "4", "5"),
    item_text=_text,
    item_text_with_label=_labelled("score"),
    query_text=_after("review:"),
    snippet_text=_text,
    snippet=lambda item, text: f'{item.label} is the score for "{text}"',
    join=_in_front(),
    metrics=("mae", "rmse"),
)
LAMP_4 = Task(
    name="LaMP_4",
    kind="generation",
    item_text=_title_and_text,
    item_text_with_label=_title_and_text,
    query_text=_after("article:"),
    snippet_text=_text,
    snippet=lambda item, text: f'"{_title(item)}" is the title for "{text}"',
    join=_in_front(),
    metrics=("rouge1", "rougeL"),
)
LAMP_5 = Task(
    name="LaMP_5",
    kind="generation",
    item_text=_title_and_text,
    item_text_with_label=_title_and_text,
    query_text=_after("paper:"),
    snippet_text=_text,
    snippet=lambda item, text: f'"{_title(item)}" is a title for "{text}"',
    join=_in_front("Like these patterns, "),
    trailing="Like these patterns, ",
    metrics=("rouge1", "rougeL"),
)
LAMP_7 = Task(
    name="LaMP_7",
    kind="generation",
    item_text=_text,
    item_text_with_label=_text,
    query_text=_after(":"),
    snippet_text=_text,
    snippet=lambda item, text: f'"{text}"',
    join=_in_front("These were written by one person. Like these patterns, "),
    trailing="These were written by one person. Like these patterns, ",
    metrics=("rouge1", "rougeL"),
)
LAMP_TASKS = {task.name: register(task) for task in (LAMP_1, LAMP_2, LAMP_3, LAMP_4, LAMP_5, LAMP_7)}

# Persona-Plug's published texts differ from LaMP's in these three places (reference/persona_plug.md §3.2).
register(replace(LAMP_1, query_text=own_title), compat="pplug_reference")
register(replace(LAMP_4, item_text=_text_and_title, item_text_with_label=_text_and_title), compat="pplug_reference")
register(replace(LAMP_7, query_text=_after("before or after it:")), compat="pplug_reference")
