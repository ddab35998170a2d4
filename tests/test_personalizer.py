"""The stack's three doors, and the directory on disk with every way in which it can be wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import persona
from persona.errors import UserError
from persona.lm import BaseLM
from persona.methods import load_personalizer
from persona.personalizer import FORMAT_VERSION, LanguageModel, Personalizer, read_manifest, save
from persona.types import Message, Persona, Request, Sampling

TEXTS = ("the fox", "what do you think of the red house by the river ?", "good morning", "small boats")


def requests(**sampling) -> list[Request]:
    people = [Persona(id=str(i)) for i in range(len(TEXTS))]
    return [
        Request((Message("user", text),), person, Sampling(max_new_tokens=5, **sampling), ("a dog", "rain ?"))
        for text, person in zip(TEXTS, people, strict=True)
    ]


class Says(Personalizer):
    """First door: appends words to the last message."""

    method = "says"

    def __init__(self, words: str):
        self.words = words

    def prompt(self, requests: Sequence[Request]) -> list[Request]:
        return [
            Request((Message("user", f"{r.messages[-1].content} {self.words}"),), r.persona, r.sampling, r.options)
            for r in requests
        ]


class Front(Personalizer):
    """Second door: `vectors` in front of the requests of the persons in `of`."""

    method = "front"

    def __init__(self, vectors: torch.Tensor, of: Sequence[str] = ("0", "1", "2", "3")):
        self.vectors, self.of = vectors, set(of)

    def embeddings(self, requests: Sequence[Request]) -> list[torch.Tensor | None]:
        return [self.vectors if r.persona and r.persona.id in self.of else None for r in requests]

    def config(self) -> dict:
        return {"of": sorted(self.of)}

    def write(self, folder: Path) -> None:
        save_file({"vectors": self.vectors}, folder / "vectors.safetensors")

    @classmethod
    def load(cls, folder: Path, config: dict, base: BaseLM) -> Front:
        return cls(load_file(folder / "vectors.safetensors")["vectors"], config["of"])


class Adds(Personalizer):
    """Third door: adds `by` to the output of the first decoder block for the persons in `of`; keeps a record."""

    method = "adds"

    def __init__(self, base: BaseLM, by: float, of: Sequence[str] = ("0", "1", "2", "3")):
        self.block, self.by, self.of, self.seen, self.open = base.model.model.layers[0], by, set(of), [], 0

    @contextmanager
    def modules(self, requests: Sequence[Request]):
        self.seen.append([r.messages[-1].content for r in requests])
        amount = torch.tensor([self.by if r.persona and r.persona.id in self.of else 0.0 for r in requests])
        handle = self.block.register_forward_hook(lambda module, args, output: output + amount[:, None, None])
        self.open += 1
        try:
            yield
        finally:
            handle.remove()
            self.open -= 1


def vectors(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


def flat(scores: list[list[float]]) -> list[float]:
    return [score for row in scores for score in row]


# ---- the stack -----------------------------------------------------------------------------------------------------


def test_an_empty_stack_is_the_base(llama):
    model = persona.load(llama)
    by_hand = [Request((Message("user", text),), options=("a dog", "rain ?")) for text in TEXTS]
    assert flat(model.choose(requests())) == flat(LanguageModel(llama).choose(by_hand))


def test_prompts_pass_the_stack_in_order(llama):
    prompts = LanguageModel(llama, [Says("one"), Says("two")]).prompts(requests())
    expected = [llama.render((Message("user", f"{text} one two"),)) for text in TEXTS]
    assert prompts == expected


def test_vectors_stand_in_stack_order_and_none_leaves_a_row_alone(llama):
    a, b = vectors(2, 1), vectors(1, 2)
    rows = LanguageModel(llama, [Front(a, of="02"), Front(b, of="01")]).rows(requests())
    assert torch.equal(rows[0].prefix, torch.cat([a, b]))
    assert torch.equal(rows[1].prefix, b) and torch.equal(rows[2].prefix, a) and rows[3].prefix is None


def test_edits_add_up_and_see_the_rows_of_their_forward(llama):
    one, two = Adds(llama, 0.5, of="01"), Adds(llama, 1.0, of="12")
    model = LanguageModel(llama, [one, two], batch_size=2)
    scores = model.choose(requests())
    for i, by in enumerate((0.5, 1.5, 1.0, 0.0)):
        alone = LanguageModel(llama, [Adds(llama, by)]).choose(requests()[i : i + 1])[0]
        assert scores[i] == pytest.approx(alone, abs=1e-4)
    assert {text for batch in one.seen for text in batch} == set(TEXTS) and max(map(len, one.seen)) > 1
    assert len({tuple(row) for row in scores}) == 4


def test_the_later_doors_see_the_request_as_the_user_made_it(llama):
    adds = Adds(llama, 1.0)
    LanguageModel(llama, [Says("one"), adds]).choose(requests()[:1])
    assert all(text == TEXTS[0] for batch in adds.seen for text in batch)


@pytest.mark.parametrize("ask", ("respond", "choose", "loglikelihood"))
def test_all_doors_together_do_not_depend_on_company(llama, ask):
    model = LanguageModel(llama, [Says("one"), Front(vectors(2), of="03"), Adds(llama, 1.0, of="13")])
    extra = (["a", "good day", "rain", "fox"],) if ask == "loglikelihood" else ()
    together = getattr(model, ask)(requests(), *extra)
    for i, request in enumerate(requests()):
        alone = getattr(model, ask)([request], *([x[i]] for x in extra))[0]
        if ask == "respond":
            assert together[i].tokens == alone.tokens
        else:
            assert list(together[i]) == pytest.approx(list(alone), abs=1e-4)
    assert getattr(model, ask)([], *([] for _ in extra)) == []


def test_a_reply_goes_on_from_its_prefill(llama, t5):
    model, plain = LanguageModel(llama, [Says("one")]), requests()
    begun = [replace(request, prefill=f"the fox {i}") for i, request in enumerate(plain)]
    for prompt, without, request in zip(model.prompts(begun), model.prompts(plain), begun, strict=True):
        assert llama.tokenizer.decode(prompt) == llama.tokenizer.decode(without) + request.prefill
    whole = [response.tokens for response in model.respond(begun)]
    assert whole != [response.tokens for response in model.respond(plain)]
    assert [model.respond([request])[0].tokens for request in begun] == whole
    with pytest.raises(UserError, match="cannot go on with a reply that has begun: it is an encoder-decoder LM"):
        LanguageModel(t5).respond(begun)


def test_everything_is_undone_after_an_exception(llama):
    class Fails(Personalizer):
        @contextmanager
        def modules(self, requests):
            raise RuntimeError("the third door fails")
            yield

    adds, plain = Adds(llama, 1.0), flat(LanguageModel(llama).choose(requests()))
    with pytest.raises(RuntimeError, match="third door"):
        LanguageModel(llama, [adds, Fails()]).choose(requests())
    assert adds.seen and adds.open == 0 and not llama.model.model.layers[0]._forward_hooks
    assert flat(LanguageModel(llama).choose(requests())) == plain


def test_room_for_vectors_and_reply_is_each_rows_own(llama):
    """A row is cut for its own vectors and its own reply, not for those of the rows beside it."""
    long = Message("user", " ".join(TEXTS * 3))
    one = Request((long,), Persona("0"), Sampling(max_new_tokens=5), ("a",))
    two = Request((long,), Persona("1"), Sampling(max_new_tokens=40), ("a dog " * 8,))
    model = LanguageModel(llama, [Front(vectors(20), of="0")], max_length=70)
    assert model.choose([one, two]) == [pytest.approx(model.choose([alone])[0], abs=1e-4) for alone in (one, two)]
    assert [len(row.prompt) for row in model.rows([one, two])] == [70 - 20 - 5, 70 - 40]


def test_what_prompts_lose_is_said_of_each_and_warned_of_once(llama, caplog):
    short, long = Message("user", TEXTS[0]), Message("user", " ".join(TEXTS))
    asked = [Request((text,), sampling=Sampling(max_new_tokens=5), options=("a",)) for text in (short, long, short)]
    whole = [len(llama.render(request.messages)) for request in asked]
    model = LanguageModel(llama, max_length=whole[1] - 2)
    model.respond(asked)
    assert model.cut == (0, 2 + 5, 0)
    model.choose(asked[1:])
    assert model.cut == (2 + 1, 0)
    assert LanguageModel(llama).respond(asked) and [record.levelname for record in caplog.records] == ["WARNING"]
    room = f"a prompt of {whole[1]} tokens does not fit the {whole[1] - 2} positions"
    assert room in caplog.text and "cut by 7 tokens (said once" in caplog.text


# ---- on disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(llama, tmp_path) -> Path:
    return save(Front(vectors(2), of="02"), llama, tmp_path / "front", [Says("x")])


def test_manifest_names_everything(llama, saved):
    manifest = read_manifest(saved, llama)
    assert manifest["format_version"] == FORMAT_VERSION and manifest["method"] == "front"
    assert manifest["base"] == llama.identity and manifest["config"] == {"of": ["0", "2"]}
    assert list(manifest["files"]) == ["vectors.safetensors"] and manifest["trained_on_top_of"] == ["says"]
    assert sorted(path.name for path in saved.iterdir()) == ["personalizer.json", "vectors.safetensors"]


def test_round_trip_gives_the_same_numbers(llama, saved):
    manifest = read_manifest(saved, llama)
    again = Front.load(saved, manifest["config"], llama)
    expected = LanguageModel(llama, [Front(vectors(2), of="02")]).choose(requests())
    assert LanguageModel(llama, [again]).choose(requests()) == expected
    assert expected != LanguageModel(llama).choose(requests())


def test_saving_replaces_what_was_there(llama, saved):
    (saved / "stray.txt").write_text("left over")
    save(Front(vectors(3), of="1"), llama, saved)
    assert sorted(path.name for path in saved.iterdir()) == ["personalizer.json", "vectors.safetensors"]
    assert read_manifest(saved, llama)["config"] == {"of": ["1"]}
    assert [path.name for path in saved.parent.iterdir()] == ["front"]


def test_a_copy_elsewhere_and_another_dtype_fit(llama, saved, model_folder, tmp_path):
    from persona import lm

    moved = shutil.copytree(saved, tmp_path / "elsewhere" / "copy")
    assert read_manifest(moved, lm.load(lm.ModelConfig(str(model_folder("llama")), dtype="bfloat16", device="cpu")))


def test_another_base(saved, t5, load_base):
    for other in (t5, load_base("qwen3")):
        with pytest.raises(UserError, match="was trained on base LM .*llama.* but the base LM here is"):
            read_manifest(saved, other)


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "personalizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("version", (0, FORMAT_VERSION + 1, "1", None))
def test_another_format_version(llama, saved, version):
    edit_manifest(saved, format_version=version, files="of another shape in that version")
    with pytest.raises(UserError, match=f"has format version {version}, this code reads version {FORMAT_VERSION}"):
        read_manifest(saved, llama)


@pytest.mark.parametrize("at", (0, 100, -1))
def test_a_flipped_byte(llama, saved, at):
    path = saved / "vectors.safetensors"
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="vectors.safetensors is not the file that was saved"):
        read_manifest(saved, llama)


def test_a_missing_file(llama, saved):
    (saved / "vectors.safetensors").unlink()
    with pytest.raises(UserError, match="lacks its file vectors.safetensors"):
        read_manifest(saved, llama)


@pytest.mark.parametrize("name", ("../outside", "/etc/hostname", "inside/../../outside", "link"))
def test_a_path_out_of_the_directory(llama, saved, name):
    (saved.parent / "outside").write_text("secret")
    (saved / "link").symlink_to(saved.parent / "outside")
    edit_manifest(saved, files={name: "0" * 64})
    with pytest.raises(UserError, match="lies outside its own directory"):
        read_manifest(saved, llama)


@pytest.mark.parametrize(
    "content",
    (
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"{}",
        b'{"format_version": 1}',
        b'{"format_version": 1, "files": 3}',
    ),
)
def test_a_broken_manifest(llama, saved, content):
    (saved / "personalizer.json").write_bytes(content)
    with pytest.raises(UserError, match="personalizer.json is damaged"):
        read_manifest(saved, llama)


@pytest.mark.parametrize("key", ("method", "base", "config", "files"))
def test_a_manifest_without_a_key(llama, saved, key):
    manifest = json.loads((saved / "personalizer.json").read_text())
    del manifest[key]
    (saved / "personalizer.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"personalizer.json is damaged.*{key}"):
        read_manifest(saved, llama)


def test_what_is_not_a_personalizer(llama, tmp_path):
    for what in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="is not a personalizer: it has no personalizer.json"):
            read_manifest(what, llama)


def test_unknown_methods_name_the_nearest(llama, saved):
    edit_manifest(saved, method="persona_plugg")
    with pytest.raises(UserError, match="no personalizer 'persona_plugg': did you mean 'persona_plug'"):
        load_personalizer(saved, llama)
    with pytest.raises(UserError, match="one {name: settings} entry"):
        load_personalizer({"a": {}, "b": {}}, llama)


# ---- full disks and closed doors -----------------------------------------------------------------------------------


def in_child(before: Callable[[], None], act: Callable[[], object]) -> str:
    """What a forked process says that first gives up rights or space for good and then acts."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            before()
            act()
            told = "done"
        except UserError as error:
            told = f"told: {error}"
        except BaseException as error:
            told = f"crashed: {error!r}"
        os.write(write, told.encode())
        os._exit(0)
    os.close(write)
    with open(read) as stream:
        told = stream.read()
    os.waitpid(child, 0)
    return told


def save_large(llama: BaseLM, folder: Path) -> Path:
    """Two and a half megabytes."""
    return save(Front(torch.zeros(20000, 32)), llama, folder)


def test_a_full_disk_leaves_the_old_directory_intact(llama, saved):
    """A real limit of the kernel on file size: the 2.5 MB of the new weights do not fit into 1 MB."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    told = in_child(limit, lambda: save_large(llama, saved))
    assert told.startswith(f"told: {saved} could not be written") and "what stood there before is unchanged" in told
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["front"], "a temporary folder was left behind"
    read_manifest(saved, llama)


def test_a_full_file_system_leaves_the_old_directory_intact(llama, tmp_path):
    """The same on a file system of 1 MB, where that can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]).returncode:
        pytest.skip("no small file system can be mounted here")
    try:
        folder = save(Front(vectors(2)), llama, disk / "front")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match="could not be written.*unchanged") as caught:
            save_large(llama, folder)
        assert "\n" not in str(caught.value)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in disk.iterdir()] == ["front"]
        save(Front(vectors(3)), llama, folder)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_no_permission_to_write(llama, saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def drop():
        if os.geteuid() == 0:  # root may write anywhere, so the process that saves becomes somebody else
            os.chdir("/")
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)

    reached = [path for path in saved.parents if path.stat().st_mode & 0o7777 == 0o700]
    for path in reached:
        path.chmod(0o711)
    saved.parent.chmod(0o555)
    try:
        told = in_child(drop, lambda: save_large(llama, saved))
        told_elsewhere = in_child(drop, lambda: save_large(llama, saved.parent / "new" / "front"))
    finally:
        for path in reached:
            path.chmod(0o700)
        saved.parent.chmod(0o755)
    assert told.startswith(f"told: {saved} could not be written: Permission denied")
    assert "could not be written: Permission denied" in told_elsewhere
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["front"]


def test_others_may_read_what_is_saved(saved):
    mask = os.umask(0)
    os.umask(mask)
    for path in saved.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path.name
