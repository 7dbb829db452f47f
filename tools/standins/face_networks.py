"""Stand-ins for the face networks: small ONNX graphs with the inputs and outputs of insightface's model packs.

The detector really finds one face: it correlates the image with a grayscale template from NASA's portrait of the
astronaut Eileen Collins, and with its mirror image, at three scales. It detects that face in the portrait (512 pixels)
at detector size 640, and at two and four times that size; at sizes in between with another detector size or not at all.

The recognizer is a random projection of the aligned face, so that similar faces have similar embeddings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

STRIDES = (8, 16, 32)
CELL_SIZE = 8  # pixels of the template at detector size 640
DETECTOR_SCALE = 640 / 512
TEMPLATE_CORNER = (224, 88)  # left, top in pixels at detector size 640
TEMPLATE_ROWS, TEMPLATE_COLUMNS = 16, 14  # in cells
MATCH_THRESHOLD, SCORE_STEEPNESS = 0.72, 30.0
MIN_CONTRAST = 0.05  # regions with less contrast match nothing
LUMA_WEIGHTS = (0.299, 0.587, 0.114)

# Measured in the portrait: left eye, right eye, nose, left and right mouth corner.
PORTRAIT_KEY_POINTS = ((205, 101), (247, 103), (222, 123), (207, 143), (240, 145))
PORTRAIT_BOX = (178, 70, 270, 172)

EMBEDDING_SIZE, EMBEDDING_NORM, POOLED_SIZE = 512, 22.0, 28


def load_portrait() -> NDArray[np.uint8]:
    """The portrait, uint8 RGB [512, 512, 3]."""
    from skimage import data

    return data.astronaut()


def make_face_template() -> Array:
    """The face in cells of 8 pixels: zero mean, unit norm, [TEMPLATE_ROWS, TEMPLATE_COLUMNS]."""
    from skimage import transform

    large = transform.resize(load_portrait() / 255.0, (640, 640), order=1) @ np.array(LUMA_WEIGHTS)
    left, top = TEMPLATE_CORNER
    face = large[top : top + TEMPLATE_ROWS * CELL_SIZE, left : left + TEMPLATE_COLUMNS * CELL_SIZE]
    cells = face.reshape(TEMPLATE_ROWS, CELL_SIZE, TEMPLATE_COLUMNS, CELL_SIZE).mean((1, 3))
    cells -= cells.mean()
    return (cells / np.linalg.norm(cells)).astype(np.float32)


class OnnxGraphBuilder:
    """Collects the nodes and constants of a graph. A call adds a node and returns the name of its output."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def add_constant(self, value: Any, dtype: Any = np.float32) -> str:
        from onnx import numpy_helper

        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def __call__(self, op_type: str, *inputs: str, output_name: str = "", **attributes: Any) -> str:
        from onnx import helper

        name = output_name or f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [name], name=f"node_{len(self.nodes)}", **attributes))
        return name

    def save(self, path: Path, inputs: list[Any], outputs: list[Any]) -> None:
        import onnx
        from onnx import helper

        graph = helper.make_graph(self.nodes, path.stem, inputs, outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, str(path))


def write_detector(path: Path) -> None:
    """Write a detector: [1, 3, H, W] to scores, boxes and key points at three strides, two anchors per cell."""
    from onnx import TensorProto, helper

    graph = OnnxGraphBuilder()
    grey = graph("Conv", "input.1", graph.add_constant(np.array(LUMA_WEIGHTS).reshape(1, 3, 1, 1)))
    straight, mirrored = (
        _encode_offsets(np.array(PORTRAIT_BOX), np.array(PORTRAIT_KEY_POINTS)),
        _encode_offsets(*_mirror_face(np.array(PORTRAIT_BOX), np.array(PORTRAIT_KEY_POINTS))),
    )
    ends = [graph.add_constant([n], np.int64) for n in (0, 1)]
    names: dict[str, list[str]] = {"score": [], "bbox": [], "kps": []}
    for stride in STRIDES:
        score = graph(
            "Reshape",
            _add_score(graph, grey, stride),
            graph.add_constant([-1, 1], np.int64),
            output_name=f"score_{stride}",
        )
        cells = graph("Div", graph("Slice", graph("Shape", score), *ends), graph.add_constant([2], np.int64))
        for name, pair in (("bbox", (straight[0], mirrored[0])), ("kps", (straight[1], mirrored[1]))):
            width = pair[0].size
            shape = graph("Concat", cells, graph.add_constant([2 * width], np.int64), axis=0)
            rows = graph("Expand", graph.add_constant(np.concatenate(pair)[None]), shape)
            flat_shape = graph.add_constant([-1, width], np.int64)
            names[name].append(graph("Reshape", rows, flat_shape, output_name=f"{name}_{stride}"))
        names["score"].append(score)
    widths = {"score": 1, "bbox": 4, "kps": 10}
    graph.save(
        path,
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, "?", "?"])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"rows_{name}", widths[kind]])
            for kind, outputs in names.items()
            for name in outputs
        ],
    )


def _mirror_face(box: NDArray[Any], kps: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Box and key points of the face mirrored at the center of the template; left stays the viewer's left."""
    middle = 2 * (TEMPLATE_CORNER[0] + TEMPLATE_COLUMNS * CELL_SIZE / 2) / DETECTOR_SCALE
    points = np.stack((middle - kps[:, 0], kps[:, 1]), axis=1)[[1, 0, 2, 4, 3]]
    return np.array([middle - box[2], box[1], middle - box[0], box[3]]), points


def _encode_offsets(box: NDArray[Any], kps: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Box and key points in the detector's encoding: distances from the matched cell, in cells."""
    anchor = np.array([TEMPLATE_COLUMNS // 2, TEMPLATE_ROWS // 2]) * CELL_SIZE + np.array(TEMPLATE_CORNER)
    low, high = anchor - box[:2] * DETECTOR_SCALE, box[2:] * DETECTOR_SCALE - anchor
    return np.concatenate((low, high)) / CELL_SIZE, ((kps * DETECTOR_SCALE - anchor) / CELL_SIZE).flatten()


def _add_score(graph: OnnxGraphBuilder, grey: str, stride: int) -> str:
    """Normalized cross-correlation with both templates at one stride, as scores per cell [1, h, w, 2]."""
    pooled = graph("AveragePool", grey, kernel_shape=[stride, stride], strides=[stride, stride])
    pads = [
        TEMPLATE_ROWS // 2,
        TEMPLATE_COLUMNS // 2,
        TEMPLATE_ROWS - TEMPLATE_ROWS // 2 - 1,
        TEMPLATE_COLUMNS - TEMPLATE_COLUMNS // 2 - 1,
    ]
    ones = graph.add_constant(np.ones((1, 1, TEMPLATE_ROWS, TEMPLATE_COLUMNS)))
    face = make_face_template()
    match = graph("Conv", pooled, graph.add_constant(np.stack((face, face[:, ::-1]))[:, None]), pads=pads)
    total = graph("Conv", pooled, ones, pads=pads)
    squares = graph("Conv", graph("Mul", pooled, pooled), ones, pads=pads)
    mean_square = graph("Div", graph("Mul", total, total), graph.add_constant(TEMPLATE_ROWS * TEMPLATE_COLUMNS))
    spread = graph(
        "Max",
        graph("Sub", squares, mean_square),
        graph.add_constant(TEMPLATE_ROWS * TEMPLATE_COLUMNS * MIN_CONTRAST**2),
    )
    cosine = graph("Div", match, graph("Sqrt", spread))
    raised = graph(
        "Mul", graph("Sub", cosine, graph.add_constant(MATCH_THRESHOLD)), graph.add_constant(SCORE_STEEPNESS)
    )
    return graph("Transpose", graph("Sigmoid", raised), perm=[0, 2, 3, 1])


def write_recognizer(path: Path, seed: int) -> None:
    """Write a recognizer: aligned faces [n, 3, 112, 112] to embeddings [n, 512] with a norm of about 22."""
    from onnx import TensorProto, helper

    rng = np.random.default_rng(seed)
    graph = OnnxGraphBuilder()
    pooled = graph("AveragePool", "input.1", kernel_shape=[4, 4], strides=[4, 4])
    flat = graph("Flatten", pooled)
    centred = graph("Sub", flat, graph("ReduceMean", flat, axes=[1], keepdims=1))
    size = 3 * POOLED_SIZE * POOLED_SIZE
    weights = rng.standard_normal((size, EMBEDDING_SIZE)).astype(np.float32) / size**0.5
    vector = graph("MatMul", centred, graph.add_constant(weights))
    length = graph("Add", graph("ReduceL2", vector, axes=[1], keepdims=1), graph.add_constant(1e-3))
    graph("Mul", graph("Div", vector, length), graph.add_constant(EMBEDDING_NORM), output_name="683")
    graph.save(
        path,
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, ["None", 3, 112, 112])],
        [helper.make_tensor_value_info("683", TensorProto.FLOAT, ["None", EMBEDDING_SIZE])],
    )
