"""What training leaves behind and evaluation uses: the protocol, the stack, the directory on disk.

A personalizer acts through three doors and no other (see docs/design.md): the prompt, vectors in front of the input
embeddings, and the modules for the length of one forward. Each door may differ per row of a batch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from persona import lm
from persona.errors import UserError
from persona.files import atomic_folder, inside, sha256
from persona.lm import BaseLM, Row, residual
from persona.lm.batch import Edit, prompt_lengths
from persona.lm.residual import Passage, Site
from persona.lm.spans import reply_tokens
from persona.types import Request, Response

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


class Mixed(NamedTuple):
    """What a personalizer mixes: `names` [E], the weights [B, E] of each request, and how alike the parts change the
    base LM, cosines [E, E]."""

    names: tuple[str, ...]
    weights: np.ndarray
    similarity: np.ndarray


class Personalizer:
    """Base of all personalizers; every door is shut until a subclass opens it.

    class Shout(Personalizer):
        method = "shout"
        def prompt(self, requests):
            return [with_system(request, "answer loudly") for request in requests]
    """

    method: ClassVar[str]
    fingerprint: str = ""  # of the directory it was loaded from: what evaluation keeps results apart by
    trained_on_top_of: tuple[str, ...] | None = None  # methods below it in training; None for one not trained

    def prompt(self, requests: Sequence[Request]) -> list[Request]:
        """First door: the requests with other messages. Nothing but `messages` may change."""
        return list(requests)

    def embeddings(self, requests: Sequence[Request]) -> list[Tensor | None]:
        """Second door: per request vectors [n, hidden] to put in front of its input embeddings, or None."""
        return [None] * len(requests)

    def modules(self, requests: Sequence[Request]) -> AbstractContextManager[None]:
        """Third door: entered around one forward whose batch rows are `requests`; undone on leaving."""
        return nullcontext()

    def attention(self, requests: Sequence[Request]) -> list[np.ndarray] | None:
        """Per request the weights of its persona's last items, where a method has such a thing; for plots only."""
        return None

    def mixes(self, requests: Sequence[Request]) -> Mixed | None:
        """What is mixed for each request, where a method mixes; for plots only."""
        return None

    def alone(self, name: str) -> Personalizer:
        """One of what `mixes` names by itself, at weight 1."""
        raise NotImplementedError

    def did(self) -> str:
        """What it did to the forwards so far, as a line for the log; "" where there is nothing to tell."""
        return ""

    def config(self) -> dict[str, Any]:
        """Plain JSON values from which `load` builds this personalizer again."""
        raise NotImplementedError

    def write(self, folder: Path) -> None:
        """Write the weights (safetensors, PEFT's format) into an existing folder; nothing by default."""

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], base: BaseLM) -> Personalizer:
        """Build from a folder whose manifest has been checked."""
        raise NotImplementedError


class LanguageModel:
    """A base LM under a stack of personalizers; the only thing methods and benchmarks both know.

    Prompts pass the stack in order; vectors in front stand in stack order; edits of modules add up. The second and
    third door see the request as the user made it, before the first door. `cut` says what the last call's prompts lost
    because they did not fit the base's positions: tokens, in its order.
    """

    def __init__(
        self,
        base: BaseLM,
        personalizers: Sequence[Personalizer] = (),
        batch_size: int = 32,
        max_length: int | None = None,
    ):
        self.base = base
        self.personalizers = tuple(personalizers)
        self.batch_size = batch_size
        self.max_length = max_length or base.max_positions
        self.cut: tuple[int, ...] = ()
        self._warned = False

    def prompts(self, requests: Sequence[Request], reserve: Sequence[int] | None = None) -> list[list[int]]:
        """Token ids of every prompt, first door applied; each is cut so that its own `reserve` of further positions
        fits (None: the reply's `max_new_tokens`)."""
        prompted: list[Request] = list(requests)
        for personalizer in self.personalizers:
            prompted = personalizer.prompt(prompted)
        if reserve is None:
            reserve = [request.sampling.max_new_tokens for request in requests]
        rooms = [None if self.max_length is None else self.max_length - more for more in reserve]
        fitted = [
            self.base.fit(written.messages, room, request.prefill)
            for written, room, request in zip(prompted, rooms, requests, strict=True)
        ]
        self.cut = tuple(lost for _, lost in fitted)
        if any(self.cut) and not self._warned:
            self._warned = True
            length, lost = next((len(ids) + lost, lost) for ids, lost in fitted if lost)
            logger.warning(
                "a prompt of %d tokens does not fit the %d positions of %s beside its reply: it was cut by %d tokens "
                "(said once, counted in results)", length, self.max_length, self.base.name, lost,
            )  # fmt: skip
        return [ids for ids, _ in fitted]

    def prefixes(self, requests: Sequence[Request]) -> list[Tensor | None]:
        """Second door: the stack's vectors in front of each request, [n, hidden] or None."""
        columns = [personalizer.embeddings(requests) for personalizer in self.personalizers]
        parts = [[column[i] for column in columns if column[i] is not None] for i in range(len(requests))]
        return [torch.cat(row) if row else None for row in parts]

    def rows(self, requests: Sequence[Request], replies: Sequence[int] | None = None) -> list[Row]:
        """Token ids and vectors in front for every request, doors one and two applied. `replies` are the lengths to
        keep free behind the prompts (None: `max_new_tokens`)."""
        prefixes = self.prefixes(requests)
        behind = [request.sampling.max_new_tokens for request in requests] if replies is None else replies
        in_front = [0 if prefix is None else len(prefix) for prefix in prefixes]
        prompts = self.prompts(requests, [a + b for a, b in zip(in_front, behind, strict=True)])
        return [Row(*row) for row in zip(prompts, prefixes, requests, strict=True)]

    @contextmanager
    def edit(self, requests: Sequence[Request]) -> Iterator[None]:
        """The third door of the whole stack, for one forward over these requests."""
        with ExitStack() as stack:
            for personalizer in self.personalizers:
                stack.enter_context(personalizer.modules(requests))
            yield

    def _edit_rows(self, requests: Sequence[Request]) -> Edit | None:
        """The third door for `lm`; None where nobody in the stack opens it, so that rows may share computations."""
        if all(type(personalizer).modules is Personalizer.modules for personalizer in self.personalizers):
            return None
        return lambda indices: self.edit([requests[i] for i in indices])

    def respond(self, requests: Sequence[Request]) -> list[Response]:
        """One reply per request, in order; each depends on its own request only."""
        requests = list(requests)
        with torch.no_grad():
            return lm.respond(self.base, self.rows(requests), self._edit_rows(requests), self.batch_size)

    def choose(self, requests: Sequence[Request]) -> list[list[float]]:
        """Summed log p(option | prompt) for `request.options`, in that order. Raises UserError without options."""
        requests = list(requests)
        for request in requests:
            if not request.options:
                raise UserError(f"choose() needs options, but the request {_short(request)!r} has none")
        options = [[self.base.encode_option(option) for option in request.options or ()] for request in requests]
        return [[float(logps.double().sum()) for logps in row] for row in self._score(requests, options)]

    def loglikelihood(self, requests: Sequence[Request], replies: Sequence[str]) -> list[tuple[float, int]]:
        """Summed log p(reply, end of turn | prompt) and the number of tokens it is summed over."""
        requests = list(requests)
        targets = [
            [self.base.render_reply(request.messages, reply)] for request, reply in zip(requests, replies, strict=True)
        ]
        return [(float(row[0].double().sum()), len(row[0])) for row in self._score(requests, targets)]

    @property
    def stream(self) -> tuple[int, int]:
        """How many decoder blocks the base LM has, and the width of its residual stream."""
        return len(residual.blocks(self.base.model)), residual.stream_size(self.base.model)

    @cached_property
    def _bare(self) -> LanguageModel:
        return LanguageModel(self.base, (), self.batch_size, self.max_length) if self.personalizers else self

    def reply_means(
        self, requests: Sequence[Request], replies: Sequence[str], layers: Sequence[int], untouched: bool = False
    ) -> list[np.ndarray]:
        """Outputs of the decoder blocks `layers`, averaged over each reply's tokens: [layers, hidden], float32.

        What the template puts around a reply is not counted; a reply without tokens gives NaN. The three doors are
        open as when a reply is written, so edits are seen. With `untouched` the bare base LM reads the same messages.
        Raises UserError for a layer that there is not.
        """
        model = self._bare if untouched else self
        asked = zip(requests, replies, strict=True)
        spoken = [reply_tokens(self.base, request.messages, reply) for request, reply in asked]
        rows = model.rows(requests, [len(ids) for ids, _ in spoken])
        self.cut = model.cut
        firsts = prompt_lengths(self.base, rows)
        passages = [
            Passage(row, ids, [(first + span.start, first + span.stop)])
            for row, first, (ids, span) in zip(rows, firsts, spoken, strict=True)
        ]
        sites, edit = [Site(layer) for layer in layers], model._edit_rows(requests)
        means = dict(residual.passage_means(self.base, passages, sites, edit, self.batch_size))
        return [means[i][0].numpy() for i in range(len(requests))]

    def _score(self, requests: Sequence[Request], continuations: list[list[list[int]]]) -> list[list[Tensor]]:
        longest = [max(len(tokens) for tokens in row) for row in continuations]
        with torch.no_grad():
            rows = self.rows(requests, longest)
            return lm.score(self.base, rows, continuations, self._edit_rows(requests), self.batch_size)


def _short(request: Request) -> str:
    return request.messages[-1].content[:60] if request.messages else "(empty)"


# ---- on disk -------------------------------------------------------------------------------------------------------


def save(personalizer: Personalizer, base: BaseLM, folder: Path | str, stack: Sequence[Personalizer] = ()) -> Path:
    """Write the directory whole or not at all: weights, then `personalizer.json` with a hash of every file.

    `stack` names the personalizers it was trained on top of; the same belong below it when it is used. Of several
    processes the first one writes, the others wait for it.
    """
    folder = Path(folder)
    processes = PartialState()
    if processes.is_main_process:
        with atomic_folder(folder) as temporary:
            personalizer.write(temporary)
            files = sorted(file for file in temporary.rglob("*") if file.is_file())
            manifest = {
                "format_version": FORMAT_VERSION,
                "method": personalizer.method,
                "base": base.identity,
                "config": personalizer.config(),
                "trained_on_top_of": [below.method for below in stack],
                "files": {str(file.relative_to(temporary)): sha256(file) for file in files},
            }
            (temporary / "personalizer.json").write_text(json.dumps(manifest, indent=2) + "\n")
    processes.wait_for_everyone()
    return folder


def read_manifest(folder: Path | str, base: BaseLM | None = None) -> dict[str, Any]:
    """The checked manifest of a personalizer directory.

    Raises UserError, in one sentence, for: no directory or manifest, another format version, another base LM (name
    both), a missing file, a file that changed since it was saved or was added, a path that leaves the directory.
    """
    folder = Path(folder)
    path = folder / "personalizer.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a personalizer: it has no personalizer.json")
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{folder} has format version {version}, this code reads version {FORMAT_VERSION}: train it again"
            )
        files, method = dict(manifest["files"]), manifest["method"]
        _ = dict(manifest["config"]), list(manifest["trained_on_top_of"])
        made_for, made_for_fingerprint = manifest["base"]["name"], manifest["base"]["fingerprint"]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}; restore it or train again") from error
    for name, expected in files.items():
        try:
            file = inside(folder, name)
        except UserError as error:
            raise UserError(f"{path} names the file {name!r}, which lies outside its own directory") from error
        if not file.is_file():
            raise UserError(f"{folder} lacks its file {name}: it was not copied whole")
        if sha256(file) != expected:
            raise UserError(f"{file} is not the file that was saved (its hash differs): it is damaged or was edited")
    # A file that no hash vouches for could be read in the place of one that was saved.
    for name in sorted(file.relative_to(folder) for file in folder.rglob("*") if not file.is_dir()):
        told = name.as_posix() in {*files, path.name} or name.suffix == ".md" or any(p[0] == "." for p in name.parts)
        if not told:
            raise UserError(f"{folder} holds {name}, which its manifest does not name: move it out of there")
    if base is not None and made_for_fingerprint != base.identity["fingerprint"]:
        raise UserError(
            f"{folder} ({method}) was trained on base LM {made_for} with fingerprint {made_for_fingerprint}, "
            f"but the base LM here is {base.name} with {base.identity['fingerprint']}"
        )
    return manifest
