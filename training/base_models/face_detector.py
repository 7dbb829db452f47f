"""A face detector for drawn faces, run by insightface: SCRFD on 128 x 128 pixels, trained on augmented shard images.

Its file has a fixed input size of 128 x 128 pixels, to which insightface resizes every photo, whatever detector size is
set. Faces should fill an eighth of the image or more.
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

from ..data.clusters import AnnotatedImage
from ..data.image_source import ImageSource, make_image_grid, open_source, random_indices
from ..task import Batch, Task
from . import augmentation, onnx_export, scrfd

DETECTOR_FILE, INPUT_SIZE = "detector.onnx", 128
MAX_CENTER_OFFSET = 0.3  # between a face and its anchors, in x and y, relative to the face's size
MAX_SIZE_RATIO = 1.415  # between a face and its anchors
MAX_FACES_PER_IMAGE = 4  # further faces are ignored
UNCHANGED_FRACTION = 0.25  # of the images are not zoomed
FACE_SIZE_RANGE = (20.0, 100.0)  # pixels, after zooming
ZOOM_RANGE = (0.4, 2.5)
CENTER_RANGE = (0.15, 0.85)  # of a face's center, relative to the resolution
BLUR_SIZES = (28, 40, 56, 80)  # pixels
SMOOTH_L1_BETA = 0.05  # relative to the face's size
KEYPOINT_LOSS_WEIGHT = 4.0
MIRRORED_POINT_ORDER = (0, 1, 3, 2, 4, 6, 5)  # of box corners, eyes, nose, mouth corners
NUM_CHECK_IMAGES, NUM_SHOWN_IMAGES = 64, 8  # validation images that are measured, and of them in the image grid
MATCH_IOU = 0.5  # of a detection and the face that it counts for
CHECK_BLUR_SIZE = 36  # pixels, for the metrics on blurred images


@dataclass(frozen=True)
class DetectorConfig:
    """`width` is that of the first convolution; `augmentation_strength` scales the color jitter. The metrics are
    measured on images of `validation_data`, given as `data` in [run]."""

    width: int = 16
    augmentation_strength: float = 1.0
    validation_data: str = "portrait_world.world_source:open_validation_split"


class FaceDetector(Task):
    """Losses: scores, which predict the box's IoU (quality focal loss, Li et al. 2006.04388), boxes and key points."""

    def __init__(self, settings: DetectorConfig, source: ImageSource, seed: int) -> None:
        super().__init__()
        self.settings, self.source = settings, source
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network: Any = scrfd.SCRFD(settings.width)
        self.network: scrfd.SCRFD = network.to(memory_format=torch.channels_last)

    def make_batch(self, generator: Generator, batch_size: int) -> Batch:
        numbers = random_indices(generator, batch_size)
        samples = [self.source.load_annotated_image(number, INPUT_SIZE) for number in numbers]
        images, faces = zoom_and_mirror(normalize_images(samples), pad_faces(samples), generator)
        images = augmentation.blur_random_images(images, generator, BLUR_SIZES)
        images = augmentation.jitter_colors(images, generator, self.settings.augmentation_strength)
        return {"images": images, "faces": faces}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        anchor_grid = self._make_anchors(batch["faces"].device)
        return compute_detection_losses(self.network(batch["images"]), batch["faces"], anchor_grid)

    def make_samples(self, generator: Generator) -> dict[str, Tensor]:
        """Detections in validation images, with metrics for the sharp and for blurred images."""
        samples = self._validation_images
        device = next(self.parameters()).device
        images, targets = normalize_images(samples).to(device), [stack_faces(sample) for sample in samples]
        sharp, blurred = (self.find_faces(x) for x in (images, augmentation.blur_images(images, CHECK_BLUR_SIZE)))
        shown = torch.stack(
            [
                draw_faces(sample.image, faces)
                for sample, faces in zip(samples[:NUM_SHOWN_IMAGES], sharp[:NUM_SHOWN_IMAGES], strict=True)
            ]
        )
        blurred_metrics = {f"{name}_blurred": value for name, value in measure_detections(blurred, targets).items()}
        return {"faces": make_image_grid(*shown.chunk(2)), **measure_detections(sharp, targets), **blurred_metrics}

    @cached_property
    def _validation_images(self) -> list[AnnotatedImage]:
        source = open_source(self.settings.validation_data)
        return [source.load_annotated_image(number, INPUT_SIZE) for number in range(NUM_CHECK_IMAGES)]

    def find_faces(self, images: Tensor) -> list[Tensor]:
        """The faces [k, 7, 2] in each image."""
        selected = scrfd.select_faces(self.network(images), self._make_anchors(images.device))
        return [faces.cpu() for faces, _ in selected]

    @staticmethod
    def _make_anchors(device: torch.device) -> scrfd.Anchors:
        return scrfd.Anchors(*(value.to(device) for value in scrfd.make_anchors(INPUT_SIZE)))

    def save_model(self, folder: Path, notes: Mapping[str, Any]) -> None:
        metadata = onnx_export.build_onnx_metadata("detector", asdict(self.settings), notes)
        network = scrfd.ExportedSCRFD(self.network, INPUT_SIZE)
        input_shape = (1, 3, INPUT_SIZE, INPUT_SIZE)
        onnx_export.export_onnx(network, folder / DETECTOR_FILE, input_shape, network.OUTPUT_NAMES, metadata)


def normalize_images(samples: Sequence[AnnotatedImage]) -> Tensor:
    """Images normalized as in insightface: [n, 3, H, W] from about -1 to 1."""
    return (torch.stack([sample.image for sample in samples]).movedim(-1, 1).float() - 127.5) / 128


def stack_faces(sample: AnnotatedImage) -> Tensor:
    """All faces [k, 7, 2] of an image."""
    face = torch.cat((sample.box.view(2, 2), sample.kps))
    return torch.cat((face[None], sample.other_faces))


def pad_faces(samples: Sequence[AnnotatedImage]) -> Tensor:
    """The faces of a batch [n, MAX_FACES_PER_IMAGE, 7, 2], padded with faces of size 0."""
    padded = torch.zeros(len(samples), MAX_FACES_PER_IMAGE, 7, 2)
    for row, sample in zip(padded, samples, strict=True):
        faces = stack_faces(sample)[:MAX_FACES_PER_IMAGE]
        row[: len(faces)] = faces
    return padded


def zoom_and_mirror(images: Tensor, faces: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Zoom images so that their first face has a random size and position, except a part of them; mirror half of them.

    The area outside the original image is grey or black, as in padded photos.
    """
    n, resolution = len(images), images.shape[-1]
    keep_rolls, size, x, y, mirror_rolls, black_rolls = torch.rand(6, n, generator=generator).unbind()
    face_size, face_center = measure_face_sizes(faces[:, 0]), faces[:, 0, :2].mean(1)
    zoom = (FACE_SIZE_RANGE[0] * (FACE_SIZE_RANGE[1] / FACE_SIZE_RANGE[0]) ** size / face_size).clamp(*ZOOM_RANGE)
    target = (CENTER_RANGE[0] + (CENTER_RANGE[1] - CENTER_RANGE[0]) * torch.stack((x, y), -1)) * resolution
    flip = torch.stack((torch.where(mirror_rolls < 0.5, -1, 1), torch.ones(n)), -1)  # [n, 2]
    keep, image_center = (keep_rolls < UNCHANGED_FRACTION)[:, None], (resolution - 1) / 2
    target = torch.where(keep, (face_center - image_center) * flip + image_center, target)
    scale = torch.where(keep, 1, zoom[:, None]) * flip
    # In halves of the resolution, as in affine_grid.
    source_xy, target_xy = ((2 * point + 1) / resolution - 1 for point in (face_center, target))
    theta = torch.cat((torch.diag_embed(1 / scale), (source_xy - target_xy / scale)[..., None]), -1)
    padding = torch.where(black_rolls < 0.5, -1.0, 0.0).view(n, 1, 1, 1)
    zoomed = augmentation.warp_images(images - padding, theta, "zeros") + padding
    moved = (faces - face_center[:, None, None]) * scale[:, None, None] + target[:, None, None]
    moved = torch.where((mirror_rolls < 0.5).view(n, 1, 1, 1), mirror_faces(moved), moved)
    return zoomed, torch.where(measure_face_sizes(faces)[..., None, None] > 0, moved, 0)


def mirror_faces(faces: Tensor) -> Tensor:
    """Swap left and right in faces [..., 7, 2] whose x coordinates were mirrored."""
    mirrored = faces[..., MIRRORED_POINT_ORDER, :].clone()
    mirrored[..., :2, 0] = mirrored[..., :2, 0].flip(-1)
    return mirrored


def measure_face_sizes(faces: Tensor) -> Tensor:
    """The square root of each box's area: [...] of faces [..., 7, 2]."""
    return (faces[..., 1, :] - faces[..., 0, :]).prod(-1).sqrt()


def assign_anchors(faces: Tensor, anchor_grid: scrfd.Anchors) -> Tensor:
    """The face [n, m, 7, 2] that each anchor has to predict: its index [n, a], or -1 for none.

    An anchor gets a face with a similar center and size; of two, the one whose center is closer relative to its size.
    Every face of at least 14 pixels has an anchor, since MAX_CENTER_OFFSET spans half a stride on each side.
    """
    size = measure_face_sizes(faces)[..., None]  # [n, m, 1]
    offset = (faces[:, :, None, :2].mean(3) - anchor_grid.centers).abs().amax(-1) / size  # [n, m, a]
    ratio = size.clamp(anchor_grid.sizes.min(), anchor_grid.sizes.max()) / anchor_grid.sizes
    fits = (size > 0) & (offset <= MAX_CENTER_OFFSET) & (ratio.log2().abs() <= math.log2(MAX_SIZE_RATIO))
    nearest, indices = torch.where(fits, offset, torch.inf).min(1)
    return torch.where(nearest.isfinite(), indices, -1)


def compute_detection_losses(
    predictions: scrfd.AnchorPredictions, faces: Tensor, anchor_grid: scrfd.Anchors
) -> dict[str, Tensor]:
    """The losses for faces [n, m, 7, 2], divided by the number of anchors with a face."""
    assigned = assign_anchors(faces, anchor_grid)
    has_face = assigned >= 0
    count = has_face.sum().clamp(min=1)
    row, anchor = has_face.nonzero(as_tuple=True)
    targets, anchors = faces[row, assigned[has_face]], scrfd.Anchors(*(value[anchor] for value in anchor_grid))
    decoded = scrfd.decode_faces(predictions.boxes[has_face], predictions.points[has_face], anchors)
    boxes = decoded[:, :2].flatten(1), targets[:, :2].flatten(1)
    target_scores = torch.zeros_like(predictions.scores)
    target_scores[has_face] = box_iou(*boxes).diagonal().detach()
    focal_weights = (predictions.scores.detach().sigmoid() - target_scores).square()
    scores = binary_cross_entropy_with_logits(predictions.scores, target_scores, focal_weights, reduction="sum")
    size = measure_face_sizes(targets)[:, None, None]
    points = smooth_l1_loss(decoded[:, 2:] / size, targets[:, 2:] / size, reduction="none", beta=SMOOTH_L1_BETA)
    sums = {
        "scores": scores, "boxes": distance_box_iou_loss(*boxes, reduction="sum"),
        "points": KEYPOINT_LOSS_WEIGHT * points.mean((1, 2)).sum(),
    }  # fmt: skip
    return {name: value / count for name, value in sums.items()}


def measure_detections(found: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
    """The part of the faces that are found, false detections per image, and the key point error in eye distances."""
    num_found, num_false, errors = 0, 0, []
    for detected, faces in zip(found, targets, strict=True):
        matches = box_iou(faces[:, :2].flatten(1), detected[:, :2].flatten(1)) > MATCH_IOU
        num_found += int(matches.any(1).sum())
        num_false += int((~matches.any(0)).sum())
        for face, detection in matches.nonzero().tolist():
            eye_distance = (faces[face, 2] - faces[face, 3]).norm()
            errors.append((detected[detection, 2:] - faces[face, 2:]).norm(dim=-1).mean() / eye_distance)
    num_faces = sum(map(len, targets))
    error = torch.stack(errors).mean() if errors else torch.tensor(torch.nan)
    return {"found": torch.tensor(num_found / num_faces), "false": torch.tensor(num_false / len(found)), "error": error}


def draw_faces(image: Tensor, faces: Tensor) -> Tensor:
    """Draw faces on an image uint8 [H, W, 3]: [3, H, W] from 0 to 1."""
    out = image.movedim(-1, 0)
    if len(faces):
        out = draw_bounding_boxes(out, faces[:, :2].flatten(1), colors="lime")
        out = draw_keypoints(out, faces[:, 2:], colors="red", radius=1)
    return out.float() / 255
