"""Photos whose faces the stand-in detector knows, and where those are."""

from __future__ import annotations

import torch
from comfyui_likeness.likeness.spec import Face
from comfyui_likeness.tools import standin_faces
from torch import Tensor

COLLINS = Face(torch.tensor(standin_faces.BOX).float(), torch.tensor(standin_faces.KPS).float(), 0.9)


def portrait() -> Tensor:
    """NASA's portrait of Eileen Collins, float [512, 512, 3]."""
    return torch.from_numpy(standin_faces.portrait()).float() / 255


def stranger() -> Tensor:
    """The portrait mirrored and of other colours: a face, but not hers."""
    return portrait().flip(1).flip(-1) * 0.8


def couple() -> Tensor:
    """She on the left and the stranger on the right, [512, 512, 3]."""
    return torch.cat((portrait()[:, 96:352], stranger()[:, 160:416]), dim=1)


def place_of(index: int) -> Tensor:
    """The box of `couple`'s face 0 or 1, as measured in the portrait."""
    x0, y0, x1, y1 = standin_faces.BOX
    left = x0 - 96 if index == 0 else 512 - x1 - 160 + 256
    return torch.tensor([left, y0, left + x1 - x0, y1], dtype=torch.float32)


def empty() -> Tensor:
    """A picture without a face."""
    return torch.full((256, 256, 3), 0.5)
