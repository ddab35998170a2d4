"""What a file names stays in that file's folder; nothing is unpickled, and no code comes with a model."""

import ast
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from commands import ROOT, command
from torch import nn

from evaluate import Players
from persona import lm
from persona.config import load_config
from persona.encoders import Encoder, EncoderConfig
from persona.errors import UserError
from persona.files import inside, sha256, write_json
from persona.methods import load_personalizer
from persona.personalizer import read_manifest
from persona.training.checkpoints import damage
from persona.training.classifier import body
from persona.training.stages import Stage, run_stages

# ---- paths ---------------------------------------------------------------------------------------------------------

OUTSIDE = ("../secret.json", "/etc/passwd", "adapter/../../secret.json", "link/secret.json", "..", ".")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a file, beside one that is not its own and to which a link leads."""
    (tmp_path / "own" / "adapter").mkdir(parents=True)
    (tmp_path / "own" / "adapter" / "weights.json").write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "own" / "link").symlink_to(tmp_path)
    return tmp_path / "own"


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_of_its_folder(folder, name):
    with pytest.raises(UserError, match="lies outside of it"):
        inside(folder, name)
    assert inside(folder, "adapter/weights.json") == folder / "adapter" / "weights.json"
    assert inside(folder, "not there yet..json").parent == folder


def personalizer(folder: Path, files: dict[str, str], config: dict | None = None, method: str = "lora") -> None:
    base = {"name": "town", "fingerprint": "x"}
    manifest = {"format_version": 1, "method": method, "base": base, "config": config or {}, "files": files}
    write_json(folder / "personalizer.json", {**manifest, "trained_on_top_of": []})


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_personalizer_that_names_a_file_outside_of_it(folder, name):
    personalizer(folder, {name: sha256(folder.parent / "secret.json")})
    with pytest.raises(UserError, match=r"personalizer.json names the file .* which lies outside its own directory"):
        read_manifest(folder)


@pytest.mark.parametrize("link", [False, True])
def test_a_personalizer_with_a_file_that_no_hash_vouches_for(folder, link):
    (folder / "link").unlink()
    if link:
        (folder / "more.safetensors").symlink_to(folder.parent / "secret.json")
    else:
        (folder / "more.safetensors").touch()
    (folder / "README.md").touch()  # what a user adds for the hub is no such file
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").touch()
    personalizer(folder, {"adapter/weights.json": sha256(folder / "adapter" / "weights.json")})
    with pytest.raises(UserError, match="holds more.safetensors, which its manifest does not name: move it out"):
        read_manifest(folder)
    (folder / "more.safetensors").unlink()
    assert read_manifest(folder)["method"] == "lora"


def test_an_axis_that_lies_elsewhere(folder, llama):
    shutil.rmtree(folder)
    folder.mkdir()
    personalizer(folder, {}, {"axis": str(folder.parent)}, "assistant_axis")
    manifest = json.loads((folder / "personalizer.json").read_text())
    write_json(folder / "personalizer.json", {**manifest, "base": llama.identity})
    with pytest.raises(UserError, match="names another folder as its axis: it should hold its own"):
        load_personalizer(folder, llama)


@pytest.mark.parametrize("name", OUTSIDE[:4])
def test_a_checkpoint_that_names_a_file_outside_of_it(folder, name):
    (folder / "adapter" / "weights.json").unlink()
    if not name.startswith("link"):
        (folder / "link").unlink()
    files = {name: sha256(folder / name)}
    write_json(folder / "checkpoint.json", {"files": files})
    assert re.search("lies outside of it|was not saved with it", damage(folder) or "")


def test_a_checkpoint_with_a_file_that_no_hash_vouches_for_and_one_of_none(folder):
    (folder / "link").unlink()
    write_json(folder / "checkpoint.json", {"files": {}})
    assert "holds adapter/weights.json, which was not saved with it" in (damage(folder) or "")
    (folder / "adapter" / "weights.json").unlink()
    assert "names no file" in (damage(folder) or "")


@pytest.mark.parametrize("content", ["[]", "{}", '"a"', '{"settings": 1}', '{"settings": {}, "inputs": []}', "{"])
def test_the_record_of_a_stage_that_is_none_runs_it_again(tmp_path, content):
    ran = []

    def run(place: Path) -> None:
        ran.append(place)
        write_json(place / "made.json", 1)

    stage = Stage("make", run, (), ("made.json",), {})
    run_stages([stage], tmp_path)
    (tmp_path / "records" / "make.json").write_text(content)
    run_stages([stage], tmp_path)
    run_stages([stage], tmp_path)
    assert len(ran) == 2


@pytest.mark.parametrize("name", ["..", "../../elsewhere", "", "/tmp", "."])
def test_a_stack_whose_results_would_lie_elsewhere(name, town_lm):
    cfg = load_config("evaluate", ["model=local", f"model.path={town_lm}", "model.device=cpu"])
    cfg.baselines = {name: ["description"]}
    with pytest.raises(UserError, match="cannot name a folder of results"):
        Players(cfg).stacks()


def test_a_report_links_to_nothing_outside(evaluation, tmp_path):
    assert command("evaluate.py", [*evaluation, f"output={tmp_path}"]).code == 0
    page = (tmp_path / "evaluation" / "town" / "report.html").read_text()
    links = re.findall(r"""(?:href|src|action)\s*=\s*["']?([^"'\s>]+)|url\(([^)]+)\)|@import\s+(\S+)""", page)
    assert links and all(link.startswith(("#", "data:")) for found in links for link in found if link)


# ---- pickle --------------------------------------------------------------------------------------------------------

# file -> name: why it is there.
ALLOWED = {
    ("persona/methods/assistant_axis/interchange.py", "torch.load"): "the published axes; weights_only=True",
    ("persona/methods/assistant_axis/interchange.py", "torch.save"): "the form in which axes are published",
}
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "pickletools"}
CALLS = {"torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "eval", "exec", "yaml.load", "os.system",
         "yaml.unsafe_load", "pd.read_pickle"}  # fmt: skip


def sources() -> list[Path]:
    rooms = [ROOT / name for name in ("persona", "benchmarks", "notebooks", "slurm")]
    return [ROOT / "train.py", ROOT / "evaluate.py", *sorted(path for room in rooms for path in room.rglob("*.py"))]


def unsafe(tree: ast.AST) -> set[str]:
    """What a source has that could run what it reads."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & CALLS) | ({str(node.module)} if str(node.module).partition(".")[0] in MODULES else set())
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found |= {name} & CALLS
            for keyword in node.keywords:
                given = ast.unparse(keyword.value)
                if keyword.arg in ("allow_pickle", "shell") and given != "False":
                    found.add(f"{keyword.arg}={given}")
                if keyword.arg == "weights_only" and given != "True":
                    found.add(f"{keyword.arg}={given}")
                if keyword.arg == "trust_remote_code" and given not in ("False", "config.trust_remote_code"):
                    found.add(f"{keyword.arg}={given}")
            arguments = {keyword.arg for keyword in node.keywords}
            if name == "torch.load" and "weights_only" not in arguments:
                found.add("torch.load without weights_only")
            if name.endswith(("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained")):
                # Without the word transformers asks at the terminal, where a hurried "y" runs the code.
                if not {"trust_remote_code", None, "local_files_only"} & arguments:
                    found.add(f"{name} without trust_remote_code=False")
    return found


def test_nothing_is_unpickled_and_no_foreign_code_runs():
    found = {(str(path.relative_to(ROOT)), name) for path in sources() for name in unsafe(ast.parse(path.read_text()))}
    assert found == set(ALLOWED), found ^ set(ALLOWED)


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import load", "torch.load(x)", "np.load(x, allow_pickle=True)", "eval(x)",
     "AutoConfig.from_pretrained(x)", "AutoModel.from_pretrained(x, trust_remote_code=True)", "yaml.load(x)",
     "torch.load(x, weights_only=False)", "from torch import load", "subprocess.run(x, shell=True)"],
)  # fmt: skip
def test_that_check_can_fail(line):
    assert unsafe(ast.parse(line))


def test_no_config_trusts_remote_code():
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert not re.search(r"trust_remote_code:\s*true", path.read_text(), re.I), path
        yaml.safe_load(path.read_text())
    assert lm.ModelConfig().trust_remote_code is False


# ---- code that comes with a model ----------------------------------------------------------------------------------


@pytest.fixture
def with_code(model_folder, tmp_path) -> Path:
    """A model of a kind that transformers does not know, with code that leaves a file when it is run."""
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\n")
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.C", "AutoModel": "own.C",
              "AutoModelForSequenceClassification": "own.C"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": mapped}))
    return folder


def test_code_that_comes_with_a_model_is_not_run(with_code, tmp_path):
    with pytest.raises(UserError, match="it brings code of its own, which is not run unless model.trust_remote_code="):
        lm.load(lm.ModelConfig(path=str(with_code), device="cpu"))
    with pytest.raises(UserError, match="could not be loaded: .*custom code"):
        body(str(with_code), ["a", "b"], 0, "base")
    with pytest.raises(UserError):
        Encoder(EncoderConfig(name=str(with_code), pooling="mean"))
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_model_that_is_known_is_not_run_either(with_code, tmp_path):
    config = json.loads((with_code / "config.json").read_text())
    (with_code / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    loaded = lm.load(lm.ModelConfig(path=str(with_code), device="cpu"))
    assert isinstance(loaded.model, nn.Module) and type(loaded.model).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_weights_in_a_pickle_are_not_read(model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))
    os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="no base LM could be loaded.*safetensors"):
        lm.load(lm.ModelConfig(path=str(folder), device="cpu"))
