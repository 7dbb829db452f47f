"""FlashFace (arXiv 2403.17008): a reference UNet encodes the faces, and added attention layers read its features.

    y <- y + S(y) + (1 - s) F(y; y) + s F(y; [y, r_1, r_2, ...])                                   (Eq. 2)
    e = e_none + g (e_text - e_none) + f (e_text&ref - e_text)                                     (Eq. 3)

S is the UNet's self-attention, F the added one; r_i are the normalised inputs of the reference UNet's self-attentions
for face i, at the image's timestep. The names of the official checkpoint are in key_maps.FLASHFACE_*.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import key_maps

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, N, C] -> [B, N, C]
KeyValuePair = tuple[Tensor, Tensor]

ADDED_LAYER_INFIX = ".reference."  # in the renamed keys of the added layers
GROUP_NORM_EPS = 1e-6  # of every GroupNorm; ComfyUI's residual blocks have 1e-5
QUERY_WEIGHT_SUFFIX = ".q.weight"
LORA_TENSOR_NAME = re.compile(r"(.+)\.(lora_(?:down|up)\.weight|alpha)")
NUM_TRAIN_TIMESTEPS = 1000
DEFAULT_NUM_REFERENCES = 4  # the authors' demo always uses four


@dataclass(frozen=True)
class FlashFaceWeights:
    """A FlashFace file under ComfyUI's names.

    `main_unet` is None where the file was trained as a LoRA; `lora` is then what is applied to any SD1.5 model instead.
    `added_layers` are named by the path of their transformer block. Tensors that both UNets share are the same objects.
    """

    main_unet: Mapping[str, Tensor] | None
    reference_unet: Mapping[str, Tensor]
    added_layers: Mapping[str, Tensor]
    lora: Mapping[str, Tensor]


def split_flashface_checkpoint(tensors: Mapping[str, Tensor]) -> FlashFaceWeights:
    """Split a FlashFace checkpoint, with all or only one of its aliased names, into its parts.

    The official code does not switch the middle block, so the reference UNet uses the main one's; `ref_middle` is only
    used in LoRA files, which have no other. Raises ValueError on any other file.
    """
    if "ref_encoder.0.weight" not in tensors or not any("self_attn_first" in key for key in tensors):
        raise ValueError(
            "got a file without ref_encoder and self_attn_first; expected a FlashFace checkpoint (flashface.ckpt); "
            "load the file that its authors publish"
        )
    lora = {key: value for key, value in tensors.items() if LORA_TENSOR_NAME.fullmatch(key)}
    plain = {key: value for key, value in tensors.items() if key not in lora}
    unprefixed = {key: value for key, value in plain.items() if not key.startswith(("ref_", "ori_"))}
    unprefixed |= {key.removeprefix("ori_"): value for key, value in plain.items() if key.startswith("ori_")}
    renamed = _rename_to_ldm(unprefixed)
    added = {key: value for key, value in renamed.items() if ADDED_LAYER_INFIX in key}
    main = {key: value for key, value in renamed.items() if key not in added}
    reference = _rename_to_ldm(
        {key.removeprefix("ref_"): value for key, value in plain.items() if key.startswith("ref_")}
    )
    shared = {key: value for key, value in main.items() if key.startswith(("time_embed.", "middle_block.", "out."))}
    return FlashFaceWeights(
        main_unet=main if "input_blocks.0.0.weight" in main else None,
        reference_unet={**reference, **shared},
        added_layers={key.replace(ADDED_LAYER_INFIX, "."): value for key, value in added.items()},
        lora=_rename_lora_to_ldm(lora),
    )


def _rename_to_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return key_maps.rename_keys(key_maps.rename_keys(tensors, key_maps.FLASHFACE_LAYERS), key_maps.FLASHFACE_BLOCKS)


def _rename_lora_to_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = LORA_TENSOR_NAME.fullmatch(key)
        assert match is not None
        (name,) = _rename_to_ldm({f"{match[1].removeprefix('ori_')}.weight": value})
        out[f"{name.removesuffix('.weight')}.{match[2]}"] = value
    return out


class AddedLayer(nn.Module):
    """F: queries of the image tokens, keys and values of these and the references'. q, k, v, o are [C, C]."""

    def __init__(self, channels: int, operations: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (operations.Linear(channels, channels, bias=False) for _ in range(3))
        self.o = operations.Linear(channels, channels)


class AddedLayers(nn.Module):
    """The added layers of a file, by the path of their transformer block."""

    def __init__(self, tensors: Mapping[str, Tensor], operations: Any) -> None:
        super().__init__()
        channels = {
            self._module_name(key[: -len(QUERY_WEIGHT_SUFFIX)]): len(w)
            for key, w in tensors.items()
            if key.endswith(QUERY_WEIGHT_SUFFIX)
        }
        self.layers = nn.ModuleDict({name: AddedLayer(c, operations) for name, c in channels.items()})
        split = {key: key.rsplit(".", 2) for key in tensors}
        weights = {
            f"{self._module_name(path)}.{part}.{kind}": tensors[key] for key, (path, part, kind) in split.items()
        }
        key_maps.load_module_weights(self.layers, weights)

    @staticmethod
    def _module_name(path: str) -> str:
        return path.replace(".", "/")  # module names may not contain dots

    def get_layer(self, path: str) -> AddedLayer | None:
        """The added layer of a transformer block, if there is one."""
        name = self._module_name(path)
        return self.layers[name] if name in self.layers else None  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False)
class SelfAttentionOutput:
    """F(y; y) of an added layer, or of the UNet's self-attention in its place: inputs and output."""

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor  # after the output projection [B, N, C]


def compute_reference_difference(
    self_attention: SelfAttentionOutput,
    rows: slice,
    references: KeyValuePair,
    attend: AttentionFunction,
    project_out: Callable[[Tensor], Tensor],
) -> Tensor:
    """F(y; [y, r]) - F(y; y) of some rows, which strength 1 adds (Eq. 2). References are [1 or rows, T, C]."""
    q, k, v = self_attention.q[rows], self_attention.k[rows], self_attention.v[rows]
    k, v = (
        torch.cat((own, reference.expand(len(own), -1, -1)), 1)
        for own, reference in zip((k, v), references, strict=True)
    )
    return project_out(attend(q, k, v)) - self_attention.output[rows]


def make_trailing_timesteps(num_steps: int) -> list[float]:
    """The timesteps of the authors' sampler, from 999 down: evenly spaced and ending above 0."""
    return [NUM_TRAIN_TIMESTEPS - 1 - k * NUM_TRAIN_TIMESTEPS / num_steps for k in range(num_steps)]


def repeat_reference_indices(num_references: int, min_count: int) -> list[int]:
    """Indices of n references, in order: all of them, repeated from the first until there are `min_count`."""
    return [i % num_references for i in range(max(num_references, min_count))]
