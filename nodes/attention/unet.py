"""Where adapters sit in the UNets of SD1.x and SDXL: every cross-attention, in the order of the published files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import nn

from ...likeness import curves, detect
from ...likeness.spec import AdapterSpec
from .injection import Place


@dataclass(frozen=True)
class Site:
    """One transformer block of a UNet.

    `number` is its cross-attention's in adapter files (its self-attention's is one less): down, up, middle last.
    `block` is the host's name of the place, ("input", 4); `depth` counts the blocks of one transformer and `deep`
    says whether there are several; `transformer` and `transformers` count in running order; `key` is its path in the
    diffusion model; `hidden` and `context` are the widths of its queries and of its text.
    """

    number: int
    block: tuple[str, int]
    depth: int
    deep: bool
    transformer: int
    transformers: int
    key: str
    hidden: int
    context: int

    @property
    def name(self) -> str:
        """The cross-attention's name in adapter files."""
        return str(self.number)

    @property
    def place(self) -> Place:
        return Place("attn2", self.block, self.depth, self.deep)

    def layer(self, base: str) -> curves.Layer:
        return curves.Layer(self.transformer, self.transformers, self.block[0], base)


SIDES = (("input", "input_blocks"), ("middle", "middle_block"), ("output", "output_blocks"))  # running order
FILE_ORDER = ("input", "output", "middle")


def _transformers(unet: nn.Module) -> Iterator[tuple[tuple[str, int], str, Any]]:
    """Every transformer in running order: the host's block name, its path, the module."""
    for side, name in SIDES:
        # The middle block is one sequence of layers that the host calls ("middle", 0); the other sides are lists.
        blocks = (
            [(0, name, getattr(unet, name))]
            if side == "middle"
            else [(i, f"{name}.{i}", b) for i, b in enumerate(getattr(unet, name))]
        )
        for i, path, block in blocks:
            for j, layer in enumerate(block if block is not None else ()):
                if hasattr(layer, "transformer_blocks"):
                    yield (side, i), f"{path}.{j}", layer


def sites(unet: nn.Module) -> list[Site]:
    """The cross-attentions of a UNet in file order. Raises ValueError for a model that is not such a UNet."""
    if not all(hasattr(unet, name) for _, name in SIDES):
        raise ValueError(
            f"got a {type(unet).__name__} model; expected the UNet of an SD1.5 or SDXL checkpoint; load one of these"
        )
    found = list(_transformers(unet))
    order = sorted(range(len(found)), key=lambda t: FILE_ORDER.index(found[t][0][0]))
    out: list[Site] = []
    for t in order:
        block, path, layer = found[t]
        for depth, transformer in enumerate(layer.transformer_blocks):
            out.append(
                Site(
                    number=2 * len(out) + 1,
                    block=block,
                    depth=depth,
                    deep=len(layer.transformer_blocks) > 1,
                    transformer=t,
                    transformers=len(found),
                    key=f"{path}.transformer_blocks.{depth}",
                    hidden=transformer.n_heads * transformer.d_head,
                    context=transformer.attn2.to_k.in_features,
                )
            )
    return out


def fitting(spec: AdapterSpec, model: ModelPatcher) -> list[Site]:
    """The model's cross-attentions, if the adapter was made for such a model. Raises ValueError if not."""
    found = sites(model.model.diffusion_model)
    widths = tuple(site.hidden for site in found)
    if widths != spec.layers or (spec.as_text and any(site.context != spec.width for site in found)):
        context = found[0].context if found else 0
        base = detect.base_name(spec.base, spec.width)
        raise ValueError(
            f"got an adapter for {base} ({len(spec.layers)} cross-attentions, text width {spec.width}); "
            f"expected one for {detect.base_name('this model', context)}, which has {len(found)} of text width "
            f"{context}; load an adapter for this base model, or a {base} model"
        )
    return found
