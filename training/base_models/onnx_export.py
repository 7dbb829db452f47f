"""ONNX files for insightface, with half-precision weights and the settings in their metadata."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...likeness.checkpoints import native_metadata

INPUT_NAME = "input.1"
METADATA_BASE = "faces"


def export_onnx(
    network: nn.Module, path: Path, input_shape: Sequence[int], output_names: Sequence[str],
    metadata_props: Mapping[str, Any], dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
) -> None:  # fmt: skip
    """Write a network that reads images of `input_shape` [1, 3, H, W]; `dynamic_axes` as torch.onnx.export's.

    `metadata_props` are those of `build_onnx_metadata`.
    """
    import onnx

    device = next(network.parameters()).device
    run: Callable[..., Any] = partial(torch.onnx.export, dynamo=False, opset_version=13)
    run(
        network, (torch.zeros(*input_shape, device=device),), str(path), input_names=[INPUT_NAME],
        output_names=list(output_names), dynamic_axes=dynamic_axes,
    )  # fmt: skip
    model = onnx.load(str(path))
    convert_weights_to_half(model.graph)
    onnx.helper.set_model_props(model, dict(metadata_props))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def build_onnx_metadata(kind: str, settings: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, str]:
    """The native metadata of a face network's file."""
    return native_metadata.make_native_metadata(kind, METADATA_BASE, notes, settings=dict(settings))


def convert_weights_to_half(graph: Any) -> None:
    """Store an ONNX graph's weights as float16 with a cast to float32: half the file size, float32 computation."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in graph.initializer:
        if weight.data_type == TensorProto.FLOAT:
            name, half = weight.name, f"{weight.name}.half"
            weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype("float16"), half))
            casts.append(helper.make_node("Cast", [half], [name], name=f"cast {name}", to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
