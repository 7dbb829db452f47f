"""Sample photos for the workflows, from NASA's portrait of the astronaut Eileen Collins (public domain)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Affine transforms that imitate more photos of the same person: closer and slightly to one side.
PHOTO_TRANSFORMS = (
    (0.95, 0, 20, 0, 0.95, 4), (0.9, 0.05, 10, -0.05, 0.9, 22), (0.85, -0.04, 50, 0.04, 0.85, 0),
    (0.92, 0.08, 4, -0.08, 0.92, 40), (0.8, 0, 60, 0, 0.85, 8),
)  # fmt: skip

# Three people: x of the head's center, y of its top, half its width, depth value.
DEPTH_MAP_FIGURES = ((150, 130, 48, 190), (384, 90, 54, 225), (622, 140, 46, 180))


def write_sample_photos(folder: Path) -> None:
    """Write the sample photos to a folder.

    `portrait.png` and `portrait_2.png` to `portrait_7.png` show one person, `other_person.png` and `third_person.png`
    show others. `group_depth.png` is a depth map of three people, lighter is closer.
    """
    import numpy as np
    from PIL import Image
    from skimage import data

    portrait = Image.fromarray(data.astronaut())
    width, height = portrait.size
    moved = portrait.transform(portrait.size, Image.Transform.AFFINE, (1, 0, -6, 0, 1, 4))
    second = np.clip(np.asarray(moved) * 1.08 + 6, 0, 255).astype(np.uint8)
    # Mirrored, stretched and with swapped channels: still a face, but not the same one.
    mirrored = portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    wide = width * 9 // 8
    left = (wide - width) // 2
    stretched = mirrored.resize((wide, height)).crop((left, 0, left + width, height))
    other = (np.asarray(stretched)[..., [2, 1, 0]] * 0.8).astype(np.uint8)
    third = (np.asarray(mirrored)[..., [1, 0, 2]] * 0.9).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    portrait.save(folder / "portrait.png")
    for number, matrix in enumerate(PHOTO_TRANSFORMS, 3):
        portrait.transform(portrait.size, Image.Transform.AFFINE, matrix).save(folder / f"portrait_{number}.png")
    Image.fromarray(second).save(folder / "portrait_2.png")
    Image.fromarray(other).save(folder / "other_person.png")
    Image.fromarray(third).save(folder / "third_person.png")
    draw_group_depth().save(folder / "group_depth.png")


def draw_group_depth() -> Any:
    """A depth map of three people from the hips up, 768 x 512, for depth ControlNets."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter

    image = Image.fromarray(np.linspace(20, 62, 512).astype(np.uint8)[:, None].repeat(768, axis=1))
    draw = ImageDraw.Draw(image)
    for x, top, size, depth in DEPTH_MAP_FIGURES:
        draw.ellipse((x - size, top, x + size, top + 2.6 * size), fill=depth)
        shoulders = (x - 2.1 * size, top + 2.9 * size, x + 2.1 * size, 600)
        draw.rounded_rectangle(shoulders, radius=int(size), fill=depth - 12)
    return image.filter(ImageFilter.GaussianBlur(4)).convert("RGB")
