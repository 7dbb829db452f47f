"""Quality of a detected face: size, sharpness and pose, with warnings for the report."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ..spec import Face
from .alignment import ARCFACE_TEMPLATE, LUMA_WEIGHTS, align_face
from .landmarks import KEYPOINT_DEPTHS

MIN_SHARPNESS = 60.0  # variance of the Laplacian of the 112 pixel crop, in gray levels squared
MIN_FACE_SIZE = 64  # pixels; ArcFace's input is 112
MAX_FRONTAL_ANGLE = 35.0  # degrees

# Of the template face, in distances between the eyes: how far the nose lies below the eyes, and in front of them.
_EYE_DISTANCE = ARCFACE_TEMPLATE[1][0] - ARCFACE_TEMPLATE[0][0]
NOSE_DROP = (ARCFACE_TEMPLATE[2][1] - (ARCFACE_TEMPLATE[0][1] + ARCFACE_TEMPLATE[1][1]) / 2) / _EYE_DISTANCE
NOSE_DEPTH = (KEYPOINT_DEPTHS[2] - KEYPOINT_DEPTHS[0]) / _EYE_DISTANCE


def compute_sharpness(photo: Tensor, face: Face) -> float:
    """Variance of the Laplacian of the aligned face, in gray levels squared. Low means blurred."""
    gray = align_face(photo.float(), face.kps, 112) @ torch.tensor(LUMA_WEIGHTS) * 255
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return float(conv2d(gray[None, None], kernel).var())


def estimate_pose(face: Face) -> tuple[float, float, float]:
    """Approximate yaw, pitch and roll in degrees from the five key points, as the viewer sees them; 0 is frontal.

    Positive yaw turns to the right, pitch up, roll clockwise. Roll comes from the line of the eyes, yaw from the nose
    between eyes and mouth corners. Pitch comes from the nose and the eyes alone, because a smile raises the mouth. A
    long nose looks like a lowered head: a lowered head is therefore measured too small, -17 degrees at -45.
    """
    left, right, nose, mouth_left, mouth_right = face.kps.double()
    eyes, mouth = (left + right) / 2, (mouth_left + mouth_right) / 2
    across = right - left
    width = float(across.norm()) or 1.0
    roll = math.degrees(math.atan2(float(across[1]), float(across[0])))
    center = (eyes + mouth) / 2
    yaw = math.degrees(math.asin(_clamp_to_unit(2 * float((nose - center) @ across) / width**2)))
    side = float((nose - eyes) @ across) / width
    drop = float(across[0] * (nose - eyes)[1] - across[1] * (nose - eyes)[0]) / width
    # A turned head brings the eyes closer together and moves the nose aside: both give the size of the face.
    pitch = math.degrees(math.atan((NOSE_DROP - drop / math.hypot(width, side / NOSE_DEPTH)) / NOSE_DEPTH))
    return yaw, pitch, roll


def _clamp_to_unit(value: float) -> float:
    return max(-1.0, min(1.0, value))


def describe_face(photo: Tensor, face: Face) -> str:
    """One line for the report: score, size, sharpness, pose, and warnings."""
    yaw, pitch, roll = estimate_pose(face)
    sharpness = compute_sharpness(photo, face)
    checks = (
        (face.size < MIN_FACE_SIZE, f"small (under {MIN_FACE_SIZE} pixels)"),
        (sharpness < MIN_SHARPNESS, "blurred"),
        (max(abs(yaw), abs(pitch)) > MAX_FRONTAL_ANGLE, "turned away"),
    )
    problems = [text for is_problem, text in checks if is_problem]
    score = f"score {face.score:.2f}, " if face.score else ""
    pose = f"yaw {yaw:.0f}, pitch {pitch:.0f}, roll {roll:.0f} degrees"
    warning = f"; warning: {', '.join(problems)}" if problems else ""
    return f"{score}{face.size:.0f} pixels, sharpness {sharpness:.0f}, {pose}{warning}"
