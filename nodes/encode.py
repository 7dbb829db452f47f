"""Encode Identity: photos to faces, and faces to what the connected encoders make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import comfy.model_management
import torch
from comfy.clip_vision import ClipVisionModel
from comfy_api.latest import io
from torch import Tensor

from ..likeness import clip, draw, faces
from ..likeness import omni_id as omni_math
from ..likeness.identity import cosine_matrix, outliers
from ..likeness.spec import Face, Feature, Identity
from . import types
from .photos import Choice, Taken, split, take_all

PICKS = (*faces.PICKS, faces.NTH, faces.ALIKE, faces.WHOLE)
# Crops for which no face has to be known.
PICTURES = {"photo": lambda photo: photo, "black": torch.zeros_like}
PIXELS = 1 << 22  # of the pictures that go through an encoder at once


@dataclass(frozen=True, eq=False)
class HostEncoder:
    """The host's CLIP_VISION. It knows no file, so its hash is one of its weights."""

    vision: ClipVisionModel
    family = "clip"

    @property
    def architecture(self) -> str:
        c = self.vision.config
        return clip.architecture(c["hidden_size"], c["num_hidden_layers"], c["patch_size"], c["image_size"])

    @property
    def sha256(self) -> str:
        return clip.weights_hash(self.vision.get_sd())

    def encode(self, pictures: Tensor) -> dict[str, Tensor]:
        out = self.vision.encode_image(pictures[..., :3], crop=True)
        return {
            "projected": out["image_embeds"],
            "penultimate": out["penultimate_hidden_states"],
            "last": out["last_hidden_state"],
        }

    def zero(self) -> dict[str, Tensor]:
        comfy.model_management.load_model_gpu(self.vision.patcher)
        size = self.vision.image_size
        pixels = torch.zeros(1, 3, size, size, device=self.vision.load_device)
        last, penultimate, projected, *_ = self.vision.model(pixel_values=pixels, intermediate_output=-2)
        device = comfy.model_management.intermediate_device()
        return {
            "projected": projected.to(device),
            "penultimate": penultimate.to(device),
            "last": last.to(device),
        }


def arcface(taken: Sequence[Taken], analyzer: types.Analyzer | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The raw vectors [n, 512] of the faces, and the hash of their network's file, by encoder id."""
    if analyzer is None:
        return {}, {}
    vectors = torch.stack([analyzer.embed(faces.pixels(one.photo), one.face) for one in taken])
    key = analyzer.feature.id(analyzer.sha256)
    return {key: vectors}, {key: analyzer.sha256}


@dataclass(frozen=True, eq=False)
class Features:
    """CLIP features by encoder id: of the faces [n, ...], and of the zero picture [1, ...]."""

    embeddings: dict[str, Tensor]
    zeros: dict[str, Tensor]
    hashes: dict[str, str]


def image_features(taken: Sequence[Taken], heads: Tensor, encoder: types.Encoder, crops_known: bool) -> Features:
    """What an image encoder makes of the photos and, where faces are known, of their crops."""
    out = Features({}, {}, {})
    zero, sha256 = encoder.zero(), encoder.sha256
    for crop, layers in clip.LAYERS.get(encoder.architecture, clip.OTHER_LAYERS[encoder.family]).items():
        if crop not in PICTURES and not crops_known:
            continue
        comfy.model_management.throw_exception_if_processing_interrupted()
        made = [encoder.encode(batch) for batch in batches(cut(taken, heads, crop))]
        for layer in layers:
            key = Feature(f"{encoder.family}.{encoder.architecture}", layer, crop).id(sha256)
            out.embeddings[key] = torch.cat([one[layer] for one in made]).half().cpu()
            if layer in zero:
                out.zeros[key] = zero[layer].half().cpu()
            out.hashes[key] = sha256
    return out


def joint(taken: Sequence[Taken], encoder: types.OmniEncoder) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What an Omni-ID encoder makes of all faces together [1, L, C], and the hash of its file, by encoder id."""
    pictures = torch.stack([faces.align(one.photo, one.face.kps, encoder.spec.image_size) for one in taken])
    read, weight = omni_math.distinct(pictures, [1.0] * len(pictures))
    key = omni_math.FEATURE.id(encoder.sha256)
    return {key: encoder.encode(pictures[read], weight).half()}, {key: encoder.sha256}


def _encoder(given: Any) -> types.Encoder | None:
    """What came through a socket that takes IMAGE_ENCODER or CLIP_VISION. Raises ValueError where it is no CLIP."""
    if not isinstance(given, ClipVisionModel):
        return given
    if given.model_type != "clip_vision_model":
        raise ValueError(
            f"got a CLIP_VISION of the kind {given.model_type}; expected a CLIP image encoder; load CLIP ViT-H/14, "
            "which most adapters need, or the one that the adapter's report names; SigLIP comes by Load Image Encoder"
        )
    return HostEncoder(given)


def cut(taken: Sequence[Taken], heads: Tensor, crop: str) -> list[Tensor]:
    """The pictures [H, W, 3] of one kind of crop."""
    if crop in PICTURES:
        return [PICTURES[crop](one.photo) for one in taken]
    if crop == "head":
        return list(heads.float() / 255)
    return [faces.CUTS[crop](one.photo, one.face.kps) for one in taken]


def batches(pictures: Sequence[Tensor]) -> list[Tensor]:
    """Pictures [H, W, 3] in order, as few batches of one size as that and memory allow."""
    out: list[Tensor] = []
    for shape, group in groupby(pictures, key=lambda picture: picture.shape):
        out += torch.stack(list(group)).split(max(1, PIXELS // (shape[0] * shape[1])))
    return out


def encode(
    taken: Sequence[Taken], name: str, choice: Choice, encoder: types.Encoder | None, omni: types.OmniEncoder | None
) -> Identity:
    """An identity of the taken faces, with all that the connected encoders can give."""
    looked = choice.analyzer is not None and choice.pick != faces.WHOLE
    made = [faces.head(one.photo, one.face, faces.HEAD_SCALE if looked else 1.0) for one in taken]
    heads = torch.stack([crop for crop, _ in made])
    vectors, hashes = arcface(taken, choice.analyzer)
    features = Features({}, {}, {})
    if encoder is not None:
        features = image_features(taken, heads, encoder, looked or choice.pick == faces.WHOLE)
    together, their_hashes = ({}, {}) if omni is None else joint(taken, omni)
    return Identity(
        name=name.strip() or "person",
        box=torch.stack([face.box for _, face in made]),
        kps=torch.stack([face.kps for _, face in made]),
        score=torch.tensor([face.score for _, face in made]),
        weight=torch.ones(len(made)),
        crop=heads,
        embeddings=vectors | features.embeddings,
        zeros=features.zeros,
        sources=tuple(one.note.split(":")[0] + f", {one.photo.shape[1]}x{one.photo.shape[0]}" for one in taken),
        hashes=hashes | features.hashes | their_hashes,
        joint=together,
    )


def preview(taken: Sequence[Taken]) -> Tensor:
    """The photos with every face numbered from left to right, the taken one in green, [n, H, W, 3]."""
    pictures = []
    for one in taken:
        picture, scale = draw.shrink(one.photo)
        for i, face in enumerate(one.found, 1):
            place = Face(face.box * scale, face.kps * scale, face.score)
            picture = draw.mark(picture, place, str(i), draw.CHOSEN if face is one.face else draw.FOUND)
        pictures.append(picture)
    return draw.letterbox(pictures)


def agreement(identity: Identity) -> list[str]:
    """How alike the faces are, and who does not fit, where there are several with vectors."""
    key = next((key for key in identity.embeddings if key.startswith("arcface.")), None)
    if key is None or len(identity) < 2:
        return []
    cosines = cosine_matrix(identity.embeddings[key])
    least = float(cosines.min())
    odd = ", ".join(identity.sources[i] for i in outliers(identity.embeddings[key]))
    return [f"cosines between the faces from {least:.2f}", f"probably someone else: {odd}" if odd else "no outliers"]


class EncodeIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        photo = io.Image.Input("photo", tooltip="One or more photos of the person, as a batch of one size.")
        return io.Schema(
            node_id="LikenessEncodeIdentity",
            display_name="Encode Identity",
            category="likeness/identity",
            description="Turns photos of one person into an identity: faces, and what the connected encoders make of "
            "them. The preview shows every face found, the taken one in green.",
            search_aliases=["face id", "embed face", "reference photo"],
            inputs=[
                io.Autogrow.Input(
                    "photos",
                    template=io.Autogrow.TemplatePrefix(photo, prefix="photo_", min=1, max=16),
                    tooltip="1 to 16 batches of photos, each batch of its own size.",
                ),
                io.String.Input(
                    "name", default="person",
                    tooltip="The person's name, 1 to 120 characters; also the file's name when saved.",
                ),
                io.Combo.Input(
                    "pick", options=list(PICKS), default="largest",
                    tooltip="Which face of a photo. nth counts from the left, from 1, as the preview numbers them. "
                    "whole photo: the picture is a face crop already, and no face is looked for.",
                ),
                io.Combo.Input(
                    "on_missing", options=["stop", "skip"], default="stop",
                    tooltip="What to do with a photo that shows no such face: stop with an error, or leave it out.",
                ),
                types.FaceAnalyzer.Input(
                    "face_analyzer", optional=True,
                    tooltip="Finds the faces and makes the vectors of FaceID, InstantID and PuLID.",
                ),
                io.MultiType.Input(
                    "image_encoder", [types.ImageEncoder, io.ClipVision], optional=True,
                    tooltip="Load CLIP Vision or Load Image Encoder: for IP-Adapter, Plus, FaceID-Plus and PuLID.",
                ),
                io.Int.Input(
                    "nth", default=1, min=1, max=100, optional=True, advanced=True,
                    tooltip="For pick nth: which face, from the left, 1 to 100.",
                ),
                types.Identity.Input("like", optional=True, tooltip="For pick most alike: whom it should be like."),
                types.OmniID.Input(
                    "omni_id", optional=True,
                    tooltip="Load Omni-ID Encoder: one set of tokens of all the faces together; needs a face analyzer, "
                    "or pick whole photo.",
                ),
            ],
            outputs=[
                types.Identity.Output(display_name="identity"),
                io.Image.Output(display_name="preview", tooltip="All faces found, numbered, the taken one in green."),
                io.String.Output(display_name="report", tooltip="Sizes tried, and what there is to say of each face."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, photos: dict[str, Any], name: str, pick: str, on_missing: str, face_analyzer: types.Analyzer | None = None,
        image_encoder: Any = None, nth: int = 1, like: Identity | None = None, omni_id: types.OmniEncoder | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if face_analyzer is None and image_encoder is None and omni_id is None:
            raise ValueError(
                "got neither a face analyzer nor an image encoder, nor an Omni-ID encoder; expected one or more; "
                "connect what the adapter needs"
            )
        if omni_id is not None and face_analyzer is None and pick != faces.WHOLE:
            raise ValueError(
                "got an Omni-ID encoder, which reads faces, and nothing that finds them; expected a face analyzer; "
                "connect one, or pick 'whole photo' for pictures that are face crops already"
            )
        choice = Choice(pick, face_analyzer, nth, like)
        taken, skipped = take_all(split([batch for batch in photos.values() if batch is not None]), choice, on_missing)
        identity = encode(taken, name, choice, _encoder(image_encoder), omni_id)
        holds = [f"holds {', '.join((*identity.embeddings, *identity.joint))}"]
        report = "\n".join([*(one.note for one in taken), *skipped, *agreement(identity), *holds])
        return io.NodeOutput(identity, preview(taken), report)


NODES = [EncodeIdentity]
