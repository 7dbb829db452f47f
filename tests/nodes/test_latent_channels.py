"""Models whose latents have eight channels of unit variance, as the demo's: all that reads faces through the VAE."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.taesd.taesd import TAESD
from comfyui_likeness.nodes.attention.apply_fused import ApplyFused
from comfyui_likeness.nodes.attention.flashface.apply_reference import ApplyReference
from comfyui_likeness.nodes.attention.flashface.face_position import apply_face_position
from comfyui_likeness.nodes.loaders import flashface_loader, native_models, native_vae
from comfyui_likeness.training.task import init_weights
from support.flashface_models import APPLY_REFERENCE_DEFAULTS, load_flashface, make_flashface_identity
from support.fused_kv import APPLY_FUSED_DEFAULTS, make_fused_kv_adapter, make_fused_kv_identity
from support.host_models import SD15_CONFIG, make_random_weight, make_small_model, sample_latent
from torch import Tensor

CPU = torch.device("cpu")
PLAIN = {"reference_guidance": 0.0, "strength": 1.0, "strength_before": 1.0}


def make_wide_model(channels: int = 8, **changes: Any) -> ModelPatcher:
    """SD1.5's small model with so many latent channels."""
    config = copy.deepcopy(SD15_CONFIG) | {"in_channels": channels, "out_channels": channels} | changes
    model = native_models.build_base_model(config)
    generator = torch.Generator().manual_seed(7)
    weights = model.diffusion_model.state_dict()
    model.diffusion_model.load_state_dict(
        {key: make_random_weight(key, value.shape, generator) for key, value in weights.items()}
    )
    model.diffusion_model.eval().requires_grad_(False)
    return ModelPatcher(model, CPU, CPU)


class WatchedVAE:
    """The VAE, with the latents that it returned."""

    def __init__(self, channels: int = 8) -> None:
        network = native_vae.NativeVAE(channels, (16, 16, 16), 1)
        init_weights(network, 3)
        self.vae, self.encoded = native_vae.wrap_vae(network.requires_grad_(False)), list[Tensor]()

    def encode(self, images: Tensor) -> Tensor:
        self.encoded.append(self.vae.encode(images))
        return self.encoded[-1]


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    return make_wide_model()


@pytest.fixture
def unet_inputs(model: ModelPatcher) -> Iterator[list[Tensor]]:
    """The latents that the model's UNet gets."""
    inputs: list[Tensor] = []
    hook = model.model.diffusion_model.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))
    yield inputs
    hook.remove()


def apply_reference(model: ModelPatcher, vae: Any, **changes: Any) -> ModelPatcher:
    """Reference attention with the model itself as the reference net."""
    (net,) = flashface_loader.ModelAsReferenceNet.execute(model).args
    settings = {**APPLY_REFERENCE_DEFAULTS, **PLAIN, **changes}
    return ApplyReference.execute(model, net, make_flashface_identity(), vae, **settings).args[0]


def apply_fused(model: ModelPatcher, vae: Any) -> ModelPatcher:
    return ApplyFused.execute(
        model, make_fused_kv_adapter(), make_fused_kv_identity(), vae, **APPLY_FUSED_DEFAULTS
    ).args[0]


@pytest.mark.parametrize("apply", [apply_reference, apply_fused])
def test_faces_are_read_at_the_scale_of_the_models_latents(
    model: ModelPatcher, unet_inputs: list[Tensor], apply: Any
) -> None:
    vae = WatchedVAE()
    patched = apply(model, vae)
    (encoded,) = vae.encoded
    assert encoded.shape[1] == 8
    plain = sample_latent(model)
    unet_inputs.clear()
    changed = sample_latent(patched)
    assert changed.isfinite().all() and not torch.equal(changed, plain)
    # As they are, without SD1.5's scale.
    assert any(x.shape == encoded.shape and torch.allclose(x, encoded, atol=1e-5) for x in unet_inputs)
    assert torch.equal(sample_latent(model), plain)


@pytest.mark.parametrize("apply", [apply_reference, apply_fused])
def test_the_vae_must_make_the_models_latents(model: ModelPatcher, apply: Any) -> None:
    with pytest.raises(ValueError, match=r"got a VAE whose latents of 1 faces are \[1, 4, .* expected 8 channels"):
        apply(model, native_vae.wrap_vae(TAESD()))
    with pytest.raises(ValueError, match=r"got a VAE whose latents of 1 faces are \[1, 8, .* expected 4 channels"):
        apply(make_small_model(), WatchedVAE())


def test_a_reference_net_must_read_the_models_latents(model: ModelPatcher) -> None:
    for one, other in ((model, make_small_model()), (make_small_model(), model)):
        (net,) = flashface_loader.ModelAsReferenceNet.execute(other).args
        with pytest.raises(ValueError, match="got a reference net and a model of different kinds"):
            ApplyReference.execute(one, net, make_flashface_identity(), WatchedVAE(), **APPLY_REFERENCE_DEFAULTS)


def test_a_mask_among_the_inputs_is_no_latent() -> None:
    """FlashFace's own UNet reads SD1.5's latents and a face position: its latents keep SD1.5's scale."""
    published, _ = load_flashface()
    assert published.model.model_config.unet_config["in_channels"] == 5
    assert published.model.latent_format.latent_channels == 4
    assert float(published.model.process_latent_in(torch.ones(1))) == pytest.approx(0.18215)


def test_a_main_unet_of_eight_channels_reads_a_face_position() -> None:
    """Nine inputs are eight latents and the position here, not the three inputs of an inpainting model."""
    weights = make_wide_model(in_channels=9).model.diffusion_model.state_dict()
    main = flashface_loader.add_face_position_channels(flashface_loader.build_sd15_model(weights))
    assert main.model.latent_format.latent_channels == 8 and float(main.model.process_latent_in(torch.ones(1))) == 1
    anywhere = sample_latent(main)
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:40, 8:32] = 1
    placed = sample_latent(apply_face_position(main, mask, ""))
    assert anywhere.isfinite().all() and placed.isfinite().all() and not torch.equal(anywhere, placed)
    assert torch.equal(sample_latent(apply_face_position(main, torch.zeros(1, 64, 64), "")), anywhere)
    with pytest.raises(ValueError, match="a face position for a model with 8 input channels; .* which has 9;"):
        apply_face_position(make_wide_model(), mask, "")
