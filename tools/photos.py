"""Photos for trying the workflows, from NASA's portrait of the astronaut Eileen Collins (public domain)."""

from __future__ import annotations

from pathlib import Path

# Nearer and a little to one side, as further photos of the same person.
TURNS = ((0.95, 0, 20, 0, 0.95, 4), (0.9, 0.05, 10, -0.05, 0.9, 22))


def make(folder: Path) -> None:
    """Write `portrait.png`, `portrait_2.png` to `_4` (the same person), `other_person.png` (who looks different)."""
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
    left, top = (portrait.transform(portrait.size, Image.Transform.AFFINE, m) for m in TURNS)
    folder.mkdir(parents=True, exist_ok=True)
    portrait.save(folder / "portrait.png")
    left.save(folder / "portrait_3.png")
    top.save(folder / "portrait_4.png")
    Image.fromarray(second).save(folder / "portrait_2.png")
    Image.fromarray(other).save(folder / "other_person.png")
