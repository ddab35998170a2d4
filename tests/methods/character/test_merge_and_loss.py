"""The loss by hand, and merging: `cat` is the sum, `linear` its cross-term formula, all three as PEFT has them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from persona.errors import UserError
from persona.lm import adapters
from persona.lm.adapters import Adapter, load_adapter
from persona.methods.character.loss import character_loss
from persona.methods.character.merge import difference, merge, weighted_sum
from persona.training.lora import LoraSettings, adapted
from persona.training.lora import save_adapter as save_trained

WEIGHTS = (1.0, 0.25)


def test_the_three_terms_by_hand():
    t = torch.tensor
    chosen, chosen_before = [t([-1.0, -2.0]), t([-3.0])], [t([-2.0, -2.0]), t([-1.0])]
    rejected, rejected_before = [t([-4.0]), t([-1.0, -1.0, -1.0])], [t([-2.0]), t([-1.0, -2.0, -1.0])]
    found = character_loss(chosen, chosen_before, rejected, rejected_before, beta=0.5, nll_coef=0.1, kl_coef=0.01)
    # Margins: (1 + 0) - (-2) = 3 and -2 - 1 = -3.
    dpo = (math.log1p(math.exp(-1.5)) + math.log1p(math.exp(1.5))) / 2
    nll = (1.5 + 3.0) / 2  # per token first, then over the batch: not 6 / 3
    kl = (1 / 2 + 4 + 4 + 1 / 3) / 4  # over four replies
    assert float(found.dpo) == pytest.approx(dpo, rel=1e-6)
    assert float(found.nll) == pytest.approx(nll) and float(found.kl) == pytest.approx(kl)
    assert float(found.total) == pytest.approx(dpo + 0.1 * nll + 0.01 * kl, rel=1e-6)


def test_lists_that_do_not_fit_are_refused():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match="one entry a pair, not 1, 1, 2, 2"):
        character_loss([one], [one], [one, one], [one, one])
    with pytest.raises(ValueError, match="one entry a pair"):
        character_loss([], [], [], [])
    with pytest.raises(ValueError, match="the same tokens"):
        character_loss([one], [two], [one], [one])


# ---- merging -------------------------------------------------------------------------------------------------------


def drawn(seed: int, r: int, scaling: float, names=("q", "v")) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q": (6, 8), "v": (3, 8), "only": (4, 5)}
    modules = {
        name: (
            torch.randn(r, sizes[name][1], generator=generator),
            torch.randn(sizes[name][0], r, generator=generator),
        )
        for name in names
    }
    return Adapter(modules, dict.fromkeys(names, scaling))


def change(adapter: Adapter, name: str) -> Tensor:
    down, up = adapter.modules[name]
    return adapter.scaling[name] * up @ down


def test_cat_is_the_sum_of_changes():
    one, two = drawn(1, 3, 2.0), drawn(2, 2, 0.5, ("q", "only"))
    merged = merge([one, two], WEIGHTS, "cat")
    assert merged.modules["q"][0].shape == (5, 8) and merged.scaling["q"] == 1.0
    expected = {
        "q": change(one, "q") + 0.25 * change(two, "q"), "v": change(one, "v"), "only": 0.25 * change(two, "only"),
    }  # fmt: skip
    for name, wanted in expected.items():
        assert torch.allclose(change(merged, name), wanted, atol=1e-6)
        assert torch.allclose(weighted_sum([one, two], WEIGHTS)[name], wanted, atol=1e-6)
    assert difference(merged, [one, two], WEIGHTS) < 1e-6


def test_linear_has_cross_terms():
    one, two = drawn(1, 3, 2.0), drawn(2, 3, 2.0)
    merged = merge([one, two], WEIGHTS, "linear")
    crossed = 0.0
    for name in ("q", "v"):
        (a1, b1), (a2, b2) = one.modules[name], two.modules[name]
        # As the notes have it for scale 2: 2 B1 A1 + 0.5 B2 A2 + 1.0 (B1 A2 + B2 A1)
        wanted = 2 * b1 @ a1 + 0.5 * b2 @ a2 + 1.0 * (b1 @ a2 + b2 @ a1)
        assert merged.modules[name][0].shape == (3, 8)
        assert torch.allclose(change(merged, name), wanted, atol=1e-5)
        crossed += float((b1 @ a2 + b2 @ a1).square().sum())
    whole = sum(float(wanted.square().sum()) for wanted in weighted_sum([one, two], WEIGHTS).values())
    assert difference(merged, [one, two], WEIGHTS) == pytest.approx((crossed / whole) ** 0.5, rel=1e-5)


def test_svd_is_the_nearest_of_its_rank():
    one, two = drawn(1, 3, 2.0), drawn(2, 2, 1.0)
    merged = merge([one, two], WEIGHTS, "svd")
    left, values, right = torch.linalg.svd(weighted_sum([one, two], WEIGHTS)["q"])
    assert merged.modules["q"][0].shape == (3, 8)
    assert torch.allclose(change(merged, "q"), left[:, :3] @ torch.diag(values[:3]) @ right[:3], atol=1e-5)
    # An adapter and the same once more are of its rank: nothing is lost.
    assert difference(merge([one, one], (1.0, 0.5), "svd"), [one, one], (1.0, 0.5)) < 1e-5


def test_what_cannot_be_merged_is_one_sentence():
    one, two = drawn(1, 3, 2.0), drawn(2, 2, 0.5)
    with pytest.raises(UserError, match=r"needs equal ranks, module q has \[2, 3\]: use cat or svd"):
        merge([one, two], WEIGHTS)
    with pytest.raises(UserError, match="merge mode 'ties' is unknown: use one of linear, cat, svd"):
        merge([one, two], WEIGHTS, "ties")
    with pytest.raises(UserError, match="2 adapters and 1 weights"):
        merge([one, two], [1.0])


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory):
    """Two folders with adapters of the tiny LM whose B is not zero, as PEFT writes them."""
    folders = []
    for seed in (1, 2):
        with adapted(llama, LoraSettings(r=4, lora_alpha=8)) as model:
            torch.manual_seed(seed)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
            folders.append(save_trained(model, tmp_path_factory.mktemp("adapters") / str(seed)))
    return folders


@pytest.mark.parametrize("mode", ("linear", "cat", "svd"))
def test_merging_is_pefts_and_loads_in_plain_peft(llama, model_folder, trained, tmp_path, mode):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = adapters.save(merge(trained, WEIGHTS, mode), tmp_path / "merged", "tiny")
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
        plain = PeftModel.from_pretrained(base, folder)(ids).logits
        base = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
        theirs = PeftModel.from_pretrained(base, trained[0], adapter_name="one")
        theirs.load_adapter(trained[1], adapter_name="two")
        rank = {"svd_rank": 4} if mode == "svd" else {}
        theirs.add_weighted_adapter(["one", "two"], list(WEIGHTS), "both", combination_type=mode, **rank)
        theirs.set_adapter("both")
        peft = theirs(ids).logits
        with adapters.apply(llama.model, [load_adapter(folder)], torch.ones(1, 1)):
            hooked = llama.model(ids).logits
        untouched = llama.model(ids).logits
    assert torch.allclose(plain, peft, atol=1e-4) and torch.allclose(plain, hooked, atol=1e-4)
    assert not torch.allclose(plain, untouched, atol=0.1)
