"""What an ideal reader of past items would know: exact posteriors under the way residents are drawn.

They bound from above what any method can get out of k items. `python -m persona.town.ideal` prints the table of
docs/town.md.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np

from persona.town import lexicon as lx
from persona.town import reading
from persona.town import residents as rs
from persona.town.people import people
from persona.town.residents import Thing
from persona.types import HistoryItem, Sample

_INDEX = {quality: i for i, quality in enumerate(lx.QUALITIES)}
# Every combination of tastes, each equally likely beforehand: [5^8, 8].
_TASTES = np.array(list(itertools.product(range(-2, 3), repeat=len(lx.QUALITIES))), dtype=np.int8)


def _thing(item: HistoryItem) -> Thing | None:
    things = [unit.key for unit in reading.sentences(item.text) or () if unit.kind == "thing"]
    return things[0] if things and isinstance(things[0], Thing) else None


def _rates(tastes: np.ndarray, thing: Thing) -> np.ndarray:
    return np.clip(3 + tastes[:, _INDEX[thing.first]] + tastes[:, _INDEX[thing.second]], 1, 5)


def _takes_first(tastes: np.ndarray, thing: Thing) -> np.ndarray:
    first, second = thing.pair
    return np.abs(tastes[:, _INDEX[first]]) >= np.abs(tastes[:, _INDEX[second]])


def possible_tastes(items: Sequence[HistoryItem]) -> np.ndarray:
    """Every combination of tastes that agrees with all scores and tags of the items: [n, 8], n >= 1 for a resident."""
    left = _TASTES
    for item in items:
        thing = _thing(item)
        if thing is None or item.label is None:
            continue
        if item.label.isdigit():
            left = left[_rates(left, thing) == int(item.label)]
        else:
            left = left[_takes_first(left, thing) == (item.label == lx.TAGS[thing.pair[0]])]
    return left


def rating_posterior(items: Sequence[HistoryItem], thing: Thing) -> np.ndarray:
    """P(rating = 1 … 5 | items): [5]."""
    rates = _rates(possible_tastes(items), thing)
    return np.bincount(rates - 1, minlength=5) / len(rates)


def tag_posterior(items: Sequence[HistoryItem], thing: Thing) -> dict[str, float]:
    """P(tag | items) for the two labels the thing can get."""
    first = float(_takes_first(possible_tastes(items), thing).mean())
    return {lx.TAGS[thing.pair[0]]: first, lx.TAGS[thing.pair[1]]: 1 - first}


def _own(found: str | None, voice: str) -> float:
    return 1 - rs.SHOWN if found is None else rs.SHOWN / 3 if found == voice else 0.0


def _quoted(found: str | None, voice: str) -> float:
    return 0.0 if found in (None, voice) else 1 / (len(lx.VOICES) - 1) / 3


def voice_posterior(items: Sequence[HistoryItem]) -> dict[str, float]:
    """P(voice | items), from the chances with which an item shows its writer's marker or quotes another's."""
    logs = dict.fromkeys(lx.VOICES, 0.0)
    for item in items:
        units = reading.sentences(item.text) or ()
        if item.label is not None and not item.label.isdigit():
            continue  # a tagged thing never shows a voice
        opener = str(units[0].value) if units and units[0].kind == "marker" else None
        closer = str(units[-1].value) if units and units[-1].kind == "marker" else None
        for voice in logs:
            own = _own(opener, voice) * _own(closer, voice)
            quoted = _quoted(opener, voice) * _own(closer, voice) + _own(opener, voice) * _quoted(closer, voice)
            chance = (1 - rs.BORROWED) * own + rs.BORROWED / 2 * quoted
            logs[voice] += float(np.log(chance)) if chance else -np.inf
    top = max(logs.values())
    weights = {voice: float(np.exp(value - top)) for voice, value in logs.items()}
    return {voice: weight / sum(weights.values()) for voice, weight in weights.items()}


def right_answer(sample: Sample, items: Sequence[HistoryItem]) -> float:
    """Chance that the ideal reader's best guess is right: 1 or 0, or a share among equally good guesses."""
    if sample.task == "town_reply":
        chances = voice_posterior(items)
        truth = sample.metadata["voice"]
    else:
        asked = reading.question(sample.messages[-1].content)
        assert asked is not None and isinstance(asked.key, Thing)
        if sample.task == "town_rating":
            chances = {str(i + 1): float(p) for i, p in enumerate(rating_posterior(items, asked.key))}
        else:
            chances = tag_posterior(items, asked.key)
        truth = sample.target
    best = [answer for answer, chance in chances.items() if np.isclose(chance, max(chances.values()))]
    return (truth in best) / len(best)


def main() -> None:
    """Print the ideal reader's share of right answers on the held-out residents, by number of random past items."""
    town = people(train=0)
    held_out = (*town.dev, *town.test)
    print("| items | voice | rating | tag |\n| --- | --- | --- | --- |")
    for count in (0, 1, 4, 16, None):
        row = [str(count) if count is not None else "all"]
        for task in ("town_reply", "town_rating", "town_tag"):
            found = []
            for sample in (s for s in held_out if s.task == task):
                assert sample.persona is not None
                items = sample.persona.history
                items = items if count is None else random.Random(sample.id).sample(items, count)
                found.append(right_answer(sample, items))
            row.append(f"{np.mean(found):.2f}")
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
