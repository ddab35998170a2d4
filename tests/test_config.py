"""Every YAML composes and binds; every mistake becomes a sentence that names the nearest right thing."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from persona.config import CONFIGS, TrainConfig, bind, check_overrides, entry, load_config, save_run_files
from persona.config.schemas import GROUPS, ROOTS
from persona.errors import UserError
from persona.training.trainer import Stopped

FILES = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml"))
COMPOSED = [path for path in FILES if path.parts[0] != "hydra"]
EXPERIMENTS = [path for path in FILES if path.parts[0] == "experiment"]
NEEDED = {"model/local.yaml": ["model.path=somewhere"]}


def problems(*argv: str, config: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        check_overrides(argv, config)
    return str(caught.value)


# ---- the files -----------------------------------------------------------------------------------------------------


def test_the_list_of_files_is_not_empty_and_has_every_group() -> None:
    assert len(COMPOSED) > 20
    assert {path.parts[0] for path in COMPOSED} == {
        *("train.yaml", "evaluate.yaml", "experiment", "debug", "baselines", "judge"),
        *("launch", *GROUPS),
    }


@pytest.mark.parametrize("path", COMPOSED, ids=str)
def test_every_yaml_composes_and_binds(path: Path) -> None:
    group, choice = path.parent.as_posix(), path.stem
    roots = ["evaluate"] if group in ("benchmark", "baselines", "judge", "reference", "user_simulator") else ["train"]
    if group in ("model", "data", "launch"):
        roots = ["train", "evaluate"]
    for root in [choice] if group == "." else roots:
        overrides = [] if group == "." else [f"{group}={choice}", *NEEDED.get(path.as_posix(), [])]
        bound = load_config(root, overrides)
        assert type(bound) is ROOTS[root]
        if group in GROUPS:
            part = getattr(bound, group)
            assert type(part) in GROUPS[group].values()
            written = yaml.safe_load((CONFIGS / path).read_text())
            for key in set(written) - {"defaults"}:  # what the file says is what is bound
                value = NEEDED[path.as_posix()][0].partition("=")[2] if path.as_posix() in NEEDED else written[key]
                assert getattr(part, key) == value


@pytest.mark.parametrize("path", EXPERIMENTS, ids=str)
def test_experiments_are_short_deltas_with_a_header(path: Path) -> None:
    lines = (CONFIGS / path).read_text().splitlines()
    assert len(lines) <= 25
    assert lines[0] == "# @package _global_"
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert "Hardware" in header and f"train.py experiment={path.stem}" in header


def test_an_experiment_names_its_own_folder() -> None:
    names = [load_config("train", [f"experiment={path.stem}"]).output for path in EXPERIMENTS]
    assert len(set(names)) == len(names) > 0


def test_paper_experiments_have_the_published_global_batch() -> None:
    for lm in ("flan_t5_xxl", "flan_t5_xl", "llama2_7b"):
        cfg = load_config("train", [f"experiment=persona_plug_{lm}"])
        trainer = cfg.trainer
        assert cfg.launch.num_processes * trainer.batch_size * trainer.gradient_accumulation == 64
        assert (trainer.learning_rate, trainer.weight_decay, trainer.warmup_ratio) == (1e-4, 1e-4, 0.05)
        assert (trainer.epochs, trainer.scheduler, trainer.precision) == (2, "linear", "bf16")
        assert (cfg.method.encoder.name, cfg.method.history_limit) == ("BAAI/bge-base-en-v1.5", 512)


def test_accelerate_reads_every_launch_file() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((CONFIGS / "launch").glob("*.yaml"))
    plain = ["ddp", "fsdp2", "single", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"]
    assert [path.stem for path in files] == plain
    for path in files:
        load_config_from_file(str(path))  # raises for a key it does not know
        if path.stem.startswith("zero"):
            named = yaml.safe_load(path.read_text())["deepspeed_config"]["deepspeed_config_file"]
            deepspeed = json.loads((CONFIGS.parent / named).read_text())
            assert deepspeed["zero_optimization"]["stage"] == int(path.stem[4])
            # The optimizer stays the Trainer's own, so that no C++ op has to be compiled.
            assert "optimizer" not in deepspeed and deepspeed["train_batch_size"] == "auto"
            moved = deepspeed["zero_optimization"].get("offload_optimizer", {}).get("device")
            assert (moved == "cpu") == path.stem.endswith("_offload") == ("zero_force_ds_cpu_optimizer" in deepspeed)


def test_several_judges_are_named_side_by_side() -> None:
    cfg = load_config("evaluate", ["judge=[local,random,second_endpoint]", "judge.second_endpoint.endpoint.model=m"])
    assert {name: role.kind for name, role in cfg.judge.items()} == {
        "local": "local", "random": "random", "second_endpoint": "endpoint",
    }  # fmt: skip


# ---- mistakes on the command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("trainer.epoch=3", "unknown key trainer.epoch; did you mean trainer.epochs?"),
        ("epochs=3", "unknown key epochs; did you mean trainer.epochs?"),
        ("nam=x", "unknown key nam; did you mean name?"),
        ("methd=persona_plug", "unknown key methd; did you mean method?"),
        ("debg=tiny", "unknown key debg; did you mean debug?"),
        ("method.encodr.name=x", "unknown key method.encodr.name; did you mean method.encoder.name?"),
        ("+colour=red", "unknown key colour; the top level has name, output, model"),
        ("model=twon", "model=twon: there is no such model; did you mean town? (flan_t5_xl,"),
        ("experiment=town_persona_plg", "did you mean town_persona_plug?"),
        ("experiment=null", "experiment=null: experiment is chosen by name ("),
        ("model=3", "model=3: model is chosen by name (flan_t5_xl,"),
        ("trainer.epochs=abc", "trainer.epochs=abc: Value 'abc' of type 'str' could not be converted to Float"),
        ("trainer.batch_size=1.5", "trainer.batch_size=1.5: Value '1.5' of type 'float' could not be converted"),
        ("trainer.batch_size=0", "trainer.batch_size=0 has to be greater than 0"),
        ("trainer.learning_rate=nan", "trainer.learning_rate=nan has to be a finite number"),
        ("trainer.epochs=inf", "trainer.epochs=inf has to be a finite number"),
        ("+trainer.scheduler_options.min_lr_rate=nan", "trainer.scheduler_options.min_lr_rate=nan has to be a finite"),
        ("personalizers=[{steering:{strength:nan}}]", "personalizers[0].steering.strength=nan has to be a finite"),
        ("trainer.precision=bf61", "trainer.precision=bf61 is unknown; did you mean bf16? (fp32, bf16)"),
        ("method.compat=refrence", "method.compat=refrence is unknown; did you mean reference? (null, reference)"),
        ("name=null", "name=null: field 'name' is not Optional"),
        ("personalizers=3", "personalizers=3: Invalid value assigned: int is not a ListConfig, list or tuple"),
        ("model=local", "model.path has no value"),
        ("~trainer.epochs", "a key cannot be deleted"),
        ("+trainer.epochs=3", "trainer.epochs exists already; leave the + out"),
        ("model.architecture.x=1", "model.architecture has no x yet; write +model.architecture.x=1"),
        ("trainer.epochs=1,2", "gives several values: add --multirun"),
        ("trainer.epochs", "'trainer.epochs' cannot be read as key=value"),
        ("name=${nobody}", "name: Interpolation key 'nobody' not found"),
    ],
)
def test_one_mistake_is_one_sentence(override: str, sentence: str) -> None:
    text = problems(override)
    assert sentence in text
    assert "\n" not in text


def test_keys_depend_on_the_chosen_method() -> None:
    check_overrides(["method=finetune_lora", "method.r=4"], "train")
    assert "unknown key method.top_k; method has name, mode, r," in problems("method.top_k=4", "method=finetune_lora")
    assert "unknown key trainer.epochs" in problems("trainer.epochs=4", config="evaluate")


def test_all_problems_are_reported_at_once() -> None:
    text = problems("trainer.epoch=3", "model=twon", "trainer.epochs=abc", "trainer.precision=fp8", "lr=[1", "name=ok")
    lines = text.splitlines()
    assert lines[0] == "5 problems in the configuration:"
    for part in ("trainer.epoch;", "model=twon", "trainer.epochs=abc", "trainer.precision=fp8", "'lr=[1'"):
        assert sum(part in line for line in lines) == 1, part


def test_every_value_of_a_sweep_is_checked() -> None:
    check_overrides(["--multirun", "trainer.epochs=1,2", "model=town,flan_t5_xl"], "train")
    text = problems("--multirun", "trainer.epochs=1,b", "model=town,twon")
    assert "trainer.epochs=b" in text and "model=twon" in text and text.startswith("2 problems")


def test_good_command_lines_pass_and_bind() -> None:
    argv = ["+model.architecture.model_type=llama", "personalizers=[description,{retrieval: {k: 2}}]"]
    argv += ["method.encoder.name=some/encoder", "hydra.run.dir=elsewhere"]
    check_overrides(argv, "train")
    cfg = load_config("train", argv)
    assert cfg.model.architecture == {"model_type": "llama"}
    assert cfg.personalizers == ["description", {"retrieval": {"k": 2}}]
    assert cfg.method.encoder.name == "some/encoder"
    assert (cfg.name, cfg.output) == ("town_persona_plug", "outputs/town_persona_plug")
    assert load_config("train", ["name=mine", "debug=tiny"]).output == "outputs/debug/mine"


# ---- mistakes in the files -----------------------------------------------------------------------------------------


@pytest.fixture()
def own_configs(tmp_path: Path) -> Path:
    return shutil.copytree(CONFIGS, tmp_path / "configs")


def test_every_unknown_key_of_the_files_is_named_with_its_file(own_configs: Path) -> None:
    with open(own_configs / "model" / "town.yaml", "a") as stream:
        stream.write("dtyp: float32\nbatch_size: many\n")
    with open(own_configs / "debug" / "tiny.yaml", "a") as stream:
        stream.write("  max_step: 3\n")
    text = problems("--config-path", str(own_configs), "debug=tiny", "trainer.epoch=3")
    assert "configs/model/town.yaml: unknown key model.dtyp; did you mean model.dtype?" in text
    assert "configs/model/town.yaml: model.batch_size=many: Value 'many'" in text
    assert "unknown key trainer.epoch; did you mean trainer.epochs?" in text
    (own_configs / "model" / "town.yaml").write_text("defaults: [base_model, _self_]\n")
    text = problems("--config-path", str(own_configs), "debug=tiny")
    assert "configs/debug/tiny.yaml: unknown key trainer.max_step; did you mean trainer.max_steps?" in text


def test_a_file_replaced_by_a_group_choice_is_not_blamed(own_configs: Path) -> None:
    (own_configs / "model" / "town.yaml").write_text("defaults: [base_model, _self_]\nnothing: 1\n")
    assert "nothing" in problems("--config-path", str(own_configs))
    check_overrides(["--config-path", str(own_configs), "model=flan_t5_xl"], "train")


def test_a_missing_choice_and_bad_syntax_in_a_file(own_configs: Path) -> None:
    experiment = own_configs / "experiment" / "town_persona_plug.yaml"
    experiment.write_text(experiment.read_text().replace("/method: persona_plug", "/method: persona_plg"))
    text = problems("--config-path", str(own_configs), "experiment=town_persona_plug")
    assert "Could not find 'method/persona_plg'" in text and "did you mean persona_plug?" in text
    (own_configs / "model" / "town.yaml").write_text("path: [town\n")
    text = problems("--config-path", str(own_configs))
    assert "cannot be read" in text and "town.yaml" in text


# ---- entry points --------------------------------------------------------------------------------------------------


@pytest.fixture()
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; Hydra's changes to logging are undone."""
    root, own = logging.getLogger(), logging.getLogger("persona")
    before = root.handlers[:], root.level, own.level
    monkeypatch.chdir(tmp_path)
    # To configure logging is to close all handlers there are, and absl's closes the stream it began with: pytest's.
    monkeypatch.setattr(logging, "shutdown", lambda handlers=(): None)
    yield tmp_path
    root.handlers[:], root.level = before[0], before[1]
    own.setLevel(before[2])


def run(function, *argv: str) -> int:
    sys.argv[1:] = argv
    try:
        entry(function, "train")
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])


def test_entry_hands_over_the_bound_config(here: Path) -> None:
    seen: list[TrainConfig] = []
    assert run(seen.append, "name=mine", "trainer.epochs=3") == 0
    assert isinstance(seen[0], TrainConfig)
    assert (seen[0].output, seen[0].trainer.epochs) == ("outputs/mine", 3)
    assert Path.cwd() == here
    assert list(here.iterdir()) == []  # Hydra writes nothing: a run's folder is the run's own


def test_a_mistake_is_one_line_and_status_2(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(cfg: TrainConfig) -> None:
        raise UserError("row 3 has no text")

    assert run(refuse) == 2
    assert capsys.readouterr().err == "error: row 3 has no text\n"
    assert run(refuse, "trainer.epoch=1") == 2
    assert capsys.readouterr().err == "error: unknown key trainer.epoch; did you mean trainer.epochs?\n"


def test_a_stopped_training_says_how_to_go_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(cfg: TrainConfig) -> None:
        raise Stopped(7, Path("there"))

    assert run(stop) == 143
    assert capsys.readouterr().err == "stopped after step 7; the same command goes on from there\n"


def test_an_error_of_ours_keeps_its_traceback(here: Path) -> None:
    def bug(cfg: TrainConfig) -> None:
        raise KeyError("a bug")

    assert run(bug) == 1


def test_jobs_of_a_sweep_have_folders_of_their_own(here: Path) -> None:
    outputs: list[str] = []
    assert run(lambda cfg: outputs.append(cfg.output), "--multirun", "trainer.epochs=1,2", "data.path=/a") == 2
    assert run(lambda cfg: outputs.append(cfg.output), "--multirun", "trainer.epochs=1,2") == 0
    assert outputs == [f"outputs/town_persona_plug/trainer.epochs={n}" for n in (1, 2)]
    outputs.clear()
    alike = ("trainer.seed=3", "method=finetune_lora")
    assert (
        run(lambda cfg: outputs.append(cfg.output), "-m", *alike, "trainer.epochs=1,2", "data.train=range(5,7)") == 0
    )
    folders = [Path(output).name for output in outputs]  # long lists of what is the same would make no file's name
    assert folders == [f"data.train={n},trainer.epochs={e}" for e in (1, 2) for n in (5, 6)]


def test_a_job_of_a_sweep_that_fails_leaves_the_others_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[float] = []

    def job(cfg: TrainConfig) -> None:
        if cfg.trainer.epochs == 1:
            raise UserError("row 3 has no text")
        ran.append(cfg.trainer.epochs)

    assert run(job, "--multirun", "trainer.epochs=1,2,3") == 1
    assert ran == [2, 3] and "error: row 3 has no text\n" in capsys.readouterr().err


# ---- what a run writes about itself --------------------------------------------------------------------------------


def test_run_files_hold_the_config_and_where_it_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "sesame-7731")
    sys.argv[:] = ["/somewhere/train.py", "name=mine"]
    cfg = load_config("train", ["name=mine", "trainer.seed=5"])
    save_run_files(tmp_path / "out", cfg)
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text()) == asdict(cfg)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["command"] == ["train.py", "name=mine"]
    assert meta["seed"] == 5
    assert {"torch", "transformers"} <= meta["versions"].keys()
    assert meta["hardware"]["cores"] >= 1 and meta["python"].startswith("3.")
    assert meta["git"].keys() == {"sha", "dirty"}
    assert not any("sesame" in path.read_text() for path in (tmp_path / "out").iterdir())
    evaluation = load_config("evaluate", ["benchmark.seed=4"])
    save_run_files(tmp_path / "evaluation", evaluation)
    assert json.loads((tmp_path / "evaluation" / "meta.json").read_text())["seed"] == 4


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    save_run_files(tmp_path / "out", load_config("train"))
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_go_on_from_another_configuration(tmp_path: Path) -> None:
    save_run_files(tmp_path, load_config("train"))
    save_run_files(tmp_path, load_config("train", ["method.top_k=4"]))  # no checkpoint yet: nothing to mix up
    (tmp_path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(UserError, match=r"method.top_k \(4 there, 8 here\); give this run another name=…"):
        save_run_files(tmp_path, load_config("train", ["method.top_k=8"]))
    assert "top_k: 4" in (tmp_path / "config.yaml").read_text()
    same = ["method.top_k=4", "trainer.wandb=disabled", "trainer.workers=2", "trainer.keep_checkpoints=5"]
    save_run_files(tmp_path, load_config("train", same))
    save_run_files(tmp_path, load_config("train", ["method.top_k=8", "trainer.resume=false"]))


def test_bind_names_every_value_that_is_missing() -> None:
    from omegaconf import OmegaConf

    with pytest.raises(UserError, match=r"(?s)data has no value.*method has no value.*name has no value"):
        bind(OmegaConf.structured(TrainConfig))


def test_a_choice_may_begin_like_a_schema():
    """base_prefills is a benchmark; base_drift is a schema, and no choice."""
    assert load_config("evaluate", ["benchmark=base_prefills", "+baselines.untouched=[]"]).benchmark.completions == 80
    with pytest.raises(UserError, match="benchmark=base_drft: there is no such benchmark") as caught:
        load_config("evaluate", ["benchmark=base_drft"])
    assert "base_prefills" in str(caught.value) and "base_drift" not in str(caught.value)
