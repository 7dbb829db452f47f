"""A small base model with SD1.5's sixteen cross-attentions, shards of drawn people, and tasks to train on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from comfyui_likeness.likeness.checkpoints import native_metadata
from comfyui_likeness.likeness.spec import Face
from comfyui_likeness.nodes.loaders import files
from comfyui_likeness.nodes.photos import SelectedFace
from comfyui_likeness.portrait_world import world_album
from comfyui_likeness.training.adaface import composition_distillation, face_distillation, teacher
from comfyui_likeness.training.adaface.face_task import FaceTask
from comfyui_likeness.training.adapters import decoupled, fused, infinite_id
from comfyui_likeness.training.adapters.adapter_task import AdapterTask
from comfyui_likeness.training.base_models import clip_pair, face_recognizer, unet, vae
from comfyui_likeness.training.data import clusters, shards
from comfyui_likeness.training.data.shard_source import ShardSource
from comfyui_likeness.training.omni_id import encoder, flow_stage
from comfyui_likeness.training.task import init_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from support import small_models
from support.toy_tasks import DISC_WORLD

IMAGE_SIZE = 128
# The vision tower has the size of the demo's, by which the loader detects it.
CLIP_PAIR_CONFIG = clip_pair.CLIPConfig(
    width=32, layers=1, num_heads=2, vision_width=128, vision_layers=4, vision_num_heads=4
)
UNET_OPTIONS: dict[str, Any] = {
    "resolution": IMAGE_SIZE,
    "model_channels": 32,
    "channel_mult": (1, 1, 2, 1),
    "transformer_depth": (1, 1, 1, 0),
    "num_heads": 2,
    "gradient_checkpointing": True,  # as for a large UNet
}
RECOGNIZER_CONFIG = face_recognizer.RecognizerConfig(width=4, depth=4, num_people=2)
# A trunk with four heads, and tokens of another width.
OMNI_ID_SIZES = encoder.OmniIDEncoderConfig(
    trunk_width=128, patch_size=28, trunk_layers=2, num_tokens=6, width=32, num_heads=2, mlp_width=32
)
BASE_FILES = {"vae": vae.VAE_FILE, "text": clip_pair.TEXT_FILE, "unet": unet.UNET_FILE}
RECOGNIZER_FILE = "recogniser.onnx"


def make_base_stack(folder: Path) -> Path:
    """Write the models, and shards of ten images: three of each of three people, and one of a pair."""
    vae.VAETask(small_models.SMALL_VAE, DISC_WORLD, 1).save_model(folder, {})
    clip_pair.CLIPPair(CLIP_PAIR_CONFIG, DISC_WORLD, 2).save_model(folder, {})
    face_recognizer.FaceRecognizer(RECOGNIZER_CONFIG, DISC_WORLD, 3).save_model(folder, {})
    encoder.save_encoder_file(encoder.build_trainable_encoder(OMNI_ID_SIZES, 6), folder, {})
    parts = {name: str(folder / BASE_FILES[name]) for name in ("vae", "text")}
    denoiser = unet.TextToImage(unet.UNetConfig(**UNET_OPTIONS, **parts), DISC_WORLD, 0)
    init_weights(denoiser.model.diffusion_model, 4)  # the default initialization has zero outputs, and no gradients
    denoiser.save_model(folder, {})
    shards.write_shards(world_album.WorldAlbum("train", IMAGE_SIZE, 3), folder, 3, lossless=True)
    shards.write_shard(
        world_album.WorldAlbum("train", IMAGE_SIZE, 1, people_per_image=2),
        range(1),
        folder / "pairs.tar",
        1,
        lossless=True,
    )
    return folder


def make_v_prediction_unet(folder: Path, file: Path) -> Path:
    """Write the stack's UNet with v-prediction in its metadata."""
    settings = (files.read_native_metadata(folder / unet.UNET_FILE) or {})["settings"] | {"prediction": "velocity"}
    save_file(
        load_file(folder / unet.UNET_FILE),
        file,
        native_metadata.make_native_metadata("unet", "SD1.5", {}, settings=settings),
    )
    return file


def _make_arcface_task(folder: Path, **options: Any) -> AdapterTask[Any]:
    defaults = {"encoder_type": "arcface", "encoder": str(folder / RECOGNIZER_FILE), "projector_width": 16}
    return decoupled.DecoupledTask(decoupled.DecoupledConfig(**defaults, **options), ShardSource(folder), 5)


def _make_image_task(folder: Path, **options: Any) -> AdapterTask[Any]:
    defaults = {
        "encoder_type": "image", "encoder": str(folder / clip_pair.VISION_FILE), "projector_width": 64, "depth": 1,
        "num_heads": 1,
    }  # fmt: skip
    return decoupled.DecoupledTask(decoupled.DecoupledConfig(**defaults, **options), ShardSource(folder), 5)


def _make_infinite_id_task(folder: Path, **options: Any) -> AdapterTask[Any]:
    defaults = {
        "recognizer": str(folder / RECOGNIZER_FILE), "vision": str(folder / clip_pair.VISION_FILE),
        "projector_width": 16,
    }  # fmt: skip
    return infinite_id.InfiniteIDTask(infinite_id.InfiniteIDConfig(**defaults, **options), ShardSource(folder), 5)


def _make_omni_id_task(folder: Path, **options: Any) -> AdapterTask[Any]:
    defaults = {"encoder_type": "omni", "encoder": str(folder / encoder.ENCODER_FILE), "max_photos": 2}
    return decoupled.DecoupledTask(decoupled.DecoupledConfig(**defaults, **options), ShardSource(folder), 5)


def _make_flow_task(folder: Path, **options: Any) -> AdapterTask[Any]:
    defaults = {
        "encoder": str(folder / encoder.ENCODER_FILE), "images_per_person": 3, "max_images": 2, "num_targets": 3,
    }  # fmt: skip
    return flow_stage.FlowStageTask(flow_stage.FlowStageConfig(**defaults, **options), ShardSource(folder), 5)


def _make_fused_kv_task(stream_noise: str) -> Callable[..., AdapterTask[Any]]:
    return lambda folder, **options: fused.FusedKVTask(
        fused.FusedKVConfig(face_size=IMAGE_SIZE, stream_noise=stream_noise, **options), ShardSource(folder), 5
    )


ADAPTER_TASKS: Mapping[str, Callable[..., AdapterTask[Any]]] = {
    "arcface": _make_arcface_task, "image": _make_image_task, "omni": _make_omni_id_task, "flow": _make_flow_task,
    "clean": _make_fused_kv_task("clean"), "match": _make_fused_kv_task("match"), "infinite": _make_infinite_id_task,
}  # fmt: skip

FACE_TASKS: Mapping[str, tuple[Any, Any]] = {
    "arc2face": (teacher.Arc2FaceConfig, teacher.Arc2FaceTask),
    "adaface": (face_distillation.FaceDistillationConfig, face_distillation.FaceDistillationTask),
    "compose": (
        composition_distillation.CompositionDistillationConfig,
        composition_distillation.CompositionDistillationTask,
    ),
}


def make_adapter_task(kind: str, folder: Path, **options: Any) -> AdapterTask[Any]:
    """A task of ADAPTER_TASKS on the base model in a folder."""
    parts = {name: str(folder / file) for name, file in BASE_FILES.items()}
    return ADAPTER_TASKS[kind](folder, file="made", resolution=IMAGE_SIZE, **parts, **options)


def make_face_task(kind: str, folder: Path, **options: Any) -> FaceTask[Any]:
    """A task of FACE_TASKS on the base model in a folder, which also holds the teacher unless `kind` is that."""
    config_type, task_type = FACE_TASKS[kind]
    settings: dict[str, Any] = {name: str(folder / file) for name, file in BASE_FILES.items()}
    settings |= {"file": f"made_{kind}", "resolution": IMAGE_SIZE, "cached_samples": 10}
    settings |= {"encoder": str(folder / RECOGNIZER_FILE)}
    if kind != "arc2face":
        settings |= {
            name: str(folder / f"made_arc2face{suffix}")
            for name, suffix in (("teacher", ".safetensors"), ("teacher_unet", teacher.UNET_FILE_SUFFIX))
        }
        settings |= {"hidden_layer_weights": (2.0,), "max_denoising_steps": 2}
    return task_type(config_type(**{**settings, **options}), ShardSource(folder), 5)


def make_selected_face(sample: clusters.AnnotatedImage) -> SelectedFace:
    """An annotated image as the nodes select it from a photo."""
    face = Face(sample.box.float(), sample.kps.float(), 1.0)
    return SelectedFace(sample.image.float() / 255, face, (face,), "drawn")


def get_trainable_parameters(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.named_parameters() if value.requires_grad}
