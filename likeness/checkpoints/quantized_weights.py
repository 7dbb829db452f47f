"""Quantized weights of ComfyUI's float8 files as plain tensors: weight = float8 values * scale.

Old names: `<layer>.scale_weight` and `.scale_input`, and an empty `scaled_fp8` per group of layers. New names:
`<layer>.weight_scale` and `.input_scale`, and JSON in `<layer>.comfy_quant`. The scale of a layer's input only serves
multiplication in float8.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, float16

WEIGHT_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
MARKER_SUFFIXES = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")


def is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize == 1


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity. In float8, torch cannot tell."""
    return not tensor.is_floating_point() or bool((tensor.half() if is_float8(tensor) else tensor).isfinite().all())


def dequantize_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with scaled float8 weights multiplied out, in float16; all others, float8 without a scale included,
    are returned as they are.

    Raises ValueError where a weight is not in float8, or does not have one scale, or one per row.
    """
    out = {key: value for key, value in tensors.items() if not key.endswith((*WEIGHT_SCALE_SUFFIXES, *MARKER_SUFFIXES))}
    for key, scale in tensors.items():
        suffix = next((suffix for suffix in WEIGHT_SCALE_SUFFIXES if key.endswith(suffix)), None)
        if suffix is not None:
            name = f"{key.removesuffix(suffix)}.weight"
            out[name] = _multiply_scale(name, tensors.get(name), scale)
    return out


def _multiply_scale(name: str, weight: Tensor | None, scale: Tensor) -> Tensor:
    if weight is None or not is_float8(weight) or scale.numel() not in (1, len(weight)):
        dtype = "no" if weight is None else str(weight.dtype).removeprefix("torch.")
        raise ValueError(
            f"got {name} with {dtype} values and scales of shape {list(scale.shape)}; expected float8 values with one "
            "scale, or one per row"
        )
    # float16 holds more digits of the product than bfloat16 does.
    return (weight.float() * scale.float().view(-1, *[1] * (weight.ndim - 1))).to(float16)
