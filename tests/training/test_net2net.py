"""Widening a UNet: the same output, and the copies of its channels differ."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfyui_likeness.training.base_models import net2net, unet
from comfyui_likeness.training.task import make_generator

NARROW = unet.UNetConfig(
    "",
    "",
    resolution=32,
    model_channels=32,
    channel_mult=(1, 2),
    transformer_depth=(1, 0),
    num_res_blocks=1,
    num_heads=2,
)
WIDTH = 32  # of the text encoder


def test_a_widened_unet_computes_the_same_and_its_copies_differ() -> None:
    generator = make_generator(4)
    narrow = unet.build_base_model(unet.build_unet_config(NARROW, WIDTH)).diffusion_model
    for value in narrow.parameters():
        value.data = torch.randn(value.shape, generator=generator) / (value[0].numel() ** 0.5 if value.ndim > 1 else 10)
    wide = unet.build_base_model(unet.build_unet_config(replace(NARROW, model_channels=64), WIDTH)).diffusion_model
    wide.load_state_dict(net2net.widen_unet(narrow.state_dict(), wide.state_dict(), generator))
    inputs = torch.randn(2, 4, 4, 4, generator=generator), torch.tensor([3.0, 700.0])
    text = torch.randn(2, 77, WIDTH, generator=generator)
    with torch.no_grad():
        expected, found = (net(*inputs, context=text) for net in (narrow, wide))
    assert torch.allclose(expected, found, atol=1e-4 * expected.abs().max().item())
    first, second = wide.input_blocks[1][0].out_layers[3].weight.unflatten(1, (-1, 2)).unbind(2)
    assert not torch.allclose(first, second)
