"""The demo models, loaded and run through the pack's own nodes, and the recognizer that only evaluates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...likeness.faces import alignment, detection
from ...likeness.spec import Face
from ...nodes.evaluate import embed_text
from ...nodes.loaders import (
    adaface_loader,
    adapter_loader,
    demo_loader,
    face_analyzer,
    files,
    flashface_loader,
    omni_id_loader,
)
from ...nodes.types import FaceAnalyzerProtocol, LoadedPrompter, LoadedReferenceNet, OmniIDEncoderProtocol
from ...training.adapters.face_encoders import ArcFaceReader
from ...training.base_models import unet
from ...training.base_models.face_recognizer import EMBEDDING_SIZE, FACE_SIZE
from ..publish_weights import RUNS_FOLDER

FACE_MODEL_PACK = "demo"
EVAL_RECOGNIZER_FILE = "demo/judge.onnx"  # in weights/
MAX_CACHED_LATENTS = 32  # image batches whose latents are cached
REFERENCE_CACHE_MIB = 1024  # size limit of the reference feature cache
DENOISER_KEYS = ("ori_encoder.0.weight", "encoder.0.weight")  # in a FlashFace file that holds the denoising UNet
LATENT_HEIGHT = 16


class CachedVAE:
    """A VAE that caches the latents of recent images: all rows of one person encode the same photos."""

    def __init__(self, vae: Any) -> None:
        self._vae, self._latents = vae, dict[bytes, Tensor]()

    def encode(self, images: Tensor) -> Tensor:
        key = hashlib.sha256(images.contiguous().numpy().tobytes()).digest()
        if key not in self._latents:
            self._latents = dict([*self._latents.items()][1 - MAX_CACHED_LATENTS :]) | {key: self._vae.encode(images)}
        return self._latents[key]


@dataclass(eq=False)
class DemoStack:
    """MODEL, CLIP, VAE and CLIP_VISION of `Load Demo Models`, and the face analyzer of `Load Face Analyzer`.

    Adapters are loaded on first use and cached, and so are encoded prompts.
    """

    model: ModelPatcher
    clip: Any
    vae: Any
    clip_vision: Any
    analyzer: FaceAnalyzerProtocol
    eval_recognizer: ArcFaceReader
    cached_vae: CachedVAE = field(init=False)
    steps: int = unet.SAMPLING_OPTIONS["steps"]
    _adapters: dict[str, Any] = field(default_factory=dict)
    _prompts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cached_vae = CachedVAE(self.vae)

    def load_adapter(self, file: str) -> Any:
        """Load with Load Identity Adapter."""
        return self._load_once(file, lambda: adapter_loader.LoadAdapter.execute(file, "auto").args[0])

    def load_flashface(self, file: str) -> tuple[ModelPatcher, LoadedReferenceNet]:
        """Load with Load FlashFace; on the demo's MODEL if the file does not hold the denoising UNet."""
        shape = files.read_tensor_shape(file, flashface_loader.FLASHFACE_FOLDER, DENOISER_KEYS)
        base = self.model if shape is None else None
        return self._load_once(
            file, lambda: flashface_loader.LoadFlashFace.execute(file, base, REFERENCE_CACHE_MIB).args
        )

    def load_omni_encoder(self, file: str) -> OmniIDEncoderProtocol:
        """Load with Load Omni-ID Encoder."""
        return self._load_once(file, lambda: omni_id_loader.LoadOmniID.execute(file).args[0])

    def load_prompter(self, file: str, arc2face: str) -> LoadedPrompter:
        """Load with Load AdaFace."""
        return self._load_once(file, lambda: adaface_loader.LoadAdaFace.execute(file, arc2face).args[0])

    def _load_once(self, file: str, load: Callable[[], Any]) -> Any:
        if file not in self._adapters:
            self._adapters[file] = load()
        return self._adapters[file]

    def encode_prompt(self, text: str) -> tuple[Tensor, Tensor]:
        """A prompt's token states for the UNet [1, 77, width], and its CLIP text embedding [1, width]."""
        if text not in self._prompts:
            ((states, _),) = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))
            self._prompts[text] = states, embed_text(self.clip, text, states.shape[-1])[None]
        return self._prompts[text]

    def encode_prompts(self, texts: Sequence[str]) -> Tensor:
        """Token states of prompts, [p, 77, width]."""
        return torch.cat([self.encode_prompt(text)[0] for text in texts])

    def sample_images(self, model: ModelPatcher, embeddings: Tensor, seed: int, aspect_ratio: float = 1.0) -> Tensor:
        """An image for each prompt, [p, H, W, 3], by ComfyUI's sampler; the noise depends on the seed and the size."""
        channels = model.model.latent_format.latent_channels
        latent = torch.zeros(len(embeddings), channels, LATENT_HEIGHT, round(LATENT_HEIGHT * aspect_ratio))
        samples = comfy.sample.sample(
            model, comfy.sample.prepare_noise(latent, seed), positive=[[embeddings, {}]],
            negative=[[self.encode_prompt("")[0], {}]], latent_image=latent, disable_pbar=True, seed=seed,
            **{**unet.SAMPLING_OPTIONS, "steps": self.steps},
        )  # fmt: skip
        return self.vae.decode(samples).cpu().clamp(0, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        """CLIP image embeddings, [p, width]."""
        return self.clip_vision.encode_image(images, crop=True)["image_embeds"].cpu()

    def detect_faces(self, image: Tensor) -> Sequence[Face]:
        """The analyzer's faces, as in Encode Identity, largest first."""
        faces = detection.find_faces(image, self.analyzer.detect).faces
        return sorted(faces, key=lambda face: -face.size)

    def embed_faces(self, images: Sequence[Tensor], faces: Sequence[Face | None]) -> Tensor:
        """Embeddings by the evaluation recognizer of one face per image, [p, 512]; zeros where the face is None."""
        out = torch.zeros(len(images), EMBEDDING_SIZE)
        indices = [i for i, face in enumerate(faces) if face is not None]
        crops = [
            alignment.convert_to_uint8(alignment.align_face(image.double(), face.kps, FACE_SIZE))
            for image, face in zip(images, faces, strict=True)
            if face is not None
        ]
        if crops:
            out[indices] = self.eval_recognizer.read_faces(torch.stack(crops), torch.device("cpu"))
        return out

    def embed_largest_faces(self, images: Tensor) -> Tensor:
        """Embeddings of the largest face of each image [p, H, W, 3]: [p, 512]."""
        return self.embed_faces(list(images), [next(iter(self.detect_faces(image)), None) for image in images])

    def embed_faces_by_half(self, images: Tensor) -> Tensor:
        """Embeddings of the largest face in the left and in the right half of each image: [p, 2, 512]."""
        middle = images.shape[2] / 2
        detected = [self.detect_faces(image) for image in images]
        halves = [
            [next((face for face in faces if _in_right_half(face, middle) is right), None) for faces in detected]
            for right in (False, True)
        ]
        return torch.stack([self.embed_faces(list(images), faces) for faces in halves], dim=1)


def _in_right_half(face: Face, middle: float) -> bool:
    return float(face.box[0] + face.box[2]) / 2 > middle


def load_demo_stack(steps: int) -> DemoStack:
    """Load the shipped models. Raises ValueError if a file is missing."""
    register_adapter_folders()
    analyzer, _ = face_analyzer.load_face_analyzer(FACE_MODEL_PACK, "auto")
    recognizer = ArcFaceReader(files.SHIPPED_WEIGHTS / EVAL_RECOGNIZER_FILE, "judge")
    return DemoStack(*demo_loader.load_demo_models(), analyzer=analyzer, eval_recognizer=recognizer, steps=steps)


def register_adapter_folders() -> None:
    """Register the folders of adapters with ComfyUI: the shipped ones, then the unpublished ones of finished runs."""
    files.register_model_folders(sorted(RUNS_FOLDER.glob("*/model")))


def find_adapter_file(file: str) -> Path | None:
    """The path of an adapter file, or None if it is in no model folder."""
    try:
        return files.find_model_file(file, *adapter_loader.ADAPTER_FOLDERS)
    except ValueError:
        return None


@dataclass(frozen=True)
class WeightsFile:
    """The first digits of a weights file's sha256, and the training notes in its metadata."""

    digest: str
    notes: str


def describe_weights_file(path: Path) -> WeightsFile:
    metadata = (files.read_native_metadata(path) or {}).get("notes", {})
    notes = [f"{key} {value}" for key, value in metadata.items()]
    if files.SHIPPED_WEIGHTS not in path.parents:
        notes.append("does not ship")
    return WeightsFile(files.hash_file(path)[:8], ", ".join(notes))


def list_base_weights(folder: Path = files.SHIPPED_WEIGHTS) -> dict[str, WeightsFile]:
    """The files that all rows depend on, by path in the folder."""
    paths = [*(folder / "demo").glob("*.safetensors"), *(folder / "demo").glob("*.onnx")]
    paths += (folder / "insightface").rglob("*.onnx")
    return {path.relative_to(folder).as_posix(): describe_weights_file(path) for path in sorted(paths)}
