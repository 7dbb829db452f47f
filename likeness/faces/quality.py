"""Quality of a detected face: size, sharpness and pose, with warnings for the report."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from ..spec import Face
from .alignment import LUMA_WEIGHTS, align_face

MIN_SHARPNESS = 60.0  # variance of the Laplacian of the 112 pixel crop, in gray levels squared
MIN_FACE_SIZE = 64  # pixels; ArcFace's input is 112
MAX_FRONTAL_ANGLE = 35.0  # degrees


def compute_sharpness(photo: Tensor, face: Face) -> float:
    """Variance of the Laplacian of the aligned face, in gray levels squared. Low means blurred."""
    gray = align_face(photo.float(), face.kps, 112) @ torch.tensor(LUMA_WEIGHTS) * 255
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return float(conv2d(gray[None, None], kernel).var())


def estimate_pose(face: Face) -> tuple[float, float, float]:
    """Approximate yaw, pitch and roll in degrees from the five key points; 0 is frontal.

    Yaw and pitch come from the position of the nose between eyes and mouth corners, roll from the line of the eyes.
    """
    left, right, nose, mouth_left, mouth_right = face.kps.double()
    eyes, mouth = (left + right) / 2, (mouth_left + mouth_right) / 2
    across, down = right - left, mouth - eyes
    width, height = float(across.norm()) or 1.0, float(down.norm()) or 1.0
    roll = math.degrees(math.atan2(float(across[1]), float(across[0])))
    center = (eyes + mouth) / 2
    yaw = math.degrees(math.asin(_clamp_to_unit(2 * float((nose - center) @ across) / width**2)))
    frontal = 0.49  # position of the nose between eyes (0) and mouth (1) in ArcFace's template
    pitch = math.degrees(math.asin(_clamp_to_unit(2 * (float((nose - eyes) @ down) / height**2 - frontal))))
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
