"""FlashFace's face position: an input channel of its UNet says where the face should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.utils
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.nn.functional import interpolate

from ....likeness.attention import regions
from ....likeness.faces import reference_faces


@dataclass(frozen=True, eq=False)
class FacePositionMask:
    """A mask [B, H, W] of the image, 1 at the face. Replaces the model's `concat_cond`."""

    mask: Tensor

    def __call__(self, **kwargs: Any) -> Tensor:
        noise = kwargs["noise"]
        resized = interpolate(self.mask[:, None], size=noise.shape[-2:], mode="nearest")
        return comfy.utils.repeat_to_batch_size((resized > 0.5).to(noise), noise.shape[0])


@dataclass(frozen=True)
class FacePositionBox:
    """A box in fractions of the image, made a mask as the authors do. Replaces the model's `concat_cond`."""

    box: tuple[float, ...]

    def __call__(self, **kwargs: Any) -> Tensor:
        noise = kwargs["noise"]
        height, width = (8 * size for size in noise.shape[-2:])
        return (
            reference_faces.make_face_position_mask(self.box, width, height).to(noise).expand(noise.shape[0], 1, -1, -1)
        )


def parse_face_box(text: str) -> FacePositionBox:
    """A box from text such as `0.3, 0.1, 0.6, 0.4`. Raises ValueError on other text."""
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        x0 = y0 = x1 = y1 = -1.0
    if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
        raise ValueError(
            f"got the face box {text!r}; expected left, top, right and bottom as fractions of the image, 0 to 1, "
            "such as 0.3, 0.1, 0.6, 0.4; correct it, or leave it empty"
        )
    return FacePositionBox((x0, y0, x1, y1))


def apply_face_position(model: ModelPatcher, mask: Tensor | None, box: str) -> ModelPatcher:
    """The model with a face position, if there is one. Raises ValueError if its UNet has no channel for it."""
    if mask is None and not box.strip():
        return model
    if mask is not None and box.strip():
        raise ValueError("got a face position and a face box; expected one of them; disconnect one, or empty the other")
    channels = model.model.model_config.unet_config["in_channels"]
    expected = model.model.latent_format.latent_channels + 1
    if channels != expected:
        raise ValueError(
            f"got a face position for a model with {channels} input channels; expected FlashFace's model, which has "
            f"{expected}; disconnect the face position; inpainting models take the position from their mask"
        )
    position = parse_face_box(box) if mask is None else FacePositionMask(regions.check_mask(mask, "the face position"))
    model = model.clone()
    model.add_object_patch("concat_cond", position)
    return model
