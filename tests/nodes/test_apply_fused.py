"""The invariants of Apply nodes with ComfyUI's own models and samplers: fused KV."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_likeness.likeness.spec import Person
from comfyui_likeness.nodes.attention import apply_fused, patch
from support.fused_kv import (
    apply_fused_kv,
    make_fused_kv_adapter,
    make_fused_kv_identity,
    make_people,
    make_stripe_masks,
)
from support.host_models import add_controlnet, all_close, make_conditioning, make_small_model, sample_latent
from torch import Tensor


@pytest.fixture(scope="module")
def base() -> ModelPatcher:
    return make_small_model()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of faces of each pass of the face stream."""
    num_faces: list[int] = []
    real = apply_fused.capture_attention_inputs

    def counting(unet: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        num_faces.append(len(x))
        return real(unet, x, *args, **kwargs)

    monkeypatch.setattr(apply_fused, "capture_attention_inputs", counting)
    return num_faces


NO_EFFECT: list[dict[str, Any]] = [
    {"strength": 0.0},
    {"start_percent": 0.5, "end_percent": 0.5},
    {"identity_or_people": make_people([None], strength=0.0)},
]


@pytest.mark.parametrize("changes", NO_EFFECT, ids=str)
def test_strength_0_or_an_empty_schedule_changes_nothing(base: ModelPatcher, changes: dict[str, Any]) -> None:
    assert torch.equal(sample_latent(apply_fused_kv(base, **changes)), sample_latent(base))


@pytest.mark.parametrize("noise", ["clean", "match"])
def test_the_face_changes_the_image_and_upstream_is_unchanged(base: ModelPatcher, noise: str) -> None:
    before, adapter = sample_latent(base), make_fused_kv_adapter(stream_noise=noise)
    first = apply_fused_kv(base, adapter)
    once = sample_latent(first)
    second = apply_fused_kv(first, adapter, make_fused_kv_identity(seed=3))
    assert not all_close(once, before, 1e-3)
    assert not all_close(sample_latent(second), once, 1e-3)
    assert torch.equal(sample_latent(first), once)
    assert torch.equal(sample_latent(base), before)


def test_deep_copied_clones_share_the_weights(base: ModelPatcher) -> None:
    model = apply_fused_kv(base)
    deep = model.clone()
    deep.model_options = copy.deepcopy(model.model_options)
    assert torch.equal(sample_latent(deep), sample_latent(model))
    assert patch.get_injections(deep) == patch.get_injections(model)


def test_applying_twice_is_the_sum(base: ModelPatcher) -> None:
    """A key of weight w acts like w keys, so 0.4 and 0.6 of the same faces equal 1."""
    adapter = make_fused_kv_adapter()
    twice = apply_fused_kv(apply_fused_kv(base, adapter, strength=0.4), adapter, strength=0.6)
    assert all_close(sample_latent(twice), sample_latent(apply_fused_kv(base, adapter)))


def test_order_does_not_matter(base: ModelPatcher) -> None:
    from support.ip_adapters import apply_ip_adapter, make_ip_adapter

    a, b, c = make_fused_kv_adapter(), make_fused_kv_adapter(seed=2), make_ip_adapter()
    first = apply_ip_adapter(apply_fused_kv(apply_fused_kv(base, a), b, make_fused_kv_identity(seed=2)), c)
    second = apply_fused_kv(apply_fused_kv(apply_ip_adapter(base, c), b, make_fused_kv_identity(seed=2)), a)
    assert all_close(sample_latent(first), sample_latent(second))


def test_regions_of_two_nodes_work_together(base: ModelPatcher) -> None:
    """The visibility rules of two nodes with one region each are combined for every query."""
    adapter, people = make_fused_kv_adapter(), make_people(make_stripe_masks())
    together = apply_fused_kv(base, adapter, people, outside="none")
    apart = apply_fused_kv(
        apply_fused_kv(base, adapter, people[:1], outside="none"), adapter, people[1:], outside="none"
    )
    assert all_close(sample_latent(apart, size=(16, 16)), sample_latent(together, size=(16, 16)))


def test_foreign_patches_are_kept(base: ModelPatcher) -> None:
    """The difference that a patch of another pack makes is added to the output with the faces."""

    def foreign(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        return patch.run_attention_backend(q, k, v, options) + 0.1 * q

    foreign_model = base.clone()
    foreign_model.set_model_attn2_replace(foreign, "middle", 0)
    both = sample_latent(apply_fused_kv(foreign_model))
    assert not all_close(both, sample_latent(foreign_model), 1e-3) and not all_close(
        both, sample_latent(apply_fused_kv(base)), 1e-3
    )

    def same(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        return patch.run_attention_backend(q, k, v, options)

    foreign_model = base.clone()
    foreign_model.set_model_attn2_replace(same, "middle", 0)
    assert all_close(sample_latent(apply_fused_kv(foreign_model)), sample_latent(apply_fused_kv(base)))


@pytest.mark.parametrize("noise", ["clean", "match"])
def test_adjacent_windows_equal_the_full_window(base: ModelPatcher, noise: str) -> None:
    adapter = make_fused_kv_adapter(stream_noise=noise)
    early, late = {"end_percent": 0.5}, {"start_percent": 0.5}
    halved = apply_fused_kv(apply_fused_kv(base, adapter, **early), adapter, **late)
    assert torch.equal(sample_latent(halved, steps=4), sample_latent(apply_fused_kv(base, adapter), steps=4))
    tail = {"steps": 4, "start_step": 2, "last_step": 4}
    assert torch.equal(sample_latent(apply_fused_kv(base, adapter, **early), **tail), sample_latent(base, **tail))
    assert not torch.equal(sample_latent(apply_fused_kv(base, adapter, **late), **tail), sample_latent(base, **tail))


@pytest.mark.parametrize("family", ["SD1.5", "SDXL"])
@pytest.mark.parametrize("masked", [False, True])
def test_batches_and_odd_sizes(family: str, masked: bool) -> None:
    base = make_small_model(family)
    people = make_people(make_stripe_masks() if masked else [None, None])
    model = apply_fused_kv(base, make_fused_kv_adapter(family), people)
    for size in ((8, 8), (9, 11), (7, 16)):
        both = sample_latent(model, family, batch_size=2, size=size, steps=1)
        assert both.isfinite().all()
        assert all_close(both[:1], sample_latent(model, family, size=size, steps=1))
        assert not all_close(both, sample_latent(base, family, batch_size=2, size=size, steps=1), 1e-3)


def test_each_image_of_a_batch_has_its_own_mask(base: ModelPatcher) -> None:
    left, right = make_stripe_masks()
    swap = [torch.cat((left, right)), torch.cat((right, left))]
    both = sample_latent(apply_fused_kv(base, make_fused_kv_adapter(), make_people(swap)), batch_size=3)
    for i, masks in enumerate(([left, right], [right, left], [left, right])):
        alone = sample_latent(apply_fused_kv(base, make_fused_kv_adapter(), make_people(masks)), batch_size=3)
        assert all_close(both[i], alone[i])
    assert not all_close(both[1], both[0], 1e-3)


def test_the_negative_prompt_sees_no_face(base: ModelPatcher) -> None:
    """Its prediction equals the base model's, so guidance points towards the person."""
    rows: list[Tensor] = []

    def keep(args: dict[str, Any]) -> Tensor:
        rows.append(args["uncond_denoised"])
        return args["denoised"]

    for model in (base, apply_fused_kv(base, identity_or_people=make_people(make_stripe_masks()))):
        watched = model.clone()
        watched.set_model_sampler_post_cfg_function(keep)
        sample_latent(watched, steps=1)
    assert all_close(rows[0], rows[1], 1e-6)


def test_faces_and_people_of_weight_0_are_ignored(base: ModelPatcher) -> None:
    adapter, two = make_fused_kv_adapter(), make_fused_kv_identity(faces=2)
    first = replace(
        two, box=two.box[:1], kps=two.kps[:1], score=two.score[:1], weight=two.weight[:1], crop=two.crop[:1]
    )
    without = replace(two, weight=torch.tensor([1.0, 0.0]))
    assert torch.equal(
        sample_latent(apply_fused_kv(base, adapter, without)), sample_latent(apply_fused_kv(base, adapter, first))
    )
    alone, absent = Person(make_fused_kv_identity(seed=1)), Person(make_fused_kv_identity(seed=2), strength=0.0)
    assert torch.equal(
        sample_latent(apply_fused_kv(base, adapter, (alone, absent))),
        sample_latent(apply_fused_kv(base, adapter, (alone,))),
    )
    nearly = Person(make_fused_kv_identity(seed=2), strength=1e-9)
    assert all_close(
        sample_latent(apply_fused_kv(base, adapter, (alone, nearly))),
        sample_latent(apply_fused_kv(base, adapter, (alone,))),
    )


def test_people_without_masks_are_mixed(base: ModelPatcher) -> None:
    a, b = make_people([None, None])
    mixed = sample_latent(apply_fused_kv(base, make_fused_kv_adapter(), (a, b)))
    for one in (a, b):
        assert not all_close(mixed, sample_latent(apply_fused_kv(base, make_fused_kv_adapter(), (one,))), 1e-3)
    assert all_close(mixed, sample_latent(apply_fused_kv(base, make_fused_kv_adapter(), (b, a))))
    three = sample_latent(apply_fused_kv(base, make_fused_kv_adapter(), (replace(a, strength=3.0), b)))
    more = sample_latent(apply_fused_kv(base, make_fused_kv_adapter(), (replace(a, strength=1e4), b)))
    alone = sample_latent(apply_fused_kv(base, make_fused_kv_adapter(), (replace(a, strength=1e4),)))
    assert not all_close(three, mixed, 1e-3)
    assert all_close(more, alone, 1e-2)


def test_a_clean_face_is_read_once_for_all_later_images(base: ModelPatcher, passes: list[int]) -> None:
    adapter = make_fused_kv_adapter()
    model = apply_fused_kv(base, adapter, make_fused_kv_identity(faces=2))
    first = sample_latent(model, steps=3, batch_size=2)
    assert passes == [2]
    assert torch.equal(sample_latent(model, steps=3, batch_size=2), first)
    assert torch.equal(
        sample_latent(apply_fused_kv(base, adapter, make_fused_kv_identity(faces=2)), steps=3, batch_size=2), first
    )  # after the node ran again
    sample_latent(model, steps=3, positive=make_conditioning(8), negative=make_conditioning(9))
    assert passes == [2]
    adapter.feature_cache.clear()
    assert torch.equal(sample_latent(model, steps=3, batch_size=2), first)


def test_a_matching_face_is_read_once_per_step(base: ModelPatcher, passes: list[int]) -> None:
    model = apply_fused_kv(base, make_fused_kv_adapter(stream_noise="match"))
    first = sample_latent(model, steps=3, batch_size=2)
    assert passes == [1] * 3
    assert torch.equal(sample_latent(model, steps=3, batch_size=2), first)
    assert passes == [1] * 3


def test_the_face_is_read_again_with_a_lora_after_the_node(base: ModelPatcher, passes: list[int]) -> None:
    """The cache key is that of the running weights, not of the model that the node got."""
    model = apply_fused_kv(base)
    plain = sample_latent(model, steps=1)
    later = model.clone()
    key = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v.weight"
    more = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    later.add_patches({key: ("diff", (more,))}, 1.0)
    changed = sample_latent(later, steps=1)
    assert passes == [1, 1] and not all_close(changed, plain, 1e-3)
    fresh = base.clone()
    fresh.add_patches({key: ("diff", (more,))}, 1.0)
    assert torch.equal(sample_latent(apply_fused_kv(fresh), steps=1), changed)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample_latent(model, steps=1), plain)


@pytest.mark.parametrize("error", [comfy.model_management.InterruptProcessingException, ValueError])
def test_an_interrupt_leaves_no_trace(base: ModelPatcher, error: type[BaseException]) -> None:
    before, model = sample_latent(base), apply_fused_kv(base, identity_or_people=make_people(make_stripe_masks()))
    expected = sample_latent(model)

    def stop(*_: Any) -> None:
        raise error

    with pytest.raises(error):
        sample_latent(model, callback=stop)
    assert len(patch.get_injections(model)[0].run_cache) == 0
    assert torch.equal(sample_latent(base), before)
    assert torch.equal(sample_latent(model), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_follows_the_base(base: ModelPatcher, dtype: torch.dtype) -> None:
    half = base.clone()
    half.set_model_compute_dtype(dtype)
    people = make_people(make_stripe_masks(), strength=0.7)
    out, expected = (
        sample_latent(apply_fused_kv(half, identity_or_people=people), steps=1),
        sample_latent(apply_fused_kv(base, identity_or_people=people), steps=1),
    )
    assert out.isfinite().all()
    assert float((out - expected).norm() / expected.norm()) < 0.1


def test_a_controlnet_and_the_face_work_together(base: ModelPatcher) -> None:
    controlled = {"positive": add_controlnet(make_conditioning(1)), "negative": add_controlnet(make_conditioning(2))}
    out = sample_latent(apply_fused_kv(base), **controlled)
    assert not all_close(out, sample_latent(base, **controlled), 1e-3)
    assert not all_close(out, sample_latent(apply_fused_kv(base)), 1e-3)
    assert torch.equal(
        sample_latent(apply_fused_kv(base, strength=0.0), **controlled), sample_latent(base, **controlled)
    )


def test_prompts_with_masks_and_areas(base: ModelPatcher) -> None:
    masked = make_conditioning(1, mask=torch.ones(1, 8, 8), mask_strength=1.0)
    assert (
        sample_latent(apply_fused_kv(base, identity_or_people=make_people(make_stripe_masks())), positive=masked)
        .isfinite()
        .all()
    )
    areas = [*make_conditioning(1), *make_conditioning(3, area=(8, 4, 0, 4), strength=1.0)]
    assert sample_latent(apply_fused_kv(base), positive=areas).isfinite().all()
    with pytest.raises(ValueError, match="mask instead of an area"):
        sample_latent(apply_fused_kv(base, identity_or_people=make_people(make_stripe_masks())), positive=areas)


def test_face_size(base: ModelPatcher) -> None:
    small = apply_fused_kv(base, face_size=32)
    assert not all_close(sample_latent(small), sample_latent(apply_fused_kv(base)), 1e-3)


def test_unsuitable_inputs_raise(base: ModelPatcher) -> None:
    with pytest.raises(ValueError, match=r"adapter for SDXL \(70 cross-attentions up to 64 wide\); .* has 16"):
        apply_fused_kv(base, make_fused_kv_adapter("SDXL"))
    with pytest.raises(ValueError, match="9 input channels"):
        apply_fused_kv(make_small_model(in_channels=9))
    with pytest.raises(ValueError, match="without face crops"):
        apply_fused_kv(base, identity_or_people=replace(make_fused_kv_identity(), crop=None))
    with pytest.raises(ValueError, match="faces of weight 0"):
        apply_fused_kv(base, identity_or_people=replace(make_fused_kv_identity(), weight=torch.zeros(1)))


def test_the_host_loads_and_frees_the_adapter(base: ModelPatcher) -> None:
    adapter = make_fused_kv_adapter()
    model = apply_fused_kv(base, adapter)
    out = sample_latent(model)
    loaded = [m.model.model for m in comfy.model_management.current_loaded_models]
    assert any(module is adapter.patcher.model for module in loaded)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample_latent(model), out)


def test_partially_loaded_models(base: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with --novram: weights are moved layer by layer."""
    management, adapter = comfy.model_management, make_fused_kv_adapter()
    model = apply_fused_kv(base, adapter)
    expected = sample_latent(model)
    management.unload_all_models()
    adapter.feature_cache.clear()
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    in_part = sample_latent(model)
    assert base.model.model_lowvram and adapter.patcher.model.model_lowvram
    assert torch.equal(in_part, expected)
    monkeypatch.undo()
    management.unload_all_models()


def test_the_face_is_read_with_a_lora_hooked_to_a_prompt(base: ModelPatcher) -> None:
    """LoRAs hooked to a prompt change the weights within a step, so faces are not cached."""
    name, generator = (
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_v",
        torch.Generator().manual_seed(1),
    )
    up, down = (torch.randn(shape, generator=generator) for shape in ((32, 4), (4, 32)))
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    hooked = make_conditioning(1, hooks=comfy.hooks.create_hook_lora(lora, 1.0, 0.0))
    adapter = make_fused_kv_adapter()
    both = sample_latent(apply_fused_kv(base, adapter), positive=hooked, cfg=1.0)
    later, _ = comfy.sd.load_lora_for_models(base, None, lora, 1.0, 0.0)
    assert later is not None
    expected = sample_latent(apply_fused_kv(later, make_fused_kv_adapter()), cfg=1.0)
    plain = sample_latent(apply_fused_kv(base, adapter), cfg=1.0)
    assert all_close(both, expected, 1e-4) and not all_close(both, plain, 1e-3)


def test_reference_attention_and_fused_keys_work_together(base: ModelPatcher) -> None:
    from comfyui_likeness.nodes.loaders.flashface_loader import ModelAsReferenceNet
    from support.flashface_models import apply_flashface, make_face_latents

    net = ModelAsReferenceNet.execute(base, 64).args[0]
    settings = {"strength": 0.5, "reference_guidance": 2.0, "launch": 900}
    first = apply_fused_kv(apply_flashface(base, net, make_face_latents(), **settings))
    second = apply_flashface(apply_fused_kv(base), net, make_face_latents(), **settings)
    out = sample_latent(first)
    assert all_close(out, sample_latent(second), 1e-4)
    assert not all_close(out, sample_latent(apply_fused_kv(base)), 1e-3) and not all_close(
        out, sample_latent(apply_flashface(base, net, make_face_latents())), 1e-3
    )
