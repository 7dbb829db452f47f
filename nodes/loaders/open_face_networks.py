"""Faces without insightface: a detector with five key points, YuNet or MTCNN, and any ArcFace network beside it.

YuNet is an .onnx file for OpenCV's FaceDetectorYN. MTCNN comes with its weights in the package facenet-pytorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ...likeness.faces.alignment import align_face
from ...likeness.spec import Face

ARCFACE_INPUT_SIZE = 112  # pixels
YUNET_OUTPUTS = {"cls_8", "obj_8", "bbox_8", "kps_8"}
# How insightface knows its detectors, which take images of any size, or of a fixed one above that of a face crop.
INSIGHTFACE_MIN_OUTPUTS, INSIGHTFACE_MIN_INPUT_SIZE = 5, 128
YUNET_SCORE_THRESHOLD = 0.6
MTCNN_MIN_FACE_SIZE = 20  # pixels of the detector's input
MTCNN_MARGIN = 0.25  # of the second attempt on each side, relative to the detector's input
MTCNN_PACKAGE = "facenet-pytorch"

NO_DETECTOR = (
    "no detector among them; put OpenCV's face_detection_yunet_2023mar.onnx beside the recognizer, or install MTCNN "
    f"with pip install --no-deps {MTCNN_PACKAGE}"
)


@dataclass(frozen=True)
class OnnxGraph:
    """What an .onnx file takes and gives. `scales_input` tells that it takes pixels of 0..255 and scales them."""

    input_shape: tuple[int, ...]
    outputs: tuple[str, ...]
    output_rank: int
    scales_input: bool

    @property
    def is_yunet(self) -> bool:
        return set(self.outputs) >= YUNET_OUTPUTS

    @property
    def is_insightface_detector(self) -> bool:
        fixed_size = max(self.input_shape[2:], default=0)
        is_large = not fixed_size or fixed_size >= INSIGHTFACE_MIN_INPUT_SIZE
        return len(self.outputs) >= INSIGHTFACE_MIN_OUTPUTS and is_large and not self.is_yunet

    @property
    def is_recognizer(self) -> bool:
        size = (3, ARCFACE_INPUT_SIZE, ARCFACE_INPUT_SIZE)
        return self.input_shape[1:] == size and len(self.outputs) == 1 and self.output_rank == 2


def read_onnx_graph(path: Path) -> OnnxGraph | None:
    """The graph of an .onnx file, or None if the file is damaged."""
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception:  # protobuf's errors have no common base; onnxruntime reports damaged files
        return None
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]  # old files list their weights too
    if not inputs or not graph.output:
        return None
    operators = [node.op_type for node in graph.node]
    before_first_convolution = operators[: operators.index("Conv")] if "Conv" in operators else []
    return OnnxGraph(
        tuple(dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim),
        tuple(value.name for value in graph.output),
        len(graph.output[0].type.tensor_type.shape.dim),
        {"Sub", "Mul"} <= set(before_first_convolution),
    )


def is_insightface_pack(folder: Path) -> bool:
    """Whether a folder's detector is insightface's, and not YuNet. Large recognizers are not read if possible.

    Of several detectors the smallest counts: YuNet, if it is there. A folder with a damaged file counts as a pack of
    insightface, which reports the file.
    """
    for path in sorted(folder.glob("*.onnx"), key=lambda path: path.stat().st_size):
        graph = read_onnx_graph(path)
        if graph is None or graph.is_insightface_detector:
            return True
        if graph.is_yunet:
            return False
    return False


def _resize_to_detector_input(photo: Tensor, size: int) -> tuple[Tensor, float]:
    """A photo, uint8 [H, W, 3], with its longer side scaled to `size` pixels, and the scale."""
    scale = size / max(photo.shape[:2])
    height, width = (max(1, round(side * scale)) for side in photo.shape[:2])
    resized = interpolate(photo.movedim(-1, 0)[None], size=(height, width), mode="bilinear", antialias=True)
    return resized[0].movedim(0, -1).contiguous(), scale


def _make_face(corners: Tensor, points: Tensor, score: float, scale: float) -> Face:
    """A face in pixels of the photo, from corners [4] and key points [5, 2] in pixels of the scaled photo."""
    box, kps = ((values.double() + 0.5) / scale - 0.5 for values in (corners, points))
    return Face(box.float(), kps.float(), score)


@dataclass(frozen=True, eq=False)
class YuNet:
    """OpenCV's FaceDetectorYN. It runs on the CPU."""

    model: Any
    name: str
    session = None

    def detect(self, photo: Tensor, size: int) -> list[Face]:
        """The faces of a photo, uint8 RGB [H, W, 3], with a detector input of `size` pixels."""
        image, scale = _resize_to_detector_input(photo, size)
        self.model.setInputSize((image.shape[1], image.shape[0]))
        found = self.model.detect(image.flip(-1).contiguous().numpy())[1]
        rows = torch.empty(0, 15) if found is None else torch.from_numpy(found)
        return [  # left, top, width, height, five points, score
            _make_face(torch.cat((row[:2], row[:2] + row[2:4])), row[4:14].view(5, 2), float(row[14]), scale)
            for row in rows
        ]


@dataclass(frozen=True, eq=False)
class MTCNN:
    """facenet-pytorch's MTCNN (Zhang et al. 2016). It runs on the CPU."""

    model: Any
    name: str
    session = None

    def detect(self, photo: Tensor, size: int) -> list[Face]:
        """The faces of a photo, uint8 RGB [H, W, 3], with a detector input of `size` pixels."""
        image, scale = _resize_to_detector_input(photo, size)
        if min(image.shape[:2]) < MTCNN_MIN_FACE_SIZE:
            return []  # no level of its image pyramid is left
        corners, scores, points = self._detect_with_margin(image, 0)
        limits = torch.tensor([image.shape[1], image.shape[0]] * 2)
        # facenet-pytorch squeezes a face that the border cuts, which moves its key points by up to a fifth of its size.
        if ((corners < 0) | (corners > limits)).any():
            corners, scores, points = self._detect_with_margin(image, round(size * MTCNN_MARGIN))
        return [
            _make_face(box, kps, score, scale) for box, kps, score in zip(corners, points, scores.tolist(), strict=True)
        ]

    def _detect_with_margin(self, image: Tensor, margin: int) -> tuple[Tensor, Tensor, Tensor]:
        """Corners [n, 4], scores [n] and key points [n, 5, 2] in an image, uint8 [H, W, 3], with a gray margin."""
        padded = pad(image.movedim(-1, 0), (margin,) * 4, value=127).movedim(0, -1).contiguous()
        corners, scores, points = self.model.detect(padded.numpy(), landmarks=True)
        if corners is None:
            return torch.empty(0, 4), torch.empty(0), torch.empty(0, 5, 2)
        corners, scores, points = (torch.tensor(values.tolist()) for values in (corners, scores, points))
        return corners - margin, scores, points - margin


@dataclass(frozen=True, eq=False)
class ArcFace:
    """An ArcFace network of any publisher, on onnxruntime."""

    session: Any
    path: Path
    scales_input: bool

    def embed(self, photo: Tensor, face: Face) -> Tensor:
        """The raw vector [512] of a face in a photo, uint8 RGB [H, W, 3]."""
        crop = align_face(photo, face.kps, ARCFACE_INPUT_SIZE).movedim(-1, 0)[None]
        pixels = crop if self.scales_input else crop / 127.5 - 1
        (given,) = self.session.get_inputs()
        half = "float16" in given.type
        (vector,) = self.session.run(None, {given.name: (pixels.half() if half else pixels).contiguous().numpy()})
        return torch.from_numpy(vector).flatten().float()


def load_open_face_networks(folder: Path, providers: Sequence[str]) -> tuple[YuNet | MTCNN, ArcFace]:
    """The detector and the recognizer, on these onnxruntime providers, of a folder without an insightface detector.

    Raises ValueError if the folder has no recognizer, or if there is no detector.
    """
    import onnxruntime

    graphs = {path: graph for path in sorted(folder.glob("*.onnx")) if (graph := read_onnx_graph(path)) is not None}
    recognizer = next((path for path, graph in graphs.items() if graph.is_recognizer), None)
    if recognizer is None:
        raise ValueError("no recognizer among them")
    yunet = next((path for path, graph in graphs.items() if graph.is_yunet), None)
    detector = _open_mtcnn() if yunet is None else _open_yunet(yunet)
    session = onnxruntime.InferenceSession(str(recognizer), providers=list(providers))
    return detector, ArcFace(session, recognizer, graphs[recognizer].scales_input)


def _open_yunet(path: Path) -> YuNet:
    import cv2

    model = cv2.FaceDetectorYN.create(str(path), "", (640, 640), score_threshold=YUNET_SCORE_THRESHOLD)
    return YuNet(model, f"{path.name} (OpenCV's YuNet)")


def _open_mtcnn() -> MTCNN:
    """Raises ValueError if facenet-pytorch is not installed."""
    try:
        import facenet_pytorch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(NO_DETECTOR) from error
    model = facenet_pytorch.MTCNN(keep_all=True, min_face_size=MTCNN_MIN_FACE_SIZE)
    return MTCNN(model, f"MTCNN of {MTCNN_PACKAGE}")
