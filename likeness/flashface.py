"""FlashFace (arXiv 2403.17008): a second UNet reads the faces, and added attention layers read what it saw of them.

    y <- y + S(y) + (1 - s) F(y; y) + s F(y; [y, r_1, r_2, ...])                                   (Eq. 2)
    e = e_none + g (e_text - e_none) + f (e_text&ref - e_text)                                     (Eq. 3)

S is the UNet's own self-attention, F the added one; r_i are the normalised inputs of the second UNet's self-attentions
for face i, at the picture's own timestep. Names of the official checkpoint are in keymaps.FLASHFACE_*.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import keymaps

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, N, C] -> [B, N, C]
Pair = tuple[Tensor, Tensor]

ADDED = ".reference."  # the added layers, in the middle of a UNet's names
EPS = 1e-6  # of every GroupNorm; the host's residual blocks have 1e-5
QUERY = ".q.weight"
LORA = re.compile(r"(.+)\.(lora_(?:down|up)\.weight|alpha)")
TRAINED_STEPS = 1000
REFERENCES = 4  # how many faces the authors' demo always shows


@dataclass(frozen=True)
class Parts:
    """A FlashFace file under the host's names.

    `main` is the picture's UNet, None where the file was trained as a LoRA; `reference` the second UNet; `added` the
    added layers, by the path of their transformer block; `lora` what is put into any SD1.5 model instead of `main`.
    Tensors that both UNets share are the same objects.
    """

    main: Mapping[str, Tensor] | None
    reference: Mapping[str, Tensor]
    added: Mapping[str, Tensor]
    lora: Mapping[str, Tensor]


def parts(tensors: Mapping[str, Tensor]) -> Parts:
    """Tell the parts of a FlashFace checkpoint apart: the official one, or one that keeps one spelling of its aliases.

    The mode switch of the official code leaves the middle block alone, so that the reference UNet runs through the
    picture's; `ref_middle` counts only in LoRA files, which have no other. Raises ValueError on any other file.
    """
    if "ref_encoder.0.weight" not in tensors or not any("self_attn_first" in key for key in tensors):
        raise ValueError(
            "got a file without ref_encoder and self_attn_first; expected a FlashFace checkpoint (flashface.ckpt); "
            "load the file that its authors publish"
        )
    lora = {key: value for key, value in tensors.items() if LORA.fullmatch(key)}
    plain = {key: value for key, value in tensors.items() if key not in lora}
    own = {key: value for key, value in plain.items() if not key.startswith(("ref_", "ori_"))}
    own |= {key.removeprefix("ori_"): value for key, value in plain.items() if key.startswith("ori_")}
    named = _ldm(own)
    added = {key: value for key, value in named.items() if ADDED in key}
    main = {key: value for key, value in named.items() if key not in added}
    read = _ldm({key.removeprefix("ref_"): value for key, value in plain.items() if key.startswith("ref_")})
    shared = {key: value for key, value in main.items() if key.startswith(("time_embed.", "middle_block.", "out."))}
    whole = "input_blocks.0.0.weight" in main
    return Parts(
        main=main if whole else None,
        reference={**read, **shared},
        added={key.replace(ADDED, "."): value for key, value in added.items()},
        lora=_ldm_lora(lora),
    )


def _ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return keymaps.rename(keymaps.rename(tensors, keymaps.FLASHFACE_INSIDE), keymaps.FLASHFACE_BLOCKS)


def _ldm_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        match = LORA.fullmatch(key)
        assert match is not None
        (name,) = _ldm({f"{match[1].removeprefix('ori_')}.weight": value})
        out[f"{name.removesuffix('.weight')}.{match[2]}"] = value
    return out


class AddedLayer(nn.Module):
    """F: queries of the picture's tokens, keys and values of these and the references'. q, k, v, o are [C, C]."""

    def __init__(self, channels: int, operations: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (operations.Linear(channels, channels, bias=False) for _ in range(3))
        self.o = operations.Linear(channels, channels)


class AddedLayers(nn.Module):
    """The added layers of a file, by the path of the transformer block that each stands in."""

    def __init__(self, tensors: Mapping[str, Tensor], operations: Any) -> None:
        super().__init__()
        channels = {self._name(key[: -len(QUERY)]): len(w) for key, w in tensors.items() if key.endswith(QUERY)}
        self.layers = nn.ModuleDict({name: AddedLayer(c, operations) for name, c in channels.items()})
        moved = {key: key.rsplit(".", 2) for key in tensors}
        named = {f"{self._name(path)}.{part}.{kind}": tensors[key] for key, (path, part, kind) in moved.items()}
        keymaps.load(self.layers, named)

    @staticmethod
    def _name(path: str) -> str:
        return path.replace(".", "/")  # a module's name holds no dots

    def at(self, path: str) -> AddedLayer | None:
        """The layer in a transformer block, if there is one."""
        name = self._name(path)
        return self.layers[name] if name in self.layers else None  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False)
class Heard:
    """What an added layer, or the UNet's own self-attention in its place, made of the picture's tokens alone."""

    q: Tensor
    k: Tensor
    v: Tensor
    own: Tensor  # the layer's result [B, N, C]


def difference(heard: Heard, rows: slice, references: Pair, attend: Attend, out: Callable[[Tensor], Tensor]) -> Tensor:
    """F(y; [y, r]) - F(y; y) of some rows (Eq. 2): what strength 1 adds. References are [1 or rows, T, C]."""
    q, k, v = heard.q[rows], heard.k[rows], heard.v[rows]
    k, v = (
        torch.cat((mine, theirs.expand(len(mine), -1, -1)), 1) for mine, theirs in zip((k, v), references, strict=True)
    )
    return out(attend(q, k, v)) - heard.own[rows]


def trailing(steps: int) -> list[float]:
    """The times, from 999 down, at which the authors' sampler looks: evenly spaced and ending above 0."""
    return [TRAINED_STEPS - 1 - k * TRAINED_STEPS / steps for k in range(steps)]


def repeats(n: int, least: int) -> list[int]:
    """Which of n references to show, in order: all, and from the first again until there are `least`."""
    return [i % n for i in range(max(n, least))]
