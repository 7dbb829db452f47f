"""The demo's models, loaded and run by the nodes that artists use, and the judge, which only measures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...likeness import faces
from ...likeness.spec import Face
from ...nodes.evaluate import of_text
from ...nodes.loaders import adaface, adapter, demo, face_analyzer, files, flashface, omni_id
from ...nodes.types import Analyzer, LoadedPrompter, LoadedReferenceNet, OmniEncoder
from ..adapters.readers import ArcFace
from ..base import unet
from ..base.recogniser import SIDE, VECTOR
from ..ship import RUNS

PACK = "demo"
KEPT = 32  # batches of pictures with their latents
CACHE = 1024  # MiB for what the reference net saw
PAINTS = ("ori_encoder.0.weight", "encoder.0.weight")  # a tensor of FlashFace's UNet that paints
LATENT = 16  # cells a side


class Eye:
    """The VAE, but for pictures that it has just encoded: a person's rows all show it the same photos."""

    def __init__(self, vae: Any) -> None:
        self._vae, self._kept = vae, dict[bytes, Tensor]()

    def encode(self, pictures: Tensor) -> Tensor:
        key = hashlib.sha256(pictures.contiguous().numpy().tobytes()).digest()
        if key not in self._kept:
            self._kept = dict([*self._kept.items()][1 - KEPT :]) | {key: self._vae.encode(pictures)}
        return self._kept[key]


@dataclass(eq=False)
class Stack:
    """MODEL, CLIP, VAE and CLIP_VISION as `Load Demo Models` gives them, `analyzer` as `Load Face Analyzer` does."""

    model: ModelPatcher
    clip: Any
    vae: Any
    vision: Any
    analyzer: Analyzer
    judge: ArcFace
    eye: Eye = field(init=False)
    steps: int = unet.SAMPLING["steps"]
    _loaded: dict[str, Any] = field(default_factory=dict)
    _texts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.eye = Eye(self.vae)

    def adapter(self, file: str) -> Any:
        """By Load Identity Adapter, once."""
        return self._once(file, lambda: adapter.LoadAdapter.execute(file, "auto").args[0])

    def flashface(self, file: str) -> tuple[ModelPatcher, LoadedReferenceNet]:
        """By Load FlashFace, once; on the demo's model where the file holds no UNet that paints."""
        base = self.model if files.shape(file, flashface.FOLDER, PAINTS) is None else None
        return self._once(file, lambda: flashface.LoadFlashFace.execute(file, base, CACHE).args)

    def omni(self, file: str) -> OmniEncoder:
        """By Load Omni-ID Encoder, once."""
        return self._once(file, lambda: omni_id.LoadOmniID.execute(file).args[0])

    def prompter(self, file: str, arc2face: str) -> LoadedPrompter:
        """By Load AdaFace, once."""
        return self._once(file, lambda: adaface.LoadAdaFace.execute(file, arc2face).args[0])

    def _once(self, file: str, load: Any) -> Any:
        if file not in self._loaded:
            self._loaded[file] = load()
        return self._loaded[file]

    def text(self, text: str) -> tuple[Tensor, Tensor]:
        """A prompt as the UNet reads it, [1, 77, width], and as CLIP compares it to pictures, [1, width]."""
        if text not in self._texts:
            ((words, _),) = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))
            self._texts[text] = words, of_text(self.clip, text, words.shape[-1])[None]
        return self._texts[text]

    def words(self, texts: Sequence[str]) -> Tensor:
        """Prompts as the UNet reads them, [p, 77, width]."""
        return torch.cat([self.text(text)[0] for text in texts])

    def paint(self, model: ModelPatcher, words: Tensor, seed: int) -> Tensor:
        """A picture of each prompt [p, H, W, 3], by the host's own sampler; the same noise for every model."""
        latent = torch.zeros(len(words), 4, LATENT, LATENT)
        made = comfy.sample.sample(
            model, comfy.sample.prepare_noise(latent, seed), positive=[[words, {}]],
            negative=[[self.text("")[0], {}]], latent_image=latent, disable_pbar=True, seed=seed,
            **{**unet.SAMPLING, "steps": self.steps},
        )  # fmt: skip
        return self.vae.decode(made).cpu().clamp(0, 1)

    def seen(self, pictures: Tensor) -> Tensor:
        """CLIP's directions of pictures, [p, width]."""
        return self.vision.encode_image(pictures, crop=True)["image_embeds"].cpu()

    def faces(self, picture: Tensor) -> Sequence[Face]:
        """What the analyzer finds, as in Encode Identity, the largest first."""
        found = faces.find_faces(picture, self.analyzer.detect).faces
        return sorted(found, key=lambda face: -face.size)

    def judged(self, pictures: Sequence[Tensor], found: Sequence[Face | None]) -> Tensor:
        """The judge's vectors of one face of each picture, [p, 512]; zeros where there is none."""
        out = torch.zeros(len(pictures), VECTOR)
        there = [i for i, face in enumerate(found) if face is not None]
        crops = [
            faces.pixels(faces.align(picture.double(), face.kps, SIDE))
            for picture, face in zip(pictures, found, strict=True)
            if face is not None
        ]
        if crops:
            out[there] = self.judge.read(torch.stack(crops), torch.device("cpu"))
        return out

    def largest(self, pictures: Tensor) -> Tensor:
        """The judge's vectors of the largest faces of pictures [p, H, W, 3]: [p, 512]."""
        return self.judged(list(pictures), [next(iter(self.faces(picture)), None) for picture in pictures])

    def halves(self, pictures: Tensor) -> Tensor:
        """The judge's vectors of the largest face in the left and in the right half: [p, 2, 512]."""
        middle = pictures.shape[2] / 2
        found = [self.faces(picture) for picture in pictures]
        sides = [[next((face for face in some if _right(face, middle) is side), None) for some in found]
                 for side in (False, True)]  # fmt: skip
        return torch.stack([self.judged(list(pictures), side) for side in sides], dim=1)


def _right(face: Face, middle: float) -> bool:
    return float(face.box[0] + face.box[2]) / 2 > middle


def load(steps: int) -> Stack:
    """The shipped stack. Raises ValueError where a file is not there."""
    register()
    analyzer, _ = face_analyzer.load(PACK, "auto")
    judge = ArcFace(files.SHIPPED / "demo" / "judge.onnx", "judge")
    return Stack(*demo.load(), analyzer=analyzer, judge=judge, steps=steps)


def register() -> None:
    """Tell the host where adapters lie: what ships, and behind it what finished runs left for a comparison alone."""
    files.register(sorted(RUNS.glob("*/model")))


def place(file: str) -> Path | None:
    """Where an adapter's file lies, or None."""
    try:
        return files.find(file, *adapter.FOLDERS)
    except ValueError:
        return None


@dataclass(frozen=True)
class Shipped:
    """A file of weights: the first digits of its sha256, and what it says of its training."""

    digest: str
    notes: str


def shipped(path: Path) -> Shipped:
    notes = (files.told(path) or {}).get("notes", {})
    said = [f"{key} {value}" for key, value in notes.items()]
    return Shipped(files.sha256(path)[:8], ", ".join(said + ["does not ship"] * (files.SHIPPED not in path.parents)))


def base(folder: Path = files.SHIPPED) -> dict[str, Shipped]:
    """The files that every row is made and measured with."""
    found = [*(folder / "demo").glob("*.safetensors"), *(folder / "demo").glob("*.onnx")]
    found += (folder / "insightface").rglob("*.onnx")
    return {path.relative_to(folder).as_posix(): shipped(path) for path in sorted(found)}
