"""Dynamic model expansion (AdaFace, Sec. 2.2): perturbed copies of each token's value projection, and of its key
projection, as in AdaFace's code, or of its query projection, as in the paper.

Expansion happens between runs, not within one: when the loss has leveled off, a new run starts from the file of the
last, so that tensor shapes never change between the checkpoints of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...likeness.encoders.clip_text import EXPANDED_PROJECTIONS
from ..task import make_generator


def expand_text_model(
    tensors: Mapping[str, Tensor],
    copies_per_layer: Sequence[int],
    noise_scale: float,
    seed: int,
    expanded_projection: str = "keys",
) -> dict[str, Tensor]:
    """Expand the value projection and the `expanded_projection` of each layer to the given number of copies.

    A layer's existing weights are kept; the added copies get Gaussian noise of `noise_scale` times the mean standard
    deviation of their rows. Raises ValueError if the numbers do not fit the layers.
    """
    expanded, generator = dict(tensors), make_generator(seed)
    num_layers = 1 + max(int(key.split(".")[2]) for key in tensors if key.startswith("encoder.layers."))
    if len(copies_per_layer) != num_layers:
        raise ValueError(
            f"got copies_per_layer for {len(copies_per_layer)} layers in [task]; expected {num_layers} numbers"
        )
    for layer, num_copies in enumerate(copies_per_layer):
        for part in (EXPANDED_PROJECTIONS[expanded_projection][0], "v_proj"):
            name = f"encoder.layers.{layer}.self_attn.{part}"
            weight, bias = tensors[f"{name}.weight"].float(), tensors[f"{name}.bias"].float()
            rows, width = weight.shape
            repeats, remainder = divmod(num_copies * width, rows)
            if remainder or repeats < 1:
                raise ValueError(
                    f"got copies_per_layer = {num_copies} for layer {layer} in [task]; expected a multiple of its "
                    f"present {rows // width}"
                )
            repeated = weight.repeat(repeats, 1)
            noise = torch.randn(repeated.shape, generator=generator, device="cpu").to(repeated)
            noise *= noise_scale * weight.std(1).mean()
            noise[:rows] = 0
            expanded |= {f"{name}.weight": repeated + noise, f"{name}.bias": bias.repeat(repeats)}
    return expanded
