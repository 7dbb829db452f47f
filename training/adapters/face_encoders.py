"""Face encoders for training, matching the nodes: ArcFace, CLIP vision, Omni-ID, and VAE latents."""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import comfy.clip_vision
import torch
from comfy.clip_vision import ClipVisionModel
from torch import Tensor, nn

from ...likeness.faces import alignment, reference_faces
from ...likeness.methods import omni_id
from ...likeness.spec import Face, Feature
from ...nodes.attention import apply_fused
from ...nodes.encode import ClipVisionEncoder
from ...nodes.loaders import files, native_models
from ..base_models import face_recognizer, latents
from ..data.clusters import AnnotatedImage
from ..data.shard_source import crop_head
from ..omni_id import encoder, views

HEAD_CROP_NAME = "head"  # a crop of spec.CROPS


class FaceReader(Protocol):
    """Crops a face from an image, and encodes crops. `hash` identifies the weights and settings for caching."""

    @property
    def hash(self) -> str: ...

    def crop_face(self, sample: AnnotatedImage) -> Tensor:
        """The face crop, uint8 [H, W, 3] of fixed size; flattened if there are several crops (FaceAndImageReader)."""
        ...

    def read_faces(self, crops: Tensor, device: torch.device) -> Tensor:
        """Features [n, ...] of crops [n, ...], float32."""
        ...


class FaceEncoder(FaceReader, Protocol):
    """A reader whose features are stored in an identity."""

    @property
    def feature(self) -> Feature: ...

    def make_uncond_features(self) -> Tensor:
        """The unconditional features [1, ...], for no face."""
        ...


class ArcFaceReader:
    """A recognizer's raw embeddings [n, 512], as Load Face Analyzer computes them for that face pack."""

    def __init__(self, file: Path, pack: str) -> None:
        if not file.is_file():
            raise ValueError(f"got {file}, which does not exist; expected a face recognizer; train one first")
        self.file, self.feature = file, Feature(f"arcface.{pack}", "raw", "face112")
        self.hash = hashlib.sha256(file.read_bytes()).hexdigest()

    @cached_property
    def session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(str(self.file), options, onnxruntime.get_available_providers())

    def crop_face(self, sample: AnnotatedImage) -> Tensor:
        return alignment.convert_to_uint8(
            alignment.align_face(sample.image.double() / 255, sample.kps, face_recognizer.FACE_SIZE)
        )

    def read_faces(self, crops: Tensor, device: torch.device) -> Tensor:
        input_name = self.session.get_inputs()[0].name
        inputs = face_recognizer.normalize_faces(list(crops.cpu())).numpy()
        (embeddings,) = self.session.run(None, {input_name: inputs})
        return torch.from_numpy(embeddings).to(device)

    def make_uncond_features(self) -> Tensor:
        return torch.zeros(1, face_recognizer.EMBEDDING_SIZE)


class CLIPVisionReader:
    """A CLIP vision tower's hidden states [n, T, W] of a crop, as Encode Identity computes them.

    The default layer and crop are Plus-Face's.
    """

    def __init__(self, file: Path, layer: str = "penultimate", crop: str = HEAD_CROP_NAME) -> None:
        self.encoder = ClipVisionEncoder(load_clip_vision_file(file))
        self.feature = Feature(f"clip.{self.encoder.architecture}", layer, crop)
        self.hash = self.encoder.sha256
        self.width: int = self.encoder.vision.config["hidden_size"]

    def crop_face(self, sample: AnnotatedImage) -> Tensor:
        if self.feature.crop == HEAD_CROP_NAME:
            return crop_head(sample)
        crop_function = alignment.CROP_FUNCTIONS[self.feature.crop]
        return alignment.convert_to_uint8(crop_function(sample.image.float() / 255, sample.kps))

    @torch.no_grad()
    def read_faces(self, crops: Tensor, device: torch.device) -> Tensor:
        return self.encoder.encode(crops.float() / 255)[self.feature.layer].float().to(device)

    @torch.no_grad()
    def make_uncond_features(self) -> Tensor:
        return self.encoder.encode_zero_image()[self.feature.layer].float()


class FaceAndImageReader:
    """A recognizer and a vision tower as one reader: the crops and features of both, flattened and concatenated."""

    def __init__(self, face_reader: ArcFaceReader, image_reader: CLIPVisionReader) -> None:
        self.face_reader, self.image_reader = face_reader, image_reader
        self.hash = hashlib.sha256(
            f"{face_reader.hash} {image_reader.hash} {image_reader.feature}".encode()
        ).hexdigest()

    def crop_face(self, sample: AnnotatedImage) -> Tensor:
        return torch.cat([self.face_reader.crop_face(sample).flatten(), self.image_reader.crop_face(sample).flatten()])

    def read_faces(self, crops: Tensor, device: torch.device) -> Tensor:
        face_crops, image_crops = crops.tensor_split([3 * face_recognizer.FACE_SIZE**2], 1)
        image_size = math.isqrt(image_crops.shape[1] // 3)
        embeddings = self.face_reader.read_faces(face_crops.unflatten(1, (face_recognizer.FACE_SIZE, -1, 3)), device)
        states = self.image_reader.read_faces(image_crops.unflatten(1, (image_size, -1, 3)), device)
        return torch.cat([embeddings, states.flatten(1)], 1)

    def split_features(self, face_features: Tensor) -> dict[str, Tensor]:
        """Features by encoder id, as an identity stores them: embeddings [n, 512], hidden states [n, T, W]."""
        face_reader, image_reader = self.face_reader, self.image_reader
        embeddings, states = face_features.tensor_split([face_recognizer.EMBEDDING_SIZE], 1)
        return {
            face_reader.feature.format_encoder_id(face_reader.hash): embeddings,
            image_reader.feature.format_encoder_id(image_reader.hash): states.unflatten(1, (-1, image_reader.width)),
        }


class OmniIDReader:
    """An Omni-ID encoder's trunk states [n, S', trunk_width] of the face, as Encode Identity computes them.

    `join_photos` encodes them into tokens [rows, L, C], jointly for the photos of each row.
    """

    def __init__(self, file: Path) -> None:
        self.module, self.feature = encoder.load_encoder_file(file), omni_id.OMNI_ID_FEATURE
        self.hash = hashlib.sha256(file.read_bytes()).hexdigest()

    def crop_face(self, sample: AnnotatedImage) -> Tensor:
        return views.crop_view_face(sample, self.module.spec.image_size)[..., :3].contiguous()

    def read_faces(self, crops: Tensor, device: torch.device) -> Tensor:
        return encoder.extract_face_states(self.module.to(device), crops.to(device))

    def join_photos(self, face_features: Tensor, num_rows: int) -> Tensor:
        return encoder.encode_face_tokens(self.module.to(face_features.device), face_features, num_rows)

    def make_uncond_features(self) -> Tensor:
        spec = self.module.spec
        return torch.zeros(1, spec.tokens, spec.width)


class LatentReader:
    """VAE latents [n, c, face_size / 8, face_size / 8] of the head crop, as Apply Identity (Fused KV) computes them."""

    def __init__(self, vae_file: Path, autoencoder: nn.Module, face_size: int) -> None:
        self.autoencoder, self.face_size = autoencoder, face_size
        self.hash = hashlib.sha256(vae_file.read_bytes() + str(face_size).encode()).hexdigest()

    def crop_face(self, sample: AnnotatedImage) -> Tensor:
        crops = apply_fused.resize_face_crops(crop_head(sample)[None], self.face_size)
        return alignment.convert_to_uint8(crops[0])

    def read_faces(self, crops: Tensor, device: torch.device) -> Tensor:
        return latents.encode_latents_bf16(self.autoencoder, crops.to(device).movedim(-1, 1).float() / 255)


class ReferenceFaceReader(LatentReader):
    """VAE latents of the upright face alone on black, as Apply Identity (Reference) computes them."""

    def __init__(self, vae_file: Path, autoencoder: nn.Module, face_size: int) -> None:
        super().__init__(vae_file, autoencoder, face_size)
        self.hash = hashlib.sha256(f"reference {self.hash}".encode()).hexdigest()

    def crop_face(self, sample: AnnotatedImage) -> Tensor:
        photo, face = alignment.crop_head(sample.image.float() / 255, Face(sample.box.float(), sample.kps.float(), 1.0))
        return reference_faces.fit_to_square(
            reference_faces.crop_reference_face(photo, face.box, face.kps[:2]), self.face_size
        )


def load_clip_vision_file(file: Path) -> ClipVisionModel:
    """A vision tower in the native format, or any that ComfyUI loads. Raises ValueError on other files."""
    if files.read_native_metadata(file) is not None:
        return native_models.load_clip_vision(file)
    with native_models.report_file_errors(file, "a vision tower"):
        model = comfy.clip_vision.load(str(file))
    if model is None:
        raise ValueError(f"got {file}; expected a CLIP vision model that ComfyUI can load; train clip first")
    return model
