"""Photos whose faces the stand-in detector finds, and their positions."""

from __future__ import annotations

import torch
from comfyui_likeness.likeness.spec import Face
from comfyui_likeness.tools.standins import face_networks
from torch import Tensor

COLLINS_FACE = Face(
    torch.tensor(face_networks.PORTRAIT_BOX).float(), torch.tensor(face_networks.PORTRAIT_KEY_POINTS).float(), 0.9
)


def load_portrait() -> Tensor:
    """NASA's portrait of Eileen Collins, float [512, 512, 3]."""
    return torch.from_numpy(face_networks.load_portrait()).float() / 255


def make_stranger_photo() -> Tensor:
    """The portrait mirrored and with other colours: another person."""
    return load_portrait().flip(1).flip(-1) * 0.8


def make_couple_photo() -> Tensor:
    """Eileen Collins on the left and the stranger on the right, [512, 512, 3]."""
    return torch.cat((load_portrait()[:, 96:352], make_stranger_photo()[:, 160:416]), dim=1)


def get_couple_face_box(index: int) -> Tensor:
    """The box of face 0 or 1 in the couple photo."""
    x0, y0, x1, y1 = face_networks.PORTRAIT_BOX
    left = x0 - 96 if index == 0 else 512 - x1 - 160 + 256
    return torch.tensor([left, y0, left + x1 - x0, y1], dtype=torch.float32)


def make_empty_photo() -> Tensor:
    """An image without a face."""
    return torch.full((256, 256, 3), 0.5)
