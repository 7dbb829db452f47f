"""The layers of adapters in the UNets of SD1.x and SDXL: every cross-attention, in the order of published files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import nn

from ...likeness.attention import layer_weights
from ...likeness.checkpoints import checkpoint_detection
from ...likeness.spec import AdapterSpec
from .injection import PatchPlace


@dataclass(frozen=True)
class UNetLayer:
    """One transformer block of a UNet.

    `file_index` is the number of its cross-attention in adapter files: down, up, middle (its self-attention has the
    number before). `block` is ComfyUI's name of the block, ("input", 4); `depth` is the index in its transformer, and
    `is_multi_block` says whether that has several. `transformer_index` counts in the order in which they run.
    `module_path` is the path in the diffusion model; `hidden_size` and `context_dim` are the widths of the queries and
    of the text.
    """

    file_index: int
    block: tuple[str, int]
    depth: int
    is_multi_block: bool
    transformer_index: int
    num_transformers: int
    module_path: str
    hidden_size: int
    context_dim: int

    @property
    def name(self) -> str:
        """The cross-attention's name in adapter files."""
        return str(self.file_index)

    @property
    def place(self) -> PatchPlace:
        return PatchPlace("attn2", self.block, self.depth, self.is_multi_block)

    def get_layer_position(self, base: str) -> layer_weights.LayerPosition:
        return layer_weights.LayerPosition(self.transformer_index, self.num_transformers, self.block[0], base)


UNET_BLOCK_TYPES = (("input", "input_blocks"), ("middle", "middle_block"), ("output", "output_blocks"))  # as they run
ADAPTER_FILE_ORDER = ("input", "output", "middle")


def _iterate_transformers(unet: nn.Module) -> Iterator[tuple[tuple[str, int], str, Any]]:
    """Every transformer in the order in which they run: ComfyUI's block name, module path, module."""
    for kind, name in UNET_BLOCK_TYPES:
        # The middle block is one sequence of layers, which ComfyUI calls ("middle", 0); the others are lists of them.
        blocks = (
            [(0, name, getattr(unet, name))]
            if kind == "middle"
            else [(i, f"{name}.{i}", b) for i, b in enumerate(getattr(unet, name))]
        )
        for i, path, block in blocks:
            for j, layer in enumerate(block if block is not None else ()):
                if hasattr(layer, "transformer_blocks"):
                    yield (kind, i), f"{path}.{j}", layer


def list_unet_layers(unet: nn.Module) -> list[UNetLayer]:
    """The transformer blocks of a UNet in the order of adapter files. Raises ValueError for other models."""
    if not all(hasattr(unet, name) for _, name in UNET_BLOCK_TYPES):
        raise ValueError(
            f"got a {type(unet).__name__} model; expected the UNet of an SD1.5 or SDXL checkpoint; load one of these"
        )
    transformers = list(_iterate_transformers(unet))
    order = sorted(range(len(transformers)), key=lambda t: ADAPTER_FILE_ORDER.index(transformers[t][0][0]))
    layers: list[UNetLayer] = []
    for t in order:
        block, path, transformer = transformers[t]
        for depth, transformer_block in enumerate(transformer.transformer_blocks):
            layers.append(
                UNetLayer(
                    file_index=2 * len(layers) + 1,
                    block=block,
                    depth=depth,
                    is_multi_block=len(transformer.transformer_blocks) > 1,
                    transformer_index=t,
                    num_transformers=len(transformers),
                    module_path=f"{path}.transformer_blocks.{depth}",
                    hidden_size=transformer_block.n_heads * transformer_block.d_head,
                    context_dim=transformer_block.attn2.to_k.in_features,
                )
            )
    return layers


def match_unet_layers(spec: AdapterSpec, model: ModelPatcher) -> list[UNetLayer]:
    """The model's cross-attentions. Raises ValueError if the adapter was made for another base model."""
    layers = list_unet_layers(model.model.diffusion_model)
    widths = tuple(layer.hidden_size for layer in layers)
    if widths != spec.layers or (spec.matches_text_width and any(layer.context_dim != spec.width for layer in layers)):
        text_width = layers[0].context_dim if layers else 0
        base = checkpoint_detection.get_base_name(spec.base, spec.width)
        this_model = checkpoint_detection.get_base_name("this model", text_width)
        raise ValueError(
            f"got an adapter for {base} ({len(spec.layers)} cross-attentions, text width {spec.width}); "
            f"expected one for {this_model}, which has {len(layers)} of text width {text_width}; "
            f"load an adapter for this base model, or a {base} model"
        )
    return layers
