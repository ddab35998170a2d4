"""A key is in the environment and in the header of a request, and nowhere else."""

import os
from functools import partial
from pathlib import Path

import pytest
from commands import command
from evaluation.fault_server import Answer, FaultServer, Seen

from persona.config import load_config
from persona.config.compose import check_no_keys
from persona.errors import UserError
from persona.evaluation.endpoints.endpoint import Endpoint, EndpointConfig

KEY = "sk-marker-0123456789abcdef"


def in_environment(**values: str) -> None:
    os.environ.update(values)


def titles() -> str:
    """Command lines of all processes of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode(errors="replace"))
        except OSError:
            pass  # it has ended
    return "\n".join(found)


def judged(url: str, out: Path) -> list[str]:
    """Three samples of PersonaGym under a judge at `url`."""
    return [
        *("benchmark=personagym", "benchmark.limit=3", "trivial=false", "personalizers=[description]"),
        *("judge=endpoint", "judge.endpoint.endpoint.model=judge-7b", f"judge.endpoint.endpoint.base_url={url}"),
        *("judge.endpoint.endpoint.api_key_env=JUDGE_KEY", "judge.endpoint.endpoint.retries=1"),
        *("endpoint.model=writer", f"endpoint.base_url={url}", "endpoint.api_key_env=JUDGE_KEY", f"output={out}"),
    ]


def nowhere(folder: Path, *said: str) -> None:
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert KEY.encode() not in path.read_bytes(), path
    assert all(KEY not in text for text in said)


def test_a_key_is_in_no_file_no_message_and_no_process_title(tmp_path):
    """The server fails, and repeats the key in errors, in bodies that are none and in replies."""
    shown = []

    def plan(seen: Seen) -> Answer:
        shown.append(titles())
        said = seen.headers["authorization"]
        kinds = {1: Answer(status=500, text=f"bad key: {said}"), 2: Answer(fault="garbage")}
        return kinds.get(len(shown) % 4, Answer(text=f"Score: 4, your key is {said}", model=None))

    with FaultServer(plan, models=("judge-7b", "writer"), key=KEY) as server:
        done = command("evaluate.py", judged(server.url, tmp_path), partial(in_environment, JUDGE_KEY=KEY))
        assert done.code == 0 and {seen.headers["authorization"] for seen in server.seen} == {f"Bearer {KEY}"}
    assert len(shown) > 9  # processes were looked at while it ran
    assert all(KEY not in text for text in shown)
    nowhere(tmp_path, done.out, done.err)
    assert "[key]" in (tmp_path / "evaluation/personagym/description/samples.jsonl").read_text()


def test_a_key_that_is_refused_is_not_repeated(tmp_path):
    with FaultServer(models=("judge-7b", "writer"), key="another") as server:
        done = command("evaluate.py", judged(server.url, tmp_path), partial(in_environment, JUDGE_KEY=KEY))
    assert done.sentence == f"error: {server.url} refuses the key in JUDGE_KEY (HTTP 401)"
    nowhere(tmp_path, done.out, done.err)


def test_what_the_tracker_is_told_holds_no_key(training, tmp_path):
    """W&B writes environment, command line and configs into its own folder; offline it stays there."""
    keys = partial(in_environment, WANDB_MODE="offline", WANDB_API_KEY=KEY.ljust(40, "0"), OPENAI_API_KEY=KEY)
    done = command("train.py", [*training, "trainer.wandb=offline", "trainer.max_steps=2", f"output={tmp_path}"], keys)
    assert done.code == 0, done.err[-2000:]
    assert list(tmp_path.rglob("*.wandb"))
    nowhere(tmp_path, done.out, done.err)


@pytest.mark.parametrize(
    "given",
    [
        f"+judge.api_key={KEY}",
        f"judge.endpoint.endpoint.api_key={KEY}",
        f"judge.endpoint.endpoint.api_key_env={KEY}",
        f"judge.endpoint.endpoint.base_url=http://user:{KEY}@localhost/v1",
        f"judge.endpoint.endpoint.base_url=http://localhost/v1?api_key={KEY}",
        f"endpoint={{model: m, api_key: {KEY}}}",
        f"+personalizers=[{{retrieval: {{token: {KEY}}}}}]",
        "judge.endpoint.endpoint.password=hunter2",
    ],
)
def test_a_key_on_the_command_line_is_refused_before_anything_is_written(given, tmp_path):
    done = command("evaluate.py", ["judge=endpoint", given, f"output={tmp_path / 'out'}"])
    assert "holds a key or password: it belongs into the environment variable that api_key_env names" in done.sentence
    assert "hunter2" not in done.err and not list(tmp_path.iterdir())
    nowhere(tmp_path, done.out, done.err)


def test_what_only_looks_like_a_key_is_none():
    check_no_keys(
        [
            "judge.endpoint.endpoint.api_key_env=JUDGE_KEY", "benchmark.max_new_tokens=4",
            "endpoint.tokens_per_minute=9", "data.path=outputs/task-with-a-long-name-of-its-own",
            "model.path=hf_models/llama_3_1_8b_instruct_and_more", "endpoint.base_url=http://localhost:8000/v1",
            "name=desk-0123456789abcdef0123",
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"api_key_env": "marker_as_keys_are"},
            "api_key_env should be the name of an environment",
        ),
        ({"base_url": "http://user:marker@localhost:1/v1"}, "base_url holds a password or a query"),
        ({"base_url": "http://user:mark/er@localhost:1/v1"}, "base_url holds a password or a query"),
        ({"base_url": "user:marker@localhost:1/v1"}, "base_url holds a password or a query"),
        ({"base_url": "https://localhost:1/v1?api-key=marker"}, "base_url holds a password or a query"),
    ],
)
def test_a_key_in_a_config_is_refused_and_not_repeated(settings, words):
    with pytest.raises(UserError, match=words) as error:
        Endpoint(EndpointConfig(**({"model": "m", "base_url": "http://localhost:1/v1"} | settings)))
    assert "marker" not in str(error.value) and "mark/er" not in str(error.value)
    given = [f"endpoint.{name}='{value}'" for name, value in settings.items()]
    with pytest.raises(UserError, match=words) as error:  # before config.yaml is written
        load_config("evaluate", ["endpoint.model=m", *given])
    assert "marker" not in str(error.value) and "mark/er" not in str(error.value)


def test_a_file_that_holds_no_address_is_not_shown(tmp_path):
    path = tmp_path / "id_ed25519"
    path.write_text("-----BEGIN marker-----\n")
    with pytest.raises(UserError, match=f"what stands in file:{path} is no address") as error:
        Endpoint(EndpointConfig(model="m", base_url=f"file:{path}"))
    assert "marker" not in str(error.value)
