"""A base stack from seeds in its own files, with SD1.5's sixteen cross-attentions, shards of a few drawn people, and
the tasks that train adapters for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from comfyui_likeness.likeness import own_file
from comfyui_likeness.likeness.faces import head
from comfyui_likeness.likeness.spec import Face
from comfyui_likeness.nodes.loaders import files
from comfyui_likeness.nodes.photos import Taken
from comfyui_likeness.training import data
from comfyui_likeness.training.adaface import compose, inverter, teacher
from comfyui_likeness.training.adaface.faces import FaceTask
from comfyui_likeness.training.adapters import decoupled, fused, infinite_id
from comfyui_likeness.training.adapters.stack import AdapterTask
from comfyui_likeness.training.base import clip, recogniser, unet, vae
from comfyui_likeness.training.base.portraits import Shards
from comfyui_likeness.training.omni_id import encoder, flow
from comfyui_likeness.training.task import start
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainings import DISCS

SIDE = 128
# The vision tower is of the demo's own size, by which the pack knows it.
TOWERS = clip.Settings(width=32, layers=1, heads=2, vision_width=128, vision_layers=4, vision_heads=4)
UNET: dict[str, Any] = {"side": SIDE, "channels": 32, "levels": (1, 1, 2, 1), "depth": (1, 1, 1, 0), "heads": 2}
UNET |= {"checkpointing": True}  # as a large one is trained
FACES = recogniser.Settings(width=4, depth=4, people=2)
# A trunk of four heads, and tokens of their own width.
OMNI = encoder.Sizes(features=128, patch=28, layers=2, tokens=6, width=32, heads=2, inner=32)
FILES = {"vae": vae.FILE, "text": clip.TEXT, "unet": unet.FILE}
RECOGNISER = "recogniser.onnx"


def make(folder: Path) -> Path:
    """Write all of it: ten pictures, of three people with three each, and of a pair."""
    vae.Vae(vae.Settings(side=32), DISCS, 1).save(folder, {})
    clip.ClipPair(TOWERS, DISCS, 2).save(folder, {})
    recogniser.Recogniser(FACES, DISCS, 3).save(folder, {})
    encoder.save(encoder.fresh(OMNI, 6), folder, {})
    parts = {name: str(folder / FILES[name]) for name in ("vae", "text")}
    denoiser = unet.TextToImage(unet.Settings(**UNET, **parts), DISCS, 0)
    start(denoiser.model.diffusion_model, 4)  # a fresh one's attentions give 0, and teach nothing
    denoiser.save(folder, {})
    data.write_shards(data.WorldAlbum("train", SIDE, 3), folder, 3, lossless=True)
    data.write_shard(data.WorldAlbum("train", SIDE, 1, figures=2), range(1), folder / "pairs.tar", 1, lossless=True)
    return folder


def velocity(folder: Path, file: Path) -> Path:
    """The stack's UNet in a file that has it say the velocity."""
    settings = (files.told(folder / unet.FILE) or {})["settings"] | {"prediction": "velocity"}
    save_file(load_file(folder / unet.FILE), file, own_file.metadata("unet", "SD1.5", {}, settings=settings))
    return file


def _arcface(folder: Path, **told: Any) -> AdapterTask[Any]:
    own = {"reads": "arcface", "encoder": str(folder / RECOGNISER), "inner": 16}
    return decoupled.Decoupled(decoupled.Settings(**own, **told), Shards(folder), 5)


def _image(folder: Path, **told: Any) -> AdapterTask[Any]:
    own = {"reads": "image", "encoder": str(folder / clip.VISION), "inner": 64, "depth": 1, "heads": 1}
    return decoupled.Decoupled(decoupled.Settings(**own, **told), Shards(folder), 5)


def _infinite(folder: Path, **told: Any) -> AdapterTask[Any]:
    own = {"recogniser": str(folder / RECOGNISER), "vision": str(folder / clip.VISION), "inner": 16}
    return infinite_id.InfiniteID(infinite_id.Settings(**own, **told), Shards(folder), 5)


def _omni(folder: Path, **told: Any) -> AdapterTask[Any]:
    own = {"reads": "omni", "encoder": str(folder / encoder.FILE), "photos": 2}
    return decoupled.Decoupled(decoupled.Settings(**own, **told), Shards(folder), 5)


def _flow(folder: Path, **told: Any) -> AdapterTask[Any]:
    own = {"encoder": str(folder / encoder.FILE), "each": 3, "most": 2, "targets": 3}
    return flow.Flow(flow.Settings(**own, **told), Shards(folder), 5)


def _fused(noise: str) -> Callable[..., AdapterTask[Any]]:
    return lambda folder, **told: fused.Fused(fused.Settings(face=SIDE, noise=noise, **told), Shards(folder), 5)


TASKS: Mapping[str, Callable[..., AdapterTask[Any]]] = {
    "arcface": _arcface, "image": _image, "omni": _omni, "flow": _flow,
    "clean": _fused("clean"), "match": _fused("match"), "infinite": _infinite,
}  # fmt: skip

WORDS: Mapping[str, tuple[Any, Any]] = {
    "arc2face": (teacher.Settings, teacher.Teacher),
    "adaface": (inverter.Settings, inverter.FaceDistillation),
    "compose": (compose.Settings, compose.CompositionDistillation),
}


def task(kind: str, folder: Path, **told: Any) -> AdapterTask[Any]:
    """A task of TASKS on the stack in a folder."""
    parts = {name: str(folder / file) for name, file in FILES.items()}
    return TASKS[kind](folder, file="made", side=SIDE, **parts, **told)


def words(kind: str, folder: Path, **told: Any) -> FaceTask[Any]:
    """A task of WORDS on the stack in a folder, in which a teacher is, unless it is that."""
    settings, task = WORDS[kind]
    parts = {name: str(folder / file) for name, file in FILES.items()}
    own = {"file": f"made_{kind}", "side": SIDE, "pool": 10, "encoder": str(folder / RECOGNISER)}
    if kind != "arc2face":
        own |= {
            name: str(folder / f"made_arc2face{end}")
            for name, end in (("teacher", ".safetensors"), ("teacher_unet", teacher.UNET))
        }
        own |= {"mix": (2.0,), "denoise": 2}
    return task(settings(**{**parts, **own, **told}), Shards(folder), 5)


def taken(view: data.View) -> Taken:
    """A picture as the nodes take it, its face known."""
    face = Face(view.box.float(), view.kps.float(), 1.0)
    return Taken(view.picture.float() / 255, face, (face,), "drawn")


def crop(view: data.View) -> Tensor:
    one = taken(view)
    return head(one.photo, one.face)[0]


def trained(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.named_parameters() if value.requires_grad}
