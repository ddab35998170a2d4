"""What the tests of this room share: ragged prompts, and plain forwards without padding, cache or our own batching."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from persona.lm import BaseLM, Row
from persona.types import Message, Request, Sampling

DECODERS = ("llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt_neox")
ALL = (*DECODERS, "t5")

PROMPTS = (
    "the fox",
    "what do you think of the red house by the river in the rain ? i like boats",
    "good morning",
    "write one short line",
    "how was your day at the market ?",
)


def no_edit(indices):
    return nullcontext()


def request(text: str, **sampling) -> Request:
    return Request((Message("user", text),), sampling=Sampling(**sampling))


def row(base: BaseLM, text: str, prefix: torch.Tensor | None = None, **sampling) -> Row:
    asked = request(text, **sampling)
    return Row(base.render(asked.messages), prefix, asked)


@torch.no_grad()
def plain_logps(base: BaseLM, prompt: list[int], continuation: list[int]) -> torch.Tensor:
    """log p of each token of `continuation`, by one unpadded forward over token ids."""
    if base.is_encoder_decoder:
        labels = torch.tensor([continuation])
        logits = base.model(input_ids=torch.tensor([prompt]), labels=labels).logits[0]
    else:
        whole = torch.tensor([prompt + continuation])
        logits = base.model(input_ids=whole, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1)[torch.arange(len(continuation)), torch.tensor(continuation)]


@torch.no_grad()
def plain_greedy(base: BaseLM, prompt: list[int], steps: int) -> list[int]:
    """Greedy decoding by one full unpadded forward per token."""
    tokens: list[int] = []
    for _ in range(steps):
        if base.is_encoder_decoder:
            start = torch.tensor([[base.model.config.decoder_start_token_id, *tokens]])
            logits = base.model(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits
        else:
            logits = base.model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in base.eos_ids:
            break
    return tokens
