"""Random models in the layout of the shipped demo stack, for the report: saved by the tasks, loaded by the pack."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.nodes.loaders import face_analyzer, native_models, native_vae
from comfyui_likeness.portrait_world.report import rows
from comfyui_likeness.portrait_world.report.demo_stack import DemoStack
from comfyui_likeness.tools.standins import face_networks, flashface_checkpoint
from comfyui_likeness.training.adapters import face_encoders
from comfyui_likeness.training.base_models import clip_pair, unet, vae
from comfyui_likeness.training.omni_id import encoder
from comfyui_likeness.training.task import make_generator
from safetensors.torch import save_file

from support import adaface_models, base_stack

CPU = torch.device("cpu")
DETECTOR_SIZE, IMAGE_SIZE = 640, 128  # pixels of the detector's input, and of the images
FACE_CENTERS = ((40, 48), (88, 48))  # of the faces that the detector returns for every image
HALF_BOX_SIZE = 18
KEY_POINT_OFFSETS = ((-7, -6), (7, -6), (0, 2), (-6, 9), (6, 9))  # from the center
SAMPLING_STEPS = 2
OMNI_ID_FILE = rows.OMNI_ID_FILE.format("")
ADAPTER_FILES = {
    rows.FACEID_FILE: "arcface",
    rows.PLUS_FACE_FILE: "image",
    rows.FUSED_FILE: "clean",
    rows.INFINITE_ID_FILE: "infinite",
    OMNI_ID_FILE: "omni",
}
HOST_FOLDERS = {"arcface": "ipadapter", "image": "ipadapter"}  # all others: likeness


def write_detector(path: Path) -> None:
    """A detector in the SCRFD layout that always returns one face in the left and one in the right half."""
    from onnx import TensorProto, helper

    graph, scale, inputs = face_networks.OnnxGraphBuilder(), DETECTOR_SIZE // IMAGE_SIZE, []
    names: list[tuple[str, int]] = []
    for kind, width in (("score", 1), ("bbox", 4), ("kps", 10)):
        for stride in face_networks.STRIDES:
            cells = DETECTOR_SIZE // stride
            out = np.zeros((2 * cells * cells, width), np.float32)
            for x, y in FACE_CENTERS if stride == 8 else ():
                index = 2 * (y * scale // stride * cells + x * scale // stride)
                values = {"score": [0.9], "bbox": [HALF_BOX_SIZE] * 4, "kps": np.array(KEY_POINT_OFFSETS).flatten()}
                out[index] = np.array(values[kind]) * (1 if kind == "score" else scale / stride)
            name = f"{kind}_{stride}"
            graph("Identity", graph.add_constant(out), output_name=name)
            names.append((name, width))
    inputs.append(helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, "?", "?"]))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"rows_{name}", w]) for name, w in names]
    graph.save(path, inputs, outputs)


def write_reference_net(base: Path, file: Path) -> None:
    """A FlashFace file without the denoising UNet: only Face ReferenceNet and the added layers."""
    weights = native_models.load_unet(base).diffusion_model.state_dict()
    unet_shapes = {key: tuple(value.shape) for key, value in weights.items()}
    shapes = flashface_checkpoint.get_flashface_shapes(unet_shapes, 4)
    selected = {key: shape for key, shape in shapes.items() if not key.startswith("ori_") or "self_attn_first" in key}
    tensors = {
        key: torch.randn(shape, generator=make_generator(i)) / (shape[-1] ** 0.5 if len(shape) > 1 else 10)
        for i, (key, shape) in enumerate(selected.items())
    }
    save_file(tensors, file)


def make_report_stack(folder: Path, models: Path) -> DemoStack:
    """Write the base models to a folder and the adapters to ComfyUI's model folders; the loaded stack."""
    base_stack.make_base_stack(folder)
    for file, kind in ADAPTER_FILES.items():
        adapter_folder = models / HOST_FOLDERS.get(kind, "likeness")
        base_stack.make_adapter_task(kind, folder).save_model(adapter_folder, {"steps": 1})
        (adapter_folder / "made.safetensors").rename(adapter_folder / file)
    likeness_folder = models / "likeness"
    write_reference_net(folder / unet.UNET_FILE, likeness_folder / rows.FLASHFACE_FILE)
    shutil.copyfile(folder / encoder.ENCODER_FILE, likeness_folder / OMNI_ID_FILE.removeprefix("demo_"))
    for kind, file in (("arc2face", rows.ARC2FACE_FILE), ("adaface", rows.ADAFACE_FILE)):
        base_stack.make_face_task(kind, folder).save_model(folder, {})
        shutil.copyfile(folder / f"made_{kind}.safetensors", likeness_folder / file)
    pack = models / "insightface" / "models" / "demo"
    pack.mkdir(parents=True)
    write_detector(pack / "detector.onnx")
    (pack / base_stack.RECOGNIZER_FILE).write_bytes((folder / base_stack.RECOGNIZER_FILE).read_bytes())
    width = base_stack.CLIP_PAIR_CONFIG.width
    clip = adaface_models.make_clip(width=width, num_heads=2, layers=2)
    projection = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    projection.copy_(torch.randn(projection.shape, generator=make_generator(0)) / width**0.5)
    return DemoStack(
        ModelPatcher(native_models.load_unet(folder / unet.UNET_FILE).eval().requires_grad_(False), CPU, CPU),
        clip,
        native_vae.wrap_vae(native_models.load_vae(folder / vae.VAE_FILE)),
        face_encoders.load_clip_vision_file(folder / clip_pair.VISION_FILE),
        face_analyzer.load_face_analyzer("demo", "cpu")[0],
        face_encoders.ArcFaceReader(folder / base_stack.RECOGNIZER_FILE, "judge"),
        steps=SAMPLING_STEPS,
    )
