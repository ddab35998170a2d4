"""train.py and evaluate.py: every method and experiment starts, runs resume, and what goes wrong is one sentence."""

import contextlib
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from commands import two_processes
from safetensors.torch import load_file, save_file

from evaluate import evaluate
from persona.benchmarks import BENCHMARKS, NOT_IN_ALL
from persona.config import load_config
from persona.errors import UserError
from persona.evaluation.results import read_rows, read_summary
from persona.files import sha256
from persona.lm import scratch
from persona.methods import PERSONALIZERS
from persona.training.trainer import Stopped
from train import train

ROOT = Path(__file__).resolve().parents[1]
LAMP = ROOT / "tests" / "fixtures" / "lamp" / "LaMP_time_3"
METHODS = ("persona_plug", "instruction_only", "finetune_lora", "finetune_full", "user_lora")
# These need an LM that answers in sentences: tests/methods/character/test_pipeline.py and test_assistant_axis.py start
# them.
SPEAKING = ("town_character", "town_assistant_axis")
# Those of the papers are planned in tests/test_plan.py: no machine of the tests could start them.
EXPERIMENTS = sorted(
    path.stem for path in (ROOT / "configs" / "experiment").glob("town_*.yaml") if path.stem not in SPEAKING
)
TOWN = ("data=town", "data.train=2", "data.dev=2", "data.test=1")


@pytest.fixture(scope="module")
def places(tmp_path_factory, model_folder, encoder_folder):
    """Overrides by data: a scratch LM that knows the town's words, and T5 on invented LaMP files."""
    from persona.town.grammar import vocabulary
    from persona.town.tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("places")
    town = scratch.make(folder / "town_lm", build_tokenizer(vocabulary()), "llama", 32, 1, 2, max_positions=512)
    return {
        "town": [*TOWN, f"model.path={town}"],
        "lamp": ["data=lamp", f"data.path={LAMP}", f"data.cache={folder / 'cache'}",
                 f"model.path={model_folder('t5')}"],
        "plug": [f"method.store={folder / 'store'}", f"method.encoder.name={encoder_folder}",
                 "method.encoder.pooling=mean"],
        "lm": str(town),
    }  # fmt: skip


def train_config(places, data: str, method: str, out: Path, *more: str):
    plug = places["plug"] if method in ("persona_plug", "instruction_only") else []
    given = [f"method={method}", "model=local", "debug=tiny", f"output={out}", "trainer.cpu=true", "model.device=cpu"]
    return load_config("train", [*given, *places[data], *plug, *more])


def evaluate_config(places, data: str, out: Path, *more: str):
    given = [f"benchmark={data}", "benchmark.num_beams=1", "benchmark.max_new_tokens=4", "benchmark.limit=6"]
    return load_config("evaluate", ["model=local", "model.device=cpu", f"output={out}", *given, *places[data], *more])


def losses(out: Path) -> list[float]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


# ---- every method, every experiment --------------------------------------------------------------------------------


def check_trained(out: Path, personalizer: Path, steps: int = 2) -> str:
    """What a finished training leaves; returns the method's name."""
    assert personalizer == out / "personalizer" and len(losses(out)) == steps
    manifest = json.loads((personalizer / "personalizer.json").read_text())
    assert manifest["files"] and all(sha256(personalizer / name) == known for name, known in manifest["files"].items())
    assert json.loads((out / "meta.json").read_text())["seed"] == 0 and (out / "config.yaml").is_file()
    assert (out / "checkpoints" / f"checkpoint-{steps}" / "checkpoint.json").is_file()
    return manifest["method"]


def check_measured(places, data: str, out: Path, stack: list, method: str, samples: int) -> Path:
    """Evaluate the stack beside the untouched LM and look at what that leaves."""
    cfg = evaluate_config(places, data, out)
    cfg.personalizers, cfg.baselines = stack, {"untouched": []}
    folder = evaluate(cfg)
    assert folder == out / "evaluation" / data
    measured = {path.parent.name: read_summary(path.parent) for path in folder.glob("*/summary.json")}
    own = " + ".join([*(["retrieval"] if len(stack) > 1 else []), method])
    assert set(measured) == {"untouched", own, "constant answer", "random answer"}
    for name, summary in measured.items():
        rows = read_rows(folder / name / "samples.jsonl")
        assert summary.n == len(rows) == samples and summary.n_unscored == 0
        assert set(summary.estimates) == set(summary.metrics) and name in (folder / "report.html").read_text()
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_measured_on_lamp(places, tmp_path, method):
    personalizer = train(train_config(places, "lamp", method, tmp_path))
    stack = check_trained(tmp_path, personalizer)
    folder = check_measured(places, "lamp", tmp_path, [str(personalizer)], stack, 3)
    golds = json.loads((folder / "untouched" / "predictions_LaMP_3.json").read_text())
    assert golds["task"] == "LaMP_3" and [gold["id"] for gold in golds["golds"]] == ["301", "311", "321"]
    # The plots are of users' vectors, which Persona-Plug alone has.
    assert (folder / stack / "plots.json").is_file() == (method == "persona_plug")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_starts(places, tmp_path, name):
    """For two steps on the scratch LM, and is measured."""
    cfg = load_config("train", [f"experiment={name}"])
    if cfg.data.name == "town_characters":  # a scratch LM says nothing that could be labelled: its first stages
        few = ["data.train=2", "data.test=1", f"output={tmp_path}", "trainer.cpu=true", "model.device=cpu"]
        for stage in ("statements", "pairs"):
            folder = train(load_config("train", [f"experiment={name}", *few, f"stage={stage}"]))
            assert (folder / "records" / f"{stage}.json").is_file()
    elif cfg.data.name == "town_situations":
        more = [
            "debug=tiny",
            f"output={tmp_path}",
            "model.device=cpu",
            "trainer.cpu=true",
            f"model.path={places['lm']}",
        ]
        more += [f"method.router.path={places['lm']}"] if cfg.method.name == "persona_fuse" else []
        few = ["data=town_situations", "data.limit=null", "data.train=60", "data.dev=4", "data.test=6"]
        personalizer = train(load_config("train", [f"experiment={name}", *more, *few]))
        cfg = load_config("evaluate", ["benchmark=town_traits", *few, *more[1:3], f"model.path={places['lm']}"])
        cfg.benchmark.max_new_tokens, cfg.personalizers = 4, [str(personalizer)]
        found = [read_summary(path.parent) for path in evaluate(cfg).glob("*/summary.json")]
        assert len(found) == 3 and all(summary.n == 8 and "exact" in summary.estimates for summary in found)
    else:
        plug = places["plug"] if cfg.method.name == "persona_plug" else []
        more = ["debug=tiny", f"output={tmp_path}", "model.device=cpu", "trainer.cpu=true", *plug]
        personalizer = train(load_config("train", [f"experiment={name}", *places["town"], *more]))
        method = check_trained(tmp_path, personalizer)
        check_measured(places, "town", tmp_path, [*cfg.personalizers, str(personalizer)], method, 6)


def test_a_plan_is_printed_and_nothing_is_written(tmp_path, capsys):
    """Of a published size but for its depth; no weight is there to load."""
    (tmp_path / "me.txt").write_text("I am calm.\n- What now?\n")
    given = [
        "model.architecture.num_hidden_layers=2",
        f"data.path={tmp_path / 'me.txt'}",
        f"output={tmp_path / 'out'}",
    ]
    assert train(load_config("train", ["experiment=character_llama31_8b", "plan=true", *given])) is None
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("frozen", "total", "GiB", "stage"))
    assert not (tmp_path / "out").exists()


def test_steering_is_trained_and_measured_beside_the_constitution_as_system_prompt(tmp_path, load_base, model_folder):
    """On a constitution that comes with the package; two layers, for one would have no middle."""
    data = ["data=constitution", "data.path=patience", "model=local", f"model.path={model_folder('llama')}"]
    trained = train(load_config("train", [*data, "method=steering", f"output={tmp_path}", "method.coefficient=5"]))
    cfg = load_config(
        "evaluate", [*data, "benchmark=character", "judge=random", "trivial=false", f"output={tmp_path}"]
    )
    cfg.benchmark.limit, cfg.benchmark.max_new_tokens = 2, 4
    cfg.personalizers, cfg.baselines = [str(trained)], {"untouched": [], "system prompt": ["constitution"]}
    folder = evaluate(cfg)
    rows = {path.parent.name: read_rows(path) for path in folder.glob("*/samples.jsonl")}
    assert set(rows) == {"steering", "untouched", "system prompt"}
    assert [row.raw for row in rows["steering"]] != [row.raw for row in rows["untouched"]]


def test_role_play_in_the_town_is_measured_by_the_oracle(tmp_path):
    given = ["baselines=town_role_play", "benchmark=apc", "judge=oracle", "data.test=2", "data.train=1", "name=x"]
    cfg = load_config("evaluate", [*given, "benchmark.max_new_tokens=40", "benchmark.limit=12"])
    cfg.output = str(tmp_path)
    del cfg.baselines["rag dense"]  # the time of loading an encoder
    folder = evaluate(cfg)
    found = {path.parent.name: read_summary(path.parent).estimates for path in folder.glob("*/summary.json")}
    followed = {name: estimates["followed"].value for name, estimates in found.items()}
    assert followed["long context"] > followed["rag"] > followed["direct"] >= followed["constant answer"] == 0


# ---- resume --------------------------------------------------------------------------------------------------------


@pytest.fixture
def trouble(monkeypatch, tmp_path):
    monkeypatch.setitem(PERSONALIZERS, "trouble", "entry_toys:Trouble")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda what, call: f"personalizers=[{{trouble: {{flag: {tmp_path / 'flag'}, call: {call}, what: {what}}}}}]"
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


LONGER = (
    "trainer.max_steps=6",
    "trainer.resume=true",
    "trainer.eval_every=6",
    "trainer.save_every=2",
    "trainer.learning_rate=0.01",
)


def test_a_run_stopped_by_sigterm_goes_on_as_if_nothing_had_been(places, tmp_path, trouble):
    """With LoRA's dropout, so that the random state counts; call 4 of the first door is step 4's batch."""
    given = *LONGER, trouble("sigterm", 4)
    cfg = train_config(places, "town", "finetune_lora", tmp_path / "stopped", *given)
    with pytest.raises(Stopped, match="143") as stopped:
        train(cfg)
    assert "stopped after step" in stopped.value.message and not (tmp_path / "stopped" / "personalizer").exists()
    before = losses(tmp_path / "stopped")
    assert 3 <= len(before) < 6
    resumed = train(cfg)
    straight = train(train_config(places, "town", "finetune_lora", tmp_path / "straight", *given))  # the flag is set
    assert (
        losses(tmp_path / "stopped") == losses(tmp_path / "straight")
        and before == losses(tmp_path / "straight")[: len(before)]
    )
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (resumed, straight))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(places, tmp_path, trouble):
    cfg = train_config(places, "town", "finetune_full", tmp_path / "run", *LONGER, trouble("disk", 4))
    with pytest.raises(UserError, match="checkpoint of step 4 could not be saved .*too large.*the ones before it"):
        train(cfg)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert (train(cfg) / "model" / "model.safetensors").is_file() and len(losses(tmp_path / "run")) == 6


def test_another_configuration_under_the_same_name_is_refused(places, tmp_path):
    train(train_config(places, "town", "finetune_lora", tmp_path, "trainer.resume=true"))
    with pytest.raises(UserError, match=r"checkpoints of another configuration: method.r \(8 there, 4 here\)"):
        train(train_config(places, "town", "finetune_lora", tmp_path, "trainer.resume=true", "method.r=4"))


def test_an_evaluation_goes_on_where_it_was_and_refuses_other_settings(places, tmp_path):
    cfg = evaluate_config(places, "town", tmp_path)
    path = evaluate(cfg) / "untouched" / "samples.jsonl"
    first = read_rows(path)
    lines = path.read_text().splitlines()
    # A mark in the finished rows, and the last two lost: the mark stays, the two come back.
    marked = [json.dumps({**json.loads(line), "description": "finished before"}) + "\n" for line in lines[:4]]
    path.write_text("".join(marked) + lines[4][:30])
    evaluate(cfg)
    again = read_rows(path)
    assert [row.description for row in again] == ["finished before"] * 4 + [""] * 2
    assert [(row.id, row.raw, row.values) for row in again] == [(row.id, row.raw, row.values) for row in first]
    other = evaluate_config(places, "town", tmp_path, "benchmark.max_new_tokens=3")
    with pytest.raises(UserError, match="holds results of other settings: benchmark was .*overwrite=true"):
        evaluate(other)
    assert read_rows(path) == again
    other.overwrite = True
    evaluate(other)
    assert [row.description for row in read_rows(path)] == [""] * 6


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_number_names_the_step(places, tmp_path):
    import shutil

    folder = Path(shutil.copytree(places["lm"], tmp_path / "lm"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the loss became nan in step 1 .*lower trainer.learning_rate"):
        train(train_config(places, "town", "finetune_lora", tmp_path / "run", f"model.path={folder}"))


@contextlib.contextmanager
def as_nobody():
    """Without root's right to write everywhere, where the tests run as root."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_no_permission_to_write(places):
    with tempfile.TemporaryDirectory() as closed:
        os.chmod(closed, 0o555)
        # Composed and imported before: the checkout itself may be closed to others.
        cfg = train_config(places, "town", "finetune_lora", Path(closed) / "run")
        importlib.import_module("persona.lm"), importlib.import_module("persona.data")
        with as_nobody(), pytest.raises(UserError, match="config.yaml could not be written: Permission denied"):
            train(cfg)
        os.chmod(closed, 0o755)


def test_a_personalizer_of_another_base(places, tmp_path):
    folder = train(train_config(places, "town", "finetune_lora", tmp_path))
    with pytest.raises(UserError, match=r"\(lora\) was trained on base LM .*town_lm .*, but the base LM here is .*t5"):
        evaluate(evaluate_config(places, "lamp", tmp_path, f"personalizers=[{folder}]"))


def test_names_of_stacks(places, tmp_path):
    cfg = evaluate_config(places, "town", tmp_path, "personalizers=[retrieval]", "name=mine")
    cfg.baselines = {"retrieval": [], "mine": []}
    with pytest.raises(UserError, match="already have a stack called 'mine': give this one another name"):
        evaluate(cfg)
    cfg.baselines = {"../mine": []}
    with pytest.raises(UserError, match="'../mine' cannot name a folder of results"):
        evaluate(cfg)
    assert not list(tmp_path.iterdir())


# ---- as commands ---------------------------------------------------------------------------------------------------

NO_NETWORK = """
import socket
_connect, _lookup = socket.socket.connect, socket.getaddrinfo
def _local(host): return host in ("127.0.0.1", "localhost", "::1", None)
def connect(self, address):
    if self.family != socket.AF_UNIX and not _local(address[0]):
        raise AssertionError(f"the network was asked for {address}")
    return _connect(self, address)
def getaddrinfo(host, *more, **named):
    if not _local(host): raise AssertionError(f"the network was asked for {host}")
    return _lookup(host, *more, **named)
socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
"""


@pytest.fixture
def offline(tmp_path):
    """The environment of a user with a hub but without a network: whatever connects, fails loudly."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "WANDB_"))}
    return {**environment, "PYTHONPATH": str(tmp_path / "site"), "HF_HOME": str(tmp_path / "hf")}


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("apc", "stage=pars is no stage of apc; did you mean pairs"),
        ("finetune_lora", "stage=pars .*; it has no stages"),
    ],
)
def test_an_unknown_stage_is_one_sentence_with_the_nearest(method, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        train(load_config("train", [f"method={method}", "stage=pars", f"output={tmp_path / 'out'}"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "given", "sentence"),
    (
        ("train.py", "trainer.epochz=1", "error: unknown key trainer.epochz; did you mean trainer.epochs?\n"),
        ("evaluate.py", "benchmark.limt=1", "error: unknown key benchmark.limt; did you mean benchmark.limit?\n"),
        ("evaluate.py", "benchmark=personagim", "no such benchmark; did you mean personagym? (all, "),
        (
            "evaluate.py",
            "judge=orakle",
            "error: judge=orakle: there is no such judge; did you mean oracle? (endpoint, ",
        ),
    ),
)
def test_an_unknown_name_is_one_sentence_with_the_nearest(script, given, sentence, monkeypatch, capsys):
    """The script as Python runs it, in this process: its imports have been paid for."""
    monkeypatch.setattr(sys, "argv", [script, given])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and sentence in said.err and said.err.count("\n") == 1


def test_training_downloads_nothing_and_sigterm_saves(tmp_path, offline):
    """The defaults of train.py: the shipped LM, the installed encoder, the town."""
    out = tmp_path / "run"
    more = ["data.train=2", "data.dev=2", "trainer.max_steps=100000", "trainer.eval_every=100000",
            "trainer.save_every=100000", f"output={out}", f"method.store={tmp_path / 'store'}"]  # fmt: skip
    log = tmp_path / "log"
    with open(log, "w") as stream:
        command = [sys.executable, "train.py", "debug=tiny", *more]
        process = subprocess.Popen(command, cwd=ROOT, env=offline, stdout=stream, stderr=stream)
    try:
        deadline = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < deadline:
            if (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").read_text().count("\n") >= 2:
                process.terminate()
                break
            time.sleep(0.2)
        assert process.wait(timeout=120) == 143, log.read_text()[-3000:]
    finally:
        process.kill()
    assert "the same command goes on from" in log.read_text()
    assert len(list((out / "checkpoints").glob("checkpoint-*"))) == 1


def test_evaluation_downloads_nothing(tmp_path, offline):
    """The defaults of evaluate.py, beside prompts with retrieved history (the installed encoder among them)."""
    command = [sys.executable, "evaluate.py", "baselines=prompts", "benchmark.limit=6", f"output={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, env=offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "evaluation" / "town"
    stacks = {"untouched", "recency 4", "bm25 4", "dense 4", "constant answer", "random answer"}
    assert {path.parent.name for path in folder.glob("*/summary.json")} == stacks
    assert all(len(read_rows(folder / stack / "samples.jsonl")) == 6 for stack in stacks)
    assert "bm25 4" in done.stdout and "voice" in done.stdout and (folder / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "meta.json").read_text())["command"][0] == "evaluate.py"


# ---- every benchmark -----------------------------------------------------------------------------------------------


def test_every_method_is_measured_on_every_benchmark_by_one_command(places, tmp_path):
    """On the samples that come with the package, with a judge that draws its verdicts; one report over all."""
    stacks = {name: [str(train(train_config(places, "town", name, tmp_path / name)))] for name in METHODS}
    prompts = {"description": ["description"], "bm25 lora": [{"retrieval": {"ranker": "bm25", "k": 2}}]}
    prompts["bm25 lora"] += stacks["finetune_lora"]
    given = ["benchmark.limit=2", "benchmark.max_new_tokens=4", "judge=random", "model=local", "model.device=cpu"]
    cfg = load_config("evaluate", ["benchmark=all", *given, *places["town"], f"output={tmp_path / 'all'}"])
    cfg.baselines = {"untouched": [], **stacks, **prompts}
    folder = evaluate(cfg)
    names = set(BENCHMARKS) - set(NOT_IN_ALL)
    measured = {*cfg.baselines, "constant answer", "random answer"}
    for name in names:
        assert {path.parent.name for path in (folder / name).glob("*/summary.json")} == measured
    for path in folder.glob("*/*/samples.jsonl"):
        rows = read_rows(path)
        assert rows and all(row.values or row.reason for row in rows), path
    assert all(name in (folder / "report.html").read_text() for name in names | measured)


def test_a_missing_role_is_one_sentence_before_anything_runs(tmp_path):
    for name in ("personagym", "rmtbench", "all"):
        cfg = load_config("evaluate", [f"benchmark={name}"])
        cfg.output = str(tmp_path)
        with pytest.raises(UserError, match="needs a judge: choose one with judge=endpoint, say"):
            evaluate(cfg)
    assert not list(tmp_path.rglob("samples.jsonl"))


# ---- two processes -------------------------------------------------------------------------------------------------


def torchrun(*arguments: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    launcher += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.mark.multi_process
def test_two_processes_train_and_evaluate_as_one(places, tmp_path):
    """One global batch of two: one process with both samples, or two with one each, which torchrun has started."""
    given = ["method=finetune_lora", "model=local", "debug=tiny", "trainer.cpu=true", "model.device=cpu",
             "method.lora_dropout=0.0", *places["town"]]  # fmt: skip
    alone = train(load_config("train", [*given, f"output={tmp_path / 'one'}"]))
    done = torchrun("train.py", *given, "trainer.batch_size=1", f"output={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr[-3000:]
    together = tmp_path / "two" / "personalizer"
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (together, alone))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    assert json.loads((tmp_path / "two" / "meta.json").read_text())["hardware"]["processes"] == 2

    given = ["benchmark.limit=6", "benchmark.max_new_tokens=4", "model=local", "model.device=cpu",
             f"personalizers=[{together}]", *places["town"]]  # fmt: skip
    one = evaluate(load_config("evaluate", [*given, f"output={tmp_path / 'one'}"]))
    both = two_processes("evaluate.py", [*given, f"output={tmp_path / 'two'}"])
    assert [done.code for done in both] == [0, 0], [done.err[-3000:] for done in both]
    two = tmp_path / "two" / "evaluation" / "town"
    expected, found = (read_rows(folder / "lora" / "samples.jsonl") for folder in (one, two))
    assert [(row.id, row.raw, row.values) for row in found] == [(row.id, row.raw, row.values) for row in expected]
    assert read_summary(two / "lora").estimates == read_summary(one / "lora").estimates
    assert (two / "report.html").is_file()
