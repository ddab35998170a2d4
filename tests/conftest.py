"""Fixtures shared by all tests: tiny models of real architectures, made once a session. Heavy imports stay inside."""

from __future__ import annotations

import os

# Before anything imports torch, tokenizers or the hub client: no threads to fight over, no network, no tracker.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from persona.lm import BaseLM

ROOT = Path(__file__).resolve().parents[1]

TEXTS = (
    "the quick brown fox jumps over the lazy dog",
    "what do you think of the red house by the river ?",
    "i like small boats and long walks in the rain",
    "good morning , how was your day at the market ?",
    "write one short line in the manner of ada",
)

# Name -> architecture and the settings of its config.json that differ from the defaults of persona.lm.scratch. A
# window shorter than the prompts makes the sliding layers of Gemma and Mistral really slide.
ARCHITECTURES = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"sliding_window": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": 8}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "gpt_neox": ("gpt_neox", {}),
    "t5": ("t5", {}),
}


def pytest_collection_finish() -> None:
    """What is imported by now is no garbage: every training collects, and took half a second to look at all of it."""
    gc.freeze()


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny random model, by its name in ARCHITECTURES; made at the first call."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            import json

            from safetensors.torch import load_file, save_file

            from persona.lm import scratch

            architecture, changes = ARCHITECTURES[name]
            tokenizer = scratch.train_tokenizer(TEXTS, 330, chat=architecture != "t5")
            folder = tmp_path_factory.mktemp("models") / name
            scratch.make(folder, tokenizer, architecture, hidden=32, layers=2, heads=4, max_positions=256, seed=7)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **changes}))
            if architecture != "t5":
                # Freshly initialised LMs are all but uniform and all but blind to context: larger weights make the
                # next token depend on what came before, so that an error anywhere shows. (T5 starts out large.)
                weights = load_file(folder / "model.safetensors")
                larger = {key: tensor * 8 if tensor.ndim > 1 else tensor for key, tensor in weights.items()}
                save_file(larger, folder / "model.safetensors", metadata={"format": "pt"})
            made[name] = folder
        return made[name]

    return get


@pytest.fixture(scope="session")
def load_base(model_folder: Callable[[str], Path]) -> Callable[[str], BaseLM]:
    """The loaded tiny model, by its name in ARCHITECTURES; loaded at the first call. Tests leave it as it is."""
    loaded: dict[str, BaseLM] = {}

    def get(name: str) -> BaseLM:
        if name not in loaded:
            from persona import lm

            loaded[name] = lm.load(lm.ModelConfig(path=str(model_folder(name)), device="cpu"))
        return loaded[name]

    return get


@pytest.fixture(scope="session")
def llama(load_base: Callable[[str], BaseLM]) -> BaseLM:
    return load_base("llama")


@pytest.fixture(scope="session")
def t5(load_base: Callable[[str], BaseLM]) -> BaseLM:
    return load_base("t5")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of one layer and 16 dimensions over a word-level vocabulary: a text encoder in milliseconds."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    folder = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        BertModel(config).save_pretrained(folder)
    return folder
