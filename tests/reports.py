"""The demo's stack from seeds in its shipped layout, for the report: the tasks' own files, by the pack's loaders."""

from __future__ import annotations

import shutil
from pathlib import Path

import comfy.sd
import numpy as np
import prompters
import stacks
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.nodes.loaders import face_analyzer
from comfyui_likeness.tools import standin_faces, standin_flashface
from comfyui_likeness.training.adapters import readers
from comfyui_likeness.training.base import clip, unet, vae
from comfyui_likeness.training.omni_id import encoder
from comfyui_likeness.training.report import rows
from comfyui_likeness.training.report.stack import Stack
from comfyui_likeness.training.task import chance
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")
DETECTED, SIDE = 640, 128  # pixels of the detector's picture, and of the world's
PLACES = ((40, 48), (88, 48))  # the middles of the faces that the detector sees in every picture
HALF = 18  # of a face's box
POINTS = ((-7, -6), (7, -6), (0, 2), (-6, 9), (6, 9))  # from its middle
STEPS = 2
OMNI = rows.OMNI.format("")
ADAPTERS = {rows.FACEID: "arcface", rows.IMAGE: "image", rows.FUSED: "clean", rows.INFINITE: "infinite", OMNI: "omni"}
HOSTS = {"arcface": "ipadapter", "image": "ipadapter"}  # folders of the host's; of the pack's own, likeness


def detector(path: Path) -> None:
    """A detector in SCRFD's layout that sees a face in the left and one in the right half, whatever there is."""
    from onnx import TensorProto, helper

    graph, scale, inputs = standin_faces.Graph(), DETECTED // SIDE, []
    names: list[tuple[str, int]] = []
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        for stride in standin_faces.STRIDES:
            cells = DETECTED // stride
            out = np.zeros((2 * cells * cells, width), np.float32)
            for x, y in PLACES if stride == 8 else ():
                at = 2 * (y * scale // stride * cells + x * scale // stride)
                told = {"score": [0.9], "bbox": [HALF] * 4, "kps": np.array(POINTS).flatten()}[kind]
                out[at] = np.array(told) * (1 if kind == "score" else scale / stride)
            name = f"{kind}_{stride}"
            graph("Identity", graph.constant(out), to=name)
            names.append((name, width))
    inputs.append(helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, "?", "?"]))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"rows_{name}", w]) for name, w in names]
    graph.save(path, inputs, outputs)


def reference_net(base: Path, file: Path) -> None:
    """A FlashFace file without a UNet that paints: what reads the faces, and the added layers."""
    plain = {key: tuple(value.shape) for key, value in unet.load(base).diffusion_model.state_dict().items()}
    shapes = standin_flashface.names(plain, 4)
    kept = {key: shape for key, shape in shapes.items() if not key.startswith("ori_") or "self_attn_first" in key}
    tensors = {
        key: torch.randn(shape, generator=chance(i)) / (shape[-1] ** 0.5 if len(shape) > 1 else 10)
        for i, (key, shape) in enumerate(kept.items())
    }
    save_file(tensors, file)


def make(folder: Path, models: Path) -> Stack:
    """Write the base stack into a folder and the adapters into the host's model folders; the whole, loaded."""
    stacks.make(folder)
    for file, kind in ADAPTERS.items():
        place = models / HOSTS.get(kind, "likeness")
        stacks.task(kind, folder).save(place, {"steps": 1})
        (place / "made.safetensors").rename(place / file)
    own = models / "likeness"
    reference_net(folder / unet.FILE, own / rows.FLASHFACE)
    shutil.copyfile(folder / encoder.FILE, own / OMNI.removeprefix("demo_"))
    for kind, file in (("arc2face", rows.ARC2FACE), ("adaface", rows.ADAFACE)):
        stacks.words(kind, folder).save(folder, {})
        shutil.copyfile(folder / f"made_{kind}.safetensors", own / file)
    pack = models / "insightface" / "models" / "demo"
    pack.mkdir(parents=True)
    detector(pack / "detector.onnx")
    (pack / stacks.RECOGNISER).write_bytes((folder / stacks.RECOGNISER).read_bytes())
    width = stacks.TOWERS.width
    words = prompters.clip(width=width, heads=2, layers=2)
    projection = words.cond_stage_model.clip_l.transformer.text_projection.weight
    projection.copy_(torch.randn(projection.shape, generator=chance(0)) / width**0.5)
    return Stack(
        ModelPatcher(unet.load(folder / unet.FILE).eval().requires_grad_(False), CPU, CPU),
        words,
        comfy.sd.VAE(sd=load_file(folder / vae.FILE)),
        readers.load_vision(folder / clip.VISION),
        face_analyzer.load("demo", "cpu")[0],
        readers.ArcFace(folder / stacks.RECOGNISER, "judge"),
        steps=STEPS,
    )
