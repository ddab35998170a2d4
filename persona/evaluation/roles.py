"""Who takes part in an episode: the model that is measured, and who judges it, plays its user, or helps otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from persona.errors import UserError
from persona.evaluation.batching import LanguageModel
from persona.evaluation.judges.judging import Judge, Rubric
from persona.types import Request, Response, Verdict


class Speaker(Protocol):
    """Anything that answers one request at a time: a local model behind a batching front, or an endpoint."""

    name: str
    likelihoods: bool  # whether `choose` and `loglikelihood` can be asked

    async def respond(self, request: Request) -> Response: ...

    async def choose(self, request: Request) -> list[float]: ...

    async def loglikelihood(self, request: Request, target: str) -> tuple[float, int]: ...


class Parrot:
    """Says one text whatever it is asked: what a constant or a random answer scores."""

    likelihoods = False

    def __init__(self, text: str) -> None:
        self.text, self.name = text, "parrot"

    async def respond(self, request: Request) -> Response:
        return Response(self.text)

    async def choose(self, request: Request) -> list[float]:
        """0 for the option it says, -1000 for each other one."""
        return [0.0 if option == self.text else -1000.0 for option in request.options or ()]

    async def loglikelihood(self, request: Request, target: str) -> tuple[float, int]:
        raise UserError("a constant or random answer has no likelihood")


@dataclass(frozen=True)
class Roles:
    """`model` is what is measured; `reference` writes what a benchmark needs written beside it (questions, examples);
    `user_simulator` plays the other side of a conversation. A benchmark names those it needs in `needs`."""

    model: Speaker
    judges: Sequence[Judge] = ()
    user_simulator: Speaker | None = None
    reference: Speaker | None = None

    async def judge(self, rubric: Rubric, /, **slots: object) -> list[Verdict]:
        """Every judge's verdict on the same question, asked at once, in the order of `judges`."""
        return list(await asyncio.gather(*(judge.ask(rubric, **slots) for judge in self.judges)))

    def check(self, who: str, needs: Sequence[str]) -> None:
        """Raise UserError when a role that `who` needs is not taken, or two judges have one name."""
        names = [judge.name for judge in self.judges]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"two judges are called {twice!r}: their verdicts could not be told apart")
        for role in needs:
            if not (self.judges if role == "judge" else getattr(self, role)):
                raise UserError(f"{who} needs a {role}: choose one with {role}=endpoint, say")


Player = LanguageModel | Speaker  # a local model in batches, or an endpoint


@dataclass(frozen=True)
class Cast:
    """Who plays which role in a run. A judge may also be a Judge of its own kind (a rule, the town's oracle), and the
    model of a benchmark an answer without reading (`episodes.Trivial`)."""

    model: Any
    judges: Sequence[Player | Judge] = ()
    user_simulator: Player | None = None
    reference: Player | None = None

    def players(self) -> dict[str, Any]:
        """Everybody by role, numbered where a role is taken by several."""
        judges = {f"judge {number}": judge for number, judge in enumerate(self.judges, start=1)}
        everybody: dict[str, Any] = {"model": self.model, **judges}
        everybody |= {"user_simulator": self.user_simulator, "reference": self.reference}
        return {role: player for role, player in everybody.items() if player is not None}

    def usage(self) -> dict[str, Any]:
        """Requests, tokens and cost of each role that counts them (endpoints)."""
        return {role: dict(player.usage) for role, player in self.players().items() if hasattr(player, "usage")}


def identity(player: Any) -> dict[str, Any]:
    """What of a player decides what it says, as JSON values: weights and dtype of a local model, name and address of
    an endpoint, the stack on either; the name of a judge of its own kind."""
    if not hasattr(player, "respond"):
        return {"name": player.name}
    stack = [[p.method, p.config(), p.fingerprint] for p in getattr(player, "personalizers", ())]
    if hasattr(player, "base"):
        return {**player.base.identity, "dtype": str(player.base.dtype), "stack": stack}
    server = getattr(player, "endpoint", player).config
    return {"endpoint": server.model, "base_url": server.base_url, "stack": stack}
