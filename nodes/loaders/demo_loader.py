"""Load Demo Models and Demo Person: the models and people of Portrait World, which ship with the pack."""

from __future__ import annotations

from pathlib import Path

import comfy.sd
import numpy as np
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from . import files, model_management, native_models, native_vae

DEMO_FOLDER = "demo"
DEMO_MODEL_FILES = ("unet.safetensors", "text.safetensors", "vae.safetensors", "vision.safetensors")
DEMO_PERSON_NAMES = ("Ada", "Bo", "Cleo", "Dev", "Finn", "Kim")


def load_demo_models() -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE, ClipVisionModel]:
    """MODEL, CLIP, VAE and CLIP_VISION of Portrait World. Raises ValueError if a file is missing or damaged."""
    unet, text_encoder, vae, clip_vision = (files.SHIPPED_WEIGHTS / DEMO_FOLDER / name for name in DEMO_MODEL_FILES)
    return (
        model_management.make_model_patcher(native_models.load_unet(unet)),
        native_models.load_clip(text_encoder),
        native_vae.wrap_vae(native_models.load_vae(vae)),
        native_models.load_clip_vision(clip_vision),
    )


def get_demo_photo_path(name: str) -> Path:
    return files.SHIPPED_WEIGHTS / DEMO_FOLDER / "people" / f"{name}.png"


def load_demo_photos(name: str) -> Tensor:
    """The photos of a demo person, [n, H, H, 3], from a file that holds them side by side.

    Raises ValueError if the file is missing or damaged.
    """
    file = get_demo_photo_path(name)
    try:
        with Image.open(file) as image:
            strip = torch.from_numpy(np.array(image.convert("RGB"))).float() / 255
    except OSError as error:
        raise ValueError(
            f"could not read the photos of {name} ({error}); expected {file}; install the pack again"
        ) from error
    return torch.stack(strip.split(strip.shape[0], dim=1))


class LoadDemoModels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadDemo",
            display_name="Load Demo Models",
            category="likeness/loaders",
            description="Loads the small models that ship with the pack. They generate drawn people at 128 x 128 "
            "pixels, so you can try the methods without a download on any computer.",
            search_aliases=["portrait world", "example", "try", "checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="A small UNet of SD1.5's architecture, with a text width of 128."
                ),
                io.Clip.Output(display_name="clip", tooltip="Knows only the words of Portrait World's captions."),
                io.Vae.Output(display_name="vae", tooltip="For images whose sides are multiples of 8 pixels."),
                io.ClipVision.Output(
                    display_name="clip_vision",
                    tooltip="For Encode Identity: the image encoder of the demo's Plus-Face.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls) -> list[tuple[int, int]]:
        return [files.get_file_signature(files.SHIPPED_WEIGHTS / DEMO_FOLDER / name) for name in DEMO_MODEL_FILES]

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load_demo_models())


class DemoPerson(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessDemoPerson",
            display_name="Demo Person",
            category="likeness/loaders",
            description="Loads photos of a drawn person that the demo models were not trained on. Use it in place of "
            "Load Image.",
            search_aliases=["portrait world", "example", "photo"],
            inputs=[
                io.Combo.Input(
                    "person", options=list(DEMO_PERSON_NAMES), tooltip="One of six drawn people, four photos each."
                ),
            ],
            outputs=[io.Image.Output(display_name="photos", tooltip="Four photos of 128 x 128 pixels, as a batch.")],
        )

    @classmethod
    def fingerprint_inputs(cls, person: str) -> tuple[int, int]:
        return files.get_file_signature(get_demo_photo_path(person))

    @classmethod
    def execute(cls, person: str) -> io.NodeOutput:
        return io.NodeOutput(load_demo_photos(person))


NODES = [LoadDemoModels, DemoPerson]
