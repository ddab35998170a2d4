"""The plan's figures against models that are really built, published sizes, and arithmetic by hand."""

from __future__ import annotations

import functools
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from persona import data
from persona.config import CONFIGS, TrainConfig, check_overrides, load_config
from persona.data.situations import expert_vector_of
from persona.encoders import Encoder, EncoderConfig
from persona.errors import UserError
from persona.methods.finetune import UserAdapters, linear_shapes
from persona.methods.persona_fuse.data import Rounds, Row, Twos, request_of
from persona.methods.persona_fuse.synthesis import split_of
from persona.methods.persona_plug import UserEmbedder
from persona.methods.steering import beginnings
from persona.plan import Plan, plan
from persona.plan.backends import Part
from persona.plan.costs import Cost, Load
from persona.plan.models import count_kept, lm_activations, meta_lm
from persona.plan.sizes import data_size

SMALL_TOWN = ["data.train=4", "data.dev=2", "data.test=1"]
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
# What an experiment needs that is not in the package.
GIVEN = {
    "apc_gemma_7b": ["data.path={}/ada.txt"],
    "character_llama31_8b": ["data.path={}/me.txt"],
    "assistant_axis_qwen3_32b": ["data.path={}"],
}
# A published model in all but its depth, where the layers are nothing to what is counted.
FLAT_T5 = ["model.architecture.num_layers=1", "model.architecture.num_decoder_layers=1"]


def config(*overrides: str) -> TrainConfig:
    return load_config("train", list(overrides))


def layers(count: int) -> str:
    return f"model.architecture.num_hidden_layers={count}"


def loaded(cfg: TrainConfig) -> tuple[Load, list[Cost]]:
    """The training that holds the most."""
    return plan(cfg).heaviest


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Plan]:
    """The plan of an experiment as it is, by its name: seconds for a published size, so made once."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "ada.txt").write_text("Name: Ada\nJob: baker\n")
    (folder / "me.txt").write_text("I am calm.\n- What now?\n")
    instructions = folder / "roles" / "instructions"
    instructions.mkdir(parents=True)
    (instructions / "baker.json").write_text(json.dumps({"instruction": [{"pos": "Be a baker."}], "eval_prompt": "?"}))
    (instructions / "default.json").write_text(json.dumps({"instruction": [{"pos": ""}]}))
    (folder / "roles" / "role_list.json").write_text(json.dumps({"baker": "bakes"}))
    (folder / "extraction_questions.jsonl").write_text(json.dumps({"id": 0, "question": "Who are you?"}) + "\n")

    @functools.cache
    def get(name: str) -> Plan:
        return plan(config(f"experiment={name}", *(given.format(folder) for given in GIVEN.get(name, []))))

    return get


def count(parts: list[Part], start: str) -> int:
    found = [part.parameters for part in parts if part.name.startswith(start)]
    assert len(found) == 1, [part.name for part in parts]
    return found[0]


# ---- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parameters", "projector"),
    [
        # projector: Linear(768, h), Linear(h, h), with biases
        ("flan_t5_xxl", 11_135_332_352, 769 * 4096 + 4097 * 4096),
        ("flan_t5_xl", 2_849_757_184, 769 * 2048 + 2049 * 2048),
        ("llama2_7b", 6_738_415_616, 769 * 4096 + 4097 * 4096),
    ],
)
def test_published_sizes(model: str, parameters: int, projector: int, planned: Callable[[str], Plan]) -> None:
    made, _ = planned(f"persona_plug_{model}").heaviest
    assert count(made.parts, "base LM") == parameters
    # BERT-base, 109.48 million, without its pooler; beside the copy that is trained the one that encodes histories
    assert count(made.parts, "query encoder") == count(made.parts, "history encoder") == 108_891_648
    assert count(made.parts, "projector") == count(made.parts, "instruction projector") == projector
    assert count(made.parts, "instruction vector") == 768
    if model != "flan_t5_xl":  # PPlug reference note 3.3, for d_llm 4096
        assert 2 * projector + 768 == 39_863_040
    assert made.parameters - made.trainable == parameters + 108_891_648


def test_published_sizes_of_adapted_lms(planned: Callable[[str], Plan]) -> None:
    assert count(planned("apc_gemma_7b").heaviest[0].parts, "base LM") == 8_537_680_896
    (dpo, _), (sft, _) = planned("character_llama31_8b").trainings
    assert count(sft.parts, "base LM") == 8_030_261_248
    # Rank 64: A and B of q, k, v, o, gate, up and down in 32 layers.
    widths = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3
    assert sft.trainable == dpo.trainable == 64 * 32 * widths


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_base_and_adapters_as_really_built(name: str, load_base, model_folder) -> None:
    from peft import LoraConfig, get_peft_model

    base = load_base(name)
    here = [f"model.path={model_folder(name)}", *SMALL_TOWN]
    total = sum(p.numel() for p in base.model.parameters())
    lora, _ = loaded(config(*here, "method=finetune_lora", "method.r=3"))
    assert count(lora.parts, "base LM") == total
    settings = LoraConfig(r=3, target_modules="all-linear")
    adapted = get_peft_model(type(base.model)(base.model.config), settings)
    assert lora.trainable == sum(p.numel() for p in adapted.parameters() if p.requires_grad) > 0
    users, _ = loaded(config(*here, "method=user_lora", "method.r=3"))
    own = UserAdapters(linear_shapes(base.model), 2, 3, 32)  # the two residents of dev
    assert users.trainable == sum(p.numel() for p in own.parameters()) > 0
    full, _ = loaded(config(*here, "method=finetune_full"))
    assert full.trainable == total


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["method.user_tokens=3", "method.learn_temperature=true"],
        ["method.instruction=false", "method.train_query_encoder=false"],
        ["method.user_tokens=0"],
        ["method.input_aware=false"],
    ],
)
def test_user_embedder_as_really_built(settings: list[str], llama, model_folder, encoder_folder: Path) -> None:
    encoder = [f"method.encoder.name={encoder_folder}", "method.encoder.pooling=mean"]
    cfg = config(f"model.path={model_folder('llama')}", *encoder, *settings, *SMALL_TOWN)
    real = UserEmbedder(cfg.method, Encoder(cfg.method.encoder), llama.hidden_size, 1.0)
    made, _ = loaded(cfg)
    assert made.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad) > 0
    own = [part for part in made.parts if not part.name.startswith(("base LM", "history encoder"))]
    embedder = sum(part.parameters for part in own)
    assert embedder == sum(p.numel() for p in real.parameters())


def test_minilm_is_counted_from_its_own_config() -> None:
    made, _ = loaded(config(*SMALL_TOWN))
    real = Encoder(EncoderConfig()).module()
    assert count(made.parts, "query encoder") == sum(p.numel() for p in real.parameters())


def test_no_weight_is_needed(model_folder, tmp_path: Path) -> None:
    folder = tmp_path / "config only"
    folder.mkdir()
    shutil.copy(model_folder("llama") / "config.json", folder)
    made = plan(config(f"model.path={folder}", "method=finetune_lora", *SMALL_TOWN))
    assert count(made.heaviest[0].parts, "base LM") > 0 and made.data
    assert "1.3 per word" in made.data.source  # no tokenizer either
    assert all(parameter.is_meta for parameter in meta_lm(str(folder), None, {}, torch.float32).parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_its_own_is_counted(tied: bool, model_folder, tmp_path: Path) -> None:
    raw = json.loads((model_folder("t5") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": tied}))
    model = meta_lm(str(tmp_path), None, {}, torch.float32)
    shared = model.get_input_embeddings().weight.numel()
    without_head = sum(p.numel() for name, p in model.named_parameters() if name != "lm_head.weight")
    assert sum(p.numel() for p in model.parameters()) == without_head + (0 if tied else shared)


# ---- activations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_activations_are_those_of_a_real_forward(name: str, trained: bool, model_folder) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    batch, prompt, reply = 3, 7, 5
    hf = AutoConfig.from_pretrained(model_folder(name))
    kind = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    real = kind.from_config(hf, attn_implementation="eager").requires_grad_(trained).eval()
    with torch.device("meta"):
        empty = kind.from_config(hf, attn_implementation="eager").requires_grad_(trained).eval()
    length = prompt + 2 + (0 if name == "t5" else reply)
    embeds = torch.randn(batch, length, real.get_input_embeddings().weight.shape[1], requires_grad=True)
    mask = torch.zeros(batch, 1, 1 if name == "t5" else length, length)
    inputs = {"inputs_embeds": embeds, "attention_mask": mask, "use_cache": False}
    if name == "t5":
        inputs["decoder_input_ids"] = torch.zeros(batch, reply, dtype=torch.long)
    expected = count_kept(real, lambda: real(**inputs))
    assert lm_activations(empty, batch, prompt, reply, prefix=2) == expected > 0


def test_no_attention_matrix_is_kept() -> None:
    """As a fused kernel: twice as long is twice as much, and with matrices written out much more."""
    shape = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}  # fmt: skip
    model = meta_lm("somewhere/else", None, shape, torch.float32)
    kept = {length: lm_activations(model, 2, length, 8, prefix=2) for length in (502, 1012)}
    assert kept[1012] == pytest.approx(2 * kept[502], rel=0.01)
    model.set_attn_implementation("eager")
    assert lm_activations(model, 2, 1012, 8, prefix=2) > 2 * kept[1012]


def test_checkpointing_keeps_less_and_gradients_cost_more() -> None:
    paper = ["experiment=persona_plug_llama2_7b", layers(8)]
    plug = loaded(config(*paper))[0]
    less = loaded(config(*paper, "trainer.gradient_checkpointing=true"))[0]
    assert less.activations < plug.activations / 2
    assert 1.3 < less.flops / plug.flops < 1.5  # one forward more: half of a forward and a backward without weights'
    twice = loaded(config(*paper, "trainer.batch_size=4"))[0].activations
    assert 1.9 < twice / plug.activations <= 2.01


# ---- tokens and steps ----------------------------------------------------------------------------------------------


def test_steps_of_the_paper_by_hand() -> None:
    paper = ["experiment=persona_plug_flan_t5_xl", "data.task=LaMP_4", *FLAT_T5]
    made, costs = loaded(config(*paper))
    assert made.samples == 12_500 * 11
    alone, four = costs[:2]
    # 137,500 samples in 17,188 batches of 2 on 4 GPUs, 8 of them a step; two epochs
    assert (four.global_batch, four.steps_per_epoch, four.steps) == (64, 2149, 4298)
    assert (alone.gpus, alone.accumulation, alone.global_batch, alone.steps_per_epoch) == (1, 32, 64, 2149)
    per_sample = 29.97 + (10.07 + 1) + 2  # prompt, reply and its end, [I; P_u]
    assert four.tokens_per_step == round(64 * per_sample)
    logits = 2 * (21 * 32_128) * (2 + 8)  # decoder positions: 10.07 + 3 · 3.10, rounded up, and the end
    assert alone.memory.logits == logits
    assert loaded(config(*paper, "trainer.max_steps=7"))[1][0].steps == 7


def test_the_size_of_real_data_is_counted() -> None:
    cfg = config(*SMALL_TOWN, "method.history_limit=30")
    people = data.load(cfg.data)
    size = data_size(cfg)
    assert len(people.train) == 4 * 10
    assert size.samples == 11 * len(people.train)  # every resident has more than two items
    assert size.history_longest == 30
    assert 1 <= size.prompt_mean <= size.prompt_longest <= 256
    assert size.users == 4
    assert data_size(config(*SMALL_TOWN, "method=instruction_only")).samples == len(people.train)


def test_published_sizes_of_per_user_adapters() -> None:
    size = data_size(config("data=lamp", "data.task=lamp-3", "method=user_lora"))
    assert (size.users, size.samples) == (2500, round(2500 * 185.40))


# ---- methods made of stages ----------------------------------------------------------------------------------------


def test_the_stages_of_a_character_by_hand(tmp_path: Path) -> None:
    (tmp_path / "me.txt").write_text("I am calm.\n- What now?\n- Why?\nI am kind.\n- How are you?\n- Who?\n- Where?\n")
    cfg = config(
        *("experiment=character_llama31_8b", f"data.path={tmp_path / 'me.txt'}", "method.expand.per_trait=3"),
        *("method.distill.repeats=4", "method.introspect.reflections=7", "method.introspect.interactions=5"),
        *("trainer.epochs=2", "launch.num_processes=2", "trainer.gradient_checkpointing=true", layers(2)),
    )
    made = plan(cfg)
    assert made.stages
    texts = {(part.stage, part.what): (part.count, part.tokens) for part in made.stages.texts}
    assert texts == {
        ("expand", "lists of prompts"): (1 * 20, 2048),  # one trait is short; the teacher is asked 20 times at most
        ("distill", "answers in the role"): ((3 + 3) * 4, 4096),
        ("distill", "answers of its own"): ((3 + 3) * 4, 4096),
        ("introspect", "reflections"): (10 * 7, 2048),
        ("introspect", "turns of interactions"): (2 * 5 * 10, 1024),
    }
    counts = {part.stage: (part.count, part.rows * part.length) for part in made.stages.trainings}
    assert counts == {"dpo": (24, 2048), "sft": (80, 3072)}
    assert [load.title.rpartition(" ")[2] for load, _ in made.trainings] == ["dpo", "sft"]
    (dpo, _), (sft, costs) = made.trainings
    # 80 transcripts in 20 batches of 2 on 2 GPUs, 16 of them a step; two epochs
    assert (costs[1].steps_per_epoch, costs[1].steps, costs[1].global_batch) == (2, 4, 64)
    assert (sft.samples, sft.tokens, dpo.samples, dpo.tokens) == (80, 3072, 24, 2048)
    assert costs[0].memory.logits == 4096 * 32768 * 8


def test_the_stages_of_apc_by_hand(tmp_path: Path) -> None:
    (tmp_path / "ada.txt").write_text("Name: Ada\nJob: baker\nPet: a crow\nStreet: mill lane\n")
    here = f"data.path={tmp_path / 'ada.txt'}"
    made = plan(config("experiment=apc_gemma_7b", here, "trainer.gradient_checkpointing=true", layers(2)))
    assert made.stages
    texts = {(part.stage, part.what): part.count for part in made.stages.texts}
    assert texts == {
        ("queries", "lists of queries"): 3,
        ("labels", "verdicts on relevance"): 3 * 5,
        ("labels", "triples of replies"): 9,
        ("labels", "verdicts on replies"): 9 * 6,
        ("labels", "verdicts to calibrate by"): 2 * 18,  # .3 of the statements with 20 replies each
        ("pairs", "replies"): 9 * 2,
    }
    (training,) = made.stages.trainings
    assert (training.count, training.rows, training.length) == (9, 2, 1536)
    town = plan(config("experiment=town_apc", "data.train=2", "method.reward=judge"))
    assert town.stages
    kinds = [(part.stage, part.what) for part in town.stages.texts]
    assert kinds == [
        ("pairs", "replies"),
        ("pairs", "told replies"),
        ("pairs", "verdicts"),
    ]  # no discriminator, so nothing is labelled for one


def test_a_method_that_trains_nothing_has_the_lm_and_its_cache() -> None:
    cfg = config("experiment=town_assistant_axis", "model.batch_size=4", "data.questions=2", "method.max_new_tokens=9")
    made = plan(cfg)
    assert made.stages and made.trainings == [] and made.stages.trainings == [] and made.held
    people = data.load(cfg.data)
    plain = sum(sample.metadata["kind"] == "default" for sample in people.train)
    counts = [(text.stage, text.count) for text in made.stages.texts]
    rollouts = len(people.train)
    judged = rollouts - plain
    assert counts == [("rollouts", rollouts), ("judge", judged), ("extract", rollouts), ("project", rollouts)]
    assert 0 < plain < rollouts
    longest = made.stages.texts[2].tokens
    lm = load_config("train", ["model=town"]).model
    hf = meta_lm(lm.path, None, {}, torch.float32).config
    width = hf.num_key_value_heads * hf.hidden_size // hf.num_attention_heads
    assert made.held.activations == 4 * longest * hf.num_hidden_layers * width * 2 * 4
    out = io.StringIO()
    made.print(Console(file=out, width=160))
    assert "trains" in out.getvalue() and "tokens per step" not in out.getvalue()


def test_the_stages_of_persona_fuse_by_hand(tmp_path: Path) -> None:
    rows = [{"id": f"q{i}", "messages": [{"role": "user", "content": f"query {i}"}]} for i in range(40)]
    pool = tmp_path / "queries.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config(
        *("method=persona_fuse", "trainer=persona_fuse", "model=llama31_8b", "data=situations", f"data.path={pool}"),
        *("method.joint.objective=dpo", "teacher=endpoint", "teacher.endpoint.model=big", "launch.num_processes=2"),
        *("method.max_length=64", "method.router.max_length=32", layers(4)),
    )
    made = plan(cfg)
    assert made.stages
    train = sum(split_of(f"query {i}", 0) == "train" for i in range(40))
    texts = [(text.stage, text.by, text.count, text.tokens) for text in made.stages.texts]
    assert texts == [
        *[("synthesis", "big", 40, tokens) for tokens in (2048, 16, 128)],  # without a judge the teacher judges
        ("joint", "the base LM", train, 256),
    ]
    (warm, warm_costs), (router, _), (joint, _) = made.trainings
    # each query calls for five poles at most: an epoch has half as many rounds, of ten rows each
    assert (warm.samples, warm.batch, warm.epochs, warm.tokens) == (train * 5 // 10 + (train % 2), 4, 3, 640)
    assert (router.samples, router.batch, router.tokens) == (math.ceil(train / 2), 128, 2 * 32)
    assert (joint.samples, joint.batch, joint.tokens) == (math.ceil(train / 2), 8, 4 * 64)
    # rank 16 of ten experts over q, k, v, o, gate, up, down in four layers, and Qwen2.5-0.5B's 494 million
    widths = (4096 + 4096) * 2 + (4096 + 1024) * 2 + (4096 + 14336) * 3
    assert warm.trainable == 10 * 16 * 4 * widths
    head = (896 + 1) * 512 + (512 + 1) * 256 + 11 * 256
    assert router.trainable == 494_032_768 + head and joint.trainable == warm.trainable + router.trainable
    # all ten run in the joint stage, one of them for a row of the warm-up: per token 6 operations per weight of them,
    # 4 per weight of the LM, and for the 32 tokens of a reply as many of the output head
    output = 128_256 * 4096
    lm = count(warm.parts, "base LM") - 2 * output
    low, high = warm.flops / 10, joint.flops / 4
    assert high - low > 6 * 64 * 9 * 16 * 4 * widths
    assert 0.98 < (low - 4 * 32 * output) / (4 * 64 * lm) < 1.05
    assert warm_costs[0].global_batch == 8


def test_annotated_situations_are_counted_as_they_are() -> None:
    cfg = config("experiment=town_persona_fuse", "method.skip=[router]")
    made = plan(cfg)
    people = data.load(cfg.data)
    (warm, _), (joint, _) = made.trainings
    rows = [row.vector for row in _rows(people.train)]
    assert warm.samples == len(Rounds(_rows(people.train), range(10), 0))
    assert joint.samples == len(Twos(_rows(people.train), 0)) and len(rows) == len(people.train)


def _rows(samples) -> list[Row]:
    return [Row(s.id, request_of(s), s.target, [], [], expert_vector_of(s)) for s in samples]


def test_steering_reads_its_beginnings_twice(tmp_path: Path) -> None:
    (tmp_path / "me.txt").write_text("I am calm.\n- What now?\nI am kind.\n- Who?\n")
    made = plan(config("method=steering", "data=constitution", f"data.path={tmp_path / 'me.txt'}", "model=llama31_8b"))
    assert made.stages and made.held and made.trainings == []
    told, untold = made.stages.texts
    assert told.count == untold.count == len(beginnings("english")) + 1
    assert told.tokens > untold.tokens and told.read and untold.read
    out = io.StringIO()
    made.print(Console(file=out, width=160))
    assert "read by the base LM" in out.getvalue() and "fits H100" in out.getvalue()


def test_stages_are_printed_and_prose_is_refused(tmp_path: Path) -> None:
    out = io.StringIO()
    plan(config("experiment=town_character")).print(Console(file=out, width=160))
    assert "answers in the role" in out.getvalue() and "prompt tokens" not in out.getvalue()
    (tmp_path / "wiki_Ada.txt").write_text("Ada was born in the harbour. She bakes.\n")
    with pytest.raises(UserError, match="how many statements the text about Ada holds is not known"):
        plan(config("experiment=apc_gemma_7b", f"data.path={tmp_path / 'wiki_Ada.txt'}"))


# ---- what is said --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_plan(name: str, planned: Callable[[str], Plan]) -> None:
    made = planned(name)
    out = io.StringIO()
    made.print(Console(file=out, width=200))
    assert all(word in out.getvalue() for word in ("H100", "frozen", "total", "GiB"))
    for load, costs in made.trainings:
        assert load.flops > 0 and load.activations > 0 and all(one.gpu_hours > 0 for one in costs)


def test_it_prints_what_it_found(planned: Callable[[str], Plan]) -> None:
    out = io.StringIO()
    planned("persona_plug_flan_t5_xxl").print(Console(file=out, width=160))
    text = out.getvalue()
    for part in ("11,135,332,352", "148,758,784 (1.31 %)", "zero3", "activations", "64 samples", "table 6"):
        assert part in text


def test_what_cannot_be_planned_is_said_in_a_sentence() -> None:
    with pytest.raises(UserError, match="needs data.path, or data.task out of LaMP_1"):
        plan(config("data=lamp"))
    with pytest.raises(UserError, match="give model.architecture the fields of its config.json"):
        plan(config("model.path=nobody/nothing", *SMALL_TOWN))
    with pytest.raises(UserError, match="model.architecture does not describe a model"):
        plan(config("model.path=nobody/nothing", "+model.architecture.model_type=lama", *SMALL_TOWN))
    with pytest.raises(UserError, match="launch.num_processes=6 has to be a multiple of launch.num_machines=4"):
        plan(config(*SMALL_TOWN, "launch.num_processes=6", "launch.num_machines=4"))
    with pytest.raises(UserError, match="plan_rates.utilisation=1.5 should be above 0 and at most 1"):
        plan(config(*SMALL_TOWN, "plan_rates.utilisation=1.5"))
    with pytest.raises(UserError, match="plan_rates.gpu=H10 is unknown; did you mean H100"):
        check_overrides(["plan_rates.gpu=H10"], "train")
