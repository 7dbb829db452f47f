"""A UNet in a wider one: it says the same, and the copies of its channels part."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfyui_likeness.training.base import unet, widen
from comfyui_likeness.training.task import chance

NARROW = unet.Settings("", "", side=32, channels=32, levels=(1, 2), depth=(1, 0), blocks=1, heads=2)
WIDTH = 32  # of the text


def test_a_wider_unet_says_the_same_and_its_copies_part() -> None:
    generator = chance(4)
    made = unet.base_model(unet.config(NARROW, WIDTH)).diffusion_model
    for value in made.parameters():
        value.data = torch.randn(value.shape, generator=generator) / (value[0].numel() ** 0.5 if value.ndim > 1 else 10)
    wide = unet.base_model(unet.config(replace(NARROW, channels=64), WIDTH)).diffusion_model
    wide.load_state_dict(widen.widened(made.state_dict(), wide.state_dict(), generator))
    given = torch.randn(2, 4, 4, 4, generator=generator), torch.tensor([3.0, 700.0])
    text = torch.randn(2, 77, WIDTH, generator=generator)
    with torch.no_grad():
        said, again = (net(*given, context=text) for net in (made, wide))
    assert torch.allclose(said, again, atol=1e-4 * said.abs().max().item())
    first, second = wide.input_blocks[1][0].out_layers[3].weight.unflatten(1, (-1, 2)).unbind(2)
    assert not torch.allclose(first, second)
