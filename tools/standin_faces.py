"""Face networks for machines without weights: small ONNX graphs with the contracts of insightface's model packs.

The detector looks for one face truly: it correlates a grey template, cut from NASA's portrait of the astronaut Eileen
Collins, and its mirror image with the picture at three scales. In that portrait (512 pixels) the face is found at
detector size 640, and where it is two or four times as large; in between it is found at another size, or not.

The recogniser projects the aligned face at random, so that faces that look alike get vectors that point alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

STRIDES = (8, 16, 32)
CELL = 8  # pixels of the template at detector size 640
SCALE = 640 / 512
CORNER, ROWS, COLUMNS = (224, 88), 16, 14  # of the template, in pixels at that size and in cells
THRESHOLD, STEEPNESS = 0.72, 30.0
FLAT = 0.05  # a region of less contrast shows nothing
GREY = (0.299, 0.587, 0.114)

# Measured in the portrait: left eye, right eye, nose, left and right corner of the mouth.
KPS = ((205, 101), (247, 103), (222, 123), (207, 143), (240, 145))
BOX = (178, 70, 270, 172)

VECTOR, LENGTH, POOLED = 512, 22.0, 28


def portrait() -> NDArray[np.uint8]:
    """The portrait, uint8 RGB [512, 512, 3]."""
    from skimage import data

    return data.astronaut()


def template() -> Array:
    """The face in cells of 8 pixels: zero mean, unit norm, [ROWS, COLUMNS]."""
    from skimage import transform

    large = transform.resize(portrait() / 255.0, (640, 640), order=1) @ np.array(GREY)
    left, top = CORNER
    face = large[top : top + ROWS * CELL, left : left + COLUMNS * CELL]
    cells = face.reshape(ROWS, CELL, COLUMNS, CELL).mean((1, 3))
    cells -= cells.mean()
    return (cells / np.linalg.norm(cells)).astype(np.float32)


class Graph:
    """Collects nodes and constants; every call gives the name of the node's result."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        from onnx import numpy_helper

        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), name))
        return name

    def __call__(self, kind: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        from onnx import helper

        name = to or f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"node_{len(self.nodes)}", **attributes))
        return name

    def save(self, path: Path, inputs: list[Any], outputs: list[Any]) -> None:
        import onnx
        from onnx import helper

        graph = helper.make_graph(self.nodes, path.stem, inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        onnx.checker.check_model(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, str(path))


def detector(path: Path) -> None:
    """Write a detector: [1, 3, H, W] to scores, boxes and key points at three strides, two anchors a cell."""
    from onnx import TensorProto, helper

    graph = Graph()
    grey = graph("Conv", "input.1", graph.constant(np.array(GREY).reshape(1, 3, 1, 1)))
    straight, mirrored = _offsets(np.array(BOX), np.array(KPS)), _offsets(*_mirror(np.array(BOX), np.array(KPS)))
    ends = [graph.constant([n], np.int64) for n in (0, 1)]
    names: dict[str, list[str]] = {"score": [], "bbox": [], "kps": []}
    for stride in STRIDES:
        score = graph("Reshape", _score(graph, grey, stride), graph.constant([-1, 1], np.int64), to=f"score_{stride}")
        cells = graph("Div", graph("Slice", graph("Shape", score), *ends), graph.constant([2], np.int64))
        for name, pair in (("bbox", (straight[0], mirrored[0])), ("kps", (straight[1], mirrored[1]))):
            width = pair[0].size
            shape = graph("Concat", cells, graph.constant([2 * width], np.int64), axis=0)
            every = graph("Expand", graph.constant(np.concatenate(pair)[None]), shape)
            names[name].append(graph("Reshape", every, graph.constant([-1, width], np.int64), to=f"{name}_{stride}"))
        names["score"].append(score)
    widths = {"score": 1, "bbox": 4, "kps": 10}
    graph.save(
        path,
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, [1, 3, "?", "?"])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"rows_{name}", widths[kind]])
            for kind, listed in names.items()
            for name in listed
        ],
    )


def _mirror(box: NDArray[Any], kps: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Box and points of the face mirrored about the template's middle; left stays left as the viewer sees it."""
    middle = 2 * (CORNER[0] + COLUMNS * CELL / 2) / SCALE
    points = np.stack((middle - kps[:, 0], kps[:, 1]), axis=1)[[1, 0, 2, 4, 3]]
    return np.array([middle - box[2], box[1], middle - box[0], box[3]]), points


def _offsets(box: NDArray[Any], kps: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Box and points as a detector tells them: distances from the cell that matched, in cells."""
    anchor = np.array([COLUMNS // 2, ROWS // 2]) * CELL + np.array(CORNER)
    low, high = anchor - box[:2] * SCALE, box[2:] * SCALE - anchor
    return np.concatenate((low, high)) / CELL, ((kps * SCALE - anchor) / CELL).flatten()


def _score(graph: Graph, grey: str, stride: int) -> str:
    """Normalised cross-correlation with both templates at one stride, as scores per cell [1, h, w, 2]."""
    pooled = graph("AveragePool", grey, kernel_shape=[stride, stride], strides=[stride, stride])
    pads = [ROWS // 2, COLUMNS // 2, ROWS - ROWS // 2 - 1, COLUMNS - COLUMNS // 2 - 1]
    ones = graph.constant(np.ones((1, 1, ROWS, COLUMNS)))
    face = template()
    match = graph("Conv", pooled, graph.constant(np.stack((face, face[:, ::-1]))[:, None]), pads=pads)
    total = graph("Conv", pooled, ones, pads=pads)
    squares = graph("Conv", graph("Mul", pooled, pooled), ones, pads=pads)
    mean_square = graph("Div", graph("Mul", total, total), graph.constant(ROWS * COLUMNS))
    spread = graph("Max", graph("Sub", squares, mean_square), graph.constant(ROWS * COLUMNS * FLAT**2))
    cosine = graph("Div", match, graph("Sqrt", spread))
    raised = graph("Mul", graph("Sub", cosine, graph.constant(THRESHOLD)), graph.constant(STEEPNESS))
    return graph("Transpose", graph("Sigmoid", raised), perm=[0, 2, 3, 1])


def recogniser(path: Path, seed: int) -> None:
    """Write a recogniser: aligned faces [n, 3, 112, 112] to vectors [n, 512] of a length of about 22."""
    from onnx import TensorProto, helper

    rng = np.random.default_rng(seed)
    graph = Graph()
    pooled = graph("AveragePool", "input.1", kernel_shape=[4, 4], strides=[4, 4])
    flat = graph("Flatten", pooled)
    centred = graph("Sub", flat, graph("ReduceMean", flat, axes=[1], keepdims=1))
    size = 3 * POOLED * POOLED
    weights = rng.standard_normal((size, VECTOR)).astype(np.float32) / size**0.5
    vector = graph("MatMul", centred, graph.constant(weights))
    length = graph("Add", graph("ReduceL2", vector, axes=[1], keepdims=1), graph.constant(1e-3))
    graph("Mul", graph("Div", vector, length), graph.constant(LENGTH), to="683")
    graph.save(
        path,
        [helper.make_tensor_value_info("input.1", TensorProto.FLOAT, ["None", 3, 112, 112])],
        [helper.make_tensor_value_info("683", TensorProto.FLOAT, ["None", VECTOR])],
    )
