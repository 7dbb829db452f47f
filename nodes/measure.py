"""Measure Likeness, and key points for ControlNet: Face Key Points and Key Points of a Template."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..likeness.faces import detection, drawing, landmarks
from ..likeness.spec import Identity
from . import types
from .photos import FaceSelector, SelectedFace, get_unit_embedding, list_hash_warnings, select_faces, split_photos


class MeasureLikeness(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessMeasure",
            display_name="Measure Likeness",
            category="likeness/face",
            description="Measures how similar the faces of an image are to an identity: the cosine similarity of their "
            "ArcFace embeddings. Photos of the same person reach about 0.4 to 0.8, of different people less than 0.25.",
            search_aliases=["face similarity", "distance"],
            inputs=[
                io.Image.Input("image", tooltip="Images to measure, as a batch."),
                types.IdentitySocket.Input(
                    "identity", tooltip="The person they should show, encoded with the same model pack."
                ),
                types.FaceAnalyzerSocket.Input("face_analyzer", tooltip="Detects and compares the faces."),
            ],
            outputs=[
                io.Float.Output(
                    display_name="similarity", tooltip="Highest cosine similarity of a face, -1 to 1. 0: no face found."
                ),
                io.Image.Output(display_name="annotated", tooltip="The images with the similarity of each face."),
                io.String.Output(display_name="report", tooltip="The similarity of every face, one line per image."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, image: Tensor, identity: Identity, face_analyzer: types.FaceAnalyzerProtocol) -> io.NodeOutput:
        target = get_unit_embedding(identity, face_analyzer)
        similarities, annotated, lines = [], [], list_hash_warnings(identity, face_analyzer)
        for number, photo in enumerate(split_photos([image]), 1):
            faces = detection.find_faces(photo, face_analyzer.detect).faces
            scores = [detection.compute_face_similarity(photo, face, face_analyzer.embed, target) for face in faces]
            similarities += scores
            lines.append(f"image {number}: {', '.join(f'{score:.3f}' for score in scores) or 'no face found'}")
            for face, score in zip(faces, scores, strict=True):
                color = drawing.SELECTED_COLOR if score == max(scores) else drawing.DETECTED_COLOR
                photo = drawing.draw_face(photo, face, f"{score:.2f}", color)
            annotated.append(photo)
        return io.NodeOutput(max(similarities, default=0.0), torch.stack(annotated), "\n".join(lines))


def make_size_inputs() -> list[io.Int.Input]:
    """Width and height of the drawn key points."""
    return [
        io.Int.Input(
            name, default=1024, min=64, max=16384, step=8,
            tooltip=f"{name.capitalize()} in pixels, 64 to 16384. Use the {name} of the image to generate.",
        )
        for name in ("width", "height")
    ]  # fmt: skip


class FaceKeyPoints(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessFaceKeyPoints",
            display_name="Face Key Points",
            category="likeness/face",
            description="Draws the five key points of a face on black, as InstantID's ControlNet expects them. The "
            "face keeps its position in the photo.",
            search_aliases=["instantid", "pose"],
            inputs=[
                io.Image.Input("image", tooltip="Photo that gives the position and pose of the face; of any person."),
                types.FaceAnalyzerSocket.Input("face_analyzer", tooltip="Detects the face and its key points."),
                *make_size_inputs(),
                io.Combo.Input(
                    "pick", options=[*detection.FACE_PICKERS, detection.PICK_NTH], default="largest",
                    tooltip="Which face of the photo to use. nth: counted from the left, starting at 1.",
                ),
                io.Int.Input(
                    "nth", default=1, min=1, max=100, optional=True, advanced=True,
                    tooltip="For pick nth: number of the face, counted from the left, 1 to 100.",
                ),
            ],
            outputs=[io.Image.Output(display_name="key_points")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, image: Tensor, face_analyzer: types.FaceAnalyzerProtocol, width: int, height: int, pick: str, nth: int = 1
    ) -> io.NodeOutput:
        selected_faces, _ = select_faces(split_photos([image]), FaceSelector(pick, face_analyzer, nth), "stop")
        return io.NodeOutput(
            torch.stack([_draw_face_key_points(selected, width, height) for selected in selected_faces])
        )


def _draw_face_key_points(selected_face: SelectedFace, width: int, height: int) -> Tensor:
    """Draw the key points of a face, with the photo scaled to fit an image of this size and centered in it."""
    photo_height, photo_width, _ = selected_face.photo.shape
    scale = min(width / photo_width, height / photo_height)
    offset = torch.tensor([width - photo_width * scale, height - photo_height * scale]) / 2
    return drawing.draw_keypoints([selected_face.face.kps * scale + offset], height, width)


class TemplateKeyPoints(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessTemplateKeyPoints",
            display_name="Key Points of a Template",
            category="likeness/face",
            description="Draws the five key points of a template face in any pose on black: a pose for InstantID's "
            "ControlNet without a photo.",
            search_aliases=["pose", "landmarks", "controlnet", "instantid"],
            inputs=[
                *make_size_inputs(),
                io.Float.Input(
                    "size", default=0.4, min=0.02, max=2.0, step=0.01,
                    tooltip="Height of the face as a fraction of the image height, 0.02 to 2. 0.4 makes a portrait.",
                ),
                io.Float.Input(
                    "x", default=0.5, min=0.0, max=1.0, step=0.01,
                    tooltip="Horizontal center of the face, 0 (left edge) to 1 (right edge).",
                ),
                io.Float.Input(
                    "y", default=0.4, min=0.0, max=1.0, step=0.01,
                    tooltip="Vertical center of the face, 0 (top) to 1 (bottom).",
                ),
                io.Float.Input(
                    "yaw", default=0.0, min=-90.0, max=90.0, step=1.0,
                    tooltip="Head rotation in degrees, -90 to 90. Above 0, the face looks to the right.",
                ),
                io.Float.Input(
                    "pitch", default=0.0, min=-90.0, max=90.0, step=1.0,
                    tooltip="Head pitch in degrees, -90 to 90. Above 0, the face looks up.",
                ),
                io.Float.Input(
                    "roll", default=0.0, min=-180.0, max=180.0, step=1.0,
                    tooltip="Head tilt in degrees, -180 to 180. Above 0, the head tilts clockwise.",
                ),
            ],
            outputs=[io.Image.Output(display_name="key_points")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, width: int, height: int, size: float, x: float, y: float, yaw: float, pitch: float, roll: float
    ) -> io.NodeOutput:
        points = landmarks.make_posed_keypoints(size * height, (x * width, y * height), yaw, pitch, roll)
        return io.NodeOutput(drawing.draw_keypoints([points], height, width)[None])


NODES = [MeasureLikeness, FaceKeyPoints, TemplateKeyPoints]
