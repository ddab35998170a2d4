"""Batched generation: sorted by length, padded on the left, seeded per request; shared beginnings computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from persona import heartbeat
from persona.lm.batch import Edit, Row, assemble, check_numbers, entered, prompt_lengths, running
from persona.lm.load import BaseLM
from persona.lm.prefix import Shared
from persona.lm.score import score
from persona.types import Response, Sampling

NEUTRAL = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_length": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "num_return_sequences": 1,
    "remove_invalid_values": False,
    "return_dict_in_generate": False,
    "use_cache": True,
}


class _Recorder(LogitsProcessor):
    """Keeps log p of every generated token, read from the logits before any warping."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []  # one [B] per generated token
        self._pending: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        heartbeat.moved()
        self.settle(input_ids)
        self._pending = scores.float().log_softmax(-1)
        return scores

    def settle(self, input_ids: Tensor) -> None:
        if self._pending is not None:
            self.steps.append(self._pending.gather(-1, input_ids[:, -1:])[:, 0])
            self._pending = None


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise from one generator per row: greedy search over noisy logits is sampling (Gumbel-max), and a
    row's draw does not depend on the rows beside it."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[-1], generator=g) for g in self.generators])
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return scores + noise.to(scores)


class _Going(StoppingCriteria):
    """Stops nothing: it says which rows have not ended, for edits that count what they do. The others are computed
    on until their batch ends."""

    def __init__(self, ends: Sequence[int], first: int) -> None:
        self.ends, self.first = torch.tensor(ends), first

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        ended = torch.isin(input_ids[:, self.first :], self.ends.to(input_ids.device))
        running.going = ~ended.any(dim=1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def respond(base: BaseLM, rows: Sequence[Row], edit: Edit | None = None, batch_size: int = 32) -> list[Response]:
    """One reply per row, in order. Rows are grouped by their decoding settings and sorted by length.

    A reply depends on its own row only (up to floating-point rounding of padded batches), sampling included. Where
    nothing edits modules (`edit` None), rows of a batch share a long common beginning.
    """
    responses: list[Response | None] = [None] * len(rows)
    groups: dict[Sampling, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        sampling = row.request.sampling
        groups[Sampling(**{**_fields(sampling), "seed": 0})].append(i)
    for sampling, members in groups.items():
        shared = Shared(base, [rows[i] for i in members], edit)
        for batch in shared.batches(batch_size):
            indices = [members[k] for k in batch]
            replies = _generate(base, rows, indices, sampling, edit, shared.cache(batch))
            for i, response in zip(indices, replies, strict=True):
                responses[i] = response
    return [response for response in responses if response is not None]


def _fields(sampling: Sampling) -> dict:
    return {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}


def _generate(
    base: BaseLM,
    rows: Sequence[Row],
    batch: list[int],
    sampling: Sampling,
    edit: Edit | None,
    cache: DynamicCache | None,
) -> list[Response]:
    recorder = _Recorder()
    processors = LogitsProcessorList([recorder] if sampling.num_beams == 1 else [])
    if sampling.num_beams == 1 and sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(_Gumbel([rows[i].request.sampling.seed for i in batch]))
    # Every setting is stated, because transformers fills what is None from the model's own generation_config, which
    # may ask for penalties or sampling that the request did not.
    config = GenerationConfig(
        **NEUTRAL,
        max_new_tokens=sampling.max_new_tokens,
        num_beams=sampling.num_beams,
        eos_token_id=sorted(base.eos_ids) or None,
        pad_token_id=base.tokenizer.pad_token_id,
        bos_token_id=base.tokenizer.bos_token_id,
        decoder_start_token_id=getattr(base.model.config, "decoder_start_token_id", None),
        stop_strings=list(sampling.stop) or None,
    )
    given: dict = {}
    if edit is not None and sampling.num_beams == 1:
        # The decoder's start token is not the reply's; a row that met a stop string is padded.
        over = sorted(base.eos_ids | {base.tokenizer.pad_token_id})
        given["stopping_criteria"] = StoppingCriteriaList([_Going(over, int(base.is_encoder_decoder))])
    if cache is not None:  # generate() then computes the columns behind the cache only
        cache.batch_repeat_interleave(sampling.num_beams)
        given["past_key_values"] = cache
    lengths = prompt_lengths(base, [rows[i] for i in batch])
    with entered(edit, batch, lengths):  # the embeddings too: a personalizer may exchange them
        inputs = assemble(base, [rows[i] for i in batch])
        output = base.model.generate(
            inputs_embeds=inputs.embeds,
            attention_mask=inputs.mask,
            generation_config=config,
            logits_processor=processors,
            tokenizer=base.tokenizer if sampling.stop else None,
            **given,
        )
    recorder.settle(output)
    generated = output[:, 1:] if base.is_encoder_decoder else output  # the decoder's start token is not ours
    ends = base.eos_ids
    kept: list[list[int]] = []
    for tokens in generated.tolist():
        end = next((k for k, token in enumerate(tokens) if token in ends), None)
        kept.append(tokens if end is None else tokens[: end + 1])
    heartbeat.counted(sum(map(len, kept)), generated.numel())
    if sampling.num_beams == 1:
        steps = torch.stack(recorder.steps, dim=1).cpu()
        for k, tokens in enumerate(kept):
            check_numbers(base, steps[k, : len(tokens)])
        logprobs = [tuple(steps[k, : len(tokens)].tolist()) for k, tokens in enumerate(kept)]
    else:
        again = None if edit is None else lambda s: edit([batch[k] for k in s])
        scored = score(base, [rows[i] for i in batch], [[tokens] for tokens in kept], again)
        logprobs = [tuple(options[0].tolist()) for options in scored]
    return [_response(base, tokens, logps, sampling, ends) for tokens, logps in zip(kept, logprobs, strict=True)]


def _response(base: BaseLM, tokens: list[int], logprobs, sampling: Sampling, ends: set[int]) -> Response:
    reason = "eos" if tokens and tokens[-1] in ends else "length"
    decode = base.tokenizer.decode
    if any(stop in decode(tokens) for stop in sampling.stop):
        # A row that met its stop early is padded while its batch goes on, possibly with the end token: not its own.
        met = (k for k in range(1, len(tokens) + 1) if any(stop in decode(tokens[:k]) for stop in sampling.stop))
        tokens, reason = tokens[: next(met)], "stop"
    text = decode(tokens, skip_special_tokens=True)
    text = text[: min((text.index(stop) for stop in sampling.stop if stop in text), default=len(text))]
    return Response(text.strip(), tuple(tokens), tuple(logprobs[: len(tokens)]), reason)
