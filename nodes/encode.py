"""Encode Identity: detects the faces in photos and runs the connected encoders on them."""

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

from ..likeness.encoders import clip_vision
from ..likeness.faces import alignment, detection, drawing
from ..likeness.identity.merge import compute_cosine_matrix, find_outliers
from ..likeness.methods.omni_id import OMNI_ID_FEATURE, select_distinct_images
from ..likeness.spec import Face, Feature, Identity
from . import types
from .photos import FaceSelector, SelectedFace, select_faces, split_photos

PICK_OPTIONS = (*detection.FACE_PICKERS, detection.PICK_NTH, detection.PICK_MOST_SIMILAR, detection.PICK_WHOLE_PHOTO)
# Crops that need no face detection.
WHOLE_PHOTO_CROPS = {"photo": lambda photo: photo, "black": torch.zeros_like}
MAX_BATCH_PIXELS = 1 << 22  # of the images in one encoder batch


@dataclass(frozen=True, eq=False)
class ClipVisionEncoder:
    """ComfyUI's CLIP_VISION. It does not know its file, so `sha256` is a hash of its weights."""

    vision: ClipVisionModel
    family = "clip"

    @property
    def architecture(self) -> str:
        keys = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
        return clip_vision.name_architecture(*(self.vision.config[key] for key in keys))

    @property
    def sha256(self) -> str:
        return clip_vision.hash_weights(self.vision.get_sd())

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        output = self.vision.encode_image(images[..., :3], crop=True)
        return {
            "projected": output["image_embeds"],
            "penultimate": output["penultimate_hidden_states"],
            "last": output["last_hidden_state"],
        }

    def encode_zero_image(self) -> dict[str, Tensor]:
        comfy.model_management.load_model_gpu(self.vision.patcher)
        size = self.vision.image_size
        pixels = torch.zeros(1, 3, size, size, device=self.vision.load_device)
        last, penultimate, projected, *_ = self.vision.model(pixel_values=pixels, intermediate_output=-2)
        device = comfy.model_management.intermediate_device()
        layers = {"projected": projected, "penultimate": penultimate, "last": last}
        return {name: value.to(device) for name, value in layers.items()}


def embed_faces(
    selected_faces: Sequence[SelectedFace], analyzer: types.FaceAnalyzerProtocol | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The raw ArcFace vectors [n, 512] of the faces, and the hash of the recognizer's file, by encoder id."""
    if analyzer is None:
        return {}, {}
    vectors = torch.stack(
        [analyzer.embed(alignment.convert_to_uint8(selected.photo), selected.face) for selected in selected_faces]
    )
    key = analyzer.feature.format_encoder_id(analyzer.sha256)
    return {key: vectors}, {key: analyzer.sha256}


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Image features by encoder id: of the faces [n, ...] and of the zero image [1, ...]; and the file hashes."""

    embeddings: dict[str, Tensor]
    zero_embeddings: dict[str, Tensor]
    hashes: dict[str, str]


def encode_image_features(
    selected_faces: Sequence[SelectedFace], head_crops: Tensor, encoder: types.ImageEncoderProtocol, has_faces: bool
) -> ImageFeatures:
    """Encode the photos and, if `has_faces`, the face crops that adapters read."""
    features = ImageFeatures({}, {}, {})
    zero_layers, sha256 = encoder.encode_zero_image(), encoder.sha256
    default_layers = clip_vision.DEFAULT_LAYERS_BY_FAMILY[encoder.family]
    layers_by_crop = clip_vision.LAYERS_BY_ARCHITECTURE.get(encoder.architecture, default_layers)
    for crop, layers in layers_by_crop.items():
        if crop not in WHOLE_PHOTO_CROPS and not has_faces:
            continue
        comfy.model_management.throw_exception_if_processing_interrupted()
        outputs = [encoder.encode(batch) for batch in batch_by_size(cut_crops(selected_faces, head_crops, crop))]
        for layer in layers:
            key = Feature(f"{encoder.family}.{encoder.architecture}", layer, crop).format_encoder_id(sha256)
            features.embeddings[key] = torch.cat([output[layer] for output in outputs]).half().cpu()
            if layer in zero_layers:
                features.zero_embeddings[key] = zero_layers[layer].half().cpu()
            features.hashes[key] = sha256
    return features


def encode_joint_tokens(
    selected_faces: Sequence[SelectedFace], encoder: types.OmniIDEncoderProtocol
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The Omni-ID tokens [1, L, C] of all faces, encoded jointly, and the hash of the encoder's file, by encoder id."""
    size = encoder.spec.image_size
    faces = torch.stack([alignment.align_face(face.photo, face.face.kps, size) for face in selected_faces])
    distinct, weight = select_distinct_images(faces, [1.0] * len(faces))
    key = OMNI_ID_FEATURE.format_encoder_id(encoder.sha256)
    return {key: encoder.encode(faces[distinct], weight).half()}, {key: encoder.sha256}


def _to_image_encoder(connected: Any) -> types.ImageEncoderProtocol | None:
    """Wrap a connected CLIP_VISION; IMAGE_ENCODER is returned as it is. Raises ValueError if it is not a CLIP."""
    if not isinstance(connected, ClipVisionModel):
        return connected
    if connected.model_type != "clip_vision_model":
        raise ValueError(
            f"got a CLIP_VISION of type {connected.model_type}; expected a CLIP image encoder; load CLIP ViT-H/14, "
            "which most adapters need, or the encoder that the adapter's report names; load SigLIP with Load Image "
            "Encoder"
        )
    return ClipVisionEncoder(connected)


def cut_crops(selected_faces: Sequence[SelectedFace], head_crops: Tensor, crop: str) -> list[Tensor]:
    """The images [H, W, 3] of one kind of crop, one per selected face."""
    if crop in WHOLE_PHOTO_CROPS:
        return [WHOLE_PHOTO_CROPS[crop](selected.photo) for selected in selected_faces]
    if crop == "head":
        return list(head_crops.float() / 255)
    return [alignment.CROP_FUNCTIONS[crop](selected.photo, selected.face.kps) for selected in selected_faces]


def batch_by_size(images: Sequence[Tensor]) -> list[Tensor]:
    """Images [H, W, 3] as batches of equal size, in order, each limited in pixels to save memory."""
    batches: list[Tensor] = []
    for shape, group in groupby(images, key=lambda image: image.shape):
        batches += torch.stack(list(group)).split(max(1, MAX_BATCH_PIXELS // (shape[0] * shape[1])))
    return batches


def encode_identity(
    selected_faces: Sequence[SelectedFace],
    name: str,
    selector: FaceSelector,
    encoder: types.ImageEncoderProtocol | None,
    omni_id_encoder: types.OmniIDEncoderProtocol | None,
) -> Identity:
    """The identity of the selected faces, with every feature that the connected encoders can compute."""
    whole_photo = selector.pick == detection.PICK_WHOLE_PHOTO
    detected = selector.analyzer is not None and not whole_photo
    scale = alignment.HEAD_CROP_SCALE if detected else 1.0
    crops = [alignment.crop_head(selected.photo, selected.face, scale) for selected in selected_faces]
    head_crops = torch.stack([crop for crop, _ in crops])
    vectors, hashes = embed_faces(selected_faces, selector.analyzer)
    features = ImageFeatures({}, {}, {})
    if encoder is not None:
        features = encode_image_features(selected_faces, head_crops, encoder, detected or whole_photo)
    joint_embeddings, joint_hashes = (
        ({}, {}) if omni_id_encoder is None else encode_joint_tokens(selected_faces, omni_id_encoder)
    )
    return Identity(
        name=name.strip() or "person",
        box=torch.stack([face.box for _, face in crops]),
        kps=torch.stack([face.kps for _, face in crops]),
        score=torch.tensor([face.score for _, face in crops]),
        weight=torch.ones(len(crops)),
        crop=head_crops,
        embeddings=vectors | features.embeddings,
        zero_embeddings=features.zero_embeddings,
        sources=tuple(
            f"{selected.note.split(':')[0]}, {selected.photo.shape[1]}x{selected.photo.shape[0]}"
            for selected in selected_faces
        ),
        hashes=hashes | features.hashes | joint_hashes,
        joint_embeddings=joint_embeddings,
    )


def draw_face_preview(selected_faces: Sequence[SelectedFace]) -> Tensor:
    """The photos with every face numbered from left to right, the selected one in green, [n, H, W, 3]."""
    images = []
    for selected in selected_faces:
        image, scale = drawing.downscale_image(selected.photo)
        for i, face in enumerate(selected.detected_faces, 1):
            scaled_face = Face(face.box * scale, face.kps * scale, face.score)
            color = drawing.SELECTED_COLOR if face is selected.face else drawing.DETECTED_COLOR
            image = drawing.draw_face(image, scaled_face, str(i), color)
        images.append(image)
    return drawing.letterbox_images(images)


def describe_agreement(identity: Identity) -> list[str]:
    """Report lines: how similar the faces are and which do not fit, if there are several ArcFace vectors."""
    key = next((key for key in identity.embeddings if key.startswith("arcface.")), None)
    if key is None or len(identity) < 2:
        return []
    lowest = float(compute_cosine_matrix(identity.embeddings[key]).min())
    outliers = ", ".join(identity.sources[i] for i in find_outliers(identity.embeddings[key]))
    return [
        f"lowest cosine between the faces: {lowest:.2f}",
        f"probably someone else: {outliers}" if outliers else "no outliers",
    ]


class EncodeIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        photo = io.Image.Input("photo", tooltip="One or more photos of the person, as a batch of one size.")
        return io.Schema(
            node_id="LikenessEncodeIdentity",
            display_name="Encode Identity",
            category="likeness/identity",
            description="Turns photos of one person into an identity: detects the faces and runs the connected "
            "encoders on them. The preview shows all detected faces, the selected ones in green.",
            search_aliases=["face id", "embed face", "reference photo"],
            inputs=[
                io.Autogrow.Input(
                    "photos",
                    template=io.Autogrow.TemplatePrefix(photo, prefix="photo_", min=1, max=16),
                    tooltip="1 to 16 batches of photos. Each batch may have its own size.",
                ),
                io.String.Input(
                    "name", default="person",
                    tooltip="Name of the person, 1 to 120 characters. Save Identity uses it as the file name.",
                ),
                io.Combo.Input(
                    "pick", options=list(PICK_OPTIONS), default="largest",
                    tooltip="Which face of each photo to use. nth: counted from the left, starting at 1, as numbered "
                    "in the preview. most alike: the face most similar to 'like'. whole photo: the image is already "
                    "a face crop; no face detection.",
                ),
                io.Combo.Input(
                    "on_missing", options=["stop", "skip"], default="stop",
                    tooltip="What to do with a photo in which that face is not found: stop with an error, or skip it.",
                ),
                types.FaceAnalyzerSocket.Input(
                    "face_analyzer", optional=True,
                    tooltip="From Load Face Analyzer: detects the faces and computes the face embeddings for FaceID, "
                    "InstantID and PuLID.",
                ),
                io.MultiType.Input(
                    "image_encoder", [types.ImageEncoderSocket, io.ClipVision], optional=True,
                    tooltip="From Load CLIP Vision or Load Image Encoder: for IP-Adapter, Plus, FaceID-Plus and PuLID.",
                ),
                io.Int.Input(
                    "nth", default=1, min=1, max=100, optional=True, advanced=True,
                    tooltip="For pick nth: number of the face, counted from the left, 1 to 100.",
                ),
                types.IdentitySocket.Input(
                    "like", optional=True, tooltip="For pick most alike: the person to look for in the photos."
                ),
                types.OmniIDSocket.Input(
                    "omni_id", optional=True,
                    tooltip="From Load Omni-ID Encoder: encodes all faces jointly into one set of tokens. Needs a face "
                    "analyzer, or pick whole photo.",
                ),
            ],
            outputs=[
                types.IdentitySocket.Output(display_name="identity"),
                io.Image.Output(
                    display_name="preview", tooltip="The photos with all faces numbered, the selected ones in green."
                ),
                io.String.Output(
                    display_name="report", tooltip="Detector sizes, quality of each face, stored embeddings."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        photos: dict[str, Any],
        name: str,
        pick: str,
        on_missing: str,
        face_analyzer: types.FaceAnalyzerProtocol | None = None,
        image_encoder: Any = None,
        nth: int = 1,
        like: Identity | None = None,
        omni_id: types.OmniIDEncoderProtocol | None = None,
    ) -> io.NodeOutput:
        if face_analyzer is None and image_encoder is None and omni_id is None:
            raise ValueError(
                "got no face analyzer, image encoder or Omni-ID encoder; expected at least one; connect what the "
                "adapter needs (see the report of its loader)"
            )
        if omni_id is not None and face_analyzer is None and pick != detection.PICK_WHOLE_PHOTO:
            raise ValueError(
                "got an Omni-ID encoder without a face analyzer to detect the faces; connect a face analyzer, or set "
                "pick to 'whole photo' if the images are already face crops"
            )
        selector = FaceSelector(pick, face_analyzer, nth, like)
        batches = [batch for batch in photos.values() if batch is not None]
        selected_faces, skipped = select_faces(split_photos(batches), selector, on_missing)
        identity = encode_identity(selected_faces, name, selector, _to_image_encoder(image_encoder), omni_id)
        stored = f"stored embeddings: {', '.join((*identity.embeddings, *identity.joint_embeddings))}"
        notes = (selected.note for selected in selected_faces)
        report = "\n".join([*notes, *skipped, *describe_agreement(identity), stored])
        return io.NodeOutput(identity, draw_face_preview(selected_faces), report)


NODES = [EncodeIdentity]
