"""A base stack from seeds in its own files, with SD1.5's sixteen cross-attentions, and shards of a few drawn people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfyui_likeness.training import data
from comfyui_likeness.training.base import clip, recogniser, unet, vae
from comfyui_likeness.training.base.portraits import Shards
from comfyui_likeness.training.task import start
from trainings import DISCS

SIDE = 64
# The vision tower is of the demo's own size, by which the pack knows it.
TOWERS = clip.Settings(width=32, layers=1, heads=2, vision_width=128, vision_layers=4, vision_heads=4)
UNET: dict[str, Any] = {"side": SIDE, "channels": 32, "levels": (1, 1, 2, 1), "depth": (1, 1, 1, 0), "heads": 2}
FACES = recogniser.Settings(width=4, depth=4, people=2)


def make(folder: Path, people: int = 3, pictures: int = 3) -> dict[str, str]:
    """Write all of it; the files of the base stack by the names of a task's settings."""
    vae.Vae(vae.Settings(side=32), DISCS, 1).save(folder, {})
    clip.ClipPair(TOWERS, DISCS, 2).save(folder, {})
    recogniser.Recogniser(FACES, DISCS, 3).save(folder, {})
    files = {"vae": str(folder / vae.FILE), "text": str(folder / clip.TEXT)}
    denoiser = unet.TextToImage(unet.Settings(**UNET, **files), DISCS, 0)
    start(denoiser.model.diffusion_model, 4)  # a fresh one's attentions give 0, and teach nothing
    denoiser.save(folder, {})
    data.write_shards(data.WorldAlbum("train", SIDE, people), folder, pictures, lossless=True)
    pair = data.WorldAlbum("train", SIDE, 1, figures=2)
    data.write_shard(pair, range(1), folder / "pairs.tar", 1, lossless=True)
    return {**files, "unet": str(folder / unet.FILE)}


def shards(folder: Path) -> Shards:
    return Shards(folder)
