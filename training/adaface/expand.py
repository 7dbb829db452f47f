"""Dynamic model expansion (AdaFace, Sec. 2.2): slightly varied copies of the old values of each word, and of its keys,
as AdaFace's code has it, or of its queries, as the paper says.

A run ends where its loss stays level, and another begins with its file, so that a checkpoint's shapes are a run's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...likeness.clip_text import WIDENS
from ..task import chance


def expanded(
    tensors: Mapping[str, Tensor], copies: Sequence[int], spread: float, seed: int, widens: str = "keys"
) -> dict[str, Tensor]:
    """A text model's tensors with so many values per word in each layer, and as many of what it `widens`.

    The first copy of all that a layer has stays; the others' weights move by noise of `spread` times the mean deviation
    of their rows. Raises ValueError where the numbers do not fit the layers.
    """
    made, generator = dict(tensors), chance(seed)
    layers = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("encoder.layers."))
    if len(copies) != layers:
        raise ValueError(f"got copies for {len(copies)} layers in [task]; expected {layers}, one number for each")
    for layer, wanted in enumerate(copies):
        for part in (WIDENS[widens][0], "v_proj"):
            name = f"encoder.layers.{layer}.self_attn.{part}"
            weight, bias = tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()
            rows, width = weight.shape
            times, left = divmod(wanted * width, rows)
            if left or times < 1:
                raise ValueError(
                    f"got copies = {wanted} for layer {layer} in [task], which has {rows // width}; expected a multiple"
                )
            wide = weight.repeat(times, 1)
            drawn = torch.randn(wide.shape, generator=generator, device="cpu").to(wide)
            noise = drawn * (spread * weight.std(1).mean())
            noise[:rows] = 0
            made |= {f"{name}.weight": wide + noise, f"{name}.bias": bias.repeat(times)}
    return made
