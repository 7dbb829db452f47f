"""What reads a face for an adapter, as the pack's nodes do it: a recogniser, a vision tower, Omni-ID's, or the VAE."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import comfy.clip_vision
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.taesd.taesd import TAESD
from torch import Tensor

from ...likeness import faces, omni_id, reference_faces
from ...likeness.spec import Face, Feature
from ...nodes.attention import fused
from ...nodes.encode import HostEncoder
from ...nodes.loaders import files, small
from ..base import latents, recogniser
from ..base.portraits import head
from ..data import View
from ..omni_id import encoder as omni
from ..omni_id import views

HEAD = "head"  # a crop of spec.CROPS


class Reader(Protocol):
    """Cuts a face out of a picture, and reads faces. `hash` tells one from another."""

    @property
    def hash(self) -> str: ...

    def cut(self, view: View) -> Tensor:
        """The face, uint8 [H, W, 3], all of one size; flat where there are several pictures of it (Both)."""
        ...

    def read(self, cuts: Tensor, device: torch.device) -> Tensor:
        """What it sees of faces [n, ...] as they were cut: [n, ...] in float32."""
        ...


class Encoder(Reader, Protocol):
    """A reader whose features go into an identity."""

    @property
    def feature(self) -> Feature: ...

    def zero(self) -> Tensor:
        """What stands for no face [1, ...]."""
        ...


class ArcFace:
    """A recogniser's raw vectors [n, 512], as Load Face Analyzer's pack of that name makes them."""

    def __init__(self, file: Path, pack: str) -> None:
        if not file.is_file():
            raise ValueError(f"got {file}, which is not there; expected a recogniser; train it first")
        self.file, self.feature = file, Feature(f"arcface.{pack}", "raw", "face112")
        self.hash = hashlib.sha256(file.read_bytes()).hexdigest()

    @cached_property
    def session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(str(self.file), options, onnxruntime.get_available_providers())

    def cut(self, view: View) -> Tensor:
        return faces.pixels(faces.align(view.picture.double() / 255, view.kps, recogniser.SIDE))

    def read(self, cuts: Tensor, device: torch.device) -> Tensor:
        name = self.session.get_inputs()[0].name
        (vectors,) = self.session.run(None, {name: recogniser.read(list(cuts.cpu())).numpy()})
        return torch.from_numpy(vectors).to(device)

    def zero(self) -> Tensor:
        return torch.zeros(1, recogniser.VECTOR)


class Vision:
    """A CLIP tower's states of a crop [n, T, W], as Encode Identity makes them: for Plus-Face, unless told."""

    def __init__(self, file: Path, layer: str = "penultimate", crop: str = HEAD) -> None:
        self.encoder = HostEncoder(load_vision(file))
        self.feature = Feature(f"clip.{self.encoder.architecture}", layer, crop)
        self.hash = self.encoder.sha256
        self.width: int = self.encoder.vision.config["hidden_size"]

    def cut(self, view: View) -> Tensor:
        crop = self.feature.crop
        return head(view) if crop == HEAD else faces.pixels(faces.CUTS[crop](view.picture.float() / 255, view.kps))

    @torch.no_grad()
    def read(self, cuts: Tensor, device: torch.device) -> Tensor:
        return self.encoder.encode(cuts.float() / 255)[self.feature.layer].float().to(device)

    @torch.no_grad()
    def zero(self) -> Tensor:
        return self.encoder.zero()[self.feature.layer].float()


class Both:
    """A recogniser and a vision tower as one reader: what each cuts and reads, flat and side by side."""

    def __init__(self, face: ArcFace, image: Vision) -> None:
        self.face, self.image = face, image
        self.hash = hashlib.sha256(f"{face.hash} {image.hash} {image.feature}".encode()).hexdigest()

    def cut(self, view: View) -> Tensor:
        return torch.cat([self.face.cut(view).flatten(), self.image.cut(view).flatten()])

    def read(self, cuts: Tensor, device: torch.device) -> Tensor:
        first, second = cuts.tensor_split([3 * recogniser.SIDE**2], 1)
        side = math.isqrt(second.shape[1] // 3)
        vectors = self.face.read(first.unflatten(1, (recogniser.SIDE, -1, 3)), device)
        return torch.cat([vectors, self.image.read(second.unflatten(1, (side, -1, 3)), device).flatten(1)], 1)

    def features(self, read: Tensor) -> dict[str, Tensor]:
        """What was read as an identity holds it, by encoder id: vectors [n, 512], states [n, T, W]."""
        vectors, states = read.tensor_split([recogniser.VECTOR], 1)
        return {
            self.face.feature.id(self.face.hash): vectors,
            self.image.feature.id(self.image.hash): states.unflatten(1, (-1, self.image.width)),
        }


class Omni:
    """What an Omni-ID encoder's trunk sees of the face [n, S', features], as Encode Identity has it seen.

    `joined` makes the tokens [rows, L, C] of it, of as many photos for each row.
    """

    def __init__(self, file: Path) -> None:
        self.module, self.feature = omni.load(file), omni_id.FEATURE
        self.hash = hashlib.sha256(file.read_bytes()).hexdigest()

    def cut(self, view: View) -> Tensor:
        return views.face(view, self.module.spec.image_size)[..., :3].contiguous()

    def read(self, cuts: Tensor, device: torch.device) -> Tensor:
        return omni.states(self.module.to(device), cuts.to(device))

    def joined(self, read: Tensor, rows: int) -> Tensor:
        return omni.tokens(self.module.to(read.device), read, rows)

    def zero(self) -> Tensor:
        spec = self.module.spec
        return torch.zeros(1, spec.tokens, spec.width)


class Latents:
    """The VAE's latents of the head [n, 4, side / 8, side / 8], as Apply Identity (Fused KV) makes them."""

    def __init__(self, file: Path, autoencoder: TAESD, side: int) -> None:
        self.autoencoder, self.side = autoencoder, side
        self.hash = hashlib.sha256(file.read_bytes() + str(side).encode()).hexdigest()

    def cut(self, view: View) -> Tensor:
        return faces.pixels(fused.sized(head(view)[None], self.side)[0])

    def read(self, cuts: Tensor, device: torch.device) -> Tensor:
        return latents.quickly(self.autoencoder, cuts.to(device).movedim(-1, 1).float() / 255)


class References(Latents):
    """The same of a face alone, levelled on black, as Apply Identity (Reference) makes them."""

    def __init__(self, file: Path, autoencoder: TAESD, side: int) -> None:
        super().__init__(file, autoencoder, side)
        self.hash = hashlib.sha256(f"reference {self.hash}".encode()).hexdigest()

    def cut(self, view: View) -> Tensor:
        photo, face = faces.head(view.picture.float() / 255, Face(view.box.float(), view.kps.float(), 1.0))
        return reference_faces.square(reference_faces.crop(photo, face.box, face.kps[:2]), self.side)


def load_vision(file: Path) -> ClipVisionModel:
    """A vision tower, trained here or any that the host loads. Raises ValueError where the file is none."""
    if files.told(file) is not None:
        return small.load_vision(file)
    with small.reading(file, "a vision tower"):
        found = comfy.clip_vision.load(str(file))
    if found is None:
        raise ValueError(f"got {file}, which the host knows as no vision tower; expected one; train clip first")
    return found
