"""Arc2Face (Papantoniou et al. 2403.11641), AdaFace's teacher: face embeddings as tokens of a finetuned text encoder.

Text encoder and UNet are initialized from the base model. The prompt is always "photo of a id person"; the target is
another image of the same person.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...likeness.checkpoints import native_metadata
from ...likeness.methods import arc2face
from ...likeness.spec import Arc2FaceSpec
from ...nodes.loaders import files
from ..base_models import unet
from ..data.image_source import ImageSource
from ..task import Batch
from . import prompt_tokens
from .face_task import FaceTask, FaceTaskConfig

UNET_FILE_SUFFIX = "_unet.safetensors"
# Which UNet parameters are trained, by name.
TRAINABLE_UNET_PARTS: Mapping[str, Callable[[str], bool]] = {
    "all": lambda _: True, "attentions": lambda name: ".attn2." in name, "nothing": lambda _: False,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arc2FaceConfig(FaceTaskConfig):
    """`trainable_unet_part` is a key of TRAINABLE_UNET_PARTS; `face_dropout` is the probability of the empty prompt.

    `encoder_lr_scale` scales the learning rate of the text encoder. The face tokens of a small, untrained text encoder
    disturb the UNet, and at the full rate it would learn to suppress them before they distinguish people.
    """

    trainable_unet_part: str = "all"
    encoder_lr_scale: float = 1.0
    face_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.trainable_unet_part not in TRAINABLE_UNET_PARTS:
            raise ValueError(
                f"got trainable_unet_part = {self.trainable_unet_part!r} in [task]; "
                f"expected {' or '.join(TRAINABLE_UNET_PARTS)}"
            )


class Arc2FaceTask(FaceTask[Arc2FaceConfig]):
    """Trains text encoder and UNet. Loss: the mean squared error of the predicted noise."""

    def __init__(self, settings: Arc2FaceConfig, source: ImageSource, _seed: int) -> None:
        super().__init__(settings, source)
        self.text = prompt_tokens.build_trainable_text_model(self.frozen.text_encoder)
        self.model: Any = self.frozen.model
        for name, value in self.model.named_parameters():
            value.requires_grad_(TRAINABLE_UNET_PARTS[settings.trainable_unet_part](name))

    def learning_rate_scale(self, name: str) -> float:
        return self.settings.encoder_lr_scale if name.startswith("text.") else 1.0

    @property
    def dropout_rates(self) -> tuple[float, float, float]:
        return 0.0, self.settings.face_dropout, 0.0

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            batch = self.encode_batch(batch)
            noised = unet.NoisedLatents.from_batch(self.model, batch)
        faces, no_face = self.encode_conditions(batch["face_features"], ())
        text = torch.where(batch["drop_face"][:, None, None], no_face, faces)
        loss = unet.denoising_loss(
            self.model, noised, self.settings.snr_gamma, batch.get("loss_weights"), c_crossattn=text
        )
        return {"noise": loss}

    def get_base_model(self) -> Any:
        return self.model

    def encode_conditions(self, face_embeddings: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        faces = arc2face.encode_face_prompt(self.text, face_embeddings)
        return faces, arc2face.encode_empty_prompt(self.text, face_embeddings.device)

    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        """The text encoder under the config's `file` name, for Load AdaFace, and the UNet next to it."""
        num_heads = self.text.layers[0].self_attn.num_heads
        spec = Arc2FaceSpec(prompt_tokens.detect_base_family(self.text), num_heads, (self.reader.feature,), notes)
        name = self.settings.file
        save_file(
            prompt_tokens.collect_text_tensors(self.text, prompt_tokens.HOST_TEXT_PREFIX),
            folder / f"{name}.safetensors",
            arc2face.make_arc2face_metadata(spec),
        )
        weights = self.model.diffusion_model.state_dict()
        tensors = {unet.UNET_PREFIX + key: value.half().contiguous() for key, value in weights.items()}
        base_settings = (files.read_native_metadata(Path(self.settings.unet)) or {})["settings"]
        base_keys = {key: base_settings[key] for key in ("config", "prediction") if key in base_settings}
        settings = {**asdict(self.settings), **base_keys}
        save_file(
            tensors,
            folder / f"{name}{UNET_FILE_SUFFIX}",
            native_metadata.make_native_metadata("unet", "SD1.5", notes, settings=settings),
        )
