"""Files of other programs: the published hub layout, GGUF and safetensors, there and back again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from persona.errors import UserError
from persona.lm import BaseLM
from persona.lm.edits import cap as capped
from persona.lm.edits import edited
from persona.methods.assistant_axis.interchange import (
    AxisFile,
    Cap,
    main,
    read,
    read_hub,
    write_gguf,
    write_hub,
    write_plain,
)
from persona.methods.assistant_axis.personalizer import AssistantAxis, EditSettings
from persona.personalizer import save

LAYERS, HIDDEN = 6, 5


def vectors(seed: int) -> torch.Tensor:
    return torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def content() -> AxisFile:
    axis = vectors(0)
    caps = [
        Cap("layers_2:5-p0.25", {layer: axis[layer] for layer in (2, 3, 4)}, {2: 0.5, 3: -0.25, 4: 1.0}),
        Cap("layers_4:6-p0.5", {layer: axis[layer] for layer in (4, 5)}, {4: 0.125, 5: 0.0}),
    ]
    roles = {"ghost": vectors(2), "judge": vectors(3)}
    return AxisFile(axis, vectors(1), roles, {"calm": vectors(4)}, {cap.id: cap for cap in caps})


def same(one: AxisFile, other: AxisFile) -> bool:
    def plain(file: AxisFile) -> dict[str, Any]:
        named = {f"role {name}": value for name, value in file.roles.items()}
        named |= {f"trait {name}": value for name, value in file.traits.items()}
        return {name: value.tolist() for name, value in {**named, "axis": file.axis, "default": file.default}.items()}

    return plain(one) == plain(other)


# ---- the hub layout ------------------------------------------------------------------------------------------------


def publish(folder: Path, change: Callable[[dict[str, Any]], None] = lambda config: None) -> Path:
    """As on the hub: bare bfloat16 tensors, and ceilings on vectors that point from the assistant to the roles."""
    axis = vectors(0).bfloat16()
    (folder / "role_vectors").mkdir(parents=True)
    torch.save(axis, folder / "assistant_axis.pt")
    torch.save(vectors(1).bfloat16(), folder / "default_vector.pt")
    torch.save(vectors(2).bfloat16(), folder / "role_vectors" / "ghost.pt")
    named = {
        f"layer_{layer}/contrast_role_pos3_default1": {"layer": layer, "vector": -axis[layer].float()}
        for layer in range(LAYERS)
    }
    ceilings = [{"vector": f"layer_{layer}/contrast_role_pos3_default1", "cap": -0.5 - layer} for layer in (2, 3)]
    config = {"vectors": named, "experiments": [{"id": "layers_2:4-p0.25", "interventions": ceilings}]}
    change(config)
    torch.save(config, folder / "capping_config.pt")
    return folder


def test_published_ceilings_on_negated_vectors_become_floors_on_the_axis(tmp_path: Path) -> None:
    found = read(publish(tmp_path / "hub"))
    assert found.axis.dtype == torch.float32 and torch.equal(found.axis, vectors(0).bfloat16().float())
    assert list(found.roles) == ["ghost"] and not found.traits and found.default is not None
    (cap,) = found.caps.values()
    assert cap.floors == {2: 2.5, 3: 3.5}
    assert all(torch.equal(direction, found.axis[layer]) for layer, direction in cap.directions.items())


def test_hub_layout_there_and_back(tmp_path: Path, content: AxisFile) -> None:
    write_hub(tmp_path / "hub", content)
    again = read_hub(tmp_path / "hub")
    assert same(again, content)
    assert {id: cap.floors for id, cap in again.caps.items()} == {id: cap.floors for id, cap in content.caps.items()}
    for id, cap in content.caps.items():
        assert {n: v.tolist() for n, v in again.caps[id].directions.items()} == {
            n: v.tolist() for n, v in cap.directions.items()
        }
    stored = torch.load(tmp_path / "hub" / "capping_config.pt", weights_only=True)
    assert torch.equal(stored["vectors"]["layer_3/contrast_role_pos3_default1"]["vector"], -content.axis[3])
    assert stored["experiments"][0]["interventions"][0] == {
        "vector": "layer_2/contrast_role_pos3_default1", "cap": -0.5,
    }  # fmt: skip
    with pytest.raises(UserError, match="exists"):
        write_hub(tmp_path / "hub", content)


def test_a_published_cap_does_what_was_published(tmp_path: Path) -> None:
    """The published operation on what is stored, worked out here, against the floors that are read from it."""
    (found,) = read_hub(publish(tmp_path / "hub")).caps.values()
    stored = torch.load(tmp_path / "hub" / "capping_config.pt", weights_only=True)
    hidden = 3 * torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(9))
    for one in stored["experiments"][0]["interventions"]:
        entry = stored["vectors"][one["vector"]]
        v = entry["vector"] / entry["vector"].norm()
        published = hidden - (hidden @ v - one["cap"]).clamp(min=0)[:, None] * v
        ours = capped(hidden, found.directions[entry["layer"]], floor=found.floors[entry["layer"]])
        assert 20 < int((ours != hidden).any(dim=1).sum()) < 200
        assert (ours - published).abs().max() < 1e-5


def test_a_cap_that_was_written_and_read_acts_the_same(tmp_path: Path, llama: BaseLM) -> None:
    axis = torch.randn(2, llama.hidden_size, generator=torch.Generator().manual_seed(3))
    cap = Cap("layers_0:2-p0.25", {0: axis[0], 1: axis[1]}, {0: 0.4, 1: 0.7})
    write_hub(tmp_path / "hub", AxisFile(axis, caps={cap.id: cap}))
    ids = torch.arange(4, 24)[None]
    logits = []
    for edits in ((), cap.edits(), read_hub(tmp_path / "hub").caps[cap.id].edits()):
        with torch.no_grad(), edited(llama.model, edits):
            logits.append(llama.model(input_ids=ids).logits)
    untouched, before, after = logits
    assert torch.equal(before, after) and not torch.equal(before, untouched)


@pytest.mark.parametrize(
    ("settings", "id"),
    [
        ({"layers": "0:2", "quantile": 0.25}, "layers_0:2-p0.25"),
        ({"layers": "1:2", "quantile": 0.25, "quantile_direction": "axis"}, "layers_1:2-p0.75"),
        ({"layers": "0:1", "quantile": 0.01, "raised": 0.5}, "layers_0:1-p0.01-raised0.5"),
    ],
)
def test_the_cap_of_a_personalizer_is_published(
    tmp_path: Path, llama: BaseLM, settings: dict[str, Any], id: str
) -> None:
    generator = torch.Generator().manual_seed(3)
    axis = torch.randn(2, llama.hidden_size, generator=generator)
    percentiles = torch.sort(20 + torch.randn(101, 2, generator=generator), dim=0).values
    tensors = {"axis": axis, "norms": torch.ones(2), "percentiles": percentiles}
    made = AssistantAxis(llama, tensors, EditSettings(**settings))
    save(made, llama, tmp_path / "personalizer")
    main([str(tmp_path / "personalizer"), str(tmp_path / "hub")])
    cap = read_hub(tmp_path / "hub").caps[id]
    ids = torch.arange(4, 24)[None]
    logits = []
    for context in (made.modules([]), edited(llama.model, cap.edits()), nullcontext()):
        with torch.no_grad(), context:
            logits.append(llama.model(input_ids=ids).logits)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_a_personalizer_that_steers_has_no_cap(tmp_path: Path, llama: BaseLM) -> None:
    tensors = {"axis": torch.ones(2, llama.hidden_size), "norms": torch.ones(2)}
    save(AssistantAxis(llama, tensors, EditSettings("steer", strength=0.5)), llama, tmp_path / "personalizer")
    assert read(tmp_path / "personalizer").caps == {}


def test_files_of_the_published_pipeline_are_read_too(tmp_path: Path) -> None:
    folder = publish(tmp_path / "hub")
    torch.save({"axis": vectors(0)}, folder / "assistant_axis.pt")
    torch.save({"vector": vectors(5), "type": "pos_3", "role": "ghost"}, folder / "role_vectors" / "ghost.pt")
    found = read_hub(folder)
    assert torch.equal(found.axis, vectors(0)) and torch.equal(found.roles["ghost"], vectors(5))


def pickled(folder: Path) -> None:
    torch.save(Path("a thing that is no tensor"), folder / "role_vectors" / "ghost.pt")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda f: (f / "assistant_axis.pt").unlink(), r"assistant_axis\.pt could not be read: it is missing"),
        (lambda f: (f / "assistant_axis.pt").write_bytes(b"torn"), "it has to hold tensors and plain values only"),
        (pickled, r"ghost\.pt could not be read: it has to hold tensors and plain values only"),
        (lambda f: torch.save(vectors(0)[0], f / "assistant_axis.pt"), r"one tensor \[layers, hidden\].*shape \[5\]"),
        (lambda f: torch.save(vectors(0)[1:], f / "default_vector.pt"), r"one tensor \[6, 5\]: .*shape \[5, 5\]"),
        (lambda f: torch.save([1.0], f / "role_vectors" / "ghost.pt"), "in no form that is known"),
        (lambda f: torch.save(vectors(0) * float("nan"), f / "default_vector.pt"), "not finite"),
    ],
)
def test_hub_files_that_do_not_fit(tmp_path: Path, damage: Callable[[Path], Any], complaint: str) -> None:
    folder = publish(tmp_path / "hub")
    damage(folder)
    with pytest.raises(UserError, match=complaint):
        read_hub(folder)


def rename(config: dict[str, Any], id: str) -> None:
    config["experiments"][0]["id"] = id


def interventions(config: dict[str, Any]) -> list[dict[str, Any]]:
    return config["experiments"][0]["interventions"]


def vector(name: str, layer: int, size: int) -> dict[str, dict[str, Any]]:
    return {name: {"layer": layer, "vector": torch.ones(size)}}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: rename(c, "layers_2:3-p0.25"), "layers 2, 3, and by its name should those from 2 to before 3"),
        (lambda c: interventions(c).append({"vector": "ghost", "cap": 1.0}), "along ghost, and there is no vector"),
        (lambda c: interventions(c).append(interventions(c)[0]), "more than once"),
        (lambda c: c["vectors"].update(vector("layer_9/x", 9, HIDDEN)), "layer_9/x is of layer 9"),
        (lambda c: c["vectors"].update(vector("layer_1/x", 2, HIDDEN)), "layer_1/x is of layer 2"),
        (lambda c: c["vectors"].update(vector("x", 2, 3)), r"shape \[3\], where layers 0 to 5"),
        (lambda c: c.pop("vectors"), "not in the published form"),
        (lambda c: interventions(c)[0].pop("cap"), "not in the published form"),
    ],
)  # fmt: skip
def test_caps_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Any]], Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        read_hub(publish(tmp_path / "hub", change))


def test_cap_that_keeps_away_from_the_assistant_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def flip(config: dict[str, Any]) -> None:
        config["vectors"]["layer_3/contrast_role_pos3_default1"]["vector"] *= -1

    assert not caplog.records
    found = read_hub(publish(tmp_path / "hub", flip))
    assert "away from the assistant in layers [3]" in caplog.text
    assert found.caps["layers_2:4-p0.25"].floors[3] == 3.5  # it stays the operation that was published


def test_what_the_hub_layout_cannot_hold(tmp_path: Path, content: AxisFile) -> None:
    other = Cap("layers_2:3-p0.5", {2: content.axis[3]}, {2: 0.0})
    with pytest.raises(UserError, match="direction of its own in layer 2"):
        write_hub(tmp_path / "hub", AxisFile(content.axis, caps={**content.caps, other.id: other}))
    with pytest.raises(UserError, match="cannot be a file"):
        write_hub(tmp_path / "hub", AxisFile(content.axis, roles={"../ghost": content.axis}))
    assert not list(tmp_path.iterdir())


# ---- safetensors and GGUF ------------------------------------------------------------------------------------------


def test_safetensors_there_and_back(tmp_path: Path, content: AxisFile) -> None:
    write_plain(tmp_path / "axis.safetensors", content)
    assert same(read(tmp_path / "axis.safetensors"), content) and same(read(tmp_path), content)


def test_vectors_of_the_methods_stages_are_found_beside_the_axis(tmp_path: Path, content: AxisFile) -> None:
    from safetensors.torch import save_file

    save_file({"axis": content.axis, "norms": torch.ones(LAYERS)}, tmp_path / "axis.safetensors")
    named = {"fully/ghost": vectors(2), "somewhat/ghost": vectors(3), "traits/calm": vectors(4)}
    save_file(named, tmp_path / "vectors.safetensors")
    found = read(tmp_path)
    assert torch.equal(found.roles["ghost"], vectors(2)) and torch.equal(found.traits["calm"], vectors(4))
    assert len(found.roles) == len(found.traits) == 1 and found.default is None


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"pole": torch.ones(2, 3)}, r'no tensor "axis" \[layers, hidden\], but pole'),
        ({"axis": torch.ones(3)}, 'no tensor "axis"'),
        ({"axis": torch.ones(2, 3), "roles/ghost": torch.ones(3, 3)}, r"roles/ghost has the shape \[3, 3\]"),
        ({"axis": torch.full((2, 3), float("inf"))}, "finite"),
    ],
)
def test_safetensors_that_do_not_fit(tmp_path: Path, tensors: dict[str, torch.Tensor], complaint: str) -> None:
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=complaint):
        read(tmp_path / "odd.safetensors")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "odd.safetensors").write_bytes(b"odd")
    for name in ("odd.safetensors", "missing.safetensors"):
        with pytest.raises(UserError, match="could not be read as safetensors"):
            read(tmp_path / name)


def test_gguf_is_read_back_by_its_own_reader(tmp_path: Path, content: AxisFile) -> None:
    gguf = pytest.importorskip("gguf")
    write_gguf(tmp_path / "axis.gguf", content.axis.bfloat16(), range(2, 5), "qwen3")
    reader = gguf.GGUFReader(tmp_path / "axis.gguf")
    assert [tensor.name for tensor in reader.tensors] == ["direction.2", "direction.3", "direction.4"]
    for layer, tensor in zip((2, 3, 4), reader.tensors, strict=True):
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert torch.equal(torch.tensor(tensor.data), content.axis[layer].bfloat16().float())
    names = ("general.architecture", "controlvector.model_hint", "controlvector.layer_count")
    assert [reader.get_field(name).contents() for name in names] == ["controlvector", "qwen3", 3]
    for layers, complaint in ((range(0, 2), "and no 0"), (range(5, 7), "and no 6"), (range(0), "at least one layer")):
        with pytest.raises(UserError, match=complaint):
            write_gguf(tmp_path / "no.gguf", content.axis, layers, "qwen3")


def test_gguf_without_its_package(tmp_path: Path, content: AxisFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'persona\[gguf\]'"):
        write_gguf(tmp_path / "axis.gguf", content.axis, [1], "qwen3")


def test_command(tmp_path: Path, content: AxisFile, capsys: pytest.CaptureFixture[str]) -> None:
    write_hub(tmp_path / "hub", content)
    main([str(tmp_path / "hub"), str(tmp_path / "axis.safetensors")])
    main([str(tmp_path / "axis.safetensors"), str(tmp_path / "again")])
    assert same(read(tmp_path / "again"), content)
    assert "6 layers of 5, 2 roles, 1 traits" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "axis.safetensors"), str(tmp_path / "axis.gguf"), "--layers", "2-4"])
    assert stopped.value.code == 2 and 'say 46:54, not "2-4"' in capsys.readouterr().err
