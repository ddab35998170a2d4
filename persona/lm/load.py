"""Load a base LM by name or directory, and turn messages into token ids the way its chat template says."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from persona.errors import UserError
from persona.types import Message

# The town's LM is shipped with the package, so that the default run needs no download.
SHIPPED = {"town": Path(__file__).resolve().parents[1] / "town" / "model"}


@dataclass
class ModelConfig:
    """Which base LM. `architecture` holds the fields of the model's own config.json, for `plan=true` without a hub."""

    path: str = "town"  # "town" (shipped), a directory, or a hub id
    revision: str | None = None
    dtype: str = "float32"  # float32 | bfloat16 | float16
    device: str = "auto"  # auto: a GPU when there is one; or a torch device; ignored when device_map is set
    device_map: str | None = None  # handed to transformers, e.g. "auto" to spread a large model
    trust_remote_code: bool = False
    batch_size: int = 32  # rows per forward in generation and scoring
    architecture: dict[str, Any] = field(default_factory=dict)


@dataclass
class BaseLM:
    """A frozen base LM with its tokenizer. `identity` is written into every manifest made on top of it."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str
    revision: str | None = None

    def __post_init__(self) -> None:
        self.is_encoder_decoder = bool(self.model.config.is_encoder_decoder)
        self.embed = self.model.get_input_embeddings()
        self.hidden_size = int(self.embed.weight.shape[1])
        self.model.eval().requires_grad_(False)
        self._identity: dict[str, str | None] | None = None
        if self.tokenizer.pad_token_id is None:
            # Padding is always masked, so any id will do; eos is one that every LM has.
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    @property
    def max_positions(self) -> int | None:
        """Longest sequence the position scheme was made for; None for relative positions (T5)."""
        return None if self.is_encoder_decoder else getattr(self.model.config, "max_position_embeddings", None)

    @property
    def identity(self) -> dict[str, str | None]:
        """Name, revision and a fingerprint of the weights: all shapes, and some values spread over every tensor.

        Values are compared in bfloat16, so a checkpoint loaded in float32 and in bfloat16 has one fingerprint, while
        one that was fine-tuned has another.
        """
        if self._identity is None:
            shapes, values = hashlib.sha256(), hashlib.sha256()
            for key, tensor in sorted(self.model.state_dict().items()):
                shapes.update(f"{key}{tuple(tensor.shape)}".encode())
                if not tensor.is_meta:
                    some = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].to("cpu", torch.bfloat16)
                    values.update(some.view(torch.int16).numpy().tobytes())
            fingerprint = f"{shapes.hexdigest()[:16]}-{values.hexdigest()[:16]}"
            self._identity = {"name": self.name, "revision": self.revision, "fingerprint": fingerprint}
        return self._identity

    # ---- messages to tokens -------------------------------------------------------------------------------------

    @property
    def chat(self) -> bool:
        return self.tokenizer.chat_template is not None and not self.is_encoder_decoder

    def text(self, messages: Sequence[Message], reply: str | None = None) -> str:
        """The prompt as text up to where the reply starts; with `reply`, up to where the reply's turn ends."""
        if not messages:  # nothing in front: a base LM goes on with a text
            return (self.tokenizer.bos_token or "" if self.chat else "") + (reply or "")
        if not self.chat:
            # Without a template: an encoder reads the bare input, a plain causal LM continues after a newline.
            plain = "\n".join(message.content for message in messages)
            return plain if self.is_encoder_decoder else f"{plain}\n{reply or ''}"
        turns = [{"role": message.role, "content": message.content} for message in messages]
        if reply is not None:
            turns.append({"role": "assistant", "content": reply})
        options = {"tokenize": False, "add_generation_prompt": reply is None}
        try:
            return str(self.tokenizer.apply_chat_template(turns, **options))
        except Exception as error:  # jinja raises its own TemplateError, and templates raise through it
            if turns[0]["role"] != "system" or "system" not in str(error).lower() or len(turns) < 2:
                raise UserError(f"the chat template of {self.name} refused the conversation: {error}") from error
            # Some templates (Gemma) know no system role: its text then opens the first user turn.
            first = {"role": turns[1]["role"], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
            return str(self.tokenizer.apply_chat_template([first, *turns[2:]], **options))

    def _encode(self, text: str, special: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def render(self, messages: Sequence[Message], prefill: str = "") -> list[int]:
        """Token ids of the prompt, and of `prefill` where the reply is to begin with it."""
        if prefill and self.is_encoder_decoder:
            raise UserError(f"{self.name} cannot go on with a reply that has begun: it is an encoder-decoder LM")
        # A chat template writes its own special tokens; otherwise the tokenizer adds them (BOS, or T5's EOS).
        return self._encode(self.text(messages) + prefill, special=not self.chat)

    def fit(
        self, messages: Sequence[Message], max_length: int | None = None, prefill: str = ""
    ) -> tuple[list[int], int]:
        """Token ids as of `render`, and how many were lost: over `max_length`, the earliest turns of a conversation
        are left out, as few as will do; where its last turn alone is too long, the longest message loses its end, at
        a token's border. A system message in front stays.

        The template itself is never cut. Raises UserError when even empty messages are longer than `max_length`.
        """
        ids = self.render(messages, prefill)
        whole, messages = len(ids), list(messages)
        if max_length is not None and whole > max_length:
            opening = [message for message in messages[:1] if message.role == "system"]
            starts = [i for i, message in enumerate(messages) if message.role == "user"][1:]
            k = bisect_left(starts, -max_length, key=lambda i: -len(self.render([*opening, *messages[i:]], prefill)))
            if starts:
                messages = [*opening, *messages[starts[min(k, len(starts) - 1)] :]]
                ids = self.render(messages, prefill)
        while max_length is not None and len(ids) > max_length:
            longest = max(range(len(messages)), key=lambda i: len(messages[i].content))
            content = messages[longest].content
            if not content:
                raise UserError(f"a prompt of {len(ids)} tokens does not fit into {max_length} even without its texts")
            pieces = self.tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            keep = len(pieces) - (len(ids) - max_length)
            cut = pieces[keep - 1][1] if keep > 0 else 0
            messages[longest] = Message(messages[longest].role, content[: min(cut, len(content) - 1)])
            ids = self.render(messages, prefill)
        return ids, whole - len(ids)

    def render_reply(self, messages: Sequence[Message], reply: str) -> list[int]:
        """Token ids of `reply` as the model should produce it, its end-of-turn included.

        With a chat template the reply's span is read off the template. Raises UserError when the template does not
        continue its own generation prompt, or when the reply does not come back out of the span.
        """
        if not self.chat:
            ids = self._encode(reply, special=False)
            return ids + [self.tokenizer.eos_token_id]
        prompt, whole = self.text(messages), self.text(messages, reply)
        span = whole[len(prompt) :]
        if not whole.startswith(prompt) or reply.strip() not in span:
            raise UserError(
                f"the chat template of {self.name} does not continue its generation prompt: "
                f"prompt ends {prompt[-40:]!r}, conversation holds {whole[-80:]!r}, reply {reply[:80]!r}"
            )
        ids = self._encode(span, special=False)
        # What follows the end-of-turn token (often a newline) is never generated.
        ends = [i for i, token in enumerate(ids) if token in self.eos_ids]
        return ids[: ends[-1] + 1] if ends else ids

    def encode_option(self, option: str) -> list[int]:
        """Token ids of one answer option, without an end: log p(option | prompt) is about these tokens only."""
        ids = self._encode(option, special=False)
        if not ids:
            raise UserError("an answer option is empty: each option needs at least one token")
        return ids

    @property
    def eos_ids(self) -> set[int]:
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = set(configured if isinstance(configured, list) else [configured]) | {self.tokenizer.eos_token_id}
        return {token for token in ids if token is not None}


def resolve(path: str) -> str:
    """A shipped model's name becomes its directory; a directory stays; anything else is a hub id."""
    return str(SHIPPED.get(path, path))


def _torch_dtype(name: str) -> torch.dtype:
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in choices:
        raise UserError(f"model.dtype={name!r} is unknown: use one of {', '.join(choices)}")
    return choices[name]


def load(config: ModelConfig) -> BaseLM:
    """Load model and tokenizer, frozen and in eval mode.

    Downloads only when `config.path` is a hub id. Raises UserError when the directory or id holds no usable model.
    """
    path = resolve(config.path)
    if path.startswith("~"):
        path = str(Path(path).expanduser())
    # owner/name reads like a path too: where a folder called owner is here, a mistyped path is meant, and no download.
    looks_local = path.startswith((".", "/")) or path.count("/") != 1 or Path(path).parent.is_dir()
    if looks_local and not Path(path).is_dir():
        raise UserError(
            f"model.path={config.path!r} is neither a shipped model, a directory, nor a hub id (owner/name)"
        )
    common = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        hf_config = AutoConfig.from_pretrained(path, **common)
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
        kind = AutoModelForSeq2SeqLM if hf_config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_pretrained(
            path,
            dtype=_torch_dtype(config.dtype),
            device_map=config.device_map,
            use_safetensors=True,
            **common,
        )
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0]
        if "custom code" in reason:
            reason = "it brings code of its own, which is not run unless model.trust_remote_code=true says so"
        raise UserError(f"no base LM could be loaded from model.path={config.path!r}: {reason}") from error
    if config.device_map is None:
        device = config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model.to(device)
    return BaseLM(model, tokenizer, name=config.path, revision=config.revision)
