"""Photos for trying the workflows, from NASA's portrait of the astronaut Eileen Collins (public domain)."""

from __future__ import annotations

from pathlib import Path


def make(folder: Path) -> None:
    """Write `portrait.png`, `portrait_2.png` (the same person) and `other_person.png` (who looks different)."""
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
    folder.mkdir(parents=True, exist_ok=True)
    portrait.save(folder / "portrait.png")
    Image.fromarray(second).save(folder / "portrait_2.png")
    Image.fromarray(other).save(folder / "other_person.png")
