"""Photos for trying the workflows, from NASA's portrait of the astronaut Eileen Collins (public domain)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Nearer and a little to one side, as further photos of the same person.
TURNS = (
    (0.95, 0, 20, 0, 0.95, 4), (0.9, 0.05, 10, -0.05, 0.9, 22), (0.85, -0.04, 50, 0.04, 0.85, 0),
    (0.92, 0.08, 4, -0.08, 0.92, 40), (0.8, 0, 60, 0, 0.85, 8),
)  # fmt: skip

# Three people: the middle of the head, its top, half its width, how near.
STANDING = ((150, 130, 48, 190), (384, 90, 54, 225), (622, 140, 46, 180))


def make(folder: Path) -> None:
    """Write `portrait.png`, `portrait_2.png` to `_7` (the same person), `other_person.png` and `third_person.png` (who
    look different), and `group_depth.png`: where three people stand, the nearer the lighter.
    """
    import numpy as np
    from PIL import Image
    from skimage import data

    portrait = Image.fromarray(data.astronaut())
    width, height = portrait.size
    moved = portrait.transform(portrait.size, Image.Transform.AFFINE, (1, 0, -6, 0, 1, 4))
    second = np.clip(np.asarray(moved) * 1.08 + 6, 0, 255).astype(np.uint8)
    # Mirrored, broader and of other colours: still a face, not the same one.
    wide = width * 9 // 8
    broad = (
        portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        .resize((wide, height))
        .crop(((wide - width) // 2, 0, (wide - width) // 2 + width, height))
    )
    other = (np.asarray(broad)[..., [2, 1, 0]] * 0.8).astype(np.uint8)
    third = (np.asarray(portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT))[..., [1, 0, 2]] * 0.9).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    portrait.save(folder / "portrait.png")
    for number, turn in enumerate(TURNS, 3):
        turned = portrait.transform(portrait.size, Image.Transform.AFFINE, turn)
        turned.save(folder / f"portrait_{number}.png")
    Image.fromarray(second).save(folder / "portrait_2.png")
    Image.fromarray(other).save(folder / "other_person.png")
    Image.fromarray(third).save(folder / "third_person.png")
    group_depth().save(folder / "group_depth.png")


def group_depth() -> Any:
    """A depth map of three people from the hips up, 768 x 512, as ControlNets for depth read it."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter

    picture = Image.fromarray(np.linspace(20, 62, 512).astype(np.uint8)[:, None].repeat(768, axis=1))
    draw = ImageDraw.Draw(picture)
    for middle, top, size, near in STANDING:
        draw.ellipse((middle - size, top, middle + size, top + 2.6 * size), fill=near)
        draw.rounded_rectangle(
            (middle - 2.1 * size, top + 2.9 * size, middle + 2.1 * size, 600), radius=int(size), fill=near - 12
        )
    return picture.filter(ImageFilter.GaussianBlur(4)).convert("RGB")
