"""Face alignment: similarity transforms from five key points, and the crops that the encoders read.

ArcFace crops follow insightface, FFHQ crops follow facexlib.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, interpolate

from ..spec import FACE_CROP_SIZES, Face

HEAD_CROP_SIZE = 512  # side of a stored crop in pixels
HEAD_CROP_SCALE = 2.0  # its side relative to the face's box

# Left eye, right eye, nose, left and right mouth corner in ArcFace's crop of 112 pixels.
ARCFACE_TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))

# The same points in FFHQ's crop of 512 pixels, as in facexlib, which first downscales photos to 1024 pixels.
FFHQ_TEMPLATE = (
    (192.98138, 239.94708), (318.90277, 240.1936), (256.63416, 314.01935), (201.26117, 371.41043),
    (313.08905, 371.15118),
)  # fmt: skip
FFHQ_CROP_SIZE, FFHQ_MAX_PHOTO_SIZE = 512, 1024
FFHQ_BORDER_COLOR = (132 / 255, 133 / 255, 135 / 255)  # RGB, outside the photo
# An ellipse that roughly covers face and hair in that crop: center, half axes and softness of the edge in pixels.
HEAD_ELLIPSE_CENTER, HEAD_ELLIPSE_AXES, HEAD_ELLIPSE_SOFTNESS = (256.0, 242.0), (164.0, 238.0), 24.0
LUMA_WEIGHTS = (0.299, 0.587, 0.114)


def make_arcface_template(size: int) -> Tensor:
    """The five key points [5, 2] in an aligned crop, in pixels.

    Sizes divisible by 112 use the tight framing; those divisible by 128 keep the scale and show more below and at the
    sides, as in insightface. Raises ValueError for any other size.
    """
    points = torch.tensor(ARCFACE_TEMPLATE, dtype=torch.float64)
    if size % 112 == 0:
        return points * (size / 112)
    if size % 128 == 0:
        return points * (size / 128) + torch.tensor([8 * size / 128, 0.0], dtype=torch.float64)
    raise ValueError(f"got a face crop of {size} pixels; expected a multiple of 112 or 128")


def estimate_similarity_transform(source: Tensor, target: Tensor) -> Tensor:
    """Least-squares similarity transform from points [n, 2] to points [n, 2], as [2, 3] float64 (Umeyama 1991)."""
    source, target = source.double(), target.double()
    a, b = source - source.mean(0), target - target.mean(0)
    u, s, vh = torch.linalg.svd(b.T @ a / len(a))
    sign = torch.ones(2, dtype=torch.float64)
    sign[1] = torch.sign(torch.linalg.det(u) * torch.linalg.det(vh))
    rotation = u @ torch.diag(sign) @ vh
    scale = (s * sign).sum() / a.square().sum(1).mean()
    return torch.cat((scale * rotation, (target.mean(0) - scale * rotation @ source.mean(0))[:, None]), dim=1)


def warp_photo(photo: Tensor, matrix: Tensor, size: int) -> Tensor:
    """Warp a photo [H, W, 3] with a source-to-crop matrix [2, 3]: [size, size, 3], bilinear, black outside."""
    height, width = photo.shape[:2]
    inverse = torch.linalg.inv(matrix[:, :2].double())
    pixels = torch.arange(size, dtype=torch.float64)
    source = torch.stack(torch.meshgrid(pixels, pixels, indexing="xy"), dim=-1) - matrix[:, 2].double()
    source = source @ inverse.T  # pixels of the photo, [size, size, 2]
    # Only the pixels around the crop are converted, because photos are much larger than faces.
    low, high = source.nan_to_num().flatten(0, 1).aminmax(dim=0)
    last = torch.tensor([width, height]) - 1
    left, top = (low.floor() - 1).clamp(min=0).minimum(last).int().tolist()
    right, bottom = (high.ceil() + 1).clamp(min=0).minimum(last).int().tolist()
    photo, source = photo[top : bottom + 1, left : right + 1], source - torch.tensor([left, top])
    grid = (2 * source + 1) / torch.tensor([photo.shape[1], photo.shape[0]]) - 1
    out = grid_sample(photo.movedim(-1, 0)[None].double(), grid[None], "bilinear", "zeros", align_corners=False)
    return out[0].movedim(0, -1).to(photo.dtype if photo.is_floating_point() else torch.float32)


def align_face(photo: Tensor, kps: Tensor, size: int) -> Tensor:
    """The aligned face crop [size, size, 3] of a photo [H, W, 3] in 0..1."""
    return warp_photo(photo, estimate_similarity_transform(kps, make_arcface_template(size)), size)


def downscale_photo(photo: Tensor, scale: float) -> Tensor:
    """Downscale a photo [H, W, 3] by `scale` < 1 with antialiasing."""
    batch = photo.movedim(-1, 0)[None]
    return interpolate(batch, scale_factor=scale, mode="bilinear", antialias=True)[0].movedim(0, -1)


def align_face_ffhq(photo: Tensor, kps: Tensor) -> Tensor:
    """The head aligned as in facexlib: [512, 512, 3] of a photo [H, W, 3] in 0..1, gray outside.

    facexlib estimates the transform with LMedS; this is the least-squares estimate.
    """
    scale = FFHQ_MAX_PHOTO_SIZE / max(photo.shape[:2])
    if scale < 1:
        photo, kps = downscale_photo(photo, scale), (kps + 0.5) * scale - 0.5
    border = torch.tensor(FFHQ_BORDER_COLOR, dtype=photo.dtype)
    return (
        warp_photo(photo - border, estimate_similarity_transform(kps, torch.tensor(FFHQ_TEMPLATE)), FFHQ_CROP_SIZE)
        + border
    )


def make_head_ellipse_mask() -> Tensor:
    """A soft ellipse that roughly covers face and hair in an FFHQ crop: [512, 512, 1], 0 to 1."""
    pixels = torch.arange(FFHQ_CROP_SIZE)
    x, y = ((pixels - center) / axis for center, axis in zip(HEAD_ELLIPSE_CENTER, HEAD_ELLIPSE_AXES, strict=True))
    inside = 1 - (x[None, :] ** 2 + y[:, None] ** 2).sqrt()  # distance to the edge, relative to the half axis
    return (inside * min(HEAD_ELLIPSE_AXES) / HEAD_ELLIPSE_SOFTNESS + 0.5).clamp(0, 1)[..., None]


def make_gray_face_on_white(photo: Tensor, kps: Tensor) -> Tensor:
    """PuLID's face crop: [512, 512, 3], the FFHQ crop in gray with a white background.

    PuLID segments the background with a face parsing network; here an ellipse approximates it.
    """
    gray = (align_face_ffhq(photo, kps) @ torch.tensor(LUMA_WEIGHTS, dtype=photo.dtype))[..., None]
    mask = make_head_ellipse_mask().to(gray.dtype)
    return (gray * mask + (1 - mask)).expand(-1, -1, 3)


# Aligned crops by name: from a photo [H, W, 3] in 0..1 and five key points [5, 2].
CROP_FUNCTIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: partial(align_face, size=size) for name, size in FACE_CROP_SIZES.items()},
    "ffhq512": make_gray_face_on_white,
}


def convert_to_uint8(image: Tensor) -> Tensor:
    """Convert an image in 0..1 to uint8."""
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


def crop_head(photo: Tensor, face: Face, scale_to_box: float = HEAD_CROP_SCALE) -> tuple[Tensor, Face]:
    """Crop the head with a margin: uint8 [HEAD_CROP_SIZE, HEAD_CROP_SIZE, 3], and the face in pixels of the crop.

    The crop is a square of `scale_to_box` times the box's longer side, black outside the photo, and contains every
    aligned crop.
    """
    low, high = face.box[:2].double(), face.box[2:].double()
    side = float((high - low).max()) * scale_to_box
    corner, scale = (low + high) / 2 - side / 2, HEAD_CROP_SIZE / side
    if scale < 1:
        photo = downscale_photo(photo, scale)
    downscale = min(scale, 1.0)
    matrix = torch.eye(2, 3, dtype=torch.float64) * (scale / downscale)
    # Coordinates refer to pixel centers, downscaling to pixel edges.
    matrix[:, 2] = -corner * scale + (1 - downscale) / 2
    crop = convert_to_uint8(warp_photo(photo, matrix, HEAD_CROP_SIZE))
    box, kps = (((points.view(-1, 2).double() - corner) * scale).float() for points in (face.box, face.kps))
    return crop, Face(box.flatten(), kps, face.score)


def make_whole_photo_face(photo: Tensor) -> Face:
    """A face for a photo that is already a face crop: its box is the full photo, its key points ArcFace's template."""
    height, width = photo.shape[:2]
    side = min(height, width)
    corner = torch.tensor([(width - side) / 2, (height - side) / 2])
    kps = make_arcface_template(112).float() * (side / 112) + corner
    return Face(torch.tensor([0.0, 0.0, float(width), float(height)]), kps, 0.0)
