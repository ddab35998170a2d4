"""Fine-tuning: what moves and what stays, what is left behind, and whose adapter a row gets."""

import copy
import json
from pathlib import Path

import pytest
import torch

import persona
from persona import lm
from persona.data.base import People, plain_task, register
from persona.errors import UserError
from persona.lm import adapters
from persona.methods.finetune import (
    FinetuneConfig,
    UserAdapters,
    linear_shapes,
    pairs_of,
    profile_pairs,
    train,
)
from persona.personalizer import LanguageModel, Personalizer
from persona.training.trainer import TrainerConfig
from persona.types import HistoryItem, Message, Persona, Request, Sample

TOY = register(plain_task("finetune_toy"))
QUESTIONS = ("how was your day ?", "what do you think of the red house ?", "good morning", "write one line")


def resident(name: str, *texts: str) -> Persona:
    return Persona(name, history=tuple(HistoryItem(f"{name}{i}", text) for i, text in enumerate(texts)))


ADA = resident("ada", "i like small boats and long walks", "the market by the river was good today")
BEN = resident("ben", "the lazy dog jumps over the fox", "rain")
CLEO = resident("cleo", "red houses only", "a line in the manner of ada")


def sample(number: int, who: Persona, target: str) -> Sample:
    return Sample(f"s{number}", (Message("user", QUESTIONS[number % 4]),), target, who, task=TOY.name)


TRAIN = [sample(0, ADA, "good , by the river"), sample(1, BEN, "quick and brown"), sample(2, ADA, "good boats"),
         sample(3, BEN, "the fox")]  # fmt: skip
DEV = [sample(4, ADA, "a long walk"), sample(5, BEN, "the dog")]
PEOPLE = People("toy", {TOY.name: TOY}, TRAIN, DEV)
ASKED = [Request(s.messages, s.persona, task=s.task) for s in TRAIN] + [
    Request((Message("user", "good night"),), CLEO)
]
REPLIES = [s.target for s in TRAIN] + ["good night to the fox"]


def trainer(**changes) -> TrainerConfig:
    settings = {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "warmup_ratio": 0.0, "scheduler": "constant",
                "log_every": 1, "eval_every": 3, "save_every": 3, "wandb": "disabled", "resume": False,
                "cpu": True}  # fmt: skip
    return TrainerConfig(**{**settings, **changes})


def tune(mode: str, under: LanguageModel, out: Path, people: People = PEOPLE, *, steps: dict | None = None, **method):
    config = FinetuneConfig(**{"mode": mode, "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, **method})
    return train(config, under, people, trainer(**(steps or {})), out)


def snapshot(base: lm.BaseLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def assert_untouched(base: lm.BaseLM, before: dict[str, torch.Tensor], identity: dict) -> None:
    after = base.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(module.training for module in base.model.modules())
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module._forward_hooks for module in base.model.modules())
    assert base.embed is base.model.get_input_embeddings()
    base._identity = None  # computed anew from what the model holds now
    assert base.identity == identity


@pytest.fixture(scope="module")
def tuned(load_base, tmp_path_factory):
    """(base, directory) by mode and base, trained once; the base is checked to be what it was before."""
    made = {}

    def get(mode: str, name: str):
        if (mode, name) not in made:
            # The identity of a base nobody has asked yet, as in train.py.
            base = lm.BaseLM(load_base(name).model, load_base(name).tokenizer, load_base(name).name)
            before, identity = snapshot(base), load_base(name).identity
            folder = tune(mode, LanguageModel(base), tmp_path_factory.mktemp("tuned") / mode)
            assert_untouched(base, before, identity)
            made[mode, name] = base, folder
        return made[mode, name]

    return get


BASES = ("llama", "t5")

# ---- one adapter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_lora_changes_every_linear_but_the_head_and_never_the_base(tuned, name):
    base, folder = tuned("lora", name)
    adapter = adapters.load_adapter(folder / "adapter")
    assert set(adapter.modules) == set(linear_shapes(base.model)) and "lm_head" not in adapter.modules
    assert all(bool(up.any()) for _, up in adapter.modules.values()), "B starts at zero and has to move"
    before, identity = snapshot(base), dict(base.identity)
    model = persona.load(base, [folder])
    assert model.loglikelihood(ASKED, REPLIES) != LanguageModel(base).loglikelihood(ASKED, REPLIES)
    model.respond(ASKED[:2])
    assert_untouched(base, before, identity)


@pytest.mark.parametrize("name", BASES)
def test_lora_loads_in_plain_peft_with_equal_logits(tuned, name):
    from peft import PeftModel

    base, folder = tuned("lora", name)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base.model), folder / "adapter").eval()
    model = persona.load(base, [folder])
    for asked, reply in zip(ASKED, REPLIES, strict=True):
        prompt, target = base.render(asked.messages), base.render_reply(asked.messages, reply)
        ids, labels = torch.tensor([prompt]), torch.tensor([target])
        if base.is_encoder_decoder:
            inputs = {"input_ids": ids, "labels": labels}
        else:
            inputs = {"input_ids": torch.cat([ids, labels], 1)}
        with torch.no_grad(), model.edit([asked]):
            ours = base.model(**inputs).logits
        with torch.no_grad():
            expected = theirs(**inputs).logits
        assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_personalizer_of_another_base_is_refused(tuned, load_base):
    _, folder = tuned("lora", "llama")
    with pytest.raises(UserError, match=r"\(lora\) was trained on base LM .*llama.* but the base LM here is .*t5"):
        persona.load(load_base("t5"), [folder])


# ---- all weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BASES)
def test_full_is_the_saved_model_and_the_base_comes_back(tuned, name):
    base, folder = tuned("full", name)
    alone = lm.load(lm.ModelConfig(path=str(folder / "model"), device="cpu"))
    before, identity = snapshot(base), dict(base.identity)
    unmoved = [n for n, tensor in alone.model.state_dict().items() if torch.equal(tensor, before[n])]
    assert not unmoved, "every weight is trained"
    model = persona.load(base, [folder])
    assert model.loglikelihood(ASKED, REPLIES) == LanguageModel(alone).loglikelihood(ASKED, REPLIES)
    assert model.respond(ASKED) == LanguageModel(alone).respond(ASKED)
    assert model.loglikelihood(ASKED, REPLIES) != LanguageModel(base).loglikelihood(ASKED, REPLIES)
    assert_untouched(base, before, identity)


@pytest.mark.parametrize("mode", ("full", "lora", "user_lora"))
def test_the_base_comes_back_after_an_exception(tuned, mode):
    base, folder = tuned(mode, "llama")
    before, identity = snapshot(base), dict(base.identity)
    with pytest.raises(RuntimeError, match="halfway"):
        with persona.load(base, [folder]).edit(ASKED):
            raise RuntimeError("halfway")
    assert_untouched(base, before, identity)


def test_a_failed_training_leaves_the_base_as_it_was(load_base, tmp_path):
    base = load_base("llama")
    before, identity = snapshot(base), base.identity
    for mode in ("full", "lora", "user_lora"):
        with pytest.raises(ValueError, match="scheduler|nonsense"):
            tune(mode, LanguageModel(base), tmp_path / mode, steps={"scheduler": "nonsense"})
        assert_untouched(base, before, identity)


# ---- one adapter per user ------------------------------------------------------------------------------------------


def merged(base: lm.BaseLM, personalizer, user: int) -> lm.BaseLM:
    model = copy.deepcopy(base.model)
    for name, (down, up) in personalizer.adapters.items():
        model.get_submodule(name).weight.data += personalizer.scaling * up[user] @ down[user]
    return lm.BaseLM(model, base.tokenizer, "merged")


@pytest.mark.parametrize("name", BASES)
def test_each_row_gets_its_own_users_adapter(tuned, name):
    base, folder = tuned("user_lora", name)
    model = persona.load(base, [folder])
    (personalizer,) = model.personalizers
    assert personalizer.users == ["ada", "ben"]  # the dev split's, where profiles are taken from
    together = model.loglikelihood(ASKED, REPLIES)
    for i, (asked, reply) in enumerate(zip(ASKED, REPLIES, strict=True)):
        assert model.loglikelihood([asked], [reply])[0][0] == pytest.approx(together[i][0], rel=1e-5)
    for user, rows in ((0, (0, 2)), (1, (1, 3))):
        alone = LanguageModel(merged(base, personalizer, user))
        for i in rows:
            assert alone.loglikelihood([ASKED[i]], [REPLIES[i]])[0][0] == pytest.approx(together[i][0], rel=1e-4)
    # Somebody without an adapter is the base LM, bitwise: alone, and in a batch with others.
    plain = LanguageModel(base)
    assert model.loglikelihood(ASKED[4:], REPLIES[4:]) == plain.loglikelihood(ASKED[4:], REPLIES[4:])
    assert together[4] == plain.loglikelihood(ASKED, REPLIES)[4]
    assert together[:4] != plain.loglikelihood(ASKED, REPLIES)[:4]


def test_a_users_pairs_move_that_users_adapter_only(load_base, tmp_path):
    """Cleo's items give pairs; Ada has none that long, so her adapter stays as it was drawn, decay included."""
    base = load_base("llama")
    people = People("toy", PEOPLE.tasks, TRAIN, [sample(0, resident("ada", "rain"), "x"), sample(1, CLEO, "y")])
    folder = tune("user_lora", LanguageModel(base), tmp_path, people, steps={"weight_decay": 0.5})
    (personalizer,) = persona.load(base, [folder]).personalizers
    torch.manual_seed(trainer().seed)
    drawn = UserAdapters(linear_shapes(base.model), 2, 2, 4)
    assert personalizer.users == ["ada", "cleo"]
    for i, name in enumerate(drawn.names):
        down, up = personalizer.adapters[name]
        assert torch.equal(down[0], drawn.down[i][0]) and not bool(up[0].any())
        assert not torch.equal(down[1], drawn.down[i][1]) and bool(up[1].any())


# ---- pairs ---------------------------------------------------------------------------------------------------------


def pairs(task_name: str, prompt: str, *items: tuple[str, str | None]) -> list[tuple[str, str]]:
    history = tuple(HistoryItem(str(i), text, label) for i, (text, label) in enumerate(items))
    one = Sample("s", (Message("user", prompt),), "", Persona("ada", history=history), task=task_name)
    triples, users = profile_pairs([one, one])  # the second sample of a user brings nothing new
    assert users == ["ada"] and all(owner == 0 and request.persona.id == "ada" for request, _, owner in triples)
    return [(request.messages[-1].content, reply) for request, reply, _ in triples]


GOLDEN = {
    "LaMP_1": ('cite? [1]: "Bees" [2]: "Rust"', [("We study bread.", "Sour dough")], 
               [('Write the abstract of the paper with the title "Sour dough".', "We study bread.")]),
    "LaMP_2": ("tags: [comedy, a moon] description: a moon", [("A judge sings.", "comedy")],
               [("tags: [comedy, a moon] description: A judge sings.", "comedy")]),
    "LaMP_3": ("points 1 to 5? review: fine", [("It broke.", "1"), ("Lovely.", "5")],
               [("points 1 to 5? review: It broke.", "1"), ("points 1 to 5? review: Lovely.", "5")]),
    "LaMP_7": ("Reword this tweet: rain again", [("one two three four five six seven eight", None), ("short", None)],
               [("one two", "three four five six seven eight")]),
    "finetune_toy": ("any prompt", [("what i wrote", "a label")], [("what i wrote", "a label")]),
    "town_rating": ("score for a big cup ?", [("a small cup . i like it .", "4"), ("a loud pub .", "loud")],
                    [("score for a small cup ?", "4")]),
    "town_reply": ("how are you ?", [("well well , all is good .", None), ("a small cup .", "4")],
                   [("how are you today ?", "well well , all is good .")]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_profile_pairs_by_hand(name):
    prompt, items, expected = GOLDEN[name]
    assert pairs(name, prompt, *items) == expected


def test_pairs_of_samples_keep_prompt_person_and_target():
    ((request, reply, owner),) = pairs_of(TRAIN[:1])
    assert (request.messages, request.persona, request.task) == (TRAIN[0].messages, ADA, TOY.name)
    assert (reply, owner) == ("good , by the river", -1)


# ---- on top of a stack ---------------------------------------------------------------------------------------------


class Witness(Personalizer):
    """Stands last in a stack and remembers the prompts that reach it."""

    method = "witness"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def prompt(self, requests):
        self.seen += [request.messages[-1].content for request in requests]
        return list(requests)


def test_a_retrieval_personalizer_below_puts_the_profile_into_the_prompts(llama, tmp_path, caplog):
    witness = Witness()
    under = persona.load(llama, [{"retrieval": {"ranker": "recency", "k": 1}}, witness])
    folder = tune("lora", under, tmp_path, steps={"max_steps": 2})
    assert len(witness.seen) == 4 + 2  # two steps of two samples, and the dev split
    for text in witness.seen:
        asked = next(s for s in (*TRAIN, *DEV) if text.endswith(s.messages[-1].content))
        assert asked.persona.history[-1].text in text and len(text) > len(asked.messages[-1].content)
    manifest = json.loads((folder / "personalizer.json").read_text())
    assert manifest["trained_on_top_of"] == ["retrieval", "witness"]
    persona.load(llama, [*under.personalizers, folder])
    assert "trained on top of" not in caplog.text
    persona.load(llama, [folder])  # without what it was trained on top of it is another model, and that is said
    assert "lora was trained on top of retrieval + witness and stands on top of the bare LM here" in caplog.text


@pytest.mark.parametrize("mode", ("lora", "full", "user_lora"))
def test_the_first_loss_is_that_of_the_stack_below(tuned, tmp_path, mode):
    """Before any step the new weights change nothing, so the first loss is the stack's own, per token."""
    base, below = tuned("lora", "llama")
    under = persona.load(base, [{"retrieval": {"ranker": "recency", "k": 1}}, below])
    triples = profile_pairs(DEV)[0] if mode == "user_lora" else pairs_of(TRAIN)
    tune(mode, under, tmp_path, steps={"max_steps": 1, "batch_size": len(triples)})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (first,) = [row["loss"] for row in rows if "loss" in row]
    scored = under.loglikelihood([request for request, _, _ in triples], [reply for _, reply, _ in triples])
    expected = -sum(logp for logp, _ in scored) / sum(count for _, count in scored)
    assert first == pytest.approx(expected, rel=1e-4)


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_bad_settings_and_samples_are_one_sentence(llama, tmp_path):
    under = LanguageModel(llama)
    with pytest.raises(UserError, match="mode='lara' is unknown: use one of full, lora, user_lora"):
        tune("lara", under, tmp_path)
    with pytest.raises(UserError, match="1 samples have no target to learn from, the first is s9"):
        tune("lora", under, tmp_path, People("toy", PEOPLE.tasks, [*TRAIN, sample(9, ADA, "")], DEV))
    with pytest.raises(UserError, match="no user of the dev split has a past item to learn from"):
        tune("user_lora", under, tmp_path, People("toy", PEOPLE.tasks, TRAIN, [sample(0, resident("ada"), "x")]))
    with pytest.raises(UserError, match="target_modules='no_such_layer'"):
        tune("lora", under, tmp_path, target_modules="no_such_layer")
    with pytest.raises(UserError, match="the training split is empty"):
        tune("lora", under, tmp_path, People("toy", PEOPLE.tasks, [], DEV))


def test_a_flipped_byte_is_refused(tuned, tmp_path):
    import shutil

    base, folder = tuned("user_lora", "llama")
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copied / "adapters.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not the file that was saved"):
        persona.load(base, [copied])
