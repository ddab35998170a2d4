"""Text encoders: batched = one by one, poolings against a computation by hand, what decides the fingerprint."""

import json
import shutil

import numpy as np
import pytest
import torch

from persona.encoders import Encoder, EncoderConfig
from persona.errors import UserError

TEXTS = [
    "dogs",
    "I like puppies very much indeed.",
    "The tax office " + "is open on weekdays and closed on holidays " * 60,
    "",
    "short",
]


@pytest.fixture(scope="module")
def minilm():
    return Encoder(EncoderConfig(batch_size=3), device="cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A one-layer BERT with random weights on disk, without a word on its pooling."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "query", ":"]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=12,
    )  # fmt: skip
    BertModel(shape).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def hidden_by_hand(folder, text):
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")).last_hidden_state[0].numpy()


def test_a_row_does_not_depend_on_its_batch(minilm):
    together = minilm.encode(TEXTS)
    alone = np.concatenate([minilm.encode([text]) for text in TEXTS])
    backwards = minilm.encode(TEXTS[::-1])[::-1]
    assert together.dtype == np.float32 and together.shape == (5, 384)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together, backwards, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert minilm.encode([]).shape == (0, 384)


def test_minilm_knows_what_is_alike(minilm):
    dog, puppy, tax = minilm.encode(["I love my dog", "puppies are wonderful", "income tax law"])
    assert dog @ puppy > 0.4 > 0.2 > dog @ tax


def test_minilm_gives_the_numbers_of_sentence_transformers(minilm):
    # The sentence is the model card's own first example; the numbers were computed once with sentence-transformers.
    vector = minilm.encode(["This is an example sentence"])[0]
    np.testing.assert_allclose(vector[:3], [0.0676569, 0.0634959, 0.0487131], atol=1e-5)


def test_texts_are_cut_at_max_length(minilm):
    words = "one two three four five six seven eight nine ten".split()
    short = Encoder(EncoderConfig(max_length=5), device="cpu")
    ids = short.module().token_ids([" ".join(words)])
    assert len(ids[0]) == 5
    np.testing.assert_allclose(short.encode([" ".join(words)]), short.encode([" ".join(words[:3])]), atol=1e-6)
    assert np.abs(minilm.encode([" ".join(words)]) - minilm.encode([" ".join(words[:3])])).max() > 1e-3


def test_the_trainable_module_has_the_same_numbers_and_only_weights_that_matter(minilm):
    module = minilm.module()
    assert module.training
    with torch.no_grad():
        vectors = module.eval()(**module.tokenize(TEXTS))
    np.testing.assert_allclose(vectors.numpy(), minilm.encode(TEXTS), atol=1e-5)
    module(**module.tokenize(["a dog", "a cat sat"]))[:, 0].sum().backward()
    assert [name for name, weight in module.named_parameters() if weight.grad is None] == []
    # It is a copy: training it leaves the frozen one alone.
    before = minilm.encode(["a dog"])
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(1.0)
    np.testing.assert_array_equal(minilm.encode(["a dog"]), before)
    assert not any(weight.requires_grad for weight in minilm._module.parameters())


def test_poolings_and_prefixes_by_hand(tiny):
    hidden = hidden_by_hand(tiny, "a b")
    cls = Encoder(EncoderConfig(str(tiny), pooling="cls", normalize=False, query_prefix="query: "), device="cpu")
    mean = Encoder(EncoderConfig(str(tiny), pooling="mean"), device="cpu")
    np.testing.assert_allclose(cls.encode(["a b", "a b c c"])[0], hidden[0], atol=1e-6)
    unit = hidden.mean(axis=0) / np.linalg.norm(hidden.mean(axis=0))
    np.testing.assert_allclose(mean.encode(["a b", "a b c c"])[0], unit, atol=1e-6)
    np.testing.assert_allclose(cls.encode(["a"], query=True)[0], hidden_by_hand(tiny, "query: a")[0], atol=1e-6)
    module = cls.module().eval()
    np.testing.assert_allclose(module(**module.tokenize(["a"])).detach()[0], hidden_by_hand(tiny, "query: a")[0],
                               atol=1e-6)  # fmt: skip


@pytest.mark.parametrize(
    "stated", [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, {"pooling_mode": "cls"}]
)
def test_pooling_is_read_from_the_folder(tiny, tmp_path, stated):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8, **stated}))
    modules = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7}))
    encoder = Encoder(EncoderConfig(str(folder)), device="cpu")
    found = {key: encoder.fingerprint[key] for key in ("pooling", "normalize", "max_length")}
    assert found == {"pooling": "cls", "normalize": False, "max_length": 7}
    (folder / "modules.json").write_text(json.dumps([*modules, {"type": "x.Normalize", "path": "2_Normalize"}]))
    assert Encoder(EncoderConfig(str(folder)), device="cpu").fingerprint["normalize"] is True


def test_the_fingerprint_changes_with_what_decides_item_vectors(tiny, tmp_path):
    base = Encoder(EncoderConfig(str(tiny), pooling="mean"), device="cpu").fingerprint
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    assert Encoder(EncoderConfig(str(copy), pooling="mean"), device="cpu").fingerprint["weights"] == base["weights"]
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 0] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert Encoder(EncoderConfig(str(copy), pooling="mean"), device="cpu").fingerprint["weights"] != base["weights"]
    same = Encoder(EncoderConfig(str(tiny), pooling="mean", query_prefix="q", batch_size=1), device="cpu").fingerprint
    assert same == base
    for change in ({"pooling": "cls"}, {"normalize": False}, {"item_prefix": "a"}, {"max_length": 5}):
        other = Encoder(EncoderConfig(str(tiny), **{"pooling": "mean", **change}), device="cpu").fingerprint
        assert sum(other[key] != base[key] for key in base) == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "TINY"}, "set pooling to one of mean, cls"),
        ({"name": "TINY", "pooling": "max"}, "pooling 'max' is not one of"),
        ({"name": "TINY", "pooling": "cls", "max_length": 13}, "max_length 13 is not between 3 and 12"),
        ({"name": "/no/such/folder", "pooling": "cls"}, "could not be loaded"),
    ],
)
def test_what_cannot_be_an_encoder_is_said_in_one_sentence(tiny, config, message):
    with pytest.raises(UserError, match=message) as caught:
        Encoder(EncoderConfig(**{**config, "name": config["name"].replace("TINY", str(tiny))}), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_text_that_is_none_is_named(minilm):
    with pytest.raises(UserError, match="text 1 to encode is NoneType"):
        minilm.encode(["a", None])
