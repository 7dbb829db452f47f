"""Networks as ONNX files that insightface reads, their weights in half precision and their settings inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...likeness import own_file

INPUT = "input.1"
SHOWS = "faces"


def export(
    network: nn.Module, path: Path, shape: Sequence[int], outputs: Sequence[str], told: Mapping[str, Any],
    axes: Mapping[str, Mapping[int, str]] | None = None,
) -> None:  # fmt: skip
    """Write a network that reads pictures [1, 3, H, W] of this `shape`; `axes` names those that may be of any length.

    `told` is what the file says of itself (own_file.metadata).
    """
    import onnx

    device = next(network.parameters()).device
    run: Callable[..., Any] = partial(torch.onnx.export, dynamo=False, opset_version=13)
    run(
        network, (torch.zeros(*shape, device=device),), str(path), input_names=[INPUT], output_names=list(outputs),
        dynamic_axes=axes,
    )  # fmt: skip
    model = onnx.load(str(path))
    halve(model.graph)
    onnx.helper.set_model_props(model, dict(told))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def metadata(kind: str, settings: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, str]:
    """What the file of a network of faces says of itself."""
    return own_file.metadata(kind, SHOWS, notes, settings=dict(settings))


def halve(graph: Any) -> None:
    """Store an ONNX graph's weights as float16, cast back where they are read: half the file, the same sums."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for held in graph.initializer:
        if held.data_type == TensorProto.FLOAT:
            name, half = held.name, f"{held.name}.half"
            held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held).astype("float16"), half))
            casts.append(helper.make_node("Cast", [half], [name], name=f"cast {name}", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
