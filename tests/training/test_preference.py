"""Preference training: exact batches, the loss of the first step, what moves, and that stopping loses nothing."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil

import pytest
import torch
from preference_toys import DEV, LORA, PAIRS, pair, prefer, settings, user
from safetensors.torch import load_file
from test_lora import assert_same, below, state  # noqa: F401
from training_toys import curve, in_two, rows

import persona
from persona.errors import UserError
from persona.lm import adapters
from persona.personalizer import LanguageModel
from persona.training.checkpoints import damage, newest
from persona.training.lora import LoRA, LoraSettings, adapted
from persona.training.preference import Collate, Encoded, Pair, prepare
from persona.training.rows import padded
from persona.types import Request

TERMS = {"beta": 0.1, "nll_coef": 0.1, "kl_coef": 0.01}


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# ---- batches -------------------------------------------------------------------------------------------------------


def test_a_batch_by_hand():
    """Chosen rows first, padding is 0. Labels stand where the reply does; reference log-probs stand one place further
    left, where these labels are predicted."""
    table = [([5, 6], [10, 11, 1]), ([5, 6], [12, 1]), ([7], [13, 1])]
    logps = [torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-4.0, -5.0]), torch.tensor([-6.0, -7.0])]
    batch = Collate(table, 0, logps)(
        [
            {"chosen": 0, "rejected": 1, "chosen_weight": 1.0, "rejected_weight": 0.0},
            {"chosen": 2, "rejected": 0, "chosen_weight": 0.25, "rejected_weight": 0.75},
        ]
    )
    assert batch["input_ids"].tolist() == [
        [5, 6, 10, 11, 1],  # chosen of the first pair
        [7, 13, 1, 0, 0],  # chosen of the second
        [5, 6, 12, 1, 0],  # rejected of the first
        [5, 6, 10, 11, 1],  # rejected of the second
    ]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert batch["labels"].tolist() == [
        [-100, -100, 10, 11, 1],
        [-100, 13, 1, -100, -100],
        [-100, -100, 12, 1, -100],
        [-100, -100, 10, 11, 1],
    ]
    assert batch["ref_logps"].tolist() == [
        [0.0, -1.0, -2.0, -3.0],
        [-6.0, -7.0, 0.0, 0.0],
        [0.0, -4.0, -5.0, 0.0],
        [0.0, -1.0, -2.0, -3.0],
    ]
    assert batch["weights"].tolist() == [[1.0, 0.0], [0.25, 0.75]]


@pytest.mark.parametrize("name", ("llama", "gemma2"))
def test_replies_are_what_the_model_would_produce(load_base, name):
    base = load_base(name)
    encoded = Encoded(base, 256)
    data = encoded.add([Pair(user("the fox"), "good", "no"), Pair(user("the fox"), "no", "good")], "train")
    assert (data["chosen"][:], data["rejected"][:]) == ([0, 1], [1, 0]) and len(encoded.rows) == 2
    for (prompt, reply), text in zip(encoded.rows, ("good", "no"), strict=True):
        assert list(prompt) == base.render(user("the fox"))
        assert list(reply) == base.render_reply(user("the fox"), text)
        assert base.tokenizer.decode(list(reply)) == text + "</s>"


def test_a_pair_that_does_not_fit_is_left_out_whole_and_listed(llama, tmp_path, caplog):
    short, long = Pair(user("the fox"), "no", "good"), Pair(user("the fox"), "no", "good " * 40)
    tokens = len(llama.render(long.messages)) + len(llama.render_reply(long.messages, long.rejected))
    with caplog.at_level(logging.WARNING):
        prefer(llama, tmp_path, [short, long, short], [long], max_length=tokens - 1, max_steps=1)
    assert f"2 of 4 preference pairs have more than {tokens - 1} tokens, the longest {tokens}" in caplog.text
    assert [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()] == [
        {"pair": 1, "split": "train", "tokens": tokens},
        {"pair": 0, "split": "dev", "tokens": tokens},
    ]
    assert not curve(tmp_path, "eval_loss")
    prefer(llama, tmp_path / "all", [short, long], max_length=tokens, max_steps=1)
    assert (tmp_path / "all" / "dropped.jsonl").read_text() == ""


# ---- the loss ------------------------------------------------------------------------------------------------------


def expected_loss(model: LanguageModel, pairs: list[Pair], nll_coef: float) -> float:
    """At policy == reference: the weights' sum times ln 2, and the chosen reply's NLL per token as evaluation scores
    it; the mean over pairs."""
    scored = model.loglikelihood([Request(p.messages) for p in pairs], [p.chosen for p in pairs])
    dpo = sum(p.chosen_weight + p.rejected_weight for p in pairs) * math.log(2)
    return (dpo + nll_coef * sum(-logp / count for logp, count in scored)) / len(pairs)


@pytest.mark.parametrize("name", ("llama", "gemma2", "gpt_neox"))
def test_the_first_loss_is_that_of_the_base(load_base, tmp_path, name):
    base = load_base(name)
    pairs = [*PAIRS, *DEV]
    prefer(base, tmp_path, pairs, DEV, max_steps=1, batch_size=len(pairs), learning_rate=0.0, eval_every=1)
    assert curve(tmp_path)[1] == pytest.approx(expected_loss(LanguageModel(base), pairs, 0.1), rel=1e-4)
    assert curve(tmp_path, "eval_loss")[1] == pytest.approx(expected_loss(LanguageModel(base), DEV, 0.1), rel=1e-4)
    (first,) = [row for row in rows(tmp_path) if "dpo" in row]
    assert first["kl"] == pytest.approx(0, abs=1e-8) and first["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_the_reference_is_the_model_without_the_new_adapter(llama, below, tmp_path):  # noqa: F811
    stack = persona.load(llama, [LoRA(llama, folder) for folder in below])
    prefer(llama, tmp_path, below=below, max_steps=1, batch_size=len(PAIRS), learning_rate=0.0)
    assert curve(tmp_path)[1] == pytest.approx(expected_loss(stack, PAIRS, 0.1), rel=1e-4)
    assert curve(tmp_path, "kl")[1] == pytest.approx(0, abs=1e-8)
    # The same pairs over other adapters have a reference of their own.
    prefer(llama, tmp_path, below=below[:1], max_steps=1, batch_size=len(PAIRS), learning_rate=0.0, resume=False)
    assert curve(tmp_path, "kl")[1] == pytest.approx(0, abs=1e-8)
    assert len(list((tmp_path / "reference").iterdir())) == 2


@pytest.fixture()
def loop(llama, tmp_path):
    """A trainer whose adapter differs from nothing, so that all three terms count."""
    encoded = Encoded(llama, 256)
    data = encoded.add([*PAIRS, *DEV], "train")
    torch.manual_seed(3)
    with adapted(llama, LORA) as model:
        made = prepare(llama, model, encoded, data, data.select([]), TERMS, (), settings(), tmp_path)
        for name, parameter in llama.model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter) * 0.05
        yield made, model


def gradients(trainer, batch) -> tuple[float, list[torch.Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]


def test_a_batch_is_its_pairs_one_by_one(loop):
    """Loss and gradients: the mean over single pairs, each without any padding of the others."""
    trainer, _ = loop
    pairs = list(trainer.train_dataset)
    together, grads = gradients(trainer, trainer.data_collator(pairs))
    alone = [gradients(trainer, trainer.data_collator([one])) for one in pairs]
    assert together == pytest.approx(sum(loss for loss, _ in alone) / len(pairs), rel=1e-5)
    for i, grad in enumerate(grads):
        assert torch.allclose(grad, sum(g[i] for _, g in alone) / len(pairs), atol=1e-6, rtol=1e-4)


def test_padding_is_nothing(loop):
    trainer, _ = loop
    batch = trainer.data_collator(list(trainer.train_dataset)[:4])
    fill = {"input_ids": 17, "attention_mask": 0, "labels": -100, "ref_logps": 3.0}
    wider = {key: torch.nn.functional.pad(batch[key], (0, 7), value=fill[key]) for key in fill}
    one, grads = gradients(trainer, batch)
    other, more = gradients(trainer, {**batch, **wider})
    assert one == pytest.approx(other, rel=1e-6)
    assert all(torch.allclose(a, b, atol=1e-7, rtol=1e-5) for a, b in zip(grads, more, strict=True))


def test_the_cached_reference_is_the_live_one(loop):
    trainer, model = loop
    collate = trainer.data_collator
    with model.disable_adapter(), torch.no_grad():
        live = trainer.model(**padded(collate.rows, collate.pad))
    for i, (prompt, reply) in enumerate(collate.rows):
        span = live[i, len(prompt) - 1 : len(prompt) + len(reply) - 1]
        assert torch.allclose(collate.reference[i], span, atol=1e-5)


# ---- training ------------------------------------------------------------------------------------------------------


def test_it_learns_to_prefer_and_the_base_is_what_it_was(llama, tmp_path):
    before = state(llama)
    folder = prefer(llama, tmp_path, PAIRS, DEV, max_steps=30, eval_every=30, max_grad_norm=1.0)
    assert_same(before, state(llama))
    margins = curve(tmp_path, "rewards/margins")
    assert margins[30] > 1 and curve(tmp_path, "rewards/accuracies")[30] == 1.0
    assert curve(tmp_path)[30] < curve(tmp_path)[1] and curve(tmp_path, "kl")[30] > 0
    assert all(bool(up.any()) for _, up in adapters.load_adapter(folder).modules.values())
    policy, plain = persona.load(llama, [LoRA(llama, folder)]), LanguageModel(llama)

    def margin(model: LanguageModel, one: Pair) -> float:
        asked = [Request(one.messages)] * 2
        (chosen, _), (rejected, _) = model.loglikelihood(asked, [one.chosen, one.rejected])
        return chosen - rejected

    assert all(margin(policy, one) > margin(plain, one) for one in PAIRS)


def test_weights_turn_it_round(llama, tmp_path):
    """Weight on the other orientation only is the exchanged pair; equal weights have no gradient at margin 0."""
    there = [pair(i, chosen_weight=0.0, rejected_weight=1.0) for i in range(4)]
    back = [Pair(p.messages, p.rejected, p.chosen) for p in there]
    even = [pair(i, chosen_weight=0.5, rejected_weight=0.5) for i in range(4)]
    for name, pairs in (("there", there), ("back", back)):
        prefer(llama, tmp_path / name, pairs, nll_coef=0.0, kl_coef=0.0)
    losses = [list(curve(tmp_path / name).values()) for name in ("there", "back")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]
    prefer(llama, tmp_path / "even", even, nll_coef=0.0, kl_coef=0.0, max_steps=1)
    assert curve(tmp_path / "even")[1] == pytest.approx(math.log(2), rel=1e-6)
    assert curve(tmp_path / "even", "grad_norm")[1] < 1e-3 < 0.1 < curve(tmp_path / "there", "grad_norm")[1]


def test_the_adapter_loads_in_plain_peft_with_equal_logits(llama, tmp_path):
    from peft import PeftModel

    folder = prefer(llama, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(llama.model), folder).eval()
    ids = torch.tensor([llama.render(user("the fox")) + llama.render_reply(user("the fox"), "good")])
    with torch.no_grad(), persona.load(llama, [LoRA(llama, folder)]).edit([Request(user("the fox"))]):
        ours = llama.model(ids).logits
    with torch.no_grad():
        assert torch.allclose(ours, theirs(ids).logits, atol=1e-5)
        assert not torch.allclose(ours, llama.model(ids).logits, atol=1e-2)


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, prefer(llama, out, PAIRS, DEV, max_steps=8)


def test_resumed_is_uninterrupted(whole, llama, tmp_path):
    out, folder = whole
    prefer(llama, tmp_path, PAIRS, DEV, max_steps=8, save_every=3)
    for step in (8, 6):
        shutil.rmtree(tmp_path / "checkpoints" / f"checkpoint-{step}")
    shutil.rmtree(tmp_path / "adapter")
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "reference").rglob("*.safetensors")}
    again = prefer(llama, tmp_path, PAIRS, DEV, max_steps=8, save_every=3)
    assert curve(tmp_path) == curve(out) and sorted(curve(out)) == list(range(1, 9))
    assert weights(again).keys() == weights(folder).keys()
    assert all(torch.equal(tensor, weights(folder)[name]) for name, tensor in weights(again).items())
    assert stamps == {file: file.stat().st_mtime_ns for file in (tmp_path / "reference").rglob("*.safetensors")}


@pytest.mark.parametrize(
    "changes", ({"batch_size": 2, "gradient_accumulation": 2}, {"gradient_checkpointing": True}, {"workers": 1}),
    ids=lambda changes: next(reversed(changes)),
)  # fmt: skip
def test_how_a_step_is_computed_changes_nothing(whole, llama, tmp_path, changes):
    before = state(llama)
    prefer(llama, tmp_path, max_steps=3, **changes)
    assert_same(before, state(llama))
    for key in ("loss", "grad_norm"):
        expected = [curve(whole[0], key)[step] for step in (1, 2, 3)]
        assert list(curve(tmp_path, key).values()) == pytest.approx(expected, rel=2e-3), key


def test_half_precision(llama, tmp_path):
    """The policy and its reference are computed in bfloat16; the loss is not."""
    before = state(llama)
    prefer(llama, tmp_path, max_steps=1, batch_size=len(PAIRS), precision="bf16", nll_coef=0.0)
    assert_same(before, state(llama))
    loss = curve(tmp_path)[1]
    assert loss == pytest.approx(math.log(2), abs=0.02) and loss != pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.multi_process
def test_two_processes_are_one(whole, llama, tmp_path):
    """gloo, 2 x 2 pairs against 1 x 4 of the same order; both compute a share of the reference."""
    out, folder = whole
    assert in_two(lambda: prefer(llama, tmp_path, PAIRS, DEV, max_steps=8, batch_size=2)) == [0, 0]
    for key in ("loss", "kl", "rewards/margins", "eval_loss"):
        ours, theirs = curve(tmp_path, key), curve(out, key)
        assert ours.keys() == theirs.keys() and ours
        assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=5e-4), key
    for name, tensor in weights(folder).items():
        assert torch.allclose(tensor, weights(tmp_path / "adapter")[name], atol=1e-3), name
    assert damage(newest(tmp_path / "checkpoints")) is None


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence(llama, t5, tmp_path):
    before = state(llama)
    with pytest.raises(UserError, match="there is no preference pair to train on"):
        prefer(llama, tmp_path, [])
    with pytest.raises(UserError, match="12 of 12 preference pairs have more than 4 tokens.* nothing left to train"):
        prefer(llama, tmp_path, max_length=4)
    with pytest.raises(UserError, match="no training pair fits into 20 tokens"):
        prefer(llama, tmp_path, [Pair(user("the fox"), "no", "good " * 40)], [pair(3)], max_length=20)
    with pytest.raises(UserError, match="is an encoder-decoder LM"):
        prefer(t5, tmp_path)
    llama.tokenizer.chat_template, template = "{{ raise_exception('no chats today') }}", llama.tokenizer.chat_template
    try:
        with pytest.raises(UserError, match="train pair 0: the chat template .* refused .*: no chats today"):
            prefer(llama, tmp_path)
    finally:
        llama.tokenizer.chat_template = template
    with pytest.raises(UserError, match="output head"):
        prefer(llama, tmp_path, lora=LoraSettings(r=2, target_modules=".*(lm_head|q_proj)"))
    assert_same(before, state(llama))


def test_a_loss_that_is_not_finite_is_one_sentence(llama, tmp_path):
    before = state(llama)
    with pytest.raises(UserError, match=r"the loss became nan in step 2 \(learning rate"):
        prefer(llama, tmp_path, learning_rate=math.inf)
    assert_same(before, state(llama))
