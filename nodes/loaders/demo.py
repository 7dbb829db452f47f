"""Load Demo Models and Demo Person: Portrait World's own models and people, which ship with the pack."""

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

from . import care, files, small

FOLDER = "demo"
MODELS = ("unet.safetensors", "text.safetensors", "vae.safetensors", "vision.safetensors")
PEOPLE = ("Ada", "Bo", "Cleo", "Dev", "Finn", "Kim")


def load() -> tuple[ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE, ClipVisionModel]:
    """MODEL, CLIP, VAE and CLIP_VISION of Portrait World. Raises ValueError where a file is missing or damaged."""
    unet, text, vae, vision = (files.SHIPPED / FOLDER / name for name in MODELS)
    return (
        care.patcher_of(small.load_unet(unet)),
        small.load_clip(text),
        comfy.sd.VAE(sd=small.load_vae(vae).state_dict()),
        small.load_vision(vision),
    )


def photos_of(name: str) -> Path:
    return files.SHIPPED / FOLDER / "people" / f"{name}.png"


def photos(name: str) -> Tensor:
    """The photos of one of PEOPLE, squares side by side in one picture: [n, H, H, 3]. Raises ValueError without it."""
    file = photos_of(name)
    try:
        with Image.open(file) as picture:
            strip = torch.from_numpy(np.array(picture.convert("RGB"))).float() / 255
    except OSError as error:
        raise ValueError(f"got no photos of {name} ({error}); expected {file}; fetch the pack again") from error
    return torch.stack(strip.split(strip.shape[0], dim=1))


class LoadDemo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessLoadDemo",
            display_name="Load Demo Models",
            category="likeness/loaders",
            description="Loads the small models that ship with the pack: a model of drawn people, for pictures of "
            "128 x 128 pixels, on which every method can be tried without a download, on any computer.",
            search_aliases=["portrait world", "example", "try", "checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="Of SD1.5's kind, with a text 128 wide."),
                io.Clip.Output(display_name="clip", tooltip="Knows the words of Portrait World's captions alone."),
                io.Vae.Output(display_name="vae", tooltip="For pictures whose sides are multiples of 8 pixels."),
                io.ClipVision.Output(display_name="clip_vision", tooltip="For Encode Identity: what Plus-Face reads."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls) -> list[tuple[int, int]]:
        return [files.signature(files.SHIPPED / FOLDER / name) for name in MODELS]

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*load())


class DemoPerson(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessDemoPerson",
            display_name="Demo Person",
            category="likeness/loaders",
            description="Photos of a drawn person, whom the demo's models have never seen: what Load Image is for a "
            "real one.",
            search_aliases=["portrait world", "example", "photo"],
            inputs=[
                io.Combo.Input("person", options=list(PEOPLE), tooltip="One of six drawn people, with four photos."),
            ],
            outputs=[io.Image.Output(display_name="photos", tooltip="Four photos of 128 x 128 pixels, as a batch.")],
        )

    @classmethod
    def fingerprint_inputs(cls, person: str) -> tuple[int, int]:
        return files.signature(photos_of(person))

    @classmethod
    def execute(cls, person: str) -> io.NodeOutput:
        return io.NodeOutput(photos(person))


NODES = [LoadDemo, DemoPerson]
