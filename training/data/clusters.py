"""Annotated images of people, and albums: images by person and index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class AnnotatedImage(NamedTuple):
    """An image of one person. Coordinates are in pixels; pixel centers are integers."""

    image: Tensor  # uint8 [H, W, 3]
    caption: str
    kps: Tensor  # [5, 2], left and right as the viewer sees them: left eye, right eye, nose, mouth corners
    box: Tensor  # [4]: left, top, right, bottom of the face
    mask: Tensor  # bool [H, W], the face with its beard, without hair
    other_faces: Tensor  # [n, 7, 2], all other faces in the image: two box corners, five key points
    detailed_captions: Sequence[str] = ()  # captions that describe the people, too


class ClusterBatch(NamedTuple):
    """The batch of one step: n images of each of B people."""

    images: Tensor  # uint8 [B, n, H, W, 3]
    kps: Tensor  # [B, n, 5, 2]
    boxes: Tensor  # [B, n, 4]
    masks: Tensor  # bool [B, n, H, W]
    captions: Sequence[Sequence[str]]  # B of n
    identities: Sequence[str]  # B


class Album(Protocol):
    """People by index, and the images of each by index."""

    def __len__(self) -> int: ...

    def get_name(self, identity: int) -> str: ...

    def count_images(self, identity: int) -> int:
        """The number of images of a person."""
        ...

    def load_annotated_image(self, identity: int, index: int) -> AnnotatedImage: ...


def make_box_mask(box: Tensor, shape: Sequence[int]) -> Tensor:
    """The mask [H, W] of a box in an image of `shape` (H, W, ...)."""
    y, x = torch.arange(shape[0])[:, None], torch.arange(shape[1])[None, :]
    left, top, right, bottom = box.tolist()
    return (x >= left) & (x <= right) & (y >= top) & (y <= bottom)


def crop_and_resize(sample: AnnotatedImage, resolution: int, aspect_ratio: float = 1.0) -> AnnotatedImage:
    """Crop to the largest area of this width / height, the face as near its center as possible, and resize.

    `resolution` is the new height.
    """
    height, width = sample.image.shape[:2]
    size = (round(resolution * aspect_ratio), resolution)
    if (width, height) == size:
        return sample
    crop_height = min(height, round(width / aspect_ratio))
    crop_width = min(width, round(crop_height * aspect_ratio))
    center = (sample.box[:2] + sample.box[2:]) / 2
    left, top = (
        int(min(max(float(at) + 0.5 - cropped / 2, 0), length - cropped))
        for at, cropped, length in zip(center, (crop_width, crop_height), (width, height), strict=True)
    )
    crop = (slice(top, top + crop_height), slice(left, left + crop_width))
    image = Image.fromarray(sample.image[crop].numpy()).resize(size, Image.Resampling.LANCZOS)
    mask = Image.fromarray(sample.mask[crop].numpy().astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
    corner, scale = torch.tensor([left, top]) - 0.5, resolution / crop_height
    kps, box, other_faces = (
        (points - corner) * scale - 0.5 for points in (sample.kps, sample.box.view(2, 2), sample.other_faces)
    )
    middles = other_faces[:, :2].mean(1)
    inside = ((middles > -0.5) & (middles < torch.tensor(size) - 0.5)).all(1)
    return AnnotatedImage(
        torch.from_numpy(np.array(image)),
        sample.caption,
        kps,
        box.flatten(),
        torch.from_numpy(np.array(mask)) > 127,
        other_faces[inside],
        sample.detailed_captions,
    )
