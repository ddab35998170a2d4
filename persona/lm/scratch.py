"""A new base LM with random weights and a tokenizer trained on your texts, as an ordinary model directory.

    python -m persona.lm.scratch outputs/base --texts data/*.json --layers 4 --hidden 192 --vocab 4000

For a first run without any pretrained LM at hand, and for tests of each architecture. Train it with `method=finetune`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import orjson
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from persona.errors import UserError
from persona.files import atomic_folder

ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ARCHITECTURES = ("llama", "qwen3", "gemma2", "gemma3_text", "mistral", "gpt_neox", "t5")


def train_tokenizer(texts: Iterable[str], vocab_size: int, chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE (so nothing is unknown) of at most `vocab_size` entries; with `chat`, a minimal chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", *ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.padding_side = "left"
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def make(
    folder: Path | str,
    tokenizer: PreTrainedTokenizerFast,
    architecture: str = "llama",
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    max_positions: int = 1024,
    seed: int = 0,
) -> Path:
    """Write a randomly initialised model of a real architecture and its tokenizer. The seed fixes every weight.

    Raises UserError for an architecture that is not in ARCHITECTURES.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f"architecture {architecture!r} is not known here: use one of {', '.join(ARCHITECTURES)}")
    common = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if architecture == "t5":
        config = AutoConfig.for_model(
            "t5", d_model=hidden, d_kv=hidden // heads, d_ff=2 * hidden, num_layers=layers, num_heads=heads,
            feed_forward_proj="gated-gelu", decoder_start_token_id=tokenizer.pad_token_id, dropout_rate=0.1, **common,
        )  # fmt: skip
    elif architecture == "gpt_neox":
        config = AutoConfig.for_model(
            "gpt_neox", hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=max_positions, **common,
        )  # fmt: skip
    else:
        config = AutoConfig.for_model(
            architecture, hidden_size=hidden, intermediate_size=8 * hidden // 3 // 8 * 8, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads,
            max_position_embeddings=max_positions, tie_word_embeddings=True, **common,
        )  # fmt: skip
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.from_config(config, dtype=torch.float32)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return Path(folder)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def texts_of(files: Iterable[Path]) -> Iterator[str]:
    """Every string inside JSON files, the lines of any other text file."""
    for file in files:
        if not file.is_file():
            raise UserError(f"--texts names {file}, which is not a file")
        if file.suffix == ".json":
            yield from _strings(orjson.loads(file.read_bytes()))
        else:
            with open(file, encoding="utf-8") as stream:
                yield from stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--texts", type=Path, nargs="+", required=True, help="JSON or text files the tokenizer learns from"
    )
    parser.add_argument("--architecture", default="llama", choices=ARCHITECTURES)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        tokenizer = train_tokenizer(texts_of(arguments.texts), arguments.vocab, chat=arguments.architecture != "t5")
        make(
            arguments.folder, tokenizer, arguments.architecture, arguments.hidden, arguments.layers, arguments.heads,
            seed=arguments.seed,
        )  # fmt: skip
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{arguments.folder}: {arguments.architecture}, {len(tokenizer)} tokens in the vocabulary")


if __name__ == "__main__":
    main()
