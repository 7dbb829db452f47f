"""Where FlashFace shall paint the face: the input channel that its UNet has for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.utils
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.nn.functional import interpolate

from ...likeness import reference_faces


@dataclass(frozen=True, eq=False)
class Masked:
    """A mask [B, H, W] of the picture, white at the face; stands in for the host's `concat_cond`."""

    mask: Tensor

    def __call__(self, **given: Any) -> Tensor:
        noise = given["noise"]
        small = interpolate(self.mask[:, None].float(), size=noise.shape[-2:], mode="nearest")
        return comfy.utils.repeat_to_batch_size((small > 0.5).to(noise), noise.shape[0])


@dataclass(frozen=True)
class Boxed:
    """A box in parts of the picture, as the authors make a mask of it; stands in for the host's `concat_cond`."""

    box: tuple[float, ...]

    def __call__(self, **given: Any) -> Tensor:
        noise = given["noise"]
        height, width = (8 * size for size in noise.shape[-2:])
        return reference_faces.position(self.box, width, height).to(noise).expand(noise.shape[0], 1, -1, -1)


def parse_box(text: str) -> Boxed:
    """`0.3, 0.1, 0.6, 0.4` as a box. Raises ValueError on anything else."""
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        x0 = y0 = x1 = y1 = -1.0
    if not (0 <= x0 <= x1 <= 1 and 0 <= y0 <= y1 <= 1):
        raise ValueError(
            f"got the face box {text!r}; expected left, top, right and bottom in parts of the picture, 0 to 1, "
            "as 0.3, 0.1, 0.6, 0.4; write it so, or leave it empty"
        )
    return Boxed((x0, y0, x1, y1))


def positioned(model: ModelPatcher, mask: Tensor | None, box: str) -> ModelPatcher:
    """The model with a face position in its input, if there is one. Raises ValueError where it has no channel."""
    if mask is None and not box.strip():
        return model
    if mask is not None and box.strip():
        raise ValueError("got a face position and a face box; expected one of them; disconnect one, or empty the other")
    channels = model.model.model_config.unet_config["in_channels"]
    if channels != 5:
        raise ValueError(
            f"got a face position for a model of {channels} input channels; expected FlashFace's, which has 5; "
            "disconnect it: an inpainting model takes the place from its mask"
        )
    if mask is not None and not mask.isfinite().all():
        raise ValueError("got a face position with NaN or infinite values; expected 0 to 1; make the mask again")
    model = model.clone()
    model.add_object_patch("concat_cond", parse_box(box) if mask is None else Masked(mask))
    return model
