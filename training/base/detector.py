"""A detector of drawn faces for insightface: SCRFD on pictures of 128 pixels, trained on shards and what befalls them.

Its file reads 128 x 128 pixels and nothing else: insightface then shrinks or enlarges every photo to that, whatever
size is asked for. Faces are to be an eighth of the picture or more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss
from torchvision.ops import box_iou, distance_box_iou_loss
from torchvision.utils import draw_bounding_boxes, draw_keypoints

from ..data import View
from ..task import Batch, Task
from . import disturb, onnx_file, scrfd
from .source import Source, sheet, some

FILE, SIDE = "detector.onnx", 128
NEAR = 0.3  # of a face's size: how far off its middle an anchor may lie, to either side
ALIKE = 1.415  # how many times as large as its anchor a face may be, or as small
MOST = 4  # faces in a picture, at most; the rest are not asked for
STILL = 0.25  # of the pictures stay as they were painted
SIZES = (20.0, 100.0)  # pixels of a face, after zooming
ZOOMS = (0.4, 2.5)
PLACES = (0.15, 0.85)  # of the side, where its middle comes to lie
BLURS = (28, 40, 56, 80)  # pixels that remain of a blurred picture's side
SMALL_ERROR = 0.05  # of a face's size: below it the error of points counts squared
POINTS = 4.0  # what the error of points counts beside the rest
MIRRORED = (0, 1, 3, 2, 4, 6, 5)  # corners, eyes, nose, corners of the mouth
TRIED, SHOWN = 64, 8  # pictures of the check, and of them in the sheet
RIGHT = 0.5  # IoU of a face that is found
BLURRED = 36  # pixels that remain in the second check


@dataclass(frozen=True)
class Settings:
    """The first convolution makes `width` channels. `disturb` is how much of other light the pictures bear."""

    width: int = 16
    disturb: float = 1.0


class Detector(Task):
    """Losses: of scores, which tell their box's IoU (quality focal loss, Li et al. 2006.04388), of boxes and points."""

    def __init__(self, settings: Settings, source: Source, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, source
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network: Any = scrfd.Scrfd(settings.width)
        self.network: scrfd.Scrfd = network.to(memory_format=torch.channels_last)

    def batch(self, chance: Generator, size: int) -> Batch:
        views = [self.source.shown(number, SIDE) for number in some(chance, size)]
        pictures, faces = moved(read(views), together(views), chance)
        pictures = disturb.lit(disturb.blurred(pictures, chance, BLURS), chance, self.settings.disturb)
        return {"pictures": pictures, "faces": faces}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        at = self._anchors(batch["faces"].device)
        return losses(self.network(batch["pictures"]), batch["faces"], at)

    def draw(self, chance: Generator) -> dict[str, Tensor]:
        """How faces of people outside the training are found, in painted pictures and in blurred ones."""
        views = self._strangers
        device = next(self.parameters()).device
        pictures, wanted = read(views).to(device), [faces_of(view) for view in views]
        sharp, soft = (self.find(x) for x in (pictures, disturb.blur(pictures, BLURRED)))
        shown = torch.stack(
            [marked(view.picture, faces) for view, faces in zip(views[:SHOWN], sharp[:SHOWN], strict=True)]
        )
        blurred = {f"{name}_blurred": value for name, value in measure(soft, wanted).items()}
        return {"faces": sheet(*shown.chunk(2)), **measure(sharp, wanted), **blurred}

    @cached_property
    def _strangers(self) -> list[View]:
        from .portraits import World

        return [World("validation").shown(number, SIDE) for number in range(TRIED)]

    def find(self, pictures: Tensor) -> list[Tensor]:
        """The faces of each picture, [k, 7, 2]."""
        found = scrfd.faces(self.network(pictures), self._anchors(pictures.device))
        return [faces.cpu() for faces, _ in found]

    @staticmethod
    def _anchors(device: torch.device) -> scrfd.Anchors:
        return scrfd.Anchors(*(value.to(device) for value in scrfd.anchors(SIDE)))

    def save(self, folder: Path, notes: Mapping[str, Any]) -> None:
        told = onnx_file.metadata("detector", asdict(self.settings), notes)
        network = scrfd.Exported(self.network, SIDE)
        onnx_file.export(network, folder / FILE, (1, 3, SIDE, SIDE), network.NAMES, told)


def read(views: Sequence[View]) -> Tensor:
    """Pictures as insightface has them read: [n, 3, H, W] of about -1 to 1."""
    return (torch.stack([view.picture for view in views]).movedim(-1, 1).float() - 127.5) / 128


def faces_of(view: View) -> Tensor:
    """All faces of a picture, [k, 7, 2]."""
    own = torch.cat((view.box.view(2, 2), view.kps))
    return torch.cat((own[None], view.others))


def together(views: Sequence[View]) -> Tensor:
    """The faces of pictures [n, MOST, 7, 2], each picture's own first; where there are fewer, of no size."""
    faces = torch.zeros(len(views), MOST, 7, 2)
    for row, view in zip(faces, views, strict=True):
        there = faces_of(view)[:MOST]
        row[: len(there)] = there
    return faces


def moved(pictures: Tensor, faces: Tensor, chance: Generator) -> tuple[Tensor, Tensor]:
    """Pictures zoomed, so that their own faces are of any size and at any place; a part is not. Half are mirrored.

    What lies beyond a picture is grey or black, as around photos with a margin and beside those that are not square.
    """
    n, side = len(pictures), pictures.shape[-1]
    still, size, x, y, mirrored, black = torch.rand(6, n, generator=chance).unbind()
    own, middle = sizes(faces[:, 0]), faces[:, 0, :2].mean(1)
    zoom = (SIZES[0] * (SIZES[1] / SIZES[0]) ** size / own).clamp(*ZOOMS)
    place = (PLACES[0] + (PLACES[1] - PLACES[0]) * torch.stack((x, y), -1)) * side
    flip = torch.stack((torch.where(mirrored < 0.5, -1, 1), torch.ones(n)), -1)  # [n, 2]
    kept, centre = (still < STILL)[:, None], (side - 1) / 2
    place = torch.where(kept, (middle - centre) * flip + centre, place)
    scale = torch.where(kept, 1, zoom[:, None]) * flip
    # In halves of the side, as grids have it.
    was, goes = ((2 * at + 1) / side - 1 for at in (middle, place))
    theta = torch.cat((torch.diag_embed(1 / scale), (was - goes / scale)[..., None]), -1)
    beyond = torch.where(black < 0.5, -1.0, 0.0).view(n, 1, 1, 1)
    seen = disturb.moved(pictures - beyond, theta, "zeros") + beyond
    put = (faces - middle[:, None, None]) * scale[:, None, None] + place[:, None, None]
    put = torch.where((mirrored < 0.5).view(n, 1, 1, 1), flipped(put), put)
    return seen, torch.where(sizes(faces)[..., None, None] > 0, put, 0)


def flipped(faces: Tensor) -> Tensor:
    """Faces [..., 7, 2] whose x were mirrored, with left and right named anew."""
    out = faces[..., MIRRORED, :].clone()
    out[..., :2, 0] = out[..., :2, 0].flip(-1)
    return out


def sizes(faces: Tensor) -> Tensor:
    """The root of the area of each box: [...] of [..., 7, 2]."""
    return (faces[..., 1, :] - faces[..., 0, :]).prod(-1).sqrt()


def assign(faces: Tensor, at: scrfd.Anchors) -> Tensor:
    """Which face of its picture [n, m, 7, 2] each anchor stands for: [n, a], -1 for none.

    A face is told by the anchors near its middle that are about as large; where two are near, the nearer one in parts
    of its size. No face of 14 pixels or more is without an anchor, as NEAR spans half a stride to either side.
    """
    size = sizes(faces)[..., None]  # [n, m, 1]
    off = (faces[:, :, None, :2].mean(3) - at.middles).abs().amax(-1) / size  # [n, m, a]
    times = size.clamp(at.sizes.min(), at.sizes.max()) / at.sizes
    fits = (size > 0) & (off <= NEAR) & (times.log2().abs() <= math.log2(ALIKE))
    nearest, which = torch.where(fits, off, torch.inf).min(1)
    return torch.where(nearest.isfinite(), which, -1)


def losses(found: scrfd.Found, faces: Tensor, at: scrfd.Anchors) -> dict[str, Tensor]:
    """All are means over the anchors that stand for faces [n, m, 7, 2]."""
    which = assign(faces, at)
    here = which >= 0
    count = here.sum().clamp(min=1)
    row, place = here.nonzero(as_tuple=True)
    true, own = faces[row, which[here]], scrfd.Anchors(*(value[place] for value in at))
    said = scrfd.decode(found.boxes[here], found.points[here], own)
    boxes = said[:, :2].flatten(1), true[:, :2].flatten(1)
    wanted = torch.zeros_like(found.scores)
    wanted[here] = box_iou(*boxes).diagonal().detach()
    off = (found.scores.detach().sigmoid() - wanted).square()
    scores = binary_cross_entropy_with_logits(found.scores, wanted, off, reduction="sum")
    size = sizes(true)[:, None, None]
    points = smooth_l1_loss(said[:, 2:] / size, true[:, 2:] / size, reduction="none", beta=SMALL_ERROR)
    summed = {
        "scores": scores, "boxes": distance_box_iou_loss(*boxes, reduction="sum"),
        "points": POINTS * points.mean((1, 2)).sum(),
    }  # fmt: skip
    return {name: value / count for name, value in summed.items()}


def measure(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, Tensor]:
    """The part of the faces that are found, finds a picture that are none, the error of points in eye distances."""
    right, false, errors = 0, 0, []
    for seen, true in zip(found, wanted, strict=True):
        overlap = box_iou(true[:, :2].flatten(1), seen[:, :2].flatten(1))
        hit = overlap > RIGHT
        right += int(hit.any(1).sum())
        false += int((~hit.any(0)).sum())
        for face, mate in hit.nonzero().tolist():
            eyes = (true[face, 2] - true[face, 3]).norm()
            errors.append((seen[mate, 2:] - true[face, 2:]).norm(dim=-1).mean() / eyes)
    faces = sum(map(len, wanted))
    error = torch.stack(errors).mean() if errors else torch.tensor(torch.nan)
    return {"found": torch.tensor(right / faces), "false": torch.tensor(false / len(found)), "error": error}


def marked(picture: Tensor, faces: Tensor) -> Tensor:
    """A picture uint8 [H, W, 3] with faces drawn on it: [3, H, W] from 0 to 1."""
    out = picture.movedim(-1, 0)
    if len(faces):
        out = draw_bounding_boxes(out, faces[:, :2].flatten(1), colors="lime")
        out = draw_keypoints(out, faces[:, 2:], colors="red", radius=1)
    return out.float() / 255
