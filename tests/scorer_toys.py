"""Scoring models of real architectures with a few thousand random weights, saved where a name can point to them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def save_bert(folder: Path, labels: tuple[str, ...] = ("contradiction", "neutral", "entailment")) -> str:
    """A BERT of letters with a classifier of `labels`; its weights are large, so that answers differ."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *".,!?'", *(f"##{letter}" for letter in LETTERS)]
    BertTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}).save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(pieces), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=128, id2label=dict(enumerate(labels)), initializer_range=0.6,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def save_t5(folder: Path, words: str = "Yes No question Is this a natural response reply fact") -> str:
    """A T5 of a few words."""
    vocabulary = {word: number for number, word in enumerate(("<pad>", "</s>", "<unk>", *words.split(), *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(4)
    config = T5Config(
        vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, initializer_factor=0.6,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


def save_punkt(folder: Path) -> Path:
    """NLTK's data folder with an English sentence splitter that has learned one abbreviation, "dr"."""
    place = folder / "tokenizers" / "punkt_tab" / "english"
    place.mkdir(parents=True)
    for name in ("collocations.tab", "ortho_context.tab"):
        (place / name).write_text("")
    (place / "sent_starters.txt").write_text("")
    (place / "abbrev_types.txt").write_text("dr\n")
    return folder
