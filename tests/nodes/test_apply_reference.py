"""The invariants of Apply nodes with ComfyUI's own models and samplers: reference attention."""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.nodes.attention import patch
from comfyui_likeness.nodes.attention.flashface import apply_reference, reference_term
from comfyui_likeness.nodes.loaders.flashface_loader import ModelAsReferenceNet
from comfyui_likeness.nodes.types import LoadedReferenceNet
from support.flashface_models import (
    FixedLatentVAE,
    apply_flashface,
    load_flashface,
    make_face_latents,
    make_flashface_identity,
    predict_guided_noise,
)
from support.host_models import add_controlnet, all_close, make_conditioning, make_small_model, sample_latent
from torch import Tensor

PLAIN: dict[str, Any] = {"reference_guidance": 0.0, "rescale": 0.0, "launch": 1000}


@pytest.fixture(scope="module")
def model() -> ModelPatcher:
    return load_flashface()[0]


@pytest.fixture
def net() -> LoadedReferenceNet:
    reference_net = load_flashface()[1]
    reference_net.feature_cache.clear()
    return reference_net


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of faces of each pass of the reference net."""
    num_faces: list[int] = []
    real = reference_term.capture_attention_inputs

    def counting(unet: Any, x: Tensor, *args: Any) -> Any:
        num_faces.append(len(x))
        return real(unet, x, *args)

    monkeypatch.setattr(reference_term, "capture_attention_inputs", counting)
    return num_faces


@pytest.mark.parametrize("changes", [{"strength": 0.0}, {"start_percent": 0.5, "end_percent": 0.5}])
def test_strength_0_or_an_empty_schedule_changes_nothing(
    model: ModelPatcher, net: LoadedReferenceNet, changes: dict[str, Any]
) -> None:
    assert torch.equal(sample_latent(apply_flashface(model, net, **changes)), sample_latent(model))


def test_the_reference_changes_the_image_and_upstream_is_unchanged(
    model: ModelPatcher, net: LoadedReferenceNet
) -> None:
    before = sample_latent(model)
    first = apply_flashface(model, net)
    once = sample_latent(first)
    second = apply_flashface(first, net, make_face_latents(seed=3))
    assert not all_close(once, before, 1e-3)
    assert not torch.equal(sample_latent(second), once)
    assert torch.equal(sample_latent(first), once)
    assert torch.equal(sample_latent(model), before)


def test_deep_copied_clones_share_the_weights(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    first = apply_flashface(model, net)
    deep = first.clone()
    deep.model_options = copy.deepcopy(first.model_options)
    assert torch.equal(sample_latent(deep), sample_latent(first))
    assert patch.get_injections(deep) == patch.get_injections(first)


def test_applying_twice_is_the_sum(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    once = apply_flashface(model, net, strength=1.0, **PLAIN)
    twice = apply_flashface(apply_flashface(model, net, strength=0.4, **PLAIN), net, strength=0.6, **PLAIN)
    assert all_close(sample_latent(twice), sample_latent(once))
    guided = {"strength": 0.8, "rescale": 0.0}
    once = apply_flashface(model, net, reference_guidance=3.0, **guided)
    twice = apply_flashface(
        apply_flashface(model, net, reference_guidance=1.0, **guided), net, reference_guidance=2.0, **guided
    )
    assert all_close(sample_latent(twice, start_step=1, steps=4), sample_latent(once, start_step=1, steps=4), 1e-4)


def test_mixing_is_the_weighted_sum(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    """Supplement, Eq. 1: the weights of several people sum to 1."""
    both = torch.cat((make_face_latents(seed=1), make_face_latents(seed=2)))

    class SequentialLatentVAE(FixedLatentVAE):
        def encode(self, images: Tensor) -> Tensor:
            self.latents, latents = self.latents[1:], self.latents[:1]
            return latents / 0.18215

    settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, "show_at_least": 1, **PLAIN}
    mixed = apply_reference.ApplyReference.execute(
        model,
        net,
        make_flashface_identity(),
        SequentialLatentVAE(both),
        others={"identity_0": make_flashface_identity(seed=1)},
        weights="3, 7",
        **settings,
    ).args[0]
    stacked = apply_flashface(model, net, both[:1], strength=0.3, strength_before=0.3, **PLAIN)
    stacked = apply_flashface(stacked, net, both[1:], strength=0.7, strength_before=0.7, **PLAIN)
    assert all_close(sample_latent(mixed), sample_latent(stacked))


def test_adjacent_windows_equal_the_full_window(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    early, late = {"end_percent": 0.5}, {"start_percent": 0.5}
    halves = apply_flashface(apply_flashface(model, net, **early), net, **late)
    assert torch.equal(sample_latent(halves, steps=4), sample_latent(apply_flashface(model, net), steps=4))
    tail = {"steps": 4, "start_step": 2, "last_step": 4}
    assert torch.equal(sample_latent(apply_flashface(model, net, **early), **tail), sample_latent(model, **tail))
    assert not torch.equal(sample_latent(apply_flashface(model, net, **late), **tail), sample_latent(model, **tail))


@pytest.mark.parametrize("size", [(8, 8), (9, 11), (7, 16)], ids=str)
def test_batches_and_odd_sizes(model: ModelPatcher, net: LoadedReferenceNet, size: tuple[int, int]) -> None:
    patched = apply_flashface(model, net, make_face_latents(2))
    both = sample_latent(patched, batch_size=2, size=size)
    assert both.isfinite().all()
    assert all_close(both[:1], sample_latent(patched, size=size), 1e-4)


@pytest.mark.parametrize("faces", [1, 3, 4, 5, 8])
def test_any_number_of_references(model: ModelPatcher, net: LoadedReferenceNet, faces: int) -> None:
    patched = apply_flashface(model, net, make_face_latents(faces), show_at_least=4)
    injection = patch.get_injections(patched)[-1]
    assert isinstance(injection, reference_term.ReferenceTerm) and len(injection.people[0].face_order) == max(faces, 4)
    assert not all_close(sample_latent(patched), sample_latent(model), 1e-3)


def test_repeated_faces_weigh_more_and_are_read_once(
    model: ModelPatcher, net: LoadedReferenceNet, passes: list[int]
) -> None:
    four = sample_latent(apply_flashface(model, net, show_at_least=4))
    assert passes == [1, 1]  # two steps
    assert all_close(four, sample_latent(apply_flashface(model, net, make_face_latents().expand(4, -1, -1, -1))), 1e-4)
    assert not all_close(four, sample_latent(apply_flashface(model, net)), 1e-4)


def test_one_pass_per_step_serves_all_rows_and_later_images(
    model: ModelPatcher, net: LoadedReferenceNet, passes: list[int]
) -> None:
    patched = apply_flashface(model, net, make_face_latents(2))
    first = sample_latent(patched, steps=3, batch_size=2)
    assert passes == [2] * 3
    assert torch.equal(sample_latent(patched, steps=3, batch_size=2), first)
    sample_latent(patched, steps=3, positive=make_conditioning(8))
    assert torch.equal(
        sample_latent(apply_flashface(model, net, make_face_latents(2)), steps=3, batch_size=2), first
    )  # after the node ran again
    assert passes == [2] * 3
    sample_latent(patched, steps=3, negative=make_conditioning(9))
    assert passes == [2] * 6  # the reference net reads the negative prompt
    net.feature_cache.clear()
    assert torch.equal(sample_latent(patched, steps=3, batch_size=2), first)


def test_a_second_sampling_pass_reuses_the_features(
    model: ModelPatcher, net: LoadedReferenceNet, passes: list[int]
) -> None:
    patched = apply_flashface(model, net)
    sample_latent(patched, steps=4)
    sample_latent(patched, steps=4, start_step=2, size=(16, 16))
    assert len(passes) == 4  # the same noise levels


@pytest.mark.parametrize(("refresh", "num_passes"), [(1, 6), (2, 3), (3, 2), (50, 1)])
def test_refresh(
    model: ModelPatcher, net: LoadedReferenceNet, passes: list[int], refresh: int, num_passes: int
) -> None:
    patched = apply_flashface(model, net, refresh=refresh)
    first = sample_latent(patched, steps=6)
    assert len(passes) == num_passes
    assert torch.equal(sample_latent(patched, steps=6), first) and len(passes) == num_passes
    exact = sample_latent(apply_flashface(model, net), steps=6)
    assert torch.equal(first, exact) == (refresh == 1)


def test_launch(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    x, (positive, negative) = torch.randn(1, 4, 8, 8), (make_conditioning(1)[0][0], make_conditioning(2)[0][0])

    def predict_rows(patched: ModelPatcher, t: int) -> list[Tensor]:
        return predict_guided_noise(patched, x, t, positive, negative)[1]

    guided = apply_flashface(model, net, launch=600)
    plain = {t: predict_rows(model, t) for t in (601, 600)}
    before, after = predict_rows(guided, 601), predict_rows(guided, 600)
    assert len(before) == 2 and not any(torch.equal(a, b) for a, b in zip(before, plain[601], strict=True))
    assert len(after) == 3  # the rows of the prompts see no reference
    assert all_close(after[0], plain[600][0], 1e-6) and all_close(after[1], plain[600][1], 1e-6)
    assert not all_close(after[2], after[0], 1e-3)
    unguided = predict_rows(apply_flashface(model, net, launch=600, reference_guidance=0.0), 600)
    assert len(unguided) == 2 and not any(all_close(a, b, 1e-3) for a, b in zip(unguided, plain[600], strict=True))


def test_cfg_1_needs_no_negative_rows(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    patched = apply_flashface(model, net, launch=1000)
    out = sample_latent(patched, cfg=1.0)
    assert out.isfinite().all() and not all_close(out, sample_latent(model, cfg=1.0), 1e-3)


def test_other_guiders(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    import comfy_extras.nodes_custom_sampler as custom
    import comfy_extras.nodes_perpneg as perpneg

    noise, sampler = torch.randn(1, 4, 8, 8), comfy.samplers.sampler_object("euler")

    def run(guider: Any) -> Tensor:
        with torch.inference_mode():
            sigmas = torch.tensor([14.0, 3.0, 0.0])
            return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)

    def dual(model: ModelPatcher) -> Any:
        guider = custom.Guider_DualCFG(model)
        guider.set_conds(make_conditioning(1), make_conditioning(3), make_conditioning(2))
        guider.set_cfg(4.0, 3.0)
        return guider

    def perp(model: ModelPatcher) -> Any:
        guider = perpneg.Guider_PerpNeg(model)
        guider.set_conds(make_conditioning(1), make_conditioning(2), make_conditioning(3))
        guider.set_cfg(4.0, 1.0)
        return guider

    for make in (dual, perp):
        assert not all_close(run(make(apply_flashface(model, net))), run(make(model)), 1e-3)
    basic = custom.Guider_Basic(apply_flashface(model, net))
    basic.set_conds(make_conditioning(1))
    with pytest.raises(ValueError, match="reference_text"):
        run(basic)
    basic = custom.Guider_Basic(apply_flashface(model, net, reference_text=make_conditioning(2)))
    basic.set_conds(make_conditioning(1))
    assert run(basic).isfinite().all()


def test_guidance_of_other_packs_is_kept(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    from comfy_extras.nodes_model_advanced import RescaleCFG

    def doubled(args: dict[str, Any]) -> Tensor:
        return args["denoised"] * 2

    patched = apply_flashface(model, net)
    (rescaled,) = RescaleCFG().patch(patched, 0.7)
    (before,) = RescaleCFG().patch(model, 0.7)
    post = patched.clone()
    post.set_model_sampler_post_cfg_function(doubled)
    outs = [sample_latent(m) for m in (patched, rescaled, apply_flashface(before, net), post)]
    assert not all_close(outs[0], outs[1], 1e-3) and not all_close(outs[0], outs[3], 1e-3)
    assert torch.equal(outs[1], outs[2])


def test_areas_controlnets_and_half_precision(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    patched = apply_flashface(model, net)
    areas = [
        *make_conditioning(1, area=(8, 4, 0, 0), strength=1.0),
        *make_conditioning(3, area=(8, 4, 0, 4), strength=1.0),
    ]
    controlled = {"positive": add_controlnet(make_conditioning(1), channel_mult=[1, 2, 4, 4])}
    for options in ({"positive": areas}, controlled):
        assert not all_close(sample_latent(patched, **options), sample_latent(model, **options), 1e-3)
    half = apply_flashface(model, net).clone()
    half.set_model_compute_dtype(torch.bfloat16)
    assert sample_latent(half).isfinite().all()


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, ValueError])
def test_an_interrupt_leaves_no_trace(model: ModelPatcher, net: LoadedReferenceNet, error: type[BaseException]) -> None:
    before, patched = sample_latent(model), apply_flashface(model, net)

    def stop(*_: Any) -> None:
        raise error

    with pytest.raises(error):
        sample_latent(patched, callback=stop)
    assert all(len(injection.run_cache) == 0 for injection in patch.get_injections(patched))
    assert torch.equal(sample_latent(model), before)
    expected = sample_latent(patched)
    net.feature_cache.clear()
    assert torch.equal(sample_latent(patched), expected)


def test_partially_loaded_models(model: ModelPatcher, net: LoadedReferenceNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with --novram: weights are moved layer by layer."""
    management = comfy.model_management
    patched = apply_flashface(model, net)
    expected = sample_latent(patched)
    management.unload_all_models()
    net.feature_cache.clear()
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    in_part = sample_latent(patched)
    assert all(patcher.model.model_lowvram for patcher in (model, net.patcher, net.added_layers))
    assert torch.equal(in_part, expected)
    monkeypatch.undo()
    management.unload_all_models()
    assert torch.equal(sample_latent(patched), expected)


def test_face_position_per_image(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    masks = torch.zeros(2, 64, 64)
    masks[0, :32], masks[1, 32:] = 1, 1
    plain = sample_latent(model, batch_size=2)
    both = sample_latent(apply_flashface(model, net, face_position=masks), batch_size=2)
    for i in (0, 1):
        alone = sample_latent(apply_flashface(model, net, face_position=masks[i : i + 1]), batch_size=2)
        assert all_close(both[i], alone[i]) and not all_close(both[1 - i], alone[1 - i], 1e-3)
    assert torch.equal(sample_latent(model, batch_size=2), plain)  # the channel of other clones is unchanged


def test_face_box_equals_the_authors_mask(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:32, 24:40] = 1
    boxed = apply_flashface(model, net, face_box="0.375, 0.25, 0.625, 0.5")
    assert torch.equal(sample_latent(boxed), sample_latent(apply_flashface(model, net, face_position=mask)))
    for wrong in ("0.3, 0.1", "a, b, c, d", "0.6, 0, 0.3, 1", "0, 0, 1, 7"):
        with pytest.raises(ValueError, match="0.3, 0.1, 0.6, 0.4"):
            apply_flashface(model, net, face_box=wrong)
    with pytest.raises(ValueError, match="one of them"):
        apply_flashface(model, net, face_box="0, 0, 1, 1", face_position=mask)


def test_reference_only(net: LoadedReferenceNet) -> None:
    base, other = make_small_model(), make_small_model(weights=make_small_model().model.diffusion_model.state_dict())
    before = sample_latent(base)
    own = ModelAsReferenceNet.execute(base).args[0]
    patched = apply_flashface(base, own, strength=0.5, **PLAIN)
    assert torch.equal(sample_latent(apply_flashface(base, own, strength=0.0)), before)
    captured = sample_latent(patched)
    assert not all_close(captured, before, 1e-3)
    assert all_close(
        sample_latent(apply_flashface(base, ModelAsReferenceNet.execute(other).args[0], strength=0.5, **PLAIN)),
        captured,
    )
    twice = apply_flashface(apply_flashface(base, own, strength=0.2, **PLAIN), own, strength=0.3, **PLAIN)
    assert all_close(sample_latent(twice), captured)
    assert torch.equal(sample_latent(base), before)


def test_unsuitable_inputs_raise(model: ModelPatcher, net: LoadedReferenceNet) -> None:
    base = make_small_model()
    with pytest.raises(ValueError, match="same Load FlashFace"):
        apply_flashface(base, net)
    with pytest.raises(ValueError, match="two plain SD1.5 models"):
        apply_flashface(base, ModelAsReferenceNet.execute(make_small_model("SDXL")).args[0])
    with pytest.raises(ValueError, match="4 channels"):
        apply_flashface(model, net, torch.randn(1, 16, 28, 28))
    own = ModelAsReferenceNet.execute(base).args[0]
    with pytest.raises(ValueError, match="4 input channels"):
        apply_flashface(base, own, face_position=torch.ones(1, 64, 64))
    with pytest.raises(ValueError, match="NaN"):
        apply_flashface(model, net, face_position=torch.full((1, 64, 64), float("nan")))
    with pytest.raises(ValueError, match="include_crops"):
        identity = make_flashface_identity()
        apply_flashface(
            model,
            net,
            identity=type(identity)(identity.name, identity.box, identity.kps, identity.score, identity.weight),
        )
