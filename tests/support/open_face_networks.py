"""Stand-ins for face networks that are not insightface's: YuNet, and recognizers with other inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from comfyui_likeness.tools.standins.face_networks import OnnxGraphBuilder
from onnx import TensorProto, compose, helper
from torch import Tensor

STRIDES = (8, 16, 32)
CELL = 32  # side of the white square that the stand-in takes for a face
BOX_SIZE = 2 * CELL  # side of the box around it
# The key points relative to the square's left upper corner, in its sides; the left eye of the viewer first.
KEY_POINTS = ((0.25, 0.25), (0.75, 0.25), (0.5, 0.5), (0.3, 0.75), (0.7, 0.75))
ENCODINGS = {"bbox": (0.5, 0.5, np.log(2), np.log(2)), "kps": tuple(np.array(KEY_POINTS).flatten())}
WIDTHS = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}


def write_yunet(path: Path) -> None:
    """Write a network with the outputs of YuNet: it detects a white cell of 32 pixels, at the largest stride alone."""
    graph = OnnxGraphBuilder()
    for kind, width in WIDTHS.items():
        for stride in STRIDES:
            pooled = graph("AveragePool", "input", kernel_shape=[stride, stride], strides=[stride, stride])
            fires = kind in ("cls", "obj") and stride == CELL
            weight = np.full((width, 3, 1, 1), 1 / (3 * 255) if fires else 0.0)
            bias = np.array(ENCODINGS.get(kind, (0.0,)))
            cells = graph("Conv", pooled, graph.add_constant(weight), graph.add_constant(bias))
            rows = graph("Transpose", cells, perm=[0, 2, 3, 1])
            shape = graph.add_constant([1, -1, width], np.int64)
            graph("Reshape", rows, shape, output_name=f"{kind}_{stride}")
    graph.save(
        path,
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, "height", "width"])],
        [
            helper.make_tensor_value_info(f"{kind}_{stride}", TensorProto.FLOAT, [1, f"rows_{stride}", width])
            for kind, width in WIDTHS.items()
            for stride in STRIDES
        ],
    )


def make_photo_with_square(column: int, row: int) -> Tensor:
    """A black photo, uint8 [640, 960, 3], with the face of `write_yunet` in a cell of the detector input of 640."""
    photo = torch.zeros(640, 960, 3, dtype=torch.uint8)
    side = CELL * 960 // 640
    photo[row * side : (row + 1) * side, column * side : (column + 1) * side] = 255
    return photo


def write_variant(recognizer: Path, target: Path, first: str) -> None:
    """Write a recognizer that begins otherwise: `scales pixels` of 0..255 itself, or takes `half precision`."""
    graph = OnnxGraphBuilder()
    if first == "scales pixels":
        centered = graph("Sub", "pixels", graph.add_constant(127.5))
        converted = graph("Mul", centered, graph.add_constant(1 / 127.5))
    else:
        converted = graph("Cast", "pixels", to=TensorProto.FLOAT)
    graph("Conv", converted, graph.add_constant(np.eye(3).reshape(3, 3, 1, 1)), output_name="converted")
    input_type = TensorProto.FLOAT16 if first == "half precision" else TensorProto.FLOAT
    shape = ["None", 3, 112, 112]
    start = target.with_name("start.onnx")
    graph.save(
        start,
        [helper.make_tensor_value_info("pixels", input_type, shape)],
        [helper.make_tensor_value_info("converted", TensorProto.FLOAT, shape)],
    )
    models = onnx.load(str(start)), onnx.load(str(recognizer))
    start.unlink()
    pairs = [("converted", models[1].graph.input[0].name)]
    onnx.save(compose.merge_models(*models, io_map=pairs, prefix1="start_"), str(target))
