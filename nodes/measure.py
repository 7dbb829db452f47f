"""Measure Likeness and Face Key Points: what there is to see in a picture's faces."""

from __future__ import annotations

import torch
from comfy_api.latest import io
from torch import Tensor

from ..likeness import draw, faces, pose
from ..likeness.spec import Identity
from . import types
from .photos import Choice, Taken, hash_note, split, take_all, target


class MeasureLikeness(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessMeasure",
            display_name="Measure Likeness",
            category="likeness/face",
            description="How alike the faces of a picture are to an identity: the cosine of their ArcFace vectors. "
            "Photos of one person reach about 0.4 to 0.8, of two people less than 0.25.",
            search_aliases=["face similarity", "distance"],
            inputs=[
                io.Image.Input("image", tooltip="Pictures to measure, as a batch."),
                types.Identity.Input("identity", tooltip="Whom they should show; encoded with the same model pack."),
                types.FaceAnalyzer.Input("face_analyzer", tooltip="Finds and compares the faces."),
            ],
            outputs=[
                io.Float.Output(
                    display_name="similarity", tooltip="The best face's cosine, -1 to 1; 0 where no face was found."
                ),
                io.Image.Output(display_name="annotated", tooltip="The pictures with each face's cosine."),
                io.String.Output(display_name="report", tooltip="The same in words."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, image: Tensor, identity: Identity, face_analyzer: types.Analyzer) -> io.NodeOutput:
        wanted = target(identity, face_analyzer)
        best, pictures, lines = [], [], list(hash_note(identity, face_analyzer))
        for number, picture in enumerate(split([image]), 1):
            search = faces.find_faces(picture, face_analyzer.detect)
            scores = [faces.likeness(picture, face, face_analyzer.embed, wanted) for face in search.faces]
            best += scores
            lines.append(f"picture {number}: {', '.join(f'{score:.3f}' for score in scores) or 'no face found'}")
            for face, score in zip(search.faces, scores, strict=True):
                picture = draw.mark(picture, face, f"{score:.2f}", draw.CHOSEN if score == max(scores) else draw.FOUND)
            pictures.append(picture)
        return io.NodeOutput(max(best, default=0.0), torch.stack(pictures), "\n".join(lines))


def size_inputs() -> list[io.Int.Input]:
    """How large a drawing of key points is."""
    return [
        io.Int.Input(
            name, default=1024, min=64, max=16384, step=8,
            tooltip=f"{name.capitalize()} of the drawing in pixels, that of the picture to make.",
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
            description="Draws a face's five key points on black, as InstantID's ControlNet reads them. The face comes "
            "to lie where it lies in the photo.",
            search_aliases=["instantid", "pose"],
            inputs=[
                io.Image.Input("image", tooltip="Photo whose face gives place and pose; need not be the person's."),
                types.FaceAnalyzer.Input("face_analyzer", tooltip="Finds the face."),
                *size_inputs(),
                io.Combo.Input(
                    "pick", options=[*faces.PICKS, faces.NTH], default="largest",
                    tooltip="Which face of the photo; nth counts from the left, from 1.",
                ),
                io.Int.Input(
                    "nth", default=1, min=1, max=100, optional=True, advanced=True,
                    tooltip="For pick nth: which face, from the left, 1 to 100.",
                ),
            ],
            outputs=[io.Image.Output(display_name="key_points")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, image: Tensor, face_analyzer: types.Analyzer, width: int, height: int, pick: str, nth: int = 1
    ) -> io.NodeOutput:
        taken, _ = take_all(split([image]), Choice(pick, face_analyzer, nth), "stop")
        return io.NodeOutput(torch.stack([_drawn(one, width, height) for one in taken]))


def _drawn(one: Taken, width: int, height: int) -> Tensor:
    """The key points of a face, the photo scaled to fit a picture of this size and centred in it."""
    scale = min(width / one.photo.shape[1], height / one.photo.shape[0])
    offset = torch.tensor([width - one.photo.shape[1] * scale, height - one.photo.shape[0] * scale]) / 2
    return draw.key_points([one.face.kps * scale + offset], height, width)


class TemplateKeyPoints(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LikenessTemplateKeyPoints",
            display_name="Key Points of a Template",
            category="likeness/face",
            description="Draws the five key points of a template face, turned as you like, on black: a pose for a "
            "ControlNet without a photo of it.",
            search_aliases=["pose", "landmarks", "controlnet", "instantid"],
            inputs=[
                *size_inputs(),
                io.Float.Input(
                    "size", default=0.4, min=0.02, max=2.0, step=0.01,
                    tooltip="Height of the face in parts of the picture's, 0.02 to 2: 0.4 is a portrait.",
                ),
                io.Float.Input(
                    "x", default=0.5, min=0.0, max=1.0, step=0.01,
                    tooltip="Middle of the face across the picture, 0 left to 1 right.",
                ),
                io.Float.Input(
                    "y", default=0.4, min=0.0, max=1.0, step=0.01,
                    tooltip="Middle of the face down the picture, 0 top to 1 bottom.",
                ),
                io.Float.Input(
                    "yaw", default=0.0, min=-90.0, max=90.0, step=1.0,
                    tooltip="Turn of the head in degrees, -90 to 90: above 0 it looks to the right.",
                ),
                io.Float.Input(
                    "pitch", default=0.0, min=-90.0, max=90.0, step=1.0,
                    tooltip="Nod of the head in degrees, -90 to 90: above 0 it looks up.",
                ),
                io.Float.Input(
                    "roll", default=0.0, min=-180.0, max=180.0, step=1.0,
                    tooltip="Tilt of the head in degrees, -180 to 180: above 0 clockwise.",
                ),
            ],
            outputs=[io.Image.Output(display_name="key_points")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, width: int, height: int, size: float, x: float, y: float, yaw: float, pitch: float, roll: float
    ) -> io.NodeOutput:
        points = pose.key_points(size * height, (x * width, y * height), yaw, pitch, roll)
        return io.NodeOutput(draw.key_points([points], height, width)[None])


NODES = [MeasureLikeness, FaceKeyPoints, TemplateKeyPoints]
