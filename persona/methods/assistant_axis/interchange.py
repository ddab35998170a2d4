"""Axes and caps in other programs' files: the published hub layout, GGUF control vectors, plain safetensors.

    python -m persona.methods.assistant_axis.interchange assistant-axis-vectors/qwen-3-32b axis.safetensors
    python -m persona.methods.assistant_axis.interchange axis.safetensors axis.gguf --layers 46:54 --model qwen3

Source: a folder in the hub layout, a .safetensors file, or a folder that holds axis.safetensors, such as
`outputs/NAME/personalizer`, which has a cap, or `outputs/NAME/stages/axis`, which has the vectors of roles and traits.
Target, by its name: .gguf, .safetensors, or a folder in the hub layout, which must not exist yet.

A hub folder (reference/assistant_axis 4) has assistant_axis.pt and default_vector.pt [L, H], role_vectors/*.pt and
trait_vectors/*.pt of the same shape, and perhaps capping_config.pt. There a cap is a ceiling on the *negated* axis, in
layers whose end does not belong to the band; here it is a floor on the axis, which is the same thing.
"""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona.errors import UserError
from persona.files import atomic_folder, atomic_write, inside
from persona.lm.edits import Edit
from persona.lm.residual import Site
from persona.methods.assistant_axis.calibration import Band
from persona.methods.assistant_axis.personalizer import band_of, floor_of, settings_of
from persona.personalizer import read_manifest

logger = logging.getLogger(__name__)
PLAIN, VECTORS = "axis.safetensors", "vectors.safetensors"  # what the method's stages and personalizer call them


@dataclass(frozen=True)
class Cap:
    """A floor on the projection onto a direction, in some layers. `directions`: layer -> [H], of any length, pointing
    to the assistant; `floors`: the same layers -> floor, in units of the residual stream."""

    id: str
    directions: Mapping[int, Tensor]
    floors: Mapping[int, float]

    def edits(self) -> list[Edit]:
        """What `persona.lm.edits.edited` takes: the cap at every position, as published."""
        return [Edit(Site(layer), "cap", v, floor=self.floors[layer]) for layer, v in self.directions.items()]


@dataclass(frozen=True)
class AxisFile:
    """What the files hold: vectors [L, H], float32, of the outputs of decoder blocks, and caps, by name."""

    axis: Tensor
    default: Tensor | None = None
    roles: Mapping[str, Tensor] = field(default_factory=dict)
    traits: Mapping[str, Tensor] = field(default_factory=dict)
    caps: Mapping[str, Cap] = field(default_factory=dict)


def read(source: Path | str) -> AxisFile:
    """A hub folder, a .safetensors file or a folder with `axis.safetensors`. Raises UserError for what is none."""
    source = Path(source)
    if source.is_dir() and not (source / PLAIN).is_file():
        return read_hub(source)
    return read_plain(source)


# ---- the hub layout ------------------------------------------------------------------------------------------------


def read_hub(folder: Path | str) -> AxisFile:
    """A folder in the published layout. Nothing in it is executed: tensors are loaded, and plain values around them.

    Raises UserError for files that are missing, cannot be read, or whose shapes, layers or ids do not fit together.
    """
    folder = Path(folder)
    axis = _vector(folder / "assistant_axis.pt", None)
    default = folder / "default_vector.pt"
    roles, traits = (
        {file.stem: _vector(file, axis) for file in sorted((folder / part).glob("*.pt"))}
        for part in ("role_vectors", "trait_vectors")
    )
    caps = folder / "capping_config.pt"
    return AxisFile(
        axis,
        _vector(default, axis) if default.exists() else None,
        roles,
        traits,
        _caps(caps, axis) if caps.exists() else {},
    )


def write_hub(folder: Path | str, content: AxisFile) -> None:
    """The published layout, in float32 (published files are rounded to bfloat16), caps as ceilings on negated vectors.

    Raises UserError where `folder` exists, for names that are no file names, and where two caps have different
    directions in one layer: the layout names them by their layer.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists: name a folder that is to be made")
    if odd := [name for name in (*content.roles, *content.traits) if Path(name).name != name]:
        raise UserError(f'a role or trait called "{odd[0]}" cannot be a file of that name')
    vectors: dict[str, dict[str, Any]] = {}
    experiments = []
    for cap in content.caps.values():
        interventions = []
        for layer, direction in cap.directions.items():
            name = f"layer_{layer}/contrast_role_pos3_default1"
            there = vectors.setdefault(name, {"layer": layer, "vector": -direction.float()})
            if not torch.equal(there["vector"], -direction.float()):
                raise UserError(f"{cap.id} has a direction of its own in layer {layer}: a hub folder has one for each")
            interventions.append({"vector": name, "cap": -float(cap.floors[layer])})
        experiments.append({"id": cap.id, "interventions": interventions})
    with atomic_folder(folder) as new:
        torch.save(content.axis.float(), new / "assistant_axis.pt")
        if content.default is not None:
            torch.save(content.default.float(), new / "default_vector.pt")
        for part, named in (("role_vectors", content.roles), ("trait_vectors", content.traits)):
            (new / part).mkdir()
            for name, vector in named.items():
                torch.save(vector.float().clone(), inside(new / part, f"{name}.pt"))
        if experiments:
            torch.save({"vectors": vectors, "experiments": experiments}, new / "capping_config.pt")


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file ends in any of them
        reason = "it is missing" if not path.exists() else "it has to hold tensors and plain values only"
        raise UserError(f"{path} could not be read: {reason}") from error


def _vector(path: Path, axis: Tensor | None) -> Tensor:
    """A tensor [L, H] of `axis`'s shape, bare or under the key that the published pipeline gives it."""
    value = _load(path)
    if isinstance(value, dict):
        value = value.get("vector", value.get("axis"))
    wanted = "[layers, hidden]" if axis is None else str(list(axis.shape))
    if not isinstance(value, Tensor) or value.ndim != 2 or (axis is not None and value.shape != axis.shape):
        found = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else "in no form that is known"
        raise UserError(f"{path} has to hold one tensor {wanted}: what it holds is {found}")
    if not torch.isfinite(value).all():
        raise UserError(f"{path} has values that are not finite")
    return value.float()


def _caps(path: Path, axis: Tensor) -> dict[str, Cap]:
    config = _load(path)
    try:
        stored = {name: (int(entry["layer"]), entry["vector"].float()) for name, entry in config["vectors"].items()}
        experiments = [
            (str(entry["id"]), [(str(one["vector"]), float(one["cap"])) for one in entry["interventions"]])
            for entry in config["experiments"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f'{path} is not in the published form {{"vectors": {{name: {{"layer", "vector"}}}}, "experiments": '
            f'[{{"id", "interventions": [{{"vector", "cap"}}]}}]}}: {error!r}'
        ) from error
    layers, hidden = axis.shape
    for name, (layer, vector) in stored.items():
        named = re.match(r"layer_(\d+)/", name)
        if not 0 <= layer < layers or vector.shape != (hidden,) or (named and int(named[1]) != layer):
            raise UserError(
                f"{path}: the vector {name} is of layer {layer} and has the shape {list(vector.shape)}, where layers "
                f"0 to {layers - 1} have vectors [{hidden}]"
            )
    caps = {}
    for id, interventions in experiments:
        if unknown := [name for name, _ in interventions if name not in stored]:
            raise UserError(f"{path}: {id} caps along {unknown[0]}, and there is no vector of that name")
        capped = [stored[name][0] for name, _ in interventions]
        if len(set(capped)) < len(capped):
            raise UserError(f"{path}: {id} caps one layer more than once")
        band = re.match(r"layers_(\d+):(\d+)", id)
        if band and sorted(capped) != list(range(int(band[1]), int(band[2]))):
            raise UserError(
                f"{path}: {id} caps the layers {', '.join(map(str, sorted(capped)))}, and by its name should those "
                f"from {band[1]} to before {band[2]}"
            )
        directions = {stored[name][0]: -stored[name][1] for name, _ in interventions}
        away = [layer for layer, direction in directions.items() if direction @ axis[layer] < 0]
        if away:
            logger.warning("%s: %s keeps states away from the assistant in layers %s", path, id, away)
        caps[id] = Cap(id, directions, {stored[name][0]: -cap for name, cap in interventions})
    return caps


# ---- plain safetensors ---------------------------------------------------------------------------------------------


def read_plain(path: Path | str) -> AxisFile:
    """`axis` [L, H], and of the same shape `default`, `roles/<name>` and `traits/<name>` where they are there.

    Of a .safetensors file, or of a folder's axis.safetensors; then also of vectors.safetensors beside it, where roles
    are `fully/<name>`, and a personalizer's cap. Other tensors are passed over. Raises UserError for files that cannot
    be read or do not fit.
    """
    path = Path(path)
    files = [path] if not path.is_dir() else [path / PLAIN, *filter(Path.exists, [path / VECTORS])]
    tensors = {name: value for file in files for name, value in _tensors(file).items()}
    if "axis" not in tensors or tensors["axis"].ndim != 2:
        held = ", ".join(sorted(tensors)[:5]) or "nothing"
        raise UserError(f'{files[0]} has no tensor "axis" [layers, hidden], but {held}')
    axis = tensors["axis"].float()
    parts: dict[str, dict[str, Tensor]] = {"roles": {}, "traits": {}}
    for name, value in tensors.items():
        part, _, rest = name.replace("fully/", "roles/", 1).partition("/")
        if part not in ("axis", "default", *parts):
            continue
        if value.shape != axis.shape or not torch.isfinite(value).all():
            raise UserError(
                f"{path}: {name} has the shape {list(value.shape)}, and should have that of the axis, "
                f"{list(axis.shape)}, and finite values"
            )
        if part in parts:
            parts[part][rest] = value.float()
    caps = _own_cap(path, tensors) if (path / "personalizer.json").is_file() else {}
    return AxisFile(axis, tensors.get("default"), parts["roles"], parts["traits"], caps)


def _own_cap(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Cap]:
    """The cap of a personalizer of this method, none where it steers. Its id counts quantiles as published ones do."""
    settings = settings_of(read_manifest(folder)["config"])
    if settings.mode != "cap":
        return {}
    if settings.positions != "all":
        logger.warning("%s caps at the %s positions only, which other files do not say", folder, settings.positions)
    layers = band_of(settings.layers, len(tensors["axis"]))
    negated = settings.quantile if settings.quantile_direction == "negated" else 1 - settings.quantile
    id = Band(layers.start, layers.stop, round(negated, 2)).id + f"-raised{settings.raised:g}" * bool(settings.raised)
    floors = {layer: floor_of(tensors, settings, layer) for layer in layers}
    return {id: Cap(id, {layer: tensors["axis"][layer].float() for layer in layers}, floors)}


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} could not be read as safetensors: {error}") from error


def write_plain(path: Path | str, content: AxisFile) -> None:
    """The vectors of `content` as `read_plain` finds them. Caps are no tensors and do not go in."""
    tensors = {"axis": content.axis}
    if content.default is not None:
        tensors["default"] = content.default
    tensors |= {f"roles/{name}": vector for name, vector in content.roles.items()}
    tensors |= {f"traits/{name}": vector for name, vector in content.traits.items()}
    with atomic_write(path) as temporary:
        save_file({name: value.float().contiguous() for name, value in tensors.items()}, temporary)


# ---- GGUF ----------------------------------------------------------------------------------------------------------


def write_gguf(path: Path | str, axis: Tensor, layers: Sequence[int], model: str) -> None:
    """Directions of `axis` [L, H] as a control vector in repeng's form, which llama.cpp and EasySteer read.

    A tensor "direction.<layer>" is added to the output of decoder block <layer>, counted from 0: the numbering of this
    code. llama.cpp refuses direction.0, so layer 0 cannot be written. Vectors have the length they have here: what is
    added at strength 1. `model` is the architecture, for the reader's information. Raises UserError without the
    package gguf, and for layers that cannot be written.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files are written by the package gguf: pip install 'persona[gguf]'") from error
    if odd := [layer for layer in layers if not 0 < layer < len(axis)]:
        raise UserError(
            f"a control vector in GGUF has layers from 1 to the model's last, here {len(axis) - 1}, and no {odd[0]}"
        )
    if not layers:
        raise UserError("a control vector needs at least one layer")
    with atomic_write(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", model)
        writer.add_uint32("controlvector.layer_count", len(layers))
        for layer in layers:
            writer.add_tensor(f"direction.{layer}", axis[layer].float().numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Read one form and write another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--layers", help="for .gguf: FIRST:LAST + 1, all but layer 0 if left out")
    parser.add_argument("--model", default="unknown", help="for .gguf: the architecture's name")
    given = parser.parse_args(arguments)
    try:
        content = read(given.source)
        if given.target.suffix == ".gguf":
            write_gguf(given.target, content.axis, _range(given.layers, len(content.axis)), given.model)
        elif given.target.suffix == ".safetensors":
            write_plain(given.target, content)
        else:
            write_hub(given.target, content)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    layers, hidden = content.axis.shape
    print(f"{given.target}: {layers} layers of {hidden}, {len(content.roles)} roles, {len(content.traits)} traits")


def _range(text: str | None, layers: int) -> range:
    if text is None:
        return range(1, layers)
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal()):
        raise UserError(f'layers are given as "<first>:<last + 1>", say 46:54, not "{text}"')
    return range(int(first), int(stop))


if __name__ == "__main__":
    main()
