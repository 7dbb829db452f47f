"""Drawing on images: labeled face boxes, InstantID's key points, region maps and attention heat maps."""

from __future__ import annotations

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ..spec import Face

Color = tuple[float, float, float]
SELECTED_COLOR, DETECTED_COLOR, LABEL_COLOR = (0.2, 0.9, 0.3), (1.0, 0.6, 0.1), (1.0, 1.0, 1.0)
LABEL_BACKGROUND_BRIGHTNESS = 0.15  # brightness of the image behind a label, relative to its own
DIGIT_HEIGHT, FONT_SIZE = 7, 10  # in pixels at scale 1; Pillow's built-in font has digits of 0.7 times its size

# InstantID: the points are red, green, blue, yellow and magenta; each limb connects a point to the nose in its color.
KEYPOINT_COLORS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0))
KEYPOINT_LIMBS = ((0, 2), (1, 2), (3, 2), (4, 2))
LIMB_HALF_WIDTH, LIMB_BRIGHTNESS, KEYPOINT_RADIUS = 4.0, 0.6, 10.0


# Colors of people in a region map, in order, repeated if there are more people.
PERSON_COLORS: dict[str, Color] = {
    "red": (0.90, 0.32, 0.25), "blue": (0.25, 0.55, 0.92), "green": (0.30, 0.75, 0.38), "yellow": (0.95, 0.75, 0.20),
    "violet": (0.62, 0.40, 0.85), "teal": (0.20, 0.75, 0.78), "pink": (0.95, 0.50, 0.70), "brown": (0.60, 0.45, 0.30),
}  # fmt: skip
EMPTY_BRIGHTNESS, OVERLAP_BRIGHTNESS = 0.22, 1.0

# From no attention to the maximum; the opacity is that of the maximum.
HEATMAP_COLORS: tuple[Color, ...] = (
    (0.05, 0.05, 0.35), (0.15, 0.45, 0.85), (0.2, 0.8, 0.4), (0.95, 0.85, 0.2), (0.9, 0.15, 0.1),
)  # fmt: skip
HEATMAP_OPACITY = 0.75


def _pixel_grid(height: int, width: int) -> Tensor:
    """The coordinates x, y of every pixel, [H, W, 2]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((x, y), dim=-1).double()


def _blend_color(image: Tensor, mask: Tensor, color: Color) -> Tensor:
    """Blend a color into an image [H, W, 3] by a mask [H, W], 0 to 1."""
    return torch.lerp(image, torch.tensor(color, dtype=image.dtype), mask[..., None].to(image.dtype))


def _read_mask(canvas: Image.Image) -> Tensor:
    """A grayscale Pillow image as a mask [H, W], 0 to 1."""
    pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
    return pixels.view(canvas.height, canvas.width).float() / 255


def render_text_mask(text: str, scale: int) -> Tensor:
    """A line of digits as an antialiased mask [7 * scale, W], 0 to 1."""
    font = ImageFont.load_default(size=FONT_SIZE * scale)
    canvas = Image.new("L", (max(1, round(font.getlength(text))), DIGIT_HEIGHT * scale))
    ImageDraw.Draw(canvas).text((0, canvas.height), text, fill=255, font=font, anchor="ls")
    return _read_mask(canvas)


def draw_face(image: Tensor, face: Face, text: str, color: Color) -> Tensor:
    """Draw a face's box, its key points, and a label above the box, on a copy of an image [H, W, 3]."""
    height, width = image.shape[:2]
    line_width = max(2, round(max(height, width) / 300))
    limit = 2 * max(height, width)  # Pillow's coordinates are limited to 32 bits
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    x0, y0, x1, y1 = (round(value) for value in face.box.clamp(-limit, limit).tolist())
    corners = (x0 - line_width, y0 - line_width, max(x0, x1) + line_width - 1, max(y0, y1) + line_width - 1)
    draw.rectangle(corners, outline=255, width=line_width)
    for x, y in face.kps.clamp(-limit, limit).round().int().tolist():
        draw.rectangle((x - line_width, y - line_width, x + line_width, y + line_width), fill=255)
    out = _blend_color(image, _read_mask(canvas), color)
    label = _label_mask(text, line_width + 1)
    left = max(0, min(x0, width - label.shape[1]))
    top = max(0, min(y0 - line_width - label.shape[0], height - label.shape[0]))
    _draw_label_mask(out, label, left, top, color)
    return out


def draw_label(image: Tensor, text: str) -> Tensor:
    """Draw a line of digits in the upper left corner of a copy of an image [H, W, 3]; clipped to the image."""
    out = image.clone()
    _draw_label_mask(out, _label_mask(text, max(1, round(image.shape[0] / 112))), 0, 0, LABEL_COLOR)
    return out


def _label_mask(text: str, scale: int) -> Tensor:
    """A line of digits with a margin of `scale` pixels, as a mask."""
    return pad(render_text_mask(text, scale), (scale,) * 4)


def _draw_label_mask(image: Tensor, mask: Tensor, left: int, top: int, color: Color) -> None:
    """Draw a label mask on a dark background into an image, in place."""
    mask = mask[: image.shape[0] - top, : image.shape[1] - left]
    patch = image[top : top + mask.shape[0], left : left + mask.shape[1]]
    patch.copy_(_blend_color(patch * LABEL_BACKGROUND_BRIGHTNESS, mask, color))


def draw_keypoints(faces: list[Tensor], height: int, width: int) -> Tensor:
    """Draw five key points [5, 2] per face on black, [H, W, 3], as InstantID's pipeline does."""
    pixels, out = _pixel_grid(height, width), torch.zeros(height, width, 3)
    for points in (p.double() for p in faces):
        for outer, nose in KEYPOINT_LIMBS:
            a, b = points[outer], points[nose]
            length = float((b - a).norm())
            if length:
                along = (b - a) / length
                offset = pixels - (a + b) / 2
                u, v = offset @ along, offset @ torch.stack((-along[1], along[0]))
                limb = (u / (length / 2)) ** 2 + (v / LIMB_HALF_WIDTH) ** 2 <= 1
                out = _blend_color(out, limb, KEYPOINT_COLORS[outer])
    out = out * LIMB_BRIGHTNESS
    for points in faces:
        for point, color in zip(points.double(), KEYPOINT_COLORS, strict=True):
            out = _blend_color(out, (pixels - point).norm(dim=-1) <= KEYPOINT_RADIUS, color)
    return out


def get_person_color_name(index: int) -> str:
    """The name of a person's color in region maps. `index` counts from 0."""
    return list(PERSON_COLORS)[index % len(PERSON_COLORS)]


def draw_region_map(masks: list[Tensor | None], height: int, width: int) -> Tensor:
    """Draw the people's masks [height, width], each in its color, as an image [height, width, 3].

    Dark where there is no mask, white where several overlap. People without a mask (None) are not drawn.
    """
    out, total = torch.full((height, width, 3), EMPTY_BRIGHTNESS), torch.zeros(height, width, 1)
    for index, mask in enumerate(masks):
        if mask is not None:
            color = torch.tensor(PERSON_COLORS[get_person_color_name(index)])
            out = out + mask[..., None] * (color - EMPTY_BRIGHTNESS)
            total = total + mask[..., None]
    overlap = (total - 1).clamp(0, 1)
    return (out * (1 - overlap) + OVERLAP_BRIGHTNESS * overlap).clamp(0, 1)


def overlay_heatmap(images: Tensor, heatmap: Tensor) -> Tensor:
    """Overlay attention [n, h, w] on grayscale images [n, H, W, 3], relative to its maximum: [n, H, W, 3]."""
    share = (heatmap / heatmap.max().clamp(min=torch.finfo(heatmap.dtype).tiny))[:, None]
    share = interpolate(share, images.shape[1:3], mode="bilinear").movedim(1, -1)
    position = share * (len(HEATMAP_COLORS) - 1)
    colors, low = torch.tensor(HEATMAP_COLORS), position.long().clamp(max=len(HEATMAP_COLORS) - 2)[..., 0]
    color = torch.lerp(colors[low], colors[low + 1], position - low[..., None])
    gray = images.mean(-1, keepdim=True)
    return torch.lerp(gray.expand_as(images), color, HEATMAP_OPACITY * share.sqrt())


def enlarge_image(image: Tensor, height: int, width: int) -> Tensor:
    """Upscale an image [h, w, 3] to [height, width, 3] with nearest neighbor."""
    return interpolate(image.movedim(-1, 0)[None], (height, width), mode="nearest-exact")[0].movedim(0, -1)


def downscale_image(image: Tensor, max_size: int = 1024) -> tuple[Tensor, float]:
    """Downscale an image [h, w, 3] to at most `max_size` pixels on its longer side. Returns it and the scale."""
    scale = min(1.0, max_size / max(image.shape[:2]))
    if scale == 1:
        return image, scale
    size = [max(1, round(side * scale)) for side in image.shape[:2]]
    batch = image.movedim(-1, 0)[None].float()
    return interpolate(batch, size, mode="bilinear", antialias=True)[0].movedim(0, -1), scale


def letterbox_images(images: list[Tensor]) -> Tensor:
    """Center images of any sizes [h, w, 3] on black in one batch [n, H, W, 3]."""
    height, width = max(image.shape[0] for image in images), max(image.shape[1] for image in images)
    out = torch.zeros(len(images), height, width, 3)
    for canvas, image in zip(out, images, strict=True):
        top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
        canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return out.clamp(0, 1)
