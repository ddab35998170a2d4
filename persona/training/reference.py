"""Log-probs of a reference model on disk, per token: computed once, found again by their content.

What was computed is kept in chunks of rows; each is a file that appears whole. So several processes share the work, a
killed run goes on where it was, and training reads single rows out of memory-mapped files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from persona.errors import UserError
from persona.files import atomic_write
from persona.lm import BaseLM, Row
from persona.lm.batch import batches
from persona.lm.score import score
from persona.progress import Bar
from persona.training.rows import Tokens
from persona.types import Request

CHUNK = 256  # prompts a file


def content_key(model: Sequence[str], rows: Sequence[Tokens]) -> str:
    """The hash of everything the log-probs depend on: names of the model's parts, and every row's tokens."""
    digest = hashlib.sha256(repr(list(model)).encode())
    for prompt, reply in rows:
        digest.update(np.array([len(prompt), len(reply), *prompt, *reply], dtype=np.int64).tobytes())
    return digest.hexdigest()[:32]


class Reference:
    """`reference[row]`: the log-probs [reply's tokens] of one row, read from disk when asked for."""

    def __init__(self, folder: Path, rows: Sequence[Tokens]):
        """Raises UserError when a chunk is damaged or rows are missing, and lists them."""
        self._files: list[safe_open] = []
        self._places: dict[int, tuple[int, int, int]] = {}
        for path in sorted(folder.glob("chunk-*.safetensors")):
            try:
                file = safe_open(path, "pt")
                lengths = file.get_tensor("lengths").tolist()
                stops = np.cumsum(lengths).tolist()
                for row, length, stop in zip(file.get_tensor("rows").tolist(), lengths, stops, strict=True):
                    self._places[row] = (len(self._files), stop - length, stop)
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                raise UserError(f"{path} is damaged ({error}): remove it, and it is computed again") from error
            self._files.append(file)
        odd = [
            row
            for row, (_, reply) in enumerate(rows)
            if row not in self._places or self._places[row][2] - self._places[row][1] != len(reply)
        ]
        if odd:
            listed = ", ".join(map(str, odd[:10])) + (", …" if len(odd) > 10 else "")
            raise UserError(
                f"{folder} lacks reference log-probs of {len(odd)} of {len(rows)} rows ({listed}): remove the folder, "
                "and they are computed again"
            )

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> Tensor:
        file, start, stop = self._places[row]
        return self._files[file].get_slice("logps")[start:stop]


def reference_logps(
    base: BaseLM, rows: Sequence[Tokens], folder: Path, parts: Sequence[str], batch_size: int
) -> Reference:
    """Log-probs of the reply's tokens of every row by `base` as it stands, from `folder` where they are there already.

    `parts` names what computes them (the base's fingerprint, hashes of adapters, the precision); with the rows' tokens
    it makes the name of the subfolder. A prompt is computed once for all its replies (`lm.score`), in batches of
    `batch_size` prompts of similar length, longest first, by all processes together.
    """
    processes = PartialState()
    place = folder / content_key(parts, rows)
    prompts: dict[tuple[int, ...], list[int]] = {}
    for row, (prompt, _) in enumerate(rows):
        prompts.setdefault(tuple(prompt), []).append(row)
    groups = list(prompts.items())
    chunks = list(batches([len(prompt) for prompt, _ in groups], CHUNK))
    mine = [
        (path, chunk)
        for number, chunk in enumerate(chunks)
        if number % processes.num_processes == processes.process_index
        and not (path := place / f"chunk-{number:05d}.safetensors").is_file()
    ]
    show = processes.is_main_process and bool(mine)
    with Bar("reference log-probs, prompts", sum(len(chunk) for _, chunk in mine), show) as bar:
        for path, chunk in mine:
            numbers: list[int] = []
            logps: list[Tensor] = []
            for start in range(0, len(chunk), batch_size):
                batch = [groups[i] for i in chunk[start : start + batch_size]]
                asked = [Row(list(prompt), None, Request(())) for prompt, _ in batch]
                replies = [[rows[row][1] for row in own] for _, own in batch]
                for (_, own), found in zip(batch, score(base, asked, replies, batch_size=batch_size), strict=True):
                    numbers += own
                    logps += found
                bar.advance(len(batch))
            tensors = {
                "rows": torch.tensor(numbers),
                "lengths": torch.tensor([len(one) for one in logps]),
                "logps": torch.cat(logps),
            }
            with atomic_write(path) as temporary:
                save_file(tensors, temporary)
    processes.wait_for_everyone()
    return Reference(place, rows)
